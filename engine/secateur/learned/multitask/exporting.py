"""From masks to an ordinary encoder with its heads, and to a folder: dense or of low rank, and the sparse file beside it."""

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
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.pruning import MultitaskPruning, originals
from secateur.learned.multitask.sparse import load_sparse, save_sparse
from secateur.model.recipe import Rebuild
from secateur.pruning import save as folders
from secateur.pruning.factorise import balanced
from secateur.pruning.prune import rebuilt
from secateur.support.errors import InputError, reading
from secateur.support.files import new_folder

ENCODER, HEADS, TASKS, SPARSE = "encoder", "heads.safetensors", "tasks.json", "encoder.sparse.safetensors"


def export(pruning: MultitaskPruning) -> MultitaskModel:
    """A model without masks that computes what the masked one computes, in eval mode; what is given stays as it is.

    Elements: dense weights with zeros. Ranks: two smaller linear layers where they hold fewer weights than their product, which
    takes their place elsewhere.
    """
    encoder = copy.deepcopy(pruning.encoder)
    factors = {}
    for path, mask in pruning.masks.items():
        if pruning.granularity == "rank" and mask.kept * sum(mask.shape) < mask.weights:
            factors[path] = _factors(originals(encoder, path), mask.mask)
        # remove_parametrizations would take the weight from the given model too: a copy shares its class.
        parent, _, name = path.rpartition(".")
        setattr(encoder.get_submodule(parent), name, _plain(encoder.get_submodule(path)))
    made = MultitaskModel(_of_low_rank(encoder, factors), pruning.tasks, pooling=pruning.pooling)
    made.heads.load_state_dict(pruning.heads.state_dict())
    return made.eval().requires_grad_(False)


def save(model: MultitaskModel, out: str | Path, *, tokenizer: Any, sparse: bool = False) -> None:
    """Writes a folder: encoder/, which `AutoModelForTextEncoding` and `secateur.load` read, the heads, and what the tasks are.
    sparse: also the encoder with its zeros left out, as `load(..., sparse=True)` reads it. The folder appears when complete.
    Raises InputError if `out` exists."""
    about = {
        "pooling": model.pooling,
        "tasks": {name: task.to_json() for name, task in model.tasks.items()},
    }
    with new_folder(out) as folder:
        folders.save(model.encoder, folder / ENCODER, tokenizer=tokenizer)
        save_file(model.heads.state_dict(), folder / HEADS)
        if sparse:
            save_sparse(model.encoder, folder / SPARSE)
        (folder / TASKS).write_text(json.dumps(about, indent=1) + "\n")


def load(folder: str | Path, *, sparse: bool = False) -> MultitaskModel:
    """The model that `save` wrote, in eval mode: the same outputs bit for bit. sparse: the encoder's weights come from the
    sparse file. Raises InputError: no such folder, one that is incomplete, or holds something else."""
    folder = Path(folder)
    with reading("model", folder, "is no folder of a multitask model"):
        about = json.loads((folder / TASKS).read_text(encoding="utf-8"))
        tasks = {name: task_from_json(task) for name, task in about["tasks"].items()}
        heads, pooling = load_file(folder / HEADS), about["pooling"]
        encoder = load_sparse(folder / ENCODER, folder / SPARSE) if sparse else folders.load(folder / ENCODER)
    made = MultitaskModel(encoder, tasks, pooling=pooling)
    try:
        made.heads.load_state_dict(heads)
    except RuntimeError as error:
        raise InputError(f"model: the heads in {str(folder)!r} are not those of its tasks") from error
    return made.eval().requires_grad_(False)


def _plain(masked: Any) -> nn.Module:
    """A linear layer with the weight that a masked one has now."""
    weight = masked.weight
    options = {"bias": masked.bias is not None, "device": weight.device, "dtype": weight.dtype}
    made: nn.Module = skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)  # type: ignore[no-untyped-call]
    made.load_state_dict({name: t for name, t in {"weight": weight.detach(), "bias": masked.bias}.items() if t is not None})
    return made


def _factors(held: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[m, k] and [k, n] with the ranks that stay."""
    left, values, right = (tensor.detach() for tensor in held)
    kept = torch.arange(len(values), device=values.device) if mask is None else mask.nonzero().flatten()
    found = balanced(left[:, kept], values[kept], right[kept])
    return found[0].contiguous(), found[1].contiguous()


def _of_low_rank(encoder: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    if not factors:
        return encoder
    rebuild = Rebuild()
    for path, (left, right) in factors.items():
        rebuild.low_rank(encoder, path, left, right)
    return rebuilt(encoder, rebuild)
