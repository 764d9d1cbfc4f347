"""Paths of integrated gradients: the gates of one site, or of all sites at once, go from 0 to 1 together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.attribution.fused_ffn import fused_feed_forwards
from secateur.attribution.gates import gate_gradients, scaled
from secateur.attribution.integrated.replay import Replay
from secateur.model.branches import Port
from secateur.model.sites import Site
from secateur.support.tensors import full_precision
from secateur.tasks import Batch
from secateur_kernels.backend import Backend

TargetOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Pass:
    """The results of a pass over n rows.

    Attributes:
        values: F [n].
        slopes: The derivative F' = dF/da [n].
        tensors: Tensors [n, ...]. dF/dc is a linear function of them.
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
        indices = torch.arange(len(rows), device=rows.device)  # [R]
        # The nodes of all rows become R * K passes. `owners` names the row of a pass.
        owners, gates = indices.repeat_interleave(nodes.shape[1]), nodes.flatten()  # [R * K]
        inner_weights = weights[..., :-1].flatten(1)  # [2, R * K]
        end = self._end(rows)
        end_slopes = end.slopes - subtracted  # [R]
        totals = [_mixed(indices, weights[..., -1], end_slopes, tensor, len(rows)) for tensor in end.tensors]  # [3, R, ...]
        values, slopes = [], []
        for start in range(0, len(owners), self.limit):
            chunk = slice(start, start + self.limit)
            owner = owners[chunk]  # [n], n <= limit
            of_chunk = self._run(rows[owner], gates[chunk])
            values.append(of_chunk.values)
            slopes.append(of_chunk.slopes - subtracted[owner])
            # Sum the tensors over the nodes first: then one product with a layer's weight serves all nodes.
            for total, tensor in zip(totals, of_chunk.tensors, strict=True):
                total += _mixed(owner, inner_weights[:, chunk], slopes[-1], tensor, len(rows))
        all_slopes = torch.cat([torch.cat(slopes).view_as(nodes), end_slopes[:, None]], 1)  # [R, K + 1]
        plain, coarse, tilted = (self._scores(rows, [total[k] for total in totals]) for k in range(3))  # [R, units]
        return PathSums(torch.cat(values).view_as(nodes), all_slopes, plain, coarse, tilted)

    @abstractmethod
    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        """Run a forward and a backward pass of rows [n] at gate values [n]. n is at most `limit`."""

    @abstractmethod
    def _end(self, rows: Tensor) -> Pass:
        """Return the same at a = 1, for any number of rows, without another pass."""

    @abstractmethod
    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        """Return dF/dc [n, units] of rows [n] from the tensors of a pass. Sums of tensors give sums of dF/dc."""


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
        """Compute F [n] by replaying the layers above the site."""
        chunks = _split(rows, gate, self.limit)
        return torch.cat([self.replay.run(self.sites[0], chunk, gates)[0] for chunk, gates in chunks])

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        return self._pass(rows, *self.replay.run(self.sites[0], rows, gate, gradients=True))

    def _end(self, rows: Tensor) -> Pass:
        return self._pass(rows, self.end[rows], [leaf.gradient[rows] for leaf in self._leaves])

    def _pass(self, rows: Tensor, values: Tensor, gradients: list[Tensor]) -> Pass:
        """Return a pass from F [n] and the gradient at each of the site's leaves [n, T, channels]."""
        of_leaves = [leaf.slope(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, gradients, strict=True)]
        return Pass(values, torch.stack(of_leaves).sum(0), gradients)  # [leaves, n] -> [n]

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        of_leaves = [leaf.scores(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, tensors, strict=True)]
        return torch.stack(of_leaves).sum(0)  # [leaves, n, units] -> [n, units]


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
        self._open = self._run(all_rows, torch.ones(len(all_rows), device=all_rows.device))  # All gates at 1.
        self.end = self._open.values

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """Compute F [n] by forward passes of the whole model with all branches scaled."""
        values = []
        ports = [port for of_site in self.ports.values() for port in of_site]
        for chunk, gates in _split(rows, gate, self.limit):
            with scaled(self.model, ports, gates), torch.no_grad():
                values.append(self.target(self.batch.take(chunk)))
        return torch.cat(values)

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        run = partial(self.target, self.batch.take(rows))
        value, by_site = gate_gradients(self.model, self.ports, run, gate, self._fused, backend=self._backend)
        scores = torch.cat(list(by_site.values()), 1)  # [n, units of all sites]
        return Pass(value, scores.sum(1), [scores])

    def _end(self, rows: Tensor) -> Pass:
        return Pass(self.end[rows], self._open.slopes[rows], [tensor[rows] for tensor in self._open.tensors])

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return tensors[0]


def _mixed(owner: Tensor, weights: Tensor, slopes: Tensor, tensor: Tensor, count: int) -> Tensor:
    """Sum the rows of a tensor [n, ...] for each of `count` owners, with three different weights: [3, count, ...].

    The weights are those of two rules [2, n], and the first rule's times the slopes [n]. `owner` [n] names the owner of each
    row. The sum is a matrix product, because summing by index is not deterministic on CUDA.
    """
    mixing = slopes.new_zeros(3, count, len(owner))  # [3, count, n]
    factors = torch.cat([weights, weights[:1] * slopes])  # [3, n]
    mixing[:, owner, torch.arange(len(owner), device=owner.device)] = factors.to(mixing)
    with full_precision(tensor.device):
        # [3 * count, n] @ [n, ...] -> [3, count, ...]
        return (mixing.flatten(0, 1) @ tensor.to(mixing).flatten(1)).view(3, count, *tensor.shape[1:])


def _split(rows: Tensor, gate: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over rows [n] and gate values [n] in chunks of at most `limit`."""
    return zip(torch.split(rows, limit), torch.split(gate, limit), strict=True)
