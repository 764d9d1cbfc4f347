"""Latency budgets: a table's predictions compared with rebuilt models, and requested speed-ups compared with delivered ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import secateur
from bench.subjects.shapes import cases
from secateur import LatencyTable, Plan
from secateur.measuring.benchmark import benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint
from secateur.support.environment import environment

MODELS = ("builtin-t5", "minilm-shape", "llama-shape")
SPEEDUPS = (1.5, 2.0, 100.0)


def latency(models: tuple[str, ...] = MODELS, pairs: int = 15, seconds: float = 10.0) -> dict[str, Any]:
    """Measure uniform plans of random units on batches of 32 x 64 tokens with one thread.

    No plan reaches the last requested speed-up.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in models:
        model = cases()[name]().model
        start = time.perf_counter()
        table = secateur.latency_table(model, pairs=pairs, seconds=seconds, cache=False)
        row = {"name": name, "table_seconds": round(time.perf_counter() - start, 1), "dense_ms": round(table.total, 2)}
        row["branches_share"] = round(sum(max(r.items())[1] for r in table.sites.values()) / table.total, 4)
        row["predicted"] = [_predicted(model, table, keep, pairs, seconds) for keep in (0.875, 0.7, 0.5, 0.35, 0.2)]
        row["asked"] = [_delivered(model, table, speedup, pairs, seconds) for speedup in SPEEDUPS]
        rows.append(row)
        print(row, flush=True)
    return {"environment": environment(model), "load": os.getloadavg(), "pairs": pairs, "models": rows}


def _predicted(model: nn.Module, table: LatencyTable, keep: float, pairs: int, seconds: float) -> dict[str, Any]:
    """Compare the table's prediction for a uniform plan with the measured speed-up."""
    plan = _uniform(model, keep)
    milliseconds = table.milliseconds({site: len(kept) for site, kept in plan.items()})
    (batch,) = synthetic_batches(model, [table.batch_size], [table.length], target_length=table.target_length)
    timing = benchmark(model, secateur.prune(model, plan), [batch], pairs=pairs, seconds=seconds).timings[0]
    predicted = table.total / milliseconds
    return {
        "keep": keep, "predicted": round(predicted, 3), "measured": round(timing.speedup, 3),
        "quartiles": [round(timing.speedup_low, 3), round(timing.speedup_high, 3)],
        "by_flops": round(timing.flops_speedup, 3), "error": round(timing.speedup / predicted - 1, 3),
    }  # fmt: skip


def _delivered(model: nn.Module, table: LatencyTable, speedup: float, pairs: int, seconds: float) -> dict[str, Any]:
    """Return the speed-up that `meet_latency` delivers, or its error."""
    try:
        result = secateur.meet_latency(model, _maker(model, table), table, speedup=speedup, pairs=pairs, seconds=seconds)
    except secateur.InputError as error:
        return {"asked": speedup, "refused": str(error)}
    timing = result.timing
    quartiles = [round(timing.speedup_low, 3), round(timing.speedup_high, 3)]
    history = [[round(table.total / attempt.predicted, 3), round(attempt.timing.speedup, 3)] for attempt in result.history]
    return {"asked": speedup, "delivered": round(timing.speedup, 3), "quartiles": quartiles, "history": history}


def _maker(model: nn.Module, table: LatencyTable) -> Callable[[float], Plan]:
    """Return a function that gives the plan with the highest rate, in 256ths, that the table predicts to be fast enough."""

    def make(milliseconds: float) -> Plan:
        low, high = 0, 256
        while low < high:
            middle = (low + high + 1) // 2
            counts = {site: len(kept) for site, kept in _uniform(model, middle / 256).items()}
            low, high = (middle, high) if table.milliseconds(counts) <= milliseconds else (low, middle - 1)
        if not low:
            raise secateur.InputError(f"latency: expected at least the milliseconds of the smallest plan, got {milliseconds}")
        return _uniform(model, low / 256)

    return make


def _uniform(model: nn.Module, keep: float) -> Plan:
    """Return a plan that keeps the same share of random units at every site. Neurons are kept in multiples of 8."""
    generator, sites = torch.Generator().manual_seed(0), tuple(secateur.sites(model))
    kept = {}
    for site in sites:
        step = 8 if site.unit == "neuron" else 1
        count = min(site.units, step * max(1, round(keep * site.units / step)))
        kept[site.name] = torch.randperm(site.units, generator=generator)[:count].sort().values
    return Plan(kept, sites, fingerprint(model))
