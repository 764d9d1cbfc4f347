"""Names on the Hugging Face Hub: looked up once, without the minutes of retries that a download makes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.support.errors import InputError

_SECONDS = 10  # The Hub has this long to tell whether it has a name.
# Of the models that this process has asked the Hub for, by name: the metadata of their cards, and the names of their files.
_cards: dict[str, Any] = {}
_files: dict[str, set[str]] = {}


def on_hub(name: str, argument: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether the Hub can be reached and has a repository.

    Args:
        name: Its name, "owner/name" or "name".
        argument: The argument that an error message begins with.
        kind: Its kind.

    Returns:
        True if it has; False if the Hub cannot be reached or does not answer properly.

    Raises:
        InputError: Nothing on the Hub can have the name, or it is meant as a path: its first part is a folder here.
        RepositoryNotFoundError: There is no such repository, or it is private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    what = "model folder" if kind == "model" else "file"
    if "/" in name and Path(name.partition("/")[0]).is_dir():
        raise InputError(f"{argument}: no such {what}: {name!r}")
    try:
        info: Any = HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except HFValidationError as error:
        raise InputError(f"{argument}: no such {what}: {name!r}, which is no name on the Hub either") from error
    except RepositoryNotFoundError:
        raise
    except Exception:  # The HTTP client has errors of many types. The caller then uses what is on this machine.
        return False
    if kind == "model":
        _cards[name] = info.card_data
        _files[name] = {file.rfilename for file in info.siblings or ()}
    return True


def model_place(name: str) -> str:
    """Return where to load a model from: its name, or the folder of its files in the cache if the Hub cannot be reached.

    Args:
        name: The name of the model on the Hub.

    Raises:
        InputError: The name cannot be one, or the Hub cannot be reached and the cache does not have the model.
        RepositoryNotFoundError: The Hub has no such model.
    """
    if on_hub(name, "model", "model"):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"model: no such model folder: {name!r}; the Hub cannot be reached, and its cache here lacks the model"
        ) from error


def with_whole_folder(name: str, mark: str, *, needed: bool) -> str:
    """Return the folder of all files of a model on the Hub if it has a certain one, else its name.

    Args:
        name: The name of the model on the Hub, from `model_place`, which has asked for its files.
        mark: The name of the file.
        needed: Whether the folder is needed without the file too.
    """
    from huggingface_hub import snapshot_download

    return snapshot_download(name) if needed or mark in _files[name] else name


def require_dataset(name: str) -> None:
    """Refuse the name of a data set that neither the Hub nor the cache of `datasets` has.

    Args:
        name: The name of the data set on the Hub.

    Raises:
        InputError: Nothing can be loaded by this name.
    """
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if on_hub(name, "data", "dataset"):
            return
    except RepositoryNotFoundError as error:
        raise InputError(f"data: no such file or Hub data set: {name!r} (if it is private: run `hf auth login`)") from error
    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        raise InputError(f"data: no such file: {name!r}; the Hub cannot be reached, and the cache here lacks such a data set")


@dataclass(frozen=True)
class Base:
    """The model that another one was made from, as a model card's metadata name it.

    Attributes:
        name: Its name on the Hub, or that of its own base; None if nothing tells.
        metadata: The license and the languages of its card, by the names of the metadata; without those that the card lacks.
    """

    name: str | None
    metadata: dict[str, Any]


def base_of(name: str) -> Base:
    """Return what is known of a model that was loaded by a name: by the card in its folder, the Hub's cache, or the Hub.

    The Hub is not asked again for a model whose name this process has looked up.

    Args:
        name: The folder or Hub name. "" for none.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError

    if not name:
        return Base(None, {})
    if Path(name).is_dir():
        card = Path(name) / "README.md"
        known = _metadata(ModelCard.load, card) if card.is_file() else {}
        cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", name)
        # A folder of the cache is the Hub's model. Another folder has no name there, but its card may tell its base.
        return Base(cached.group(1).replace("--", "/") if cached else known.pop("base_model", None), _chosen(known))
    if name not in _cards:
        try:
            _cards[name] = HfApi().model_info(name, timeout=_SECONDS).card_data
        except HFValidationError:
            return Base(None, {})
        except Exception:  # The HTTP client has errors of many types. The cache may still have the model.
            return _cached(name)
    return Base(name, _chosen({} if _cards[name] is None else _cards[name].to_dict()))


def _cached(name: str) -> Base:
    """What the Hub's cache on this machine knows of a model."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Base(None, {})
    card = try_to_load_from_cache(name, "README.md")
    return Base(name, _chosen(_metadata(ModelCard.load, card)) if isinstance(card, str) else {})


def _metadata(load: Any, card: str | Path) -> dict[str, Any]:
    """The metadata of a card's file. Empty for a card whose metadata cannot be read: it is the base model's, not ours."""
    try:
        metadata: dict[str, Any] = load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # The YAML parser has errors of many types.
        return {}
    return metadata


def _chosen(metadata: dict[str, Any]) -> dict[str, Any]:
    """The license and the languages of a card's metadata."""
    names = ("license", "license_name", "license_link", "language")
    return {name: metadata[name] for name in names if metadata.get(name)}
