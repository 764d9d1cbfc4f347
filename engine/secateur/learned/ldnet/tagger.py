"""A sequence tagger on language models: words, characters and the models' states into a BiLSTM, then a CRF."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.learned.ldnet.crf import ConditionalRandomField
from secateur.learned.ldnet.dense_lm import ContextStates, reverse
from secateur.learned.ldnet.vocabulary import Vocabulary, plain_form
from secateur.support.errors import InputError
from secateur.tasks.batches import pad

TagScheme = Literal["bioes", "plain"]
Features = dict[str, Any]
# Characters of a word that are read: longer words are cut.
LONGEST_WORD = 32
NO_CHARACTER = -1


@dataclass(frozen=True)
class TaggerSettings:
    """tags: by their numbers. scheme: "bioes" for tags of spans, or "plain" for others, such as parts of speech.

    lm_width: of the language models' embeddings; ahead, back: widths of their layers. features: width of what is made of their
    states (r_t), 0 for a tagger that reads no language model; hidden: of the tagger's LSTM in each direction. dropout is the
    tagger's, lm_dropout that within the models.
    """

    tags: tuple[str, ...]
    scheme: TagScheme
    lm_width: int
    ahead: tuple[int, ...]
    back: tuple[int, ...]
    features: int = 300
    word_width: int = 100
    character_width: int = 30
    character_filters: int = 50
    hidden: int = 150
    dropout: float = 0.5
    lm_dropout: float = 0.5

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Vocabularies:
    """lm: words of the language models. words: of the tagger's embeddings, in their plain form. characters: of words."""

    lm: Vocabulary
    words: Vocabulary
    characters: Vocabulary


class CharacterCNN(nn.Module):
    """What a word's characters tell: a convolution over three of them, the largest value of each filter (Ma and Hovy 2016)."""

    def __init__(self, characters: int, width: int, filters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.convolution = nn.Conv1d(width, filters, 3, padding=1)

    def forward(self, characters: Tensor) -> Tensor:
        """characters: int64 [words, longest], NO_CHARACTER after a word's end, to [words, filters]."""
        there = (characters != NO_CHARACTER).unsqueeze(1)
        embedded = self.embedding(characters.clamp(min=0)).transpose(1, 2) * there
        found: Tensor = self.convolution(embedded).masked_fill(~there, -torch.inf)
        return found.amax(2)


class Tagger(nn.Module):
    """LD-Net's sequence labelling (Liu et al. 2018, arXiv 1804.07827, section 3): r_t = ReLU(W_cr [h ; h_rev] + b) of the
    frozen language models' states, word embeddings and characters, a BiLSTM, a CRF. Inputs are those that `collate` makes."""

    def __init__(self, settings: TaggerSettings, vocabularies: Vocabularies) -> None:
        super().__init__()
        self.settings, self.vocabularies = settings, vocabularies
        self.context = ContextStates(
            len(vocabularies.lm), settings.lm_width, settings.ahead, settings.back, boundary=1, dropout=settings.lm_dropout
        )
        self.context.requires_grad_(False)
        with warnings.catch_warnings():
            # Without features there is nothing to initialise, of which torch warns.
            warnings.filterwarnings("ignore", message="Initializing zero-element")
            self.w_cr = nn.Linear(self.context.output_size, settings.features)
        self.words = nn.Embedding(len(vocabularies.words), settings.word_width)
        self.characters = CharacterCNN(len(vocabularies.characters), settings.character_width, settings.character_filters)
        size = settings.features + settings.word_width + settings.character_filters
        self.ahead = nn.LSTM(size, settings.hidden, batch_first=True)
        self.back = nn.LSTM(size, settings.hidden, batch_first=True)
        self.emission = nn.Linear(2 * settings.hidden, len(settings.tags))
        self.crf = ConditionalRandomField(len(settings.tags))

    @property
    def gates(self) -> list[nn.Parameter]:
        """The gates of the forward and of the backward language model's layers."""
        return [dense.gates for dense in self.context.directions]

    @property
    def all_gates(self) -> Tensor:
        """Those of both in a row [layers]."""
        return torch.cat([*self.gates])

    @property
    def layers_left(self) -> int:
        """How many layers of both language models have a gate above zero."""
        return int(self.all_gates.count_nonzero())

    def emissions(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor) -> Tensor:
        """A score of each tag for each word [B, T, tags]. lm_words, words: int64 [B, T]; characters [B, T, longest]; mask [B,
        T], bool."""
        read = functional.relu(self.w_cr(self._drop(self.context(lm_words, mask))))
        spelled = read.new_zeros(*mask.shape, self.settings.character_filters)
        spelled[mask] = self.characters(characters[mask])
        x = self._drop(torch.cat([read, self.words(words), spelled], -1))
        ahead, _ = self.ahead(x)
        back, _ = self.back(reverse(x, mask))
        emissions: Tensor = self.emission(self._drop(torch.cat([ahead, reverse(back, mask)], -1)))
        return emissions

    def forward(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """The mean over sentences of -log P(tags), as a Trainer wants it. tags: int64 [B, T]."""
        emissions = self.emissions(lm_words, words, characters, mask)
        return {"loss": -self.crf.log_likelihood(emissions, tags, mask).mean()}

    def decode(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor) -> list[list[str]]:
        """The most likely tags of each sentence."""
        paths = self.crf.decode(self.emissions(lm_words, words, characters, mask), mask)
        return [[self.settings.tags[number] for number in path] for path in paths]

    def featurise(self, tokens: Sequence[str], tags: Sequence[str] | None = None) -> Features:
        """A sentence as numbers. Raises InputError for a tag that the tagger does not have, or no tokens."""
        if not tokens:
            raise InputError("tokens: expected at least one, got none")
        known = self.vocabularies
        spelled = [[1, *known.characters.numbers(token[:LONGEST_WORD]), 1] for token in tokens]
        found: Features = {
            "lm_words": known.lm.numbers(tokens),
            "words": known.words.numbers(map(plain_form, tokens)),
            "characters": spelled,
        }
        if tags is not None:
            for tag in tags:
                if tag not in self.settings.tags:
                    raise InputError(f"tags: expected some of {', '.join(self.settings.tags)}, got {tag!r}")
            found["tags"] = [self.settings.tags.index(tag) for tag in tags]
        return found

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.settings.dropout, self.training)


def collate(rows: Sequence[Features]) -> dict[str, Tensor]:
    """Sentences of `Tagger.featurise` as keyword arguments of the tagger's methods, on the CPU; tags where the rows have
    them."""
    cpu = torch.device("cpu")
    names = [name for name in ("lm_words", "words", "tags") if name in rows[0]]
    batch: dict[str, Tensor] = {name: pad([row[name] for row in rows], 0, cpu) for name in names}
    batch["mask"] = pad([[1] * len(row["words"]) for row in rows], 0, cpu).bool()
    longest = max(len(spelled) for row in rows for spelled in row["characters"])
    characters = torch.full((*batch["mask"].shape, longest), NO_CHARACTER)
    characters[batch["mask"]] = pad([spelled for row in rows for spelled in row["characters"]], NO_CHARACTER, cpu)
    return {**batch, "characters": characters}
