"""Tags from a tagger: of sentences as they come, and how good they are on others."""

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
    """Each sentence's tokens with their tags, in order, a batch at a time, whatever their number; a sentence without tokens has
    no tags. scheme: of tags of spans. The tagger is used in eval mode, and left in the mode that it was in."""
    for tokens, found in _decoded(tagger, sentences, batch_size):
        spanning = tagger.settings.scheme == "bioes"
        yield tokens, tags_of(spans_of(found), len(found), scheme) if spanning else found


def evaluate(tagger: Tagger, sentences: Sequence[Sentence], *, batch_size: int = 80) -> Evaluation:
    """F1 of spans, as seqeval defines it in its default mode, with a 95% bootstrap interval over sentences; where the tags are
    plain, the accuracy of words."""
    pairs = zip(sentences, _decoded(tagger, (sentence.tokens for sentence in sentences), batch_size), strict=True)
    if tagger.settings.scheme == "plain":
        right = [truth == guess for sentence, (_, found) in pairs for truth, guess in zip(sentence.tags, found, strict=True)]
        return proportion("word accuracy", sum(right), len(right))
    return bootstrap("F1", len(sentences), span_f1([(sentence.tags, found) for sentence, (_, found) in pairs]))


def span_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Callable[[Sequence[int]], float]:
    """A function from some sentences' numbers to their F1: 2 right / (true + guessed) spans, 0 where there are none. pairs:
    true and guessed tags of each sentence."""
    counts = []
    for truth, guess in pairs:
        true, guessed = set(spans_of(truth)), set(spans_of(guess))
        counts.append((len(true & guessed), len(true) + len(guessed)))
    table = torch.tensor(counts)

    def statistic(rows: Sequence[int]) -> float:
        right, both = table[list(rows)].sum(0).tolist()
        return 2 * right / both if both else 0.0

    return statistic


def _decoded(tagger: Tagger, sentences: Iterable[Sequence[str]], batch_size: int) -> Iterator[tuple[list[str], list[str]]]:
    device, rest = model_device(tagger), iter(sentences)
    while batch := [list(tokens) for tokens in islice(rest, batch_size)]:
        features = [tagger.featurise(tokens) for tokens in batch if tokens]
        found: Iterator[list[str]] = iter(())
        if features:
            training = tagger.training
            tagger.eval()
            try:
                with torch.inference_mode():
                    found = iter(tagger.decode(**{name: each.to(device) for name, each in collate(features).items()}))
            finally:
                tagger.train(training)
        for tokens in batch:
            yield tokens, next(found) if tokens else []
