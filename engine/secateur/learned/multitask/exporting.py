"""Export of a masked encoder to an ordinary one (dense or of low rank), and the folder that holds it, also as a sparse file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from secateur.learned.multitask.encoder_tasks import task_from_json
from secateur.learned.multitask.model import MultitaskModel, Pooling
from secateur.learned.multitask.pruning import MultitaskPruning, originals
from secateur.learned.multitask.sparse import load_sparse, save_sparse
from secateur.model.recipe import Rebuild
from secateur.pruning import save as folders
from secateur.pruning.factorise import balanced
from secateur.pruning.prune import rebuilt
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import field_of, read_object, require_fields
from secateur.support.files import new_folder

ENCODER, HEADS, TASKS, SPARSE = "encoder", "heads.safetensors", "tasks.json", "encoder.sparse.safetensors"


def export(pruning: MultitaskPruning) -> MultitaskModel:
    """Build a model without masks that computes the same outputs as the masked model.

    A weight pruned by element becomes a dense weight with zeros. A weight pruned by rank becomes two smaller linear layers if
    they hold fewer weights than their product, else the product.

    Args:
        pruning: The masked model, which stays unchanged.

    Returns:
        A new model in eval mode, with requires_grad off.

    References:
        Xia and Shin 2021, arXiv 2112.05705 (merging of the kept singular values into the factors).

    Examples:
        >>> model = secateur.learned.export(pruning)
        >>> secateur.learned.save(model, "out", tokenizer=tokenizer)
    """
    encoder = copy.deepcopy(pruning.encoder)
    factors = {}
    for path, mask in pruning.masks.items():
        if pruning.granularity == "rank" and mask.kept * sum(mask.shape) < mask.weights:
            factors[path] = _factors(originals(encoder, path), mask.mask)
        # A copied layer shares its parametrised class with the given model's layer. So remove_parametrizations would change
        # the given model too, and the layer is replaced instead.
        parent, _, name = path.rpartition(".")
        setattr(encoder.get_submodule(parent), name, _plain_linear(encoder.get_submodule(path)))
    model = MultitaskModel(_with_factors(encoder, factors), pruning.tasks, pooling=pruning.pooling)
    model.heads.load_state_dict(pruning.heads.state_dict())
    return model.eval().requires_grad_(False)


def save(model: MultitaskModel, out: str | Path, *, tokenizer: Any, sparse: bool = False) -> None:
    """Save a multitask model to a new folder, which appears when it is complete.

    The folder holds encoder/, which `AutoModelForTextEncoding` and `secateur.load` read, the heads, and the tasks' settings.

    Args:
        model: The model.
        out: The folder to create.
        tokenizer: The tokenizer to save with the encoder.
        sparse: Also write the encoder without its zeros, for `load(..., sparse=True)`.

    Raises:
        InputError: `out` exists.
    """
    description = {
        "pooling": model.pooling,
        "tasks": {name: task.to_json() for name, task in model.tasks.items()},
    }
    with new_folder(out) as folder:
        folders.save(model.encoder, folder / ENCODER, tokenizer=tokenizer)
        save_file(model.heads.state_dict(), folder / HEADS)
        if sparse:
            save_sparse(model.encoder, folder / SPARSE)
        (folder / TASKS).write_text(json.dumps(description, indent=1) + "\n")


def load(folder: str | Path, *, sparse: bool = False) -> MultitaskModel:
    """Load a multitask model that `save` wrote.

    Args:
        folder: The folder.
        sparse: Read the encoder's weights from the sparse file.

    Returns:
        The model in eval mode, with requires_grad off. Its outputs are bit-identical to the saved model's.

    Raises:
        InputError: There is no such folder, it is incomplete, or it holds something else.
    """
    folder = Path(folder)
    with reading("model", folder, "is no folder of a multitask model"):
        description = read_object(folder / TASKS)
        require_fields(TASKS, description, {"pooling": Pooling, "tasks": dict[str, dict[str, Any]]})
        if not description["tasks"]:
            raise FieldError(f"{TASKS}.tasks: expected at least one task, got none")
        tasks = {}
        for name, task in description["tasks"].items():
            with field_of(f"{TASKS}.tasks.{name}"):
                tasks[name] = task_from_json(task)
        heads, pooling = load_file(folder / HEADS), description["pooling"]
        encoder = load_sparse(folder / ENCODER, folder / SPARSE) if sparse else folders.load(folder / ENCODER)
    model = MultitaskModel(encoder, tasks, pooling=pooling)
    try:
        model.heads.load_state_dict(heads)
    except RuntimeError as error:
        raise InputError(f"model: the heads in {str(folder)!r} are not those of its tasks") from error
    return model.eval().requires_grad_(False)


def _plain_linear(masked: Any) -> nn.Module:
    """Build a linear layer with the current weight [out, in] of a masked one."""
    weight = masked.weight
    options = {"bias": masked.bias is not None, "device": weight.device, "dtype": weight.dtype}
    linear: nn.Module = skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)  # type: ignore[no-untyped-call]
    linear.load_state_dict({name: t for name, t in {"weight": weight.detach(), "bias": masked.bias}.items() if t is not None})
    return linear


def _factors(svd: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge the k singular values that stay into the factors [m, k] and [k, n]."""
    left, values, right = (tensor.detach() for tensor in svd)  # [m, ranks], [ranks], [ranks, n]
    kept = torch.arange(len(values), device=values.device) if mask is None else mask.nonzero().flatten()
    left, right = balanced(left[:, kept], values[kept], right[kept])
    return left.contiguous(), right.contiguous()


def _with_factors(encoder: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Replace linear layers by pairs of smaller ones with the given factors."""
    if not factors:
        return encoder
    rebuild = Rebuild()
    for path, (left, right) in factors.items():
        rebuild.low_rank(encoder, path, left, right)
    return rebuilt(encoder, rebuild)
