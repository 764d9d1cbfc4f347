"""save and load: write and read a Hugging Face folder, with its own modelling file where no stock config fits the model."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.model import modeling
from secateur.model.loading import is_needed, listed, load_complete
from secateur.model.modeling import pruned_class
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_model, require_writable
from secateur.model.recipe import renamed, require_recipe
from secateur.pruning.describe import stock_class
from secateur.pruning.per_layer_config import per_layer_config
from secateur.support.compat import auto_model_classes, forget_renaming_, has_auto_model
from secateur.support.errors import InputError, reading
from secateur.support.fields import read_object
from secateur.support.files import new_folder
from secateur.tasks import Task
from secateur.tasks.base import require_fit
from secateur.tasks.task_file import TASK_FILE, task_file

MODELING_FILE = "modeling_secateur.py"


def save(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,
    task: Task | None = None,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a folder that `AutoModel...from_pretrained` and `secateur.load` read, of safetensors and JSON only.

    A model that a stock config describes needs nothing else. For other models the folder carries a small modelling file, which
    `from_pretrained(..., trust_remote_code=True)` runs without secateur; `secateur.load` needs no remote code. The folder
    appears under its name when it is complete.

    Args:
        model: The model.
        out: The path of the folder.
        tokenizer: The tokenizer or the image processor to save with the model. By default the task's, if there is a task.
        task: The task that the model is for. secateur.json then holds its name, labels and prompt, and later commands use them.
        extra: Further files, contents by name.

    Raises:
        InputError: `out` exists; the model has hooks or forward methods that a folder does not hold; or no stock config
            describes its shape and its class is outside transformers, or holds other weights than its class in transformers;
            or the task does not fit the model, is of a class of your own, or its reader cannot be saved.
    """
    require_model(model)
    require_values(model)
    if task is not None:
        require_fit(task, model)
        extra = {TASK_FILE: task_file(task), **(extra or {})}
        tokenizer = task.reader if tokenizer is None else tokenizer
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise InputError(f"tokenizer: expected one with save_pretrained, to write to out, got {type(tokenizer).__name__}")
    forget_gguf_(model)
    require_writable(model)
    if hasattr(model.config, "secateur"):
        _require_known_class(model)
    with new_folder(out) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if hasattr(model.config, "secateur"):
            _add_modeling_file(model, folder)
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def forget_gguf_(model: Any) -> None:
    """Remove the mark "quantised" from a model whose weights transformers has read from GGUF into plain ones.

    A model with the mark cannot be saved.
    """
    if getattr(model, "quantization_method", None) != "gguf" or any("gguf" in type(m).__module__ for m in model.modules()):
        return
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


@torch.inference_mode(False)  # No inference tensors: the model may outlive the caller's inference mode.
def load(folder: str | Path, **options: Any) -> nn.Module:
    """Return the model that `save` wrote, in the dtype it was saved in. No remote code runs.

    Args:
        folder: The folder.
        options: Options of `from_pretrained`.

    Raises:
        InputError: There is no such folder, or it holds no model of a known class or not all weights of the model.
    """
    cls: Any = class_of(folder)
    options.pop("trust_remote_code", None)  # No code of the folder runs.
    # transformers and safetensors raise exceptions of any type for damaged files.
    with reading("model", folder, f"cannot be loaded as {cls.__name__}", typed=False, also=(Exception,)):
        old = _old_names(Path(folder), cls)
        mapping = {**{f"^{re.escape(name)}$": new for name, new in old.items()}, **(options.pop("key_mapping", None) or {})}
        model = load_complete(cls, str(folder), **{"dtype": "auto", "key_mapping": mapping or None, **options})
    forget_renaming_(model, old.values())
    for parameter in model.parameters():
        # The file sets the alignment of the weights in memory, and the rounding of a product depends on the alignment.
        parameter.data = parameter.data.clone()
    return model


def _old_names(folder: Path, cls: Any) -> dict[str, str]:
    """Return the names of tensors that folders of earlier versions have for others, with the names of today."""
    recipe = read_object(folder / "config.json").get("secateur")
    if recipe is None:
        return {}
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    # Where a folder has both names, the old one stays as it is, and is refused as a weight that the model does not have.
    return {name: new for name, new in renamed(recipe, names, f"{cls.base_model_prefix}.").items() if new not in names}


def class_of(folder: str | Path) -> type[nn.Module]:
    """Return the class of the model in a folder that `save` wrote. Raises InputError as `load`."""
    import transformers

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"model: expected a folder with a config.json, got {str(folder)!r}")
    with reading("model", path, "is not a model's config"):
        config = read_object(path)
        name = config["architectures"][0]
        if "secateur" in config:
            require_recipe(config["secateur"])
    stock: Any = getattr(transformers, str(name).removeprefix("Pruned"), None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise InputError(f"model: expected a class of transformers in {str(path)!r}, got {name!r}")
    cls: type[nn.Module] = pruned_class(stock) if "secateur" in config else stock
    return cls


def _is_pruned(cls: type[nn.Module]) -> bool:
    """Return whether `pruned_class` made a class, here or in the modelling file of a folder."""
    return cls.__name__.startswith("Pruned") and cls.__module__.rpartition(".")[2] in ("modeling", Path(MODELING_FILE).stem)


def _require_known_class(model: nn.Module) -> None:
    """Raise InputError unless the class that a folder names builds this model, whose config has a recipe."""
    import transformers

    stock = stock_class(model)
    own = [cls for cls in type(model).__mro__ if issubclass(cls, stock) and cls is not stock and not _is_pruned(cls)]
    changes = any(inspect.isfunction(value) or isinstance(value, property) for cls in own for value in vars(cls).values())
    exported = getattr(transformers, stock.__name__, None) is stock
    if not exported or changes or not has_auto_model("AutoModel", model.config):
        raise InputError(
            f"model: expected a class of transformers, which a folder of a shape that no stock config describes can build on, "
            f"got {type(model).__name__}; save a uniform plan, or the pruned model's state_dict and its config.secateur"
        )
    with torch.device("meta"):
        built = pruned_class(stock)(copy.deepcopy(model.config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if odd := [name for name in odd if name in shapes or is_needed(built, name)]:
        raise InputError(
            f"model: expected the modules of transformers' {stock.__name__}, got other weights: {listed(odd)}; save the pruned "
            "model's state_dict and its config.secateur"
        )


def _add_modeling_file(model: nn.Module, folder: Path) -> None:
    """Write the folder's own copy of `modeling.py`, the classes built with it, and the config's pointers to them."""
    import transformers

    stock = stock_class(model)
    encoder = auto_model_classes("AutoModelForTextEncoding", model.config)
    # T5's encoder has a class of its own, which is not the base of T5's other classes.
    base = stock if encoder == (stock,) else auto_model_classes("AutoModel", model.config)[0]
    auto = {"AutoModel": base.__name__}
    if encoder == (base,):
        auto["AutoModelForTextEncoding"] = base.__name__
    for name in dir(transformers):  # Every Auto class that makes this head from this config.
        if name.startswith("AutoModelFor") and auto_model_classes(name, model.config) == (stock,):
            auto[name] = stock.__name__
    lines = [Path(modeling.__file__).read_text(encoding="utf-8")]
    for cls in dict.fromkeys((base, stock)):
        lines.append(f"\nfrom {cls.__module__} import {cls.__name__}  # noqa: E402\n")
        lines.append(f"Pruned{cls.__name__} = pruned_class({cls.__name__})")
    (folder / MODELING_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {key: f"{Path(MODELING_FILE).stem}.Pruned{name}" for key, name in auto.items()}
    config["architectures"] = [stock.__name__]
    if (of_layers := per_layer_config(model)) is not None:
        config["per_layer_config"] = of_layers
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
