"""The pruned model's speed-up against what the counted FLOPs allow, at keep = 0.5 of every site, batch 32 x 64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur
from bench.subjects import shapes as models
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint, sites
from secateur.planning.plan import Plan


@pytest.mark.parametrize("name", models.cases())
def bench_pruned(name: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    model = models.cases()[name]().model
    found = tuple(sites(model))
    # Which units stay makes no difference to speed: every other one does.
    plan = Plan(
        {site.name: torch.arange(0, site.units, 2) for site in found}, found, fingerprint(model), secateur.Budget("keep", 0.5)
    )
    pruned = secateur.prune(model, plan)
    (batch,) = synthetic_batches(model, [32], [64])
    report = secateur.benchmark(model, pruned, [batch], pairs=15, seconds=60)
    (timing,) = report.timings
    benchmark.group = "pruned"
    benchmark.extra_info.update(report.to_json(), model=name, of_flops_allowed=timing.speedup / timing.flops_speedup)
    with torch.inference_mode():
        benchmark.pedantic(lambda: pruned(**batch), rounds=5, warmup_rounds=1)
