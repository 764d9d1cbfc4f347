"""Checks of a checkpoint before its model is built. Error messages say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.support.compat import auto_architectures, has_auto_model, own_code_error
from secateur.support.errors import FieldError, InputError, first_line, reading
from secateur.support.fields import read_object, shown
from secateur.tasks import Task

# transformers, tokenizers and torch raise exceptions of any type for a damaged file: TypeError, RuntimeError, plain Exception.
FOREIGN: tuple[type[Exception], ...] = (Exception,)
_MOST_LAYERS, _MOST_LABELS = 10_000, 1_000_000
_LAYERS = re.compile(r"layers?$")


def require_bounded(folder: str) -> None:
    """Check that a folder's config.json, if there is one, is a JSON object whose numbers are those of a model.

    transformers builds one module for each layer and one text for each label, so a wrong number may take hours.

    Args:
        folder: The folder or Hub name of a model.

    Raises:
        InputError: The file cannot be read, or a number is out of range.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    with reading("model", path, "is not a model's config"):
        for name, value in _numbers(read_object(path)):
            most = _MOST_LAYERS if _LAYERS.search(name) else _MOST_LABELS if name == "num_labels" else 2**63 - 1
            if abs(value) > most:
                raise FieldError(f"{name}: expected at most {most}, got {shown(value)}")


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of an object and of the objects in it, with their names."""
    for name, value in content.items():
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, dict):
            yield from _numbers(value)


def require_no_gguf(name: str) -> None:
    """Refuse GGUF files.

    Raises:
        InputError: The name is a GGUF file, or a folder that holds no other model.
    """
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
    """Refuse quantised checkpoints: their linear layers hold packed codes, whose rows cannot be cut.

    Raises:
        InputError: The checkpoint is quantised.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    fields = quantisation if isinstance(quantisation, Mapping) else vars(quantisation)
    in_bits = fields.get("load_in_4bit") or fields.get("load_in_8bit")
    method = fields.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    raise InputError(
        f"model: expected ordinary weights (float32, float16 or bfloat16), got {name!r}, quantised by "
        f"{getattr(method, 'value', method)}: "
        "load it dequantised (model.dequantize(), then save_pretrained), or prune the unquantised model and quantise the result"
    )


def require_no_own_code(name: str, config: Any) -> None:
    """Refuse a checkpoint that brings the code of its model's class, where transformers has no class of that name.

    transformers would load the stock class of the same model type, which may compute other outputs. Folders of pruned models
    that secateur wrote bring a copy of secateur's own code, and pass.

    Raises:
        InputError: transformers lacks a class that the config names.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if (
        getattr(config, "auto_map", None)
        and not hasattr(config, "secateur")
        and not all(hasattr(transformers, n) for n in names)
    ):
        raise own_code_error(name)


def require_architecture(name: str, config: Any, kind: str, tasks: Mapping[str, type[Task]]) -> None:
    """Check that transformers has a model of this architecture for the task, and that the checkpoint's head is not another's.

    Heads of two tasks may have weights of one name and shape: BERT's for sequences and for tokens, or a decoder that is tied to
    its embedding and was trained as a classifier.

    Args:
        name: The folder or Hub name of the model.
        config: Its config.
        kind: The kind of task.
        tasks: The classes of all kinds of task by name.

    Raises:
        InputError: It has none, or the config names a class for another task.
    """
    fitting = [known for known, task in tasks.items() if has_auto_model(task.auto_class, config)]
    if kind not in fitting:
        raise InputError(
            f"task: expected {' or '.join(fitting) or 'another model'} for {name!r}, as transformers has it for the "
            f"architecture {config.model_type!r}, got {kind!r}"
        )
    architecture = architecture_of(config)
    own = [known for known, task in tasks.items() if architecture in auto_architectures(task.auto_class)]
    if own and kind not in own:
        raise InputError(f"task: expected {' or '.join(own)} for {name!r}, a {architecture}, got {kind!r}")


def architecture_of(config: Any) -> str:
    """Return the name of the model class that a config names first, without secateur's prefix; empty without one."""
    named = getattr(config, "architectures", None) or [""]
    return str(named[0] if isinstance(named, list) else named).removeprefix("Pruned")


def unreachable(name: str, error: Exception) -> InputError:
    """Return the error for a model that cannot be downloaded or read: it is gated, missing or out of reach."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return InputError(
            f"model: {name!r} is gated on the Hub: ask for access on its page, then run `hf auth login` with a token of yours"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return InputError(f"model: no such model folder or Hub model: {name!r} (if it is private: run `hf auth login`)")
    if (Path(name) / "config.json").is_file():
        return InputError(f"model: {str(Path(name) / 'config.json')!r} is not a model's config ({first_line(error)})")
    return InputError(f"model: no such model folder or Hub model: {name!r} ({first_line(error)})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
