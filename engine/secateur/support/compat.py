"""Private names of other libraries, each behind one function. No other module of the engine reads one.

Checked with torch 2.13.0, transformers 5.23.0, accelerate 1.15.0 and datasets 5.2.0, which constraints.txt names. Another major
version of torch or transformers may move these names, so pyproject.toml bounds both from above. `QuietTrainer` overrides
private methods of transformers' Trainer, which cannot be done from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.support.errors import InputError

T = TypeVar("T")

__all__ = [
    "TorchDispatchMode",
    "accelerate_wraps_forward",
    "attention_implementation",
    "auto_architectures",
    "auto_model_classes",
    "compiled_from",
    "drop_accelerate_moves_",
    "flash_attention",
    "forget_renaming_",
    "forward_hooks",
    "has_accelerate_hook",
    "has_auto_model",
    "has_cpp_compiler",
    "has_hooks",
    "inductor_freezing",
    "inductor_kernels",
    "inductor_options",
    "is_compiled",
    "is_compiled_in_place",
    "model_from_config",
    "move_hooks",
    "own_code_error",
    "own_code_options",
    "own_modules",
    "own_parameters",
    "reads_a_value",
    "rebind_accelerate_",
    "saved_data_files",
    "set_attention_implementation",
    "t5_position_buckets",
    "train_batch_size",
    "tree_leaves",
    "use_one_gpu",
    "without_own_code",
]

# torch


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own parameters by name, None for absent ones. Changing the dictionary changes the module.

    `torch.nn.Module._parameters`: named_parameters() leaves out names that share a parameter, and cannot be written to.
    """
    return module._parameters


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own submodules by name, None for absent ones. Changing the dictionary changes the module.

    `torch.nn.Module._modules`: named_children() leaves out names that share a module, and cannot be written to.
    """
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a forward or backward hook is on the module itself. `torch.nn.Module._forward_hooks` and three more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks on the module's forward pass. `torch.nn.Module._forward_hooks` and `_forward_pre_hooks`."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def move_hooks(old: nn.Module, new: nn.Module, chosen: Callable[[Callable[..., Any]], bool]) -> None:
    """Move the chosen hooks of a module's forward and backward pass to another module. Their handles still remove them.

    `torch.nn.Module._forward_hooks` and seven more.
    """
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = getattr(old, kind)
        for number in [number for number, hook in hooks.items() if not chosen(hook)]:
            del hooks[number]
        setattr(new, kind, hooks)
    flags = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    for name in (*flags, "_is_full_backward_hook"):
        setattr(new, name, getattr(old, name))


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile made this module of, or None for any other module. `OptimizedModule._orig_mod`."""
    return own_modules(module).get("_orig_mod")


def is_compiled_in_place(module: nn.Module) -> bool:
    """Tell whether the module's `compile()` was called. `torch.nn.Module._compiled_call_impl`."""
    return module._compiled_call_impl is not None


def is_compiled(function: Any) -> bool:
    """Tell whether torch.compile returned the function. `_torchdynamo_orig_callable`, which it sets."""
    return hasattr(function, "_torchdynamo_orig_callable")


def reads_a_value(operation: Any) -> bool:
    """Tell whether a dispatched operation reads a tensor's value, as `Tensor.item()` does. `aten._local_scalar_dense`."""
    return operation is torch.ops.aten._local_scalar_dense.default


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Compute attention by one operation that never writes the probabilities to memory. It also runs on the meta device.

    `aten._scaled_dot_product_flash_attention_for_cpu`: on the meta device, the public function computes by its plain formula.

    Args:
        query: Queries [B, heads, T, head_dim].
        key: Keys [B, heads, S, head_dim].
        value: Values [B, heads, S, head_dim].
        mask: A mask that is added to the logits, or None.
        dropout: The probability of dropout.
        is_causal: Whether a token attends to earlier tokens alone.
        scale: The factor of the logits; None for the default.

    Returns:
        The outputs [B, heads, T, head_dim].
    """
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, is_causal, attn_mask=mask, scale=scale
    )[0]
    return attended


def inductor_freezing(enabled: bool) -> AbstractContextManager[None]:
    """A context in which compilers may treat weights as constants. `torch._inductor.config.freezing`.

    The options of the backend cannot set it, because tracing the model reads it too.
    """
    from torch._inductor import config

    context: AbstractContextManager[None] = config.patch(freezing=enabled)
    return context


def inductor_options(mode: str) -> dict[str, Any]:
    """Return Inductor's options for a mode of torch.compile, such as "max-autotune-no-cudagraphs".

    `torch._inductor.list_mode_options`.
    """
    from torch._inductor import list_mode_options

    options: dict[str, Any] = list_mode_options(mode)
    return options


def inductor_kernels(graph: Any, inputs: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor. `torch._inductor.compile_fx.compile_fx`: torch.compile offers no backend around Inductor.

    Args:
        graph: The graph.
        inputs: Example inputs.
        options: Inductor's options, as from `inductor_options`.

    Returns:
        The compiled graph.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, inputs, config_patches=options)
    kernels: Callable[..., Any] = compiled
    return kernels


def has_cpp_compiler() -> bool:
    """Tell whether Inductor finds a C++ compiler. `torch._inductor.cpp_builder.get_cpp_compiler` and its exception."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


# transformers


def without_own_code(load: Callable[..., T], source: Any, **options: Any) -> T:
    """Call `from_pretrained` or `from_config` of transformers such that no code of a model's folder runs, and nothing is asked.

    Args:
        load: The method of an Auto class.
        source: The folder, the Hub name or the config.
        options: Further keyword arguments.

    Returns:
        The result of the method.

    Raises:
        InputError: The folder brings its own code, and transformers has no class of its own for it. The text of
            `resolve_trust_remote_code`'s ValueError tells this error from others.
    """
    try:
        return load(source, trust_remote_code=False, **options)
    except ValueError as error:
        if "`trust_remote_code=True`" not in str(error):
            raise
        raise own_code_error(getattr(source, "name_or_path", source)) from error


def own_code_error(name: object) -> InputError:
    """Return the error for a folder or Hub name whose model or tokenizer is not one of transformers' classes."""
    return InputError(
        f"model: expected a model and a tokenizer of classes in transformers, got {str(name)!r}, which brings its own code, "
        "and secateur does not run code of a model's folder"
    )


def has_auto_model(auto_class: str, config: Any) -> bool:
    """Tell whether an Auto class, such as "AutoModelForCausalLM", knows a config's architecture. `_model_mapping`.

    No modelling code is imported.
    """
    import transformers

    return type(config) in getattr(transformers, auto_class)._model_mapping


def auto_architectures(auto_class: str) -> frozenset[str]:
    """Return the names of all model classes that an Auto class of transformers knows. `_model_mapping._model_mapping`.

    No modelling code is imported.
    """
    import transformers

    names = getattr(transformers, auto_class)._model_mapping._model_mapping.values()
    return frozenset(name for entry in names for name in ((entry,) if isinstance(entry, str) else entry))


def auto_model_classes(auto_class: str, config: Any) -> tuple[type[nn.Module], ...]:
    """Return the model classes that an Auto class knows for a config: none, one or, for a few architectures, several.

    `_model_mapping` of the Auto class.
    """
    import transformers

    classes: Any = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    return tuple(classes) if isinstance(classes, (list, tuple)) else (classes,)


def model_from_config(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a transformers model with random weights in a dtype. `PreTrainedModel._from_config`."""
    model: nn.Module = model_class._from_config(config, dtype=dtype)
    return model


def forget_renaming_(model: Any, names: Iterable[str]) -> None:
    """Make `save_pretrained` write weights under the names that they have in the model, and not those that they were read from.

    `PreTrainedModel._weight_conversions`: transformers keeps `from_pretrained`'s `key_mapping` there, to undo it.

    Args:
        model: The model.
        names: The weights that `key_mapping` renamed, by their names in the model.
    """
    renamed, kept = set(names), getattr(model, "_weight_conversions", None)
    if kept is not None:
        model._weight_conversions = [conversion for conversion in kept if not renamed.issuperset(conversion.target_patterns)]


def attention_implementation(config: Any) -> str | None:
    """Return the name of the attention that a config's model runs, such as "sdpa"; None without a config of transformers.

    `PreTrainedConfig._attn_implementation`.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def set_attention_implementation(config: Any, name: str) -> None:
    """Choose the attention that a config's model runs. `PreTrainedConfig._attn_implementation`.

    The public `set_attn_implementation` is a model's method, which also changes configs of the model's parts.
    """
    config._attn_implementation = name


def t5_position_buckets(distances: Tensor, **options: Any) -> Tensor:
    """Return the bucket of each distance between positions (int64, any shape). `T5Attention._relative_position_bucket`."""
    from transformers.models.t5.modeling_t5 import T5Attention

    buckets: Tensor = T5Attention._relative_position_bucket(distances, **options)
    return buckets


def train_batch_size(trainer: Any) -> int:
    """Return the rows of one training step on one process. `Trainer._train_batch_size`: the Trainer may lower this number."""
    size: int = trainer._train_batch_size
    return size


def use_one_gpu(arguments: Any) -> None:
    """Make the Trainer use one GPU. `TrainingArguments._n_gpu`: with several GPUs, it uses torch.nn.DataParallel."""
    arguments._n_gpu = 1


# accelerate, datasets


def has_accelerate_hook(module: nn.Module) -> bool:
    """Tell whether Accelerate moves the module's weights or inputs. Accelerate sets `_hf_hook` on these modules."""
    return hasattr(module, "_hf_hook")


def accelerate_wraps_forward(module: nn.Module) -> bool:
    """Tell whether Accelerate has replaced the module's forward method, to move weights or to compute in another dtype.

    Accelerate sets `_hf_hook` or `_original_forward` on these modules.
    """
    return has_accelerate_hook(module) or "_original_forward" in vars(module)


def drop_accelerate_moves_(copied: nn.Module) -> None:
    """Remove the methods `to`, `cuda` and the like that Accelerate has put on a dispatched model from a copy of it.

    On the copy they would move and convert the model that was copied.
    """
    for name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"):
        vars(copied).pop(name, None)


def rebind_accelerate_(module: nn.Module) -> None:
    """Make Accelerate's wrapper call the forward method of the module's new class. It has stored that of the class before."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def own_code_options(load_dataset: Callable[..., Any]) -> dict[str, bool]:
    """Return the options with which `datasets.load_dataset` runs no code of a data set, and asks nothing.

    Releases before 4 run such code after a question on standard input; later ones cannot, and have no such parameter.
    """
    return {"trust_remote_code": False} if "trust_remote_code" in signature(load_dataset).parameters else {}


def saved_data_files(folder: Path) -> list[str]:
    """Return the names of the Arrow files in a folder that `Dataset.save_to_disk` wrote. `_data_files` of state.json."""
    return [file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
