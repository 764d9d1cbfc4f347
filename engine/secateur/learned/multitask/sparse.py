"""A model's weights in a file without their zeros: a bit for each element says whether it is there."""

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

from secateur.pruning import save as folders
from secateur.support.errors import InputError, reading


def save_sparse(model: nn.Module, path: Path) -> None:
    """Writes the state of a model; matrices with so many zeros that it pays are split into NAME.values, those that are not
    zero in row order, and NAME.bits, a bit an element (uint8, the first in the highest bit). Their shapes are in the header."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # T5's embeddings have two names.
            continue
        seen.add(tensor.data_ptr())
        flat = tensor.detach().cpu().flatten()
        there = flat != 0
        saved = int((~there).sum()) * flat.element_size()
        if tensor.dim() == 2 and saved > math.ceil(flat.numel() / 8):
            tensors[f"{name}.values"] = flat[there].contiguous()
            tensors[f"{name}.bits"] = torch.from_numpy(np.packbits(there.numpy()))
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})


def load_sparse(folder: Path, path: Path) -> nn.Module:
    """The model whose config is in the folder, with the state that `save_sparse` wrote. Raises InputError: no such file, or
    one of another model."""
    with reading("model", path, "is no sparse checkpoint"), safetensors.safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        tensors[name] = _dense(tensors.pop(f"{name}.values"), tensors.pop(f"{name}.bits"), shape)
    model = folders.load(folder) if (folder / "model.safetensors").exists() else _empty(folder)
    own = model.state_dict()
    wrong = [n for n in tensors if n not in own or own[n].shape != tensors[n].shape]
    # What is not in the file shares its memory with what is.
    filled = {own[name].data_ptr() for name in tensors if name in own}
    wrong += [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in filled]
    if wrong:
        raise InputError(f"model: {str(path)!r} does not fit the config beside it, for example at {wrong[0]!r}")
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def _dense(values: Tensor, bits: Tensor, shape: list[int]) -> Tensor:
    there = torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool))
    flat = values.new_zeros(math.prod(shape))
    flat[there] = values
    return flat.reshape(shape)


def _empty(folder: Path) -> Any:
    """The model that a folder's config describes, its weights to be filled."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0])(config)
