"""The generated parts of README.md and docs/ equal the output of bench.report for bench/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench.report.__main__ import PAGES, Maker, filled
from bench.support.provenance import ROOT

PARTS = [(path, maker) for path, makers in PAGES for maker in makers]


@pytest.mark.parametrize(
    ("path", "maker"), [pytest.param(path, maker, id=f"{path.relative_to(ROOT)}-{maker.__name__}") for path, maker in PARTS]
)
def test_a_page_shows_the_figures_of_bench_results(path: Path, maker: Maker) -> None:
    assert path.read_text(encoding="utf-8") == filled(path, maker), "run `make readme`"


def test_every_mark_in_a_page_has_a_function() -> None:
    """The test above does not check text between marks without a function, so every mark must have one."""
    generated = {(path, maker.__name__) for path, maker in PARTS}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    marked = {(page, name) for page in pages for name in re.findall(r"<!-- begin:(\w+) -->", page.read_text(encoding="utf-8"))}
    assert marked == generated


def test_a_changed_figure_is_replaced(tmp_path: Path) -> None:
    maker = next(maker for _, maker in PARTS if any(digit in maker() for digit in "123456789"))
    page = tmp_path / "page.md"
    right = f"<!-- begin:{maker.__name__} -->\n{maker()}\n<!-- end:{maker.__name__} -->\n"
    page.write_text(right, encoding="utf-8")
    assert filled(page, maker) == right
    page.write_text(right.replace(next(digit for digit in "123456789" if digit in maker()), "0"), encoding="utf-8")
    assert filled(page, maker) == right != page.read_text(encoding="utf-8")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the marks of"):
        filled(page, PARTS[0][1])
