"""Least squares from sums: the same numbers as from the tokens themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.recovery import least_squares
from secateur.recovery.least_squares import RIDGES, Equations, Moments, best_ridge, in_their_span, step


def tokens(seed: int, count: int = 20) -> tuple[Tensor, Tensor]:
    """Inputs [count, 3] and outputs [count, 2] whose means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return inputs, inputs @ torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]], dtype=torch.float64) + noise - 4


def moments(inputs: Tensor, outputs: Tensor) -> Moments:
    """The sums over the tokens, added in two parts of different lengths."""
    first, rest = Moments(), Moments()
    first.add(inputs[:7], outputs[:7])
    rest.add(inputs[7:9], outputs[7:9])
    rest.add(inputs[9:], outputs[9:])
    return first.plus(rest)


def found(folds: list[tuple[Equations, Equations]]) -> tuple[float | None, float]:
    """The best ridge and the change of the error of all outputs, 0 without a ridge."""
    ridge, changes = best_ridge(folds)
    return ridge, 0.0 if ridge is None else float(changes.sum())


def test_sums_means_and_size() -> None:
    inputs, outputs = tokens(0)
    sums = moments(inputs, outputs)
    assert sums.tokens == 20
    assert sums.size == pytest.approx(float(outputs.square().sum()))
    torch.testing.assert_close(sums.means, (inputs.mean(0), outputs.mean(0)))
    torch.testing.assert_close(sums.about(None), (inputs.T @ inputs, outputs.T @ inputs))


@pytest.mark.parametrize("shift", [0.0, 0.7], ids=["own-means", "other-means"])
def test_sums_about_means(shift: float) -> None:
    inputs, outputs = tokens(1)
    of_inputs, of_outputs = inputs.mean(0) + shift, outputs.mean(0) - shift
    h, y = inputs - of_inputs, outputs - of_outputs
    torch.testing.assert_close(moments(inputs, outputs).about((of_inputs, of_outputs)), (h.T @ h, y.T @ h))


@pytest.mark.parametrize("bias", [None, (1.5, -0.5)])
def test_the_error_of_a_weight_and_a_bias(bias: tuple[float, float] | None) -> None:
    inputs, outputs = tokens(2)
    weight = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 2.0, 0.0]], dtype=torch.float64)
    added = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    given = inputs @ weight.T + (0 if added is None else added)
    expected = float((outputs - given).square().sum())
    assert moments(inputs, outputs).error(weight, added) == pytest.approx(expected, rel=1e-12)


def test_no_error_is_negative() -> None:
    inputs, _ = tokens(3)
    sums = moments(inputs, inputs * 1e6)
    assert 0 <= sums.error(torch.eye(3, dtype=torch.float64) * 1e6, None) < 1e-12 * sums.size


def test_a_step_minimises_what_it_is_said_to() -> None:
    matrix, missing = moments(*tokens(4)).about(None)
    taken = step(matrix, missing, 0.1).requires_grad_()
    ridge = 0.1 * matrix.diagonal().mean()
    objective = (taken @ matrix @ taken.T).trace() - 2 * (taken @ missing.T).trace() + ridge * taken.square().sum()
    (gradient,) = torch.autograd.grad(objective, taken)
    assert float(gradient.abs().max()) < 1e-9 * float(missing.abs().max())


@pytest.mark.parametrize("seed", range(6))
def test_the_best_ridge_is_the_one_with_the_least_error_on_other_tokens(seed: int) -> None:
    """Noise in the fitted tokens makes the best ridge neither the lowest nor the highest one."""
    fitted, held_out = (moments(*tokens(10 * seed + k, count)).about(None) for k, count in ((0, 10), (1, 20)))
    fitted = (fitted[0], fitted[1] + 20 * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))

    def error(ridge: float) -> float:
        taken = step(*fitted, ridge)
        return float((taken @ held_out[0] @ taken.T).trace() - 2 * (taken @ held_out[1].T).trace())

    errors = {ridge: error(ridge) for ridge in RIDGES}
    best, change = found([(fitted, held_out)])
    assert best is not None
    assert change == pytest.approx(errors[best])
    assert errors[best] == pytest.approx(min(errors.values()), rel=1e-9)
    assert errors[best] < 0
    assert RIDGES[0] < best < RIDGES[-1]


def test_where_no_step_helps_there_is_no_ridge() -> None:
    matrix, missing = moments(*tokens(5)).about(None)
    assert found([((matrix, missing), (matrix, -missing))]) == (None, 0.0)


def test_errors_are_summed_over_the_folds() -> None:
    """The first fold alone has another best ridge than both together, and the second one none."""
    fitted, held_out, other = (moments(*tokens(seed)).about(None) for seed in (6, 7, 8))
    small = (held_out[0] / 50, -held_out[1] / 50)
    alone, gain = found([(fitted, held_out)])
    both, less = found([(fitted, held_out), (other, small)])
    assert found([(other, small)]) == (None, 0.0)
    assert both is not None
    assert alone is not None
    assert both >= alone
    assert gain < less < 0


def random_tokens(seed: int, count: int, k: int, d: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs [count, k] in a space of `rank` dimensions, and noisy outputs [count, d]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, rank or k, generator=generator, dtype=torch.float64)
    if rank is not None:
        inputs = inputs @ torch.randn(rank, k, generator=generator, dtype=torch.float64)
    outputs = inputs @ torch.randn(k, d, generator=generator, dtype=torch.float64)
    return inputs, outputs + torch.randn(count, d, generator=generator, dtype=torch.float64)


def naive_step(h: Tensor, y: Tensor, ridge: float) -> np.ndarray[Any, Any]:
    """The step [d, k] by a singular value decomposition of the tokens themselves, with rows that stand for the ridge."""
    k, d = h.shape[1], y.shape[1]
    added = (ridge * float(h.square().sum()) / max(k, 1)) ** 0.5
    rows = np.concatenate([h.numpy(), added * np.eye(k)])
    values: np.ndarray[Any, Any] = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((k, d))]), rcond=None)[0]
    return values.T


def sums_of(h: Tensor, y: Tensor) -> Moments:
    """The moments of tokens that are added at once."""
    sums = Moments()
    sums.add(h, y)
    return sums


ENOUGH: list[tuple[int, int, int, int | None]] = [(40, 7, 3, None), (40, 1, 1, None), (40, 7, 1, None)]
SINGULAR: list[tuple[int, int, int, int | None]] = [(5, 7, 3, None), (40, 7, 3, 4), (1, 7, 3, None), (1, 1, 1, None)]


@pytest.mark.parametrize(("count", "k", "d", "rank"), ENOUGH + SINGULAR)
@pytest.mark.parametrize("ridge", [1e-9, 1e-3, 10.0])
def test_a_step_is_that_of_the_tokens_themselves(count: int, k: int, d: int, rank: int | None, ridge: float) -> None:
    """Also where there are fewer tokens than inputs, or the inputs depend on each other: the matrix is then singular."""
    h, y = random_tokens(11, count, k, d, rank)
    taken = step(*sums_of(h, y).about(None), ridge)
    expected = torch.from_numpy(naive_step(h, y, ridge))
    # Rounding of the sums is divided by the ridge in directions that no token has.
    torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-5)
    outside = torch.eye(k, dtype=torch.float64) - torch.linalg.pinv(h) @ h  # [k, k]
    assert float((taken @ outside).norm()) <= 1e-5 * float(taken.norm())


@pytest.mark.parametrize("lowest", [0.0, -1e-6], ids=["zero", "below-zero"])
def test_a_matrix_that_rounding_has_made_indefinite_gives_the_step_of_its_positive_part(lowest: float) -> None:
    rotation = torch.linalg.qr(random_tokens(12, 6, 6, 1)[0])[0]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, lowest, lowest], dtype=torch.float64)
    matrix, missing = (rotation * values) @ rotation.T, random_tokens(13, 2, 6, 1)[0] @ rotation[:, :4] @ rotation[:, :4].T
    taken = step(matrix, missing, 1e-9)
    torch.testing.assert_close(taken, missing @ (rotation[:, :4] / values[:4]) @ rotation[:, :4].T, rtol=1e-7, atol=1e-7)


def test_inputs_that_are_zero_or_absent_move_nothing() -> None:
    zeros = sums_of(torch.zeros(4, 3), torch.ones(4, 2)).about(None)
    none = sums_of(torch.zeros(4, 0), torch.ones(4, 2)).about(None)
    assert not step(*zeros, 1e-9).any()
    assert step(*none, 1e-9).shape == (2, 0)
    assert found([(zeros, zeros)]) == found([(none, none)]) == (None, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_narrow_tokens_have_float64_accuracy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of columns are cut so that the last one is smaller."""
    monkeypatch.setattr(least_squares, "_COLUMNS", 3)
    h, y = (tensor.to(dtype) for tensor in random_tokens(14, 50, 8, 5))
    exact_h, exact_y = h.double().numpy(), y.double().numpy()
    inputs, crossed = (sum_.numpy() for sum_ in moments(h, y).about(None))
    np.testing.assert_allclose(inputs, exact_h.T @ exact_h, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(crossed, exact_y.T @ exact_h, rtol=1e-13, atol=1e-12)
    assert np.array_equal(inputs, inputs.T)


@pytest.mark.parametrize("biased", [False, True])
def test_sums_without_what_a_layer_gives(biased: bool) -> None:
    (inputs, outputs), weight = tokens(2), torch.tensor([[1.0, 0.5, 2.0], [-1.0, 2.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([1.5, -0.5], dtype=torch.float64) if biased else None
    left = moments(inputs, outputs).without(weight, bias)
    expected = moments(inputs, outputs - inputs @ weight.T - (0 if bias is None else bias))
    assert left.tokens == expected.tokens
    assert left.size == pytest.approx(expected.size, rel=1e-12)
    torch.testing.assert_close(left.means, expected.means)
    torch.testing.assert_close(left.about(None), expected.about(None))
    assert left.error(None, None) == left.size
    alone = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert left.error(None, alone) == pytest.approx(left.error(torch.zeros(2, 3, dtype=torch.float64), alone), rel=1e-12)


@pytest.mark.parametrize(("count", "rank"), [(5, None), (5, 2), (1, None), (12, None)])
def test_tokens_have_the_same_step_in_their_span(count: int, rank: int | None) -> None:
    h, y = random_tokens(15, count, 12, 3, rank)
    basis, coordinates = in_their_span(h)
    torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(coordinates @ basis.T, h)
    for ridge in (1e-6, 1e-2):
        taken = step(*sums_of(coordinates, y).about(None), ridge, width=12)
        torch.testing.assert_close(taken @ basis.T, torch.from_numpy(naive_step(h, y, ridge)), rtol=1e-6, atol=1e-6)


def folds_of(seed: int, noise: float, outputs: int) -> list[tuple[Equations, Equations]]:
    """Three folds of tokens, of which more noise makes the best ridge higher."""
    h, y = random_tokens(seed, 90, 20, outputs)
    h = h * torch.logspace(0, -3, 20, dtype=torch.float64)
    y = y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = [sums_of(h[k::3], y[k::3]) for k in range(3)]
    pairs = [(parts[1].plus(parts[2]), parts[0]), (parts[0].plus(parts[2]), parts[1]), (parts[0].plus(parts[1]), parts[2])]
    return [(fitted.about(None), held_out.about(None)) for fitted, held_out in pairs]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("small", [0, 256], ids=["search", "eigenvalues"])
def test_the_least_error_of_all_ridges_is_found(
    seed: int, noise: float, outputs: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decade that float32 cannot tell from its neighbour in the search is as good to 1e-4."""
    monkeypatch.setattr(least_squares, "SMALL", small)
    folds = folds_of(seed, noise, outputs)

    def error(ridge: float) -> float:
        changes = []
        for fitted, (matrix, missing) in folds:
            taken = step(*fitted, ridge)
            changes.append(float((taken @ matrix @ taken.T).trace() - 2 * (taken @ missing.T).trace()))
        return sum(changes)

    errors = {ridge: error(ridge) for ridge in RIDGES}
    best, change = found(folds)
    if min(errors.values()) >= 0:
        assert (best, change) == (None, 0.0)
    else:
        assert best is not None
        precision = 1e-9 if small else 1e-4
        assert change == pytest.approx(errors[best], rel=precision)
        assert errors[best] == pytest.approx(min(errors.values()), rel=precision)


def test_trials_in_float32_find_the_ridge_that_float64_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = folds_of(3, 10.0, 5)
    expected, change = found(folds)
    monkeypatch.setattr(least_squares, "SMALL", 0)
    ridge, narrow = found(folds)
    assert ridge == expected
    assert narrow != change
    assert narrow == pytest.approx(change, rel=1e-3)


def test_float32_gives_way_to_float64_where_the_matrix_is_not_positive_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eigenvalue that is 1e12 times the others, in no axis, makes float32 rounding larger than the ridge."""
    monkeypatch.setattr(least_squares, "SMALL", 0)
    monkeypatch.setattr(least_squares, "_NARROW", 1e-9)
    h, y = random_tokens(16, 60, 6, 2)
    h = h + 1e6 * torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0], dtype=torch.float64)
    fold = (sums_of(h[:40], y[:40]).about(None), sums_of(h[40:], y[40:]).about(None))
    (narrow,), (wide,) = (least_squares.changes_of([fold], [1e-9], narrow=allowed) for allowed in (True, False))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0)


def test_mixtures_have_the_expected_sums_of_squares() -> None:
    mixture = least_squares.mixture_of(300, 64)
    h, y = random_tokens(17, 40, 5, 300)
    mixed = sums_of(h, y).mixed(mixture)
    expected = sums_of(h, y @ mixture.T)
    torch.testing.assert_close(mixed.means, expected.means)
    torch.testing.assert_close(mixed.about(None), expected.about(None))
    assert torch.equal(mixture, least_squares.mixture_of(300, 64))
    squares = mixture.T @ mixture  # [300, 300], the identity plus noise of variance 1 / 64, and 2 / 64 in the diagonal.
    assert float(squares.diagonal().mean()) == pytest.approx(1, abs=0.05)
    assert float((squares - torch.eye(300, dtype=torch.float64)).square().mean()) == pytest.approx(1 / 64, rel=0.1)
