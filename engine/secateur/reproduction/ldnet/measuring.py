"""Measurements of a tagger: its metric when layers are deleted without training, and its speed beside another tagger's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from secateur.data.conll import Sentence
from secateur.learned.ldnet.deletion import delete_closed
from secateur.learned.ldnet.tagger import Tagger, collate
from secateur.learned.ldnet.tagging import evaluate
from secateur.measuring.stopwatch import clock
from secateur.tasks.batches import model_device


def detached(tagger: Tagger, sentences: Sequence[Sentence], draws: int, seed: int) -> list[list[float]]:
    """Measure a tagger as its language models' layers are deleted one by one, without training.

    Layers of both directions are deleted in random orders, which depend only on the seed and the number of layers.

    Args:
        tagger: The tagger. All its gates must be 1; they are 1 again at the end.
        sentences: The sentences to evaluate on.
        draws: The number of random orders.
        seed: The seed of the orders.

    Returns:
        Pairs [layers left, mean metric over the orders], from all layers down to none.
    """
    layers = len(tagger.all_gates)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(layers, generator=generator).tolist() for _ in range(draws)]
    scores = {left: [_with_layers(tagger, order[:left], sentences) for order in orders] for left in range(layers, -1, -1)}
    return [[left, statistics.mean(order_scores)] for left, order_scores in scores.items()]


def interleaved_words_per_second(
    whole: Tagger, pruned: Tagger, sentences: Sequence[Sequence[str]], rounds: int, batch_size: int = 80
) -> tuple[float, float, float]:
    """Measure the speed of two taggers side by side.

    In a round both taggers tag the first batch of the sentences, one after the other. The order alternates from round to round.
    A first round for warm-up is not counted.

    Args:
        whole: The tagger with all layers.
        pruned: The pruned tagger. It is moved to the other's device.
        sentences: The words of each sentence.
        rounds: The number of rounds that count.
        batch_size: The number of sentences in the batch.

    Returns:
        The median words per second of the whole tagger and of the pruned one, and the median over rounds of the speed-up
        (pruned over whole).
    """
    device = model_device(whole)
    watch, words = clock(device), sum(map(len, sentences[:batch_size]))
    taggers = (whole.eval(), pruned.to(device).eval())
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        batches = [
            {name: tensor.to(device) for name, tensor in collate([tagger.featurise(s) for s in sentences[:batch_size]]).items()}
            for tagger in taggers
        ]
        for number in range(rounds + 1):
            milliseconds = [0.0, 0.0]
            for index in (0, 1) if number % 2 else (1, 0):
                watch.wait()
                start = watch.now()
                taggers[index].decode(**batches[index])
                end = watch.now()
                watch.wait()
                milliseconds[index] = watch.between(start, end)
            times.append((milliseconds[0], milliseconds[1]))
    # The first round is warm-up.
    whole_times, pruned_times = zip(*times[1:], strict=True)
    ratio = statistics.median(whole_time / pruned_time for whole_time, pruned_time in times[1:])
    return 1e3 * words / statistics.median(whole_times), 1e3 * words / statistics.median(pruned_times), ratio


def _with_layers(tagger: Tagger, kept: Sequence[int], sentences: Sequence[Sentence]) -> float:
    """Evaluate the tagger with only the kept layers, numbered from the forward model's first to the backward model's last."""
    ahead = len(tagger.gates[0])
    with torch.no_grad():
        for direction, gates in enumerate(tagger.gates):
            gates.copy_(torch.tensor([float(direction * ahead + layer in kept) for layer in range(len(gates))]))
        pruned = delete_closed(tagger)
        for gates in tagger.gates:
            gates.fill_(1)
    return evaluate(pruned, sentences).value
