"""Within `faster_forward` a model gives the same outputs in fewer operations. Afterwards the model is as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case, emptied_plan, uneven_plan
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention
from undisturbed import state

import secateur
from secateur.model.families import t5
from secateur.model.faster_forward import faster_forward

T5 = CASES["t5-gated"]
SPELT_OUT = ("t5-gated", "mt5", "gpt2")


def first_attention(model: Any) -> Any:
    return model.encoder.block[0].layer[0].SelfAttention


def spelt_out(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute GELU in several operations."""
    return [module for module in model.modules() if isinstance(module, NewGELUActivation)]


def assert_the_same(case: Case, model: nn.Module) -> None:
    """Compare the logits with and without `faster_forward`."""
    expected = case.logits(model)
    with faster_forward(model):
        assert not spelt_out(model)
        actual = case.logits(model)
    # RMSNorm computes in float32, also in a float64 model.
    assert float((actual - expected).abs().max()) <= (1e-12 if case.exact else 1e-6) * float(expected.abs().max())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_outputs_are_the_same(case: Case) -> None:
    model = case.model(torch.float64)
    assert_the_same(case, model)
    assert bool(spelt_out(model)) == (case.name in SPELT_OUT)


@pytest.mark.parametrize("make_plan", [uneven_plan, emptied_plan])
@pytest.mark.parametrize("name", ["t5-gated", "t5-relu", "mt5"])
def test_the_outputs_of_pruned_models_are_the_same(name: str, make_plan: Callable[[Case, str], secateur.Plan]) -> None:
    case = CASES[name]
    assert_the_same(case, secateur.prune(case.model(torch.float64), make_plan(case, "head")))


@pytest.mark.parametrize("length", [1, 2, 7, 128, 129, 300])
def test_the_position_bias_by_distance_equals_the_bias_by_pair(length: int) -> None:
    model = T5.model()
    attention = first_attention(model)
    with torch.no_grad():
        expected = attention.compute_bias(length, length)
        with faster_forward(model):
            by_distance = attention.compute_bias(length, length)
    assert torch.equal(by_distance, expected)


def test_buckets_are_not_computed_anew_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = T5.model()
    dimensions: list[int] = []
    original = T5Attention._relative_position_bucket

    def bucket(distance: Tensor, **options: Any) -> Any:
        dimensions.append(distance.dim())
        return original(distance, **options)

    monkeypatch.setattr(T5Attention, "_relative_position_bucket", staticmethod(bucket))
    encoder: Any = model.get_submodule("encoder")
    ids = torch.ones(1, 9, dtype=torch.int64)
    encoder(input_ids=ids)
    assert dimensions == [2]
    with faster_forward(model):
        dimensions.clear()
        encoder(input_ids=ids)
        assert dimensions == []


def test_gradients_flow_after_a_pass_in_inference_mode() -> None:
    model = T5.model()
    encoder: Any = model.get_submodule("encoder")
    ids = torch.ones(1, 9, dtype=torch.int64)
    t5._encoder_buckets.cache_clear()
    with faster_forward(model):
        with torch.inference_mode():
            expected = encoder(input_ids=ids).last_hidden_state
        states = encoder(input_ids=ids).last_hidden_state
        assert torch.allclose(states, expected, rtol=1e-4, atol=1e-5)
        (states**2).sum().backward()
    assert first_attention(model).relative_attention_bias.weight.grad.abs().max() > 0


def raise_within(model: nn.Module, before: dict[str, Any]) -> None:
    """Raise an error within `faster_forward`, after a check that the model's state has changed."""
    with faster_forward(model):
        assert state(model) != before
        raise RuntimeError("inside")


@pytest.mark.parametrize("name", SPELT_OUT)
def test_the_model_is_as_before_after_an_error_and_after_overlapping_contexts(name: str) -> None:
    model = CASES[name].model()
    before = state(model)
    with pytest.raises(RuntimeError, match="inside"):
        raise_within(model, before)
    assert state(model) == before
    # Two contexts overlap. The context that starts first also ends first.
    first, second = faster_forward(model), faster_forward(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not spelt_out(model)
    second.__exit__(None, None, None)
    assert state(model) == before


def test_an_activation_with_a_hook_is_not_replaced() -> None:
    model = T5.model(torch.float64)
    hooked, *others = spelt_out(model)
    hooked.register_forward_hook(lambda module, arguments, output: 0 * output)
    expected = T5.logits(model)
    with faster_forward(model):
        assert spelt_out(model) == [hooked]
        assert torch.allclose(T5.logits(model), expected, rtol=1e-5, atol=1e-6)
    assert spelt_out(model) == [hooked, *others]


def test_activations_of_an_unknown_family_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(3, 3), NewGELUActivation())
    values = torch.linspace(-4, 4, 12).view(4, 3)
    with faster_forward(model):
        actual = model(values)
        assert not spelt_out(model)
    assert torch.allclose(actual, model(values), atol=1e-6)
