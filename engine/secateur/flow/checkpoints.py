"""Checks of a checkpoint before its model is built. Error messages say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.support.compat import has_auto_model, own_code_error
from secateur.support.errors import InputError, first_line
from secateur.tasks import Task

_MOST_LAYERS = 10_000
_LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("num_decoder_layers", "encoder_layers", "decoder_layers", "num_encoder_layers"),
)


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


def require_size(name: str, config: Any) -> None:
    """Refuse a config with so many layers that building its modules alone takes minutes.

    Raises:
        InputError: The config names more than 10,000 layers.
    """
    for part in (config, *(getattr(config, field, None) for field in getattr(config, "sub_configs", ()))):
        for field in _LAYER_COUNTS:
            count = getattr(part, field, None)
            if isinstance(count, int) and count > _MOST_LAYERS:
                raise InputError(
                    f"model: expected at most {_MOST_LAYERS} layers, got {field} {count} in the config of {name!r}"
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
    """Check that transformers has a model of this architecture for the task.

    Args:
        name: The folder or Hub name of the model.
        config: Its config.
        kind: The kind of task.
        tasks: The classes of all kinds of task by name.

    Raises:
        InputError: It has none.
    """
    fitting = [known for known, task in tasks.items() if has_auto_model(task.auto_class, config)]
    if kind not in fitting:
        raise InputError(
            f"task: expected {' or '.join(fitting) or 'another model'} for {name!r}, as transformers has it for the "
            f"architecture {config.model_type!r}, got {kind!r}"
        )


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
    return InputError(f"model: no such model folder or Hub model: {name!r} ({first_line(error)})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
