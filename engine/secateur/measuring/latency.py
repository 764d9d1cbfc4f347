"""latency_table: what each site of a model costs in measured milliseconds, and what a plan would."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.stopwatch import Times, stopwatch
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.branches import Branch
from secateur.model.discovery import fingerprint, sites
from secateur.model.families import branches
from secateur.model.sites import AttentionUnit, Site, branch_name
from secateur.model.undisturbed import undisturbed
from secateur.planning.latency_table import FORMAT, LatencyTable
from secateur.planning.plan import Plan
from secateur.pruning.prune import prune
from secateur.support.compat import attention_implementation
from secateur.support.environment import environment
from secateur.support.errors import InputError

WIDTHS = tuple(eighths / 8 for eighths in range(8, 0, -1))
Progress = Callable[[Iterable[Any], int], Iterable[Any]]
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
    """Measures the branches of a dense model at several widths, on batches of batch_size x length tokens (and targets of
    target_length for a decoder that has an encoder), on the device and with the threads that the model would run.

    Each width is measured inside whole forward passes, with all sites cut to the same share, dense and cut in turn: a time is
    the dense model's times the median of such ratios, over all branches of one shape. Heads that stay differ from layer to
    layer, as in real plans.

    unit: as in `sites`. widths: shares of a site's units, rounded up, FFN widths to multiples of 8; the smallest that a plan
    can leave is measured besides. pairs, seconds: at most that many pairs of passes for each width, and about that long, but
    five. cache: a table of the same model, shapes, device, threads and versions is read from $XDG_CACHE_HOME/secateur/latency
    (~/.cache without it), or written there; otherwise nothing is read or written. progress: wraps the iteration over widths
    (given their number).
    Raises InputError: a share outside (0, 1], a size below 1, a length beyond the model's positions, a cached file that is
    no table, and as `sites` does.
    """
    _check(model, widths, batch_size=batch_size, length=length, target_length=target_length, pairs=pairs)
    chosen = sites(model, unit=unit)
    shape = {"batch_size": batch_size, "length": length, "target_length": target_length}
    about: dict[str, Any] = {"environment": environment(model), "fingerprint": fingerprint(model), "unit": unit, **shape}
    path = cached_at(model, {**about, "widths": sorted(widths)})
    if cache and path.exists():
        try:
            return LatencyTable.load(path)
        except InputError as error:
            raise InputError(f"{error}; delete it, and it will be measured anew") from error
    (batch,) = synthetic_batches(model, [batch_size], [length], target_length=target_length)
    steps = [(cut, counts) for cut in _sweeps(chosen) for counts in _grid(cut, sorted({*widths, 0.0}))]
    samples = []
    for cut, counts in progress(steps, len(steps)) if progress else steps:
        pruned = prune(model, _plan(model, cut, counts))
        with undisturbed(model), undisturbed(pruned), torch.inference_mode():
            samples.append(_in_turn(model, pruned, batch, pairs, seconds))
    table = LatencyTable(**about, **_rows(chosen, _alike(model), steps, samples))
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
    return table


def cached_at(model: nn.Module, about: Mapping[str, Any]) -> Path:
    """The file of a measurement: named by a hash of what it is of, of the model's modules (activations, for example, which
    the fingerprint doesn't tell), and of how attention and products run."""
    attention = attention_implementation(model.config)
    how = [FORMAT, about, repr(model), attention, torch.get_float32_matmul_precision()]
    name = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "secateur" / "latency" / f"{name}.json"


def _check(model: nn.Module, widths: Sequence[float], **sizes: int) -> None:
    for share in widths:
        if not 0 < share <= 1:
            raise InputError(f"widths: expected shares in (0, 1], got {share}")
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}: expected a positive number, got {size}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sizes["length"] > longest:
        raise InputError(f"length: expected at most the model's {longest} positions, got {sizes['length']}")


def _sweeps(chosen: Sequence[Site]) -> list[list[Site]]:
    """The sites that are cut at the same time: channels of the two kinds apart, then all."""
    units = dict.fromkeys(site.unit for site in chosen if site.is_channel)
    apart = [[site for site in chosen if site.unit == unit] for unit in units]
    return [*(apart if len(apart) > 1 else []), list(chosen)]


def _rows(
    chosen: Sequence[Site], groups: Mapping[str, list[str]], steps: Sequence[Step], samples: Sequence[list[Pair]]
) -> dict[str, Any]:
    """`total`, `sites`, `both` and `rest` of a table, from the pairs of passes at each step. groups: branches of one shape."""
    whole = [dense for sample in samples for dense, _ in sample]
    total = statistics.median(times.total for times in whole)
    full = {
        name: total * statistics.median(_sum(times, group) / times.total for times in whole) / len(group)
        for name, group in groups.items()
    }
    rest_of_whole = max(0.0, total - sum(full.values()))
    alone: dict[str, dict[int, float]] = {site.name: {} for site in chosen}
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
            row.update({counts[site.name]: full[name] * ratios[name], site.units: full[name]})
        if len(cut) == len(chosen):
            left = sum(full[name] * ratios[name] for name in full) / sum(full.values())
            between = statistics.median(_rest(b) / _rest(a) for a, b in sample)
            rest[min(left, 1.0)] = rest_of_whole * between
    rest[1.0] = rest_of_whole
    rows = {"sites": alone, "both": both}
    ascending = {key: {name: dict(sorted(row.items())) for name, row in found.items()} for key, found in rows.items()}
    return {"total": total, **ascending, "rest": dict(sorted(rest.items()))}


def _grid(some: Sequence[Site], shares: Sequence[float]) -> list[dict[str, int]]:
    """What the sites keep at each share, where that cuts any; a share of 0 stands for the fewest units that can stay."""
    found = []
    for share in shares:
        counts = {site.name: _count(site, share) for site in some}
        if counts not in found and any(counts[site.name] < site.units for site in some):
            found.append(counts)
    return found or [{site.name: site.units for site in some}]


def _count(site: Site, share: float) -> int:
    """Units at a share: neurons in multiples of 8, channels alike in each head."""
    step = 8 if site.unit == "neuron" else site.channel_groups
    return min(site.units, step * max(1, math.ceil(share * site.units / step - 1e-9)))


def _plan(model: nn.Module, some: Sequence[Site], counts: Mapping[str, int]) -> Plan:
    """Which units stay doesn't matter for time, but for heads: layers that keep the same ones may share a position bias."""
    kept = {}
    for site in some:
        heads = site.channel_groups
        size = site.units // heads
        first = torch.arange(counts[site.name] // heads) + (site.layer if site.is_head else 0)
        kept[site.name] = (first.sort().values % size + size * torch.arange(heads).unsqueeze(1)).flatten().sort().values
    return Plan(kept, tuple(some), fingerprint(model))


def _in_turn(model: nn.Module, pruned: nn.Module, batch: Mapping[str, Tensor], pairs: int, seconds: float) -> list[Pair]:
    """Pairs of passes, dense and pruned, the order swapped each time, after two to warm up."""
    found = []
    with stopwatch(model, batch) as dense, stopwatch(pruned, batch) as narrow:
        both = sum(each().total for each in (dense, narrow, dense, narrow)) / 2e3
        for turn in range(min(pairs, max(5, math.ceil(seconds / max(both, 1e-6))))):
            if turn % 2:
                second = narrow()
                found.append((dense(), second))
            else:
                first = dense()
                found.append((first, narrow()))
    return found


def _alike(model: nn.Module) -> dict[str, list[str]]:
    """For each branch the branches of its shape, which are measured as one: same kind, stack and sizes of its parameters. The
    first attention of a T5's stack holds the table of position biases."""
    by_shape: dict[Any, list[str]] = {}
    found = branches(model)
    for name, branch in found.items():
        by_shape.setdefault(_shape(model, branch), []).append(name)
    return {name: by_shape[_shape(model, branch)] for name, branch in found.items()}


def _shape(model: nn.Module, branch: Branch) -> Any:
    paths = sorted({*branch.linears, branch.path})
    sizes = [tuple(p.shape) for path in paths for p in model.get_submodule(path).parameters()]
    return branch.kind, branch.stack, tuple(sizes)


def _sum(times: Times, group: Sequence[str]) -> float:
    return sum(times.branches[name] for name in group)


def _rest(times: Times) -> float:
    return times.total - sum(times.branches.values())
