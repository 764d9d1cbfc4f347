"""The copy of a pruned model that is trained, and the weights that come out of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from secateur.model.blocks import blocks


def load_best_(student: nn.Module, file: Path) -> None:
    """Give a pruned model the weights that the Trainer has saved of `Distillation`, in the dtypes that it has."""
    names = {name.removeprefix("student."): tensor for name, tensor in load_file(file).items()}
    state = student.state_dict()
    with torch.no_grad():
        for name, tensor in names.items():
            state[name].copy_(tensor)


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
