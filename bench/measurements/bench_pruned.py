"""The pruned model's speed-up over the one that counted FLOPs allow, at keep = 0.5 of every site, batch 32 x 64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur
from bench.subjects import shapes
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint, sites
from secateur.planning.plan import Plan


@pytest.mark.parametrize("name", shapes.cases())
def bench_pruned(name: str, benchmark: Any) -> None:
    """Time the pruned and the dense model of one case."""
    torch.set_num_threads(1)
    model = shapes.cases()[name]().model
    all_sites = tuple(sites(model))
    # The choice of the units does not change the speed, so every second unit stays.
    kept = {site.name: torch.arange(0, site.units, 2) for site in all_sites}
    plan = Plan(kept, all_sites, fingerprint(model), secateur.Budget("keep", 0.5))
    pruned = secateur.prune(model, plan)
    (batch,) = synthetic_batches(model, [32], [64])
    report = secateur.benchmark(model, pruned, [batch], pairs=15, seconds=60)
    (timing,) = report.timings
    benchmark.group = "pruned"
    benchmark.extra_info.update(report.to_json(), model=name, of_flops_allowed=timing.speedup / timing.flops_speedup)
    with torch.inference_mode():
        benchmark.pedantic(lambda: pruned(**batch), rounds=5, warmup_rounds=1)
