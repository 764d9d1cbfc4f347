"""Integration along paths with known integrals: the rules, the places of their nodes, and the number of nodes taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.attribution.integrated.adaptive import FIRST, PLACED, Estimates, Integrator, Policy, corrected, fixed, pilot
from secateur.attribution.integrated.paths import Pass, Path, PathSums
from secateur.attribution.integrated.quadrature import PANEL, Floats, Profile, gauss, nearest, radau

LAST = 96


def integral_of_power(nodes: Floats, weights: Floats, degree: int) -> float:
    """Integrate (degree + 1) * a ** degree by a rule. An exact rule gives 1. A further weight is that of a = 1."""
    nodes = np.append(nodes, np.ones(len(weights) - len(nodes)))
    return float((degree + 1) * np.sum(weights * nodes**degree))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
def test_gauss_is_exact_for_its_degree_and_no_other(nodes: int) -> None:
    at, weights = gauss(nodes)
    assert len(at) == nodes
    assert all(weights > 0)
    assert all((at > 0) & (at < 1))
    for degree in range(2 * nodes):
        assert integral_of_power(at, weights, degree) == pytest.approx(1, abs=1e-12)
    assert abs(integral_of_power(at, weights, 2 * nodes) - 1) > 1e-9


@pytest.mark.parametrize("nodes", FIRST)
def test_radau_is_exact_for_its_degree_and_no_other(nodes: int) -> None:
    at, weights = radau(nodes)
    assert len(at) == len(weights) - 1 == nodes
    assert all(weights > 0)
    assert all((at > 0) & (at < 1))
    assert list(at) == sorted(at)
    for degree in range(2 * nodes + 1):
        assert integral_of_power(at, weights, degree) == pytest.approx(1, abs=1e-11)
    assert abs(integral_of_power(at, weights, 2 * nodes + 1) - 1) > 1e-9


def jump(at: float, places: int = 13) -> Profile:
    """Return a profile of a constant function with one jump of height 5, known at evenly spaced places in random order."""
    known = np.random.default_rng(0).permutation(np.linspace(0, 1, places))
    profile = Profile([0.0, 1.0], [2.0, 7.0])
    inner = known[(known > 0) & (known < 1)]
    profile.add(inner, np.where(inner < at, 2.0, 7.0))
    return profile


@pytest.mark.parametrize("nodes", [12, 13, 24, 96])
@pytest.mark.parametrize("profile", [Profile([0.0, 1.0], [3.0, 3.0]), jump(0.4), jump(0.99)], ids=["flat", "jump", "late"])
def test_composite_rule(profile: Profile, nodes: int) -> None:
    at, weights = profile.composite(nodes)
    assert len(at) == nodes // PANEL * PANEL
    assert all(weights > 0)
    assert all((at > 0) & (at < 1))
    assert all(np.diff(at) > 0)
    for degree in range(2 * PANEL):
        assert integral_of_power(at, weights, degree) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("nodes", [1, 3, 12])
def test_the_coarse_rule_is_exact_for_constants_alone(nodes: int) -> None:
    for at, weights in (radau(nodes), (gauss(nodes)[0], np.append(gauss(nodes)[1], 0.0))):
        coarse = nearest(at, weights)
        assert coarse.shape == weights.shape
        assert coarse.sum() == pytest.approx(1)
        assert all((coarse > 0) == (weights > 0))
        assert abs(integral_of_power(at, coarse, 2) - 1) > 1e-4


@pytest.mark.parametrize("at", [0.2, 0.4, 0.7])
def test_nodes_lie_where_the_function_changes(at: float) -> None:
    """The jump lies in one of twelve intervals. This interval gets the share of nodes that a flat function gives to six."""
    nodes, _ = jump(at).composite(48)
    start = np.floor(at * 12) / 12
    near = (nodes > start - 0.01) & (nodes < start + 1 / 12 + 0.01)
    assert near.mean() >= 0.5
    even, _ = Profile([0.0, 1.0], [0.0, 0.0]).composite(48)
    assert ((even > start - 0.01) & (even < start + 1 / 12 + 0.01)).mean() < 0.2


class Steps(Path):
    """A path whose row r has F(a) = sum_i sign_i * sigmoid((a - place_ri) / width_ri). Unit i is the term i."""

    sites = ()
    limit = 1 << 30

    def __init__(self, places: list[list[float]], widths: list[list[float]], signs: list[float] | None = None) -> None:
        self.places = torch.tensor(places, dtype=torch.float64)
        self.widths = torch.tensor(widths, dtype=torch.float64)
        self.signs = torch.ones(self.places.shape[1]) if signs is None else torch.tensor(signs)
        self.end = self._terms(torch.arange(len(places)), torch.ones(len(places), 1)).sum((1, 2))
        self.passes = 0

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """Return F [n]."""
        return self._terms(rows, gate[:, None]).sum((1, 2))

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        self.passes += gate.numel()
        return self._at(rows, gate)

    def _end(self, rows: Tensor) -> Pass:
        return self._at(rows, torch.ones(1, len(rows)))

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    def _at(self, rows: Tensor, gate: Tensor) -> Pass:
        slopes = self._slopes(rows, gate.T).transpose(0, 1)  # [K, R, units]
        return Pass(self._terms(rows, gate.T).sum(2).T, slopes.sum(2), [slopes])

    def exact(self) -> Tensor:
        """Return the exact integral of each unit [rows, units]."""
        rows = torch.arange(len(self.places))
        ends = self._terms(rows, torch.tensor([[0.0, 1.0]]).expand(len(rows), 2))
        return ends[:, 1] - ends[:, 0]

    def error(self, scores: Tensor) -> Tensor:
        """Return the relative error of each row."""
        return (scores - self.exact()).abs().sum(1) / self.exact().abs().sum(1)

    def _terms(self, rows: Tensor, gates: Tensor) -> Tensor:
        return self.signs * torch.sigmoid((gates[:, :, None] - self.places[rows, None]) / self.widths[rows, None])

    def _slopes(self, rows: Tensor, gates: Tensor) -> Tensor:
        terms = torch.sigmoid((gates[:, :, None] - self.places[rows, None]) / self.widths[rows, None])
        return self.signs * terms * (1 - terms) / self.widths[rows, None]


SMOOTH = ([[0.3, 0.5, 0.6]] * 4, [[0.8, 1.0, 1.5]] * 4)
STEEP = ([[0.30, 0.31, 0.32], [0.60, 0.61, 0.62], [0.41, 0.40, 0.42], [0.15, 0.16, 0.14]], [[0.01, 0.02, 0.015]] * 4)


def all_rows(path: Path) -> Tensor:
    """Return the numbers of a path's rows."""
    return torch.arange(len(path.end))


def automatic(path: Steps, tolerance: float) -> tuple[Tensor, Tensor, Policy]:
    """Return the errors of the rows, their nodes, and the policy that a pilot of two rows gives."""
    policy = pilot(path, all_rows(path)[:2], tolerance, LAST)
    integral = Integrator(path, all_rows(path)).run(policy)
    return path.error(integral.scores), integral.nodes, policy


def even(path: Steps, nodes: int) -> Tensor:
    """Return the errors of the rows by a Gauss-Radau rule."""
    return path.error(Integrator(path, all_rows(path), placed=False).run(fixed(nodes)).scores)


def sums(gradients: list[list[float]], weights: Tensor, change: float) -> PathSums:
    """Return sums of one row from dF/dc [K + 1, units] at the nodes and at a = 1, whose integral over all units is `change`."""
    table = torch.tensor(gradients, dtype=torch.float64)
    slopes = table.sum(1) - change
    plain, tilted = ((weights[0] * factor)[:, None].mul(table).sum(0)[None] for factor in (torch.ones_like(slopes), slopes))
    return PathSums(torch.zeros(1, len(table) - 1), slopes[None], plain, plain, tilted)


WEIGHTS = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)


def test_units_that_vary_with_the_slope_are_made_exact() -> None:
    """Each unit is a constant plus a share of the slope, whose integral is known. Only the damping leaves an error."""
    slope, change = torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64), 5.2
    constants, shares = torch.tensor([[0.3, -0.2, -0.1]]), torch.tensor([[0.5, 0.7, -0.2]])
    of_row = sums((constants + shares * slope[:, None]).tolist(), WEIGHTS, change)
    wanted = constants + shares * change
    variance = float((WEIGHTS[0] * (slope - WEIGHTS[0] @ slope) ** 2).sum())
    damping = (0.1 * float(of_row.plain.abs().sum())) ** 2
    assert damping < 0.1 * variance
    left = damping / (variance + damping) * (of_row.plain - wanted)
    torch.testing.assert_close(corrected(of_row, WEIGHTS) - wanted, left, rtol=1e-5, atol=1e-6)


def test_no_weight_becomes_negative() -> None:
    """This holds for any residual: a unit that only one node sees keeps its sign, and the sum comes closer to F's change."""
    for change in (-40.0, -1.0, 1.5, 40.0):
        of_row = sums([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.2]], WEIGHTS, change)
        scores = corrected(of_row, WEIGHTS)
        assert bool((scores >= 0).all())
        assert abs(float(scores.sum()) - change) < abs(float(of_row.plain.sum()) - change)


def test_a_constant_slope_corrects_nothing() -> None:
    """A constant slope says nothing about units whose derivatives vary and cancel."""
    noise = 1e-9
    of_row = sums([[5.0, -4.0 + noise], [-2.0, 3.0], [1.0, -noise]], WEIGHTS, 1.0 + 1e-6)
    assert torch.allclose(corrected(of_row, WEIGHTS), of_row.plain, atol=1e-6)


@pytest.mark.parametrize("tolerance", [0.05, 0.01, 0.001])
def test_a_smooth_path_takes_few_nodes(tolerance: float) -> None:
    errors, nodes, policy = automatic(Steps(*SMOOTH), tolerance)
    assert errors.max() <= tolerance
    assert nodes.max() <= 4
    assert policy.first <= 4


@pytest.mark.parametrize("tolerance", [0.05, 0.01])
def test_a_steep_path_takes_fewer_nodes_than_an_even_rule(tolerance: float) -> None:
    """The nodes of rules that were given up count too."""
    path = Steps(*STEEP)
    errors, nodes, policy = automatic(path, tolerance)
    assert errors.mean() <= tolerance
    assert errors.max() <= 2 * tolerance
    needed = next(count for count in range(1, 400) if even(path, count).mean() <= tolerance)
    assert float(nodes.double().mean()) < needed
    assert policy.first > 4


def test_each_row_takes_what_it_needs() -> None:
    path = Steps([SMOOTH[0][0], STEEP[0][0]], [SMOOTH[1][0], STEEP[1][0]])
    policy = Policy(first=FIRST[0], last=LAST, tolerance=0.01)
    integral = Integrator(path, all_rows(path)).run(policy)
    assert path.error(integral.scores).max() <= 0.01
    assert int(integral.nodes[0]) <= 4
    assert int(integral.nodes[1]) >= PLACED


def test_rows_unlike_the_pilots_take_more_nodes() -> None:
    """Their residuals are large, although the pilot's rows needed few nodes."""
    path = Steps([*SMOOTH[0][:2], *STEEP[0]], [*SMOOTH[1][:2], *STEEP[1]])
    errors, nodes, policy = automatic(path, 0.01)
    assert policy.first <= 4
    assert errors.max() <= 0.02
    assert nodes[:2].max() <= 4
    assert nodes[2:].min() >= PLACED


def test_a_jump_between_the_nodes_is_found() -> None:
    """At the nodes of the first rules the function is constant. Only the completeness residual shows the jump."""
    path = Steps([[0.77, 0.771]] * 3, [[1e-4, 1e-4]] * 3)
    errors, nodes, _ = automatic(path, 0.02)
    assert errors.max() <= 0.04
    assert nodes.max() <= 2 * LAST


def test_nodes_of_all_tried_rules_count() -> None:
    path = Steps(*STEEP)
    integral = Integrator(path, all_rows(path)).run(Policy(first=FIRST[0], last=LAST, tolerance=0.01))
    assert int(integral.nodes.sum()) == path.passes
    assert bool((integral.rule < integral.nodes).all())


def test_errors_are_residuals_times_their_ratio() -> None:
    path = Steps(*STEEP)
    policy = Policy(first=6, last=6, tolerance=0.5, usual=0.0, ratios={6: (7.0, 0.0)})
    integral = Integrator(path, all_rows(path)).run(policy)
    at, weights = (torch.from_numpy(array.copy()).expand(4, -1) for array in radau(6))
    plain = path.sums(all_rows(path), at, weights.expand(2, -1, -1), torch.zeros(4)).plain
    missing = (plain.sum(1) - path.exact().sum(1)).abs() / integral.scores.abs().sum(1)
    torch.testing.assert_close(integral.residuals, missing)
    torch.testing.assert_close(integral.errors, 7 * missing)


@pytest.mark.parametrize(("nodes", "factor"), [(1, 1.0), (2, 3.0), (3, 3.0), (6, 2.0), (12, 2.0), (48, 2.0)])
def test_a_rule_that_the_pilot_did_not_try_has_the_ratios_of_the_next_coarser_rule(nodes: int, factor: float) -> None:
    policy = Policy(first=1, last=LAST, tolerance=0.01, ratios={2: (3.0, 0.0), 6: (2.0, 0.0)})
    assert policy.errors(nodes, Estimates(torch.tensor([0.5]), torch.tensor([9.0]), torch.tensor([1.0]))).tolist() == [
        0.5 * factor
    ]


def test_the_larger_estimate_counts() -> None:
    policy = Policy(first=1, last=LAST, tolerance=0.01, ratios={1: (2.0, 0.5)})
    estimates = Estimates(torch.tensor([0.1, 0.1]), torch.tensor([0.2, 4.0]), torch.tensor([1.0, 10.0]))
    assert policy.errors(1, estimates).tolist() == pytest.approx([0.2, 0.2])


def test_errors_of_small_rows_are_relative_to_a_usual_row() -> None:
    policy = Policy(first=2, last=LAST, tolerance=0.01, usual=10.0)
    estimates = Estimates(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([20.0, 0.1]))
    assert policy.errors(2, estimates).tolist() == pytest.approx([0.05, 0.1])


def test_the_pilot_measures_how_far_units_errors_cancel() -> None:
    """Two units whose errors differ in sign alone leave a tiny residual. The ratio to the error must make up for it."""
    path = Steps([[0.5, 0.502]] * 4, [[0.05, 0.05]] * 4, [1.0, -0.9])
    policy = pilot(path, all_rows(path)[:2], 0.01, LAST)
    assert max(residual for residual, _ in policy.ratios.values()) > 5
    assert automatic(path, 0.01)[0].max() <= 0.01


@pytest.mark.parametrize("paths", [SMOOTH, STEEP], ids=["smooth", "steep"])
def test_pilot(paths: tuple[list[list[float]], list[list[float]]]) -> None:
    path = Steps(*paths)
    policy = pilot(path, all_rows(path)[:2], 0.01, 50)
    assert policy.ratios
    assert all(residual >= 1 and difference > 0 for residual, difference in policy.ratios.values())
    assert policy.first in (*FIRST, *policy.ratios)
    assert policy.last == 48
    assert policy.usual == pytest.approx(float(path.exact()[:2].abs().sum(1).mean()), rel=0.02)


@pytest.mark.parametrize("excess", [1.01, 3.0, 5.0, 1e6])
@pytest.mark.parametrize("last", [PLACED, 48, LAST])
def test_rules_grow_and_end(excess: float, last: int) -> None:
    policy, levels = Policy(first=FIRST[0], last=last, tolerance=0.01), [FIRST[0]]
    while (following := policy.after(levels[-1], excess)) is not None:
        assert following > levels[-1]
        assert following in FIRST or following % PANEL == 0
        levels.append(following)
    assert levels[-1] == last
    assert len(levels) <= 8
    if excess > 10:
        assert levels[1] >= PLACED


def test_an_impossible_tolerance_ends_at_the_last_rule() -> None:
    path = Steps(*STEEP)
    integral = Integrator(path, all_rows(path)).run(Policy(first=FIRST[0], last=PLACED, tolerance=1e-9))
    assert integral.rule.tolist() == [PLACED] * 4
    assert bool((integral.errors > 1e-9).all())


def test_doubled_is_the_difference_to_twice_the_nodes() -> None:
    path = Steps(*STEEP)
    integrator = Integrator(path, all_rows(path), placed=False)
    difference, size = integrator.doubled(integrator.run(fixed(5)), [1, 3])
    five, ten = (Integrator(path, all_rows(path), placed=False).run(fixed(count)).scores[[1, 3]] for count in (5, 10))
    assert difference == pytest.approx(float((ten - five).abs().sum()))
    assert size == pytest.approx(float(ten.abs().sum()))
