"""Paths of integrated gradients: the gates of one site, or of all sites at once, go from 0 to 1 together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from secateur.attribution.fused_ffn import fused_feed_forwards
from secateur.attribution.gates import gate_gradients, scaled
from secateur.attribution.integrated.replay import Replay
from secateur.model.branches import Port
from secateur.model.sites import Site
from secateur.support.tensors import full_precision
from secateur.tasks import Batch
from secateur_kernels.backend import Backend, accumulator

TargetOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Pass:
    """The results of a pass over R rows at K nodes each.

    Attributes:
        values: F [K, R].
        slopes: The derivative F' = dF/da [K, R].
        tensors: Tensors [K, R, ...]. dF/dc is a linear function of them.
    """

    values: Tensor
    slopes: Tensor
    tensors: list[Tensor]


@dataclass(frozen=True)
class PathSums:
    """Sums over the K nodes of R rows and a = 1.

    Attributes:
        values: F at the nodes [R, K].
        slopes: F' at the nodes and at a = 1, minus a constant of each row [R, K + 1].
        plain: sum_k w_k dF/dc [R, units].
        coarse: The same sum with the weights of a coarser rule [R, units].
        tilted: sum_k w_k slope_k dF/dc [R, units].
    """

    values: Tensor
    slopes: Tensor
    plain: Tensor
    coarse: Tensor
    tilted: Tensor


class Path(ABC):
    """A path of a batch: F(a) and dF/dc, where the gates c of the path's units all have the value a.

    Attributes:
        sites: The sites of the path's units, in the order of the scores.
        end: F at a = 1 [B]. The pass that captured the batch gives it, and dF/dc at a = 1, without a further pass.
        limit: The most rows of one pass. More rows run one chunk after another, so memory does not grow with the nodes.
    """

    sites: tuple[Site, ...]
    end: Tensor
    limit: int

    @abstractmethod
    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """Compute F without a backward pass.

        Args:
            rows: Rows of the batch, int64 [n]. They may repeat.
            gate: The gate value of each row [n].

        Returns:
            F [n].
        """

    def sums(self, rows: Tensor, nodes: Tensor, weights: Tensor, subtracted: Tensor) -> PathSums:
        """Sum dF/dc over the nodes of each row.

        Args:
            rows: Rows of the batch, int64 [R].
            nodes: The nodes of each row, between 0 and 1, [R, K].
            weights: The weights of these nodes and of a = 1, for a rule and for a coarser rule, [2, R, K + 1].
            subtracted: A constant of each row, which is subtracted from F' [R].

        Returns:
            The sums.
        """
        in_a_pass = max(1, self.limit // nodes.shape[1])  # Rows whose nodes fit into one pass.
        parts = [torch.split(tensor, in_a_pass, dim) for tensor, dim in ((rows, 0), (nodes, 0), (weights, 1), (subtracted, 0))]
        sums = [self._sums(*part) for part in zip(*parts, strict=True)]
        return PathSums(*(torch.cat([getattr(part, field.name) for part in sums]) for field in fields(PathSums)))

    def _sums(self, rows: Tensor, nodes: Tensor, weights: Tensor, subtracted: Tensor) -> PathSums:
        """Return as `sums`, for rows that share their passes."""
        values, slopes, totals, first = list[Tensor](), list[Tensor](), list[Tensor](), 0
        passes = (self._run(rows, gate) for gate in torch.split(nodes.T, max(1, self.limit // len(rows))))  # [K', R] of [K, R]
        for part in chain(passes, [self._end(rows)]):
            values.append(part.values)
            slopes.append(part.slopes - subtracted)
            of_part = weights[..., first : first + len(slopes[-1])]  # [2, R, K']
            factors = torch.cat([of_part, of_part[:1] * slopes[-1].T])  # [3, R, K']
            # Sum the tensors over the nodes first: then one product with a layer's weight serves all nodes.
            mixed = [_mixed(factors, tensor) for tensor in part.tensors]  # [3, R, ...]
            totals = [total + more for total, more in zip(totals, mixed, strict=True)] if totals else mixed
            first += len(slopes[-1])
        plain, coarse, tilted = (self._scores(rows, [total[k] for total in totals]) for k in range(3))  # [R, units]
        return PathSums(torch.cat(values[:-1]).T, torch.cat(slopes).T, plain, coarse, tilted)

    @abstractmethod
    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        """Run a forward and a backward pass of rows [R] at gate values [K, R]. K * R is at most `limit`."""

    @abstractmethod
    def _end(self, rows: Tensor) -> Pass:
        """Return the same at one node, a = 1, without another pass."""

    @abstractmethod
    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        """Return dF/dc [R, units] of rows [R], from sums over the nodes of the tensors of passes."""


class LayerPath(Path):
    """The path of one site's gates. The site's activations do not change along the path, and layers below do not run again.

    Args:
        replay: The captured batch.
        site: The site.
        limit: The most rows of one pass.
    """

    def __init__(self, replay: Replay, site: Site, limit: int) -> None:
        self.replay, self.sites, self.end, self.limit = replay, (site,), replay.value, limit
        self._leaves = replay.leaves[site]

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """Compute F [R] by replaying the layers above the site."""
        chunks = _split(rows, gate, self.limit)
        return torch.cat([self.replay.run(self.sites[0], chunk, gates[None])[0][0] for chunk, gates in chunks])

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        return self._pass(rows, *self.replay.run(self.sites[0], rows, gate, gradients=True))

    def _end(self, rows: Tensor) -> Pass:
        return self._pass(rows, self.end[None, rows], [leaf.gradient[None, rows] for leaf in self._leaves])

    def _pass(self, rows: Tensor, values: Tensor, gradients: list[Tensor]) -> Pass:
        """Return a pass from F [K, R] and the gradient at each of the site's leaves [K, R, T, channels]."""
        gradients = [gradient.to(accumulator(gradient)) for gradient in gradients]  # Their sums need more than 8 or 11 bits.
        of_leaves = [leaf.slopes(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, gradients, strict=True)]
        return Pass(values, torch.stack(of_leaves).sum(0), gradients)  # [leaves, K, R] -> [K, R]

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        of_leaves = [leaf.scores(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, tensors, strict=True)]
        return torch.stack(of_leaves).sum(0)  # [leaves, R, units] -> [R, units]


class JointPath(Path):
    """The path of the gates of all sites at once. Each pass is a gradient x activation pass with all branches scaled.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        ports: The ports at which the units of each site are gated.
        target: A function that runs the model on a batch and returns F [B].
        batch: The examples.
        limit: The most rows of one pass.
        backend: The implementation of the kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        ports: Mapping[Site, tuple[Port, ...]],
        target: TargetOf,
        batch: Batch,
        limit: int,
        *,
        backend: Backend,
    ) -> None:
        self.model, self.ports, self.target, self.batch, self._backend = model, ports, target, batch, backend
        self.sites, self.limit = tuple(ports), limit
        self._fused = fused_feed_forwards(model, self.sites, backend)
        all_rows = torch.arange(len(batch.labels), device=batch.labels.device)
        self._open = self._run(all_rows, torch.ones(1, len(all_rows), device=all_rows.device))  # All gates at 1.
        self.end = self._open.values[0]

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """Compute F [R] by forward passes of the whole model with all branches scaled."""
        values = []
        ports = [port for of_site in self.ports.values() for port in of_site]
        for chunk, gates in _split(rows, gate, self.limit):
            with scaled(self.model, ports, gates), torch.no_grad():
                values.append(self.target(self.batch.take(chunk)))
        return torch.cat(values)

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        run = partial(self.target, self.batch.take(rows.repeat(len(gate))))
        value, by_site = gate_gradients(self.model, self.ports, run, gate.flatten(), self._fused, backend=self._backend)
        scores = torch.cat(list(by_site.values()), 1).view(*gate.shape, -1)  # [K, R, units of all sites]
        return Pass(value.view_as(gate), scores.sum(2), [scores])

    def _end(self, rows: Tensor) -> Pass:
        return Pass(self.end[None, rows], self._open.slopes[:, rows], [tensor[:, rows] for tensor in self._open.tensors])

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return tensors[0]


def _mixed(factors: Tensor, tensor: Tensor) -> Tensor:
    """Sum a tensor [K, R, ...] over the nodes with three different weights [3, R, K] of each row: [3, R, ...]."""
    with full_precision(tensor.device):
        # [R, 3, K] @ [R, K, ...] -> [R, 3, ...]
        products = factors.transpose(0, 1) @ tensor.to(factors).flatten(2).transpose(0, 1)
    return products.transpose(0, 1).reshape(3, *tensor.shape[1:])


def _split(rows: Tensor, gate: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over rows [n] and gate values [n] in chunks of at most `limit`."""
    return zip(torch.split(rows, limit), torch.split(gate, limit), strict=True)
