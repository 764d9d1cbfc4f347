"""Tagging of sentences, one batch at a time, and evaluation of a tagger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from secateur.data.conll import Scheme, Sentence, spans_of, tags_of
from secateur.learned.ldnet.tagger import Tagger, collate
from secateur.tasks.batches import model_device
from secateur.tasks.metrics import Evaluation, bootstrap, proportion


def tag(
    tagger: Tagger, sentences: Iterable[Sequence[str]], *, batch_size: int = 80, scheme: Scheme = "bio2"
) -> Iterator[tuple[list[str], list[str]]]:
    """Tag sentences, in order and a batch at a time, so their number is not limited by memory.

    The tagger runs in eval mode, and keeps the mode that it was in.

    Args:
        tagger: The tagger.
        sentences: The tokens of each sentence.
        batch_size: The number of sentences in a forward pass.
        scheme: The scheme in which to write the tags of spans.

    Yields:
        The tokens of a sentence and their tags. A sentence without tokens has no tags.
    """
    for tokens, tags in _decoded(tagger, sentences, batch_size):
        has_spans = tagger.settings.scheme == "bioes"
        yield tokens, tags_of(spans_of(tags), len(tags), scheme) if has_spans else tags


def evaluate(tagger: Tagger, sentences: Sequence[Sentence], *, batch_size: int = 80) -> Evaluation:
    """Evaluate a tagger.

    Args:
        tagger: The tagger. It runs in eval mode, and keeps the mode that it was in.
        sentences: The sentences with their true tags.
        batch_size: The number of sentences in a forward pass.

    Returns:
        F1 of spans as seqeval's default mode defines it, with a 95% bootstrap interval over sentences. For plain tags, the
        accuracy of words with its 95% interval.
    """
    decoded = _decoded(tagger, (sentence.tokens for sentence in sentences), batch_size)
    pairs = [(sentence.tags, tags) for sentence, (_, tags) in zip(sentences, decoded, strict=True)]
    if tagger.settings.scheme == "plain":
        right = [true == guess for true_tags, guesses in pairs for true, guess in zip(true_tags, guesses, strict=True)]
        return proportion("word accuracy", sum(right), len(right))
    return bootstrap("F1", len(sentences), span_f1(pairs))


def span_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Callable[[Sequence[int]], float]:
    """Build a function that computes the F1 of a selection of sentences.

    F1 = 2 right / (true + guessed), counted in spans; 0 if there are no spans.

    Args:
        pairs: The true and the guessed tags of each sentence.

    Returns:
        A function from sentence numbers, which may repeat, to the F1 of these sentences.
    """
    counts = []
    for true_tags, guessed_tags in pairs:
        true, guessed = set(spans_of(true_tags)), set(spans_of(guessed_tags))
        counts.append((len(true & guessed), len(true) + len(guessed)))
    table = torch.tensor(counts)  # [sentences, 2]: right spans, true + guessed spans

    def statistic(rows: Sequence[int]) -> float:
        right, both = table[list(rows)].sum(0).tolist()
        return 2 * right / both if both else 0.0

    return statistic


def _decoded(tagger: Tagger, sentences: Iterable[Sequence[str]], batch_size: int) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the tokens and the predicted tags of each sentence, a batch at a time."""
    device, remaining = model_device(tagger), iter(sentences)
    while batch := [list(tokens) for tokens in islice(remaining, batch_size)]:
        features = [tagger.featurise(tokens) for tokens in batch if tokens]
        tags: Iterator[list[str]] = iter(())
        if features:
            training = tagger.training
            tagger.eval()
            try:
                with torch.inference_mode():
                    tags = iter(tagger.decode(**{name: tensor.to(device) for name, tensor in collate(features).items()}))
            finally:
                tagger.train(training)
        for tokens in batch:
            yield tokens, next(tags) if tokens else []
