"""A tagger scores a corpus with spans: those of a single pass for each row, and those of transformers' pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import corpora
import datasets
import pandas
import pyarrow.parquet
import pytest
import torch
from cases import CASES, TAGS, WORDS
from command import Run, assert_refused
from seqeval.metrics.sequence_labeling import get_entities
from transformers import pipeline

import secateur
from secateur.corpus import mapper, score
from secateur.tasks.spans import words_of

NAMES = ["bert-token", "electra"]
LINE = "score m --threads 2 --max-tokens 96 --data a.jsonl --id-column id --json"


def alone(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the spans of a row by a pass of its own."""
    case = CASES[name]
    model, tokenizer = case.model().eval(), case.task.reader
    places = words_of(value) if isinstance(value, str) else [(k, k + 1) for k in range(len(value))]
    words = [value[start:end] for start, end in places] if isinstance(value, str) else value
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**encoded).logits[0].softmax(-1)  # [T, tags]
    first: dict[int, int] = {}
    for piece, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, piece)
    tags = [TAGS[int(probabilities[first[word]].argmax())] for word in range(len(words))]
    spans = []
    for label, begin, last in get_entities(tags):
        scores = [float(probabilities[first[word]].max()) for word in range(begin, last + 1)]
        start, end = places[begin][0], places[last][1]
        text = value[start:end] if isinstance(value, str) else " ".join(value[start:end])
        spans.append({"start": start, "end": end, "label": label, "score": sum(scores) / len(scores), "text": text})
    return spans


def assert_spans(written: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [{**span, "score": None} for span in written] == [{**span, "score": None} for span in expected]
    assert [span["score"] for span in written] == pytest.approx([span["score"] for span in expected], abs=1e-5)


def values(count: int = 40) -> list[Any]:
    """Return texts with marks, and lists of words."""
    texts = [text.replace(" cat", " cat's,").replace(" so ", " (so) ") for text in corpora.texts(count)]
    return [text if k % 3 else text.split() for k, text in enumerate(texts)]


@pytest.mark.parametrize("name", NAMES)
def test_spans_are_those_of_each_row_alone(run: Run, tmp_path: Path, name: str) -> None:
    secateur.save(CASES[name].model(), "m", tokenizer=CASES[name].task.reader)
    rows = values()
    rows[4], rows[5], rows[6] = "", [], ["the", 3]
    corpora.json_lines(tmp_path, rows)
    result = run(f"{LINE} --out out")
    assert (result.code, result.document["scored"], result.document["rejected"]) == (0, 37, 3), result.errors
    (written,) = corpora.read(Path("out")).values()
    assert list(written[0]) == ["row", "id", "spans"]
    for row in written:
        assert_spans(row["spans"], alone(name, rows[row["row"]]))
    counted = result.document["labels"]
    assert counted == {
        label: sum(span["label"] == label for row in written for span in row["spans"]) for label in ("PER", "LOC")
    }
    assert min(counted.values()) > 0
    assert [row["reason"] for row in corpora.rejects(Path("out"))["a.jsonl.jsonl"]] == [
        "empty", "empty", "expected a text or a list of words, got a list with a value of type int",
    ]  # fmt: skip


def test_spans_are_those_of_transformers_pipeline() -> None:
    """Its strategy "first" tags a word at its first piece too."""
    case, texts = CASES["bert-token"], [" ".join(row["tokens"]) for row in CASES["bert-token"].examples * 3]
    model = case.model().eval()
    (batch,) = score(model, case.task, texts, threads=1)
    expected: Any = pipeline("token-classification", model=model, tokenizer=case.task.reader, aggregation_strategy="first")(
        texts
    )
    found = 0
    for text, spans, of_pipeline in zip(texts, batch.column("spans").to_pylist(), expected, strict=True):
        renamed = [
            {
                "start": one["start"], "end": one["end"], "label": one["entity_group"], "score": float(one["score"]),
                "text": text[one["start"] : one["end"]],
            }
            for one in of_pipeline
        ]  # fmt: skip
        assert_spans(spans, renamed)
        found += len(spans)
    assert found > 10


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_spans_in_files_of_lines(run: Run, tmp_path: Path, form: str) -> None:
    secateur.save(CASES["bert-token"].model(), "m", tokenizer=CASES["bert-token"].task.reader)
    rows = values(12)
    corpora.json_lines(tmp_path, rows)
    assert run(f"{LINE} --out out --format {form}").code == 0
    path = f"out/shards/a.jsonl.{form}"
    written: Any
    if form == "jsonl":
        written = [json.loads(line)["spans"] for line in Path(path).read_text().splitlines()]
    else:
        written = [json.loads(spans) for spans in pandas.read_csv(path)["spans"]]
    for spans, value in zip(written, rows, strict=True):
        assert_spans(spans, alone("bert-token", value))


def test_spans_in_the_library_and_in_map() -> None:
    case, rows = CASES["bert-token"], values(12)
    model = case.model().eval()
    (batch,) = score(model, case.task, [*rows, None], threads=1)
    assert batch.schema.names == ["row", "spans", "reason"]
    assert batch.column("reason").to_pylist() == [None] * 12 + ["null"]
    assert batch.column("spans").to_pylist()[-1] is None
    texts = [value for value in rows if isinstance(value, str)]
    mapped = datasets.Dataset.from_dict({"text": texts}).map(mapper(model, case.task), batched=True, batch_size=5)
    expected = [
        spans for spans, value in zip(batch.column("spans").to_pylist()[:-1], rows, strict=True) if isinstance(value, str)
    ]
    for spans, of_row in zip(mapped["spans"], expected, strict=True):
        assert_spans(spans, of_row)


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_inputs_are_cut_or_rejected(side: str) -> None:
    """Words that are cut off are in no span. The kept words have the spans of the kept words alone."""
    case = CASES["bert-token"]
    model, tokenizer = case.model().eval(), case.task.reader
    tokenizer.truncation_side = side
    try:
        task = secateur.TokenClassification(tokenizer, max_length=8)
        words = [WORDS[k % len(WORDS)] for k in range(40)]
        kept = words[:6] if side == "right" else words[-6:]
        skipped = 0 if side == "right" else 34
        cut, short, text, long = score_all(model, task, [words, kept, " ".join(words), words * 400], "cut")
        moved = [{**span, "start": span["start"] + skipped, "end": span["end"] + skipped} for span in short["spans"]]
        assert moved
        assert_spans(cut["spans"], moved)
        assert [span["text"] for span in text["spans"]] == [span["text"] for span in short["spans"]]
        assert [span["text"] for span in long["spans"]] == [
            span["text"]
            for span in score_all(model, task, [(words * 400)[:6] if side == "right" else (words * 400)[-6:]], "cut")[0][
                "spans"
            ]
        ]
        first, second, third = score_all(model, task, [words, kept, words * 400], "error")
        assert first["reason"] == "42 tokens, of which the model takes 8"
        assert second["reason"] is None
        assert third["reason"].startswith("at least ")
    finally:
        tokenizer.truncation_side = "right"


def score_all(model: Any, task: Any, rows: list[Any], on_long: str) -> list[dict[str, Any]]:
    (batch,) = score(model, task, rows, threads=1, on_long=on_long)
    scored: list[dict[str, Any]] = batch.to_pylist()
    return scored


def test_a_text_without_words_is_rejected() -> None:
    case = CASES["bert-token"]
    first, second, third = score_all(case.model().eval(), case.task, ["\u200b", "the cat", "\0 \u200f"], "cut")
    assert (first["reason"], second["reason"], third["reason"]) == ("empty", None, "empty")


def test_a_row_that_is_not_finite_is_rejected() -> None:
    case = CASES["bert-token"]
    model: Any = case.model().eval()
    model.bert.embeddings.word_embeddings.weight.data[case.task.reader.convert_tokens_to_ids("blue")] = float("nan")
    first, second = score_all(model, case.task, ["the cat", "the blue cat"], "cut")
    assert first["reason"] is None
    assert second["reason"] == "not finite: the model's scores are NaN or inf"


def test_compilation_is_refused_and_a_resumed_run_is_the_same(run: Run, tmp_path: Path) -> None:
    secateur.save(CASES["bert-token"].model(), "m", tokenizer=CASES["bert-token"].task.reader)
    corpora.json_lines(tmp_path, values(12))
    assert_refused(run(f"{LINE} --out out --compile on"), "compile: expected off or auto where results are spans", "out")
    assert run(f"{LINE} --out out").code == 0
    before = Path("out/shards/a.jsonl.parquet").read_bytes()
    assert run(f"{LINE} --out out --resume").code == 0
    assert Path("out/shards/a.jsonl.parquet").read_bytes() == before


def test_a_kept_column_called_label_does_not_change_the_counts(run: Run, tmp_path: Path) -> None:
    secateur.save(CASES["bert-token"].model(), "m", tokenizer=CASES["bert-token"].task.reader)
    rows = [{"text": text, "label": "LOC"} for text in corpora.texts(12)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(f"{LINE.replace('--id-column id', '--keep-columns label')} --out out")
    assert result.code == 0, result.errors
    (written,) = corpora.read(Path("out")).values()
    labels = [span["label"] for row in written for span in row["spans"]]
    assert result.document["labels"] == {label: labels.count(label) for label in ("PER", "LOC")}
    assert len(labels) > 12


def test_texts_of_two_columns_are_not_taken_for_words(run: Run, tmp_path: Path) -> None:
    case = CASES["bert-token"]
    secateur.save(case.model(), "m", tokenizer=case.task.reader)
    Path("a.jsonl").write_text('{"text": "the cat", "title": "a dog"}\n')
    message = "input-column: expected one column for token-classification, got 'title', 'text'"
    assert_refused(run("score m --data a.jsonl --input-column title,text --out out"), message, "out")
    for call in (
        lambda: next(score(case.model().eval(), case.task, "a.jsonl", column=["title", "text"])),
        lambda: mapper(case.model().eval(), case.task, column=["title", "text"]),
    ):
        with pytest.raises(secateur.InputError, match=f"^{message}$"):
            call()


def test_a_column_of_words_is_found(run: Run, tmp_path: Path) -> None:
    secateur.save(CASES["bert-token"].model(), "m", tokenizer=CASES["bert-token"].task.reader)
    rows = [{"tokens": row["tokens"], "ner_tags": row["tags"]} for row in CASES["bert-token"].examples]
    datasets.Dataset.from_list(rows).to_parquet("words.parquet")
    assert run("score m --data words.parquet --out out --threads 1 --max-tokens 96").code == 0
    table = pyarrow.parquet.read_table("out/shards/words.parquet").to_pylist()
    for row, of_row in zip(table, rows, strict=True):
        assert_spans(row["spans"], alone("bert-token", of_row["tokens"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--labels open", "labels: expected auto or names for token-classification, whose model names its labels, got 'open'"),
        ("--max-length 2", "max_length: expected over 2 pieces, which are the tokenizer's marks, got 2"),
    ],
)
def test_options_under_which_no_word_has_a_label_are_refused(run: Run, tmp_path: Path, options: str, said: str) -> None:
    secateur.save(CASES["bert-token"].model(), "m", tokenizer=CASES["bert-token"].task.reader)
    corpora.json_lines(tmp_path, values(3))
    assert_refused(run(f"{LINE} --out out {options}"), said, "out")
