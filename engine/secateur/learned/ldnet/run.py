"""LD-Net's two stages: train a tagger with all layers, then with a penalty on the layers' gates; closed layers are deleted."""

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
from secateur.support.progress import Progress

# How often the loss and the gates are logged in a stage.
LOGGED = 50


@dataclass(frozen=True)
class Stage:
    """How a stage is trained.

    Args:
        epochs: Passes over the training sentences.
        batch_size: Sentences in a batch.
        learning_rate: The learning rate of SGD in the first epoch.
        seed: The seed of the order of the sentences and of dropout.
    """

    epochs: float
    batch_size: int = 10
    learning_rate: float = 0.015
    seed: int = 0


def new_tagger(
    models: LanguageModels, vocabulary: Vocabulary, sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any
) -> Tagger:
    """Build an untrained tagger on language models, for the words, characters and tags of the sentences.

    Args:
        models: The language models. The tagger copies them and freezes the copies.
        vocabulary: Their vocabulary.
        sentences: The training sentences.
        scheme: The scheme of the tags.
        sizes: Further fields of `TaggerSettings`.

    Returns:
        The tagger.
    """
    tagger = _tagger(
        vocabulary, sentences, scheme,
        lm_width=models.ahead.embedding.embedding_dim, ahead=tuple(models.ahead.dense.widths),
        back=tuple(models.back.dense.widths), **sizes,
    )  # fmt: skip
    tagger.context.take_from_(models)
    return tagger


def tagger_without_lm(sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any) -> Tagger:
    """Build an untrained tagger as `new_tagger` does, but without language models and without features of their states.

    Args:
        sentences: The training sentences.
        scheme: The scheme of the tags.
        sizes: Further fields of `TaggerSettings`.

    Returns:
        The tagger.
    """
    without_lm: dict[str, Any] = {"lm_width": 1, "ahead": (), "back": (), "features": 0}
    return _tagger(Vocabulary([UNKNOWN, BOUNDARY]), sentences, scheme, **{**sizes, **without_lm})


def _tagger(vocabulary: Vocabulary, sentences: Sequence[Sentence], scheme: TagScheme, **sizes: Any) -> Tagger:
    """Build a tagger with word and character vocabularies from the sentences."""
    tags = tuple(sorted({tag for sentence in sentences for tag in sentence.tags}))
    settings = TaggerSettings(tags=tags, scheme=scheme, **sizes)
    tokens = [token for sentence in sentences for token in sentence.tokens]
    # Words that occur once become the unknown word, so that its embedding is trained.
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
    """Train a tagger in place, with checkpoints.

    Args:
        tagger: The tagger.
        sentences: The training sentences.
        dev: The sentences to evaluate on after every epoch.
        stage: How to train.
        folder: The checkpoints' folder. Training continues from its last checkpoint, and removes the folder at the end.
        device: The device's name; "cpu" makes the Trainer use the CPU.
        penalty: The penalty on the gates, or None in the first stage.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        The Trainer's log, and the time in seconds.

    Raises:
        InputError: A tag is not one of the tagger's, or as in `ldnet_arguments`.
    """
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
    """Delete the closed layers and report what changed.

    Args:
        whole: The tagger before the stage with the penalty.
        trained: The tagger after it.
        dev: The sentences to evaluate on.
        wanted: The number of layers that the penalty lets stay.

    Returns:
        The tagger without its closed layers, and a JSON document: layers, gates, FLOPs a word and the metric, before and after.
    """
    pruned = delete_closed(trained)
    directions = zip(("forward", "backward"), trained.gates, strict=True)
    document = {
        "layers": {
            "before": sum(len(gates) for gates in whole.gates), "after": sum(len(gates) for gates in pruned.gates),
            "wanted": wanted,
        },
        "gates": {name: gates.tolist() for name, gates in directions},
        "flops per word": {"before": flops_per_word(whole), "after": flops_per_word(pruned)},
        "evaluation": {"before": evaluate(whole, dev).to_json(), "after": evaluate(pruned, dev).to_json()},
    }  # fmt: skip
    return pruned, document
