"""The place where a branch's output joins the residual stream, and the norm that reads the stream. One kernel computes both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from secateur.support.tensors import nearest
from secateur_kernels import interpolated_norm
from secateur_kernels.backend import Backend, accumulator
from secateur_kernels.backend import Norm as Kind
from secateur_kernels.interpolated_norm.reference import interpolated_norm_reference

_CLASSES: dict[Kind, type[nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


@dataclass(frozen=True)
class CapturedNorm:
    """A norm as it ran in a captured pass.

    Attributes:
        path: The path of the norm's module.
        module: The module.
        stream: The norm's input [B, T, D].
        normed: The norm's output [B, T, D].
    """

    path: str
    module: nn.Module
    stream: Tensor
    normed: Tensor


@dataclass(frozen=True)
class Join:
    """The sum stream = residual + branch, and the norm that reads the stream.

    Attributes:
        residual: The residual stream before the sum [B, T, D].
        norm: The norm's path if other modules read the stream too; None if the norm alone reads it (post-norm).
        kind: The kind of norm: "rms_norm" or "layer_norm".
        eps: The norm's epsilon.
        weight: The norm's weight [D].
        bias: The norm's bias [D], or None.
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
        """Compute the stream residual + base + gate * direction and its norm, for R rows of the batch at K nodes each.

        Args:
            rows: Rows of the batch, int64 [R].
            direction: The leaf's direction for these rows [R, T, D], as in `Leaf`.
            base: The leaf's base [D], or None.
            gate: The gate value at each node of each row [K, R].
            gradients: Whether a backward pass follows.
            backend: The implementation of the kernel.

        Returns:
            As `Leaf.enter`. The tensor that gets the gradient stands for zeros that are added to the stream.
        """
        zeros = direction.new_zeros(()).expand(len(gate), *direction.shape).requires_grad_(gradients)  # [K, R, T, D]
        norm = (self.weight, self.bias, self.eps, self.kind)
        # stream, normed: [K, R, T, D]
        stream, normed = interpolated_norm(self.residual[rows], direction, base, gate, *norm, zeros=zeros, backend=backend)
        if self.norm is None:
            return zeros, normed.flatten(0, 1), {}
        return zeros, stream.flatten(0, 1), {self.norm: normed.flatten(0, 1)}


@contextmanager
def norms(model: nn.Module) -> Iterator[list[CapturedNorm]]:
    """Record the modules that may be norms, in the order in which they run inside the context.

    These are modules with a weight [D] whose input and output are tensors, the output [B, T, D].

    Args:
        model: The model.

    Yields:
        The list of records, which grows as modules run.
    """
    records: list[CapturedNorm] = []

    def keep(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(output, Tensor) and output.dim() == 3:
            records.append(CapturedNorm(path, module, arguments[0], output))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                stack.callback(module.register_forward_hook(partial(keep, path), prepend=True).remove)
        yield records


def joined(output: Tensor, above: Mapping[str, Any], captured: Sequence[CapturedNorm]) -> tuple[Join | None, Tensor]:
    """Find how a branch's output joins the residual stream.

    If no module returns a stream or its norm, code between modules may read that stream. A replay cannot reach that code, so
    the branch's output itself is replaced instead.

    Args:
        output: The branch's output [B, T, D].
        above: The return values of the modules that contain the branch's last layer, by path.
        captured: The norms that ran, in their order.

    Returns:
        The join, and the tensor that a module above the branch returns: the stream or its norm. If no module returns either:
        None, and the output itself.
    """
    for k, norm in enumerate(captured):
        stream_is_returned = any(holds(value, norm.stream) for value in above.values())
        if not stream_is_returned and not any(holds(value, norm.normed) for value in above.values()):
            continue
        # The residual is the input or output of an earlier norm.
        earlier = [tensor for before in captured[:k] for tensor in (before.stream, before.normed)]
        residual = next((tensor for tensor in reversed(earlier) if _adds_up(tensor, output, norm.stream)), None)
        runs_once = sum(other.path == norm.path for other in captured) == 1
        kernel_arguments = norm_arguments(norm) if residual is not None and runs_once else None
        if residual is not None and kernel_arguments is not None:
            join = Join(residual.detach(), norm.path if stream_is_returned else None, *kernel_arguments)
            return join, norm.stream if stream_is_returned else norm.normed
    return None, output


def norm_arguments(norm: CapturedNorm) -> tuple[Kind, float, Tensor, Tensor | None] | None:
    """Find the arguments with which the kernel computes a norm, up to rounding. They are tried on the first example.

    The trial computes in float32 at least, because rounding to 8 or 11 bits would hide which kind of norm it is.

    Args:
        norm: The norm, as it ran.

    Returns:
        The kind, eps, weight and bias; None if no arguments give the output.
    """
    eps = getattr(norm.module, "variance_epsilon", getattr(norm.module, "eps", None))
    stream, normed = norm.stream[:1].detach(), norm.normed[:1].detach()
    if not isinstance(eps, float) or stream.dtype != normed.dtype:  # The kernel's outputs have one dtype.
        return None
    wide = accumulator(stream)
    weight, bias = norm.module.get_parameter("weight").detach(), getattr(norm.module, "bias", None)  # [D]
    # Only torch's own classes say by their name which kind they are: T5's RMSNorm is named LayerNorm.
    kinds = [kind for kind, named in _CLASSES.items() if isinstance(norm.module, named)] or list(get_args(Kind))
    rounding = 2 * torch.finfo(stream.dtype).eps * (normed.abs() if bias is None else normed.abs() + bias.abs()).to(wide)
    limit = rounding + 8 * torch.finfo(wide).eps * normed.abs().max()
    closed = stream.new_zeros(1, dtype=wide)  # With a gate of 0, the kernel normalises the stream alone.
    x, shift = stream.to(wide), None if bias is None else bias.detach().to(wide)
    # Some models, such as Gemma, store the weight minus one.
    arguments = list(product(kinds, (weight, 1 + weight.to(wide))))
    outputs = (interpolated_norm_reference(x, x, None, closed, w.to(wide), shift, eps, kind)[1][0] for kind, w in arguments)
    found = nearest(normed, ((number, expected, limit) for number, expected in enumerate(outputs)))
    return None if found is None else (arguments[found][0], eps, arguments[found][1], bias)


def holds(value: Any, tensor: Tensor) -> bool:
    """Tell whether a module's return value is a tensor, or contains it.

    Args:
        value: The return value: a tensor, or nested tuples and lists.
        tensor: The tensor. Identity counts, not equality.

    Returns:
        Whether the value holds the tensor.
    """
    if isinstance(value, (tuple, list)):
        return any(holds(part, tensor) for part in value)
    return value is tensor


def _adds_up(residual: Tensor, output: Tensor, stream: Tensor) -> bool:
    """Tell whether residual + output is bit-identical to the stream."""
    alike = residual.shape == output.shape == stream.shape and residual.dtype == output.dtype == stream.dtype
    return alike and torch.equal(residual + output, stream)
