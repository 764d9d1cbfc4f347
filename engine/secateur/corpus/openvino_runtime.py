"""Score batches by OpenVINO instead of torch: classifiers, and label trees of encoder-decoders.

The model is exported once for each set of weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.corpus.compiling import LabelScores
from secateur.model.discovery import config_digest
from secateur.model.families import family_of
from secateur.model.offloading import copy_of, values
from secateur.model.ordinary import require_ordinary
from secateur.support.errors import InputError, first_line
from secateur.tasks import Classification, Item, Task, TextToText
from secateur.tasks.batches import Batch, model_device
from secateur.tasks.logits import openvino_graph, require_fixed, takes_segments

FILE = "openvino_model.xml"
# OpenVINO's names of the dtypes that it computes in.
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# The lengths of the texts of some batches. The first one is traced, and the others prove that the sizes stayed free.
_TRIED = ((10, 7, 4), (1,), (33, 2), (7, 7, 7, 7, 7))
# The largest difference of a logit, in float32, as a share of the largest logit.
_ROUNDING = 1e-3
# The number of this way to export. Another one makes the graphs of older versions unused.
_EXPORT = 1
# The exported models that stay in the cache: those that were used last.
KEPT = 8


def require_openvino(task: Task, model: nn.Module) -> None:
    """Refuse a task or a model that OpenVINO does not score.

    Raises:
        InputError: The package is missing; the task is neither one with a class for each text or image nor one with a tree of
            labels for an encoder-decoder; the model is not on the CPU, is of another dtype than float32 and bfloat16, is no
            ordinary one (`require_ordinary`), or is one that no graph of fixed operations follows.
    """
    if importlib.util.find_spec("openvino") is None:
        raise InputError("engine-runtime: openvino needs the package openvino: pip install 'secateur[openvino]'")
    of_tree = isinstance(task, TextToText) and task.labels is not None
    if not (isinstance(task, Classification) or (of_tree and family_of(model).place_in_decoder)):
        raise InputError(
            f"engine-runtime: expected torch for {task.name or type(task).__name__}, as openvino scores classifiers of texts "
            "and images, and closed labels of encoder-decoders, got openvino"
        )
    device, dtype = model_device(model), next(model.parameters()).dtype
    if device.type != "cpu" or dtype not in HINTS:
        raise InputError(
            f"engine-runtime: expected torch for a model in {str(dtype).removeprefix('torch.')} on {device.type}, as openvino "
            "scores in float32 or bfloat16 on the CPU, got openvino"
        )
    require_ordinary(model)
    require_fixed(model)


def takes_openvino(task: Task, model: nn.Module) -> bool:
    """Tell whether `require_openvino` refuses nothing."""
    try:
        require_openvino(task, model)
    except InputError:
        return False
    return True


def openvino_scores(task: Task, model: nn.Module, workers: int, threads: int) -> LabelScores:
    """Compile a model for OpenVINO, and return the function that stands in for `task.label_scores`.

    Any thread may call it. OpenVINO computes in the dtype of the model's parameters.

    Args:
        task: The task.
        model: Its model, which stays as it is.
        workers: How many threads will call the function at once.
        threads: CPU threads of each call.

    Raises:
        InputError: As `require_openvino` and `exported`.
    """
    require_openvino(task, model)
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[next(model.parameters()).dtype], "NUM_STREAMS": workers,
        # Of two processes that pin their threads, both take the first cores.
        "INFERENCE_NUM_THREADS": workers * threads, "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    return _caller(_compiled(exported(task, model), settings), task)


def exported(task: Task, model: nn.Module) -> Path:
    """Return the file of a model's graph, which is exported at the first call for these weights.

    It lies in $XDG_CACHE_HOME/secateur/openvino (~/.cache without that variable), in float32. An export removes the models that
    were not among the last KEPT ones used.

    Raises:
        InputError: OpenVINO cannot take the model or computes something else from it, or the file cannot be written.
    """
    folder = cached_at(task, model)
    if folder.is_dir():
        with contextlib.suppress(OSError):  # A cache that cannot be written to serves as well.
            os.utime(folder)
        return folder / FILE
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            (partial := Path(scratch) / "graph").mkdir()
            _export(task, copy_of(model).float().eval(), partial / FILE)
            if not folder.is_dir():  # Another process may have been faster.
                partial.rename(folder)
        _forget(folder.parent)
    except OSError as error:
        raise InputError(
            f"engine-runtime: the exported model cannot be written to {folder.parent}: {error.strerror}; XDG_CACHE_HOME names "
            "another place"
        ) from error
    return folder / FILE


def _forget(cache: Path) -> None:
    """Remove the exported models that were not among the last KEPT ones used."""
    folders = [entry for entry in os.scandir(cache) if re.fullmatch("[0-9a-f]{24}", entry.name)]
    with contextlib.suppress(FileNotFoundError):  # Another process removes some at the same time.
        for entry in sorted(folders, key=lambda entry: entry.stat().st_mtime_ns)[:-KEPT]:
            shutil.rmtree(entry.path)


def cached_at(task: Task, model: nn.Module) -> Path:
    """Return the folder of a model's graph. Its name is a hash of all that the graph depends on.

    That is all weights, the config, the modules, the versions of the packages, and the depths of a label tree's nodes.
    """
    depths = task.tree.depths.tolist() if isinstance(task, TextToText) else []
    packages = {name: version(name) for name in ("openvino", "torch", "transformers")}
    digest = hashlib.sha256(json.dumps([_EXPORT, packages, config_digest(model), repr(model), depths]).encode())
    for name, tensor in (*values(model), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "secateur" / "openvino" / digest.hexdigest()[:24]


def _export(task: Task, model: Any, path: Path) -> None:
    """Write a model's graph, and compare OpenVINO with torch on it."""
    import openvino

    batches = [_blank(task, model, lengths) for lengths in _TRIED]
    with task.scoring(model):
        with torch.inference_mode():
            expected = [task.label_scores(model, batch) for batch in batches]
        try:
            graph = openvino_graph(model, _inputs(task, model, batches[0]))
        except Exception as error:  # The trace runs the model's own code, and OpenVINO's errors have no common class.
            why = first_line(error)
            raise InputError(f"engine-runtime: openvino cannot take {type(model).__name__}: {why}") from error
    openvino.save_model(graph, path, compress_to_fp16=False)
    run = _caller(_compiled(path, {"INFERENCE_PRECISION_HINT": "f32"}), task)
    for batch, of_torch in zip(batches, expected, strict=True):
        difference = float((run(model, batch) - of_torch).abs().max())
        if not difference <= _ROUNDING * max(1.0, float(of_torch.abs().max())):
            raise InputError(
                f"engine-runtime: openvino's logits of {type(model).__name__} differ from torch's by {difference:.2g}, which "
                "rounding does not explain"
            )


def _blank(task: Task, model: nn.Module, lengths: Sequence[int]) -> Batch:
    """A batch of items of some lengths."""
    items: list[Item] = [task.blank(model, length) for length in lengths]
    return task.collate_inputs(items, torch.device("cpu"))


def _inputs(task: Task, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch as the graph's inputs. Texts without segments have the first one, as in the model itself."""
    inputs = {name: value for name, value in task.model_inputs(model, batch.inputs).items() if isinstance(value, Tensor)}
    if takes_segments(model) and "input_ids" in inputs:
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    if isinstance(task, TextToText):  # The smallest bfloat16 is one in float32 too: no mask becomes infinite.
        inputs |= task.tree_inputs(model, len(inputs["input_ids"]), torch.bfloat16)
    return {name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous() for name, tensor in inputs.items()}


def _compiled(path: Path, settings: dict[str, Any]) -> Any:
    """The graph of a file, compiled for the CPU."""
    import openvino

    return openvino.Core().compile_model(path, "CPU", settings)


def _caller(compiled: Any, task: Task) -> LabelScores:
    """The function that runs a compiled graph. Each thread that calls it has a request of its own."""
    own = threading.local()

    def label_scores(model: Any, batch: Batch) -> Tensor:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        inputs, parts = _inputs(task, model, batch), []
        rows: int = task.tree.rows(model.config.vocab_size) if isinstance(task, TextToText) else len(batch.rows)
        for tensors in zip(*(torch.split(tensor, rows) for tensor in inputs.values()), strict=True):
            given = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
            outputs = torch.from_numpy(own.request.infer(given, share_inputs=True)[0])
            # The request uses its memory again.
            parts.append(task.tree.log_probabilities(outputs) if isinstance(task, TextToText) else outputs.clone())
        return torch.cat(parts)

    return label_scores
