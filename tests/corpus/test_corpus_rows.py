"""What a corpus may hold: rows in memory, identities of any type, shards without rows, and very long texts."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import corpora
import datasets
import pandas
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
from cases import CASES, LABELS

import secateur
from secateur.corpus import mapper, score
from secateur.corpus.output import Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.run import CorpusRun
from secateur.corpus.shards import Finished, Reading, score_shards
from secateur.corpus.sources import Source, find_sources

BERT, T5 = CASES["bert-sequence"], CASES["t5-gated"]
TEXTS = ["the cat sat", "a dog ran under the tree", "the big dog", "a cat"]


def run(folder: Path, data: str | Path, **reading: Any) -> list[Finished]:
    runner = Runner(BERT.model(), BERT.task, 64, workers=1, threads=1)
    return list(score_shards(runner, find_sources(str(data)), Folder(str(folder)), Reading(**reading), lambda source: {}))


def write(path: Path, identities: list[Any]) -> Path:
    rows = [{"text": TEXTS[k % 4], "key": identity} for k, identity in enumerate(identities)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPECTED = "id: expected int64, as in the first rows,"
NULLS: list[Any] = [None] * 300
MANY: list[Any] = list(range(300))
IDENTITIES: dict[str, tuple[list[Any], Any, list[Any], dict[int, str]]] = {
    "integers": ([1, None, 3], pyarrow.int64(), [1, None, 3], {}),
    "numbers": ([1, 2.5], pyarrow.float64(), [1.0, 2.5], {}),
    "beyond 64 bits": ([1, 2**70], pyarrow.string(), ["1", str(2**70)], {}),
    "of two types": ([1, "a", True, None], pyarrow.string(), ["1", "a", "true", None], {}),
    "nested": ([{"a": 1}, [2, "b"], {"c": "é"}], pyarrow.string(), ['{"a": 1}', '[2, "b"]', '{"c": "é"}'], {}),
    "first null": ([*NULLS, 7, "a"], pyarrow.string(), [*NULLS, "7", "a"], {}),
    "null": ([None, None], pyarrow.string(), [None, None], {}),
    "text after many numbers": ([*MANY, "a"], pyarrow.int64(), MANY, {300: f"{EXPECTED} got str"}),
    "a fraction after many": ([*MANY, 1.5], pyarrow.int64(), MANY, {300: f"{EXPECTED} got float"}),
    "a huge one after many": ([*MANY, 2**70], pyarrow.int64(), MANY, {300: f"{EXPECTED} got int"}),
    "a lone surrogate": (["a", "\ud800"], pyarrow.string(), ["a"], {1: "id: not UTF-8"}),
}  # fmt: skip


@pytest.mark.parametrize("what", IDENTITIES)
def test_identities_have_one_type(what: str, tmp_path: Path) -> None:
    given, kind, written, reasons = IDENTITIES[what]
    (finished,) = run(tmp_path, write(tmp_path / "a.jsonl", given), identity="key")
    assert finished.error is None
    table = pyarrow.parquet.read_table(tmp_path / "shards" / "a.jsonl.parquet")
    assert table.schema.field("key").type == kind
    assert table["key"].to_pylist() == written
    rejected = corpora.rejects(tmp_path).get("a.jsonl.jsonl", [])
    assert {row["row"]: row["reason"] for row in rejected} == reasons


COLUMNS: dict[str, Any] = {
    "int32": pyarrow.array([1, 2, None, 4], pyarrow.int32()),
    "uint64": pyarrow.array([1, 2**64 - 1, 3, 4], pyarrow.uint64()),
    "struct": pyarrow.array([{"a": 1, "b": "x"}, {"a": 2, "b": None}, None, {"a": 4, "b": "y"}]),
    "list": pyarrow.array([[1], [], None, [2, 3]]),
    "map": pyarrow.array([[("a", 1)], [], None, []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "decimal": pyarrow.array([decimal.Decimal("1.50"), None, decimal.Decimal("20000.25"), None], pyarrow.decimal128(12, 2)),
    "date": pyarrow.array([datetime.date(2020, 1, k) for k in range(1, 5)]),
    "instant": pyarrow.array([1, 2, 3, None], pyarrow.timestamp("us", "UTC")),
    "bytes": pyarrow.array([b"a", b"\xff", None, b"c"]),
    "large text": pyarrow.array(["a", "b", None, "c"], pyarrow.large_string()),
}


@pytest.mark.parametrize("what", COLUMNS)
def test_parquet_keeps_the_type_of_identities(what: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "key": COLUMNS[what]}), tmp_path / "a.parquet")
    (finished,) = run(tmp_path, tmp_path / "a.parquet", identity="key")
    assert finished.error is None
    table = pyarrow.parquet.read_table(tmp_path / "shards" / "a.parquet")
    assert table["key"].combine_chunks().equals(COLUMNS[what])


def test_identities_in_a_dictionary_are_their_values(tmp_path: Path) -> None:
    keys = pyarrow.array(["a", "b", None, "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "key": keys}), tmp_path / "a.parquet")
    run(tmp_path, tmp_path / "a.parquet", identity="key")
    assert pyarrow.parquet.read_table(tmp_path / "shards" / "a.parquet")["key"].to_pylist() == ["a", "b", None, "a"]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("indices", [pyarrow.int8(), pyarrow.int32()])  # Those of pandas' categories, and of pyarrow.
@pytest.mark.parametrize("column", ["text", "key"])
def test_text_in_a_dictionary_that_is_not_utf8_rejects_its_rows(column: str, indices: Any, form: str, tmp_path: Path) -> None:
    values = pyarrow.array([b"the cat", b"caf\xe9", b"a dog"]).view(pyarrow.string())
    broken = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2, 1, 0], indices), values)
    keys = pyarrow.array([f"k{k}" for k in range(5)], pyarrow.large_string())
    columns = {"text": broken, "key": keys} if column == "text" else {"text": [*TEXTS, "a cat"], "key": broken}
    table = pyarrow.table(columns)
    if form == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    (finished,) = run(tmp_path, tmp_path / f"a.{form}", identity="key")
    assert finished.error is None
    (rejected,) = corpora.rejects(tmp_path).values()
    reason = "not UTF-8" if column == "text" else "id: not UTF-8"
    assert [(row["row"], row["reason"]) for row in rejected] == [(1, reason), (3, reason)]
    written = pyarrow.parquet.read_table(tmp_path / "shards" / ("a.parquet" if form == "parquet" else "a.arrow.parquet"))
    assert written["key"].to_pylist() == (["k0", "k2", "k4"] if column == "text" else ["the cat", "a dog", "the cat"])
    assert written["key"].type == (keys.type if column == "text" else values.type)


def test_a_type_that_parquet_has_not_is_refused_before_scoring(tmp_path: Path) -> None:
    keys = pyarrow.UnionArray.from_sparse(
        pyarrow.array([0, 1], pyarrow.int8()), [pyarrow.array([1, 2]), pyarrow.array(["a", "b"])]
    )
    table = pyarrow.table({"text": TEXTS[:2], "key": keys})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (finished,) = run(tmp_path, tmp_path / "a.arrow", identity="key")
    assert finished.error is not None
    assert "a.arrow: expected identities that Parquet can keep, got sparse_union" in finished.error
    with pytest.raises(secateur.InputError, match="expected identities that Parquet can keep"):
        CorpusRun(
            find_sources(str(tmp_path / "a.arrow")), Folder(str(tmp_path / "o")), Reading(identity="key"), {}, resume=False
        )


def test_shards_without_rows_fit_the_others(tmp_path: Path) -> None:
    full = pyarrow.table({"text": TEXTS, "key": pyarrow.array([1, 2, 3, 4], pyarrow.int32())})
    pyarrow.parquet.write_table(full.slice(0, 0), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(full, tmp_path / "b.parquet")
    sources, folder = find_sources(f"{tmp_path}/*.parquet"), Folder(str(tmp_path / "out"))
    CorpusRun(sources, folder, Reading(identity="key"), {}, resume=False)
    finished = run(tmp_path / "out", f"{tmp_path}/*.parquet", identity="key")
    assert [shard.counts.rows for shard in finished] == [0, 4]
    assert pyarrow.dataset.dataset(tmp_path / "out" / "shards").to_table()["key"].to_pylist() == [1, 2, 3, 4]
    (batch,) = score(BERT.model(), BERT.task, f"{tmp_path}/*.parquet", identity="key")
    assert batch.schema.field("key").type == pyarrow.int32()


@pytest.mark.parametrize("name", ["row", "label", f"p_{LABELS[0]}", "reason"])
def test_an_identity_with_the_name_of_a_score_is_refused(name: str, tmp_path: Path) -> None:
    rows = [{"text": "the cat", name: 1}]
    with pytest.raises(secateur.InputError, match=f"id-column: expected another name than .*, got '{name}'"):
        next(score(T5.model(), T5.task, rows, identity=name))
    source, folder = Source("a", "a", 1, rows), Folder(str(tmp_path / "out"))
    with pytest.raises(secateur.InputError, match=f"id-column: expected another name than .*, got '{name}'"):
        CorpusRun([source], folder, Reading(identity=name), {"labels": LABELS}, resume=False)
    assert not (tmp_path / "out").exists()


def test_batches_of_a_stream_have_one_schema() -> None:
    rows = [{"text": text, "key": None if k < 300 else k} for k, text in enumerate(corpora.texts(2000))]
    batches = list(score(BERT.model(), BERT.task, rows, identity="key", max_tokens=64, threads=1))
    assert len(batches) > 2
    assert pyarrow.Table.from_batches(batches)["key"].to_pylist() == [None if k < 300 else str(k) for k in range(2000)]


FRAME = pandas.DataFrame({"text": [*TEXTS[:3], None], "key": [1, 2, 3, 4]})
IN_MEMORY = {
    "DataFrame": FRAME, "columns": {"text": [*TEXTS[:3], None], "key": FRAME["key"]}, "Table": pyarrow.table(FRAME),
    "Dataset": datasets.Dataset.from_pandas(FRAME),
    "one split": datasets.DatasetDict({"test": datasets.Dataset.from_pandas(FRAME)}),
    "rows": FRAME.astype(object).where(FRAME.notna(), None).to_dict("records"),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_MEMORY)
def test_tables_in_memory_are_rows(what: str) -> None:
    rows = [
        row for batch in score(T5.model(), T5.task, IN_MEMORY[what], identity="key", threads=1) for row in batch.to_pylist()
    ]
    alone = [row for batch in score(T5.model(), T5.task, TEXTS[:3], threads=1) for row in batch.to_pylist()]
    assert [row["key"] for row in rows] == [1, 2, 3, 4]
    assert [row["label"] for row in rows] == [*(row["label"] for row in alone), None]
    assert [row["reason"] for row in rows] == [None, None, None, "null"]


@pytest.mark.parametrize(
    "data", [datasets.DatasetDict(dict.fromkeys("ab", IN_MEMORY["Dataset"])), {"text": "a"}, {"text": ["a"], "key": []}, b"a"],
    ids=["splits", "one-row", "two-lengths", "bytes"],
)  # fmt: skip
def test_data_that_are_no_rows_are_refused(data: Any) -> None:
    with pytest.raises(secateur.InputError, match=r"^dataset: expected "):
        next(score(T5.model(), T5.task, data))


def test_a_path_names_a_corpus(tmp_path: Path) -> None:
    path = corpora.lines(tmp_path, TEXTS)
    (of_path,), (of_name,) = score(T5.model(), T5.task, path), score(T5.model(), T5.task, str(path))
    assert of_path.equals(of_name)


def test_a_map_whose_first_rows_are_null() -> None:
    texts = [*[None] * 40, *corpora.texts(40), None]
    mapped = datasets.Dataset.from_dict({"text": texts}).map(
        mapper(T5.model(), T5.task), batched=True, batch_size=8, writer_batch_size=8
    )
    assert mapped.features["label"] == datasets.Value("string")
    assert mapped.features[f"p_{LABELS[0]}"] == datasets.Value("float32")
    assert [label is None for label in mapped["label"]] == [text is None for text in texts]
    full = datasets.Dataset.from_dict({"text": texts[40:]})
    reasons = full.map(mapper(T5.model(), T5.task), batched=True, batch_size=8, writer_batch_size=8)["reason"]
    assert list(reasons) == [*[None] * 40, "null"]


@pytest.mark.parametrize("text", ["the cat sat", None])
def test_a_map_without_batches_is_refused(text: str | None) -> None:
    with pytest.raises(secateur.InputError, match=r"^mapper: expected a batch of rows, as .* got a single row"):
        datasets.Dataset.from_dict({"text": [text]}).map(mapper(T5.model(), T5.task))
    with pytest.raises(secateur.InputError, match=r"^column: expected the column 'words', got 'text'"):
        datasets.Dataset.from_dict({"text": [text]}).map(mapper(T5.model(), T5.task, column="words"), batched=True)


def test_labels_in_one_text_are_refused() -> None:
    for name in ("t5-gated", "llama", "bert-sequence"):
        with pytest.raises(secateur.InputError, match=r"^labels: expected a list of labels, got the text 'good,bad'$"):
            type(CASES[name].task)(CASES[name].task.reader, labels="good,bad")
