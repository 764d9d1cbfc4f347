"""Linear layers of each kind: PyTorch's, Conv1D (GPT-2), which holds the transposed weight, and those that pruning made."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secateur.model.modeling import AroundLinear

# The parameters of an AroundLinear, by the names that they had while these layers held their weights themselves. Folders of
# that time have these names, and so do fingerprints and digests, which stay what they were.
FLAT = {"weight": "linear.weight", "bias": "linear.bias", "basis": "basis.weight"}


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer's weight is [inputs, outputs]."""
    # The class is compared by name, so that transformers need not be imported.
    return _is_named(module, "Conv1D")


def is_kind(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of one of the classes of `modeling.py`, or of a folder's own copy of that file."""
    return _is_named(module, kind.__name__)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight [outputs, inputs], which shares the parameter's memory."""
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight


def shape_of(module: Any) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer as its neighbours see them, whatever the shape of its weight."""
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)


def flat_names(model: nn.Module) -> dict[str, str]:
    """Return the names of the parameters inside each AroundLinear, with those that fingerprints and digests have for them."""
    around = [path for path, module in model.named_modules() if is_kind(module, AroundLinear)]
    return {f"{path}.{inside}": f"{path}.{flat}" for path in around for flat, inside in FLAT.items()}


def _is_named(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
