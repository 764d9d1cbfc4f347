"""`make bench-check`: every result file has a check or a reason not to rerun it, and a figure that differs is reported."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from bench import check
from bench.compatibility import attempt
from bench.support.provenance import RESULTS


def test_every_result_file_has_a_check_or_a_reason() -> None:
    measured = {rerun.name for rerun in check.CHECKS}
    assert not measured & set(check.NOT_RERUN)
    assert measured | set(check.NOT_RERUN) == {path.stem for path in RESULTS.glob("*.json")}
    assert all(check.NOT_RERUN.values())
    assert all(rerun.why and rerun.tolerance > 0 for rerun in check.CHECKS)


@pytest.mark.parametrize(
    ("relative", "measured", "accepted"),
    [(False, 0.82, True), (False, 0.78, True), (False, 0.821, False), (True, 0.816, True), (True, 0.82, False)],
)
def test_a_tolerance_is_absolute_or_relative(relative: bool, measured: float, accepted: bool) -> None:
    assert replace(check.CHECKS[0], tolerance=0.02, relative=relative).accepts(0.8, measured) is accepted


@pytest.mark.parametrize(("measured", "code", "word"), [(1.0, 0, "same"), (1.5, 1, "DIFFERS")])
def test_the_exit_code_and_the_output_report_a_difference(
    measured: float, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instant = replace(check.CHECKS[0], tolerance=0.1, measure=lambda: iter([("figure", 1.0, measured)]))
    monkeypatch.setattr(check, "CHECKS", (instant,))
    assert check.main([]) == code
    out = capsys.readouterr().out
    assert out.startswith(f"{word:8}{instant.name}: figure")
    for name, reason in check.NOT_RERUN.items():
        assert f"not rerun: {name}: {reason}" in out
    assert f"{1 - code} figures the same, {code} differ, {len(check.NOT_RERUN)} files not rerun" in out


def test_a_name_without_a_result_file_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected some of"):
        check.main(["nothing"])


def test_every_way_to_run_a_model_folder_has_a_module() -> None:
    for way in attempt.WAYS.values():
        assert find_spec(f"bench.compatibility.{way.function.partition(':')[0]}") is not None, way
