"""What pushes layer gates to zero, and to be binary: R1, R2 and R3 of LD-Net."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Regulariser = Literal["R1", "R2", "R3"]
REGULARISERS: tuple[Regulariser, ...] = ("R1", "R2", "R3")


def r1(z: Tensor) -> Tensor:
    """|z|_1: sparsity alone. z [gates] in [0, 1]; the derivative is 1 above zero and 0 at zero, where a gate is no longer
    shrunk."""
    return z.abs().sum()


def r2(z: Tensor) -> Tensor:
    """|z|_1 + |z(1 - z)|_1: sparsity, and gates that are 0 or 1.

    z is in [0, 1], so that the second term is z(1 - z), and its derivative 1 - 2z at the ends too. (torch's |.| has 0 there.)
    """
    return r1(z) + (z * (1 - z)).sum()


def r3(z: Tensor, keep_layers: int) -> Tensor:
    """1(|z|_0 > lambda_1) |z|_1 + |z(1 - z)|_1, where lambda_1 is the number of layers to keep: once no more are left, nothing
    but the second term shrinks them. The indicator has no derivative.

    This is the objective of LD-Net (Liu et al. 2018, arXiv 1804.07827) as the authors' code has it; at z = 1 its two
    derivatives cancel, so that there the task alone decides. R1 and R2 are taken as its parts: R1 without the second term and
    the indicator, R2 without the indicator.
    """
    binary = (z * (1 - z)).sum()
    return r1(z) + binary if int(z.detach().count_nonzero()) > keep_layers else binary


def regulariser(name: Regulariser, z: Tensor, keep_layers: int) -> Tensor:
    """R of the gates z, by its name."""
    if name == "R3":
        return r3(z, keep_layers)
    return r1(z) if name == "R1" else r2(z)
