"""Bulk scoring as a library: formats, order, rejects, batches, threads, lack of memory, and shards with errors."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpora
import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from cases import CASES, CLASSES, LABELS, Case

import secateur
from secateur import SequenceClassification
from secateur.corpus import mapper, pipeline, score
from secateur.corpus.output import SCORED, Counts, Folder
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.shapes import stepped
from secateur.corpus.shards import Finished, Reading, score_shards
from secateur.corpus.sources import Row, ShardError, Source, find_sources
from secateur.corpus.tuning import Sample, tuned
from secateur.corpus.windows import BATCHES, Window, windows

LABELLED = ["t5-gated", "t5-relu", "llama", "qwen3", "gemma3", "bert-sequence"]
BERT, T5 = CASES["bert-sequence"], CASES["t5-gated"]


def runner(case: Case, max_tokens: int = 64, workers: int = 2) -> Runner:
    return Runner(case.model(), case.task, max_tokens, workers, threads=1)


def run(folder: Path, sources: list[Source], model: Runner | None = None, **reading: Any) -> list[Finished]:
    return list(score_shards(model or runner(BERT), sources, Folder(str(folder)), Reading(**reading), lambda source: {}))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_the_tasks_probabilities_in_order(name: str, workers: int, tmp_path: Path) -> None:
    case, documents = CASES[name], corpora.texts(150)
    (finished,) = run(
        tmp_path, find_sources(str(corpora.parquet(tmp_path, documents))), runner(case, 40, workers), identity="id"
    )
    assert finished.error is None
    with torch.inference_mode():
        expected = case.task.probabilities(case.model(), [{"input": text} for text in documents], 40)
    (rows,) = corpora.read(tmp_path).values()
    assert [row["row"] for row in rows] == [row["id"] for row in rows] == list(range(150))
    for row, wanted in zip(rows, expected, strict=True):
        assert {name: row[f"p_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert row[f"p_{row['label']}"] == max(row[f"p_{name}"] for name in wanted)


@pytest.mark.parametrize("kind", corpora.FORMATS)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    documents = corpora.texts(60)
    (source,) = find_sources(str(corpora.FORMATS[kind](tmp_path, documents)))
    identity = None if kind.startswith("txt") else "id"
    chunks = list(source.read("text", identity, chunk=16))
    rows = [row for chunk, _ in chunks for row in chunk]
    assert [row.value for row in rows] == documents
    if identity:
        assert [int(row.kept[0]) for row in rows] == list(range(60))
    shares = [share for _, share in chunks]
    assert shares == sorted(shares)
    assert 0.99 < shares[-1] <= 1


NOT_UTF8 = b'{"text": "caf\xe9"}\n'
BAD_ROWS = b'{"text": null}\n{"text": 7}\n{"text": ""}\n{"text": " \\t"}\n{"other": 1}\n[1]\n{"text": \n' + NOT_UTF8
REASONS = [
    "null", "expected text, got int", "empty", "empty", "no column 'text'", "expected an object, got list",
    "line 8 is not JSON: ", "not UTF-8",
]  # fmt: skip


def test_rows_that_cannot_be_scored_are_rejected(tmp_path: Path) -> None:
    path = corpora.write(tmp_path / "a.jsonl", b'{"text": "the cat sat"}\n' + BAD_ROWS + b'\n{"text": "a dog ran"}\n')
    (finished,) = run(tmp_path, find_sources(str(path)))
    assert (finished.counts.rows, finished.counts.scored, finished.counts.rejected) == (10, 2, 8)
    assert [row["row"] for row in corpora.read(tmp_path)["a.jsonl.parquet"]] == [0, 9]
    rejected = corpora.rejects(tmp_path)["a.jsonl.jsonl"]
    assert [row["row"] for row in rejected] == list(range(1, 9))
    assert all(row["reason"].startswith(reason) for row, reason in zip(rejected, REASONS, strict=True))


def test_bytes_that_are_not_utf8_reject_a_row_of_any_format(tmp_path: Path) -> None:
    column = pyarrow.array([b"the cat", b"caf\xe9", b"a dog"]).view(pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    corpora.write(tmp_path / "b.csv", b"text\nthe cat\ncaf\xe9\na dog\n")
    corpora.write(tmp_path / "c.txt", b"the cat\ncaf\xe9\na dog\n")
    finished = run(tmp_path, find_sources(f"{tmp_path}/*.*"))
    assert [shard.counts.rejected for shard in finished] == [1, 1, 1]
    reasons = [[(row["row"], row["reason"]) for row in rows] for rows in corpora.rejects(tmp_path).values()]
    assert reasons == [[(1, "not UTF-8")]] * 3


@pytest.mark.parametrize(("on_long", "scored_rows"), [("cut", 3), ("error", 2)])
def test_long_documents_are_cut_or_rejected(on_long: str, scored_rows: int, tmp_path: Path) -> None:
    short = replace(runner(BERT), task=type(BERT.task)(BERT.task.reader, labels=CLASSES, max_length=8))
    path = corpora.lines(tmp_path, ["the cat", "the big dog ran under the red tree", "a dog"])
    (finished,) = run(tmp_path, find_sources(str(path)), short, on_long=on_long)
    assert finished.counts.scored == scored_rows
    if on_long == "error":
        (rejected,) = corpora.rejects(tmp_path)["a.txt.jsonl"]
        assert (rejected["row"], rejected["reason"]) == (1, "10 tokens, of which the model takes 8")


@pytest.mark.parametrize("value", [None, 3, "", " ", "\ud800", "ok"])
def test_only_text_can_be_scored(value: Any) -> None:
    assert (BERT.task.why_no_input(value) is None) == (value == "ok")


def test_windows_hold_batches_of_similar_length() -> None:
    chunks = [([Row(text) for text in corpora.texts(500, seed)], (seed + 1) / 8) for seed in range(8)]
    all_windows = list(windows(iter(chunks), BERT.task, BERT.model(), 3, max_tokens=64, on_long="cut"))
    assert len(all_windows) > 2
    assert sum(len(window.reasons) for window in all_windows) == 4000
    assert [window.first for window in all_windows] == [
        sum(len(w.reasons) for w in all_windows[:k]) for k in range(len(all_windows))
    ]
    # No window is larger than needed, so the memory that a corpus takes does not depend on its size.
    assert max(window.tokens for window in all_windows) < BATCHES * 64 + 500 * 33
    padded = sum(len(b) * max(i.length for i in b) for w in all_windows for b in runner(BERT).batches(w))
    assert 1 - sum(window.tokens for window in all_windows) / padded < 0.05


def test_stepped_lengths_are_few_and_near() -> None:
    lengths = [stepped(length) for length in range(1, 4097)]
    assert lengths[:32] == list(range(1, 33))
    assert all(length <= padded < length * 17 / 16 for length, padded in enumerate(lengths, start=1))
    assert len(set(lengths)) == 31 + 7 * 16 + 1
    assert [stepped(padded) for padded in lengths] == lengths


@pytest.mark.parametrize(
    ("compiled", "dtype", "few"),
    [
        (None, torch.float32, False),
        (None, torch.float64, False),
        (None, torch.bfloat16, True),
        ("default", torch.float32, True),
    ],
)
def test_when_lengths_are_stepped(compiled: str | None, dtype: torch.dtype, few: bool) -> None:
    model = replace(runner(BERT), model=BERT.model(dtype), compiled=compiled)
    assert [model.padded(length) for length in (31, 33)] == ([31, 34] if few else [31, 33])
    # BERT takes no longer inputs than this, and it is not one of the steps.
    config: Any = model.model.config
    most = config.max_position_embeddings
    assert isinstance(most, int)
    assert model.padded(most - 1) == (most if few else most - 1)
    task = SequenceClassification(BERT.task.reader, max_length=33)
    assert replace(model, task=task).padded(33) == 33


@pytest.mark.parametrize("name", LABELLED)
def test_stepped_lengths_change_no_probability(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(pipeline, "stepped", lambda length: -(-length // 4) * 4)
    (source,) = find_sources(str(corpora.parquet(tmp_path, corpora.texts(150))))
    rows = {}
    for few in (False, True):
        model = replace(runner(case), model=case.model(torch.float64))
        vars(model)["_few_lengths"] = few
        (finished,) = run(tmp_path / str(few), [source], model)
        (rows[few],) = corpora.read(tmp_path / str(few)).values()
        assert finished.counts.scored == 150
        assert finished.counts.padded > 0
        assert not few or finished.counts.padded % 4 == 0
    for row, other in zip(rows[False], rows[True], strict=True):
        for label in case.task.label_names(case.model()):
            assert row[f"p_{label}"] == pytest.approx(other[f"p_{label}"], rel=1e-5)


def test_a_limit_is_for_the_whole_corpus(tmp_path: Path) -> None:
    for name in "abc":
        corpora.lines(tmp_path, corpora.texts(20), f"{name}.txt")
    finished = run(tmp_path, find_sources(f"{tmp_path}/*.txt"), limit=25)
    assert [shard.counts.rows for shard in finished] == [20, 5]


def fails_above(model: Any, tokens: int) -> Any:
    """Make the model request more memory than there is, once a batch holds more than `tokens` tokens."""

    def allocate(module: Any, arguments: Any, options: Any) -> None:
        if options["input_ids"].numel() > tokens:
            torch.empty(1 << 60)

    return model.register_forward_pre_hook(allocate, with_kwargs=True)


def test_lack_of_memory_halves_the_batches(tmp_path: Path) -> None:
    documents = corpora.texts(200)
    plain = run(tmp_path / "plain", find_sources(str(corpora.lines(tmp_path, documents))), runner(BERT, 64))
    narrow = runner(BERT, 1024)
    handle = fails_above(narrow.model, 70)
    halved = run(tmp_path / "narrow", find_sources(str(tmp_path / "a.txt")), narrow)
    handle.remove()
    assert 32 <= narrow.max_tokens <= 70
    assert narrow.halvings
    assert halved[0].counts.scored == plain[0].counts.scored == 200
    (a,), (b,) = (corpora.read(tmp_path / name).values() for name in ("plain", "narrow"))
    for name in CLASSES:
        assert [row[f"p_{name}"] for row in a] == pytest.approx([row[f"p_{name}"] for row in b], rel=1e-4, abs=1e-6)


def test_a_document_that_does_not_fit_alone_is_rejected(tmp_path: Path) -> None:
    model = runner(BERT, 64)
    handle = fails_above(model.model, 12)
    documents = corpora.texts(40)
    (finished,) = run(tmp_path, find_sources(str(corpora.lines(tmp_path, documents))), model)
    handle.remove()
    long = [k for k, ids in enumerate(BERT.task.encode(documents)) if len(ids) > 12]
    assert 0 < len(long) < 40
    rejected = corpora.rejects(tmp_path)["a.txt.jsonl"]
    assert [row["row"] for row in rejected] == long
    assert all(row["reason"].startswith("out of memory") for row in rejected)
    assert finished.counts == replace(finished.counts, rows=40, scored=40 - len(long), rejected=len(long))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


CORRUPT = ["parquet", "jsonl.gz", "jsonl.zst", "csv.gz", "arrow"]


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_shard_is_reported_and_the_others_are_finished(kind: str, tmp_path: Path) -> None:
    noise = [f"{text} {hash((text, k))}" for k, text in enumerate(corpora.texts(3000))]
    place = corpora.FORMATS[kind](tmp_path, noise)
    for path in place.glob("*.arrow") if place.is_dir() else [place]:
        cut_off(path)
    after = corpora.lines(tmp_path, ["the cat"], "z.txt")
    broken, whole = run(tmp_path, [*find_sources(str(place)), *find_sources(str(after))])
    assert broken.error is not None
    assert "cannot be read to its end" in broken.error
    assert broken.counts == Counts()
    assert whole.counts.scored == 1
    assert list(corpora.read(tmp_path)) == ["z.txt.parquet"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_shard_that_is_gone_and_a_column_that_is_not_there(tmp_path: Path) -> None:
    paths = [corpora.table(tmp_path, ["the cat"], f"{name}.csv") for name in "abc"]
    sources = find_sources(f"{tmp_path}/*.csv")
    paths[0].unlink()
    paths[1].write_text("id,words\n0,the cat\n")
    gone, wrong, whole = run(tmp_path, sources)
    assert gone.error == f"file://{paths[0]}: no such file"
    assert wrong.error == f"file://{paths[1]}: expected the column 'text', got 'id', 'words'"
    assert whole.counts.scored == 1


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        corpora.lines(tmp_path, corpora.texts(30), f"{name}.txt")
    full_path, create = Folder(str(tmp_path)).partial(SCORED, "b.txt.parquet"), Folder.create

    def create_on_full_disk(folder: Folder, path: str) -> Any:
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb") if path == full_path else create(folder, path)

    monkeypatch.setattr(Folder, "create", create_on_full_disk)
    first, full, last = run(tmp_path, find_sources(f"{tmp_path}/*.txt"))
    assert full.error == f"file://{tmp_path}/b.txt: its scores cannot be written: No space left on device"
    assert first.error is None is last.error
    assert list(corpora.read(tmp_path)) == ["a.txt.parquet", "c.txt.parquet"]
    assert not list(tmp_path.rglob(".*.partial"))


def test_the_models_error_is_raised_and_threads_end(tmp_path: Path) -> None:
    model = runner(BERT)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such thing")

    handle = model.model.register_forward_pre_hook(fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no such thing"):
        run(tmp_path, find_sources(str(corpora.lines(tmp_path, corpora.texts(300)))), model)
    handle.remove()
    assert threading.active_count() == before
    assert not list(tmp_path.rglob("*.parquet"))


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    batches = score(BERT.model(), BERT.task, ({"text": text} for text in corpora.texts(100_000)), max_tokens=16)
    assert next(batches).num_rows > 0
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_events_keep_their_order() -> None:
    all_windows = list(
        windows([([Row(t) for t in corpora.texts(300)], 1.0)], BERT.task, BERT.model(), 3, max_tokens=8, on_long="cut")
    )
    assert len(all_windows) > 1
    events: list[Any] = ["begin", *all_windows, "end"]
    yielded = list(scored(iter(events), runner(BERT, 8)))
    assert yielded == events
    assert all(isinstance(event, str) or (isinstance(event, Window) and event.done.is_set()) for event in yielded)


def test_a_stream_in_the_library(tmp_path: Path) -> None:
    rows = [{"text": text, "key": f"k{k}"} for k, text in enumerate(corpora.texts(50))]
    rows[7]["text"] = None  # type: ignore[assignment]
    (batch,) = score(T5.model(), T5.task, rows, identity="key")
    scored_rows = batch.to_pylist()
    assert [row["key"] for row in scored_rows] == [row["key"] for row in rows]
    assert [row["row"] for row in scored_rows] == list(range(50))
    assert {k for k, row in enumerate(scored_rows) if row["reason"]} == {7}
    assert scored_rows[7]["label"] is None
    of_texts = pyarrow.Table.from_batches(score(T5.model(), T5.task, [row["text"] for row in rows]))
    assert of_texts["label"].to_pylist() == [row["label"] for row in scored_rows]
    mapped = datasets.Dataset.from_list(rows).map(mapper(T5.model(), T5.task), batched=True, batch_size=16).to_list()
    assert [row["label"] for row in mapped] == [row["label"] for row in scored_rows]
    assert [row["reason"] for row in mapped] == [row["reason"] for row in scored_rows]
    assert sum(mapped[0][f"p_{label}"] for label in LABELS) == pytest.approx(1)


def test_tuning_keeps_given_settings_and_the_model() -> None:
    model = runner(BERT)
    (window,) = windows(
        [([Row(t) for t in corpora.texts(600)], 1.0)], BERT.task, BERT.model(), 3, max_tokens=4096, on_long="cut"
    )
    said: list[str] = []
    given = tuned(model, Sample(window.items), max_tokens=100, threads=1, say=said.append)
    assert (given.max_tokens, given.workers, given.threads) == (100, 1, 1)
    assert not said
    free = tuned(model, Sample(window.items), any_dtype=True, say=said.append)
    assert free.max_tokens in (256, 512, 1024, 2048, 4096)
    assert any(line.startswith("bfloat16") for line in said)
    assert next(model.model.parameters()).dtype == torch.float32


BAD: dict[str, tuple[Any, str]] = {
    "on_long": (
        lambda: next(score(BERT.model(), BERT.task, ["a"], on_long="drop")),
        "on-long: expected cut or error, got 'drop'",
    ),
    "dataset": (
        lambda: next(score(BERT.model(), BERT.task, 3)),  # type: ignore[arg-type]
        "dataset: expected an iterable of rows or the name of data, got int",
    ),
    "open": (
        lambda: next(score(T5.model(), secateur.TextToText(T5.task.reader), ["a"])),
        "labels: expected the candidate labels of a closed task, got None (open targets)",
    ),
    "nothing": (lambda: find_sources("nowhere/*.jsonl"), "data: no such files: 'nowhere/*.jsonl'"),
    "format": (lambda: find_sources(__file__), "data: expected files ending in .parquet"),
    "folder": (lambda: find_sources(str(Path(__file__).parent)), "data: expected files, a pattern, or a folder of one split"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line(bad: str) -> None:
    call, line = BAD[bad]
    with pytest.raises(secateur.InputError) as raised:
        call()
    assert str(raised.value).startswith(line)


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        corpora.lines(tmp_path / name, ["the cat"], "x.txt")
    with pytest.raises(secateur.InputError, match=r"would both be scored into 'x\.txt'"):
        find_sources(f"{tmp_path}/a/x.txt,{tmp_path}/b/x.txt")
    assert [source.name for source in find_sources(f"{tmp_path}/*/x.txt")] == ["a/x.txt", "b/x.txt"]


def test_shards_at_a_url(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://corpus/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write(b'{"text": "the cat"}\n')
    sources = find_sources("memory://corpus/*.gz")
    folder = Folder("memory://scored")
    (finished,) = score_shards(runner(BERT), sources, folder, Reading(), lambda source: {"size": source.size})
    assert finished.counts.scored == 1
    assert folder.finished()["a.jsonl.gz"]["rows"] == 1
    with pytest.raises(ShardError, match="no such file"):
        list(Source("b", "memory://corpus/b.txt", 1).read("text"))
