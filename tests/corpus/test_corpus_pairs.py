"""Bulk scoring of pairs of texts: the scores of single forward passes, rejected rows, resumed runs, and very long texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from cases import CASES, CLASSES, _bart, _encoder, piece_tokenizer, sentences, word_tokenizer
from command import Run
from counting import Counting
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification

import secateur
from secateur import InputError, SequenceClassification
from secateur.corpus import mapper, score
from secateur.corpus.sources import Row
from secateur.corpus.windows import windows

ROOM = 16
TEXTS = sentences(20, seed=5)
PAIRS: list[Any] = [[first, second] for first, second in zip(TEXTS, reversed(TEXTS), strict=True)]
COLUMNS = ("premise", "hypothesis")
LINE = "score m --data corpus/* --id-column id --threads 1 --max-tokens 64 --dtype float32 --compile off --engine-runtime torch"


def pair_tokenizer(**options: Any) -> Any:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = piece_tokenizer(model_max_length=ROOM, model_input_names=names, **options)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def bert() -> Any:
    torch.manual_seed(0)
    return _encoder(BertForSequenceClassification, BertConfig, CLASSES).eval()


def passes(model: Any, tokenizer: Any, values: Sequence[Any]) -> list[list[float]]:
    """Return the probabilities of single forward passes on the tokenizer's own encoding."""
    probabilities = []
    for value in values:
        texts = [value] if isinstance(value, str) else value
        encoded = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=ROOM)
        with torch.no_grad():
            probabilities.append(model(**encoded).logits.softmax(1)[0].tolist())
    return probabilities


def of_batch(batch: Any) -> list[list[float]]:
    return [[row[f"p_{label}"] for label in CLASSES] for row in batch.to_pylist()]


def assert_close(rows: list[list[float]], expected: list[list[float]]) -> None:
    assert torch.allclose(torch.tensor(rows), torch.tensor(expected), atol=1e-5)
    assert float(torch.tensor(expected).std(0).min()) > 1e-3  # The rows differ.


@pytest.mark.parametrize("kind", ["pairs", "tuples", "mappings", "frame", "mapper", "with texts"])
def test_pairs_in_memory_get_the_probabilities_of_the_models_own_pass(kind: str) -> None:
    model, tokenizer = bert(), pair_tokenizer()
    task = SequenceClassification(tokenizer)
    values = [*PAIRS[:9], *TEXTS[:3], *PAIRS[9:]] if kind == "with texts" else PAIRS
    data: Any = {
        "tuples": [tuple(pair) for pair in PAIRS],
        "mappings": [{"text": pair} for pair in PAIRS],
        "frame": pandas.DataFrame({"text": PAIRS}),
    }.get(kind, values)
    if kind == "mapper":
        scored = datasets.Dataset.from_dict({"text": PAIRS}).map(mapper(model, task), batched=True, batch_size=7)
        rows = of_batch(scored.to_pandas().pipe(pyarrow.Table.from_pandas))
    else:
        (batch,) = score(model, task, data, threads=1, max_tokens=64)
        assert batch.column("reason").null_count == len(values)
        rows = of_batch(batch)
    assert_close(rows, passes(model, tokenizer, values))
    probabilities = task.probabilities(model, [{"input": value} for value in values], 64)
    assert_close(rows, [[row[label] for label in CLASSES] for row in probabilities])


def test_texts_and_pairs_of_a_model_that_counts_end_marks() -> None:
    torch.manual_seed(0)
    labels: Any = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: k for k, name in enumerate(CLASSES)}}
    model = _bart(BartForSequenceClassification, BartConfig, **labels).eval()
    tokenizer = word_tokenizer(start=False, end=True, model_max_length=ROOM)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    values = [PAIRS[0], TEXTS[0], PAIRS[1], TEXTS[1], ["the </s> cat", "a dog"]]
    (batch,) = score(model, SequenceClassification(tokenizer), values, threads=1)
    assert_close(of_batch(batch.slice(0, 4)), passes(model, tokenizer, values[:4]))
    (reason,) = batch.column("reason").to_pylist()[4:]
    assert reason.startswith("3 end marks, at the last of which BartForSequenceClassification reads a text; expected 2")


def pairs_file(folder: Path, rows: Sequence[Any], kind: str, name: str) -> None:
    folder.mkdir(exist_ok=True)
    identities = [f"{name}{k}" for k in range(len(rows))]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": identities, "text": rows}), folder / f"{name}.parquet")
    else:
        lines = (json.dumps({"id": identity, "text": row}) + "\n" for identity, row in zip(identities, rows, strict=True))
        (folder / f"{name}.jsonl").write_text("".join(lines))


REJECTED: dict[str, tuple[Any, str]] = {
    "one": (["the cat"], "expected a text or a pair of texts, got a list of 1"),
    "three": (["the cat", "a", "b"], "expected a text or a pair of texts, got a list of 3"),
    "null": (["the cat", None], "the second text of the pair: null"),
    "empty": ([" ", "the cat"], "the first text of the pair: empty"),
    "nothing": (None, "null"),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_command_scores_pairs_and_rejects_other_lists(run: Run, kind: str, tmp_path: Path) -> None:
    secateur.save(bert(), "m", tokenizer=pair_tokenizer())
    rows = [*PAIRS[:3], *(value for value, _ in REJECTED.values()), *PAIRS[3:]]
    pairs_file(Path("corpus"), rows, kind, "a")
    assert run(f"{LINE} --out scored").code == 0
    (written,) = corpora.read(tmp_path / "scored").values()
    (rejected,) = corpora.rejects(tmp_path / "scored").values()
    assert [row["reason"] for row in rejected] == [reason for _, reason in REJECTED.values()]
    assert [row["id"] for row in rejected] == ["a3", "a4", "a5", "a6", "a7"]
    assert [row["row"] for row in written] == [0, 1, 2, *range(8, len(rows))]
    assert_close([[row[f"p_{label}"] for label in CLASSES] for row in written], passes(bert(), pair_tokenizer(), PAIRS))


@pytest.mark.parametrize("option", ["", "--input-column premise,hypothesis"])
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_pairs_of_two_columns(run: Run, tmp_path: Path, form: str, option: str) -> None:
    """Two columns with common names are found, and give what lists of two give."""
    secateur.save(bert(), "m", tokenizer=pair_tokenizer())
    rows = [*PAIRS, ["the cat", None]]
    frame = pandas.DataFrame({"id": range(len(rows)), **{name: [r[k] for r in rows] for k, name in enumerate(COLUMNS)}})
    Path("corpus").mkdir()
    frame.to_parquet("corpus/a.parquet") if form == "parquet" else frame.to_csv("corpus/a.csv", index=False)
    result = run(f"{LINE} --out scored {option}")
    assert result.code == 0, result.errors
    (written,) = corpora.read(tmp_path / "scored").values()
    assert_close([[row[f"p_{label}"] for label in CLASSES] for row in written], passes(bert(), pair_tokenizer(), PAIRS))
    (rejected,) = corpora.rejects(tmp_path / "scored").values()
    assert [row["reason"] for row in rejected] == [f"the second text of the pair: {'null' if form == 'parquet' else 'empty'}"]


def test_pairs_of_two_columns_in_memory() -> None:
    model, tokenizer = bert(), pair_tokenizer()
    task, data = SequenceClassification(tokenizer), dict(zip(COLUMNS, zip(*PAIRS, strict=True), strict=True))
    (of_columns,) = score(model, task, data, column=COLUMNS, threads=1)
    assert_close(of_batch(of_columns), passes(model, tokenizer, PAIRS))
    (of_rows,) = score(model, task, PAIRS, column=COLUMNS, threads=1)
    assert of_batch(of_rows) == of_batch(of_columns)
    mapped = datasets.Dataset.from_dict(data).map(mapper(model, task, column=COLUMNS), batched=True, batch_size=7)
    assert_close(of_batch(mapped.to_pandas().pipe(pyarrow.Table.from_pandas)), passes(model, tokenizer, PAIRS))


def test_a_resumed_run_over_pairs_gives_the_same_files(run: Run, tmp_path: Path) -> None:
    secateur.save(bert(), "m", tokenizer=pair_tokenizer())
    for name in "ab":
        pairs_file(Path("corpus"), [*PAIRS, ["a", None]], "jsonl", name)
    assert run(f"{LINE} --out whole").code == 0
    assert run(f"{LINE} --out parts").code == 0
    (tmp_path / "parts/shards/b.jsonl.parquet").unlink()
    assert run(f"{LINE} --out parts --resume").code == 0
    assert corpora.read(tmp_path / "parts") == corpora.read(tmp_path / "whole")
    assert corpora.rejects(tmp_path / "parts") == corpora.rejects(tmp_path / "whole")


def test_tasks_of_one_text_reject_pairs() -> None:
    case = CASES["t5-gated"]
    (batch,) = score(case.model(), case.task, [PAIRS[0], TEXTS[0]], threads=1)
    assert batch.column("reason").to_pylist() == ["expected text, got list", None]


def test_a_row_of_a_pair_is_no_batch_of_two_texts() -> None:
    model, task = bert(), SequenceClassification(pair_tokenizer())
    for data in (datasets.Dataset.from_dict({"text": PAIRS}), [{"id": 1, "text": PAIRS[0]}]):
        with pytest.raises(InputError, match=r"^mapper: expected a batch of rows"):
            data.map(mapper(model, task)) if isinstance(data, datasets.Dataset) else mapper(model, task)(data[0])


LONG = " ".join(sentences(500, seed=1))
SHORT = {
    "nothing": "", "short": "the cat sat", "middle": " ".join(sentences(20, seed=2)), "long": " ".join(sentences(300, seed=3)),
}  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("room", [ROOM, ROOM - 1])
@pytest.mark.parametrize("other", SHORT)
def test_little_of_a_long_pair_is_encoded_to_the_same_ids(other: str, room: int, side: str) -> None:
    tokenizer = Counting(pair_tokenizer(truncation_side=side))
    task, model = SequenceClassification(tokenizer, max_length=room), bert()
    for pair in ([LONG, SHORT[other]], [SHORT[other], LONG]):
        tokenizer.characters = 0
        (encoded,) = task.encode_cut_each(model, [pair], room)
        whole = tokenizer.tokenizer(*([text] for text in pair), truncation=True, max_length=room)
        assert [encoded.ids] == whole["input_ids"]
        assert [list(encoded.segments)] == whole["token_type_ids"]
        assert not encoded.exact
        task.encode_cut_each(model, [[text * 50 for text in pair]], room)
        assert tokenizer.characters < len(LONG) * 10


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(side: str) -> None:
    tokenizer = pair_tokenizer(truncation_side=side)
    task, model = SequenceClassification(tokenizer), bert()
    for room in (4, 7, 8):
        pairs = [["a " * first, "the " * second] for first in range(8) for second in range(8)]
        whole = tokenizer(*([pair[k] for pair in pairs] for k in (0, 1)), truncation=True, max_length=room)
        encoded = task.encode_cut_each(model, pairs, room)
        assert [one.ids for one in encoded] == whole["input_ids"]
        assert [list(one.segments) for one in encoded] == whole["token_type_ids"]
        assert [one.tokens for one in encoded] == [first + second + 3 for first in range(8) for second in range(8)]
    (refused,) = task.encode_cut_each(model, [["a", "the"]], 3)
    assert refused.reason == "the tokenizer cannot encode it: expected room for more ids than its 3 marks of a pair"


def test_long_pairs_are_rejected_if_asked_for() -> None:
    task = SequenceClassification(pair_tokenizer())
    rows = [Row(pair) for pair in (["a", "b"], ["the cat sat on a tree ran"] * 2, [LONG, "b"])]
    (window,) = windows([(rows, 1.0)], task, bert(), 3, max_tokens=64, on_long="error")
    tokens = len(task.tokenizer(*rows[1].value)["input_ids"])
    assert window.reasons[:2] == [None, f"{tokens} tokens, of which the model takes {ROOM}"]
    assert window.reasons[2] is not None
    assert window.reasons[2].startswith("at least ")
