"""The tables and the plot of a run on a GPU. Rehearsals are not shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from bench.support.provenance import RESULTS
from bench.support.tables import markdown

NOT_MEASURED = "On a GPU: not measured yet (`make gpu-report` measures)."


def runs() -> list[dict[str, Any]]:
    """Return the committed runs, in the order of their files' names."""
    documents = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    return [run for run in documents if run.get("report") == "gpu" and not run["rehearsal"]]


def gpu() -> str:
    """Make the tables of each run."""
    return "\n\n".join(map(tables, runs())) or NOT_MEASURED


def gpu_summary() -> str:
    """Make README's sentence or table: attribution of whole models on each GPU."""
    parts = [f"On {run['device']}, bf16:\n\n{_attribution(run)}" for run in runs() if run.get("attribution")]
    return "\n\n".join(parts) or NOT_MEASURED


def gpu_plot() -> dict[str, bytes]:
    """Draw the kernels of each run."""
    drawn = {f"gpu-{run['device'].replace(' ', '-')}.png": plot(run) for run in runs()}
    return {name: content for name, content in drawn.items() if content is not None}


def tables(run: dict[str, Any]) -> str:
    """Return the tables of a run, and what it did not measure."""
    head = f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, commit {run['commit']}."
    if run["rehearsal"]:
        head = f"A rehearsal at tiny sizes: its figures say nothing. {head}"
    parts = [head]
    for ceilings in run.get("ceilings", []):
        if "copy_bytes_per_second" in ceilings:
            copy, product = ceilings["copy_bytes_per_second"] / 1e9, ceilings["product_operations_per_second"] / 1e12
            parts.append(f"Measured ceilings: a copy at {copy:,.0f} GB/s, a bf16 product at {product:,.0f} TFLOP/s.")
    makers = {"kernels": _kernels, "attribution": _attribution, "integrated": _integrated, "latency": _latency, "tests": _tests}
    parts += [make(run) for part, make in makers.items() if run.get(part)]
    errors = [
        f"{_name(row)}: {text}" for part in run.values() if isinstance(part, list) for row in part for text in _errors(row)
    ]
    if errors:
        parts.append("Errors:\n\n" + "\n".join(f"- {error}" for error in errors))
    if run["not_measured"]:
        parts.append("Not measured, as the time was up: " + ", ".join(map(_name, run["not_measured"])) + ".")
    return "\n\n".join(parts)


def plot(run: dict[str, Any]) -> bytes | None:
    """Draw the floor of the time over the time of each version, for each kernel; None without matplotlib or without kernels."""
    rows = [row for row in run.get("kernels", []) if "triton_ms" in row]
    if not rows or find_spec("matplotlib") is None:
        return None
    from secateur.support.figures import PALETTE, figure, legend, png

    compiled = {_key(row): row for row in run.get("compiled_kernels", [])}
    drawn, ((axes,),) = figure(
        1, 1, (10, 1.6 + 0.32 * len(rows)),
        title=f"kernels against the floor of their time (n = {len(rows)} shapes, {run['device']})",
        caption="Bars: floor of the time / median time of the runs; 1 is the hardware's limit. No error bars. The floor "
        "follows from the measured copy and matrix product.",
    )  # fmt: skip
    for k, name in enumerate(("triton", "compiled", "eager")):
        times = [{**compiled.get(_key(row), {}), **row}.get(f"{name}_ms") for row in rows]
        shares = [row["floor_ms"] / time if time else 0.0 for row, time in zip(rows, times, strict=True)]
        axes.barh([place + 0.27 * k for place in range(len(rows))], shares, height=0.25, color=PALETTE[k], label=name)
    axes.set_yticks([place + 0.27 for place in range(len(rows))])
    axes.set_yticklabels([f"{row['operation']}, {row['model']}, {row['tokens']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("floor of the time / time")
    legend(drawn)
    return png(drawn)


def kernel_line(row: dict[str, Any]) -> str:
    """Return the printed line of a kernel's row."""
    times = " ".join(f"{name} {row[f'{name}_ms']:.3f} ms" for name in ("floor", "triton", "eager") if f"{name}_ms" in row)
    return f"{_name(row)}: {times} {'; '.join(_errors(row))}"


def _kernels(run: dict[str, Any]) -> str:
    compiled = {_key(row): row for row in run.get("compiled_kernels", [])}
    lines = []
    for row in run["kernels"]:
        both = {**compiled.get(_key(row), {}), **row}
        over = [_ratio(both, f"{name}_ms", "triton_ms") for name in ("eager", "compiled", "compiled_without_scores")]
        of_floor = f"{row['of_floor']:.0%}" if "of_floor" in row else "-"
        shape = f"{row['width']}, {row['neurons']}, {row['tokens']}"
        times = (f"{row['triton_ms']:.3f}" if "triton_ms" in row else "-", of_floor)
        lines.append((row["operation"], row["model"], shape, *times, *over, row.get("triton_by", "-")))
    head = (
        "kernel",
        "model",
        "d_model, d_ff, tokens",
        "ms",
        "of the ceiling",
        "eager",
        "compiled",
        "without scores",
        "timed by",
    )
    about = (
        "Columns eager, compiled and without scores (compiled): that version's time over the kernel's. A CUDA graph has no "
        "launches between runs, but data that fits in the second-level cache stays there."
    )
    return f"{about}\n\n{markdown(head, lines)}"


def _attribution(run: dict[str, Any]) -> str:
    rows = [row for row in run["attribution"] if "bare_ms" in row]
    lines = [
        (row["model"], str(row["tokens"]), f"{row['bare_ms']:.1f}", _over(row, "triton"), _over(row, "reference"))
        for row in rows
    ]
    head = ("model", "tokens", "bare passes, ms", "attribution over bare passes", "without Triton")
    return markdown(head, lines)


def _over(row: dict[str, Any], name: str) -> str:
    return f"{row[f'{name}_over_bare']['median']:.3f}" if f"{name}_over_bare" in row else "-"


def _integrated(run: dict[str, Any]) -> str:
    rows = [row for row in run["integrated"] if "joint_over_gradient" in row]
    lines = [(row["model"], str(row["nodes"]), f"{row['joint_over_gradient']['median']:.2f}") for row in rows]
    return markdown(("model", "joint nodes", "integrated gradients over attribution"), lines)


def _latency(run: dict[str, Any]) -> str:
    compiled = {_key(row): row for row in run.get("compiled_latency", [])}
    lines = []
    for row in run["latency"]:
        if "speedup" not in row:
            continue
        by_compile = compiled.get(_key(row), {}).get("dense_over_pruned")
        cells = f"{row['flops_speedup']:.2f}", f"{row['speedup']:.2f}", f"{row['of_flops_allowed']:.0%}"
        lines.append((row["model"], str(row["batch"]), *cells, f"{by_compile['median']:.2f}" if by_compile else "-"))
    head = ("model", "texts", "speed-up by FLOPs", "measured", "of what FLOPs allow", "by torch.compile")
    return markdown(head, lines)


def _tests(run: dict[str, Any]) -> str:
    return "\n".join(f"Tests of {row['tests']}: {row.get('summary', row.get('error', ''))}" for row in run["tests"])


def _ratio(row: dict[str, Any], above: str, below: str) -> str:
    return f"{row[above] / row[below]:.2f}x" if above in row and below in row else "-"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("operation", "model", "tokens", "batch", "length"))


def _name(row: dict[str, Any]) -> str:
    names: Iterable[str] = ("part", "operation", "model", "tokens", "batch", "tests")
    return ", ".join(str(row[name]) for name in names if name in row)


def _errors(row: Any) -> list[str]:
    pairs = row.items() if isinstance(row, dict) else ()
    return [f"{key}: {value}" for key, value in pairs if key.endswith("error") and isinstance(value, str)]
