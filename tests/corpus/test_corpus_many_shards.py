"""What is done for each shard or window does not look at all other shards, so 100,000 of them cost no more each than a few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import corpora
import fsspec
import pytest

import secateur.cli.commands.score as command
import secateur.corpus.run as run_module
from secateur.cli.shared.bars import bars
from secateur.corpus.output import Counts, Folder
from secateur.corpus.run import CorpusRun, about
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Source
from secateur.support.progress import Report

SHARDS = 100_000


class Counted(Source):
    """A source that counts how often any size is read."""

    reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "size":
            Counted.reads += 1
        return super().__getattribute__(name)


def named(kind: type[Source] = Source, size: int = 100) -> list[Source]:
    return [kind(f"{k:06d}", f"/nowhere/{k:06d}.txt", size, stamp="1") for k in range(SHARDS)]


def test_progress_looks_at_one_shard_for_each_window() -> None:
    sources = named(Counted)
    with command._advancing(sources) as advance:
        Counted.reads = 0
        for source in sources[:500]:
            for share in (0.5, 1.0):
                advance(source, share, Counts(rows=1))
        assert Counted.reads <= 4 * 1000


def test_progress_ends_at_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[tuple[int, int]]()

    class Recorded(bars):
        @contextmanager
        def open(self, what: str) -> Iterator[Report]:
            yield lambda done, total: reports.append((done, total))

    monkeypatch.setattr(command, "bars", Recorded)
    sources = [Source(f"{k}", f"/nowhere/{k}", size) for k, size in enumerate((7, 5, 11))]
    with command._advancing(sources) as advance:
        for source in sources:
            for share in (1 / 3, 0.5, 1.0):
                advance(source, share, Counts(rows=1))
    assert reports[0] == (0, 23)
    assert reports[-1] == (23, 23)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_small_shards_are_not_opened_before_they_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = named()
    corpora.lines(tmp_path, ["a text"])
    sources[0] = Source("000000", str(tmp_path / "a.txt"), 100, stamp="1")  # Its column is checked at once.
    run = CorpusRun(sources, Folder(str(tmp_path / "out")), Reading(), {"labels": ["a"]}, resume=False)
    monkeypatch.setattr(fsspec, "open", None)
    run.part_rows = 100
    run._cut(print)
    assert run.left == sources


def test_a_file_is_compared_with_its_own_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora.lines(tmp_path, ["a text"])
    sources = [Source("a", str(tmp_path / "a.txt"), 100), *named()[:1000]]
    run = CorpusRun(sources, Folder(str(tmp_path / "out")), Reading(), {"labels": ["a"]}, resume=False)
    counts = {"rows": 1, "scored": 1, "rejected": 0, "tokens": 3, "padded": 3}
    for source in sources[501:]:
        part = {"of": source.name, "index": 0, "count": 2, "rows": [0, 1, 0, 1]}
        run.finished[f"{source.name}.part-00000-of-00002"] = {**about(source), **counts, "part": part}
    given = list[int]()

    def looked_at(source: Source, finished: Iterable[Mapping[str, Any]]) -> None:
        given.append(len(list(finished)))

    monkeypatch.setattr(run_module, "finished_parts", looked_at)
    run.part_rows = 100
    monkeypatch.setattr(run.folder, "remove", lambda name: None)
    run._cut(print)
    assert sum(given) == 500
    assert max(given) == 1
