"""Saving and loading of language models and taggers: a folder of safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.learned.ldnet.dense_lm import LanguageModels
from secateur.learned.ldnet.tagger import Tagger, TaggerSettings, Vocabularies
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.support.errors import InputError, reading
from secateur.support.files import new_folder

Built = TypeVar("Built", bound=tuple[Any, ...])
CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.json"


@dataclass(frozen=True)
class LMConfig:
    """The arguments of `LanguageModels`, but for the vocabulary's size.

    Args:
        width: The width of the word embeddings.
        widths: The widths of the layers.
        cutoffs: The cutoffs of the adaptive softmax.
        projection: The width that the softmax reads; 0 for no projection.
        layer_dropout: The probability in training that a layer is hidden from the later layers.
        dropout: The dropout probability in training of the elements that a layer reads.
    """

    width: int
    widths: tuple[int, ...]
    cutoffs: tuple[int, ...]
    projection: int = 0
    layer_dropout: float = 0.5
    dropout: float = 0.0

    def build(self, words: int) -> LanguageModels:
        """Build untrained language models over a vocabulary of `words` words."""
        return LanguageModels(
            words, self.width, self.widths, self.cutoffs,
            projection=self.projection, layer_dropout=self.layer_dropout, dropout=self.dropout,
        )  # fmt: skip


def save_lm(models: LanguageModels, config: LMConfig, vocabulary: Vocabulary, folder: str | Path) -> None:
    """Save language models to a new folder. If writing fails, nothing is left of it.

    Args:
        models: The language models.
        config: The config that they were built with.
        vocabulary: Their vocabulary.
        folder: The folder to create.

    Raises:
        InputError: The folder exists.
    """
    _save(models, {"kind": "language models", **asdict(config)}, {"words": vocabulary.entries}, folder)


def load_lm(folder: str | Path) -> tuple[LanguageModels, LMConfig, Vocabulary]:
    """Load language models.

    Args:
        folder: A folder that `save_lm` wrote, or the folder of the run that called it.

    Returns:
        The language models in eval mode, their config and their vocabulary.

    Raises:
        InputError: There is no such folder, it holds something else, or it is damaged.
    """

    def build(fields: dict[str, Any], entries: dict[str, list[str]]) -> tuple[LanguageModels, LMConfig, Vocabulary]:
        config, vocabulary = LMConfig(**fields), Vocabulary(entries["words"])
        return config.build(len(vocabulary)), config, vocabulary

    return _load(folder, "language models", build)


def save_tagger(tagger: Tagger, folder: str | Path) -> None:
    """Save a tagger to a new folder. If writing fails, nothing is left of it.

    Args:
        tagger: The tagger.
        folder: The folder to create.

    Raises:
        InputError: The folder exists.
    """
    vocabularies = tagger.vocabularies
    entries = {
        "lm": vocabularies.lm.entries,
        "words": vocabularies.words.entries,
        "characters": vocabularies.characters.entries,
    }
    _save(tagger, {"kind": "tagger", **tagger.settings.to_json()}, entries, folder)


def load_tagger(folder: str | Path) -> Tagger:
    """Load a tagger.

    Args:
        folder: A folder that `save_tagger` wrote, or the folder of the run that called it.

    Returns:
        The tagger in eval mode. It has the same logits as the saved one.

    Raises:
        InputError: There is no such folder, it holds something else, or it is damaged.
    """

    def build(fields: dict[str, Any], entries: dict[str, list[str]]) -> tuple[Tagger]:
        vocabularies = Vocabularies(**{name: Vocabulary(vocabulary) for name, vocabulary in entries.items()})
        return (Tagger(TaggerSettings(**fields), vocabularies),)

    return _load(folder, "tagger", build)[0]


def _save(model: nn.Module, config: Mapping[str, Any], entries: Mapping[str, list[str]], folder: str | Path) -> None:
    """Write the config, the vocabularies and the weights to a new folder."""
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / VOCABULARY).write_text(json.dumps(entries, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, partial / WEIGHTS)


def _load(folder: str | Path, kind: str, build: Callable[[dict[str, Any], dict[str, list[str]]], Built]) -> Built:
    """Call `build` with the config's fields and the vocabularies; load the weights into the model that it returns first."""
    folder = Path(folder)
    # The folder of a run holds the model in a subfolder, beside its report.
    model_folder = folder if (folder / CONFIG).is_file() else folder / "model"
    if not (model_folder / CONFIG).is_file():
        raise InputError(f"model: expected a folder with {CONFIG}, {VOCABULARY} and {WEIGHTS}, got {str(folder)!r}")
    # The weights may be another model's: load_state_dict raises RuntimeError.
    with reading("model", folder, "cannot be loaded", typed=False, also=(RuntimeError,)):
        config = json.loads((model_folder / CONFIG).read_text(encoding="utf-8"))
        actual_kind = config.pop("kind", None)
        if actual_kind != kind:
            raise InputError(f"model: expected the folder of {kind!r}, got {str(folder)!r} of {actual_kind!r}")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        built = build(fields, json.loads((model_folder / VOCABULARY).read_text(encoding="utf-8")))
        weights = load_file(model_folder / WEIGHTS)
        wrong = next((name for name, values in weights.items() if not torch.isfinite(values).all()), None)
        if wrong is not None:
            raise InputError(f"model: expected finite weights in {str(folder)!r}, got NaN or inf in {wrong}")
        built[0].load_state_dict(weights)
    built[0].eval()
    return built
