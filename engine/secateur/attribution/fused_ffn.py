"""Feed-forward branches whose backward pass scores the neurons in one kernel and never writes the neurons' gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from secateur.model.branches import FeedForward, feed_forwards
from secateur.model.discovery import branches_of
from secateur.model.linear_layers import is_transposed, weight_of
from secateur.model.sites import Site
from secateur.support.tensors import full_precision, nearest
from secateur_kernels import scored_mlp_backward
from secateur_kernels.backend import Activation, Backend, accumulator, uses_triton
from secateur_kernels.scored_mlp_backward.reference import ACTIVATIONS

Watch = Callable[[Tensor], Tensor]
Observer = Callable[[Tensor], None]


class FusedFeedForward:
    """A feed-forward branch whose backward pass is the kernel `scored_mlp_backward`, if the kernel can compute the branch.

    The kernel computes branches of plain linear layers of one dtype, with hidden activations [B, T, F] and one of the kernel's
    own activation functions. The activation function is recognised by its outputs for the first example, so no family's code
    is read. Any other branch is watched by hooks instead.

    Args:
        model: The model that contains the branch.
        branch: The branch.
        backend: The implementation of the kernel. The branch is fused only if this backend runs Triton.
    """

    def __init__(self, model: nn.Module, branch: FeedForward, backend: Backend) -> None:
        self._backend = backend
        self._inputs, self._parts = [model.get_submodule(path) for path in branch.inputs], branch.parts
        self._output = model.get_submodule(branch.output)
        linears = (*self._inputs, self._output)
        self._plain = all(type(linear) is nn.Linear or is_transposed(linear) for linear in linears)
        self._activation: Activation | None = None
        self._tried = False

    @contextmanager
    def scored(self, watch: Watch, observe: Observer, gate: Tensor | None = None) -> Iterator[None]:
        """Score the neurons during a backward pass inside the context.

        Args:
            watch: A function that replaces the out-projection's input [B, T, F], if the branch cannot be fused.
            observe: A function that is called with the scores [B, F], if the branch is fused.
            gate: For each example, the value of all gates [B]; None for 1. It scales what the out-projection adds to its
                bias, so no tensor [B, T, F] is scaled.

        Yields:
            Nothing. The hooks are removed at the end of the context.
        """
        projected: list[Tensor] = []  # The outputs [B, T, F] of the in-projections in this pass.
        fused = False

        def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
            projected.extend(output.chunk(self._parts, -1))

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal fused
            hidden = arguments[0]
            fused = self._fusable(hidden, projected)
            return (hidden.detach() if fused else watch(hidden), *arguments[1:])

        def after(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            pre, up = projected[0], projected[1] if len(projected) > 1 else None
            projected.clear()
            if not fused:
                return output
            if not pre.requires_grad:  # No tensor below needs a gradient, so the graph starts here.
                pre = pre.detach().requires_grad_(True)
            scored: Callable[..., Tensor] = _Scored.apply
            weight = weight_of(self._output).to(output.dtype)  # Autocast rounds it too.
            factor = None if gate is None else gate.view(-1, 1, 1)
            return scored(output, pre, up, weight, self._output.bias, factor, self._activation, self._backend, observe)

        with ExitStack() as stack:
            for module in self._inputs:
                stack.callback(module.register_forward_hook(keep).remove)
            stack.callback(self._output.register_forward_pre_hook(before).remove)
            stack.callback(self._output.register_forward_hook(after, prepend=True).remove)
            yield

    def _fusable(self, hidden: Tensor, projected: list[Tensor]) -> bool:
        """Tell whether the kernel computes the branch, from the tensors [B, T, F] of this pass."""
        device, dtype = hidden.device.type, self._output.weight.dtype
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # The meta device has none.
        product_dtype = torch.get_autocast_dtype(device) if autocast else dtype
        alike = all(tensor.dtype == hidden.dtype and tensor.shape == hidden.shape for tensor in projected)
        # The weight may be offloaded.
        alike = alike and product_dtype == hidden.dtype and self._output.weight.device == hidden.device
        if not self._plain or not alike or hidden.dim() != 3 or not torch.is_grad_enabled():
            return False
        if not uses_triton(self._backend, hidden):
            return False
        if not self._tried:  # Once, because the trial waits for the device.
            self._tried = True
            self._activation = activation_of(hidden[:1].detach(), *(tensor[:1].detach() for tensor in projected))
        return self._activation is not None


def activation_of(hidden: Tensor, pre: Tensor, up: Tensor | None = None) -> Activation | None:
    """Recognise an activation function by its outputs, up to rounding.

    Each element may differ by its own rounding alone, and the root of the mean square by less. A larger limit would let pass
    functions that are nearly a known one.

    Args:
        hidden: The input of the out-projection [B, T, F].
        pre: The input of the activation function [B, T, F].
        up: The factor of a gated branch [B, T, F], or None.

    Returns:
        The function with hidden = act(pre), or act(pre) * up; None if it is none of the kernel's functions.
    """
    wide, info = accumulator(hidden), torch.finfo(hidden.dtype)

    def tried() -> Iterator[tuple[Activation, Tensor, Tensor]]:
        # Transformers computes gelu_new step by step, and rounds after each of them.
        for name, function in [
            *((name, of_name[0]) for name, of_name in ACTIVATIONS.items()),
            ("gelu_new", ACT2FN["gelu_new"]),
        ]:
            expected = (function(pre) if up is None else function(pre) * up).to(wide)
            factor = pre.to(wide).abs() if up is None else (pre.to(wide) * up.to(wide)).abs() + up.to(wide).abs()
            small = 8 * torch.finfo(wide).eps * factor + info.tiny * info.eps  # Of a result that underflows, or nearly does.
            yield name, expected, 2 * info.eps * expected.abs() + small

    return nearest(hidden, tried())


class _Scored(torch.autograd.Function):
    """Return the out-projection's output, scaled by the gates. The backward pass skips to the outputs of the in-projections."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        pre: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        activation: Activation,
        backend: Backend,
        observe: Observer,
    ) -> Tensor:
        ctx.save_for_backward(pre, up, weight, gate)
        ctx.activation, ctx.backend, ctx.observe = activation, backend, observe
        if gate is None:
            return output.view_as(output)
        # The products have the dtype of the gate: a gate rounded to 8 or 11 bits would be another gate.
        scaled = output * gate if bias is None else (output - bias) * gate + bias
        return scaled.to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre, up, weight, gate = ctx.saved_tensors
        options = {"activation": ctx.activation, "backend": ctx.backend}
        with full_precision(pre.device):
            dpre, dup, scores = scored_mlp_backward(gradients[0], weight, pre, up, **options)
        ctx.observe(scores)  # dF/dc takes the gradient behind the gate, and the layers below take it times the gate.
        for below in (dpre, dup):
            if gate is not None and below is not None:
                below.mul_(gate)
        return None, dpre, dup, None, None, None, None, None, None


def fused_feed_forwards(model: nn.Module, sites: Iterable[Site], backend: Backend) -> Mapping[Site, FusedFeedForward]:
    """Build the fused branches of the feed-forward sites.

    Args:
        model: The model.
        sites: Sites of any kind.
        backend: The implementation of the kernel.

    Returns:
        The branches by site. Sites of attention are left out.
    """
    site_of = {branch: site for site, branch in branches_of(model, sites).items()}
    return {site_of[branch]: FusedFeedForward(model, branch, backend) for branch in feed_forwards(site_of)}
