"""The tables on multitask pruning: scores of the settings, and what masks and exported encoders cost."""

from __future__ import annotations

from typing import Any

from bench.report.reproduction import multitask_runs
from bench.support.tables import markdown, result
from secateur.reproduction.multitask.grid import ATTRIBUTION, EIGHT, MAGNITUDE, Cell

FILES = ("dense", "sparse")


def multitask() -> str:
    """The eight settings by density; one shared model against the best ensemble of single-task models."""
    runs = multitask_runs()
    settings = runs.settings
    parts = [
        f"The encoder of the built-in T5 ({len(settings.tasks)} tasks: {', '.join(settings.tasks)}; {settings.steps} steps for "
        f"each task; dense {runs.mean(Cell(settings.tasks)):.3f}): mean accuracy by the share of its weights that stay."
    ]
    for granularity in ("element", "rank"):
        densities = settings.densities[granularity]
        rows = []
        for setting in EIGHT:
            if setting[1] == granularity:
                curve = dict(runs.curve(setting))
                rows.append((f"{setting[0]}, {setting[2]}", *(f"{curve[density]:.3f}" for density in densities)))
        for start in (MAGNITUDE, ATTRIBUTION):
            curve = dict(runs.curve(("movement", granularity, "global"), scores=start))
            rows.append((f"movement, global, scores from {start}", *(f"{curve[density]:.3f}" for density in densities)))
        for setting in settings.mixture:
            if setting[1] == granularity:
                ensembles = [runs.mixture(setting, density) for density in densities]
                cells = ["" if ensemble is None else f"{ensemble.score:.3f}" for ensemble in ensembles]
                rows.append((f"best single-task models of the same total ({setting[0]}, {setting[2]})", *cells))
        parts.append(markdown((f"by {granularity}", *(f"{density:g}" for density in densities)), rows))
    return "\n\n".join(parts)


def multitask_speed() -> str:
    """A masked training step against the dense one; exported encoders of low rank against what FLOPs allow; bytes."""
    run = result("multitask")
    rows = []
    for row in run["steps"]:
        cells = [_ratio(row[f"{name}_over_dense"]) for name in _masked(row)]
        rows.append((row["model"], f"{row['batch']} x {row['length']}", *cells))
    names = [name.replace("element ", "").replace(" ", ", ", 1) for name in _masked(run["steps"][0])]
    ranks = [
        (
            row["model"], f"{row['density']:g}", f"{row['speedup']:.2f}x", f"{row['by_flops']:.2f}x",
            f"{row['of_flops_allowed']:.0%}", f"{row['linears_of_flops_allowed']:.0%}",
        )
        for row in run["ranks"]
    ]  # fmt: skip
    elements = [
        (row["model"], f"{row['density']:g}", *(_bytes(row["bytes"][kind]) for kind in FILES), f"{row['speedup']:.2f}x")
        for row in run["elements"]
    ]
    about = f"one thread, {run['environment']['device']}"
    return (
        f"A training step with masks over the same step without (element-wise, density 0.1; {about}):\n\n"
        + markdown(("encoder", "batch", *names), rows)
        + "\n\nExported encoders of low rank against the dense one, 32 x 64 tokens:\n\n"
        + markdown(("encoder", "density", "speed-up", "FLOPs allow", "reached", "reached by the linear layers alone"), ranks)
        + "\n\nExported element-wise: checkpoints, and compressed sparse rows (not used) against dense weights with zeros:\n\n"
        + markdown(("encoder", "density", "dense file", "sparse file", "speed of sparse rows"), elements)
    )


def _masked(row: dict[str, Any]) -> list[str]:
    """The settings that were timed, as their ratios are named."""
    names = [key.removesuffix("_over_dense") for key in row if key.endswith("_over_dense")]
    return [name for name in names if name.startswith("element") and "alone" not in name]


def _ratio(measured: dict[str, Any]) -> str:
    low, high = measured["quartiles"]
    return f"{measured['median']:.2f} ({low:.2f} to {high:.2f})"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
