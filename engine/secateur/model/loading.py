"""Load a model's weights from a checkpoint that has all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.support.compat import without_own_code
from secateur.support.errors import InputError

ADAPTER_FILE = "adapter_config.json"
_LISTED = 3


@torch.inference_mode(False)  # No inference tensors: the model may outlive the caller's inference mode.
def load_complete(model_class: Any, folder: str, **options: Any) -> nn.Module:
    """Load a model by `from_pretrained`, and refuse a checkpoint without some weights, which would be drawn at random.

    Weights that transformers ties or computes need not be in the checkpoint, and neither does the pooler of a base model, whose
    output no task reads.

    Args:
        model_class: A class with `from_pretrained`: an Auto class or a model class.
        folder: A folder, or a name on the Hub.
        options: Options of `from_pretrained`.

    Raises:
        InputError: The checkpoint lacks weights of the model, or has them in other shapes, or comes with an adapter, which
            transformers ignores where PEFT is not installed, or needs code that the folder brings.
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
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"model: expected weights of the shapes that the config of {folder!r} tells, got {name} of shape {list(stored)} "
            f"and not {list(expected)}"
        )
    loaded: nn.Module = model
    return loaded


def is_needed(model: Any, name: str) -> bool:
    """Return whether a weight of a model has an effect on its task: only the pooler of a base model has none."""
    return not (getattr(model, "base_model", None) is model and name.startswith("pooler."))


def listed(names: Sequence[str]) -> str:
    """Return the first few names between commas, with the number of the others."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
