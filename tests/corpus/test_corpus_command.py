"""`secateur score`: the whole command, killed at random moments, interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import pyarrow.parquet
import pytest
import torch
from cases import CASES, _encoder, byte_level_tokenizer, piece_tokenizer
from command import Run, assert_refused
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import secateur
from secateur.corpus.output import Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.run import SETTINGS, SUMMARY, CorpusRun, RunOptions, alone_in
from secateur.corpus.shards import Reading
from secateur.corpus.sources import find_sources
from secateur.data import builtin
from secateur.support.errors import InputError

LABELS = "--labels hotels,medicine,products,reviews"
FIXED = "--threads 1 --max-tokens 512 --dtype float32"
CASE = CASES["bert-sequence"]


def corpus(folder: Path, shards: int, rows: int = 40) -> None:
    (folder / "corpus").mkdir()
    for shard in range(shards):
        documents = corpora.texts(rows, seed=shard)
        documents[3] = "" if shard % 2 else documents[3]
        corpora.FORMATS[("jsonl", "jsonl.zst", "csv")[shard % 3]](folder, documents)
        (file,) = folder.glob("a.*")
        file.rename(folder / "corpus" / f"{shard:02d}{''.join(file.suffixes)}")


def test_the_whole_command(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 3)
    document = run(f"score builtin --data corpus/* --id-column id {LABELS} {FIXED} --out scored --json").document
    assert (document["rows"], document["scored"], document["rejected"], document["shards"]) == (120, 119, 1, 3)
    assert document["failed"] == []
    assert json.loads((tmp_path / "scored" / SUMMARY).read_text()) == {k: v for k, v in document.items() if k != "out"}
    rows = corpora.read(tmp_path / "scored")
    assert {name: len(of) for name, of in rows.items()} == {
        "00.jsonl.parquet": 40, "01.jsonl.zst.parquet": 39, "02.csv.parquet": 40,
    }  # fmt: skip
    assert corpora.rejects(tmp_path / "scored") == {"01.jsonl.zst.jsonl": [{"row": 3, "id": 3, "reason": "empty"}]}
    assert run(f"score builtin --data corpus/* --id-column id {LABELS} {FIXED} --out scored").code == 2
    before = (tmp_path / "scored" / "shards" / "00.jsonl.parquet").stat().st_mtime_ns
    again = run(f"score builtin --data corpus/* --id-column id {LABELS} {FIXED} --out scored --resume --json").document
    assert (again["rows"], again["scored"]) == (120, 119)
    assert (tmp_path / "scored" / "shards" / "00.jsonl.parquet").stat().st_mtime_ns == before


def test_the_end_says_where_rejected_documents_are(run: Run, tmp_path: Path) -> None:
    corpora.json_lines(tmp_path, ["the cat sat", "", "a dog"])
    line = "the rejected documents and the reasons are in scored/rejects"
    command = f"score builtin --data a.jsonl {LABELS} {FIXED}"
    assert run(f"{command} --out scored").out.splitlines()[-2:] == [line, "scores in scored"]
    assert len(list((tmp_path / "scored" / "rejects").iterdir())) == 1
    assert line not in run(f"{command} --limit 1 --out others").out


def test_settings_are_measured_once(run: Run, tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(700))
    options = f"--data a.txt {LABELS} --limit 600 --out scored"
    first = run(f"score builtin {options} --json")
    measuring = [line.startswith("measuring how the model runs fastest") for line in first.errors].index(True)
    assert any("as fast" in line for line in first.errors[measuring + 1 :])
    (tmp_path / "scored" / "shards" / "a.txt.parquet").unlink()
    second = run(f"score builtin {options} --resume --json")
    (begun,) = [line for line in second.errors if line.startswith("as begun: max_tokens ")]
    assert "None" not in begun
    assert not any("measuring" in line for line in second.errors)
    assert first.document["settings"] == second.document["settings"]
    assert first.document["measured"] == second.document["measured"]
    assert first.document["measured"][-1].startswith("compilation left out: scoring takes about 0.")
    assert first.document["rows"] == second.document["rows"] == 600


def test_a_failed_shard_is_reported_and_tried_again(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 3)
    whole = (tmp_path / "corpus" / "01.jsonl.zst").read_bytes()
    (tmp_path / "corpus" / "01.jsonl.zst").write_bytes(whole[:-30])
    command = f"score builtin --data corpus/* {LABELS} {FIXED} --out scored --json"
    broken = run(command)
    assert broken.code == 1
    (line,) = (line for line in broken.errors if line.startswith("secateur: "))
    assert "corpus/01.jsonl.zst: cannot be read to its end" in line
    assert (broken.document["shards"], broken.document["rows"]) == (2, 80)
    (tmp_path / "corpus" / "01.jsonl.zst").write_bytes(whole)
    mended = run(f"{command} --resume")
    assert mended.code == 0
    assert (mended.document["shards"], mended.document["rows"]) == (3, 120)


def in_a_child(work: Callable[[], Any]) -> int:
    """Do the work in a fork of this process, where all modules are imported; return its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def score_all(folder: Path, out: str) -> None:
    torch.set_num_threads(1)
    sources, output = find_sources(f"{folder}/corpus/*"), Folder(str(folder / out))
    scoring = CorpusRun(sources, output, Reading(identity="id"), {}, resume=True)
    runner = scoring.ready(Runner(CASE.model(), CASE.task, 1), RunOptions(max_tokens=32, threads=2), print)
    with alone_in(output):
        scoring.begin(runner)
        list(scoring.score(runner))


def test_thirty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    corpus(tmp_path, 12, rows=150)
    draw = random.Random(time.time_ns())
    began = time.perf_counter()
    os.waitpid(in_a_child(lambda: score_all(tmp_path, "clean")), 0)
    whole = time.perf_counter() - began
    kills = 0
    while kills < 30:
        child = in_a_child(lambda: score_all(tmp_path, "killed"))
        time.sleep(draw.uniform(0, whole / 4))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (tmp_path / "killed" / SUMMARY).exists():
            # The run finished before the thirtieth kill: start again, with the remaining kills.
            compare(tmp_path)
            shutil.rmtree(tmp_path / "killed")
    assert os.waitpid(in_a_child(lambda: score_all(tmp_path, "killed")), 0)[1] == 0
    compare(tmp_path)


def compare(folder: Path) -> None:
    """Check that the killed run's output equals the clean run's, row for row and bit for bit."""
    clean, killed = folder / "clean", folder / "killed"
    assert corpora.read(killed) == corpora.read(clean)
    assert corpora.rejects(killed) == corpora.rejects(clean)
    assert not list(killed.rglob("*.partial"))
    counts = ("rows", "scored", "rejected", "tokens", "padded", "shards")
    first, second = (json.loads((out / SUMMARY).read_text()) for out in (clean, killed))
    assert {name: first[name] for name in counts} == {name: second[name] for name in counts}
    assert first["rows"] == 12 * 150 == first["scored"] + first["rejected"]


JUST_NOW = "was begun by another process just now; --resume continues it"


def begin_together(folder: Path, ready: int, go: int) -> None:
    """Look at a new folder, wait until the others have looked too, and score when nobody else does."""
    torch.set_num_threads(1)
    sources, output = find_sources(f"{folder}/corpus/*"), Folder(str(folder / "raced"))
    scoring = CorpusRun(sources, output, Reading(), {}, resume=False)
    runner = scoring.ready(Runner(CASE.model(), CASE.task, 1), RunOptions(max_tokens=64, threads=1), print)
    os.write(ready, b".")
    os.read(go, 1)
    in_use, begun = (f"out: '{output.place}' {why}" for why in ("is in use by another process", JUST_NOW))
    message = in_use
    while message == in_use:
        try:
            with alone_in(output):
                scoring.begin(runner)
                list(scoring.score(runner))
            return
        except InputError as error:
            message = str(error)
            time.sleep(0.01)
    os._exit(7 if message == begun else 8)


def test_of_two_first_runs_one_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path, 2)
    (looked, ready), (wait, go) = os.pipe(), os.pipe()
    children = [in_a_child(lambda: begin_together(tmp_path, ready, wait)) for _ in range(2)]
    for _ in children:
        os.read(looked, 1)
    os.write(go, b"..")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 7]
    assert len(corpora.read(tmp_path / "raced")) == 2
    for end in (looked, ready, wait, go):
        os.close(end)


def test_other_data_on_resume(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 3)
    assert run(f"score builtin --data corpus/* {LABELS} {FIXED} --out scored").code == 0
    before = corpora.read(tmp_path / "scored")
    corpora.lines(tmp_path / "corpus", ["the cat"], "new.txt")
    fewer = run(f"score builtin --data corpus/0[12]*,corpus/new.txt {LABELS} {FIXED} --out scored --resume --json")
    assert "1 finished shards are none of --data's; their scores stay, and are counted" in fewer.errors
    assert (fewer.document["shards"], fewer.document["rows"]) == (4, 121)
    assert {name: rows for name, rows in corpora.read(tmp_path / "scored").items() if name in before} == before
    (tmp_path / "other").mkdir()
    corpora.json_lines(tmp_path / "other", ["a dog"], "00.jsonl")
    other = run(f"score builtin --data other/* {LABELS} {FIXED} --out scored --resume")
    assert other.code == 2
    assert other.errors[-1] == (
        f"secateur: data: '00.jsonl' was scored from 'file://{tmp_path}/corpus/00.jsonl', got "
        f"'file://{tmp_path}/other/00.jsonl'; another corpus needs a new folder"
    )
    assert len(corpora.read(tmp_path / "scored")) == 4


def test_an_interrupt_stops_cleanly(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 6, rows=1500)
    command = f"score builtin --data corpus/* --id-column id {LABELS} {FIXED} --out stopped"
    # A process that starts the tests in the background may make them ignore the signal.
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", *command.split()], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    shards = tmp_path / "stopped" / "shards"
    while process.poll() is None and not list(shards.glob("*.parquet")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    so_far, interrupted = errors.splitlines()[-2:]
    assert so_far.endswith("of 6 shards are finished; --resume continues the run")
    assert interrupted == "secateur: interrupted"
    assert not list((tmp_path / "stopped").rglob("*.partial"))
    assert 1 <= len(corpora.read(tmp_path / "stopped")) < 6


REFUSED = [
    ("", "out: 'scored' was begun already; --resume continues it"),
    ("--resume --column words", "column: 'scored' was begun with 'text', got 'words'"),
    ("--resume --max-length 9", "max_length: 'scored' was begun with 512, got 9"),
    ("--resume --labels hotels,products", "labels: 'scored' was begun with ["),
]
BAD = [
    ("--data corpus/*.csv --out new", "data: no such files: 'corpus/*.csv'"),
    ("--data corpus/* --out corpus", "out: expected a new folder, or one that this command began, got 'corpus'"),
    ("--data corpus/* --out new --column words", "data: file:"),
    ("--data corpus/* --out new --threads many", "threads: expected auto or a number of at least 1, got 'many'"),
    ("--data corpus/* --out new --max-tokens 0", "max-tokens: expected auto or a number of at least 1, got '0'"),
    ("--data corpus/* --out new --compile maybe", "compile: expected auto, on, off, got 'maybe'"),
    ("--data corpus/* --out new --on-long drop", "on-long: expected cut or error, got 'drop'"),
    ("--data corpus/* --out nowhere/new", "out: expected an existing parent folder, got 'nowhere/new'"),
]


def test_other_settings_are_refused(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 1)
    assert run(f"score builtin --data corpus/* {LABELS} {FIXED} --out scored").code == 0
    for options, message in REFUSED:
        result = run(f"score builtin --data corpus/* {LABELS} {FIXED} --out scored {options}")
        assert result.code == 2
        assert result.errors[-1].startswith(f"secateur: {message}")
    settings = tmp_path / "scored" / SETTINGS
    document = json.loads(settings.read_text())
    document["settings"]["model"] = "another"
    settings.write_text(json.dumps(document))
    result = run(f"score builtin --data corpus/* {LABELS} {FIXED} --out scored --resume")
    assert result.errors[-1].startswith("secateur: model: 'scored' was begun with 'another', got '")


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, options: str, message: str) -> None:
    corpus(tmp_path, 1)
    result = run(f"score builtin {LABELS} {options}")
    assert_refused(result, message, tmp_path / "new")


def test_a_folder_in_use_is_refused(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path, 1)
    with alone_in(Folder(str(tmp_path / "scored"))):
        result = run(f"score builtin --data corpus/* {LABELS} {FIXED} --out scored")
    assert result.errors[-1] == "secateur: out: 'scored' is in use by another process"


def test_labels_of_a_file_keep_their_spaces_for_a_causal_model(run: Run, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(eos_token="!", pad_token="!")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    labels = [" a, b", " no"]
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    (tmp_path / "a.jsonl").write_text('{"text": "is it?"}\n')
    result = run(f"score m --data a.jsonl --labels labels.txt {FIXED} --compile off --out scored")
    assert result.code == 0, result.errors
    ((row,),) = corpora.read(tmp_path / "scored").values()
    (expected,) = secateur.CausalLM(tokenizer, labels=labels).probabilities(model, [{"input": "is it?"}], 64)
    assert {label: row[f"p_{label}"] for label in labels} == pytest.approx(expected, abs=1e-6)


def test_a_prompt_and_a_column_with_a_common_name(run: Run) -> None:
    rows = [{"review": example["input"].removeprefix("movie review: ")} for example in builtin.examples("movie.test")[:12]]
    Path("raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("asked.jsonl").write_text("".join(json.dumps({"text": f"movie review: {row['review']}"}) + "\n" for row in rows))
    common = "--labels bad,good --threads 1 --max-tokens 512 --compile off"
    assert run(f"score builtin --data raw.jsonl --out raw {common}", "--prompt", "movie review: {input}").code == 0
    assert run(f"score builtin --data asked.jsonl --out asked {common}").code == 0
    raw, asked = (pyarrow.parquet.read_table(next(Path(out).rglob("*.parquet"))).to_pylist() for out in ("raw", "asked"))
    assert raw == asked
    other = run(f"score builtin --data raw.jsonl --out raw --resume {common}", "--prompt", "movie: {input}")
    assert other.code == 2
    assert "prompt" in other.errors[-1]
    without = run(f"score builtin --data raw.jsonl --input-column review --out raw --resume {common}")
    assert (without.code, without.errors[-1][:33]) == (2, "secateur: prompt: 'raw' was begun")


def test_a_prompt_of_several_columns(run: Run) -> None:
    """It reads the columns that it names, and gives what the same texts in one column give."""
    rows = [{"title": f"film {k}", "review": text} for k, text in enumerate(corpora.texts(12))]
    rows[3]["title"] = None  # type: ignore[assignment]
    Path("raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("asked.jsonl").write_text("".join(json.dumps({"text": f"{row['title']}: {row['review']}"}) + "\n" for row in rows))
    common = "--labels bad,good --threads 1 --max-tokens 512 --compile off"
    result = run(f"score builtin --data raw.jsonl --out raw {common}", "--prompt", "{title}: {review}")
    assert result.code == 0, result.errors
    assert run(f"score builtin --data asked.jsonl --out asked {common}").code == 0
    raw, asked = (pyarrow.parquet.read_table(next(Path(out).rglob("*.parquet"))).to_pylist() for out in ("raw", "asked"))
    for row, expected in zip(raw, [row for row in asked if row["row"] != 3], strict=True):  # Their batches differ.
        assert row == {**expected, "p_bad": pytest.approx(expected["p_bad"]), "p_good": pytest.approx(expected["p_good"])}
    (rejected,) = corpora.rejects(Path("raw"))["raw.jsonl.jsonl"]
    assert rejected["reason"].startswith("expected texts for title, review for the prompt, got [None, ")
    missing = run(f"score builtin --data raw.jsonl --out two {common}", "--prompt", "{title}: {text}")
    assert_refused(missing, "data: file://", "two")
    assert "expected the column 'text', which none of its first rows has" in missing.errors[-1]
    twice = run(f"score builtin --data raw.jsonl --out two {common} --input-column title", "--prompt", "{title}: {review}")
    assert_refused(twice, "columns: expected none for the input, as the prompt names title, review", "two")


@pytest.mark.parametrize("kind", ["labels", "value"])
def test_several_labels_and_values(run: Run, tmp_path: Path, kind: str) -> None:
    """The command writes what single passes of the model give."""
    names, texts = (["war", "sport", "money"] if kind == "labels" else ["LABEL_0"]), corpora.texts(30)
    problem = {"problem_type": "multi_label_classification"} if kind == "labels" else {}
    model = _encoder(BertForSequenceClassification, BertConfig, names, **problem).eval()
    tokenizer = piece_tokenizer()
    secateur.save(model, "m", tokenizer=tokenizer)
    corpora.json_lines(tmp_path, texts)
    result = run(f"score m --data a.jsonl --out out {FIXED} --compile off --json")
    assert result.code == 0, result.errors
    ((*rows,),) = corpora.read(tmp_path / "out").values()
    with torch.no_grad():
        outputs = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()
    if kind == "value":
        assert list(rows[0]) == ["row", "value"]
        assert [row["value"] for row in rows] == pytest.approx(outputs.flatten().tolist(), abs=1e-5)
        assert result.document["labels"] == {}
        return
    for row, of_row in zip(rows, outputs.sigmoid().tolist(), strict=True):
        assert [row[f"p_{name}"] for name in names] == pytest.approx(of_row, abs=1e-5)
        assert row["labels"] == [name for name, p in zip(names, of_row, strict=True) if p > 0.5]
    assert result.document["labels"] == {name: sum(name in row["labels"] for row in rows) for name in names}
    assert len({tuple(row["labels"]) for row in rows}) > 1
