"""The order of imports: a stage of the engine imports only stages below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up. Stages on the same floor do not import each other.
FLOORS = [
    ("support", "secateur_kernels"),
    ("model", "data"),
    ("tasks",),
    ("attribution", "corpus"),
    ("planning",),
    ("pruning",),
    ("recovery", "measuring"),
    ("healing",),
    ("flow",),
    ("learned", "exporting"),
    ("reproduction",),
    ("cli",),
]
FLOOR = {stage: number for number, floor in enumerate(FLOORS) for stage in floor}
TOP = "secateur"  # The package itself. Its public names reach every stage, so only the command line may import it.


def stage_of(module: str) -> str:
    """Return the stage of a module: "model" for "secateur.model.sites"."""
    package, *inside = module.split(".")
    if package == "secateur":
        return inside[0] if inside and inside[0] in FLOOR else TOP
    return package


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every import of our own modules, anywhere in a file."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a reader sees the stage"
            # In `from secateur import plan`, `plan` may be a public name or a stage.
            names = [f"secateur.{alias.name}" for alias in node.names] if node.module == "secateur" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in ("secateur", "secateur_kernels"))


def upward(file: str, module: str, text: str) -> list[str]:
    """Return the imports of a file that do not go down, with their lines."""
    stage = stage_of(module)
    if stage == TOP:  # `secateur/__init__.py` and `__main__.py`.
        return []
    imports = []
    for line, name in imported(ast.parse(text)):
        other = stage_of(name)
        if other == stage or (other == TOP and stage == "cli"):
            continue
        if other == TOP or FLOOR[other] >= FLOOR[stage]:
            imports.append(f"{file}:{line}: {stage} imports {name}")
    return imports


def modules() -> list[tuple[Path, str]]:
    """Return the files and the names of all modules of the engine and the kernels."""
    return [
        (path, ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__"))
        for root in ("engine", "kernels")
        for path in sorted((ROOT / root).rglob("*.py"))
    ]


def test_imports_go_down() -> None:
    files = modules()
    assert len(files) > 200
    assert {stage_of(module) for _, module in files} == {*FLOOR, TOP}
    assert not [line for path, module in files for line in upward(str(path), module, path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("secateur.model.sites", "from secateur.tasks import Task"),
        ("secateur.model.sites", "def f():\n    from secateur.planning.plan import plan"),
        ("secateur.flow.choose", "import secateur"),
        ("secateur.flow.choose", "from secateur import attribute"),
        ("secateur.flow.choose", "import secateur.cli.app"),
        ("secateur.data.examples", "from secateur.model import cost"),
        ("secateur_kernels.tiles", "from secateur.support.errors import InputError"),
    ],
)
def test_an_import_that_goes_up_is_reported(module: str, line: str) -> None:
    assert len(upward("file.py", module, line)) == 1


def bench_imports() -> dict[str, set[str]]:
    """Return the modules of bench that every module of bench imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "bench").rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        graph[name] = used & files.keys()
    return graph


def test_the_imports_of_bench_have_no_circle() -> None:
    graph = bench_imports()
    assert sum(map(len, graph.values())) > 50
    while leaves := [name for name, used in graph.items() if not used & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_no_test_imports_from_a_test_file() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path
