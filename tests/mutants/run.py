"""A small mutation run: changes one place of the engine at a time, and reports which changes no test notices.

cosmic-ray makes the mutants. Its own sessions run all mutants, in the working tree, with one test command. This script draws a
sample with a seed, runs each mutant in a copy of the repository and gives each part of the engine its own tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from queue import SimpleQueue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_name("result.json")
SEED = 23
HANG = 240  # Seconds. A mutant in which one test runs for longer hangs and counts as killed.
COPIED = ("engine", "kernels", "tests", "bench", "pyproject.toml", "constraints.txt", "README.md", "docs")


@dataclass(frozen=True)
class Part:
    """Modules to mutate, the tests that must notice, and the number of mutants drawn."""

    modules: str
    tests: tuple[str, ...]
    sample: int


PARTS = {
    "planning": Part("engine/secateur/planning/*.py", ("tests/planning", "tests/flow", "tests/measuring/test_latency.py"), 40),
    "recovery": Part("engine/secateur/recovery/*.py", ("tests/recovery",), 20),
    "surgery": Part("engine/secateur/pruning/prune.py", ("tests/pruning",), 12),
}


@dataclass(frozen=True)
class Mutant:
    """One changed place: the path of the module and its text with the change."""

    module: str
    line: int
    code: str

    def diff(self) -> list[str]:
        """The lines that differ, with - and + before them."""
        lines = unified_diff((ROOT / self.module).read_text().splitlines(), self.code.splitlines(), n=0, lineterm="")
        return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def drawn(modules: str, count: int) -> tuple[list[Mutant], int]:
    """So many mutants of the modules, drawn with the seed, and the number of places that there are to change.

    Left out are changes that are no Python and changes of annotations alone, which nothing evaluates."""
    texts = {path: path.read_text() for path in sorted(ROOT.glob(modules))}
    places = [(path, *place) for path, text in texts.items() for place in _places(text)]
    mutants: list[Mutant] = []
    for path, operator, number, line in random.Random(SEED).sample(places, len(places)):
        code = mutate_code(texts[path], get_operator(operator)(), number)
        if code is not None and _without_annotations(code) not in (None, _without_annotations(texts[path])):
            mutants.append(Mutant(str(path.relative_to(ROOT)), line, code))
        if len(mutants) == count:
            break
    return mutants, len(places)


def _places(text: str) -> Iterator[tuple[str, int, int]]:
    """Each operator of cosmic-ray with the number of each place that it changes, and the line of the place."""
    tree = get_ast(text)
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith("NoOp") or "_Bit" in name or "Shift" in name:
            continue  # Bitwise operators are no fair test: on floats they raise an error at once.
        places = [place for node in ast_nodes(tree) for place in operator().mutation_positions(node)]
        yield from ((name, number, line) for number, ((line, _), _) in enumerate(places))


def _without_annotations(text: str) -> str | None:
    """The syntax tree of the code without annotations, None where the code is no Python. Nothing evaluates annotations, because
    of `from __future__ import annotations`."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """So many copies of the repository, for as many runs at a time."""
    queue: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            copy = Path(folder, str(number))
            copy.mkdir()
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                elif source.is_file():
                    shutil.copy(source, copy / name)
            queue.put(copy)
        yield queue


def passes(copy: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass on a copy."""
    hang = ["-o", f"faulthandler_timeout={HANG}", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *hang, *tests]
    paths = {"PYTHONPATH": f"{copy / 'engine'}:{copy / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **paths}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode == 0


def survives(mutant: Mutant, tests: tuple[str, ...], queue: SimpleQueue[Path]) -> bool:
    """Whether all tests pass on a copy with the mutant."""
    copy = queue.get()
    path = copy / mutant.module
    original = path.read_text()
    try:
        path.write_text(mutant.code)
        survived = passes(copy, tests)
        print("survived" if survived else "killed", f"{mutant.module}:{mutant.line}", flush=True)
        return survived
    finally:
        path.write_text(original)
        queue.put(copy)


def main() -> None:
    """Draws and runs the mutants of the chosen parts and writes what survives to tests/mutants/result.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts of the engine")
    parser.add_argument("--sample", type=int, help="mutants of each part; by default the number that the script sets")
    parser.add_argument("--workers", type=int, default=2, help="mutants that run at a time")
    arguments = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with copies(arguments.workers) as queue:
        for name in arguments.parts:
            part = PARTS[name]
            copy = queue.get()
            if not passes(copy, part.tests):
                raise SystemExit(f"mutants: expected tests of {name} that pass without a mutant, got a failure")
            queue.put(copy)
            mutants, places = drawn(part.modules, arguments.sample or part.sample)
            with ThreadPoolExecutor(arguments.workers) as pool:
                alive = list(pool.map(lambda mutant, tests=part.tests: survives(mutant, tests, queue), mutants))
            counts = Counter(alive)
            survivors = [
                {"place": f"{mutant.module}:{mutant.line}", "diff": mutant.diff()}
                for mutant, survived in zip(mutants, alive, strict=True)
                if survived
            ]
            numbers = {"places": places, "drawn": len(mutants), "killed": counts[False], "survived": counts[True]}
            results[name] = {"seed": SEED, **numbers, "survivors": survivors}
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
            print(
                f"{name}: {len(mutants)} mutants of {places} places, {counts[False]} killed, {counts[True]} survived",
                flush=True,
            )
            for survivor in survivors:
                print(survivor["place"], *survivor["diff"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
