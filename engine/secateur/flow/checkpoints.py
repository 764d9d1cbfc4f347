"""Checks of a checkpoint before a model is made of it. Each refusal tells the user what to do instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.support.compat import has_auto_model
from secateur.support.errors import InputError, first_line
from secateur.tasks import Task


def require_no_gguf(name: str) -> None:
    """Check that the name is no GGUF file, and no folder with only GGUF files to load. Raises InputError if it is."""
    path = Path(name)
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if path.suffix == ".gguf" or files:
        file = files[0] if files else path
        raise InputError(
            f"model: expected a folder of safetensors, got the GGUF file {str(file)!r}: load it dequantised, by "
            f"from_pretrained(FOLDER, gguf_file={file.name!r}) of its Auto class, and "
            "give the folder that save_pretrained then writes"
        )


def require_plain(name: str, config: Any) -> None:
    """Check that a checkpoint is not quantised. Raises InputError if it is: quantised linear layers hold packed codes, so no
    rows can be cut from them."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return
    settings = about if isinstance(about, Mapping) else vars(about)
    in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    raise InputError(
        f"model: expected ordinary weights (float32, float16 or bfloat16), got {name!r}, quantised by "
        f"{getattr(method, 'value', method)}: "
        "load it dequantised (model.dequantize(), then save_pretrained), or prune what it was made from and quantise that"
    )


def require_architecture(name: str, config: Any, kind: str, tasks: Mapping[str, type[Task]]) -> None:
    """Check that transformers has a model of this architecture for the task. Raises InputError if it has none.

    Args:
        name: The folder or Hub name of the model.
        config: Its config.
        kind: The name of the task.
        tasks: The classes of all tasks by name.
    """
    fitting = [known for known, task in tasks.items() if has_auto_model(task.auto_class, config)]
    if kind not in fitting:
        raise InputError(
            f"task: expected {' or '.join(fitting) or 'another model'} for {name!r}, as transformers has it for the "
            f"architecture {config.model_type!r}, got {kind!r}"
        )


def unreachable(name: str, error: Exception) -> InputError:
    """The InputError for a model whose config could not be read: whether it is gated, missing, or out of reach."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return InputError(
            f"model: {name!r} is gated on the Hub: ask for access on its page, then run `hf auth login` with a token of yours"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return InputError(f"model: no such model folder or Hub model: {name!r} (if it is private: run `hf auth login`)")
    return InputError(f"model: no such model folder or Hub model: {name!r} ({first_line(error)})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
