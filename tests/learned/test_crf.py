"""The conditional random field against the enumeration of all paths, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from secateur.learned.ldnet.crf import ConditionalRandomField
from secateur.support.errors import InputError

TAGS = 3
LENGTHS = [[4, 1, 3], [5], [1], [2, 2]]


def field(scale: float = 1.0) -> ConditionalRandomField:
    made = ConditionalRandomField(TAGS).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return made


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Emissions, tags and mask; padding holds what must not matter."""
    longest = max(lengths)
    emissions = torch.randn(len(lengths), longest, TAGS, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return emissions, torch.randint(TAGS, (len(lengths), longest)).where(mask, -100), mask


def path_scores(crf: ConditionalRandomField, emissions: Tensor) -> dict[tuple[int, ...], Tensor]:
    """The score of each path of a sentence's emissions [T, tags]."""
    scores = {}
    for path in itertools.product(range(TAGS), repeat=len(emissions)):
        score = crf.start[path[0]] + crf.end[path[-1]] + sum(emissions[t, tag] for t, tag in enumerate(path))
        scores[path] = score + sum((crf.transitions[a, b] for a, b in itertools.pairwise(path)), torch.zeros(()).double())
    return scores


def enumerated(crf: ConditionalRandomField, emissions: Tensor, tags: Tensor, lengths: list[int]) -> Tensor:
    rows = []
    for row, length in enumerate(lengths):
        scores = path_scores(crf, emissions[row, :length])
        rows.append(scores[tuple(tags[row, :length].tolist())] - torch.stack(list(scores.values())).logsumexp(0))
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_likelihood_and_gradients(lengths: list[int]) -> None:
    crf = field()
    emissions, tags, mask = batch(lengths)
    found, wanted = crf.log_likelihood(emissions, tags, mask), enumerated(crf, emissions, tags, lengths)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    leaves = [emissions, *crf.parameters()]
    weights = torch.randn(len(lengths), dtype=torch.float64)
    # Sentences of one word have no transitions, whose gradients are then zeros.
    ours = torch.autograd.grad((weights * found).sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad((weights * wanted).sum(), leaves, materialize_grads=True)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_best_path(lengths: list[int]) -> None:
    crf = field(scale=2.0)
    for _ in range(20):
        emissions, _, mask = batch(lengths)
        for row, path in enumerate(crf.decode(emissions, mask)):
            scores = path_scores(crf, emissions[row, : lengths[row]])
            assert tuple(path) == max(scores, key=lambda found: float(scores[found].detach()))


def test_probabilities_add_up_to_one() -> None:
    crf = field()
    emissions, _, mask = batch([4])
    paths = torch.tensor(list(itertools.product(range(TAGS), repeat=4)))
    found = crf.log_likelihood(emissions.expand(len(paths), -1, -1), paths, mask.expand(len(paths), -1))
    assert float(found.exp().sum().detach()) == pytest.approx(1, abs=1e-12)


def test_large_scores_do_not_overflow() -> None:
    crf = field()
    emissions, tags, mask = batch([3, 2])
    found = crf.log_likelihood(1e4 * emissions, tags, mask)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), "mask: expected bool [2, 3], got float32 [2, 3]"),
        (torch.ones(2, 2, dtype=torch.bool), "mask: expected bool [2, 3], got bool [2, 2]"),
        (torch.tensor([[True, True, True], [False, False, False]]), "mask: expected each row's tokens first, one at least"),
        (torch.tensor([[True, True, True], [True, False, True]]), "mask: expected each row's tokens first, one at least"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, message: str) -> None:
    crf, emissions = field(), torch.randn(2, 3, TAGS).double()
    with pytest.raises(InputError) as error:
        crf.log_likelihood(emissions, torch.zeros(2, 3, dtype=torch.int64), mask)
    assert str(error.value).startswith(message)
    with pytest.raises(InputError) as error:
        crf.decode(emissions, mask)
    assert str(error.value).startswith(message)
