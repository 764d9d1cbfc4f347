"""Fused feed-forward branches: their scores equal those of watched branches, and branches that cannot be fused are watched."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case
from comparing import error
from torch import Tensor, nn
from transformers.activations import ACT2FN

import secateur
from secateur import GradientActivation, IntegratedGradients
from secateur.attribution import fused_ffn as fused
from secateur.attribution.fused_ffn import activation_of
from secateur.attribution.integrated import stream
from secateur.model.discovery import branches_of
from secateur_kernels.backend import INTERPRETED
from secateur_kernels.interpolated_norm import interpolated_norm
from secateur_kernels.scored_mlp_backward import scored_mlp_backward
from secateur_kernels.scored_mlp_backward.reference import ACTIVATIONS

FAMILIES = [CASES[name] for name in ("t5-relu", "t5-gated", "bert-sequence", "llama")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation functions of the kernel's calls. Branches are fused here although Triton does not run."""
    activations: list[str] = []
    kernel = scored_mlp_backward

    def count(*tensors: Any, activation: Any, **options: Any) -> Any:
        activations.append(activation)
        return kernel(*tensors, activation=activation, **options)

    monkeypatch.setattr(fused, "scored_mlp_backward", count)
    if not INTERPRETED:
        monkeypatch.setattr(fused, "uses_triton", lambda backend, tensor: True)
    return activations


def feed_forwards(model: nn.Module) -> int:
    return len(secateur.sites(model, select="ffn"))


@pytest.mark.skipif(INTERPRETED, reason="float64 runs on the reference alone")
@pytest.mark.parametrize("select", [None, "ffn.0"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_fused_branches_have_the_scores_of_watched_ones(case: Case, select: str | None, calls: list[str]) -> None:
    """Scores of all sites, and of a selection whose lowest branch starts the graph itself."""
    model = case.model(torch.float64)
    actual = secateur.attribute(model, case.task, case.examples, select=select)
    assert len(calls) >= len([site for site in actual.sites if site.unit == "neuron"])
    assert len(set(calls)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "uses_triton", lambda backend, tensor: False)
        watched = secateur.attribute(model, case.task, case.examples, select=select)
    assert error(actual, watched, watched) < (1e-10 if case.exact else 1e-6)
    assert actual.sites == watched.sites


@pytest.mark.skipif(INTERPRETED, reason="float64 runs on the reference alone")
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_joint_path_scores_fused_branches_at_gates_below_one(case: Case, calls: list[str]) -> None:
    model, criterion = case.model(torch.float64), replace(IntegratedGradients.joint(), nodes=3)
    actual = secateur.attribute(model, case.task, case.examples, criterion=criterion)
    assert len(calls) >= len([site for site in actual.sites if site.unit == "neuron"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "uses_triton", lambda backend, tensor: False)
        watched = secateur.attribute(model, case.task, case.examples, criterion=criterion)
    assert error(actual, watched, watched) < (1e-10 if case.exact else 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="does not run the kernels")
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_a_branch_that_the_kernel_cannot_compute_is_watched(case: Case, calls: list[str]) -> None:
    class Other(nn.Linear):
        """A subclass of nn.Linear, as adapters and quantised layers are."""

    model = case.model()
    plain = secateur.attribute(model, case.task, case.examples)
    assert calls
    calls.clear()
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Other
    actual = secateur.attribute(changed, case.task, case.examples)
    assert calls == []
    assert error(actual, plain, plain) < 1e-4


@pytest.mark.skipif(INTERPRETED, reason="does not run the kernels")
def test_no_hook_stays_on_the_model(calls: list[str]) -> None:
    case = CASES["t5-gated"]
    model = case.model()
    secateur.attribute(model, case.task, case.examples)
    assert calls
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter")
@pytest.mark.parametrize("criterion", [GradientActivation(), IntegratedGradients(nodes=2)], ids=["gradient", "ig"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_triton_equals_the_reference_end_to_end(
    case: Case, criterion: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[int] = []

    def count(*arguments: Any, **options: Any) -> Any:
        streams.append(1)
        return interpolated_norm(*arguments, **options)

    monkeypatch.setattr(stream, "interpolated_norm", count)
    model, examples = case.model(), case.examples[:2]
    actual = secateur.attribute(model, case.task, examples, criterion=criterion, backend="triton")
    assert bool(calls) == isinstance(criterion, GradientActivation)
    assert bool(streams) == isinstance(criterion, IntegratedGradients)
    calls.clear()
    expected = secateur.attribute(model, case.task, examples, criterion=criterion, backend="reference")
    assert calls == []
    assert error(actual, expected, expected) < 1e-4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_recognised(name: Any, dtype: torch.dtype, gated: bool) -> None:
    pre, up = 2 * torch.randn(1, 9, 37).to(dtype), torch.randn(1, 9, 37).to(dtype)
    hidden: Tensor = ACTIVATIONS[name][0](pre)
    assert activation_of(hidden * up if gated else hidden, pre, up if gated else None) == name


@pytest.mark.parametrize("function", [torch.tanh, lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.relu(x) ** 2])
def test_other_activations_are_not_recognised(function: Any) -> None:
    pre = 2 * torch.randn(1, 9, 37)
    assert activation_of(function(pre), pre) is None


# Functions that differ from a known one by a few hundredths of its largest value, and from which one.
NEARLY: dict[str, Any] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": nn.functional.mish,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu, 1% steeper": lambda x: nn.functional.gelu(1.01 * x) / 1.01,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEARLY)
def test_nearly_known_activations_are_not_recognised_in_half_precision(
    name: str, dtype: torch.dtype, spread: float, gated: bool
) -> None:
    pre, up = (spread * torch.randn(1, 64, 256)).to(dtype), torch.randn(1, 64, 256).to(dtype)
    hidden = NEARLY[name](pre.float()).to(dtype)
    assert activation_of(hidden * up if gated else hidden, pre, up if gated else None) is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*ACTIVATIONS, "swish", "gelu_pytorch_tanh"])
def test_the_activations_of_transformers_are_recognised(name: str, dtype: torch.dtype, gated: bool) -> None:
    """Transformers computes gelu_new step by step, with a rounding error in each step."""
    known = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}.get(name, name)
    for spread in (0.02, 0.3, 2.0, 20.0):
        pre, up = (spread * torch.randn(1, 32, 64)).to(dtype), torch.randn(1, 32, 64).to(dtype)
        hidden = ACT2FN[name](pre)
        found = activation_of(hidden * up if gated else hidden, pre, up if gated else None)
        # gelu and gelu_new are the same function near 0, up to rounding.
        assert found == known or (spread < 0.1 and {found, known} == {"gelu", "gelu_new"})


@pytest.mark.skipif(INTERPRETED, reason="does not run the kernels")
@pytest.mark.parametrize("name", ["bert-sequence", "llama", "gpt2", "bart"])
def test_scores_under_autocast_are_those_of_plain_autograd(name: str, calls: list[str]) -> None:
    """Fused branches, against gradients of the out-projections' inputs under the same autocast."""
    case, signed = CASES[name], GradientActivation(over_examples="signed")
    model = case.model().requires_grad_(False)
    branches = branches_of(model, secateur.sites(model, select="ffn"))
    outputs = {site.name: model.get_submodule(branch.output) for site, branch in branches.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = secateur.attribute(model, case.task, case.examples, criterion=signed, per_example=True).per_example
        assert actual is not None
        assert len(calls) >= len(outputs)
        for item in case.task.items(model, case.examples):
            batch = case.task.collate([item], torch.device("cpu"))
            for site, expected in plain_scores(outputs, lambda: case.task.target(model, batch, "log_probability")).items():  # noqa: B023
                assert float((actual[site][item.row] - expected).norm() / expected.norm()) < 0.05


def plain_scores(outputs: dict[str, nn.Module], target: Any) -> dict[str, Tensor]:
    """Return the sum over tokens of h * dF/dh [units] of each out-projection's input h, by autograd alone."""
    hidden: dict[str, Tensor] = {}

    def keep(site: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden[site] = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
        return (hidden[site], *arguments[1:])

    with ExitStack() as stack:
        for site, module in outputs.items():
            stack.callback(module.register_forward_pre_hook(partial(keep, site)).remove)
        value = target().sum()
    gradients = torch.autograd.grad(value, list(hidden.values()))
    pairs = zip(hidden.items(), gradients, strict=True)
    return {site: (h.detach().double() * gradient.double()).sum((0, 1)) for (site, h), gradient in pairs}


@pytest.mark.parametrize("criterion", [GradientActivation(), IntegratedGradients(nodes=4), "ig-joint:nodes=4"], ids=str)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_autocast_changes_scores_by_its_rounding_alone(case: Case, criterion: Any) -> None:
    model = case.model()
    expected = secateur.attribute(model, case.task, case.examples, criterion=criterion)
    with torch.autocast("cpu", torch.bfloat16):
        actual = secateur.attribute(model, case.task, case.examples, criterion=criterion)
    for name in expected:
        assert float((actual[name] - expected[name]).norm() / expected[name].norm()) < 0.05


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton runs here")
def test_triton_is_refused_where_it_cannot_run(t5_case: Case) -> None:
    with pytest.raises(secateur.InputError, match=r"^backend: expected "):
        secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, backend="triton")
    with pytest.raises(secateur.InputError, match=r"^backend: expected one of 'auto', 'reference', 'triton', got 'cuda'"):
        secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, backend="cuda")  # type: ignore[arg-type]
