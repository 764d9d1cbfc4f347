"""A model in the state that a training script may leave it in, and a check that a call does not change that state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def lived_in(case: Case) -> nn.Module:
    """A model as a training script may leave it: with mixed modes, flags and gradients, and with hooks of the user."""
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
    """All state that a call could disturb. Parameters and gradients stand by identity; `values` has their values."""
    return {
        "hooks": {(n, kind): dict(getattr(m, kind)) for n, m in model.named_modules() for kind in HOOKS},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "forwards": {n: vars(m).get("forward") for n, m in model.named_modules()},
        "modules": {n: (type(m), id(m)) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "gradients": {n: id(p.grad) if p.grad is not None else None for n, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    return tensors | {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_undisturbed(model: nn.Module, call: Callable[[], Any]) -> None:
    before, tensors = state(model), values(model)
    call()
    after = state(model)
    for what in before:
        assert after[what] == before[what], what
    for name, tensor in values(model).items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0)), name
