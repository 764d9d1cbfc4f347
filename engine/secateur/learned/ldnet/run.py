"""LD-Net's two stages: a tagger is trained whole, then with a penalty on its language models' layers; those go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.conll import Sentence
from secateur.learned.ldnet.arguments import ldnet_arguments
from secateur.learned.ldnet.deletion import delete_closed, flops_per_word
from secateur.learned.ldnet.dense_lm import LanguageModels
from secateur.learned.ldnet.tagger import Tagger, TaggerSettings, TagScheme, Vocabularies
from secateur.learned.ldnet.tagger_training import GatePenalty, train
from secateur.learned.ldnet.tagging import evaluate
from secateur.learned.ldnet.vocabulary import BOUNDARY, UNKNOWN, Vocabulary, plain_form
from secateur.learned.shared.trainer import Progress

# Times in a stage that the loss and the gates are written down.
LOGGED = 50


@dataclass(frozen=True)
class Stage:
    """How a stage is trained; the arguments of the same names of Hugging Face's Trainer."""

    epochs: float
    batch_size: int = 10
    learning_rate: float = 0.015
    seed: int = 0


def new_tagger(
    models: LanguageModels, vocabulary: Vocabulary, sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any
) -> Tagger:
    """A tagger on the language models, which it copies and freezes, for the words, characters and tags of the sentences. sizes:
    of `TaggerSettings`."""
    tagger = _tagger(
        vocabulary, sentences, scheme,
        lm_width=models.ahead.embedding.embedding_dim, ahead=tuple(models.ahead.dense.widths),
        back=tuple(models.back.dense.widths), **sizes,
    )  # fmt: skip
    tagger.context.take_from_(models)
    return tagger


def tagger_without_lm(sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any) -> Tagger:
    """What `new_tagger` makes, less the language models and what is made of their states."""
    nothing: dict[str, Any] = {"lm_width": 1, "ahead": (), "back": (), "features": 0}
    return _tagger(Vocabulary([UNKNOWN, BOUNDARY]), sentences, scheme, **{**sizes, **nothing})


def _tagger(vocabulary: Vocabulary, sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any) -> Tagger:
    tags = tuple(sorted({tag for sentence in sentences for tag in sentence.tags}))
    settings = TaggerSettings(tags=tags, scheme=scheme, **sizes)
    tokens = [token for sentence in sentences for token in sentence.tokens]
    # Words that come once are left unknown, so that the unknown word is learned.
    words = Vocabulary.count(map(plain_form, tokens), at_least=2)
    characters = Vocabulary.count(character for token in tokens for character in token)
    return Tagger(settings, Vocabularies(vocabulary, words, characters))


def train_stage(
    tagger: Tagger,
    sentences: Sequence[Sentence],
    dev: Sequence[Sentence],
    stage: Stage,
    folder: Path,
    device: str,
    *,
    penalty: GatePenalty | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], float]:
    """Trains in place, with checkpoints in the folder, from which it goes on, and which is removed at the end. Returns the log
    and the seconds."""
    start = time.perf_counter()
    arguments = ldnet_arguments(
        folder, device, num_train_epochs=stage.epochs, per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=80, learning_rate=stage.learning_rate, seed=stage.seed, eval_strategy="epoch",
        save_strategy="epoch", logging_strategy="steps", logging_steps=1 / LOGGED,
    )  # fmt: skip
    log = train(tagger, sentences, dev, arguments, penalty=penalty, resume=True, progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    return log, time.perf_counter() - start


def deletion_report(whole: Tagger, trained: Tagger, dev: Sequence[Sentence], wanted: int) -> tuple[Tagger, dict[str, Any]]:
    """The tagger without its closed layers, and what changed: the metric before pruning and after, FLOPs a word, layers."""
    pruned = delete_closed(trained)
    gates = {name: each.tolist() for name, each in zip(("forward", "backward"), trained.gates, strict=True)}
    document = {
        "layers": {
            "before": sum(len(each) for each in whole.gates), "after": sum(len(each) for each in pruned.gates), "wanted": wanted
        },
        "gates": gates,
        "flops per word": {"before": flops_per_word(whole), "after": flops_per_word(pruned)},
        "evaluation": {"before": evaluate(whole, dev).to_json(), "after": evaluate(pruned, dev).to_json()},
    }  # fmt: skip
    return pruned, document
