"""What is measured of a tagger: how it stands layers that are taken out without training, and its speed beside another's."""

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
    """[layers left, metric] from all layers down to none: layers of both directions are taken out one by one, and nothing is
    trained. The metric is the mean over that many random orders, which depend on the seed and the number of layers alone. All
    gates must be 1, and are in the end."""
    layers = len(tagger.all_gates)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(layers, generator=generator).tolist() for _ in range(draws)]
    scores = {left: [_with_layers(tagger, order[:left], sentences) for order in orders] for left in range(layers, -1, -1)}
    return [[left, statistics.mean(found)] for left, found in scores.items()]


def interleaved_words_per_second(
    whole: Tagger, pruned: Tagger, sentences: Sequence[Sequence[str]], rounds: int, batch_size: int = 80
) -> tuple[float, float, float]:
    """Words a second of both taggers, medians, and the median of their ratio, pruned over whole, within a round: in each round
    both tag the first batch of the sentences in turn, every other round the other one first."""
    device = model_device(whole)
    watch, words = clock(device), sum(map(len, sentences[:batch_size]))
    taggers = (whole.eval(), pruned.to(device).eval())
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        batches = [
            {name: each.to(device) for name, each in collate([tagger.featurise(s) for s in sentences[:batch_size]]).items()}
            for tagger in taggers
        ]
        for number in range(rounds + 1):
            taken = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                watch.wait()
                start = watch.now()
                taggers[which].decode(**batches[which])
                end = watch.now()
                watch.wait()
                taken[which] = watch.between(start, end)
            times.append((taken[0], taken[1]))
    # The first round warms up.
    before, after = zip(*times[1:], strict=True)
    ratio = statistics.median(first / second for first, second in times[1:])
    return 1e3 * words / statistics.median(before), 1e3 * words / statistics.median(after), ratio


def _with_layers(tagger: Tagger, kept: Sequence[int], sentences: Sequence[Sentence]) -> float:
    ahead = len(tagger.gates[0])
    with torch.no_grad():
        for number, gates in enumerate(tagger.gates):
            gates.copy_(torch.tensor([float(number * ahead + layer in kept) for layer in range(len(gates))]))
        slim = delete_closed(tagger)
        for gates in tagger.gates:
            gates.fill_(1)
    return evaluate(slim, sentences).value
