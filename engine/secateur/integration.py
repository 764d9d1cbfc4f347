"""Integrating along a path: as many nodes for each example as its error asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.paths import Path
from secateur.quadrature import PANEL, Floats, Profile, gauss, radau

FIRST = (2, 3, 4, 6)  # Gradient passes of the rules to begin with: of high order, for paths on which F is smooth.
PLACED = 4 * PANEL  # From here on rules are composite, with nodes where F moves.


@dataclass(frozen=True)
class Policy:
    """How a path is integrated.

    first: nodes to begin with. last: the most. tolerance: of the estimated relative error; None: no second try.
    inflation: by number of nodes, the relative error over the completeness residual, as a pilot sample showed it (at least 1).
    placed: False takes plain Gauss-Legendre nodes whatever their number.
    """

    first: int
    last: int
    tolerance: float | None
    inflation: Mapping[int, float] = field(default_factory=dict)
    placed: bool = True

    def after(self, nodes: int, excess: float) -> int | None:
        """The next number of nodes to try where the error is `excess` times the tolerance; None where that was the last."""
        if nodes >= self.last:
            return None
        return min(self.last, max(PLACED, nodes * (2 if excess < 4 else 4) // PANEL * PANEL))

    def error(self, nodes: int, residuals: Tensor) -> Tensor:
        """Estimated relative errors from completeness residuals."""
        return residuals * self.inflation.get(nodes, max(self.inflation.values(), default=1.0))


@dataclass(frozen=True)
class Integral:
    """Integrated gradients [R, units] of rows; their completeness residuals, estimated errors, nodes of the rule that was taken,
    and nodes of all rules that were tried [R]."""

    scores: Tensor
    residuals: Tensor
    errors: Tensor
    rule: Tensor
    nodes: Tensor


class Integrator:
    """Integrates rows of one path, remembering where F was seen."""

    def __init__(self, path: Path, rows: Tensor, *, placed: bool = True) -> None:
        self.path, self.rows, self._placed = path, rows, placed
        self._change = (path.end[rows] - path.values(rows, torch.zeros(len(rows), device=rows.device))).double()
        start = (path.end[rows].double() - self._change).cpu().tolist()
        end = path.end[rows].cpu().tolist()
        self._profiles = [Profile([0.0, 1.0], [low, high]) for low, high in zip(start, end, strict=True)]

    def rule(self, which: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Integrated gradients [n, units] of the rows at the positions `which` [n] by one rule, and their residuals [n]."""
        at, weights, end = zip(*(self._place(k, nodes) for k in which.tolist()), strict=True)
        places = np.stack(at)
        values, scores = self.path.weighted(
            self.rows[which], self._tensor(places), self._tensor(np.stack(weights)), self._tensor(np.array(end))
        )
        for k, of_row, found in zip(which.tolist(), places, values.double().cpu().numpy(), strict=True):
            self._profiles[k].add(of_row, found)
        total = scores.double().abs().sum(1)
        residual = (scores.double().sum(1) - self._change[which]).abs()
        return scores, torch.where(residual == 0, 0.0, residual / total.clamp(min=torch.finfo(torch.float32).tiny))

    def run(self, policy: Policy) -> Integral:
        """Each row by the first rule whose estimated error is within the tolerance, or the last one."""
        count, device = len(self.rows), self.rows.device
        scores = torch.zeros(0)
        residuals, errors = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        rule, nodes = torch.zeros(2, count, dtype=torch.int64)
        queue = {policy.first: torch.arange(count, device=device)}
        while queue:
            level = min(queue)
            which = queue.pop(level)
            found, residual = self.rule(which, level)
            scores = scores if len(scores) else found.new_zeros(count, found.shape[1])
            scores[which] = found
            here = which.cpu()
            residuals[here], rule[here] = residual.cpu(), level
            nodes[here] += level
            errors[here] = policy.error(level, residual.cpu())
            if policy.tolerance is None:
                continue
            for k in here[errors[here] > policy.tolerance].tolist():
                following = policy.after(level, float(errors[k]) / policy.tolerance)
                if following is not None:
                    queue[following] = torch.cat([queue.get(following, which[:0]), torch.tensor([k], device=device)])
        return Integral(scores, residuals, errors, rule, nodes)

    def doubled(self, integral: Integral) -> float:
        """The relative error of an integral against rules of twice as many nodes, placed anew, summed over its rows."""
        difference = size = 0.0
        for level in integral.rule.unique().tolist():
            which = (integral.rule == level).nonzero().flatten().to(self.rows.device)
            twice = 2 * level if not self._placed or 2 * level in FIRST else max(PLACED, 2 * level)
            better, _ = self.rule(which, twice)
            difference += float((better - integral.scores[which]).abs().sum())
            size += float(better.abs().sum())
        return difference / size if size else 0.0

    def _place(self, row: int, nodes: int) -> tuple[Floats, Floats, float]:
        if not self._placed:
            return *gauss(nodes), 0.0
        return radau(nodes) if nodes in FIRST else (*self._profiles[row].composite(nodes), 0.0)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self.rows.device, self.path.end.dtype)


def pilot(path: Path, rows: Tensor, tolerance: float, last: int) -> Policy:
    """Finds how a path should be integrated, from a few rows: rules of more and more nodes, until the next changes little.

    Measured against the last of them, each rule has an error and a residual, whose ratio is its inflation. The first rule
    is the smallest that at least half of the rows need no better one than.
    """
    integrator = Integrator(path, rows)
    everyone = torch.arange(len(rows), device=rows.device)
    last = last // PANEL * PANEL
    levels: dict[int, tuple[Tensor, Tensor]] = {}
    for nodes in (*FIRST, *_doubling(PLACED, last)):
        before = levels[max(levels)][0] if levels else None
        levels[nodes] = integrator.rule(everyone, nodes)
        now = levels[nodes][0]
        if before is not None and nodes > FIRST[0] and float((now - before).abs().sum()) <= tolerance / 2 * float(now.abs().sum()):
            break
    exact = levels.pop(max(levels))[0].double()
    size = exact.abs().sum(1)
    inflation: dict[int, float] = {}
    half = None
    for nodes, (scores, residual) in levels.items():
        error = (scores.double() - exact).abs().sum(1)
        missing = float((residual * scores.double().abs().sum(1)).sum())
        inflation[nodes] = max(1.0, float(error.sum()) / missing) if missing > 0 else 1.0
        if half is None and bool(((error <= tolerance * size).double().mean() >= 0.5)):
            half = nodes
    return Policy(min(half or FIRST[-1], FIRST[-1]), last, tolerance, inflation)


def fixed(nodes: int) -> Policy:
    """A given number of Gauss-Legendre nodes for each row."""
    return Policy(nodes, nodes, None, placed=False)


def _doubling(start: int, last: int) -> list[int]:
    found = [start]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found
