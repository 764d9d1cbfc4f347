"""A context that leaves nothing behind on a model: modes, flags and parameters are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from secateur.model.families import split_token_rows
from secateur.support.compat import own_parameters


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, frozen parameters, activations by example; each module's mode and each parameter's flag are put back.

    So are the parameters themselves: Accelerate makes new ones at each pass of what it offloads, which are tied no more.
    """
    modes = {module: module.training for module in model.modules()}
    own = {module: dict(own_parameters(module)) for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = split_token_rows(model)
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
            own_parameters(module).update(own[module])
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
