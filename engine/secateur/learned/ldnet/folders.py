"""Saving and loading of language models and taggers: a folder of safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.learned.ldnet.dense_lm import LanguageModels
from secateur.learned.ldnet.tagger import Tagger, TaggerSettings, Vocabularies
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import checked_fields, field_of, read_object, require_fields, shown
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
        config, vocabulary = LMConfig(**checked_fields("config", fields, LMConfig, whole=True)), Vocabulary(entries["words"])
        return config.build(len(vocabulary)), config, vocabulary

    return _load(folder, "language models", ("words",), build)


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
        return (Tagger(TaggerSettings(**checked_fields("config", fields, TaggerSettings, whole=True)), vocabularies),)

    return _load(folder, "tagger", ("lm", "words", "characters"), build)[0]


def _save(model: nn.Module, config: Mapping[str, Any], entries: Mapping[str, list[str]], folder: str | Path) -> None:
    """Write the config, the vocabularies and the weights to a new folder."""
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / VOCABULARY).write_text(json.dumps(entries, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, partial / WEIGHTS)


def _load(
    folder: str | Path, kind: str, names: Sequence[str], build: Callable[[dict[str, Any], dict[str, list[str]]], Built]
) -> Built:
    """Call `build` with the config's fields and the vocabularies; load the weights into the model that it returns first.

    `names` are the names of the vocabularies.
    """
    folder = Path(folder)
    # The folder of a run holds the model in a subfolder, beside its report.
    model_folder = folder if (folder / CONFIG).is_file() else folder / "model"
    if not (model_folder / CONFIG).is_file():
        raise InputError(f"model: expected a folder with {CONFIG}, {VOCABULARY} and {WEIGHTS}, got {str(folder)!r}")
    # A width beyond all bounds raises RuntimeError.
    with reading("model", folder, "cannot be loaded", typed=False, also=(RuntimeError,)):
        fields, entries = read_object(model_folder / CONFIG), read_object(model_folder / VOCABULARY)
        actual_kind = fields.pop("kind", None)
        if actual_kind != kind:
            raise InputError(f"model: expected the folder of {kind!r}, got {str(folder)!r} of {shown(actual_kind)}")
        require_fields("vocabulary", entries, dict.fromkeys(names, list[str]))
        weights = load_file(model_folder / WEIGHTS)
        wrong = next((name for name, values in weights.items() if not torch.isfinite(values).all()), None)
        if wrong is not None:
            raise InputError(f"model: expected finite weights in {str(folder)!r}, got NaN or inf in {wrong}")
        # First without memory: a damaged width may be far too large.
        with field_of("config"), torch.device("meta"):
            _require_weights(build(fields, entries)[0], weights)
        built = build(fields, entries)
        built[0].load_state_dict(weights)
    built[0].eval()
    return built


def _require_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise FieldError if the weights are not those of the config's model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in {**expected, **given} if expected.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        raise FieldError(f"{WEIGHTS}: expected {name} of shape {expected.get(name)}, got {given.get(name)}")
