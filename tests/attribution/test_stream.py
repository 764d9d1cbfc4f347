"""Integrated gradients replayed from the residual stream: which sites join it, which norms are recognised, equal scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case
from comparing import error
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import secateur
from secateur.attribution.integrated import replay
from secateur.attribution.integrated.replay import Leaf, Replay
from secateur.attribution.integrated.stream import CapturedNorm, norm_arguments, norms
from secateur.model.undisturbed import undisturbed

# For each site in order, the norm that reads its stream: "" for a post-norm, None if no module returns the stream.
JOINS: dict[str, list[str | None]] = {
    "t5-relu": [
        *(f"encoder.{name}" for name in ("block.0.layer.1.layer_norm", "block.1.layer.0.layer_norm")),
        *(f"encoder.{name}" for name in ("block.1.layer.1.layer_norm", "block.2.layer.0.layer_norm")),
        *(f"encoder.{name}" for name in ("block.2.layer.1.layer_norm", "final_layer_norm")),
        *(f"decoder.{name}" for name in ("block.0.layer.1.layer_norm", "block.0.layer.2.layer_norm")),
        *(f"decoder.{name}" for name in ("block.1.layer.0.layer_norm", "block.1.layer.1.layer_norm")),
        *(f"decoder.{name}" for name in ("block.1.layer.2.layer_norm", "final_layer_norm")),
    ],
    "bert-sequence": ["", "", "", ""],
    "llama": [None, "model.layers.1.input_layernorm", None, "model.norm"],
    "gemma3": [None, None, None, None],  # A norm lies between the branch and the stream.
}


def leaves(case: Case, model: nn.Module) -> list[Leaf]:
    """Return the leaves of all sites, in order."""
    (batch, *_) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 60)
    with undisturbed(model):
        captured = Replay(model, secateur.sites(model), lambda b: case.task.target(model, b, "probability"), batch)
    return [leaf for of_site in captured.leaves.values() for leaf in of_site]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", JOINS)
def test_which_sites_join_the_stream(name: str, dtype: torch.dtype) -> None:
    joins = [leaf.join for leaf in leaves(CASES[name], CASES[name].model(dtype))]
    assert [None if join is None else join.norm or "" for join in joins] == JOINS[name]


@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_same_scores_as_where_the_branch_is_replaced(case: Case, unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = secateur.IntegratedGradients(nodes=3)
    actual = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion, unit=unit)
    monkeypatch.setattr(replay, "joined", lambda output, above, captured: (None, output))
    expected = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion, unit=unit)
    assert error(actual, expected, expected) < 1e-4


@pytest.mark.parametrize("name", ["bert-sequence", "bart", "llama", "t5-gated"])
def test_scores_in_bfloat16_are_near_those_of_the_same_weights_in_float64(name: str) -> None:
    """A LayerNorm that is taken for an RMSNorm, which is within the rounding of bfloat16, gives errors of 17% to 57%."""
    case, criterion = CASES[name], secateur.IntegratedGradients(nodes=4)
    model = case.model(torch.bfloat16)
    actual = secateur.attribute(model, case.task, case.examples, criterion=criterion)
    expected = secateur.attribute(model.double(), case.task, case.examples, criterion=criterion)
    for site in expected:
        assert float((actual[site] - expected[site]).norm() / expected[site].norm()) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["torch's class", "another class"])
def test_a_layer_norm_of_a_stream_with_a_small_mean_is_no_rms_norm(own: bool, dtype: torch.dtype) -> None:
    class Own(nn.Module):
        """A LayerNorm whose class does not say so."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.eps = nn.LayerNorm(32), 1e-5
            self.weight, self.bias = self.inner.weight, self.inner.bias

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.inner(x)
            return normed

    module = (Own() if own else nn.LayerNorm(32)).to(dtype)
    x = torch.randn(1, 9, 32)
    x = (x - x.mean(-1, keepdim=True) + 0.02).to(dtype)  # The mean is 2% of the deviation.
    record = CapturedNorm("", module, x, module(x).detach())
    arguments = norm_arguments(record)
    assert arguments is not None
    assert arguments[0] == "layer_norm"


def run_norm(module: nn.Module, dtype: torch.dtype) -> CapturedNorm:
    """Run a norm with random parameters on random inputs, and return its record."""
    module = module.to(dtype)
    with torch.no_grad(), norms(nn.Sequential(module)) as records:
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
        module((3 * torch.randn(2, 5, 32) + 1).to(dtype))
    (norm,) = records
    return norm


KNOWN = [nn.LayerNorm(32, eps=1e-3), nn.LayerNorm(32, bias=False), LlamaRMSNorm(32), T5LayerNorm(32), Gemma3RMSNorm(32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", KNOWN, ids=lambda module: type(module).__name__)
def test_norms_are_recognised(module: nn.Module, dtype: torch.dtype) -> None:
    norm = run_norm(module, dtype)
    arguments = norm_arguments(norm)
    assert arguments is not None
    kind, eps, weight, bias = arguments
    assert kind == ("layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm")
    assert eps == getattr(module, "eps", getattr(module, "variance_epsilon", None))
    expected: Any = norm.module.weight
    assert torch.equal(weight, 1 + expected.float() if isinstance(module, Gemma3RMSNorm) else expected)
    assert bias is getattr(module, "bias", None)


class Softened(LlamaRMSNorm):  # type: ignore[misc]
    """A norm with a further function behind it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = super().forward(hidden_states)
        return torch.tanh(normed)


class Nameless(nn.Module):
    """A module with a weight that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("module", [Softened(32), Nameless()], ids=lambda module: type(module).__name__)
def test_other_modules_are_not_recognised_as_norms(module: nn.Module) -> None:
    assert norm_arguments(run_norm(module, torch.float32)) is None
