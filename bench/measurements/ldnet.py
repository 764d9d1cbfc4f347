"""LD-Net taggers, whole and with deleted layers: words per second compared with the FLOPs per word."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from bench.support.interleaved import compare
from secateur.learned.ldnet.deletion import delete_closed, flops_per_word
from secateur.learned.ldnet.tagger import Tagger, TaggerSettings, Vocabularies, collate
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.support.environment import environment

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TAGS = ("O", *(f"{prefix}-{kind}" for kind in ("LOC", "MISC", "ORG", "PER") for prefix in "BIES"))


def ldnet(
    layers: int = 10,
    width: int = 300,
    lefts: tuple[int, ...] = (6, 2, 1),
    batch_size: int = 80,
    words: int = 20,
    rounds: int = 9,
) -> dict[str, Any]:
    """Time taggers with random weights on sentences of one length and words of eight letters, with one thread.

    Args:
        layers: The layers of each direction.
        width: The width of a layer.
        lefts: For each pruned tagger, the layers that stay over both directions. The first layers of the forward model and the
            last layers of the backward model stay, taken in turn.
        batch_size: Sentences in the batch.
        words: Words in a sentence.
        rounds: How often each tagger is timed.
    """
    torch.set_num_threads(1)
    whole = _tagger(layers, width)
    batch = _batch(whole, batch_size, words)
    taggers = {"whole": whole, **{f"{left} left": _pruned(whole, layers, left) for left in lefts}}
    calls = {name: partial(tagger.decode, **batch) for name, tagger in taggers.items()}
    with torch.inference_mode():
        times = compare(calls, rounds=rounds, warmup=1)
    count = batch_size * words
    rows = []
    for name, tagger in taggers.items():
        milliseconds = times[f"{name}_ms"]
        row = {
            "tagger": name,
            "flops": flops_per_word(tagger),
            "words/s": round(1e3 * count / milliseconds),
            "ms": milliseconds,
        }
        if name != "whole":
            implied = flops_per_word(whole)["all"] / flops_per_word(tagger)["all"]
            measured = 1 / times[f"{name}_over_whole"]["median"]
            row |= {"implied": round(implied, 2), "measured": round(measured, 2), "of implied": round(measured / implied, 3)}
        rows.append(row)
        print(row, flush=True)
    return {"environment": environment(whole), "load": os.getloadavg(), "layers": layers, "width": width, "rows": rows}


def _tagger(layers: int, width: int) -> Tagger:
    """Build a tagger with random weights."""
    torch.manual_seed(0)
    known = Vocabulary(["<unk>", "<s>", *LETTERS])
    widths = (width,) * layers
    settings = TaggerSettings(tags=TAGS, scheme="bioes", lm_width=width, ahead=widths, back=widths)
    return Tagger(settings, Vocabularies(known, known, known)).eval()


def _pruned(whole: Tagger, layers: int, left: int) -> Tagger:
    """Return the tagger with `left` layers."""
    kept_layers = [set(range((left + 1) // 2)), {layers - 1 - number for number in range(left // 2)}]
    with torch.no_grad():
        for gates, kept in zip(whole.gates, kept_layers, strict=True):
            gates.copy_(torch.tensor([float(number in kept) for number in range(layers)]))
        pruned = delete_closed(whole)
        for gates in whole.gates:
            gates.fill_(1)
    return pruned


def _batch(tagger: Tagger, batch_size: int, words: int) -> dict[str, torch.Tensor]:
    """Return a batch of random words."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(len(LETTERS), (batch_size, words, 8), generator=generator).tolist()
    sentences = [["".join(LETTERS[number] for number in word) for word in sentence] for sentence in letters]
    return collate([tagger.featurise(sentence) for sentence in sentences])


if __name__ == "__main__":
    ldnet()
