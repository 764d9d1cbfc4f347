"""Linear layers of either kind: PyTorch's, and Conv1D (GPT-2), which holds the transposed weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer's weight is [inputs, outputs]."""
    # The class is compared by name, so that transformers need not be imported.
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight [outputs, inputs], which shares the parameter's memory."""
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight


def shape_of(module: Any) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer as its neighbours see them, whatever the shape of its weight."""
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)
