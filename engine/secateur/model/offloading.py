"""Models that do not fit on one device: spread over several devices by Accelerate (device_map), or offloaded from them.

Accelerate loads an offloaded weight for its module's own forward pass. Otherwise the module has an empty weight on the meta
device.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.model.linear_layers import flat_names, weight_of
from secateur.support.compat import drop_accelerate_moves_, has_accelerate_hook
from secateur.support.errors import InputError

_SAMPLED = 64


def read_weight(module: nn.Module) -> Tensor:
    """Return a linear layer's weight [outputs, inputs], detached. Of an offloaded weight it is a copy on the layer's device."""
    with _in_place(module):
        return weight_of(module).detach()


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return `copy.deepcopy` of a model, which may be dispatched. `memo`: what is not copied, as in `copy.deepcopy`."""
    copied = copy.deepcopy(model, memo)
    drop_accelerate_moves_(copied)
    return copied


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return all parameters, tied ones once, also where Accelerate's hooks have given each module its own parameter."""
    tied = getattr(model, "all_tied_weights_keys", {}) if has_accelerate_hook(model) else {}
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in tied)


def values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters with their values, module by module, tied ones as often as they occur."""
    for path, module in model.named_modules():
        with _in_place(module):
            for name, parameter in module.named_parameters(path, recurse=False):
                yield name, parameter.detach()


def weights_digest(model: nn.Module) -> str:
    """Return a short hash of the parameters' names, shapes, dtypes and a sample of the values of each."""
    digest, flat = hashlib.sha256(), flat_names(model)
    for name, parameter in values(model):
        sample = parameter.flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        about = f"{flat.get(name, name)} {tuple(parameter.shape)} {parameter.dtype}"
        digest.update(about.encode() + sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_values(model: nn.Module, name: str = "model") -> None:
    """Refuse a model with weights or buffers that have no values: on the meta device, and not there by Accelerate.

    Args:
        model: The model.
        name: The name of the argument, for the message.

    Raises:
        InputError: There is one. The message names the first and says what to do.
    """
    filled: tuple[str, ...] = ()  # Accelerate's hook on a module may load the weights of all modules in it.
    for path, module in model.named_modules():
        if has_accelerate_hook(module):
            filled += (f"{path}." if path else "",)
        for where, tensor in (*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)):
            if tensor.is_meta and not where.startswith(filled):
                raise InputError(
                    f"{name}: expected weights that have values, got {where!r} on the meta device: load the model by "
                    "from_pretrained, outside torch.device('meta'), or give the tensor its values (load_state_dict)"
                )


def require_one_device(model: nn.Module, criterion: str) -> None:
    """Raise InputError unless all weights are on one device, as a criterion that computes between modules needs."""
    places = sorted({"offloaded" if p.device.type == "meta" else str(p.device) for p in model.parameters()})
    if places != ["offloaded"] and len(places) == 1:
        return
    raise InputError(
        f"criterion: expected a model on one device for {criterion}, got one whose weights are: {', '.join(places)}; "
        "all criteria but ig and ig-joint take it"
    )


@contextmanager
def _in_place(module: nn.Module) -> Iterator[None]:
    """A context in which an offloaded module holds its weights. Raises InputError for a module without values."""
    with ExitStack() as stack:
        if _empty(module) and has_accelerate_hook(module):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(module))
        if _empty(module):
            raise InputError(f"model: expected weights that have values, got a {type(module).__name__} on the meta device")
        yield


def _empty(module: nn.Module) -> bool:
    """Return whether a module's own parameters are on the meta device."""
    return any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
