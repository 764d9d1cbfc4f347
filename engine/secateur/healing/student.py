"""The copy of a pruned model that is trained, as a whole or by LoRA, and the weights that come out of the training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_peft_available

from secateur.model.blocks import blocks
from secateur.model.offloading import copy_of
from secateur.support.errors import InputError

if TYPE_CHECKING:
    from peft import LoraModel


def best_of(pruned: nn.Module, file: Path, lora: int | None) -> nn.Module:
    """Return a copy of a pruned model, with its dtypes, that has the weights that the Trainer has saved of `Distillation`.

    Args:
        pruned: The pruned model.
        file: The weights.
        lora: The rank of the adapters that were trained, which are merged; None for none.
    """
    healed: nn.Module = copy_of(pruned)
    weights = {name.removeprefix("student."): tensor for name, tensor in load_file(file).items()}
    if lora is not None:  # The sum of weights and adapters is rounded once, to the model's dtype.
        trained = master_copy(copy_of(pruned))
        adapters = adapters_in(trained, lora)
        _load_(trained, weights)
        adapters.merge_and_unload()
        weights = trained.state_dict()
    _load_(healed, weights)
    return healed


def _load_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model weights by name, in the dtypes that it has."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)


def require_peft() -> None:
    """Raise InputError where PEFT is not installed."""
    if not is_peft_available():
        raise InputError("lora: expected the package peft, got none: pip install 'secateur[lora]'")


def adapters_in(student: nn.Module, rank: int, seed: int = 0) -> LoraModel:
    """Put adapters into the linear layers of a model's blocks, in place. They alone are trained then.

    A layer's output grows by 2 B A x, with A [rank, in] random and B [out, rank] zero at the beginning.

    Args:
        student: The model.
        rank: The rank.
        seed: The seed of A.

    Reference:
        Hu et al. 2021, arXiv 2106.09685, section 4.1, with alpha at twice the rank.
    """
    from peft import LoraConfig, LoraModel  # It takes seconds.

    layers = [
        f"{block.path}.{name}"
        for block in blocks(student).values()
        for name, module in student.get_submodule(block.path).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.numel()
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT sets it for each layer by the layer's class.
        torch.manual_seed(seed)
        return LoraModel(student, config, "default")


def master_copy(copied: nn.Module) -> nn.Module:
    """Turn a copy of a pruned model into what is trained: float32 weights at least, of which embeddings are frozen.

    Pruning leaves embeddings as they are. Adam would move the rows of all words at the same pace, also of words whose gradients
    are next to nothing. Embeddings inside blocks, as T5's of positions, are trained.
    """
    of_model: Any = copied
    inside = {id(p) for block in blocks(copied).values() for p in copied.get_submodule(block.path).parameters()}
    embeddings = [module for module in copied.modules() if isinstance(module, nn.Embedding)]
    outputs = of_model.get_output_embeddings() if hasattr(copied, "get_output_embeddings") else None
    frozen = {id(p) for module in (*embeddings, *([] if outputs is None else [outputs])) for p in module.parameters()} - inside
    for parameter in copied.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in frozen)
    return copied
