"""Suffix replay: a batch's forward pass is captured once, then only the layers above a site run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.integrated.stream import CapturedNorm, Join, holds, joined, norms
from secateur.model.branches import Port, UnitMap
from secateur.model.discovery import branches_of
from secateur.model.families import branches
from secateur.model.hooks import replaced
from secateur.model.linear_layers import weight_of
from secateur.model.paths import prefixes
from secateur.model.sites import Site
from secateur.support.errors import InputError
from secateur.support.tensors import full_precision
from secateur.tasks import Batch
from secateur_kernels import neuron_attribution, product_sum
from secateur_kernels.backend import Backend

_LEAF = object()  # A mark that stands for the leaf's tensor in a captured return value.


@dataclass(frozen=True)
class Leaf:
    """The tensor through which a site's gates enter the forward pass, with all gates at the value a.

    The tensor is base + a * direction [B, T, channels]. A replay starts there.

    Attributes:
        carrier: The path of the largest module that returns this tensor itself. This module need not run.
        returned: The carrier's return value, with a mark in the place of the tensor.
        join: How the tensor joins the residual stream, if the carrier returns that stream or its norm instead; else None.
        base: The bias of the output [channels], or None.
        direction: activation @ weight.T [B, T, channels] if the leaf is the output of a linear layer with this weight;
            otherwise the activation itself.
        activation: The tensor that the gates multiply [B, T, inputs].
        weight: The weight [channels, inputs] of the linear layer whose output the leaf is, or None.
        units: Which channels belong to which unit.
        gradient: dF/d(leaf) at a = 1 [B, T, channels]. dF/d(stream) is the same.
        backend: The implementation of the kernels.
    """

    carrier: str
    returned: Any
    join: Join | None
    base: Tensor | None
    direction: Tensor
    activation: Tensor
    weight: Tensor | None
    units: UnitMap
    gradient: Tensor
    backend: Backend

    def enter(self, rows: Tensor, gate: Tensor, gradients: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compute the tensors that a replay starts from, for R rows at K nodes each.

        Args:
            rows: Rows of the batch, int64 [R].
            gate: The gate value at each node of each row [K, R].
            gradients: Whether a backward pass follows.

        Returns:
            The tensor that gets the leaf's gradient [K, R, T, channels], the tensor that takes the place of the mark
            [K * R, T, channels], and the return values of other modules by path.
        """
        direction = self.direction[rows]  # [R, T, channels]
        if self.join is not None:
            return self.join.enter(rows, direction, self.base, gate, gradients, self.backend)
        if self.weight is None:
            leaf = torch.stack([self.units.times(direction, of_node) for of_node in gate])  # [K, R, T, channels]
        else:
            # The product has the gate's dtype, because a node that is rounded to 8 or 11 bits would be another node.
            scaled = direction * gate[:, :, None, None]  # [K, R, T, channels]
            leaf = (scaled if self.base is None else scaled + self.base).to(direction.dtype)
        leaf.requires_grad_(gradients)
        return leaf, leaf.flatten(0, 1), {}

    def slopes(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Sum the scores of all units, from the gradients at the leaf.

        Args:
            rows: Rows of the batch, int64 [R].
            gradient: The gradient at the leaf at each node of each row [K, R, T, channels], in float32 at least.

        Returns:
            The sums [K, R].
        """
        direction = self.direction[rows].to(gradient)  # [R, T, channels]
        if self.weight is None:  # Some channels may belong to no unit.
            direction, gradient = (tensor.narrow(-1, self.units.before, self.units.size) for tensor in (direction, gradient))
        with full_precision(gradient.device):
            return torch.einsum("rtc,krtc->kr", direction, gradient)

    def scores(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Compute the units' scores from the gradient at the leaf, or from a mean of gradients, by one product with the weight.

        Args:
            rows: Rows of the batch, int64 [n].
            gradient: The gradient at the leaf [n, T, channels].

        Returns:
            The scores [n, units].
        """
        activation, gradient = self.activation[rows], gradient.to(self.activation)
        if self.weight is None:
            return self.units.fold(product_sum(activation, gradient, backend=self.backend))
        with full_precision(activation.device):
            products = neuron_attribution(activation, gradient, self.weight.to(activation), backend=self.backend)
        return self.units.fold(products)


class Replay:
    """A batch that an ordinary forward and backward pass has captured. Then the layers above a site can run for any rows.

    In a replay, modules before the site return their captured values. So nothing before the site is computed again: neither
    whole layers, nor the encoder for a decoder's sites, nor the decoder's keys and values of the encoder's states. The order of
    the model's branches tells which modules these are, so no family's forward pass is repeated here. The replay assumes that
    these modules run once in a pass, and that the batch is the first dimension of their return values.

    Attributes:
        value: F of each row of the batch at gates of 1 [B].
        leaves: The leaves of each site.

    Args:
        model: The model. It must be in `undisturbed`.
        sites: The sites to replay.
        target: A function that runs the model on a batch and returns F [B].
        batch: The examples.
        backend: The implementation of the kernels.

    Raises:
        InputError: A module runs more than once in a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        target: Callable[[Batch], Tensor],
        batch: Batch,
        *,
        backend: Backend = "auto",
    ) -> None:
        self.model, self.batch, self.target, self._backend = model, batch, target, backend
        self._all_branches = list(branches(model).values())
        self._below: dict[str, set[str]] = {}  # Module path -> the branches' linear layers in that module.
        for linear in (linear for branch in self._all_branches for linear in branch.linears):
            for path in prefixes(linear):
                self._below.setdefault(path, set()).add(linear)
        self._branches = branches_of(model, sites)
        self._returned: dict[str, Any] = {}  # Captured return values by path.
        self.leaves: dict[Site, list[Leaf]] = {}
        self._frozen: dict[Site, dict[str, bool]] = {}  # The modules that a site's replay does not run; see `_modules_before`.
        self._capture()

    def run(self, site: Site, rows: Tensor, gate: Tensor, *, gradients: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Run the layers above a site once, for R rows at K nodes each.

        Args:
            site: The site.
            rows: Rows of the batch, int64 [R].
            gate: The value of all gates of the site, at each node of each row [K, R].
            gradients: Whether to run a backward pass too.

        Returns:
            F [K, R], and its gradients at the site's leaves, each [K, R, T, channels]; no gradients unless they are asked for.
        """
        every = rows.repeat(len(gate))  # The rows of the pass [K * R].
        forwards = {path: self._recall(self._returned[path], every, read) for path, read in self._frozen[site].items()}
        tensors = []
        for leaf in self.leaves[site]:
            tensor, for_mark, of_others = leaf.enter(rows, gate, gradients)
            tensors.append(tensor)
            forwards[leaf.carrier] = self._recall(leaf.returned, every, True, for_mark)
            forwards |= {path: self._recall(_LEAF, every, True, normed) for path, normed in of_others.items()}
        with replaced(self.model, forwards), torch.set_grad_enabled(gradients):
            value = self.target(self.batch.take(every))
        if not gradients:
            return value.view_as(gate), []
        found = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
        of_leaves = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
        return value.detach().view_as(gate), of_leaves

    def _recall(self, returned: Any, rows: Tensor, read: bool, leaf: Tensor | None = None) -> Callable[..., Any]:
        """Return a forward function that returns the captured value for rows [n], or only its shape if nothing reads it."""
        size = len(self.batch.labels)

        def take_rows(value: Any) -> Any:
            if value is _LEAF:
                return leaf
            if value.dim() == 0 or value.shape[0] != size:
                return value
            return value[rows] if read else value[:1].expand(len(rows), *value.shape[1:])

        return lambda *arguments, **keywords: _map(take_rows, returned)

    def _capture(self) -> None:
        """Run the batch once, and store F, each site's leaves, and the return values of modules that replays do not run."""
        inputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        returned: dict[str, Any] = {}
        ports = {site: branch.gated_at(site.unit) for site, branch in self._branches.items()}

        def start_graph(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[path] = arguments[0].detach()
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            output.register_hook(partial(gradients.__setitem__, path))  # type: ignore[no-untyped-call]
            return output

        def record(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if path in returned:
                raise InputError(
                    f"model: expected each module to run once in a pass, got {path!r} more than once: use path='joint'"
                )
            returned[path] = output

        with ExitStack() as stack:
            # These hooks run before the model's own hooks, which also see the return values of a replay. The hook of a leaf is
            # the very first.
            for path in self._below:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(record, path), prepend=True).remove)
            captured_norms = stack.enter_context(norms(self.model))
            for path in {port.path for of_site in ports.values() for port in of_site}:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(start_graph, path), prepend=True).remove)
            value = self.target(self.batch)
        value.sum().backward()  # type: ignore[no-untyped-call]
        self.value = value.detach()
        for site in ports:
            self.leaves[site] = [self._leaf(port, returned, inputs, gradients, captured_norms) for port in ports[site]]
            self._frozen[site] = self._modules_before(site, returned)
        for path in {path for frozen in self._frozen.values() for path in frozen}:
            self._returned[path] = _map(Tensor.detach, returned[path])

    def _leaf(
        self,
        port: Port,
        returned: dict[str, Any],
        inputs: dict[str, Tensor],
        gradients: dict[str, Tensor],
        captured_norms: Sequence[CapturedNorm],
    ) -> Leaf:
        """Return the leaf of a port, from the records of the captured pass by path."""
        output: Tensor = returned[port.path]  # [B, T, channels]
        above = {path: returned[path] for path in prefixes(port.path) if path in returned}
        join, carried = (None, output) if port.side == "output" else joined(output, above, captured_norms)
        carrier = next(path for path, value in above.items() if holds(value, carried))
        marked = _map(lambda value: _LEAF if value is carried else value.detach(), returned[carrier])
        gradient = gradients.get(port.path)
        gradient = torch.zeros_like(output) if gradient is None else gradient
        output = output.detach()
        if port.side == "output":
            return Leaf(carrier, marked, None, None, output, output, None, port.map, gradient, self._backend)
        module = self.model.get_submodule(port.path)
        bias = getattr(module, "bias", None)
        direction = output if bias is None else (output - bias).to(output.dtype)  # Under autocast, the bias is wider.
        weight = weight_of(module)
        return Leaf(carrier, marked, join, bias, direction, inputs[port.path], weight, port.map, gradient, self._backend)

    def _modules_before(self, site: Site, returned: dict[str, Any]) -> dict[str, bool]:
        """Return the largest modules that need not run for a site.

        The value of a path is True if the module's captured values are read, and False if only their shape is.
        """
        branch, carriers = self._branches[site], {leaf.carrier for leaf in self.leaves[site]}
        earlier = self._all_branches[: self._all_branches.index(branch)]
        own = set(branch.unchanged_by_gate(site.unit))
        unchanged = {path for before in earlier for path in before.linears} | own
        unread = own if site.read_by_output else set()
        if site.stack == "decoder":
            unread |= {path for before in earlier if before.stack == "encoder" for path in before.linears}
            unchanged |= {path for other in self._all_branches for path in other.source_linears}
        frozen: dict[str, bool] = {}
        for path in sorted(returned, key=len):
            below = self._below[path]
            if below <= unchanged and not any(_is_within(path, other) for other in {*frozen, *carriers}):
                frozen[path] = not below <= unread
        return frozen


def _is_within(path: str, other: str) -> bool:
    """Tell whether a module path is another one, or lies within it."""
    return path == other or path.startswith(f"{other}.")


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same structure with each tensor or mark replaced. The output classes of transformers are dictionaries."""
    if isinstance(value, Tensor) or value is _LEAF:
        return function(value)
    if isinstance(value, dict):
        return type(value)(**{key: _map(function, part) for key, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, part) for part in value)
    return value
