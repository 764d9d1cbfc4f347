"""Integration along a path, with as many nodes for each example as its estimated error asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.attribution.integrated.paths import Path, PathSums
from secateur.attribution.integrated.quadrature import PANEL, Floats, Profile, nearest, radau
from secateur.support.tensors import on_cpu

# Nodes of the small rules, which are tried first. They are of high order, for paths on which F is smooth.
FIRST = (1, 2, 3, 4, 6)
PLACED = 4 * PANEL  # Rules of at least this many nodes are composite, with nodes where F changes.
_DAMPING = 0.1  # Below this ratio of the slope's spread to sum_i |IG_i|, the correction of the scores is damped.
_TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Policy:
    """How a path is integrated.

    Attributes:
        first: The number of nodes of the first rule.
        last: The most nodes of a rule.
        tolerance: The largest estimated relative error. None means that only the first rule is used.
        usual: sum_i |IG_i| of a typical example. The error of an example with a smaller sum is relative to this value.
        ratios: By number of nodes, two ratios that a pilot sample showed: the error over the completeness residual (at least
            1), and the error over the difference to a coarse rule on the same nodes.
    """

    first: int
    last: int
    tolerance: float | None
    usual: float = 0.0
    ratios: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def after(self, nodes: int, excess: float) -> int | None:
        """Choose the next rule for an example whose error is too large.

        Args:
            nodes: The number of nodes of the rule that was tried.
            excess: The example's error over the tolerance.

        Returns:
            The next number of nodes to try, or None after the last rule.
        """
        if nodes >= self.last:
            return None
        twice = 2 * nodes
        if excess < 8 and twice in FIRST:
            return twice
        return min(self.last, max(PLACED, (twice if excess < 4 else 2 * twice) // PANEL * PANEL))

    def errors(self, nodes: int, estimates: Estimates) -> Tensor:
        """Estimate relative errors. Each is the larger of two estimates.

        One estimate is not enough: a residual can be small by chance, and the nodes can miss a change of F.

        Args:
            nodes: The number of nodes of the rule.
            estimates: The measures of the rule's error for n rows.

        Returns:
            Relative errors, float64 [n].
        """
        measured = max((level for level in self.ratios if level <= nodes), default=None)
        residual_ratio, difference_ratio = (1.0, 0.0) if measured is None else self.ratios[measured]
        error = torch.maximum(residual_ratio * estimates.residuals, difference_ratio * estimates.differences)  # [n]
        return error / estimates.sizes.clamp(min=max(self.usual, _TINY))


@dataclass(frozen=True)
class Estimates:
    """Measures of the errors of a rule for n rows. All tensors are float64 [n] on the CPU.

    Attributes:
        residuals: |sum_i IG_i - (F(1) - F(0))| of the rule itself, before `corrected`.
        differences: The sum over the units of |difference| to a coarse rule on the same nodes.
        sizes: sum_i |IG_i|.
    """

    residuals: Tensor
    differences: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Integral:
    """Integrated gradients of R rows.

    Attributes:
        scores: The integrated gradients [R, units].
        residuals: The relative completeness residuals, float64 [R].
        errors: The estimated relative errors, float64 [R].
        rule: The number of nodes of the rule that gave the scores, int64 [R].
        nodes: The number of nodes of all rules that were tried, int64 [R].
    """

    scores: Tensor
    residuals: Tensor
    errors: Tensor
    rule: Tensor
    nodes: Tensor


class Integrator:
    """An integrator of rows of one path. It remembers the values of F at all nodes so far, and places new nodes by them.

    Args:
        path: The path.
        rows: The rows of the path's batch to integrate, int64 [R].
        placed: Whether rules of many nodes are composite, with nodes where F changes. Otherwise all are Gauss-Radau rules.
    """

    def __init__(self, path: Path, rows: Tensor, *, placed: bool = True) -> None:
        self.path, self.rows, self._placed = path, rows, placed
        closed = torch.zeros(len(rows), device=rows.device)
        self._change = (path.end[rows] - path.values(rows, closed)).double()  # F(1) - F(0) [R]
        end = path.end[rows].double()
        ends = torch.stack([end - self._change, end], 1).tolist()  # [R, 2]
        self._profiles = [Profile([0.0, 1.0], low_and_high) for low_and_high in ends]

    def rule(self, which: Tensor, nodes: int) -> tuple[Tensor, Estimates]:
        """Integrate n of the rows by one rule.

        Args:
            which: Indices into the integrator's rows, int64 [n], on the CPU.
            nodes: The number of nodes K of the rule.

        Returns:
            Integrated gradients [n, units], and measures of their errors.
        """
        rules = [self._rule_for(k, nodes) for k in which.tolist()]
        at = np.stack([places for places, _ in rules])  # [n, K]
        weights = np.stack([of_row for _, of_row in rules])  # [n, K + 1]
        coarse = np.stack([nearest(*rule) for rule in rules])  # [n, K + 1]
        chosen = which.to(self.rows.device)
        change = self._change[chosen]  # [n]
        both_weights = self._tensor(np.stack([weights, coarse]))  # [2, n, K + 1]
        sums = self.path.sums(self.rows[chosen], self._tensor(at), both_weights, change.to(self.path.end.dtype))
        scores = corrected(sums, both_weights[0])
        residual = (change - sums.plain.double().sum(1)).abs()  # [n]
        difference, size = (sums.plain - sums.coarse).double().abs().sum(1), scores.double().abs().sum(1)  # [n]
        of_nodes, *estimates = on_cpu([sums.values.double(), residual, difference, size])
        for k, places, values in zip(which.tolist(), at, of_nodes.numpy(), strict=True):
            self._profiles[k].add(places, values)
        return scores, Estimates(*estimates)

    def run(self, policy: Policy) -> Integral:
        """Integrate each row by the first rule whose estimated error is within the tolerance, or by the last rule.

        Args:
            policy: The rules to try, and the tolerance.

        Returns:
            The integrals of all rows.
        """
        count, scores = len(self.rows), torch.zeros(0)
        residuals, errors = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        rule, nodes = torch.zeros(2, count, dtype=torch.int64)
        queue = {policy.first: list(range(count))}  # Number of nodes -> the rows to integrate with so many.
        while queue:
            level = min(queue)
            which = torch.tensor(queue.pop(level))  # Rows whose next rule has `level` nodes, [n].
            of_rule, estimates = self.rule(which, level)  # of_rule [n, units]
            scores = scores if len(scores) else of_rule.new_zeros(count, of_rule.shape[1])
            scores[which.to(scores.device)] = of_rule
            residuals[which], rule[which] = estimates.residuals / estimates.sizes.clamp(min=_TINY), level
            errors[which] = policy.errors(level, estimates)
            nodes[which] += level
            if policy.tolerance is None:
                continue
            for k in which[errors[which] > policy.tolerance].tolist():
                following = policy.after(level, float(errors[k]) / policy.tolerance)
                if following is not None:
                    queue.setdefault(following, []).append(k)
        return Integral(scores, residuals, errors, rule, nodes)

    def doubled(self, integral: Integral, which: list[int]) -> tuple[float, float]:
        """Compare an integral with rules of twice as many nodes, whose nodes are placed anew.

        Args:
            integral: The integral of all rows.
            which: Indices of the rows to compare.

        Returns:
            Over these rows, the sum of |difference| and the sum of |scores| of the finer rules.
        """
        difference = size = 0.0
        for level in sorted({int(integral.rule[k]) for k in which}):
            of_level = torch.tensor([k for k in which if int(integral.rule[k]) == level])
            twice = 2 * level if not self._placed or 2 * level in FIRST else max(PLACED, 2 * level)
            finer, _ = self.rule(of_level, twice)
            change = finer - integral.scores[of_level.to(finer.device)]
            of_level_difference, of_level_size = torch.stack([change.abs().sum(), finer.abs().sum()]).tolist()
            difference, size = difference + of_level_difference, size + of_level_size
        return difference, size

    def _rule_for(self, row: int, nodes: int) -> tuple[Floats, Floats]:
        """Return nodes [nodes], and the weights [nodes + 1] of these and of a = 1."""
        if nodes in FIRST or not self._placed:
            return radau(nodes)
        at, weights = self._profiles[row].composite(nodes)
        return at, np.append(weights, 0.0)  # A composite rule does not use a = 1.

    def _tensor(self, values: Floats) -> Tensor:
        """Return values as a tensor of F's dtype on the rows' device."""
        return torch.from_numpy(values).to(self.rows.device, self.path.end.dtype)


def corrected(sums: PathSums, weights: Tensor) -> Tensor:
    """Correct the scores of a rule, with completeness as a control variate.

    The rule's sum of w_k F'_k should be F(1) - F(0). It is too small by d. So each weight w_k becomes
    w_k (1 + l (F'_k - mean F')). The sum of the weights stays 1. With l = d / var F', the new rule has the right sum. The error
    of a unit vanishes as far as its dF/dc_i varies along the path in proportion to F'.

    l is smaller in two cases: if l = d / var F' would make a weight negative, and if F' varies little compared with
    sum_i |IG_i|, because then d says little about the units.

    Args:
        sums: The sums of the rule for R rows.
        weights: The weights of the rule's K nodes and of a = 1, [R, K + 1].

    Returns:
        Corrected scores [R, units].
    """
    # The slopes have F(1) - F(0) subtracted, and the weights add up to 1. So this is d.
    missing = -(weights * sums.slopes).sum(1, keepdim=True)  # [R, 1]
    spread = sums.slopes + missing  # F'_k - mean F' [R, K + 1]
    variance = (weights * spread.square()).sum(1, keepdim=True)  # [R, 1]
    size = sums.plain.abs().sum(1, keepdim=True)  # [R, 1]
    largest_spread = torch.where(weights > 0, spread, 0).abs().amax(1, keepdim=True)  # [R, 1]
    denominator = torch.maximum(variance + (_DAMPING * size).square(), missing.abs() * largest_spread)  # d / l [R, 1]
    return sums.plain + missing / denominator.clamp(min=_TINY) * (sums.tilted + missing * sums.plain)


def pilot(path: Path, rows: Tensor, tolerance: float, last: int) -> Policy:
    """Find a policy for a path from a few rows.

    Rules of more and more nodes are tried, until the next rule changes the scores little. The last rule counts as exact. The
    error of each smaller rule is measured against it, and so are the ratios of this error to the two measures that need no
    finer rule. The policy's first rule is the smallest that is good enough for three in four of the rows.

    Args:
        path: The path.
        rows: The rows of the path's batch to try, int64 [n].
        tolerance: The largest relative error.
        last: The most nodes of a rule.

    Returns:
        The policy.
    """
    integrator = Integrator(path, rows)
    all_rows = torch.arange(len(rows))
    last = last // PANEL * PANEL
    levels: dict[int, tuple[Tensor, Estimates]] = {}  # By number of nodes: scores [n, units] and estimates.
    for nodes in (*FIRST, *_doubling(PLACED, last)):
        before = levels[max(levels)][0] if levels else None
        now, _ = levels[nodes] = integrator.rule(all_rows, nodes)
        if before is not None and float((now - before).abs().sum()) <= tolerance / 2 * float(now.abs().sum()):
            break
    exact, of_exact = levels.pop(max(levels))
    usual = float(of_exact.sizes.mean())
    ratios: dict[int, tuple[float, float]] = {}
    first = FIRST[-1]
    for nodes, (scores, estimates) in levels.items():
        error = (scores - exact).double().abs().sum(1).cpu()  # [n]
        ratios[nodes] = max(1.0, _ratio(error, estimates.residuals)), _ratio(error, estimates.differences)
        if float((error <= tolerance * of_exact.sizes.clamp(min=usual)).double().mean()) >= 0.75:
            first = min(first, nodes)
    return Policy(first, last, tolerance, usual, ratios)


def _ratio(error: Tensor, measure: Tensor) -> float:
    """Return the sum of the errors [n] over the sum of a measure of them [n]."""
    return float(error.sum()) / max(float(measure.sum()), _TINY)


def fixed(nodes: int) -> Policy:
    """Return a policy that integrates each row with the same number of nodes.

    Args:
        nodes: The number of nodes.
    """
    return Policy(nodes, nodes, None)


def _doubling(start: int, last: int) -> list[int]:
    """Return start, 2 * start, 4 * start, ... up to `last`, which ends the list."""
    levels = [start]
    while levels[-1] < last:
        levels.append(min(2 * levels[-1], last))
    return levels
