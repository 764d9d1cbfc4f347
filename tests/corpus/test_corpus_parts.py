"""A large file is cut into parts, which together say what the whole file says. An interruption loses only the part at work."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpora
import pyarrow
import pyarrow.parquet
import pytest
from cases import CASES
from command import Run

import secateur
from secateur.corpus import parts
from secateur.corpus.run import SETTINGS
from secateur.data.formats import RowRange, read_blocks, row_ranges

CASE = CASES["bert-sequence"]
LINE = "score m --threads 1 --max-tokens 256 --dtype float32 --compile off --engine-runtime torch"
HARD = (
    b'id,text\r\n1,"two\r\nlines, and ""quotes"""\r\n\r\n2,plain\r3,"never closed\n4,after it\n5,one,too,many\n'
    b'6,"\xff not UTF-8\n\nand a blank line"\n7,\xef\xbb\xbfmark\n8,last'
)
FILES = {
    "a.csv": HARD,
    "b.csv": b"\xef\xbb\xbf" + HARD,
    "c.csv": b"id,text\n" + b"".join(b'%d,"a\n%d,b"\n' % (k, k) for k in range(9)),
    "a.tsv": HARD.replace(b",", b"\t"),
    "b.tsv": b'id\ttext\n1\t"open\n2\tclosed"\n3\t"two\nlines"\n4\t"x\n',
    "a.jsonl": b'\n{"text": "a"}\n\n \t\n[1]\n{"text": \n{"text": "\xc3\xa9"}\n\xef\xbb\xbf{"text": "b"}\n{"text": "\xff"}\n'
    b'{"text": "c", "text": "d"}\n{"text": "e"}',
    "b.jsonl": b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n',
    "a.txt": b"\xef\xbb\xbfa\n\n\xc3\xa9 b\r\n\xef\xbb\xbfc\n\xff\xfed\n\x1c\ne",
}


def records(content: bytes, name: str, only: RowRange | None = None) -> list[Any]:
    blocks = read_blocks(io.BytesIO(content), name, len(content), ["text"], 2, only)
    return [tuple(record) for block, _ in blocks for record in block]


def ranges(content: bytes, name: str, rows: int, characters: int = 1 << 20) -> list[RowRange]:
    found = row_ranges(io.BytesIO(content), name, ["text"], rows, characters)
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("name", FILES)
def test_ranges_of_lines_read_what_the_whole_file_reads(name: str, rows: int) -> None:
    whole = records(FILES[name], name)
    cut = ranges(FILES[name], name, rows)
    assert [record for only in cut for record in records(FILES[name], name, only)] == whole
    assert [only.rows for only in cut] == [min(rows, len(whole) - k) for k in range(0, len(whole), rows)]
    assert [only.first for only in cut] == list(range(0, len(whole), rows))


@pytest.mark.parametrize("rows", [1, 5, 7, 8, 100])
def test_ranges_of_parquet_read_what_the_whole_file_reads(tmp_path: Path, rows: int) -> None:
    content = corpora.parquet(tmp_path, corpora.texts(40)).read_bytes()
    whole = records(content, "a.parquet")
    cut = ranges(content, "a.parquet", rows)
    assert [record for only in cut for record in records(content, "a.parquet", only)] == whole
    assert len(cut) == -(-40 // rows)


def test_characters_bound_a_range(tmp_path: Path) -> None:
    content = b"".join(b"%d" % (k % 10) * 99 + b"\n" for k in range(10))
    assert [only.rows for only in ranges(content, "a.txt", 100, 300)] == [3, 3, 3, 1]
    assert [only.offset for only in ranges(content, "a.txt", 100, 300)] == [0, 300, 600, 900]
    table = pyarrow.table({"text": ["x" * 1000 + str(k) for k in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    assert all(only.rows in (9, 4) for only in ranges((tmp_path / "a.parquet").read_bytes(), "a.parquet", 100, 10_000))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "one JSON document over several lines"),
        ("a.json", b'{\n"text": "a"\n}', "one JSON document over several lines"),
        ("a.jsonl.gz", b"", "compressed"),
        ("a.csv.zst", b"", "compressed"),
        ("a.arrow", b"", "an Arrow file"),
    ],
)
def test_what_cannot_be_divided(name: str, content: bytes, why: str) -> None:
    assert row_ranges(io.BytesIO(content), name, ["text"], 1, 1000) == why


@pytest.fixture
def started(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run`, in a folder with the model "m". The smallest files are cut."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    monkeypatch.setattr(parts, "SMALLEST", 1)
    return run


def scores(out: str) -> dict[str, list[Any]]:
    """The columns of all shards, one after the other."""
    tables = [pyarrow.parquet.read_table(path) for path in sorted(Path(out, "shards").glob("*.parquet"))]
    return {name: [value for table in tables for value in table.column(name).to_pylist()] for name in tables[0].column_names}


def rejected(out: str) -> list[Any]:
    return [row for _, rows in sorted(corpora.rejects(Path(out)).items()) for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_parts_score_as_the_whole_file(started: Run, tmp_path: Path, kind: str) -> None:
    texts = corpora.texts(50)
    texts[5] = texts[37] = ""
    texts[20] = "two\nlines, and more"
    path = corpora.FORMATS[kind](tmp_path, texts)
    whole, cut = (
        started(f"{LINE} --data {path} --id-column id --part-rows {rows} --out out{rows} --json").document for rows in (1000, 8)
    )
    assert (whole["shards"], cut["shards"]) == (1, 7)
    assert [whole[name] for name in ("rows", "scored", "rejected", "tokens")] == [50, 48, 2, cut["tokens"]]
    assert [cut[name] for name in ("rows", "scored", "rejected")] == [50, 48, 2]
    first, second = scores("out1000"), scores("out8")
    for name, values in first.items():
        close = name.startswith("p_")
        assert second[name] == (pytest.approx(values, abs=1e-5) if close else values)
    assert rejected("out1000") == rejected("out8")
    name = path.name.removesuffix(".parquet")
    assert sorted(file.name for file in Path("out1000/shards").iterdir()) == [f"{name}.parquet"]
    assert sorted(file.name for file in Path("out8/shards").iterdir()) == [
        f"{name}.part-{k:05d}-of-00007.parquet" for k in range(7)
    ]


def test_ids_have_one_type_in_all_parts(started: Run, tmp_path: Path) -> None:
    """The first rows of the file decide: ids of a later part that do not fit are rejected as in the whole file."""
    rows = [{"id": 0.5 if k == 5 else f"n{k}" if k == 270 else k, "text": "some words"} for k in range(280)]
    corpora.write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for size in (1000, 90):
        assert started(f"{LINE} --data a.jsonl --id-column id --part-rows {size} --out out{size}").code == 0
    assert scores("out90")["id"] == scores("out1000")["id"]
    assert scores("out90")["id"][4:7] == [4.0, 0.5, 6.0]
    assert rejected("out90") == rejected("out1000")
    assert [row["row"] for row in rejected("out90")] == [270]


def test_a_limit_counts_over_parts(started: Run, tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(40))
    document = started(f"{LINE} --data a.txt --limit 19 --part-rows 8 --out out --json").document
    assert (document["rows"], document["shards"]) == (19, 3)
    assert scores("out")["row"] == list(range(19))


def test_a_changed_file_is_cut_and_scored_anew(started: Run, tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(40))
    line = f"{LINE} --data a.txt --part-rows 8 --out out --json"
    assert started(line).document["shards"] == 5
    before = {path.name: path.stat().st_mtime_ns for path in Path("out/shards").iterdir()}
    again = started(f"{line} --resume")
    assert again.document["rows"] == 40
    assert {path.name: path.stat().st_mtime_ns for path in Path("out/shards").iterdir()} == before
    corpora.lines(tmp_path, [*corpora.texts(20), ""])
    changed = started(f"{line} --resume").document
    assert (changed["rows"], changed["rejected"], changed["shards"]) == (21, 1, 3)
    assert len(list(Path("out/shards").iterdir())) == 3
    corpora.lines(tmp_path, corpora.texts(7))
    assert started(f"{line} --resume").document["rows"] == 7
    assert [path.name for path in Path("out/shards").iterdir()] == ["a.txt.parquet"]
    assert list(Path("out/rejects").iterdir()) == []


def test_a_file_moved_elsewhere_is_refused(started: Run, tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(40))
    line = f"{LINE} --part-rows 8 --out out"
    assert started(f"{line} --data a.txt").code == 0
    Path("other").mkdir()
    corpora.lines(Path("other"), corpora.texts(80))
    result = started(f"{line} --data other/a.txt --resume")
    assert result.code == 2
    assert "was scored from" in result.errors[-1]


def test_a_folder_begun_without_parts_stays_without(started: Run, tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(40))
    line = f"{LINE} --data a.txt --part-rows 8 --out out --json"
    assert started(line).code == 0
    settings = Path("out", SETTINGS)
    document = json.loads(settings.read_text())
    assert document.pop("part_rows") == 8
    settings.write_text(json.dumps(document))
    for path in Path("out/shards").iterdir():
        path.unlink()
    assert started(f"{line} --resume").document["shards"] == 1


def test_files_that_are_not_cut_are_named(started: Run, tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.txt.zst"):
        corpora.lines(tmp_path, corpora.texts(40), name)
    result = started(f"{LINE} --data *.txt.* --part-rows 8 --out out")
    (said,) = [line for line in result.errors if "not cut" in line]
    assert said.startswith("not cut into parts (compressed), so that an interruption loses a whole file: file://")
    assert said.endswith("a.txt.gz and 1 more")


def test_parts_are_measured(started: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About half a minute of work, within the bounds."""
    monkeypatch.setattr("secateur.corpus.run.rows_a_second", lambda runner, sample: 0.5)
    corpora.lines(tmp_path, corpora.texts(150))
    assert started(f"{LINE} --data a.txt --out out --json").document["settings"]["part_rows"] == parts.FEWEST
    assert len(list(Path("out/shards").iterdir())) == 3
    assert (parts.part_rows(100.0), parts.part_rows(1e9)) == (3000, parts.MOST)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_keeps_the_finished_parts(started: Run, tmp_path: Path, stop: signal.Signals) -> None:
    """The run goes on where it was stopped, with the same bits as a run in one piece."""
    corpora.lines(tmp_path, corpora.texts(6000))
    options = "--threads 1 --max-tokens 256 --dtype float32 --compile off --engine-runtime torch --part-rows 100"
    line = ["score", "m", "--data", "a.txt", *options.split()]
    command = [sys.executable, "-m", "secateur", *line, "--out", "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(Path("out/shards").glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, stop)
    assert process.wait(30) != 0
    kept = {path.name: path.stat().st_mtime_ns for path in Path("out/shards").glob("*.parquet")}
    assert 3 <= len(kept) < 60
    document = started(f"{' '.join(line)} --out out --resume --json").document
    assert (document["rows"], document["shards"]) == (6000, 60)
    assert {name: Path("out/shards", name).stat().st_mtime_ns for name in kept} == kept
    assert started(f"{' '.join(line)} --out whole").code == 0
    assert scores("out") == scores("whole")
    assert scores("out")["row"] == list(range(6000))
