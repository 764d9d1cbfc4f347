"""The figures of attribution-based pruning, from the finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.plots import figure, png
from secateur.reproduction.ap import STACKS, Settings
from secateur.reproduction.results import Mean, Results

SIZE = (4.2, 3.1)


def draw(results: Results, settings: Settings) -> dict[str, bytes]:
    """File name to PNG, for each experiment that was run."""
    drawings = {
        "accuracy": _accuracy, "both": _both, "low-resource": _low_resource, "unsupervised": _unsupervised,
        "unseen": _unseen, "layers": _layers,
    }  # fmt: skip
    return {f"{name}.png": drawings[name](results, settings) for name in settings.experiments}


def _accuracy(results: Results, settings: Settings) -> bytes:
    """A row a task, a column a stack, a line a criterion."""
    made, panels = _panels(settings.tasks)
    for (task, stack), axes in panels.items():
        for k, criterion in enumerate(settings.criteria):
            curve = results.curve(stack, settings.rates, scored=task, tested=task, criterion=criterion)
            _line(axes, results.dense(task), curve, criterion, k)
    return _finished(made, panels)


def _unsupervised(results: Results, settings: Settings) -> bytes:
    made, panels = _panels(settings.tasks)
    for (task, stack), axes in panels.items():
        for k, (criterion, label) in enumerate((("ap", "with labels"), ("ap-unsupervised", "without labels"))):
            curve = results.curve(stack, settings.rates, scored=task, tested=task, criterion=criterion)
            _line(axes, results.dense(task), curve, label, k)
    return _finished(made, panels)


def _low_resource(results: Results, settings: Settings) -> bytes:
    made, panels = _panels(settings.detailed)
    for (task, stack), axes in panels.items():
        for k, size in enumerate((*settings.sizes, 0)):
            curve = results.curve(stack, settings.coarse, scored=task, tested=task, criterion="ap", examples=size)
            _line(axes, results.dense(task), curve, f"{size} examples" if size else "as many as elsewhere", k)
    return _finished(made, panels)


def _unseen(results: Results, settings: Settings) -> bytes:
    tested = settings.unseen[0]
    made, panels = _panels((tested,))
    for (_, stack), axes in panels.items():
        for k, scored in enumerate(settings.unseen):
            curve = results.curve(stack, settings.rates, scored=scored, tested=tested, criterion="ap")
            _line(axes, results.dense(tested), curve, f"scores of {scored}", k)
    return _finished(made, panels)


def _layers(results: Results, settings: Settings) -> bytes:
    made, panels = _panels(settings.detailed)
    for (task, stack), axes in panels.items():
        for k, words in enumerate(settings.parts(stack)):
            curve = results.curve(stack, settings.coarse, scored=task, tested=task, criterion="ap", sites=words)
            label = f"layers {words}" if words[0].isdigit() else words
            _line(axes, results.dense(task), curve, label, k)
    return _finished(made, panels)


def _both(results: Results, settings: Settings) -> bytes:
    """A heat map a task: accuracy against the encoder's rate and the decoder's."""
    made, grid = figure(1, len(settings.tasks), SIZE)
    rates = (0.0, *settings.coarse)
    for axes, task in zip(grid[0], settings.tasks, strict=True):
        found = [[_of(results, task, encoder, decoder) for decoder in rates] for encoder in rates]
        image = axes.imshow(found, origin="lower", cmap="Blues")
        for i, row in enumerate(found):
            for j, value in enumerate(row):
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if image.norm(value) > 0.6 else "black",
                )
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(rates)), rates)
        axes.set_xlabel("decoder's rate")
        axes.set_ylabel("encoder's rate")
        axes.set_title(task, fontsize=9)
    return png(made)


def _of(results: Results, task: str, encoder: float, decoder: float) -> float:
    if not encoder and not decoder:
        return results.dense(task)
    found = results.at(scored=task, tested=task, criterion="ap", encoder=encoder, decoder=decoder)
    return float("nan") if found is None else found.value


def _panels(tasks: Sequence[str]) -> tuple[Any, dict[tuple[str, str], Any]]:
    made, grid = figure(len(tasks), len(STACKS), SIZE)
    panels = {(task, stack): grid[i][j] for i, task in enumerate(tasks) for j, stack in enumerate(STACKS)}
    for (task, stack), axes in panels.items():
        axes.set_title(f"{task}, {stack} pruned", fontsize=9)
        axes.set_xlabel("share of units removed")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
    return made, panels


def _line(axes: Any, dense: float, curve: Sequence[tuple[float, Mean]], label: str, number: int) -> None:
    """From the dense model's accuracy on; bars are standard deviations of the draws."""
    rates = [0.0, *(rate for rate, _ in curve)]
    values = [dense, *(mean.value for _, mean in curve)]
    bars = [0.0, *(mean.deviation for _, mean in curve)]
    style = ("-", "--", ":")[number // 8 % 3]
    axes.errorbar(rates, values, yerr=bars if any(bars) else None, marker="o", markersize=3, linestyle=style, label=label)


def _finished(made: Any, panels: Mapping[tuple[str, str], Any]) -> bytes:
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return png(made)
