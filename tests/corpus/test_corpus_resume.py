"""Resumed runs notice what has changed, damaged files are found, and no name or link leads out of the output folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import corpora
import pyarrow.parquet
import pytest
from cases import CASES, CLASSES, _bart, word_tokenizer
from command import Run, assert_refused
from transformers import BartConfig, BartForSequenceClassification

import secateur
from secateur.corpus.output import METADATA, Folder, ShardWriter
from secateur.corpus.run import SETTINGS, CorpusRun, about
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Source, find_sources
from secateur.support.errors import InputError

CASE = CASES["bert-sequence"]
LINE = "score m --data corpus/* --threads 1 --max-tokens 512 --dtype float32 --compile off --engine-runtime torch"


@pytest.fixture
def begun(run: Run, tmp_path: Path) -> Run:
    """`run`, in a folder with the model "m", a corpus of two shards, and the finished run "scored"."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    Path("corpus").mkdir()
    for name in "ab":
        corpora.lines(Path("corpus"), [*corpora.texts(20, seed=ord(name)), ""], f"{name}.txt")
    result = run(f"{LINE} --out scored")
    assert result.code == 0, result.errors
    return run


def written_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.parquet")}


def change(path: str, **values: Any) -> None:
    Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **values}))


def change_tokenizer() -> None:
    """Lower-case the tokenizer's texts no more, or lower-case them: the weights stay."""
    tokenizer = json.loads(Path("m/tokenizer.json").read_text())
    tokenizer["normalizer"] = None if tokenizer["normalizer"] else {"type": "Lowercase"}
    Path("m/tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (change_tokenizer, "tokenizer"),
        (lambda: change("m/config.json", layer_norm_eps=0.5), "config"),
        (lambda: change("m/config.json", hidden_act="relu"), "config"),
    ],
    ids=["tokenizer", "epsilon", "activation"],
)
def test_another_tokenizer_or_config_is_refused(begun: Run, changed: Any, name: str) -> None:
    changed()
    result = begun(f"{LINE} --out scored --resume")
    assert result.code == 2
    assert result.errors[-1].startswith(f"secateur: {name}: 'scored' was begun with '")


def test_other_generation_settings_are_refused(run: Run) -> None:
    case = CASES["t5-gated"]
    secateur.save(case.model(), "m", tokenizer=case.task.reader)
    Path("corpus").mkdir()
    corpora.lines(Path("corpus"), corpora.texts(5), "a.txt")
    line = f"{LINE} --labels yes,no --out scored"
    assert run(line).code == 0
    assert run(f"{line} --resume").code == 0
    change("m/generation_config.json", max_length=7)
    assert run(f"{line} --resume").errors[-1].startswith("secateur: config: 'scored' was begun with '")


def test_a_changed_shard_of_the_same_size_is_scored_again(begun: Run, tmp_path: Path) -> None:
    before, rows = written_at(tmp_path / "scored"), corpora.read(tmp_path / "scored")
    path = Path("corpus/a.txt")
    text = path.read_text()
    path.write_text("".join(reversed(text[:-2])) + text[-2:])
    assert path.stat().st_size == len(text)
    assert begun(f"{LINE} --out scored --resume").code == 0
    after = written_at(tmp_path / "scored")
    assert after["a.txt.parquet"] != before["a.txt.parquet"]
    assert after["b.txt.parquet"] == before["b.txt.parquet"]
    changed = corpora.read(tmp_path / "scored")
    assert changed["b.txt.parquet"] == rows["b.txt.parquet"]
    assert changed["a.txt.parquet"] != rows["a.txt.parquet"]


@pytest.mark.parametrize("interrupted", ["a", "b", "c"])
def test_a_run_with_rejected_rows_is_resumed_to_the_files_of_an_uninterrupted_run(
    run: Run, interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: Any = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: k for k, name in enumerate(CLASSES)}}
    model = _bart(BartForSequenceClassification, BartConfig, **labels)
    secateur.save(model, "m", tokenizer=word_tokenizer(start=False, end=True, model_max_length=40))
    Path("corpus").mkdir()
    for name in "abc":
        rows = corpora.texts(20, seed=ord(name))
        corpora.lines(Path("corpus"), [*rows[:9], "the cat </s> sat", *rows[9:], "the cat " * 30], f"{name}.txt")
    line = f"{LINE} --on-long error"
    assert run(f"{line} --out whole").code == 0
    assert [row["reason"].partition(",")[0] for row in corpora.rejects(tmp_path / "whole")["b.txt.jsonl"]] == [
        "2 end marks", "61 tokens"
    ]  # fmt: skip

    def interrupt(writer: ShardWriter, about: Any) -> None:
        if writer._name == f"{interrupted}.txt":
            raise KeyboardInterrupt
        close(writer, about)

    close = ShardWriter.close
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", interrupt)
        assert run(f"{line} --out parts").code == 130
    assert len(corpora.read(tmp_path / "parts")) == "abc".index(interrupted)
    assert run(f"{line} --out parts --resume").code == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 6


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the shards' files, hidden ones included."""
    paths = (path for kind in ("shards", "rejects") for path in (folder / kind).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_shard_of_an_older_run_counts_as_finished(begun: Run, tmp_path: Path) -> None:
    """Files of earlier versions keep no stamp of their source."""
    path = tmp_path / "scored/shards/a.txt.parquet"
    table = pyarrow.parquet.read_table(path)
    metadata = json.loads(pyarrow.parquet.read_metadata(path).metadata[METADATA])
    assert metadata.pop("stamp")
    pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(metadata)}), path)
    before = written_at(tmp_path / "scored")
    assert begun(f"{LINE} --out scored --resume").code == 0
    assert written_at(tmp_path / "scored") == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def turn_a_bit_of_a_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[pyarrow.parquet.read_metadata(path).row_group(0).column(2).data_page_offset + 60] ^= 1
    path.write_bytes(content)


def without_counts(path: Path) -> None:
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA: b"{}"}), path)


@pytest.mark.parametrize("damage", [cut, turn_a_bit_of_a_page, without_counts, lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_scored_again(begun: Run, tmp_path: Path, damage: Any) -> None:
    rows, before = corpora.read(tmp_path / "scored"), written_at(tmp_path / "scored")
    damage(tmp_path / "scored/shards/a.txt.parquet")
    result = begun(f"{LINE} --out scored --resume --json")
    assert result.code == 0, result.errors
    assert any("a.txt.parquet is damaged, its shard is scored again" in line for line in result.errors)
    assert result.document["rows"] == 42
    assert corpora.read(tmp_path / "scored") == rows
    assert written_at(tmp_path / "scored")["b.txt.parquet"] == before["b.txt.parquet"]


def test_a_shard_without_its_rejects_is_scored_again(begun: Run, tmp_path: Path) -> None:
    rejects = corpora.rejects(tmp_path / "scored")
    (tmp_path / "scored/rejects/a.txt.jsonl").unlink()
    assert begun(f"{LINE} --out scored --resume").code == 0
    assert corpora.rejects(tmp_path / "scored") == rejects


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}', '{"settings": {}, "tuned": {}}', '{"settings": {}, "tuned": 1}'])
def test_damaged_settings_are_one_line(begun: Run, text: str) -> None:
    Path("scored", SETTINGS).write_text(text)
    result = begun(f"{LINE} --out scored --resume")
    assert result.code == 2
    assert "settings.json' is damaged; delete its folder to begin anew (" in result.errors[-1]


def test_a_damaged_state_of_a_saved_data_set(begun: Run) -> None:
    saved = corpora.arrow(Path(), corpora.texts(5))
    (saved / "state.json").write_text("{")
    result = begun("score m --data saved --out other")
    assert_refused(result, "data: 'saved/state.json' does not list the files of a data set", "other")


@pytest.mark.parametrize("name", ["../../evil", "..", "a/../../evil", "/evil", "a//evil", "./evil", "evil\0"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    source = Source(name, "memory://a.txt", 1, [{"text": "a"}])
    with pytest.raises(InputError, match="data: expected names of shards without"):
        CorpusRun([source], Folder(str(tmp_path / "out")), Reading(), {}, resume=False)


def test_passwords_of_urls_reach_no_file(begun: Run, tmp_path: Path) -> None:
    source = Source("a", "s3://me:word@bucket/a.jsonl?token=abc", 3)
    assert about(source)["source"] == "s3://***@bucket/a.jsonl?token=***"
    for data in ("s3://me:word@bucket/*.txt", "https://me:word@127.0.0.1:9/a.jsonl", "nowhere://me:word@host/a.jsonl"):
        result = begun(f"score m --data {data} --out other")
        assert_refused(result, "data: ", "other")
        assert not any("word" in line for line in result.errors), result.errors
        result = begun(f"score m --data corpus/* --out {data}")
        assert result.code == 2
        assert not any("word" in line for line in result.errors), result.errors


def test_the_name_of_an_output_hides_a_token() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe_file("/get?token=abc&file=a.txt", b"text\n")
    (source,) = find_sources("memory://get?token=abc&file=a.txt")
    assert source.name == "get?token=***&file=a.txt"
    assert source.stamp
    system.rm_file("/get?token=abc&file=a.txt")


def test_locks_and_partial_files_follow_no_links(begun: Run, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    partial = Path(Folder("scored").partial("shards", "a.txt.parquet"))
    Path("scored/shards/a.txt.parquet").unlink()
    partial.symlink_to(precious)
    Path("scored/.settings.json.partial").symlink_to(precious)
    Path("scored/.summary.json.partial").symlink_to(precious)
    result = begun(f"{LINE} --out scored --resume")
    assert result.code == 0, result.errors
    assert precious.read_text() == "precious"
    Path("scored/.lock").unlink()
    Path("scored/.lock").symlink_to(precious)
    result = begun(f"{LINE} --out scored --resume")
    assert result.code == 2
    assert result.errors[-1].endswith(".lock', which is a link")
    assert precious.read_text() == "precious"


def test_files_of_a_run_have_the_umasks_mode(begun: Run, tmp_path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "scored").rglob("*") if path.is_file()}
    modes |= {path.stat().st_mode & 0o777 for path in Path("m").iterdir()}
    assert modes == {0o666 & ~mask}
