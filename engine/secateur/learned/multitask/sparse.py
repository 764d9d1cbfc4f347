"""A file of a model's weights without their zeros: one bit for each element marks whether its value is stored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.model.recipe import renamed
from secateur.pruning import save as folders
from secateur.support.compat import without_own_code
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import require_type, shown


def save_sparse(model: nn.Module, path: Path) -> None:
    """Save the state of a model without zeros.

    A matrix that this makes smaller is split in two: NAME.values holds the elements that are not zero, in row order; NAME.bits
    holds a bit for each element (uint8, the first element in the highest bit). The file's header holds the shapes.

    Args:
        model: The model.
        path: The safetensors file to write.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # T5's embeddings have two names.
            continue
        seen.add(tensor.data_ptr())
        flat = tensor.detach().cpu().flatten()
        is_stored = flat != 0  # [elements]
        saved_bytes = int((~is_stored).sum()) * flat.element_size()
        if tensor.dim() == 2 and saved_bytes > math.ceil(flat.numel() / 8):
            tensors[f"{name}.values"] = flat[is_stored].contiguous()
            tensors[f"{name}.bits"] = torch.from_numpy(np.packbits(is_stored.numpy()))
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})


def load_sparse(folder: Path, path: Path) -> nn.Module:
    """Load a model from its config and a sparse file.

    Args:
        folder: The folder with the model's config.
        path: The file that `save_sparse` wrote.

    Returns:
        The model in eval mode.

    Raises:
        InputError: The file cannot be read, or holds another model's state.
    """
    with reading("model", path, "is not a sparse checkpoint"), safetensors.safe_open(path, framework="pt") as file:
        shapes = json.loads((file.metadata() or {}).get("shapes", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        require_type("shapes", dict[str, list[int]], shapes)
        for name, shape in shapes.items():
            tensors[name] = _dense(name, tensors.pop(f"{name}.values", None), tensors.pop(f"{name}.bits", None), shape)
        wrong = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
        if wrong is not None:
            raise FieldError(f"{wrong}: expected finite weights, got NaN or inf")
    model: Any = folders.load(folder) if (folder / "model.safetensors").exists() else _empty(folder)
    old = renamed(getattr(model.config, "secateur", {"modules": {}}), tensors, f"{model.base_model_prefix}.")
    tensors = {old.get(name, name): tensor for name, tensor in tensors.items()}
    state = model.state_dict()
    misfits = [name for name in tensors if name not in state or state[name].shape != tensors[name].shape]
    # A tensor that is not in the file must share its memory with one that is.
    filled = {state[name].data_ptr() for name in tensors if name in state}
    misfits += [name for name, tensor in state.items() if name not in tensors and tensor.data_ptr() not in filled]
    if misfits:
        raise InputError(f"model: {str(path)!r} does not fit the config beside it, for example at {misfits[0]!r}")
    model.load_state_dict(tensors, strict=False)
    loaded: nn.Module = model.eval()
    return loaded


def _dense(name: str, values: Tensor | None, bits: Tensor | None, shape: list[int]) -> Tensor:
    """Rebuild a matrix from its values and bits. Raise FieldError if they do not make a matrix of this shape."""
    if len(shape) != 2 or min(shape) < 1:
        raise FieldError(f"shapes.{name}: expected two numbers of at least 1, got {shown(shape)}")
    elements = math.prod(shape)
    if values is None or bits is None:
        raise FieldError(f"{name}: expected its values and its bits, got only one of them or none")
    if bits.dtype != torch.uint8 or bits.shape != (math.ceil(elements / 8),):
        raise FieldError(
            f"{name}.bits: expected {math.ceil(elements / 8)} bytes for the shape {shape}, got {tuple(bits.shape)}"
        )
    is_stored = torch.from_numpy(np.unpackbits(bits.numpy(), count=elements).astype(bool))  # [elements]
    if values.shape != (int(is_stored.sum()),):
        raise FieldError(f"{name}.values: expected {int(is_stored.sum())} numbers, as many as bits, got {tuple(values.shape)}")
    flat = values.new_zeros(elements)
    flat[is_stored] = values
    return flat.reshape(shape)


def _empty(folder: Path) -> Any:
    """Build the model of a folder's config, with weights that the caller replaces."""
    import transformers

    config = without_own_code(transformers.AutoConfig.from_pretrained, folder)
    return getattr(transformers, config.architectures[0])(config)
