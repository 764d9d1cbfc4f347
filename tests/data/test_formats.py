"""Files as they come: one reader gives examples and corpora the same rows, or says in one line why it has none."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

import secateur
from secateur.corpus.sources import ShardError, find_sources
from secateur.data import formats
from secateur.data.examples import read_examples
from secateur.support.errors import InputError

Pairs = list[tuple[Any, Any]]


def corpus(data: Path) -> list[Any]:
    """Each row of a corpus: (text, target), or the reason why it is rejected."""
    rows = [row for source in find_sources(str(data)) for rows, _ in source.read("text", "target") for row in rows]
    return [row.reason or (row.value, row.kept[0]) for row in rows]


def examples(data: Path) -> Pairs:
    return [(row["text"], row["target"]) for row in read_examples(data, ("text", "target"))]


def lines(*pairs: tuple[str, str], **options: Any) -> bytes:
    return "".join(json.dumps({"text": text, "target": target}, **options) + "\n" for text, target in pairs).encode()


ROWS = [("a", "x"), ("b", "y")]
PRETTY = json.dumps({"text": "a", "target": "x"}, indent=1).encode()
ARRAY = [{"text": text, "target": target} for text, target in ROWS]
WHOLE: dict[str, tuple[str, bytes, Pairs]] = {
    "a mark before JSONL": ("a.jsonl", codecs.BOM_UTF8 + lines(*ROWS), ROWS),
    "a mark before CSV": ("a.csv", codecs.BOM_UTF8 + b"text,target\na,x\nb,y\n", ROWS),
    "a mark before TSV": ("a.tsv.gz", gzip.compress(codecs.BOM_UTF8 + b"text\ttarget\na\tx\nb\ty\n"), ROWS),
    "a mark before an array": ("a.json", codecs.BOM_UTF8 + json.dumps(ARRAY).encode(), ROWS),
    "upper case": ("A.CSV", b"text,target\na,x\nb,y\n", ROWS),
    "upper case, compressed": ("A.JSONL.GZ", gzip.compress(lines(*ROWS)), ROWS),
    "zstd": ("a.csv.zst", pyarrow.compress(b"text,target\na,x\nb,y\n", codec="zstd", asbytes=True), ROWS),
    "CR ends lines": ("a.csv", b"text,target\ra,x\rb,y\r", ROWS),
    "CRLF ends lines": ("a.tsv", b"text\ttarget\r\na\tx\r\nb\ty\r\n", ROWS),
    "a CR in quotes": ("a.csv", b'text,target\n"a\rb",x\n', [("a\rb", "x")]),
    "a long field": ("a.csv", b"text,target\n" + b"w " * 100_000 + b",x\n", [("w " * 100_000, "x")]),
    "a long quoted field": ("a.csv", b'text,target\n"' + b"w " * 100_000 + b'",x\n', [("w " * 100_000, "x")]),
    "line separators": (
        "a.jsonl",
        lines(("a\u2028b\u2029c\u0085d\x1ce\x0bf", "x"), ensure_ascii=False),
        [("a\u2028b\u2029c\u0085d\x1ce\x0bf", "x")],
    ),
    "line separators in CSV": ("a.csv", "text,target\na\u2028b\u0085c,x\n".encode(), [("a\u2028b\u0085c", "x")]),
    "an array": ("a.json", json.dumps(ARRAY).encode(), ROWS),
    "an array, a row on each line": ("a.jsonl", b"[\n" + b",\n".join(json.dumps(row).encode() for row in ARRAY) + b"]", ROWS),
    "an indented array": ("a.json", json.dumps(ARRAY, indent=2).encode(), ROWS),
    "an indented object": ("a.json", PRETTY, ROWS[:1]),
    "blank lines": ("a.jsonl", b"\n \n" + lines(*ROWS).replace(b"\n", b"\n\r\n\n"), ROWS),
    "blank lines in CSV": ("a.csv", b"\n\ntext,target\n\na,x\n\n\nb,y\n\n", ROWS),
    "a NUL": ("a.csv", b'text,target\na\x00b,x\n"a\x00,",y\n', [("a\x00b", "x"), ("a\x00,", "y")]),
    "other columns twice": ("a.csv", b"text,,target,\na,1,x,2\n", [("a", "x")]),
    "another key twice": ("a.jsonl", b'{"text": "a", "target": "x", "id": 1, "id": 2}\n', [("a", "x")]),
    # Quotes. In a TSV that quotes nothing they are ordinary characters.
    "TSV that quotes": ("a.tsv", b'"text"\ttarget\n"a ""b"""\tx\n"a\tb"\ty\n', [('a "b"', "x"), ("a\tb", "y")]),
    "TSV, quoted lines in the first column": ("a.tsv", b'text\ttarget\n"a\nb"\tx\n', [("a\nb", "x")]),
    "TSV, quoted lines in the last column": ("a.tsv", b'target\ttext\nx\t"a\n\nb"\ny\tc\n', [("a\n\nb", "x"), ("c", "y")]),
    "TSV, quoted lines in the only columns": ("a.tsv", b'text\ttarget\tid\nc\t"x\ny"\t1\n', [("c", "x\ny")]),
    "TSV, a quote is never closed": ("a.tsv", b'text\ttarget\n"a\tx\nb\ty\n', [('"a', "x"), ("b", "y")]),
    "TSV, quotes over two rows": ("a.tsv", b'text\ttarget\nb\t"x\na"\ty\nb\ty\n', [("b", '"x'), ('a"', "y"), ("b", "y")]),
    "TSV, quotes around a word": ("a.tsv", b'text\ttarget\n"a" b\tx\n"b" "c"\ty\n', [('"a" b', "x"), ('"b" "c"', "y")]),
    "TSV, quotes around a row": ("a.tsv", b'text\ttarget\n"a\tx"\n', [('"a', 'x"')]),
    "CSV, inches": ("a.csv", b'text,target\na 5" disk,x\nb,y\n', [('a 5" disk', "x"), ("b", "y")]),
    "CSV, lines in quotes": ("a.csv", b'text,target\n"a, ""b""\n\nc",x\n', [('a, "b"\n\nc', "x")]),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_both_readers_give_the_rows(what: str, tmp_path: Path) -> None:
    name, content, expected = WHOLE[what]
    (tmp_path / name).write_bytes(content)
    assert examples(tmp_path / name) == expected
    assert corpus(tmp_path / name) == expected


UNCLOSED = "a quote opens a field and is never closed, or a quote in the field is not doubled"
SPOILT: dict[str, tuple[str, bytes, list[Any], str]] = {
    "CSV, a comma too many": (
        "a.csv", b"text,target\na,x\nb, c,y\nd,z\n",
        [("a", "x"), "line 3: expected 2 fields, as in the header, got 3", ("d", "z")], "line 3: expected 2 fields",
    ),
    "CSV, a field too few": (
        "a.csv", b"text,target\na,x\nb\nd,z\n",
        [("a", "x"), "line 3: expected 2 fields, as in the header, got 1", ("d", "z")], "line 3: expected 2 fields",
    ),
    "TSV, a tab too many": (
        "a.tsv", b'text\ttarget\n"a\tb\tx\nd\tz\n',
        [f"line 2: {UNCLOSED}", ("d", "z")], f"line 2: {UNCLOSED}",
    ),
    "CSV, a quote is never closed": (
        "a.csv", b'text,target\na,x\n"b,y\nc,z\nd,z\n',
        [("a", "x"), f"line 3: {UNCLOSED}", ("c", "z"), ("d", "z")], f"line 3: {UNCLOSED}",
    ),
    "CSV, a quote before another row's": (
        "a.csv", b'text,target\n"b,y\n"c, d",z\nd,z\n', [f"line 2: {UNCLOSED}", ("c, d", "z"), ("d", "z")], UNCLOSED,
    ),
    "CSV, a quote that is not doubled": (
        "a.csv", b'text,target\n"a" b,x\nd,z\n', [f"line 2: {UNCLOSED}", ("d", "z")], UNCLOSED,
    ),
    "JSON, a key twice": (
        "a.jsonl", b'{"text": "a", "text": "b", "target": "x"}\n' + lines(("b", "y")),
        ["line 1 is not JSON: the key 'text' comes 2 times", ("b", "y")], "line 1 is not JSON: the key 'text' comes 2 times",
    ),
    "JSON, too deep": (
        "a.jsonl", lines(("b", "y")) + b"[" * 100_000 + b"\n", [("b", "y"), "line 2 is not JSON: maximum"], "line 2 is not",
    ),
    "JSON, a number too long": (
        "a.jsonl", lines(("b", "y")) + b"1" * 5000, [("b", "y"), "line 2 is not JSON: Exceeds"], "line 2 is not JSON: Exceeds",
    ),
    "a first row that is a list": (
        "a.jsonl", b"[1]\n" + lines(("b", "y")), ["expected an object, got list", ("b", "y")], "row 1: expected an object",
    ),
    "a lone surrogate in the identity": (
        "a.jsonl", lines(("b", "\ud800"), ("c", "y")), ["id: not UTF-8", ("c", "y")], "row 1: expected UTF-8 in column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_row_is_rejected_or_said(what: str, tmp_path: Path) -> None:
    name, content, expected, message = SPOILT[what]
    (tmp_path / name).write_bytes(content)
    rows = corpus(tmp_path / name)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.startswith(wanted) if isinstance(wanted, str) else row == wanted
    with pytest.raises(InputError) as raised:
        examples(tmp_path / name)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["a\ud800", "\udc00"])
def test_lone_surrogates_in_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(("b", "y"), (text, "x")))
    for data in (tmp_path / "a.jsonl", [{"text": "b", "target": "y"}, {"text": text, "target": "x"}]):
        with pytest.raises(InputError, match="row 2: expected UTF-8 in column 'text'"):
            read_examples(data, ("text", "target"))
    assert not formats.is_utf8([["a"], ["b", text]])
    assert formats.is_utf8([["a"], ["b", 3]])


UNREADABLE: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.csv", "text,target\na,x\n".encode("utf-16"), "expected UTF-8, got UTF-16"),
    "UTF-16 text": ("a.jsonl", codecs.BOM_UTF16_BE + "a\n".encode("utf-16-be"), "expected UTF-8, got UTF-16"),
    "an array cut off": ("a.json", json.dumps(ARRAY, indent=1).encode()[:-9], "it is not JSON"),
    "an array too deep": ("a.json", b"[\n" + b"[" * 100_000, "it is not JSON"),
    "two indented objects": ("a.json", PRETTY + b"\n" + PRETTY, "it is not JSON: Extra data"),
    "an open quote in the header": ("a.csv", b'"text,target\na,x\n', f"line 1: {UNCLOSED}"),
    "a column twice": ("a.csv", b"text,target,text\na,x,b\n", "expected one column 'text', got 2 of this name"),
    "no column": ("a.csv", b"text,targets\na,x\n", "expected the column 'target', got 'text', 'targets'"),
    "no bytes of Parquet": ("a.parquet", b"", "cannot be read to its end"),
    "no Arrow": ("a.arrow", b"ARROW1" * 9, "cannot be read to its end"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_both_readers_refuse_a_file_with_the_same_words(what: str, tmp_path: Path) -> None:
    name, content, message = UNREADABLE[what]
    (tmp_path / name).write_bytes(content)
    for read, error in ((examples, InputError), (corpus, ShardError)):
        with pytest.raises(error) as raised:
            read(tmp_path / name)
        assert message in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b"[]"),
        ("a.csv", b"text,target\n"),
    ],
)
def test_files_without_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert corpus(tmp_path / name) == []
    with pytest.raises(InputError, match="expected at least one example, got none"):
        examples(tmp_path / name)


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["x"]], names=["text", "text", "target"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for read, error in ((examples, InputError), (corpus, ShardError)):
        with pytest.raises(error, match=r"a\.parquet: expected one column 'text', got 2 of this name"):
            read(tmp_path / "a.parquet")


def test_saved_folders_are_examples_and_corpora(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ARRAY * 3)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert examples(tmp_path / "one") == corpus(tmp_path / "one") == ROWS * 3
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "single")
    assert examples(tmp_path / "single") == corpus(tmp_path / "single") == ROWS * 3
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    for read in (examples, corpus):
        with pytest.raises(InputError, match=r"expected the folder of one split, got .*two' with the splits 'test', 'train'"):
            read(tmp_path / "two")
    (tmp_path / "one" / "state.json").write_text("{}")
    for read in (examples, corpus):
        with pytest.raises(InputError, match=r"state\.json' does not list the files"):
            read(tmp_path / "one")


def test_long_rows_make_short_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHARACTERS", 1000)
    texts = [f"{k} " + "w " * 200 for k in range(20)]
    (tmp_path / "a.jsonl").write_bytes(lines(*[(text, "x") for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "target": texts}), tmp_path / "a.parquet", compression="none")
    for name in ("a.jsonl", "a.parquet"):
        (source,) = find_sources(str(tmp_path / name))
        blocks = [rows for rows, _ in source.read("text")]
        assert [row.value for rows in blocks for row in rows] == texts
        assert max(map(len, blocks)) <= 3


def test_a_quote_that_is_not_closed_soon_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_QUOTED", 100)
    (tmp_path / "a.csv").write_text('text,target\n"a' + "\nb,y" * 100 + '",x\n')
    rows = corpus(tmp_path / "a.csv")
    assert rows == [f"line 2: {UNCLOSED}", *[("b", "y")] * 99, "line 102: expected 2 fields, as in the header, got 3"]


TABLE = pandas.DataFrame(ARRAY)


@pytest.mark.parametrize(
    "data", [TABLE, {"text": ["a", "b"], "target": TABLE["target"]}, pyarrow.table(TABLE), datasets.Dataset.from_list(ARRAY)],
    ids=["DataFrame", "columns", "Table", "Dataset"],
)  # fmt: skip
def test_tables_in_memory(data: Any) -> None:
    assert read_examples(data, ("text", "target")) == ARRAY


def test_a_single_split_is_a_data_set() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "target": datasets.ClassLabel(names=["bad", "good"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "target": [1, 0]}, features=features)
    expected = [{"text": "a", "target": "good"}, {"text": "b", "target": "bad"}]
    assert read_examples(datasets.DatasetDict({"test": data}), ("text", "target")) == expected
    streamed = datasets.IterableDatasetDict({"test": data.to_iterable_dataset()})
    assert read_examples(streamed, ("text", "target")) == expected


def test_the_held_out_examples_are_named_where_they_have_splits() -> None:
    rows = [{"input": "a", "target": "good"}, {"input": "b", "target": "bad"}]
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("validation", "test")})
    with pytest.raises(InputError, match=r"^evaluation: expected one data set, got the splits 'validation', 'test'"):
        secateur.compress("builtin", "builtin:movie", keep=0.5, evaluation=splits)


def test_what_a_data_frame_lacks_is_null() -> None:
    with pytest.raises(InputError, match="row 2: expected a value in column 'text', got null"):
        read_examples(pandas.DataFrame({"text": ["a", None], "target": ["x", "y"]}), ("text", "target"))
    with pytest.raises(InputError, match="expected the column 'text', got 'input'; name it"):
        read_examples(pandas.DataFrame({"input": ["a"]}), ("text",))


class OtherFrame(list[Any]):
    """A data frame of another library: it iterates over its columns."""

    columns = ("text", "target")


NO_ROWS = {
    "two splits": (
        datasets.DatasetDict({name: datasets.Dataset.from_list(ARRAY) for name in ("train", "test")}),
        "examples: expected one data set, got the splits 'train', 'test': give one of them, as examples=data['train']",
    ),
    "one example": (ARRAY[0], "expected rows, or columns of one length, got one mapping with 'text', 'target'"),
    "columns of two lengths": ({"text": ["a"], "target": []}, "columns of one length, got one mapping"),
    "nothing": ({}, "got one mapping with no columns"),
    "bytes": (b"abc", "expected an iterable of rows or the name of data, got bytes"),
    "another data frame": (OtherFrame([["a"], ["x"]]), "expected an iterable of rows or the name of data, got OtherFrame"),
    "a column twice": (
        pandas.DataFrame([["a", "b"]], columns=["text", "text"]),
        "columns of different names, got 'text', 'text'",
    ),
}


@pytest.mark.parametrize("what", NO_ROWS)
def test_data_in_memory_that_are_no_rows(what: str) -> None:
    data, message = NO_ROWS[what]
    with pytest.raises(InputError) as raised:
        read_examples(data, ("text", "target"))
    assert message in str(raised.value)


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path: Path) -> None:
    table = pyarrow.table({"target": ["x", "y"], "text": ["a", "b"]})
    for name, write in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with write(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        assert corpus(tmp_path / name) == examples(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["a[1].jsonl", "a,b.jsonl", "a*.jsonl"])
def test_a_file_whose_name_looks_like_a_pattern(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(lines(*ROWS))
    for other in ("a1.jsonl", "ab.jsonl"):
        (tmp_path / other).write_bytes(lines(("wrong", "z")))
    assert corpus(tmp_path / name) == ROWS
    (source,) = find_sources(str(tmp_path / name))
    assert source.name == name
