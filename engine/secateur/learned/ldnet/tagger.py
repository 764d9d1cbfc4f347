"""A sequence tagger on language models: words, characters and the models' states feed a BiLSTM, then a CRF."""

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
from secateur.support.fields import require_count, require_within, shown
from secateur.tasks.batches import pad

TagScheme = Literal["bioes", "plain"]
Features = dict[str, Any]
# The number of characters that are read of a word; longer words are cut.
LONGEST_WORD = 32
NO_CHARACTER = -1


@dataclass(frozen=True)
class TaggerSettings:
    """The settings of a tagger, as its folder stores them.

    Args:
        tags: The tags; a tag's position is its number.
        scheme: "bioes" for tags of spans, "plain" for other tags, for example parts of speech.
        lm_width: The width of the language models' word embeddings.
        ahead: The widths of the forward language model's layers.
        back: The widths of the backward language model's layers.
        features: The width of r_t, the features of the language models' states; 0 for a tagger without language models.
        word_width: The width of the tagger's word embeddings.
        character_width: The width of the character embeddings.
        character_filters: The number of filters of the convolution over characters.
        hidden: The width of the tagger's LSTM in each direction.
        dropout: The tagger's dropout probability.
        lm_dropout: The dropout probability inside the language models.

    Raises:
        InputError: There are no tags or one occurs twice, a width is too small, or a probability is outside [0, 1).
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

    def __post_init__(self) -> None:
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise InputError(f"tags: expected different tags, at least one, got {shown(list(self.tags))}")
        for name in ("lm_width", "word_width", "character_width", "character_filters", "hidden"):
            require_count(name, getattr(self, name))
        require_count("features", self.features, 0)
        for name in ("dropout", "lm_dropout"):
            require_within(name, getattr(self, name), 0, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values by name."""
        return asdict(self)


@dataclass(frozen=True)
class Vocabularies:
    """The three vocabularies of a tagger.

    Args:
        lm: The words of the language models.
        words: The words of the tagger's word embeddings, in their plain form (see `plain_form`).
        characters: The characters of words.
    """

    lm: Vocabulary
    words: Vocabulary
    characters: Vocabulary


class CharacterCNN(nn.Module):
    """Features of a word's characters: a convolution over three characters, then the maximum of each filter.

    Args:
        characters: The number of characters in the vocabulary.
        width: The width of the character embeddings.
        filters: The number of filters.

    References:
        Ma and Hovy 2016, arXiv 1603.01354.
    """

    def __init__(self, characters: int, width: int, filters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.convolution = nn.Conv1d(width, filters, 3, padding=1)

    def forward(self, characters: Tensor) -> Tensor:
        """Compute the features of each word.

        Args:
            characters: Character numbers, int64 [words, longest], NO_CHARACTER after a word's end.

        Returns:
            Features, floating point [words, filters].
        """
        mask = (characters != NO_CHARACTER).unsqueeze(1)  # [words, 1, longest]
        embedded = self.embedding(characters.clamp(min=0)).transpose(1, 2) * mask  # [words, width, longest]
        filtered: Tensor = self.convolution(embedded).masked_fill(~mask, -torch.inf)  # [words, filters, longest]
        return filtered.amax(2)


class Tagger(nn.Module):
    """LD-Net's sequence tagger.

    A BiLSTM with a CRF reads three kinds of features: r_t = ReLU(W_cr [h ; h_rev] + b) of the frozen language models' states,
    word embeddings, and character features. `collate` builds the arguments of its methods.

    Args:
        settings: The settings.
        vocabularies: The vocabularies.

    References:
        Liu et al. 2018, arXiv 1804.07827, section 3.
    """

    def __init__(self, settings: TaggerSettings, vocabularies: Vocabularies) -> None:
        super().__init__()
        self.settings, self.vocabularies = settings, vocabularies
        self.context = ContextStates(
            len(vocabularies.lm), settings.lm_width, settings.ahead, settings.back, boundary=1, dropout=settings.lm_dropout
        )
        self.context.requires_grad_(False)
        with warnings.catch_warnings():
            # torch warns when it initialises the empty weight of a tagger without features.
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
        """The gates of the forward and of the backward language model, [layers] each."""
        return [dense.gates for dense in self.context.directions]

    @property
    def all_gates(self) -> Tensor:
        """The gates of both language models, concatenated [layers of both]."""
        return torch.cat([*self.gates])

    @property
    def layers_left(self) -> int:
        """The number of layers of both language models whose gate is not zero."""
        return int(self.all_gates.count_nonzero())

    def emissions(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor) -> Tensor:
        """Score each tag for each word.

        Args:
            lm_words: Word numbers of the language models, int64 [B, T].
            words: Word numbers of the tagger, int64 [B, T].
            characters: Character numbers, int64 [B, T, longest], NO_CHARACTER after a word's end.
            mask: Padding mask, bool [B, T], True at words.

        Returns:
            The CRF's emissions, floating point [B, T, tags].
        """
        lm_features = functional.relu(self.w_cr(self._drop(self.context(lm_words, mask))))  # [B, T, features]
        character_features = lm_features.new_zeros(*mask.shape, self.settings.character_filters)  # [B, T, filters]
        character_features[mask] = self.characters(characters[mask])
        x = self._drop(torch.cat([lm_features, self.words(words), character_features], -1))
        ahead, _ = self.ahead(x)  # [B, T, hidden]
        back, _ = self.back(reverse(x, mask))  # [B, T, hidden], in reversed order
        emissions: Tensor = self.emission(self._drop(torch.cat([ahead, reverse(back, mask)], -1)))
        return emissions

    def forward(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """Compute the mean over sentences of -log P(tags), in the form that a Trainer reads: {"loss": scalar}.

        Args:
            lm_words: As in `emissions`.
            words: As in `emissions`.
            characters: As in `emissions`.
            mask: As in `emissions`.
            tags: Tag numbers, int64 [B, T].
        """
        emissions = self.emissions(lm_words, words, characters, mask)
        return {"loss": -self.crf.log_likelihood(emissions, tags, mask).mean()}

    def decode(self, lm_words: Tensor, words: Tensor, characters: Tensor, mask: Tensor) -> list[list[str]]:
        """Return the most likely tags of each sentence. Arguments are as in `emissions`."""
        paths = self.crf.decode(self.emissions(lm_words, words, characters, mask), mask)
        return [[self.settings.tags[number] for number in path] for path in paths]

    def featurise(self, tokens: Sequence[str], tags: Sequence[str] | None = None) -> Features:
        """Turn a sentence into numbers.

        Args:
            tokens: The words.
            tags: Their tags, for training.

        Returns:
            "lm_words" and "words" (a number for each word), "characters" (a list for each word, with boundary marks) and, if
            tags are given, "tags".

        Raises:
            InputError: There are no tokens, or a tag is not one of the tagger's.
        """
        if not tokens:
            raise InputError("tokens: expected at least one, got none")
        vocabularies = self.vocabularies
        features: Features = {
            "lm_words": vocabularies.lm.numbers(tokens),
            "words": vocabularies.words.numbers(map(plain_form, tokens)),
            "characters": [[1, *vocabularies.characters.numbers(token[:LONGEST_WORD]), 1] for token in tokens],
        }
        if tags is not None:
            for tag in tags:
                if tag not in self.settings.tags:
                    raise InputError(f"tags: expected some of {', '.join(self.settings.tags)}, got {tag!r}")
            features["tags"] = [self.settings.tags.index(tag) for tag in tags]
        return features

    def _drop(self, x: Tensor) -> Tensor:
        """Apply the tagger's dropout."""
        return functional.dropout(x, self.settings.dropout, self.training)


def collate(rows: Sequence[Features]) -> dict[str, Tensor]:
    """Turn sentences into keyword arguments of the tagger's methods, on the CPU.

    Args:
        rows: Sentences from `Tagger.featurise`.

    Returns:
        "lm_words" and "words", int64 [B, T]; "characters", int64 [B, T, longest]; "mask", bool [B, T]; and "tags",
        int64 [B, T], if the rows have tags.
    """
    cpu = torch.device("cpu")
    names = [name for name in ("lm_words", "words", "tags") if name in rows[0]]
    batch: dict[str, Tensor] = {name: pad([row[name] for row in rows], 0, cpu) for name in names}
    batch["mask"] = pad([[1] * len(row["words"]) for row in rows], 0, cpu).bool()
    spellings = [spelling for row in rows for spelling in row["characters"]]
    longest = max(map(len, spellings))
    characters = torch.full((*batch["mask"].shape, longest), NO_CHARACTER)  # [B, T, longest]
    characters[batch["mask"]] = pad(spellings, NO_CHARACTER, cpu)  # [words, longest]
    return {**batch, "characters": characters}
