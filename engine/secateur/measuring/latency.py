"""latency_table: measure in milliseconds how much each site of a model costs at several widths."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.stopwatch import Times, stopwatch
from secateur.measuring.synthetic import require_lengths, synthetic_batches
from secateur.model.branches import Branch
from secateur.model.discovery import fingerprint, sites
from secateur.model.families import branches
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_model
from secateur.model.sites import AttentionUnit, Site, branch_name
from secateur.model.undisturbed import undisturbed
from secateur.planning.latency_table import FORMAT, LatencyTable
from secateur.planning.plan import Plan
from secateur.pruning.prune import prune
from secateur.support.compat import attention_implementation
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.progress import Progress, counted

logger = logging.getLogger("secateur")
WIDTHS = tuple(eighths / 8 for eighths in range(8, 0, -1))
Step = tuple[list[Site], dict[str, int]]
Pair = tuple[Times, Times]


def latency_table(
    model: nn.Module,
    *,
    unit: AttentionUnit = "head",
    batch_size: int = 32,
    length: int = 64,
    target_length: int = 8,
    widths: Sequence[float] = WIDTHS,
    pairs: int = 15,
    seconds: float = 10.0,
    cache: bool = True,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the branches of a dense model at several widths.

    The model is measured on the device that it is on, and with the CPU threads that torch uses now.

    Each width is measured inside whole forward passes, with all sites cut to the same share, dense and cut model in turn. The
    time in the table is the dense model's time multiplied by the median ratio cut/dense, over all branches of one shape. The
    heads that stay differ from layer to layer, as in real plans.

    Args:
        model: The dense model.
        unit: The unit of attention, as in `sites`.
        batch_size: Examples in a batch.
        length: Tokens of an example.
        target_length: Decoder tokens, for a model that has an encoder and a decoder.
        widths: Shares of a site's units to measure. Unit counts are rounded up, FFN widths to multiples of 8. The smallest
            width that a plan can leave is measured too.
        pairs: The most pairs of passes for each width.
        seconds: About how long each width is measured, but for at least five pairs.
        cache: If true, read the table of the same model, shapes, device, threads and versions from
            $XDG_CACHE_HOME/secateur/latency (~/.cache without that variable), or write it there. If false, read and write
            nothing.
        progress: True for a progress bar, or a function of (widths measured, all widths).

    Raises:
        InputError: A share is outside (0, 1], a size is below 1, the length exceeds the model's positions, a cached file is not
            a table, or as in `sites`.
    """
    _check(model, widths, batch_size=batch_size, length=length, target_length=target_length, pairs=pairs)
    prunable = sites(model, unit=unit)
    shape = {"batch_size": batch_size, "length": length, "target_length": target_length}
    about: dict[str, Any] = {"environment": environment(model), "fingerprint": fingerprint(model), "unit": unit, **shape}
    cache_file = cached_at(model, {**about, "widths": sorted(widths)})
    if cache and cache_file.exists():
        try:
            table = LatencyTable.load(cache_file)
            logger.info("the latency table is read from %s", cache_file)
            return table
        except InputError as error:
            raise InputError(f"{error}; delete this file, and the table is measured again") from error
    (batch,) = synthetic_batches(model, [batch_size], [length], target_length=target_length)
    steps = [(cut, counts) for cut in _sweeps(prunable) for counts in _grid(cut, sorted({*widths, 0.0}))]
    samples = []
    for cut, counts in counted(progress, "widths", steps, len(steps)):
        pruned = prune(model, _plan(model, cut, counts))
        with undisturbed(model), undisturbed(pruned), torch.inference_mode():
            samples.append(_in_turn(model, pruned, batch, pairs, seconds))
    table = LatencyTable(**about, **_rows(prunable, _alike(model), steps, samples))
    if cache:
        _keep(table, cache_file)
    return table


def _keep(table: LatencyTable, cache_file: Path) -> None:
    """Write a table to the cache. The measurement is still of use where the cache cannot be written to."""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        table.save(cache_file)
    except OSError as error:
        logger.warning("the latency table is not kept: %s cannot be written (%s)", cache_file, error.strerror)


def cached_at(model: nn.Module, about: Mapping[str, Any]) -> Path:
    """Return the path of a measurement's cache file.

    Its name is a hash of the settings in `about`, of the model's modules (their activation functions, for example, which the
    fingerprint does not cover), and of how attention and matrix products are computed.
    """
    attention = attention_implementation(model.config)
    settings = [FORMAT, about, repr(model), attention, torch.get_float32_matmul_precision()]
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "secateur" / "latency" / f"{name}.json"


def _check(model: nn.Module, widths: Sequence[float], **sizes: int) -> None:
    """Raise InputError for unusable arguments of `latency_table`."""
    require_model(model)
    require_values(model)
    for share in widths:
        if not 0 < share <= 1:
            raise InputError(f"widths: expected shares in (0, 1], got {share}")
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}: expected a positive number, got {size}")
    require_lengths(model, [sizes["length"]], "length")


def _sweeps(prunable: Sequence[Site]) -> list[list[Site]]:
    """Groups of sites that are cut together: the channels of one unit, if there are several such units, then all sites."""
    units = dict.fromkeys(site.unit for site in prunable if site.is_channel)
    by_unit = [[site for site in prunable if site.unit == unit] for unit in units]
    return [*(by_unit if len(by_unit) > 1 else []), list(prunable)]


def _rows(
    prunable: Sequence[Site], groups: Mapping[str, list[str]], steps: Sequence[Step], samples: Sequence[list[Pair]]
) -> dict[str, Any]:
    """The fields `total`, `sites`, `both` and `rest` of a table, from the pairs of passes at each step.

    Args:
        prunable: All sites.
        groups: For each branch, the branches of its shape.
        steps: For each measurement, the sites that were cut and the units that they kept.
        samples: For each measurement, the times of its pairs of passes.
    """
    dense_passes = [dense for sample in samples for dense, _ in sample]
    total = statistics.median(times.total for times in dense_passes)
    dense_ms = {
        name: total * statistics.median(_sum(times, group) / times.total for times in dense_passes) / len(group)
        for name, group in groups.items()
    }
    rest_of_whole = max(0.0, total - sum(dense_ms.values()))
    alone: dict[str, dict[int, float]] = {site.name: {} for site in prunable}
    both: dict[str, dict[int, float]] = {}
    rest = {}
    for (cut, counts), sample in zip(steps, samples, strict=True):
        ratios = {name: statistics.median(_sum(b, group) / _sum(a, group) for a, b in sample) for name, group in groups.items()}
        names = [branch_name(site.name) for site in cut]
        for site, name in zip(cut, names, strict=True):
            if names.count(name) == 1:
                row = alone[site.name]
            elif site.read_by_output:
                row = both.setdefault(name, {})
            else:
                continue
            row.update({counts[site.name]: dense_ms[name] * ratios[name], site.units: dense_ms[name]})
        if len(cut) == len(prunable):
            left = sum(dense_ms[name] * ratios[name] for name in dense_ms) / sum(dense_ms.values())
            between = statistics.median(_rest(b) / _rest(a) for a, b in sample)
            rest[min(left, 1.0)] = rest_of_whole * between
    rest[1.0] = rest_of_whole
    rows = {"sites": alone, "both": both}
    ascending = {key: {name: dict(sorted(row.items())) for name, row in by_name.items()} for key, by_name in rows.items()}
    return {"total": total, **ascending, "rest": dict(sorted(rest.items()))}


def _grid(cut: Sequence[Site], shares: Sequence[float]) -> list[dict[str, int]]:
    """The units that the sites keep at each share, where this cuts any of them. A share of 0 means the fewest that can stay."""
    grid = []
    for share in shares:
        counts = {site.name: _count(site, share) for site in cut}
        if counts not in grid and any(counts[site.name] < site.units for site in cut):
            grid.append(counts)
    return grid or [{site.name: site.units for site in cut}]


def _count(site: Site, share: float) -> int:
    """Units at a share: neurons in multiples of 8, and the same number of channels in each head."""
    step = 8 if site.unit == "neuron" else site.channel_groups
    return min(site.units, step * max(1, math.ceil(share * site.units / step - 1e-9)))


def _plan(model: nn.Module, cut: Sequence[Site], counts: Mapping[str, int]) -> Plan:
    """A plan that keeps the given number of units of each site.

    Time does not depend on which units stay, except for heads: layers that keep the same heads may share a position bias.
    """
    kept = {}
    for site in cut:
        heads = site.channel_groups
        head_size = site.units // heads
        # Heads start at the layer's number, so that layers keep different ones.
        first = torch.arange(counts[site.name] // heads) + (site.layer if site.is_head else 0)  # [kept in a head]
        in_each_head = first.sort().values % head_size + head_size * torch.arange(heads).unsqueeze(1)  # [heads, kept in a head]
        kept[site.name] = in_each_head.flatten().sort().values  # [kept]
    return Plan(kept, tuple(cut), fingerprint(model))


def _in_turn(model: nn.Module, pruned: nn.Module, batch: Mapping[str, Tensor], pairs: int, seconds: float) -> list[Pair]:
    """Time pairs of passes, dense and pruned, after two warm-up pairs. The order changes with each pair."""
    times = []
    with stopwatch(model, batch) as dense, stopwatch(pruned, batch) as cut:
        pair_seconds = sum(run().total for run in (dense, cut, dense, cut)) / 2e3
        for turn in range(min(pairs, max(5, math.ceil(seconds / max(pair_seconds, 1e-6))))):
            if turn % 2:
                second = cut()
                times.append((dense(), second))
            else:
                first = dense()
                times.append((first, cut()))
    return times


def _alike(model: nn.Module) -> dict[str, list[str]]:
    """For each branch, the branches of its shape, which share one measurement.

    Branches have the same shape if their kind, stack and parameter sizes are the same. The first attention of a T5 stack
    differs from the others, because it holds the table of position biases.
    """
    by_shape: dict[Any, list[str]] = {}
    by_name = branches(model)
    for name, branch in by_name.items():
        by_shape.setdefault(_shape(model, branch), []).append(name)
    return {name: by_shape[_shape(model, branch)] for name, branch in by_name.items()}


def _shape(model: nn.Module, branch: Branch) -> Any:
    """The kind, stack and parameter sizes of a branch."""
    paths = sorted({*branch.linears, branch.path})
    sizes = [tuple(p.shape) for path in paths for p in model.get_submodule(path).parameters()]
    return branch.kind, branch.stack, tuple(sizes)


def _sum(times: Times, group: Sequence[str]) -> float:
    """Milliseconds of a group of branches in one pass."""
    return sum(times.branches[name] for name in group)


def _rest(times: Times) -> float:
    """Milliseconds of a pass outside all branches."""
    return times.total - sum(times.branches.values())
