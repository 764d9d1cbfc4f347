"""Penalties that drive layer gates to zero (Liu et al. 2018, arXiv 1804.07827, section 3.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Regulariser = Literal["R1", "R2", "R3"]
REGULARISERS: tuple[Regulariser, ...] = ("R1", "R2", "R3")


def r1(z: Tensor) -> Tensor:
    """Compute R1 = |z|_1, the sum of the gates.

    The derivative at 0 is 1, the one-sided derivative from inside [0, 1]. So the loss opens a closed gate only if its gradient
    is larger than the penalty's.

    Args:
        z: Gates in [0, 1], floating point [layers].

    Returns:
        A scalar tensor.
    """
    return z.where(z >= 0, -z).sum()


def r2(z: Tensor) -> Tensor:
    """Compute R2 = |z|_1 + |z (1 - z)|_1, whose second term drives gates to 0 or 1.

    Args:
        z: Gates in [0, 1], floating point [layers].

    Returns:
        A scalar tensor.
    """
    return r1(z) + _binary_penalty(z)


def r3(z: Tensor, wanted: int) -> Tensor:
    """Compute R3 = 1(|z|_0 > wanted) |z|_1 + |z (1 - z)|_1.

    R3 equals R2 while more than `wanted` gates are above zero. After that only the second term acts: gates above 0.5 return
    to 1 and the others go to 0. So fewer than `wanted` gates may stay open in the end.

    Args:
        z: Gates in [0, 1], floating point [layers].
        wanted: The number of layers to keep, the paper's lambda_1.

    Returns:
        A scalar tensor.
    """
    binary_penalty = _binary_penalty(z)
    return r1(z) + binary_penalty if int(z.count_nonzero()) > wanted else binary_penalty


def regulariser(name: Regulariser, z: Tensor, wanted: int) -> Tensor:
    """Compute the regulariser with the given name.

    Args:
        name: "R1", "R2" or "R3".
        z: Gates in [0, 1], floating point [layers].
        wanted: The number of layers to keep. Only R3 reads it.

    Returns:
        A scalar tensor.
    """
    if name == "R3":
        return r3(z, wanted)
    return r1(z) if name == "R1" else r2(z)


def _binary_penalty(z: Tensor) -> Tensor:
    """Compute |z (1 - z)|_1 with one-sided derivatives from inside [0, 1] at the kinks z = 0 and z = 1.

    The derivative is 1 at z = 0 and -1 at z = 1. At z = 1 it cancels the derivative of |z|_1, so R2 does not move a gate that
    is still at its start value.
    """
    product = z * (1 - z)  # [layers]
    return product.where((z >= 0) & (z <= 1), -product).sum()
