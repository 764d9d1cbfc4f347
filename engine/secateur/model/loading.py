"""Load a model's weights from a checkpoint that has all of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.support.compat import without_own_code
from secateur.support.errors import InputError
from secateur.support.fields import read_object

ADAPTER_FILE = "adapter_config.json"
_LISTED = 3
# Constants that earlier versions of transformers stored beside the weights, and now compute.
_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|\battn\.bias|\battention\.bias|num_batches_tracked)$")


@torch.inference_mode(False)  # No inference tensors: the model may outlive the caller's inference mode.
def load_complete(model_class: Any, folder: str, **options: Any) -> nn.Module:
    """Load a model by `from_pretrained`, and refuse a checkpoint that has not just the weights of the model's layers.

    Missing weights would be drawn at random, and further ones left out.

    Weights that transformers ties or computes need not be in the checkpoint, and neither does the pooler of a base model, whose
    output no task reads.

    Args:
        model_class: A class with `from_pretrained`: an Auto class or a model class.
        folder: A folder, or a name on the Hub.
        options: Options of `from_pretrained`.

    Raises:
        InputError: The checkpoint lacks weights of the model, or has them in other shapes, or has further ones in its layers;
            or has integers or booleans as weights; or comes with an adapter, which transformers ignores where PEFT is not
            installed; or needs code that the folder brings.
    """
    if (Path(folder) / ADAPTER_FILE).is_file():
        raise InputError(
            f"model: expected a model without adapters, got {folder!r} with {ADAPTER_FILE}: merge the adapter into the weights "
            "first (merge_and_unload() of peft.PeftModel.from_pretrained(model, adapter), then save_pretrained)"
        )
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    model, info = without_own_code(model_class.from_pretrained, folder, **options)
    missing = sorted(name for name in info["missing_keys"] if is_needed(model, name))
    if missing:
        raise InputError(
            f"model: expected a checkpoint with all weights of {type(model).__name__}, got {folder!r} without "
            f"{listed(missing)}: they would be drawn at random; train the model for its task first"
        )
    stray = sorted(name for name in info["unexpected_keys"] if _is_of_layers(model, name))
    if stray:
        raise InputError(
            f"model: expected a checkpoint of {type(model).__name__} as its config describes it, got {folder!r} with "
            f"{listed(stray)}, which the model would leave out: is its config that of another model?"
        )
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"model: expected weights of the shapes that the config of {folder!r} tells, got {name} of shape {list(stored)} "
            f"and not {list(expected)}"
        )
    if getattr(model.config, "quantization_config", None) is None:
        _require_floats(model, folder, info["unexpected_keys"])
    loaded: nn.Module = model
    return loaded


def _require_floats(model: nn.Module, folder: str, left_out: Collection[str]) -> None:
    """Raise InputError for a weight that is stored in integers or booleans, which transformers has cast to the model's dtype.

    Nothing in the file tells the scale of such a weight. Buffers may be integers.
    """
    # By the last part of their names, as transformers may give the modules of a file other names.
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    for name, dtype in _not_floats(folder):
        if name not in left_out and not _COMPUTED.search(name) and name.rpartition(".")[2] not in buffers:
            raise InputError(
                f"model: expected weights in a floating-point dtype, got {folder!r} with {name} in "
                f"{str(dtype).removeprefix('torch.')} and without a quantization_config: its numbers would be taken as they "
                "are; save the model dequantised first"
            )


def _not_floats(folder: str) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the tensors without a floating-point dtype that `from_pretrained` reads from a folder or from the Hub's cache."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = _file(folder, name)
        if path is None:
            continue
        parts = sorted(set(read_object(path)["weight_map"].values())) if path.suffix == ".json" else [name]
        for part in filter(None, (_file(folder, part) for part in parts)):
            yield from _not_floats_in(part)
        return


def _not_floats_in(path: Path) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the tensors of a file that have no floating-point dtype, with their dtypes. Values of floats are not read."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not file.get_slice(name).get_dtype().startswith(("F", "BF"))]  # noqa: SIM118
            yield from ((name, file.get_tensor(name).dtype) for name in names)
    else:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        yield from ((name, tensor.dtype) for name, tensor in tensors.items() if not tensor.is_floating_point())


def _file(folder: str, name: str) -> Path | None:
    """Return the path of a checkpoint's file on this machine, None if there is none."""
    if Path(folder).is_dir():
        return Path(folder) / name if (Path(folder) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(folder, name)
    return Path(cached) if isinstance(cached, str) else None


def is_needed(model: Any, name: str) -> bool:
    """Return whether a weight of a model has an effect on its task: only the pooler of a base model has none."""
    return not (getattr(model, "base_model", None) is model and name.startswith("pooler."))


def _is_of_layers(model: Any, name: str) -> bool:
    """Return whether a weight that the model does not have belongs to its layers, or to a module that has other weights.

    Then the outputs need it: a further layer, a bias, the scale of a quantised weight. Further heads and poolers do not count.
    """
    if _COMPUTED.search(name):
        return False
    base = getattr(model, "base_model_prefix", "")
    return any(_reaches_layers(model, path.split(".")) for path in (name, f"{base}.{name}"))


def _reaches_layers(module: nn.Module, path: Sequence[str]) -> bool:
    """Return whether the path of a weight leads into a list of layers, or to a module with weights of its own."""
    inside = False
    for part in path[:-1]:
        inside |= isinstance(module, nn.ModuleList)
        children = dict(module.named_children())
        if part not in children:
            return inside
        module = children[part]
    known = set(dict(module.named_parameters(recurse=False))) | set(dict(module.named_buffers(recurse=False)))
    return path[-1] not in known and (inside or bool(known))


def listed(names: Sequence[str]) -> str:
    """Return the first few names between commas, with the number of the others."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
