"""Quadrature rules on 0 ... 1, some of them with nodes where the function changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.polynomial import Legendre
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PANEL = 3  # The number of nodes in one panel of the composite rule.


@cache
def gauss(nodes: int) -> tuple[Floats, Floats]:
    """Return the Gauss-Legendre rule on 0 ... 1. It is exact for polynomials up to degree 2 * nodes - 1.

    Args:
        nodes: The number of nodes.

    Returns:
        The nodes and the weights, both float64 [nodes] and read-only.
    """
    at, weights = leggauss(nodes)
    return _constant((at + 1) / 2), _constant(weights / 2)


@cache
def radau(nodes: int) -> tuple[Floats, Floats]:
    """Return the Gauss-Radau rule on 0 ... 1 with the end point 1. It is exact for polynomials up to degree 2 * nodes.

    On -1 ... 1, the nodes of the rule with the end point -1 are the roots of P_n + P_(n+1). This rule is its mirror image.

    Args:
        nodes: The number of inner nodes.

    Returns:
        The inner nodes, float64 [nodes], and the weights of these and of the end point 1, float64 [nodes + 1]. Both are
        read-only.

    Reference:
        Abramowitz and Stegun 1964, 25.4.31.
    """
    count = nodes + 1
    last = Legendre.basis(count - 1)
    roots = np.sort((last + Legendre.basis(count)).roots().real)[1:]
    weights = (1 - roots) / (count * last(roots)) ** 2
    return _constant(((1 - roots) / 2)[::-1]), _constant(np.append((weights / 2)[::-1], 1.0 / count**2))


def nearest(nodes: Floats, weights: Floats) -> Floats:
    """Return a coarse rule on the nodes of a given rule. The weight of a node is the length of the points nearest to it.

    Args:
        nodes: The nodes of the given rule [nodes].
        weights: The weights of these and of a = 1, [nodes + 1]. Nodes of weight 0 are not used.

    Returns:
        The coarse weights [nodes + 1].
    """
    used = weights > 0
    places = np.append(nodes, 1.0)[used]  # [used nodes]
    coarse = np.zeros_like(weights)
    coarse[used] = np.diff(np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [1.0]]))
    return coarse


def _constant(values: Floats) -> Floats:
    """Return a read-only copy. Callers share it, because the rules are cached."""
    values = values.copy()
    values.flags.writeable = False
    return values


@dataclass
class Profile:
    """The known values of a function F on 0 ... 1.

    Attributes:
        places: The places at which F is known, in any order.
        values: F at these places.
    """

    places: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, places: Floats, values: Floats) -> None:
        """Add values of F.

        Args:
            places: Further places [n].
            values: F at these places [n].
        """
        self.places.extend(places.tolist())
        self.values.extend(values.tolist())

    def composite(self, nodes: int) -> tuple[Floats, Floats]:
        """Return a composite Gauss-Legendre rule of nodes / 3 panels: half of them where F changes, half towards 0.

        Each panel gets the same share of |dF| / sum |dF| + d sqrt(a). The first term gives equal steps of F. The second term
        bounds the panels where F is constant, and makes them narrower near 0. This is because a branch may be larger than the
        residual stream that it is added to. Then the direction of the stream, which is all that a norm passes on, turns within
        a short stretch near 0.

        Args:
            nodes: The number of nodes. It is rounded down to a multiple of 3.

        Returns:
            The nodes and the weights, both float64 [nodes].

        Reference:
            arXiv 2302.11107, for equal steps of F.
        """
        order = np.argsort(self.places)
        places, values = np.asarray(self.places)[order], np.asarray(self.values)[order]
        steps, root = np.abs(np.diff(values)), np.sqrt(places)  # [places - 1], [places]
        density = np.diff(root) + (steps / steps.sum() if steps.sum() > 0 else 0)  # [places - 1]
        mass = np.concatenate([[0.0], np.cumsum(density)])  # [places]
        edges = np.interp(np.linspace(0, mass[-1], nodes // PANEL + 1), mass, root) ** 2  # [panels + 1]
        at, weights = gauss(PANEL)  # [PANEL]
        width = np.diff(edges)[:, None]  # [panels, 1]
        return (edges[:-1, None] + width * at).ravel(), (width * weights).ravel()  # [panels * PANEL]
