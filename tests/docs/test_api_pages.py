"""docs/api/: every public name has an entry. The entry names the same module as the stub. Every page is in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from pages import DOCS, ROOT

import secateur
from secateur import learned

ENTRY = re.compile(r"^::: ([\w.]+)\n    options:\n      heading: (secateur[\w.]*)$", flags=re.MULTILINE)


def entries() -> dict[str, str]:
    """Return the object that the pages show for every public name. Names are full."""
    texts = (page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return {name: home for text in texts for home, name in ENTRY.findall(text)}


def homes(stub: Path, package: str) -> dict[str, str]:
    """Return the module and name that a package's stub states for every public name. Names are full."""
    imports = re.findall(r"^from (\S+) import (\w+) as \w+$", stub.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {f"{package}.{name}": f"{home}.{name}" for home, name in imports}


@pytest.mark.parametrize("package", [secateur, learned], ids=lambda package: package.__name__)
def test_every_public_name_has_an_entry(package: ModuleType) -> None:
    names = {f"{package.__name__}.{name}" for name in package.__all__ if not name.startswith("__")}
    shown = {*entries(), "secateur.learned"}  # `secateur.learned` is a page.
    assert "# `secateur.learned`" in (DOCS / "api/learned.md").read_text(encoding="utf-8")
    assert names - shown == set()


@pytest.mark.parametrize("package", ["secateur", "secateur.learned"])
def test_entries_name_the_modules_of_the_stub(package: str) -> None:
    stub = homes(ROOT / "engine" / Path(*package.split(".")) / "__init__.pyi", package)
    stub.pop("secateur.learned", None)  # It is a page.
    shown = entries()
    assert len(stub) > 10
    assert {name: shown.get(name) for name in stub} == stub


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []
