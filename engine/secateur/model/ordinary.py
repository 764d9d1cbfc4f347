"""Refuse models whose forward pass does something that their linear layers and their config do not say.

Evaluation and bulk scoring only run the forward pass, so they take all models. Attribution, pruning and recovery read or
replace linear layers, so they take ordinary models alone. A folder holds weights and a config, so saving is stricter still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from secateur.support.compat import (
    accelerate_wraps_forward,
    compiled_from,
    forward_hooks,
    has_accelerate_hook,
    is_compiled,
    is_compiled_in_place,
    move_hooks,
)
from secateur.support.errors import InputError, reading
from secateur.support.fields import shown

# Packages whose hooks are on the model for a while, or are put there again on a loaded model.
_OWN = ("secateur", "transformers", "accelerate")
_ADAPTERS = ("peft", "adapters", "loralib")
_QUANTISERS = (
    *("torch.ao", "torchao", "bitsandbytes", "transformers.integrations"),
    *("optimum.quanto", "hqq", "gptqmodel", "auto_gptq", "awq"),
)


def require_model(model: Any) -> None:
    """Check that an argument is a loaded model.

    Raises:
        InputError: It is something else. For the name of a folder, the message says how to load it.
    """
    if isinstance(model, nn.Module):
        return
    load = "AutoModelFor....from_pretrained({0}) of transformers loads a dense one, secateur.load({0}) a pruned folder"
    remedy = f"; {load.format(repr(str(model)))}" if isinstance(model, (str, PathLike)) else ""
    raise InputError(f"model: expected a loaded model, got {shown(model)}{remedy}")


def require_ordinary(model: nn.Module) -> None:
    """Refuse a model whose linear layers are not what computes its outputs.

    Args:
        model: The model. Hooks are allowed: they act on the pruned model too.

    Raises:
        InputError: The model is compiled, has adapters, masks, parametrizations, quantised or other special weights, or its
            weights were made inside torch.inference_mode(); or as in `require_model`. The message says what to do.
    """
    require_model(model)
    for path, module in model.named_modules():
        _refuse(path, module, _oddities(module))


def require_own_forwards(model: nn.Module) -> None:
    """Refuse a model whose copy would compute something else.

    Where a forward method was replaced, the method of a copied module may call the dense model. Where Accelerate has offloaded
    weights, the hook of a copied module loads the dense ones, or none.

    Raises:
        InputError: A module has a forward method of its own that is not Accelerate's, or offloaded weights; or as in
            `require_model`.
    """
    require_model(model)
    for path, module in model.named_modules():
        _refuse(path, module, _replaced_forward(module))
        _refuse(path, module, _offloaded(module))


def require_no_wrapped_forwards(model: nn.Module) -> None:
    """Refuse a model whose forward methods Accelerate has wrapped, where modules are copied with the attributes they have.

    Raises:
        InputError: A module has a wrapped forward method: the copy's would call the module of the dense model.
    """
    for path, module in model.named_modules():
        if accelerate_wraps_forward(module):
            remedy = "load it on one device, without a device map or Accelerator.prepare"
            _refuse(path, module, [("a forward method that Accelerate has wrapped", remedy)])


def require_writable(model: nn.Module) -> None:
    """Refuse a model that computes with more than a folder holds, which is weights and a config.

    Raises:
        InputError: As `require_own_forwards`; or transformers refuses to save the config; or there are adapters, masks,
            parametrizations, or hooks on the forward pass that are not secateur's, transformers' or Accelerate's.
    """
    require_own_forwards(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "validate"):
        with reading("model", type(model).__name__, "has a config that cannot be saved", typed=False, also=(Exception,)):
            config.validate()
    for path, module in model.named_modules():
        _refuse(path, module, _changed_weights(module))
        hooks = [hook for hook in forward_hooks(module) if not _comes_from(hook, _OWN)]
        _refuse(path, module, ((f"the hook {_name(hook)!r}", "remove it first (handle.remove())") for hook in hooks))


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of a module that is replaced to the new module, without those that secateur puts there for a while."""
    move_hooks(old, new, lambda hook: not _comes_from(hook, ("secateur",)))


def require_uncompiled(model: nn.Module) -> None:
    """Refuse a compiled model: compiled code does not call hooks that are added later.

    Raises:
        InputError: The model or a part of it is compiled; or as in `require_model`. The message says what to do.
    """
    require_model(model)
    for path, module in model.named_modules():
        _refuse(path, module, _compiled(module))


def _refuse(path: str, module: nn.Module, oddities: Iterable[tuple[str, str]]) -> None:
    """Raise InputError for the first oddity of the module at this path, if there is one."""
    for got, remedy in oddities:
        where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        raise InputError(f"model: expected an ordinary model, got {got} at {where}: {remedy}")


def _compiled(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield how a module is compiled, if it is, with what to do about it."""
    if compiled_from(module) is not None:
        yield "the result of torch.compile", "give the model itself (compiled._orig_mod), and compile the pruned model"
    if is_compiled_in_place(module) or is_compiled(vars(module).get("forward")):
        yield "a compiled module", "give a model that is not compiled, and compile the pruned model"


def _oddities(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the oddities of one module itself, each with what to do about it."""
    yield from _compiled(module)
    yield from _changed_weights(module)
    yield from _weight_oddities(module)


def _changed_weights(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what changes a module's weights or adds to them in each forward pass, with what to do about it."""
    if _comes_from(_forward_owner(module), _ADAPTERS):
        yield (
            "an adapter",
            "merge it into the weights first (merge_and_unload() of peft.PeftModel.from_pretrained(model, adapter))",
        )
    for hook in forward_hooks(module):
        if _comes_from(hook, ("torch.nn.utils.prune",)):
            yield "a mask of torch.nn.utils.prune", "make it permanent first (torch.nn.utils.prune.remove)"
        elif _comes_from(hook, ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")):
            yield "a normalised weight", "make it permanent first (torch.nn.utils.remove_weight_norm or remove_spectral_norm)"
    if parametrize.is_parametrized(module) and not _own_parametrizations(module):
        yield "a parametrization", "make it permanent first (torch.nn.utils.parametrize.remove_parametrizations)"


def _replaced_forward(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield that a module's forward method was replaced, with what to do about it, unless Accelerate or secateur did it."""
    forward = vars(module).get("forward")
    if forward is not None and not accelerate_wraps_forward(module) and not _comes_from(forward, ("secateur",)):
        yield "a replaced forward method", "remove it first (del module.forward); the pruned model or its folder would lose it"


def _offloaded(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield that Accelerate keeps a module's weights elsewhere, with what to do about it."""
    if has_accelerate_hook(module) and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield "offloaded weights", "load the model on the CPU, without a device map (its plan stays valid)"


def _weight_oddities(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what keeps a module's own weights from being cut."""
    kinds = {type(parameter) for parameter in module.parameters(recurse=False)} - {nn.Parameter}
    quantised = _comes_from(_forward_owner(module), _QUANTISERS)
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if kinds or quantised:
        name = next((kind.__name__ for kind in kinds), type(module).__name__)
        yield (
            f"special weights ({name})",
            "dequantise them first, or prune the model with ordinary weights and quantise the result",
        )
    elif own_forward and not _comes_from(_forward_owner(module), ("secateur", "transformers", "transformers_modules", "torch")):
        yield "a linear layer with a forward method of its own", "replace it by a torch.nn.Linear that computes the same"
    if any(parameter.is_inference() for parameter in module.parameters(recurse=False)):
        yield "weights made inside torch.inference_mode()", "load the model outside it"


def _own_parametrizations(module: nn.Module) -> bool:
    """Return whether all parametrizations of a module are secateur's own."""
    parametrizations: Any = module.parametrizations
    return all(_comes_from(type(one), ("secateur",)) for of_tensor in parametrizations.values() for one in of_tensor)


def _forward_owner(module: nn.Module) -> type:
    """Return the class that defines the forward method that the module's class has."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def _comes_from(thing: Any, packages: tuple[str, ...]) -> bool:
    """Return whether a class, a function or a callable object is defined in one of the packages."""
    while hasattr(thing, "func") or hasattr(thing, "__func__"):  # A functools.partial, or a bound method.
        thing = thing.func if hasattr(thing, "func") else thing.__func__
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    return any(f"{owner.__module__}.".startswith(f"{package}.") for package in packages)


def _name(hook: Any) -> str:
    """Return the name of a hook for a message."""
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
