"""Attribution of all sites against the bare forward and backward to the inputs, and against a Taylor pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.subjects import shapes as models
from bench.subjects.shapes import Case, bare
from bench.support.interleaved import compare
from secateur.attribution.criteria import GradientActivation, ScoringContext
from secateur.model.discovery import sites
from secateur.model.undisturbed import undisturbed


def taylor(case: Case) -> dict[str, Tensor]:
    """What weight-based Taylor importance does: gradients of all parameters, then |sum of w * dw| for each output row."""
    case.model.zero_grad(set_to_none=True)
    case.task.target(case.model, case.batch, "log_probability").sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: (p.detach() * p.grad).flatten(1).sum(1).abs()
        for name, p in case.model.named_parameters()
        if p.grad is not None and p.dim() == 2
    }


def passes(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the functions that are timed in turn: attribution, the bare passes and the Taylor pass."""
    chosen = sites(case.model)
    context = ScoringContext(case.model, case.task, chosen, max_tokens=4096, pilot=case.batch, examples=len(case.batch.rows))
    scorer = GradientActivation().scorer(context)

    def attribution() -> None:
        with undisturbed(case.model):
            assert len(scorer.scores(case.batch)) == len(chosen)

    return {"attribution": attribution, "bare": lambda: bare(case), "taylor": lambda: taylor(case)}


@pytest.mark.parametrize("name", models.cases())
def bench_attribution(name: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    functions = passes(models.cases()[name]())
    benchmark.group = "attribution"
    benchmark.extra_info.update(compare(functions), model=name, threads=torch.get_num_threads(), batch=[32, 64])
    benchmark.pedantic(functions["attribution"], rounds=5, warmup_rounds=1)
