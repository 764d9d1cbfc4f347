"""Where a branch's output joins the residual stream, and the norm that reads the stream: both are one kernel's work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from secateur_kernels import interpolated_norm
from secateur_kernels.backend import Backend
from secateur_kernels.backend import Norm as Kind


@dataclass(frozen=True)
class CapturedNorm:
    """A norm as it ran in a captured pass: its path, its parameters, and what went in and came out [B, T, D]."""

    path: str
    module: nn.Module
    stream: Tensor
    normed: Tensor


@dataclass(frozen=True)
class Join:
    """stream = residual + branch, and the norm that reads it.

    norm: the norm's path, where the stream is read elsewhere too; None where the norm alone reads it (post-norm).
    """

    residual: Tensor
    norm: str | None
    kind: Kind
    eps: float
    weight: Tensor
    bias: Tensor | None

    def enter(
        self, rows: Tensor, direction: Tensor, base: Tensor | None, gate: Tensor, gradients: bool, backend: Backend
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Leaf.enter`; direction is that of the rows. The tensor with the gradient is the residual."""
        residual = self.residual[rows].requires_grad_(gradients)
        norm = (self.weight, self.bias, self.eps, self.kind)
        stream, normed = interpolated_norm(residual, direction, base, gate[None], *norm, backend=backend)
        if self.norm is None:
            return residual, normed[0], {}
        return residual, stream[0], {self.norm: normed[0]}


@contextmanager
def norms(model: nn.Module) -> Iterator[list[CapturedNorm]]:
    """Inside, what might be norms is written down, in the order in which it runs."""
    found: list[CapturedNorm] = []

    def keep(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(output, Tensor) and output.dim() == 3:
            found.append(CapturedNorm(path, module, arguments[0], output))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                stack.callback(module.register_forward_hook(partial(keep, path), prepend=True).remove)
        yield found


def joined(
    output: Tensor, above: Mapping[str, Any], captured: Sequence[CapturedNorm], backend: Backend
) -> tuple[Join | None, Tensor]:
    """Find how a branch's output joins the residual stream.

    Code between modules may read a stream if no module returns it or its norm. Nothing here can reach that code.

    Args:
        output: The branch's output [B, T, D].
        above: What the modules that contain the branch's last layer returned, by path.
        captured: The norms that ran, in their order.
        backend: Of the kernel.

    Returns:
        The join, and the tensor that a module above the branch returns: the stream or its norm. Where no module returns
        either: None, and the output itself.
    """
    for k, norm in enumerate(captured):
        inside = any(holds(value, norm.stream) for value in above.values())
        if not inside and not any(holds(value, norm.normed) for value in above.values()):
            continue
        earlier = [tensor for before in captured[:k] for tensor in (before.stream, before.normed)]
        residual = next((tensor for tensor in reversed(earlier) if _adds_up(tensor, output, norm.stream)), None)
        once = sum(other.path == norm.path for other in captured) == 1
        spec = norm_arguments(norm, backend) if residual is not None and once else None
        if residual is not None and spec is not None:
            join = Join(residual.detach(), norm.path if inside else None, *spec)
            return join, norm.stream if inside else norm.normed
    return None, output


def norm_arguments(norm: CapturedNorm, backend: Backend = "auto") -> tuple[Kind, float, Tensor, Tensor | None] | None:
    """Find the kernel's kind, eps, weight and bias: with them it gives the norm's output for the first example, up to rounding.

    Returns None where no arguments do.
    """
    eps = getattr(norm.module, "variance_epsilon", getattr(norm.module, "eps", None))
    if not isinstance(eps, float):
        return None
    stream, expected = norm.stream[:1].detach(), norm.normed[:1].detach()
    own, bias = norm.module.get_parameter("weight").detach(), getattr(norm.module, "bias", None)
    limit = 8 * torch.finfo(stream.dtype).eps * (expected.abs() + expected.abs().max())
    # Some models keep their weights less one.
    for kind, weight in product(get_args(Kind), (own, 1 + own)):
        nodes = stream.new_zeros(1)
        _, normed = interpolated_norm(stream, stream, None, nodes, weight, bias, eps, kind, backend=backend)
        if bool(((normed[0] - expected).abs() <= limit).all()):
            return kind, eps, weight, bias
    return None


def holds(value: Any, tensor: Tensor) -> bool:
    """Whether what a module returned is this very tensor, or has it among its parts."""
    if isinstance(value, (tuple, list)):
        return any(holds(each, tensor) for each in value)
    return value is tensor


def _adds_up(residual: Tensor, output: Tensor, stream: Tensor) -> bool:
    alike = residual.shape == output.shape == stream.shape and residual.dtype == output.dtype == stream.dtype
    return alike and torch.equal(residual + output, stream)
