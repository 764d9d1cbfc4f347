"""Suffix replay: a batch's forward pass is captured once, then only what lies above a site runs again."""

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
from secateur.tasks import Batch
from secateur_kernels import neuron_attribution, product_sum
from secateur_kernels.backend import Backend

_LEAF = object()


@dataclass(frozen=True)
class Leaf:
    """Where a site's gates, all at one value a, enter the forward pass: as the tensor base + a * direction [B, T, channels].

    Attributes:
        carrier: The path of the largest module that returns this very tensor, so that the module need not run.
        returned: The carrier's return value, with a mark in the tensor's place.
        join: How the tensor joins the residual stream, where the carrier returns that stream, or its norm, instead.
        base: The output's bias, or None.
        direction: activation @ weight.T where the leaf is the output of a linear layer with this weight, or the activation
            itself.
        activation: What the gates multiply [B, T, inputs].
        weight: The weight of the linear layer whose output the leaf is, or None.
        units: Which channels belong to which unit.
        gradient: dF/d(leaf) at a = 1, which dF/d(stream) is too.
        backend: Of the kernels.
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
        """For the given rows [n] of the batch, each with its gate value [n]: a tensor with the leaf's gradient, what takes the
        mark's place, and what other modules return."""
        direction = self.direction[rows]
        if self.join is not None:
            return self.join.enter(rows, direction, self.base, gate, gradients, self.backend)
        if self.weight is None:
            leaf = self.units.times(direction, gate)
        else:
            # In the gate's dtype: a node rounded to 8 or 11 bits would be another node.
            scaled = direction * gate.view(-1, 1, 1)
            leaf = (scaled if self.base is None else scaled + self.base).to(direction.dtype)
        leaf.requires_grad_(gradients)
        return leaf, leaf, {}

    def slope(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """The sum of the units' scores [n], from the gradient at the leaf, in at least float32."""
        products = product_sum(self.direction[rows], gradient, backend=self.backend)
        return (self.units.fold(products) if self.weight is None else products).sum(1)

    def scores(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """The units' scores [n, units] from the (mean) gradient at the leaf: one product with the weight."""
        activation, gradient = self.activation[rows], gradient.to(self.activation)
        if self.weight is None:
            return self.units.fold(product_sum(activation, gradient, backend=self.backend))
        return self.units.fold(neuron_attribution(activation, gradient, self.weight.to(activation), backend=self.backend))


class Replay:
    """One batch, captured by an ordinary forward and backward pass; then suffixes of it, run for any of its rows.

    Modules before a site return what they returned in the captured pass, so nothing there is computed again: whole layers,
    the encoder for a decoder's sites, and in the decoder the keys and values of the encoder's states. The order of the
    model's branches says which modules these are, so no family's forward is repeated here. Replay takes for granted that
    these modules run once in a pass, and that the batch is the first dimension of what they return.

    Args:
        model: The model. It must be in `undisturbed`.
        sites: The sites to replay.
        target: Runs the model on a batch and returns F [B].
        batch: The examples.
        backend: Of the kernels.

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
        self._all = list(branches(model).values())
        self._below: dict[str, set[str]] = {}  # Each module that holds linear layers of branches, with those.
        for linear in (linear for branch in self._all for linear in branch.linears):
            for path in prefixes(linear):
                self._below.setdefault(path, set()).add(linear)
        self._branches = branches_of(model, sites)
        self._returned: dict[str, Any] = {}
        self.leaves: dict[Site, list[Leaf]] = {}
        self._frozen: dict[Site, dict[str, bool]] = {}
        self._capture()

    def run(self, site: Site, rows: Tensor, gate: Tensor, *, gradients: bool = False) -> tuple[Tensor, list[Tensor]]:
        """F [n] and its gradients at the site's leaves, for rows [n] of the batch with gate values [n]."""
        forwards = {path: self._recall(self._returned[path], rows, read) for path, read in self._frozen[site].items()}
        tensors = []
        for leaf in self.leaves[site]:
            tensor, marked, elsewhere = leaf.enter(rows, gate, gradients)
            tensors.append(tensor)
            forwards[leaf.carrier] = self._recall(leaf.returned, rows, True, marked)
            forwards |= {path: self._recall(_LEAF, rows, True, normed) for path, normed in elsewhere.items()}
        with replaced(self.model, forwards), torch.set_grad_enabled(gradients):
            value = self.target(self.batch.take(rows))
        if not gradients:
            return value, []
        found = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
        return value.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]

    def _recall(self, returned: Any, rows: Tensor, read: bool, leaf: Tensor | None = None) -> Callable[..., Any]:
        """A forward that returns what was returned, for the given rows; where it is not read, only of the right shape."""
        size = len(self.batch.labels)

        def recall(value: Any) -> Any:
            if value is _LEAF:
                return leaf
            if value.dim() == 0 or value.shape[0] != size:
                return value
            return value[rows] if read else value[:1].expand(len(rows), *value.shape[1:])

        return lambda *arguments, **keywords: _map(recall, returned)

    def _capture(self) -> None:
        inputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        returned: dict[str, Any] = {}
        ports = {site: branch.gated_at(site.unit) for site, branch in self._branches.items()}

        def leaf(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[path] = arguments[0].detach()
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            output.register_hook(partial(gradients.__setitem__, path))  # type: ignore[no-untyped-call]
            return output

        def work(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if path in returned:
                raise InputError(f"model: module {path!r} runs more than once in a pass; expected once: use path='joint'")
            returned[path] = output

        with ExitStack() as stack:
            # Before hooks that are on the model already, which see what a replay returns too; the leaf's first of all.
            for path in self._below:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(work, path), prepend=True).remove)
            found = stack.enter_context(norms(self.model))
            for path in {port.path for each in ports.values() for port in each}:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(leaf, path), prepend=True).remove)
            value = self.target(self.batch)
        value.sum().backward()  # type: ignore[no-untyped-call]
        self.value = value.detach()
        for site in ports:
            self.leaves[site] = [self._leaf(port, returned, inputs, gradients, found) for port in ports[site]]
            self._frozen[site] = self._before(site, returned)
        for path in {path for frozen in self._frozen.values() for path in frozen}:
            self._returned[path] = _map(Tensor.detach, returned[path])

    def _leaf(
        self,
        port: Port,
        returned: dict[str, Any],
        inputs: dict[str, Tensor],
        gradients: dict[str, Tensor],
        found: Sequence[CapturedNorm],
    ) -> Leaf:
        output: Tensor = returned[port.path]
        above = {path: returned[path] for path in prefixes(port.path) if path in returned}
        join, carried = (None, output) if port.side == "output" else joined(output, above, found, self._backend)
        carrier = next(path for path, value in above.items() if holds(value, carried))
        marked = _map(lambda value: _LEAF if value is carried else value.detach(), returned[carrier])
        gradient = gradients.get(port.path)
        gradient = torch.zeros_like(output) if gradient is None else gradient
        output = output.detach()
        if port.side == "output":
            return Leaf(carrier, marked, None, None, output, output, None, port.map, gradient, self._backend)
        module = self.model.get_submodule(port.path)
        bias = getattr(module, "bias", None)
        direction, weight = output if bias is None else output - bias, weight_of(module)
        return Leaf(carrier, marked, join, bias, direction, inputs[port.path], weight, port.map, gradient, self._backend)

    def _before(self, site: Site, returned: dict[str, Any]) -> dict[str, bool]:
        """The largest modules that need not run for the site, and whether what they return is read, or its shape alone."""
        branch, carriers = self._branches[site], {leaf.carrier for leaf in self.leaves[site]}
        earlier = self._all[: self._all.index(branch)]
        own = set(branch.unchanged_by_gate(site.unit))
        done = {path for each in earlier for path in each.linears} | own
        unread = own if site.read_by_output else set()
        if site.stack == "decoder":
            unread |= {path for each in earlier if each.stack == "encoder" for path in each.linears}
            done |= {path for each in self._all for path in each.source_linears}
        found: dict[str, bool] = {}
        for path in sorted(returned, key=len):
            below = self._below[path]
            if below <= done and not any(_under(path, other) for other in {*found, *carriers}):
                found[path] = not below <= unread
        return found


def _under(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with each tensor (or mark) replaced; transformers' output classes are dictionaries."""
    if isinstance(value, Tensor) or value is _LEAF:
        return function(value)
    if isinstance(value, dict):
        return type(value)(**{key: _map(function, each) for key, each in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, each) for each in value)
    return value
