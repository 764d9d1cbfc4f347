"""What the commands say on stderr: bars, lines without a terminal, --quiet, --verbose and --log."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from command import Run, assert_refused
from rich.console import Console
from rich.progress import Progress

import secateur.cli.shared.bars as module
from secateur.attribution.criteria import PRESETS
from secateur.cli.shared.bars import bars
from secateur.support.progress import counted

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The stream of stderr, which is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(module, "stderr", Console(file=stream, force_terminal=False))
    return stream


def test_without_a_terminal_a_line_is_written_every_30_seconds(stream: io.StringIO) -> None:
    clock = Clock()
    lines = []
    for _ in counted(bars(clock=clock), "cells", range(960), 960):
        clock.now += 0.125
        lines.append(len(stream.getvalue().splitlines()))
    assert lines[:240] == [0] * 240
    assert stream.getvalue().splitlines() == [
        "cells: 240 of 960, 8.0/s, 0:01:30 left",
        "cells: 480 of 960, 8.0/s, 0:01:00 left",
        "cells: 720 of 960, 8.0/s, 0:00:30 left",
        "cells: 960 of 960, 8.0/s, in 0:02:00",
    ]


def test_a_short_stage_writes_no_line(stream: io.StringIO) -> None:
    clock = Clock()
    for _ in counted(bars(clock=clock), "cells", range(3), 3):
        clock.now += 9.0
    assert stream.getvalue() == ""


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(stream: io.StringIO) -> None:
    clock = Clock()
    with bars(clock=clock).open("training steps") as report:
        report(80, 100)
        clock.now += 60.0
        report(90, 100)
    assert stream.getvalue() == "training steps: 90 of 100, 10.0/min, 0:01:00 left\n"


def test_a_bar_estimates_the_time_left_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(), list[Progress]()

    class Recorded(Progress):
        def start(self) -> None:
            shown.append(self)
            super().start()

    stream = io.StringIO()
    monkeypatch.setattr(module, "stderr", Console(file=stream, force_terminal=True))
    monkeypatch.setattr(module, "Progress", Recorded)
    steps = counted(bars(clock=clock), "examples", [2] * 4, 8, lambda step: step)
    next(steps)
    (task,) = shown[0].tasks
    assert task.time_remaining is None
    for done in (1, 2, 3):
        clock.now += 100.0  # Longer than the 30 seconds of rich's default for the rate.
        next(steps)
        assert task.completed == 2 * done
        assert task.time_remaining == pytest.approx(100.0 * (4 - done))
    steps.close()
    assert "examples: " not in stream.getvalue()  # A bar, and no line.


def test_a_command_shows_its_stages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    result = run(
        "prune builtin --data train.jsonl --eval test.jsonl --keep 0.5 --examples 8 --recover auto --batch-sizes 1 --lengths 8 "
        "--out d"
    )
    assert result.code == 0, result.errors
    text = "\n".join(result.errors)
    for what in ("scoring examples: 8 of 8", "trying: 5 of 5", "evaluating: 48 of 48", "timing: 1 of 1"):
        assert what in text
    evaluated = run("evaluate d --data test.jsonl --predictions p.csv")
    assert evaluated.code == 0, evaluated.errors
    text = "\n".join(evaluated.errors)
    for what in ("evaluating: 48 of 48", "predicting: 48 of 48"):
        assert what in text


def test_quiet_leaves_results_and_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    line = "prune builtin --data train.jsonl --keep 0.5 --examples 8 --recover none --batch-sizes 1 --lengths 8"
    loud, quiet = run(f"{line} --out a"), run(f"{line} --out b --quiet --log log.txt")
    assert "rebuilding and verifying" in loud.errors
    assert quiet.code == 0
    assert quiet.errors == []
    assert "written to b" in quiet.out
    assert "quiet" not in Path("b/run.yaml").read_text()
    assert "log" not in Path("b/run.yaml").read_text()
    lines = Path("log.txt").read_text().splitlines()
    assert all(TIME.match(line) for line in lines)
    assert "rebuilding and verifying" in [TIME.sub("", line) for line in lines]
    failed = run("sites ./none --quiet --log log.txt")
    assert failed.code == 2
    assert len(failed.errors) == 1
    added = Path("log.txt").read_text().splitlines()
    assert added[:-1] == lines
    assert TIME.sub("", added[-1]) == failed.errors[0]


def test_verbose_says_the_log_lines_of_the_library_and_the_warnings_of_transformers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.cli.commands import sites

    def summary(name: str) -> str:
        logging.getLogger("secateur").info("a line")
        logging.getLogger("transformers.modeling_utils").warning("a warning")
        logging.getLogger("transformers.modeling_utils").info("too much")
        return ""

    monkeypatch.setattr(sites, "PRESETS", {"gradient": PRESETS["gradient"]})
    monkeypatch.setattr(sites, "summary", summary)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert run("criteria").errors == []
    assert run("criteria --verbose --log log.txt").errors == ["a line", "a warning"]
    assert [TIME.sub("", line) for line in Path("log.txt").read_text().splitlines()] == ["a line", "a warning"]
    assert logging.getLogger("transformers").level == logging.ERROR
    assert run("criteria").errors == []


def test_the_log_hides_passwords(run: Run) -> None:
    run("sites s3://me:word@bucket/model --log log.txt")
    text = Path("log.txt").read_text()
    assert "***@bucket" in text
    assert "word" not in text


def test_wrong_options_are_refused_before_any_work(run: Run) -> None:
    assert_refused(run("sites builtin --quiet --verbose"), "quiet, verbose: expected one of them, got both", "d")
    for place in ("none/log.txt", "."):
        assert_refused(run(f"sites builtin --log {place}"), f"log: expected a file that can be written to, got '{place}'", "d")
