"""Models that one device does not hold: spread over several by Accelerate (device_map), or offloaded from them.

Accelerate puts an offloaded weight in place for its module's own forward pass; otherwise the module has an empty one ("meta").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from secateur.model.linear_layers import weight_of
from secateur.support.compat import has_accelerate_hook
from secateur.support.errors import InputError

_SAMPLED = 64


def read_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight [outputs, inputs], detached; where it is offloaded, a copy where the layer runs."""
    with _in_place(module):
        return weight_of(module).detach()


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters, tied ones once, also where Accelerate's hooks have given each module its own."""
    tied = getattr(model, "all_tied_weights_keys", {}) if has_accelerate_hook(model) else {}
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in tied)


def values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters with their values, one module's at a time, tied ones as often as they occur."""
    for path, module in model.named_modules():
        with _in_place(module):
            for name, parameter in module.named_parameters(path, recurse=False):
                yield name, parameter.detach()


def weights_digest(model: nn.Module) -> str:
    """A short hash of the parameters' names, shapes, dtypes and a sample of the values of each: other weights have another."""
    found = hashlib.sha256()
    for name, parameter in values(model):
        sample = parameter.flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def require_one_device(model: nn.Module, criterion: str) -> None:
    """Raises InputError for a criterion that computes between modules, where the model's weights are not all on one device."""
    places = sorted({"offloaded" if p.device.type == "meta" else str(p.device) for p in model.parameters()})
    if places != ["offloaded"] and len(places) == 1:
        return
    raise InputError(
        f"criterion: expected a model on one device for {criterion}, got one whose weights are: {', '.join(places)}; "
        "all criteria but ig and ig-joint take it"
    )


@contextmanager
def _in_place(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        if _empty(module) and has_accelerate_hook(module):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(module))
        if _empty(module):
            raise InputError(f"model: expected weights that have values, got a {type(module).__name__} on the meta device")
        yield


def _empty(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
