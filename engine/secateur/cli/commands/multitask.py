"""`secateur multitask`: prune an encoder while it learns several tasks, configured by a YAML file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import Device, Json, RunFolder, Threads
from secateur.flow.loaded import described, device_named
from secateur.model.cost import parameters
from secateur.model.discovery import config_digest
from secateur.model.loading import load_complete
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError, first_line
from secateur.support.files import require_run_folder, write_atomically
from secateur.support.ledger import CELLS, ROWS, Ledger, content_hash
from secateur.tasks.fitting import read_tokenizer, reader_digest

# The results of a run, with their types.
RESULTS = {
    "settings": dict[str, Any], "density": float, "weights": int, "parameters": dict[str, int], "bytes": dict[str, int],
    "tasks": dict[str, dict[str, Any]], "seconds": float,
}  # fmt: skip


@output.resumes
def multitask(
    config: Annotated[
        Path, typer.Argument(help="YAML file with model, tasks, pruning, schedule and training (docs/usage/multitask.md).")
    ],
    out: RunFolder,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prune a shared encoder while fine-tuning it on several tasks (Xia and Shin 2021); write encoder, heads and report."""
    from secateur.learned.multitask import config as configs
    from secateur.learned.multitask.exporting import export, load, save
    from secateur.learned.multitask.run import TaskData, prepare, run, scores_from

    inputs.use_threads(threads)
    require_run_folder(out)
    read, said = configs.read_config(config)
    data = {name: TaskData(*configs.load_task(name, about)) for name, about in read.tasks.items()}
    place = device_named(device)
    arguments = configs.training_arguments(
        read, {name: len(task_data.train) for name, task_data in data.items()}, out / "checkpoints", place.type
    )
    encoder, tokenizer = load_encoder(read.model)
    pruning: dict[str, Any] = {**vars(read.pruning), "schedule": read.schedule, "pooling": read.pooling}
    scored = pruning.pop("initial_scores")
    if scored is not None:
        pruning["initial_scores"] = scores_from(
            load(scored), encoder, tokenizer, data, granularity=read.pruning.granularity, max_length=read.max_length
        )
    prepared = prepare(encoder, tokenizer, data, seed=arguments.seed, max_length=read.max_length, **pruning)
    if arguments.process_index:  # Under torchrun, only the first process writes.
        if not (out / CELLS).exists() or not (out / CELLS).read_bytes().endswith(b"\n"):
            run(prepared, arguments, learning_rates=read.learning_rates)
        return
    settings = {
        "config": said,
        # Another model, tokenizer or data under the same names would give other masks.
        "tokenizer": reader_digest(tokenizer), "architecture": config_digest(encoder), "weights": weights_digest(encoder),
        ROWS: content_hash([[task_data.train, task_data.test] for task_data in data.values()]),
    }  # fmt: skip
    with Ledger(out, settings, RESULTS) as ledger:
        cell = {"model": read.model}
        if cell not in ledger:
            result = run(prepared, arguments, learning_rates=read.learning_rates, progress=bars())
            exported = export(result.pruning.cpu())
            if not (out / "model").exists():
                save(exported, out / "model", tokenizer=tokenizer, sparse=read.pruning.granularity == "element")
            write_atomically(out / "training.jsonl", "".join(json.dumps(row) + "\n" for row in result.log))
            ledger.add(cell, report(result, encoder, exported.encoder, out / "model"))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (document,) = ledger.rows()
        write_atomically(out / "report.json", json.dumps(document, indent=1) + "\n")
    output.emit({"out": str(out), **document}, as_json, output.evaluations_table(document["tasks"]), *lines(document, out))


def report(result: Any, dense: nn.Module, pruned: nn.Module, folder: Path) -> dict[str, Any]:
    """Return the report of a finished run: scores, density, sizes."""
    files = {"dense checkpoint": "encoder/model.safetensors", "sparse checkpoint": "encoder.sparse.safetensors"}
    return {
        "settings": result.pruning.settings(),
        "density": result.pruning.reached,
        "weights": result.pruning.stored,
        "parameters": {"dense": parameters(dense), "pruned": parameters(pruned)},
        "bytes": {name: (folder / path).stat().st_size for name, path in files.items() if (folder / path).exists()},
        "tasks": {name: evaluation.to_json() for name, evaluation in result.evaluations.items()},
        "seconds": round(result.seconds, 1),
    }


def lines(document: dict[str, Any], out: Path) -> list[str]:
    """Return the lines of the report below its table."""
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in document["bytes"].items())
    settings = document["settings"]
    return [
        f"{settings['method']}, {settings['granularity']}, {settings['scope']}: {document['density']:.4f} of the encoder's "
        f"linear weights stay ({document['weights']:,}); {sizes}",
        f"encoder, heads and report in {out}",
    ]


def load_encoder(name: str) -> tuple[nn.Module, Any]:
    """Load an encoder in float32, and its tokenizer.

    Args:
        name: A folder, a Hub name, or "builtin" for the encoder of the built-in T5.

    Raises:
        InputError: It cannot be loaded as an encoder.
    """
    from transformers import AutoModelForTextEncoding
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if name == "builtin":
        from secateur.data import builtin
        from secateur.learned.multitask.model import encoder_of

        model, tokenizer = builtin.load()
        return encoder_of(model), tokenizer
    name, _ = described(name)
    try:
        return load_complete(AutoModelForTextEncoding, name, dtype="float32").eval(), read_tokenizer(name)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"model: {name!r} cannot be loaded as an encoder: {first_line(error)}") from error
