"""per_layer_config: transformers' own description of a model whose layers differ."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from secateur.model.blocks import Block, blocks, contributes
from secateur.model.branches import attentions
from secateur.model.families import family_of


def per_layer_config(model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """Return the `per_layer_config` that describes a pruned model.

    Each layer has the fields in which it differs from the whole config, and under "skip" what it lacks: "attention" or "mlp". A
    layer of the model's own class, built from these fields, has the parameters of the pruned layer. Model classes of
    transformers 5.23 do not read `per_layer_config` yet. A class that reads it needs no code from the folder.

    Args:
        model: The pruned model, with its recipe in the config.

    Returns:
        The fields by the number of the layer; None where fields cannot say the shape (two stacks, channels of heads, low rank,
        heads that the model's own class takes for wider ones, a bias that outlives its branch), transformers knows no
        `per_layer_config`, or its check of the config does not (heads of a Llama in transformers 5.23).

    Source: transformers, integrations/heterogeneity/configuration_utils.py. The names under "skip" are those of the pull
        request huggingface/transformers#45332.
    """
    config: Any = copy.deepcopy(model.config)
    of_model = list(blocks(model).values())
    outlived = any(branch.empty and contributes(model, branch) for block in of_model for branch in block.branches)
    if not hasattr(config, "is_heterogeneous") or outlived or len({block.stack for block in of_model}) != 1:
        return None
    fields = {str(block.layer): _fields(model, block) for block in of_model}
    try:
        config.per_layer_config = copy.deepcopy(fields)
        config.validate()
    except (ValueError, RuntimeError, StrictDataclassError):
        # The architecture's own check refuses a layer, or (LlamaConfig) reads from the whole config what differs by layer.
        return None
    if not all(_builds(model, block, config.per_layer_config[block.layer]) for block in of_model):
        return None
    described: dict[str, dict[str, Any]] | None = config.to_dict().get("per_layer_config")
    return described


def _fields(model: nn.Module, block: Block) -> dict[str, Any]:
    """The fields of a layer, and what it skips."""
    of_attention = attentions(block.branches)
    fields: dict[str, Any] = {}
    skipped = []
    for branch in block.branches:
        if branch.empty:
            skipped.append("attention" if branch in of_attention else "mlp")
        else:
            fields |= family_of(model).config_fields(branch)
    return {**fields, "skip": skipped} if skipped else fields


def _builds(model: nn.Module, block: Block, config: Any) -> bool:
    """Whether a layer that is built from a config has the parameters of a model's layer, but for those of what it skips."""
    layer = model.get_submodule(block.path)
    if list(inspect.signature(type(layer)).parameters)[:2] != ["config", "layer_idx"]:
        return False
    with torch.device("meta"):
        built = type(layer)(config, block.layer)
    paths = [path for branch in block.branches if branch.empty for path in branch.linears]
    skipped = tuple(f"{path.removeprefix(block.path + '.')}." for path in paths)

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in module.named_parameters() if not name.startswith(skipped)}

    return shapes(built) == shapes(layer)
