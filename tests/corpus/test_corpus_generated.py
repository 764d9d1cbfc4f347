"""With open labels a corpus is scored with generated text, which is what generating for each row alone gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import corpora
import pyarrow.parquet
import pytest
import torch
from cases import CASES
from command import Run, assert_refused

import secateur
from secateur.corpus import score
from secateur.tasks import CausalLM, TextToText

LINE = "score m --labels open --threads 2 --max-tokens 96 --dtype float32 --data a.jsonl --id-column id --json"
SEED = 5  # The beams of this model find other texts than greedy generation does.
KINDS: dict[str, tuple[str, Any]] = {"t5-gated": ("text-to-text", TextToText), "llama": ("causal-lm", CausalLM)}


def alone(name: str, text: str, longest: int) -> str:
    case = CASES[name]
    model = case.model().eval()
    task = KINDS[name][1](case.task.reader)
    (answer,) = task.generate(model, [{"input": text, "target": ""}], 1000, longest)
    assert isinstance(answer, str)
    return answer


@pytest.mark.parametrize("name", KINDS)
def test_generated_text_is_that_of_each_row_alone(run: Run, tmp_path: Path, name: str) -> None:
    secateur.save(CASES[name].model(), "m", tokenizer=CASES[name].task.reader)
    texts = corpora.texts(30)
    texts[4] = ""
    corpora.json_lines(tmp_path, texts)
    result = run(f"{LINE} --task {KINDS[name][0]} --max-new-tokens 7 --out out")
    assert (result.code, result.document["scored"], result.document["rejected"]) == (0, 29, 1), result.errors
    rows = pyarrow.parquet.read_table("out/shards/a.jsonl.parquet").to_pylist()
    assert list(rows[0]) == ["row", "id", "text"]
    assert [row["text"] for row in rows] == [alone(name, texts[row["row"]], 7) for row in rows]
    assert len({row["text"] for row in rows}) > 1
    assert result.document["labels"] == {}
    assert run(f"{LINE} --task {KINDS[name][0]} --max-new-tokens 7 --out out --resume").code == 0
    other = run(f"{LINE} --task {KINDS[name][0]} --max-new-tokens 8 --out out --resume")
    assert (other.code, other.errors[-1][:35]) == (2, "secateur: max_new_tokens: 'out' was")


@pytest.mark.parametrize("name", KINDS)
def test_score_generates_from_python(name: str) -> None:
    case, texts = CASES[name], corpora.texts(6)
    task = KINDS[name][1](case.task.reader)
    (batch,) = score(case.model().eval(), task, texts, max_new_tokens=5, threads=1)
    assert batch.schema.names == ["row", "text", "reason"]
    assert batch.column("text").to_pylist() == [alone(name, text, 5) for text in texts]


def searched(name: str, text: str, longest: int, beams: int) -> str:
    """Return the best of all outputs, by a search with beams written as loops over single passes."""
    case = CASES[name]
    model, tokenizer = case.model(seed=SEED), case.task.reader
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    decodes = name == "t5-gated"
    end = tokenizer.eos_token_id
    open_ones, done = [(0.0, list[int]())], list[tuple[float, list[int]]]()
    for _ in range(longest):
        steps = list[tuple[float, list[int]]]()
        for total, pieces in open_ones:
            begun = torch.tensor([[model.config.decoder_start_token_id, *pieces]]) if decodes else None  # type: ignore[union-attr]
            inputs = {"input_ids": ids, "decoder_input_ids": begun} if decodes else {"input_ids": extended(ids, pieces)}
            with torch.no_grad():
                scores = model(**inputs).logits[0, -1].log_softmax(-1)
            steps += [(total + float(score), [*pieces, piece]) for piece, score in enumerate(scores)]
        steps.sort(key=lambda step: -step[0])
        # Of twice as many steps as beams, those that end count only where they are among the best, as in transformers.
        done += [(total / len(pieces), pieces) for total, pieces in steps[:beams] if pieces[-1] == end]
        open_ones = [step for step in steps[: 2 * beams] if step[1][-1] != end][:beams]
        done = sorted(done, key=lambda one: -one[0])[:beams]
    done += [(total / len(pieces), pieces) for total, pieces in open_ones] if len(done) < beams else []
    text_of: str = tokenizer.decode(max(done, key=lambda one: one[0])[1], skip_special_tokens=True)
    return text_of


def extended(ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    return torch.cat([ids, torch.tensor([pieces], dtype=torch.int64)], 1)


@pytest.mark.parametrize("name", KINDS)
def test_text_of_beams_is_that_of_a_search_by_loops(run: Run, tmp_path: Path, name: str) -> None:
    secateur.save(CASES[name].model(seed=SEED), "m", tokenizer=CASES[name].task.reader)
    texts = corpora.texts(10)
    corpora.json_lines(tmp_path, texts)
    line = f"{LINE} --task {KINDS[name][0]} --max-new-tokens 4"
    assert run(f"{line} --beams 3 --out out").code == 0
    rows = pyarrow.parquet.read_table("out/shards/a.jsonl.parquet").to_pylist()
    assert [row["text"] for row in rows] == [searched(name, text, 4, 3) for text in texts]
    assert run(f"{line} --out greedy").code == 0
    assert [row["text"] for row in pyarrow.parquet.read_table("greedy/shards/a.jsonl.parquet").to_pylist()] != [
        row["text"] for row in rows
    ]
    other = run(f"{line} --out out --resume")
    assert (other.code, "beams" in other.errors[-1]) == (2, True)


def test_a_row_that_is_not_finite_is_rejected() -> None:
    """The other rows of its batch have their texts."""
    case = CASES["t5-gated"]
    model, texts = case.model().eval(), corpora.texts(3)
    task = TextToText(case.task.reader)
    bad = set(task.encode(texts)[1]) - set(task.encode(texts)[0]) - set(task.encode(texts)[2])
    assert bad
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    untied = torch.nn.Embedding(*weight.shape)
    untied.weight.data.copy_(weight)
    untied.weight.data[list(bad)] = float("nan")
    model.encoder.embed_tokens = untied  # type: ignore[union-attr]
    (batch,) = score(model, task, texts, max_new_tokens=3, threads=1)
    reasons = batch.column("reason").to_pylist()
    assert [reason is None for reason in reasons] == [True, False, True]
    assert reasons[1] == "not finite: the model's scores are NaN or inf"
    assert batch.column("text").to_pylist()[1] is None


def test_beams_are_counted_and_need_generation() -> None:
    case = CASES["t5-gated"]
    with pytest.raises(secateur.InputError, match=r"^beams: expected a whole number from 1 to 100, got 0$"):
        next(score(case.model(), TextToText(case.task.reader), ["a"], max_new_tokens=3, beams=0))
    with pytest.raises(secateur.InputError, match=r"^beams: expected 1 without max_new_tokens"):
        next(score(case.model(), case.task, ["a"], beams=2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--labels a,b --max-new-tokens 5", "max-new-tokens: expected none without --labels open, got 5"),
        ("--labels a,b --beams 2", "beams: expected 1 without --labels open, got 2"),
        ("--labels open --compile on", "compile: expected off or auto where results are text"),
    ],
)
def test_unusable_options_are_refused(run: Run, tmp_path: Path, options: str, said: str) -> None:
    secateur.save(CASES["t5-gated"].model(), "m", tokenizer=CASES["t5-gated"].task.reader)
    corpora.json_lines(tmp_path, corpora.texts(3))
    assert_refused(run(f"score m --data a.jsonl --out out {options}"), said, "out")
