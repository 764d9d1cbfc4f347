"""The flow on a CUDA device gives the same scores, plans and equality of pruned and masked models as on the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import pytest
import torch
from cases import ALL, Case

import secateur
from secateur.attribution.criteria import Criterion
from secateur.model.sites import AttentionUnit

pytestmark = pytest.mark.gpu
without_images = pytest.mark.skipif(find_spec("PIL") is None, reason="needs Pillow")
CASES = [pytest.param(case, marks=without_images if case.name == "vit" else (), id=case.name) for case in ALL]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_the_flow_on_cuda_equals_the_flow_on_the_cpu(case: Case, unit: AttentionUnit) -> None:
    model = case.model()
    expected = secateur.attribute(model, case.task, case.examples, unit=unit)
    model.to("cuda")
    scores = secateur.attribute(model, case.task, case.examples, unit=unit)
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-6)
    plan = secateur.plan(scores, keep=0.5)
    pruned = secateur.prune(model, plan)
    items = case.task.items(model, case.examples)
    batches = list(case.task.batches(items, torch.device("cuda"), 60))
    assert secateur.verify(model, pruned, plan, case.task, batches).holds
    secateur.evaluate(pruned, case.task, case.examples)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["layer", "joint"])
def test_integrated_gradients_on_cuda_equal_those_on_the_cpu(case: Case, path: Literal["layer", "joint"]) -> None:
    model, criterion = case.model(), secateur.IntegratedGradients(path=path, nodes=4)
    expected = secateur.attribute(model, case.task, case.examples, criterion=criterion, unit="channel")
    model.to("cuda")
    scores = secateur.attribute(model, case.task, case.examples, criterion=criterion, unit="channel")
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-6)
    auto = secateur.attribute(model, case.task, case.examples, criterion=secateur.IntegratedGradients(path=path))
    assert auto.convergence is not None
    assert not any(residuals.is_cuda for residuals in auto.convergence.residuals.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("criterion", [secateur.GradientActivation(), secateur.IntegratedGradients(nodes=2)], ids=str)
def test_triton_equals_the_reference_end_to_end(case: Case, criterion: Criterion) -> None:
    model = case.model().to("cuda")
    triton, again, reference = (
        secateur.attribute(model, case.task, case.examples, criterion=criterion, unit="channel", backend=backend)
        for backend in ("triton", "triton", "reference")
    )
    assert triton.equal(again)
    for name in reference:
        torch.testing.assert_close(triton[name], reference[name], rtol=1e-3, atol=1e-6)
