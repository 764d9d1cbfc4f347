"""Only secateur.support.compat reads private names of other libraries."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for root in ("engine", "kernels") for path in sorted((ROOT / root).rglob("*.py"))]
COMPAT = ROOT / "engine/secateur/support/compat.py"


def is_private(name: str) -> bool:
    """Whether a name begins with a single underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: list[ast.Module]) -> set[str]:
    """Return the private names that secateur's own code defines."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in defined | stored if is_private(name)}


def foreign_private_names(code: str, own: set[str]) -> list[str]:
    """Return the private names that the code reads or imports and that secateur does not define."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("secateur"):
            names += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names += [node.args[1].value for _ in "." if isinstance(node.args[1], ast.Constant)]  # type: ignore[misc]
    return [name for name in names if is_private(name) and name not in own]


@pytest.fixture(scope="module")
def own() -> set[str]:
    """The private names that secateur defines outside the compat module."""
    return own_names([ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if path != COMPAT])


def test_no_other_module_reads_a_private_name_of_another_library(own: set[str]) -> None:
    read = {path.name: foreign_private_names(path.read_text(encoding="utf-8"), own) for path in SOURCES if path != COMPAT}
    assert {name: names for name, names in read.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from torch._inductor import config",
        "import torch._dynamo",
        "module._parameters",
        "getattr(config, '_attn_implementation', None)",
        "transformers.AutoModel._model_mapping",
    ],
)
def test_code_that_reads_a_private_name_of_another_library_is_reported(code: str, own: set[str]) -> None:
    assert foreign_private_names(code, own)
