"""Rules for integrals over 0 ... 1, with nodes where the function moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.polynomial import Legendre
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PANEL = 3  # Nodes of a panel of the composite rule.


@cache
def gauss(nodes: int) -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights on 0 ... 1: exact for polynomials of degree 2 * nodes - 1."""
    at, weights = leggauss(nodes)
    return _constant((at + 1) / 2), _constant(weights / 2)


@cache
def radau(nodes: int) -> tuple[Floats, Floats]:
    """Gauss-Radau: inner nodes, and the weights [nodes + 1] of these and of the end point 1: exact for degree 2 * nodes.

    On -1 ... 1 the rule with the end point -1 has as nodes the roots of P_n + P_(n+1) (Abramowitz and Stegun 1964, 25.4.31);
    this is its mirror image.
    """
    count = nodes + 1
    last = Legendre.basis(count - 1)
    roots = np.sort((last + Legendre.basis(count)).roots().real)[1:]
    weights = (1 - roots) / (count * last(roots)) ** 2
    return _constant(((1 - roots) / 2)[::-1]), _constant(np.append((weights / 2)[::-1], 1.0 / count**2))


def nearest(nodes: Floats, weights: Floats) -> Floats:
    """A coarse rule on the same nodes (with weights [nodes + 1], the last of a = 1): each stands for what it is nearest to."""
    used = weights > 0
    places = np.append(nodes, 1.0)[used]
    coarse = np.zeros_like(weights)
    coarse[used] = np.diff(np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [1.0]]))
    return coarse


def _constant(values: Floats) -> Floats:
    """A copy that cannot be written to, since callers share it."""
    values = values.copy()
    values.flags.writeable = False
    return values


@dataclass
class Profile:
    """What is known of a function F on 0 ... 1: its values at some places."""

    places: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, places: Floats, values: Floats) -> None:
        self.places.extend(places.tolist())
        self.values.extend(values.tolist())

    def composite(self, nodes: int) -> tuple[Floats, Floats]:
        """A composite Gauss-Legendre rule of nodes / 3 panels: half of them where F moves, half towards 0.

        The panels share out |dF| / sum |dF| + d sqrt(a) evenly. Equal steps of F are what arXiv 2302.11107 takes; the other
        term bounds the panels where F stands still, and is finer near 0, where a branch outweighs the residual stream that
        it is added to, so that the stream's direction, all that a norm lets through, turns within a short stretch.
        """
        order = np.argsort(self.places)
        places, values = np.asarray(self.places)[order], np.asarray(self.values)[order]
        moved, root = np.abs(np.diff(values)), np.sqrt(places)
        density = np.diff(root) + (moved / moved.sum() if moved.sum() > 0 else 0)
        mass = np.concatenate([[0.0], np.cumsum(density)])
        edges = np.interp(np.linspace(0, mass[-1], nodes // PANEL + 1), mass, root) ** 2
        at, weights = gauss(PANEL)
        width = np.diff(edges)[:, None]
        return (edges[:-1, None] + width * at).ravel(), (width * weights).ravel()
