"""Cross-attention with few queries computes no keys and values and gives the same outputs. With many queries it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case, emptied_plan, uneven_plan
from torch import Tensor, nn
from undisturbed import state

import secateur
from secateur.model.branches import Attention
from secateur.model.families import branches
from secateur.model.faster_forward import faster_forward

ENCODER_DECODERS = [case for case in ALL if case.kind == "encoder-decoder"]
T5 = CASES["t5-gated"]
FEW, MANY = 2, 9


def cross_attentions(model: nn.Module) -> list[Attention]:
    return [branch for branch in branches(model).values() if isinstance(branch, Attention) and branch.kind == "cross_attention"]


def decoded(model: Any, tokens: int) -> Tensor:
    """Return the logits of that many decoder tokens for two inputs. The second input is padded."""
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 20, (2, 11), generator=draw), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    decoder_ids = torch.randint(3, 20, (2, tokens), generator=draw)
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
    logits: Tensor = output.logits
    return logits


@contextmanager
def called() -> Iterator[set[nn.Module]]:
    """Yield the set of modules whose forward runs within the context."""
    modules: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: modules.add(module))
    try:
        yield modules
    finally:
        handle.remove()


def assert_close(case: Case, actual: Tensor, expected: Tensor) -> None:
    # RMSNorm computes in float32, also in a float64 model.
    assert (actual - expected).abs().max() <= (1e-12 if case.exact else 1e-6) * expected.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ENCODER_DECODERS, ids=str)
def test_few_tokens_compute_no_keys_and_values(case: Case, attention: str) -> None:
    model: Any = case.model(torch.float64)
    model.set_attn_implementation(attention)
    cross = cross_attentions(model)
    keys_and_values = {model.get_submodule(path) for branch in cross for path in (branch.key, branch.value)}
    assert all(FEW <= branch.head_dim // 2 < MANY for branch in cross)
    for tokens in (FEW, MANY):
        expected = decoded(model, tokens)
        with faster_forward(model), called() as modules:
            logits = decoded(model, tokens)
        assert (keys_and_values & modules) == (keys_and_values if tokens == MANY else set())
        assert_close(case, logits, expected)


@pytest.mark.parametrize("make_plan", [uneven_plan, emptied_plan])
@pytest.mark.parametrize("case", ENCODER_DECODERS, ids=str)
def test_logits_of_pruned_models_are_the_same(case: Case, make_plan: Callable[[Case, str], secateur.Plan]) -> None:
    model = secateur.prune(case.model(torch.float64), make_plan(case, "head"))
    expected = decoded(model, FEW)
    with faster_forward(model):
        assert_close(case, decoded(model, FEW), expected)


@pytest.mark.parametrize("case", ENCODER_DECODERS, ids=str)
def test_gradients_are_the_same(case: Case) -> None:
    model = case.model(torch.float64)
    parameters = {
        f"{branch.path}.{name}": parameter
        for branch in cross_attentions(model)
        for name, parameter in model.get_submodule(branch.path).named_parameters()
    }

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad((decoded(model, FEW) ** 2).sum(), list(parameters.values()), materialize_grads=True))

    expected = gradients()
    with faster_forward(model):
        actual = gradients()
    for name, ours, theirs in zip(parameters, actual, expected, strict=True):
        # A key's bias shifts all attention scores equally, so its gradient is rounding error.
        scale = max(float(theirs.abs().max()), 1.0 if name.endswith("k_proj.bias") else 0.0)
        assert float((ours - theirs).abs().max()) <= (1e-10 if case.exact else 1e-5) * scale


def test_a_key_projection_with_a_hook_runs() -> None:
    model = T5.model(torch.float64)
    first, second = cross_attentions(model)
    model.get_submodule(first.key).register_forward_hook(lambda module, arguments, output: 3 * output)
    expected = decoded(model, FEW)
    with faster_forward(model), called() as modules:
        logits = decoded(model, FEW)
    assert model.get_submodule(first.key) in modules
    assert model.get_submodule(second.key) not in modules
    assert_close(T5, logits, expected)


@pytest.mark.parametrize("case", ENCODER_DECODERS, ids=str)
def test_generation_computes_keys_for_its_cache(case: Case) -> None:
    model: Any = case.model(torch.float64)
    ids = torch.full((1, 6), 5)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1)
    with faster_forward(model), called() as modules:
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1)
    assert {model.get_submodule(branch.key) for branch in cross_attentions(model)} <= modules
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("case", ENCODER_DECODERS, ids=str)
def test_the_model_is_as_before_after_faster_forward(case: Case) -> None:
    model = case.model()
    before, usual = state(model), {type(model.get_submodule(branch.path)) for branch in cross_attentions(model)}
    with faster_forward(model):
        assert {type(model.get_submodule(branch.path)) for branch in cross_attentions(model)} != usual
    assert state(model) == before
