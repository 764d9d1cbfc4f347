"""Time attribution of all sites in turn with the bare forward and backward pass to the inputs and with a Taylor pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.subjects import shapes
from bench.subjects.shapes import Case, bare
from bench.support.interleaved import compare
from secateur.attribution.criteria import GradientActivation, ScoringContext
from secateur.model.discovery import sites
from secateur.model.undisturbed import undisturbed


def taylor(case: Case) -> dict[str, Tensor]:
    """Compute weight-based Taylor importance: the gradients of all parameters, then |sum of w * dw| of each output row."""
    case.model.zero_grad(set_to_none=True)
    case.task.target(case.model, case.batch, "log_probability").sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: (parameter.detach() * parameter.grad).flatten(1).sum(1).abs()
        for name, parameter in case.model.named_parameters()
        if parameter.grad is not None and parameter.dim() == 2
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


@pytest.mark.parametrize("name", shapes.cases())
def bench_attribution(name: str, benchmark: Any) -> None:
    """Time the passes of one case."""
    torch.set_num_threads(1)
    functions = passes(shapes.cases()[name]())
    benchmark.group = "attribution"
    benchmark.extra_info.update(compare(functions), model=name, threads=torch.get_num_threads(), batch=[32, 64])
    benchmark.pedantic(functions["attribution"], rounds=5, warmup_rounds=1)
