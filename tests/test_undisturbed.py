"""Contract 5: nothing is left behind on the caller's model, also after an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ALL, CASES, Case, uniform_plan
from torch import Tensor, nn

import secateur
from secateur.gates import masked

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def lived_in(case: Case) -> nn.Module:
    """A model as a training script might hold it: modes, flags and gradients mixed, with the user's own hooks."""
    model = case.model()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
        if number % 5 == 0:
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 4 == 0:
            parameter.grad = torch.randn_like(parameter)
    return model


def state(model: Any) -> dict[str, Any]:
    """All that a call could disturb. Gradients and parameters by identity and value."""
    return {
        "hooks": {(n, kind): dict(getattr(m, kind)) for n, m in model.named_modules() for kind in HOOKS},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "modules": {n: (type(m), id(m)) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "gradients": {n: id(p.grad) if p.grad is not None else None for n, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {n: t.clone() for n, t in model.state_dict().items()}
    return found | {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_undisturbed(model: nn.Module, call: Callable[[], Any]) -> None:
    before, tensors = state(model), values(model)
    call()
    after = state(model)
    for what in before:
        assert after[what] == before[what], what
    for name, tensor in values(model).items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0)), name


def calls(case: Case, model: nn.Module) -> dict[str, Callable[[], Any]]:
    plan = uniform_plan(case, "head")

    def run_masked() -> None:
        with masked(model, plan):
            case.logits(model)

    def run_verify() -> None:
        secateur.verify(model, secateur.prune(case.model(), plan), plan, case.task, case.batches(model))

    return {
        "attribute": lambda: secateur.attribute(model, case.task, case.examples, unit="channel"),
        "evaluate": lambda: secateur.evaluate(model, case.task, case.examples),
        "verify": run_verify,
        "masked": run_masked,
        "prune": lambda: secateur.prune(model, plan),
        "sites": lambda: secateur.sites(model),
    }


VERBS = ["attribute", "evaluate", "verify", "masked", "prune", "sites"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_undisturbed(case: Case, verb: str) -> None:
    model = lived_in(case)
    assert_undisturbed(model, calls(case, model)[verb])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_verify_leaves_the_pruned_model_undisturbed(case: Case) -> None:
    model, plan = case.model(), uniform_plan(case, "head")
    pruned = secateur.prune(lived_in(case), plan)
    assert_undisturbed(pruned, lambda: secateur.verify(model, pruned, plan, case.task, case.batches(model)))


@pytest.mark.parametrize("verb", ["attribute", "evaluate", "verify", "masked"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_undisturbed_when_the_forward_raises(case: Case, verb: str) -> None:
    model = lived_in(case)
    raised = 0

    def fail(*arguments: Any, **options: Any) -> None:
        nonlocal raised
        raised += 1
        raise RuntimeError("the device went away")

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
    last.forward = fail  # type: ignore[method-assign]

    def call() -> None:
        with pytest.raises(RuntimeError, match="the device went away"):
            calls(case, model)[verb]()

    assert_undisturbed(model, call)
    assert raised > 0


def test_undisturbed_when_the_backward_raises(t5_case: Case) -> None:
    model = lived_in(t5_case)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("out of memory in the backward pass")

    model.register_forward_hook(lambda module, arguments, output: output.logits.register_hook(fail) and None)

    def call() -> None:
        with pytest.raises(RuntimeError, match="out of memory in the backward pass"):
            secateur.attribute(model, t5_case.task, t5_case.examples)

    assert_undisturbed(model, call)


@pytest.mark.parametrize("verb", ["attribute", "evaluate"])
def test_undisturbed_when_stopped_from_the_keyboard(t5_case: Case, verb: str) -> None:
    model = lived_in(t5_case)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("decoder.block.1").register_forward_hook(stop)

    def call() -> None:
        with pytest.raises(KeyboardInterrupt):
            calls(t5_case, model)[verb]()

    assert_undisturbed(model, call)
    handle.remove()


@pytest.mark.parametrize(
    ("name", "path", "site"),
    [
        ("t5-gated", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "'encoder.1.ffn'"),
        ("t5-relu", "decoder.block.0.layer.1.EncDecAttention.v.weight", "'decoder.0.cross_attention'"),
        # A branch without units of its own that is not finite shows at the next site.
        ("t5-relu", "encoder.block.2.layer.0.layer_norm.weight", "'encoder.2.self_attention'"),
        ("llama", "model.layers.1.self_attn.q_proj.weight", "'decoder.1.self_attention'"),
        ("bert-sequence", "bert.encoder.layer.0.output.dense.weight", "'encoder.1.self_attention'"),
        ("bert-sequence", "classifier.weight", "all sites' activations are"),
    ],
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_undisturbed_after_a_value_that_is_not_finite_and_the_site_is_named(
    name: str, path: str, site: str, broken: float
) -> None:
    case = CASES[name]
    model = lived_in(case)
    with torch.no_grad():
        model.get_parameter(path).fill_(broken)

    def call() -> None:
        with pytest.raises(secateur.InputError, match=rf"^model: .*{site}"):
            secateur.attribute(model, case.task, case.examples)

    assert_undisturbed(model, call)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_masks_end_with_their_context(case: Case) -> None:
    model, plan = case.model(), uniform_plan(case, "head")
    dense = case.logits(model)
    with masked(model, plan):
        assert not torch.allclose(case.logits(model), dense, rtol=1e-3)
    assert torch.equal(case.logits(model), dense)
