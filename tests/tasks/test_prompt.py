"""Prompts and chat templates around inputs: the same ids as with prompted data, in every use of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, sentences, uniform_plan, word_tokenizer
from command import Run
from transformers import AutoTokenizer

import secateur
from secateur.flow.loaded import load_model, make_task
from secateur.tasks.prompt import Prompt
from secateur.tasks.task_file import TASK_FILE

CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
TEXTS = sentences(12, seed=3)
RAW: list[dict[str, Any]] = [{"input": text, "target": LABELS[k % len(LABELS)]} for k, text in enumerate(TEXTS)]
WORDS = "the {input} is"
PROMPTED = [{**row, "input": WORDS.format(**row)} for row in RAW]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "bert-sequence"])
def test_a_prompt_gives_what_prompted_data_give(name: str) -> None:
    case = CASES[name]
    kind: Any = type(case.task)
    model, reader = case.model(torch.float64), case.task.reader
    labels = None if name == "bert-sequence" else LABELS
    asking, plain = kind(reader, labels=labels, prompt=WORDS), kind(reader, labels=labels)
    rows = [{**row, "target": case.examples[k % 2]["target"]} for k, row in enumerate(RAW)] if labels is None else RAW
    prompted = [{**row, "input": WORDS.format(**row)} for row in rows]
    with torch.inference_mode():
        expected = plain.ranked(model, prompted, 64)
        assert not torch.equal(expected, plain.ranked(model, rows, 64))
        torch.testing.assert_close(asking.ranked(model, rows, 64), expected, rtol=0, atol=0)
        # Data that have the prompt already give the same.
        torch.testing.assert_close(asking.ranked(model, prompted, 64), expected, rtol=0, atol=0)
    one, other = secateur.attribute(model, asking, rows), secateur.attribute(model, plain, prompted)
    assert one == other
    scored = list(secateur.corpus.score(model, asking, [row["input"] for row in rows]))
    assert scored == list(secateur.corpus.score(model, plain, [row["input"] for row in prompted]))


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_a_cut_takes_words_of_the_input_and_none_of_the_prompt(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    kind: Any = type(case.task)
    task = kind(case.task.reader, labels=LABELS, prompt=WORDS, max_length=12)
    plain = kind(case.task.reader, labels=LABELS)
    model = case.model()
    words = TEXTS[0].split()
    (item,) = task.input_items(model, [{"input": " ".join(words * 9)}])
    assert len(item.input_ids) == task.room(model)
    assert any("1 of 1 inputs are longer" in message for message in caplog.messages)
    head, tail = (plain.encode([f"{part}"])[0] for part in ("the", "is"))
    assert item.input_ids[: len(head) - 1] == head[: len(head) - 1]
    end = tail if name == "t5-gated" else tail[-1:]
    assert item.input_ids[-len(end) :] == end


def test_a_chat_template_is_asked_with_and_begins_with_one_start_mark() -> None:
    tokenizer = word_tokenizer(start=True, end=False)
    tokenizer.chat_template = CHAT.replace("<s>", tokenizer.bos_token)
    task = secateur.CausalLM(tokenizer, labels=LABELS, prompt=Prompt("a {input}", chat=True))
    expected = f"{tokenizer.bos_token}user a {TEXTS[0]} the"
    assert task.prompted(TEXTS[0]) == expected
    (ids,) = task.encode([task.prompted(TEXTS[0])])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    with_system = secateur.CausalLM(tokenizer, labels=LABELS, prompt=Prompt(chat=True, system="no"))
    assert with_system.prompted("a").startswith(f"{tokenizer.bos_token}system no")


def test_a_prompt_of_several_columns_names_the_columns_of_the_data() -> None:
    case = CASES["llama"]
    task = secateur.CausalLM(case.task.reader, labels=LABELS, prompt="{premise} so {hypothesis}")
    rows = [
        {"premise": one, "hypothesis": two, "label": LABELS[len(one) % 2]}
        for one, two in zip(TEXTS[:6], TEXTS[6:], strict=True)
    ]
    assert task.read(rows)[0] == {"input": [TEXTS[0], TEXTS[6]], "target": rows[0]["label"]}
    plain = secateur.CausalLM(case.task.reader, labels=LABELS)
    prompted = [{"input": "{premise} so {hypothesis}".format(**row), "target": row["label"]} for row in rows]
    model = case.model()
    assert secateur.evaluate(model, task, rows).to_json() == secateur.evaluate(model, plain, prompted).to_json()
    assert secateur.attribute(model, task, rows) == secateur.attribute(model, plain, prompted)
    with pytest.raises(
        secateur.InputError, match=r"^examples, row 1: expected texts for premise, hypothesis for the prompt, got"
    ):
        task.ranked(model, [{"input": "a"}], 64)
    with pytest.raises(secateur.InputError, match=r"^columns: expected none for the input, as the prompt names premise"):
        secateur.CausalLM(case.task.reader, prompt="{premise} {hypothesis}", columns={"input": "text"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "no place"}, "prompt: expected the place of the input"),
        ({"prompt": "{input.name}"}, "prompt: expected names of columns in braces"),
        ({"prompt": "{input!r}"}, "prompt: expected names of columns in braces"),
        ({"prompt": "{input:>9}"}, "prompt: expected names of columns in braces"),
        ({"prompt": "{} {0}"}, "prompt: expected names of columns in braces"),
        ({"prompt": "{input"}, "prompt: expected a text with places such as {input}, got"),
        ({"prompt": "{input} {other}"}, "prompt: expected {input} alone, or names of columns"),
        ({"prompt": 3}, "prompt: expected a text or a secateur.Prompt, got 3"),
        (
            {"prompt": Prompt(chat=True)},
            "chat: expected a tokenizer with a chat template for these messages, got: no chat template",
        ),
        ({"prompt": "{input} " + "the " * 200, "max_length": 20}, "prompt: expected under"),
        ({"columns": {"text": "a"}}, "columns: expected names for 'input', 'target', got one for 'text'"),
    ],
)
def test_wrong_prompts_are_refused(options: dict[str, Any], message: str) -> None:
    case = CASES["llama"]
    with pytest.raises(secateur.InputError) as caught:
        secateur.evaluate(case.model(), secateur.CausalLM(case.task.reader, labels=LABELS, **options), RAW)
    assert str(caught.value).startswith(message)


def test_braces_and_text_that_ends_as_the_prompt_begins() -> None:
    prompt = Prompt("{{a}} {input}")
    assert prompt.around("b", None) == "{a} b"
    assert Prompt("a: {input} b").around("a: b", None) == "a: a: b b"  # Too short to have both parts.
    assert Prompt("a: {input} b").around("a: c b", None) == "a: c b"
    with pytest.raises(secateur.InputError, match=r"^system: expected none without chat"):
        Prompt(system="be brief")


def test_the_folder_remembers_the_prompt(tmp_path: Path) -> None:
    case = CASES["llama"]
    secateur.save(case.model(), tmp_path / "dense", tokenizer=case.task.reader)
    rows = [{"text": row["input"], "label": row["target"]} for row in RAW * 3]
    result = secateur.compress(
        str(tmp_path / "dense"), rows, keep=0.5, align=1, prompt=WORDS, labels=LABELS, out=tmp_path / "out",
        recoveries=[None], batch_sizes=[1], lengths=[8],
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / TASK_FILE).read_text())["prompt"] == {"text": WORDS, "chat": False, "system": None}
    loaded = load_model(str(tmp_path / "out"), task=None, device="cpu", dtype="float32")
    task: Any = make_task(loaded, "auto", [{}], None)
    assert task.prompt == Prompt(WORDS)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(task.ranked(loaded.model, RAW, 64), result.task.ranked(result.pruned, RAW, 64))
    known = json.loads((tmp_path / "out" / TASK_FILE).read_text())
    for damaged in ({"text": 3}, {"text": "none"}, {"words": "{input}"}, "{input}"):
        (tmp_path / "out" / TASK_FILE).write_text(json.dumps({**known, "prompt": damaged}))
        with pytest.raises(secateur.InputError, match=r"^model: .*secateur.json' is not the description of a task"):
            load_model(str(tmp_path / "out"), task=None, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_a_router_asks_with_the_prompt_of_each_task(name: str) -> None:
    case = CASES[name]
    kind: Any = type(case.task)
    several = kind(case.task.reader, labels=LABELS, prompt="{premise} so {hypothesis}")
    tasks = {"one": kind(case.task.reader, labels=LABELS, prompt=WORDS), "several": several, "plain": case.task}
    router = secateur.TaskPlans(case.model(), dict.fromkeys(tasks, uniform_plan(case, "head")), tasks)
    pairs = list(zip(TEXTS[:6], TEXTS[6:], strict=True))
    prompted = {
        "one": ([row["input"] for row in RAW], [row["input"] for row in PROMPTED]),
        "several": (pairs, [f"{one} so {two}" for one, two in pairs]),
    }
    for of_task, (raw, whole) in prompted.items():
        assert router.score(of_task, raw) == router.score("plain", whole)
        assert router.generate(of_task, raw, max_new_tokens=3) == router.generate("plain", whole, max_new_tokens=3)
        assert router.score(of_task, raw) != router.score("plain", [text if isinstance(text, str) else text[0] for text in raw])
    wrongs: list[Any] = [TEXTS[0], [TEXTS[0]], [TEXTS[0], 3]]
    for wrong in wrongs:
        with pytest.raises(secateur.InputError, match=r"^inputs, row 2: expected texts for premise, hypothesis for the prompt"):
            router.score("several", [pairs[0], wrong])
    with pytest.raises(secateur.InputError, match=r"^inputs, row 1: expected text for the prompt, got"):
        router.score("one", pairs)


def test_a_benchmark_of_a_folder_with_a_prompt_times_the_lengths_as_given(run: Run) -> None:
    case = CASES["llama"]
    secateur.save(case.model(), "dense", tokenizer=case.task.reader)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAW))
    options = ["--prompt", WORDS, "--labels", ",".join(LABELS)]
    made = run(
        "prune dense --data rows.jsonl --keep 0.5 --align 1 --recover none --batch-sizes 1 --lengths 8 --out cut", *options
    )
    assert made.code == 0, made.errors
    result = run("benchmark dense cut --batch-sizes 1 --lengths 6,9 --pairs 3 --json")
    assert result.code == 0, result.errors
    assert [timing["length"] for timing in result.document["timings"]] == [6, 9]


def test_the_built_in_model_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    raw = [{"text": "A wonderful film.", "target": "good"}, {"text": "A dull film.", "target": "bad"}]
    loaded = load_model("builtin", task=None, device="cpu", dtype="float32")
    from secateur.flow.loaded import prompt_of

    prompt = prompt_of(loaded, None, "builtin:movie")
    assert prompt == Prompt("movie review: {input}")
    for name in secateur.builtin.tasks():
        text = secateur.builtin.prompt(name).removesuffix("{input}")
        assert all(row["input"].startswith(text) for row in secateur.builtin.examples(name))
    asking = secateur.TextToText(loaded.tokenizer, labels=["bad", "good"], prompt=prompt)
    plain = secateur.TextToText(loaded.tokenizer, labels=["bad", "good"])
    prompted = [{"input": f"movie review: {row['text']}"} for row in raw]
    with torch.inference_mode():
        one = asking.ranked(loaded.model, asking.read(raw), 64)
        torch.testing.assert_close(one, plain.ranked(loaded.model, prompted, 64), rtol=0, atol=0)
    rows = secateur.builtin.examples("movie.test")[:8]
    assert secateur.evaluate(loaded.model, asking, rows).value == secateur.evaluate(loaded.model, plain, rows).value
