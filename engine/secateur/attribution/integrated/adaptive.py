"""Integrating along a path: as many nodes for each example as its error asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.attribution.integrated.paths import Path, PathSums
from secateur.attribution.integrated.quadrature import PANEL, Floats, Profile, nearest, radau

FIRST = (1, 2, 3, 4, 6)  # Gradient passes of the rules to begin with: of high order, for paths on which F is smooth.
PLACED = 4 * PANEL  # From here on rules are composite, with nodes where F moves.
_HARDLY = 0.1
_TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Policy:
    """How a path is integrated.

    first: nodes to begin with. last: the most. tolerance: of the estimated relative error; None: no second try.
    usual: sum_i |IG_i| of a usual example. An example's error is relative to this where its own sum is smaller.
    ratios: by number of nodes, the error over the completeness residual (at least 1) and over the difference to a coarse rule
    on the same nodes, as a pilot sample showed them.
    """

    first: int
    last: int
    tolerance: float | None
    usual: float = 0.0
    ratios: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def after(self, nodes: int, excess: float) -> int | None:
        """The next number of nodes to try where the error is `excess` times the tolerance; None where that was the last."""
        if nodes >= self.last:
            return None
        twice = 2 * nodes
        if excess < 8 and twice in FIRST:
            return twice
        return min(self.last, max(PLACED, (twice if excess < 4 else 2 * twice) // PANEL * PANEL))

    def errors(self, nodes: int, found: Estimates) -> Tensor:
        """Estimated relative errors [n], the larger of two: a residual can be small by luck, and a change can be unseen by
        the nodes."""
        known = max((level for level in self.ratios if level <= nodes), default=None)
        residual, difference = (1.0, 0.0) if known is None else self.ratios[known]
        error = torch.maximum(residual * found.residuals, difference * found.differences)
        return error / found.sizes.clamp(min=max(self.usual, _TINY))


@dataclass(frozen=True)
class Estimates:
    """Of rules for n rows, each float64 [n] on the CPU: what the rule alone, not corrected, misses of F(1) - F(0); the sum over
    the units of its difference to a coarse rule on the same nodes; and sum_i |IG_i|."""

    residuals: Tensor
    differences: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Integral:
    """Integrated gradients [R, units] of rows, and of each row [R] the completeness residual, the estimated error, the nodes of
    the rule that was taken, and those of all rules that were tried."""

    scores: Tensor
    residuals: Tensor
    errors: Tensor
    rule: Tensor
    nodes: Tensor


class Integrator:
    """Integrates rows of one path, remembering where F was seen.

    placed: rules of more nodes than a few have them where F moves; otherwise all are Gauss-Radau rules.
    """

    def __init__(self, path: Path, rows: Tensor, *, placed: bool = True) -> None:
        self.path, self.rows, self._placed = path, rows, placed
        self._change = (path.end[rows] - path.values(rows, torch.zeros(len(rows), device=rows.device))).double()
        start = (path.end[rows].double() - self._change).cpu().tolist()
        end = path.end[rows].cpu().tolist()
        self._profiles = [Profile([0.0, 1.0], [low, high]) for low, high in zip(start, end, strict=True)]

    def rule(self, which: Tensor, nodes: int) -> tuple[Tensor, Estimates]:
        """By one rule, for the rows at `which` [n]: integrated gradients [n, units], and what tells how good they are."""
        places = [self._place(k, nodes) for k in which.tolist()]
        at, weights = np.stack([place for place, _ in places]), np.stack([weight for _, weight in places])
        coarse = np.stack([nearest(*place) for place in places])
        change = self._change[which]
        both = self._tensor(np.stack([weights, coarse]))
        sums = self.path.sums(self.rows[which], self._tensor(at), both, change.to(self.path.end.dtype))
        for k, of_row, found in zip(which.tolist(), at, sums.values.double().cpu().numpy(), strict=True):
            self._profiles[k].add(of_row, found)
        scores = corrected(sums, both[0])
        missing = (change - sums.plain.double().sum(1)).abs()
        difference, size = (sums.plain - sums.coarse).double().abs().sum(1), scores.double().abs().sum(1)
        return scores, Estimates(missing.cpu(), difference.cpu(), size.cpu())

    def run(self, policy: Policy) -> Integral:
        """Each row by the first rule whose estimated error is within the tolerance, or the last one."""
        count, scores = len(self.rows), torch.zeros(0)
        residuals, errors = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        rule, nodes = torch.zeros(2, count, dtype=torch.int64)
        queue = {policy.first: list(range(count))}
        while queue:
            level = min(queue)
            which = torch.tensor(queue.pop(level), device=self.rows.device)
            found, estimates = self.rule(which, level)
            scores = scores if len(scores) else found.new_zeros(count, found.shape[1])
            scores[which], here = found, which.cpu()
            residuals[here], rule[here] = estimates.residuals / estimates.sizes.clamp(min=_TINY), level
            errors[here] = policy.errors(level, estimates)
            nodes[here] += level
            if policy.tolerance is None:
                continue
            for k in here[errors[here] > policy.tolerance].tolist():
                following = policy.after(level, float(errors[k]) / policy.tolerance)
                if following is not None:
                    queue.setdefault(following, []).append(k)
        return Integral(scores, residuals, errors, rule, nodes)

    def doubled(self, integral: Integral, which: list[int]) -> tuple[float, float]:
        """Against rules of twice as many nodes, placed anew: sum |difference| and sum |scores| over the rows at `which`."""
        difference = size = 0.0
        for level in sorted({int(integral.rule[k]) for k in which}):
            alike = torch.tensor([k for k in which if int(integral.rule[k]) == level], device=self.rows.device)
            twice = 2 * level if not self._placed or 2 * level in FIRST else max(PLACED, 2 * level)
            better, _ = self.rule(alike, twice)
            difference += float((better - integral.scores[alike]).abs().sum())
            size += float(better.abs().sum())
        return difference, size

    def _place(self, row: int, nodes: int) -> tuple[Floats, Floats]:
        """Nodes [nodes], and the weights [nodes + 1] of these and of a = 1."""
        if nodes in FIRST or not self._placed:
            return radau(nodes)
        at, weights = self._profiles[row].composite(nodes)
        return at, np.append(weights, 0.0)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self.rows.device, self.path.end.dtype)


def corrected(sums: PathSums, weights: Tensor) -> Tensor:
    """Scores [R, units] of rules whose sums and weights [R, K + 1] are given, with completeness as a control variate.

    The rule's sum of F' should be F(1) - F(0), and is d less. So the weights become w_k (1 + l (F'_k - mean F')), whose sum
    stays 1, and with l = d / var F' the new rule has the right sum: as far as dF/dc_i varies along the path in proportion to
    F', its error is gone. l is smaller where that would make a weight negative, and where F' hardly varies beside
    sum_i |IG_i|, since then d says little of the units.
    """
    missing = -(weights * sums.slopes).sum(1, keepdim=True)  # Slopes are less F(1) - F(0), and weights add up to 1.
    spread = sums.slopes + missing
    variance = (weights * spread.square()).sum(1, keepdim=True)
    size = sums.plain.abs().sum(1, keepdim=True)
    furthest = torch.where(weights > 0, spread, 0).abs().amax(1, keepdim=True)
    least = torch.maximum(variance + (_HARDLY * size).square(), missing.abs() * furthest)
    return sums.plain + missing / least.clamp(min=_TINY) * (sums.tilted + missing * sums.plain)


def pilot(path: Path, rows: Tensor, tolerance: float, last: int) -> Policy:
    """Finds how a path should be integrated, from a few rows: rules of more and more nodes, until the next changes little.

    Measured against the last of them, each rule has an error, and its ratios to what can be known of it without the last. The
    first rule is the smallest that three in four of the rows need no better one than.
    """
    integrator = Integrator(path, rows)
    everyone = torch.arange(len(rows), device=rows.device)
    last = last // PANEL * PANEL
    levels: dict[int, tuple[Tensor, Estimates]] = {}
    for nodes in (*FIRST, *_doubling(PLACED, last)):
        before = levels[max(levels)][0] if levels else None
        now, _ = levels[nodes] = integrator.rule(everyone, nodes)
        if before is not None and float((now - before).abs().sum()) <= tolerance / 2 * float(now.abs().sum()):
            break
    exact, estimates = levels.pop(max(levels))
    usual = float(estimates.sizes.mean())
    ratios: dict[int, tuple[float, float]] = {}
    first = FIRST[-1]
    for nodes, (scores, found) in levels.items():
        error = (scores - exact).double().abs().sum(1).cpu()
        ratios[nodes] = max(1.0, _ratio(error, found.residuals)), _ratio(error, found.differences)
        if float((error <= tolerance * estimates.sizes.clamp(min=usual)).double().mean()) >= 0.75:
            first = min(first, nodes)
    return Policy(first, last, tolerance, usual, ratios)


def _ratio(error: Tensor, known: Tensor) -> float:
    return float(error.sum()) / max(float(known.sum()), _TINY)


def fixed(nodes: int) -> Policy:
    """A given number of nodes for each row."""
    return Policy(nodes, nodes, None)


def _doubling(start: int, last: int) -> list[int]:
    found = [start]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found
