"""The conditional random field is compared with an enumeration of all paths, in float64."""

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
    crf = ConditionalRandomField(TAGS).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return crf


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw emissions, tags and a mask. Padding holds values that must not change any result."""
    longest = max(lengths)
    emissions = torch.randn(len(lengths), longest, TAGS, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return emissions, torch.randint(TAGS, (len(lengths), longest)).where(mask, -100), mask


def path_scores(crf: ConditionalRandomField, emissions: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Compute the score of every path through a sentence's emissions [T, tags]."""
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
    likelihood, expected = crf.log_likelihood(emissions, tags, mask), enumerated(crf, emissions, tags, lengths)
    torch.testing.assert_close(likelihood, expected, rtol=0, atol=1e-12)
    leaves = [emissions, *crf.parameters()]
    weights = torch.randn(len(lengths), dtype=torch.float64)
    # A sentence of one word has no transitions, so their gradients are zeros.
    gradients = torch.autograd.grad((weights * likelihood).sum(), leaves, materialize_grads=True)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), leaves, materialize_grads=True)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_best_path(lengths: list[int]) -> None:
    crf = field(scale=2.0)
    for _ in range(20):
        emissions, _, mask = batch(lengths)
        for row, path in enumerate(crf.decode(emissions, mask)):
            scores = path_scores(crf, emissions[row, : lengths[row]])
            assert tuple(path) == max(scores, key=lambda candidate: float(scores[candidate].detach()))


def test_probabilities_add_up_to_one() -> None:
    crf = field()
    emissions, _, mask = batch([4])
    paths = torch.tensor(list(itertools.product(range(TAGS), repeat=4)))
    likelihoods = crf.log_likelihood(emissions.expand(len(paths), -1, -1), paths, mask.expand(len(paths), -1))
    assert float(likelihoods.exp().sum().detach()) == pytest.approx(1, abs=1e-12)


def test_large_scores_do_not_overflow() -> None:
    crf = field()
    emissions, tags, mask = batch([3, 2])
    likelihoods = crf.log_likelihood(1e4 * emissions, tags, mask)
    assert bool(likelihoods.isfinite().all())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), "mask: expected bool [2, 3], got float32 [2, 3]"),
        (torch.ones(2, 2, dtype=torch.bool), "mask: expected bool [2, 3], got bool [2, 2]"),
        (
            torch.tensor([[True, True, True], [False, False, False]]),
            "mask: expected at least one token in each row",
        ),
        (
            torch.tensor([[True, True, True], [True, False, True]]),
            "mask: expected at least one token in each row",
        ),
    ],
)
def test_other_masks_are_refused(mask: Tensor, message: str) -> None:
    crf, emissions = field(), torch.randn(2, 3, TAGS).double()
    with pytest.raises(InputError) as error:
        crf.log_likelihood(emissions, torch.zeros(2, 3, dtype=torch.int64), mask)
    assert str(error.value).startswith(message)
    with pytest.raises(InputError):
        crf.decode(emissions, mask)
