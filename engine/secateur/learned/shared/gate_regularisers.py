"""Penalties that drive layers' gates to zero (Liu et al. 2018, arXiv 1804.07827, section 3.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Regulariser = Literal["R1", "R2", "R3"]
REGULARISERS: tuple[Regulariser, ...] = ("R1", "R2", "R3")


def r1(z: Tensor) -> Tensor:
    """|z|_1, a scalar. z: gates [layers] in [0, 1]. The derivative at 0 is that from within, 1: the loss opens a closed gate
    only where it pulls more than the penalty."""
    return z.where(z >= 0, -z).sum()


def r2(z: Tensor) -> Tensor:
    """|z|_1 + |z (1 - z)|_1: the second term drives gates to 0 or 1."""
    return r1(z) + _towards_ends(z)


def r3(z: Tensor, wanted: int) -> Tensor:
    """1(|z|_0 > wanted) |z|_1 + |z (1 - z)|_1: as r2, until no more than `wanted` gates are above zero; then the
    second term alone takes those above 0.5 back to 1 and the others to 0, so that fewer may stay in the end."""
    second = _towards_ends(z)
    return r1(z) + second if int(z.count_nonzero()) > wanted else second


def regulariser(name: Regulariser, z: Tensor, wanted: int) -> Tensor:
    """R of the gates z, by its name. wanted: of r3."""
    if name == "R3":
        return r3(z, wanted)
    return r1(z) if name == "R1" else r2(z)


def _towards_ends(z: Tensor) -> Tensor:
    """|z (1 - z)|_1, with the derivative from within [0, 1] at its ends, where the absolute value has kinks: 1 at z = 0, and -1
    at z = 1, which cancels that of |z|_1, so that a gate that has not been moved yet is not moved by r2."""
    product = z * (1 - z)
    return product.where((z >= 0) & (z <= 1), -product).sum()
