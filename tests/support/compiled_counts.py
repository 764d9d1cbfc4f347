"""What the compiled kernels use, as committed: `python tests/support/compiled_counts.py` counts it again and writes the file.

With `--tables` it prints the tables of bench/README.md from the committed file and compiles nothing.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compiled import CASES, TARGETS, Case, Usage, launch_of, usage

COUNTS = Path(__file__).parents[1] / "kernels" / "compiled.json"


def pairs() -> list[tuple[str, Case]]:
    """Return the targets and cases that are counted. sm_75 has tiles of its own for products of half precision alone."""
    half = [case for case in CASES if case.dtype == "float16" and case.width == 768 and "norm" not in case.operation]
    return [(target, case) for target in TARGETS for case in (half if target == "sm_75" else CASES)]


def committed() -> dict[str, Any]:
    """Return the committed file: Triton's version, and what each case uses on each target."""
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return counts


def expected(target: str, case: Case) -> Usage:
    """Return what the committed file says about a case."""
    return Usage(**committed()["counts"][target][str(case)])


def write(targets: list[str]) -> None:
    """Count the cases of these targets again and write the file."""
    import triton

    counts = committed()["counts"] if COUNTS.exists() else {}
    for target in targets:
        counts[target] = {}
        for _, case in (pair for pair in pairs() if pair[0] == target):
            counts[target][str(case)] = asdict(usage(launch_of(case, target), target))
            print(target, case, counts[target][str(case)], file=sys.stderr, flush=True)
    ordered = {target: counts[target] for target in TARGETS if target in counts}
    text = json.dumps({"triton": triton.__version__, "counts": ordered}, indent=1)
    # A line for each case.
    text = re.sub(r"{\s+(\"registers\"[^}]*?)\s+}", lambda case: "{" + re.sub(r"\s+", " ", case[1]) + "}", text)
    COUNTS.write_text(text + "\n", encoding="utf-8")


def tables() -> str:
    """Return the tables of bench/README.md: what bfloat16 uses on each target, and the rate that is possible on sm_90."""
    targets = [target for target in TARGETS if target != "sm_75"]
    cases = [case for case in CASES if case.dtype == "bfloat16"]
    used = [[_name(case), *(_cell(expected(target, case)) for target in targets)] for case in cases]
    products = [case for case in cases if expected("sm_90", case).loop]
    rates = [[_name(case), *map(str, allowed(case))] for case in products]
    heading = ["operation", "steps", "product, cycles", "loop, cycles", "rest, cycles", "share"]
    return _markdown(["operation", *targets], used) + "\n\n" + _markdown(heading, rates)


def allowed(case: Case) -> tuple[int, int, int, int, str]:
    """Return the share of the matrix units' rate that the instructions of a tile allow on sm_90, with what it follows from.

    A multiprocessor multiplies 4,096 numbers and sums a cycle (dense bf16, half of them products), and issues an instruction of
    each of 4 warps a cycle. Two programs on a multiprocessor hide what one does behind the other's product. A program that is
    alone adds what follows its loop to the product. The wait for memory is not counted, so a share is a bound.

    Returns:
        The loop's steps, the product's cycles for a tile, the cycles that issue the loop and the rest, and the share.
    """
    options = launch_of(case).arguments
    neurons, tokens, depth = (options.get(name) or launch_of(case).options[name] for name in ("NEURONS", "TOKENS", "DEPTH"))
    used = expected("sm_90", case)
    turns = launch_of(case).options["num_warps"] // 4
    steps = -(-case.width // depth)
    cycles = 2 * neurons * tokens * case.width // 4096
    loop, rest = steps * used.loop * turns, used.rest * turns
    total = max(cycles, loop + rest) if used.programs > 1 else max(cycles, loop) + rest
    return steps, cycles, loop, rest, f"{cycles / total:.0%}"


def _name(case: Case) -> str:
    """Return a case's name in a table."""
    return str(case).replace(" bfloat16", ",")


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, whose first column is text."""
    lines = [heading, ["---"] + ["--:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(used: Usage) -> str:
    """Return a cell of the table."""
    words = f"{used.registers}, {used.shared / 1024:.0f} KiB, {used.programs}"
    if used.rest:
        words += f"; {used.loop}, {used.rest}, {used.barriers}"
    return words + (f"; {used.spilled} bytes spilled" if used.spilled else "")


if __name__ == "__main__":
    if sys.argv[1:] == ["--tables"]:
        print(tables())
    else:
        write(sys.argv[1:] or list(TARGETS))
