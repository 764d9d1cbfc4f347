"""Language models and taggers in folders: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    """As `LanguageModels` takes them; widths of the layers."""

    width: int
    widths: tuple[int, ...]
    cutoffs: tuple[int, ...]
    projection: int = 0
    layer_dropout: float = 0.5
    dropout: float = 0.0

    def build(self, words: int) -> LanguageModels:
        return LanguageModels(
            words, self.width, self.widths, self.cutoffs,
            projection=self.projection, layer_dropout=self.layer_dropout, dropout=self.dropout,
        )  # fmt: skip


def save_lm(models: LanguageModels, config: LMConfig, vocabulary: Vocabulary, folder: str | Path) -> None:
    """Writes a folder, which must not exist yet; nothing is left of it if writing fails. Raises InputError if it exists."""
    _save(models, {"kind": "language models", **asdict(config)}, {"words": vocabulary.entries}, folder)


def load_lm(folder: str | Path) -> tuple[LanguageModels, LMConfig, Vocabulary]:
    """The language models in eval mode, from the folder of `save_lm` or of the run that wrote it. Raises InputError: no such
    folder, or one of another kind, or one that is damaged."""

    def build(said: dict[str, Any], entries: dict[str, list[str]]) -> tuple[LanguageModels, LMConfig, Vocabulary]:
        config, vocabulary = LMConfig(**said), Vocabulary(entries["words"])
        return config.build(len(vocabulary)), config, vocabulary

    return _load(folder, "language models", build)


def save_tagger(tagger: Tagger, folder: str | Path) -> None:
    """As `save_lm`."""
    known = tagger.vocabularies
    entries = {"lm": known.lm.entries, "words": known.words.entries, "characters": known.characters.entries}
    _save(tagger, {"kind": "tagger", **tagger.settings.to_json()}, entries, folder)


def load_tagger(folder: str | Path) -> Tagger:
    """The tagger in eval mode, with the logits that it had. Raises InputError as `load_lm`."""

    def build(said: dict[str, Any], entries: dict[str, list[str]]) -> tuple[Tagger]:
        return (Tagger(TaggerSettings(**said), Vocabularies(**{name: Vocabulary(each) for name, each in entries.items()})),)

    return _load(folder, "tagger", build)[0]


def _save(model: nn.Module, config: Mapping[str, Any], entries: Mapping[str, list[str]], folder: str | Path) -> None:
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / VOCABULARY).write_text(json.dumps(entries, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, partial / WEIGHTS)
        # Which safetensors leaves to its owner alone.
        (partial / WEIGHTS).chmod(0o644)


def _load(folder: str | Path, kind: str, build: Callable[[dict[str, Any], dict[str, list[str]]], Built]) -> Built:
    """What `build` makes of the config and the vocabularies, a model first, with the folder's weights."""
    folder = Path(folder)
    # A run's folder has the model beside its report.
    place = folder if (folder / CONFIG).is_file() else folder / "model"
    if not (place / CONFIG).is_file():
        raise InputError(f"model: expected a folder with {CONFIG}, {VOCABULARY} and {WEIGHTS}, got {str(folder)!r}")
    # The weights may be another model's.
    with reading("model", folder, "cannot be loaded", typed=False, also=(RuntimeError,)):
        said = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        found = said.pop("kind", None)
        if found != kind:
            raise InputError(f"model: expected the folder of {kind!r}, got {str(folder)!r} of {found!r}")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
        built = build(fields, json.loads((place / VOCABULARY).read_text(encoding="utf-8")))
        built[0].load_state_dict(load_file(place / WEIGHTS))
    built[0].eval()
    return built
