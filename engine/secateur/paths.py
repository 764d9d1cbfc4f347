"""Paths of integrated gradients: gates that go from 0 to 1 together, those of one site or of all sites at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.gates import gate_gradients, watched
from secateur.replay import Replay
from secateur.site import Port, Site
from secateur.tasks import Batch

TargetOf = Callable[[Batch], Tensor]


class Path(ABC):
    """F(a) of a batch's rows, and dF/dc of the path's units, where the gates c of these units have the common value a.

    sites: whose units these are, in the order of the scores. end: F at a = 1, [B]; like dF/dc there it is left over from the
    pass that captured the batch, so it costs nothing.
    limit: rows of one pass. More are run in turn, so memory does not grow with the number of nodes.
    """

    sites: tuple[Site, ...]
    end: Tensor
    limit: int

    @abstractmethod
    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        """F [n] of the rows [n] of the batch at the gate values [n], without a backward pass."""

    @abstractmethod
    def weighted(self, rows: Tensor, nodes: Tensor, weights: Tensor, at_end: Tensor) -> tuple[Tensor, Tensor]:
        """For rows [R], nodes [R, K] in 0 ... 1 and their weights [R, K]: F [R, K] at the nodes, and the weighted sum of dF/dc
        [R, units] over the nodes and, with the weight at_end [R], over a = 1."""

    def _chunks(self, nodes: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of the flattened nodes, few enough for one pass; the row [n] of `nodes` that each belongs to; and the matrix
        [R, n] that sums them with their weights: a product, because adding up by index is not deterministic on CUDA."""
        owners = torch.arange(len(nodes), device=nodes.device).repeat_interleave(nodes.shape[1])
        for start in range(0, nodes.numel(), self.limit):
            chunk = slice(start, start + self.limit)
            owner = owners[chunk]
            mixing = weights.new_zeros(len(nodes), len(owner))
            mixing[owner, torch.arange(len(owner), device=nodes.device)] = weights.flatten()[chunk]
            yield chunk, owner, mixing


class LayerPath(Path):
    """The gates of one site: the activations do not change along the path, and what lies below the site is not run again."""

    def __init__(self, replay: Replay, site: Site, limit: int) -> None:
        self.replay, self.sites, self.end, self.limit = replay, (site,), replay.value, limit

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        return torch.cat([self.replay.run(self.sites[0], some, gates)[0] for some, gates in _split(rows, gate, self.limit)])

    def weighted(self, rows: Tensor, nodes: Tensor, weights: Tensor, at_end: Tensor) -> tuple[Tensor, Tensor]:
        (site,) = self.sites
        leaves, values = self.replay.leaves[site], torch.empty_like(nodes, dtype=self.end.dtype)
        # The gradients are averaged before the product with the weight, which is one for all nodes.
        means = [leaf.gradient[rows].to(_wide(leaf.gradient)) * _column(at_end, leaf.gradient) for leaf in leaves]
        for chunk, owner, mixing in self._chunks(nodes, weights):
            value, gradients = self.replay.run(site, rows[owner], nodes.flatten()[chunk], gradients=True)
            values.flatten()[chunk] = value
            for mean, gradient in zip(means, gradients, strict=True):
                mean += (mixing.to(mean) @ gradient.to(mean).flatten(1)).view_as(mean)
        scores = torch.stack([leaf.scores(rows, mean) for leaf, mean in zip(leaves, means, strict=True)])
        return values, scores.sum(0)


class JointPath(Path):
    """The gates of all sites at once: each pass is an ordinary gradient x activation pass with every branch scaled."""

    def __init__(
        self, model: nn.Module, ports: Mapping[Site, tuple[Port, ...]], target: TargetOf, batch: Batch, limit: int
    ) -> None:
        self.model, self.ports, self.target, self.batch = model, ports, target, batch
        self.sites, self.limit = tuple(ports), limit
        size = len(batch.labels)
        everyone = torch.arange(size, device=batch.labels.device)
        self.end, self._end_scores = self._pass(everyone, torch.ones(size, device=batch.labels.device))

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        found = []
        for some, gates in _split(rows, gate, self.limit):
            with watched(self.model, {port: _unseen for each in self.ports.values() for port in each}, gates), torch.no_grad():
                found.append(self.target(self.batch.take(some)))
        return torch.cat(found)

    def weighted(self, rows: Tensor, nodes: Tensor, weights: Tensor, at_end: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.empty_like(nodes, dtype=self.end.dtype)
        total = self._end_scores[rows] * _column(at_end, self._end_scores)
        for chunk, owner, mixing in self._chunks(nodes, weights):
            values.flatten()[chunk], scores = self._pass(rows[owner], nodes.flatten()[chunk])
            total += mixing.to(total) @ scores.to(total)
        return values, total

    def _pass(self, rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        value, scores = gate_gradients(self.model, self.ports, lambda: self.target(self.batch.take(rows)), gate)
        return value, torch.cat(list(scores.values()), 1)


def _unseen(activation: Tensor, gradient: Tensor) -> None:
    """Without gradients nothing is observed."""


def _split(rows: Tensor, gate: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(rows, limit), torch.split(gate, limit), strict=True)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _column(weights: Tensor, like: Tensor) -> Tensor:
    """[n] to [n, 1, ...], to multiply rows of `like`, in at least float32."""
    return weights.to(_wide(like)).view(-1, *[1] * (like.dim() - 1))
