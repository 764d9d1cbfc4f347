"""benchmark: time a dense and a pruned model in turn; report speed-ups, their spread, and the reasons for small gains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.synthetic import forward_options
from secateur.model import cost
from secateur.model.branches import feed_forwards
from secateur.model.families import branches
from secateur.model.images import fixed_length
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_model
from secateur.model.undisturbed import undisturbed
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown
from secateur.support.html import html_table
from secateur.support.progress import Progress, counted

COLUMNS = ("batch x tokens", "dense ms", "pruned ms", "speed-up", "quartiles", "FLOPs allow", "dense/s", "pruned/s")

MOST_PAIRS = 100_000  # More runs than any measurement needs; a typing error must not run for ever.


@dataclass(frozen=True, repr=False)
class Timing:
    """The times of both models on one batch shape.

    Attributes:
        batch_size: Examples in the batch.
        length: Tokens of an example; for a model that reads images, the tokens that it makes of an image.
        dense_ms: Median time of a dense forward pass, in milliseconds.
        pruned_ms: Median time of a pruned forward pass, in milliseconds.
        speedup: Median of the ratios dense/pruned of the pairs of runs.
        speedup_low: Lower quartile of these ratios.
        speedup_high: Upper quartile of these ratios.
        dense_flops: FLOPs of one dense forward pass.
        pruned_flops: FLOPs of one pruned forward pass.
        pairs: The number of pairs of runs.
    """

    batch_size: int
    length: int
    dense_ms: float
    pruned_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    dense_flops: int
    pruned_flops: int
    pairs: int

    @property
    def flops_speedup(self) -> float:
        """The speed-up that the counted FLOPs allow: dense over pruned."""
        return self.dense_flops / self.pruned_flops

    @property
    def examples_per_second(self) -> tuple[float, float]:
        """Throughput of the dense and of the pruned model."""
        return 1e3 * self.batch_size / self.dense_ms, 1e3 * self.batch_size / self.pruned_ms

    def __repr__(self) -> str:
        quartiles = f"quartiles {self.speedup_low:.2f} to {self.speedup_high:.2f}"
        return f"Timing({self.batch_size} x {self.length}: {self.speedup:.2f}x, {quartiles}, {self.dense_ms:.1f} ms dense)"


@dataclass(frozen=True, repr=False)
class Report:
    """The result of `benchmark`.

    Attributes:
        timings: One entry for each batch.
        dense_parameters: Parameters of the dense model.
        pruned_parameters: Parameters of the pruned model.
        environment: Device, threads and versions, as in `secateur.support.environment`.
        notes: Reasons why a speed-up falls short of what the FLOPs allow.
    """

    timings: list[Timing]
    dense_parameters: int
    pruned_parameters: int
    environment: dict[str, Any]
    notes: list[str]

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of a table's row for each batch, under the names in `COLUMNS`."""
        for timing in self.timings:
            yield (
                f"{timing.batch_size} x {timing.length}", f"{timing.dense_ms:.1f}", f"{timing.pruned_ms:.1f}",
                f"{timing.speedup:.2f}x", f"{timing.speedup_low:.2f} to {timing.speedup_high:.2f}",
                f"{timing.flops_speedup:.2f}x", *(f"{rate:,.0f}" for rate in timing.examples_per_second),
            )  # fmt: skip

    def __repr__(self) -> str:
        speedups = ", ".join(f"{t.batch_size} x {t.length}: {t.speedup:.2f}x" for t in self.timings)
        return f"Report({speedups}; {self.dense_parameters:,} -> {self.pruned_parameters:,} parameters)"

    def _repr_html_(self) -> str:
        parameters = f"{self.dense_parameters:,} dense and {self.pruned_parameters:,} pruned parameters"
        return html_table(f"{parameters}, {self.environment['device']}", COLUMNS, list(self.cells()))

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON document, derived figures included."""
        timings = [
            {**asdict(t), "flops_speedup": t.flops_speedup, "examples_per_second": t.examples_per_second} for t in self.timings
        ]
        return {**asdict(self), "timings": timings}


def benchmark(
    dense: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    pairs: int = 20,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Report:
    """Time forward passes of both models on the same batches, a dense and a pruned run in turn.

    Both models run in eval mode, on the device they are on.

    Args:
        dense: The dense model.
        pruned: The pruned model.
        batches: Keyword arguments of the models, one batch for each shape of interest (`synthetic_batches` makes them).
        pairs: Pairs of runs for each batch, after three warm-up runs of each model. If a batch would take longer than
            `seconds`, fewer pairs run, but at least three.
        seconds: Time limit for each batch.
        progress: True for a progress bar, or a function of (batches timed, all batches).

    Raises:
        InputError: There is no batch, or a model has weights without values.
    """
    for name, model in (("dense", dense), ("pruned", pruned)):
        require_model(model)
        require_values(model, name)
    require_count("pairs", pairs, most=MOST_PAIRS)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping, Tensor)):
        raise InputError(f"batches: expected batches as synthetic_batches makes them, got {shown(batches)}")
    given: list[dict[str, Tensor]] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or not batch:
            raise InputError(f"batches: expected keyword arguments of the models, got {shown(batch)}")
        given.append(dict(batch))
    if not given:
        raise InputError("batches: expected at least one batch, got none")
    with undisturbed(dense), undisturbed(pruned), torch.inference_mode():
        timings = [_time(dense, pruned, batch, pairs, seconds) for batch in counted(progress, "timing", given, len(given))]
    device = next(dense.parameters()).device
    notes = _notes(timings, pruned, device)
    return Report(timings, cost.parameters(dense), cost.parameters(pruned), environment(dense), notes)


def _time(dense: nn.Module, pruned: nn.Module, batch: dict[str, Tensor], pairs: int, seconds: float) -> Timing:
    """Time both models on one batch."""
    options = forward_options(dense)
    start = time.perf_counter()
    for _ in range(3):
        _seconds(dense, batch, options)
        _seconds(pruned, batch, options)
    pair_seconds = (time.perf_counter() - start) / 3
    count = max(3, min(pairs, math.ceil(seconds / pair_seconds)))
    times: list[tuple[float, float]] = []
    for k in range(count):
        if k % 2:
            second = _seconds(pruned, batch, options)
            times.append((_seconds(dense, batch, options), second))
        else:
            first = _seconds(dense, batch, options)
            times.append((first, _seconds(pruned, batch, options)))
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    size = len(next(iter(batch.values())))
    length = fixed_length(dense) or batch["input_ids"].shape[1]
    return Timing(
        batch_size=size,
        length=length,
        dense_ms=1e3 * statistics.median(a for a, _ in times),
        pruned_ms=1e3 * statistics.median(b for _, b in times),
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        dense_flops=cost.flops(dense, {**batch, **options}),
        pruned_flops=cost.flops(pruned, {**batch, **options}),
        pairs=count,
    )


def _seconds(model: nn.Module, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> float:
    """Seconds of one forward pass, the device's work included."""
    device = next(iter(batch.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(**batch, **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _notes(timings: Sequence[Timing], pruned: nn.Module, device: torch.device) -> list[str]:
    """Reasons why shapes fall short of what the counted FLOPs allow, as far as the figures show them."""
    if all(t.flops_speedup < 1.02 for t in timings):
        return ["the pruned model does under 2% fewer FLOPs: (almost) nothing that costs time was removed"]
    best = max(t.dense_flops / t.dense_ms for t in timings)
    align = 64 if device.type == "cuda" else 8
    widths = [branch.width for branch in feed_forwards(branches(pruned).values())]
    misaligned = [width for width in widths if width % align]
    notes = []
    for timing in timings:
        if timing.speedup >= 0.85 * timing.flops_speedup:
            continue
        reasons = []
        share = timing.dense_flops / timing.dense_ms / best
        if share < 0.6:
            reasons.append(f"the batch is too small: the dense model runs at {share:.0%} of its FLOP/s at the best shape")
        if misaligned:
            reasons.append(
                f"{len(misaligned)} of {len(widths)} FFN widths are not multiples of {align} (plan with align={align})"
            )
        if timing.speedup_high >= 0.85 * timing.flops_speedup:
            low, high = timing.speedup_low, timing.speedup_high
            reasons.append(f"the runs scatter (quartiles {low:.2f} to {high:.2f}): was the machine busy?")
        if not reasons:
            reasons.append("element-wise work and memory traffic, which pruning does not shrink as much")
        shape = f"batch {timing.batch_size} x {timing.length}"
        notes.append(
            f"{shape}: {timing.speedup:.2f}x of the {timing.flops_speedup:.2f}x that FLOPs allow: {'; '.join(reasons)}"
        )
    return notes
