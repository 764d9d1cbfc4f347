"""README.md: its code runs as pasted, it is short, and its links lead to files. The pages of docs/ link to files too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ROOT, code_blocks, run_block

README = ROOT / "README.md"


def test_the_code_blocks_run_as_pasted_in_order(tmp_path: Path) -> None:
    blocks = code_blocks(README, "python", "sh")
    assert [language for language, _ in blocks] == ["python", "sh", "python"]
    outputs = [run_block(language, text, tmp_path) for language, text in blocks]
    for output in outputs[:2]:
        assert "pruned equals masked" in output
        assert _loss_of_accuracy(output) <= 0.02, output
    for folder in ("out", "pruned"):
        assert (tmp_path / folder / "model.safetensors").is_file()


def _loss_of_accuracy(output: str) -> float:
    """The dense model's accuracy less the pruned model's, as `compress` or `secateur prune` prints them."""
    ((dense, pruned),) = re.findall(r"^accuracy:? +([\d.]+)(?: dense,)? +([\d.]+)", output, flags=re.MULTILINE)
    return float(dense) - float(pruned)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README.read_text(encoding="utf-8"))
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_stages_run_as_pasted_in_order(tmp_path: Path) -> None:
    ((_, text),) = code_blocks(ROOT / "docs/usage/stages.md", "python")
    output = run_block("python", text, tmp_path)
    assert output.count("accuracy") == 2
    assert "pruned equals masked" in output
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_one_title_and_links_only_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []
