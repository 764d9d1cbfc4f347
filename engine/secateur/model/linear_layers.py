"""Linear layers as models have them: PyTorch's, and Conv1D (GPT-2), which holds the transposed weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is [inputs, outputs]."""
    # By name: the class is transformers', which need not be loaded for this.
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def weight_of(module: nn.Module) -> Tensor:
    """The weight [outputs, inputs], sharing the parameter's memory."""
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight


def shape_of(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer as its neighbours see it, whatever it holds."""
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)
