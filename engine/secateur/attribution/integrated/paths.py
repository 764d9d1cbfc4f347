"""Paths of integrated gradients: gates that go from 0 to 1 together, those of one site or of all sites at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.attribution.gates import gate_gradients, scaled
from secateur.attribution.integrated.replay import Replay
from secateur.model.branches import Port
from secateur.model.sites import Site
from secateur.tasks import Batch
from secateur_kernels.backend import Backend

TargetOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Pass:
    """Of n rows: F [n], its derivative F' = dF/da [n], and the tensors [n, ...] that dF/dc is a linear function of."""

    values: Tensor
    slopes: Tensor
    tensors: list[Tensor]


@dataclass(frozen=True)
class PathSums:
    """values [R, K]: F at the nodes. slopes [R, K + 1]: F' there and at a = 1, less a constant of each row.
    plain, coarse, tilted [R, units]: sum_k w_k dF/dc, the same by a coarser rule, and sum_k w_k slope_k dF/dc."""

    values: Tensor
    slopes: Tensor
    plain: Tensor
    coarse: Tensor
    tilted: Tensor


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

    def sums(self, rows: Tensor, nodes: Tensor, weights: Tensor, less: Tensor) -> PathSums:
        """For rows [R]: nodes [R, K] in 0 ... 1, the weights [2, R, K + 1] of these and of a = 1 by a rule and a coarser one,
        and what is taken from F' [R]."""
        own = torch.arange(len(rows), device=rows.device)
        owners, gates, inner = own.repeat_interleave(nodes.shape[1]), nodes.flatten(), weights[..., :-1].flatten(1)
        end = self._end(rows)
        ends = end.slopes - less
        totals = [_mixed(own, weights[..., -1], ends, tensor, len(rows)) for tensor in end.tensors]
        values, slopes = [], []
        for start in range(0, len(owners), self.limit):
            chunk = slice(start, start + self.limit)
            owner = owners[chunk]
            found = self._run(rows[owner], gates[chunk])
            values.append(found.values)
            slopes.append(found.slopes - less[owner])
            # The tensors are summed over the nodes before the product with a weight, which is one for all nodes.
            for total, tensor in zip(totals, found.tensors, strict=True):
                total += _mixed(owner, inner[:, chunk], slopes[-1], tensor, len(rows))
        every = torch.cat([torch.cat(slopes).view_as(nodes), ends[:, None]], 1)
        return PathSums(
            torch.cat(values).view_as(nodes), every, *(self._scores(rows, [t[k] for t in totals]) for k in range(3))
        )

    @abstractmethod
    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        """A forward and a backward pass of rows [n] at gate values [n]; n is at most `limit`."""

    @abstractmethod
    def _end(self, rows: Tensor) -> Pass:
        """The same at a = 1, of any number of rows, without another pass."""

    @abstractmethod
    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        """dF/dc [n, units] of the rows [n] from the tensors of a pass, or a sum of such scores from the sums."""


class LayerPath(Path):
    """The gates of one site: the activations do not change along the path, and what lies below the site is not run again."""

    def __init__(self, replay: Replay, site: Site, limit: int) -> None:
        self.replay, self.sites, self.end, self.limit = replay, (site,), replay.value, limit
        self._leaves = replay.leaves[site]

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        return torch.cat([self.replay.run(self.sites[0], some, gates)[0] for some, gates in _split(rows, gate, self.limit)])

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        return self._pass(rows, *self.replay.run(self.sites[0], rows, gate, gradients=True))

    def _end(self, rows: Tensor) -> Pass:
        return self._pass(rows, self.end[rows], [leaf.gradient[rows] for leaf in self._leaves])

    def _pass(self, rows: Tensor, values: Tensor, gradients: list[Tensor]) -> Pass:
        slopes = torch.stack([leaf.slope(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, gradients, strict=True)])
        return Pass(values, slopes.sum(0), gradients)

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return torch.stack([leaf.scores(rows, of_leaf) for leaf, of_leaf in zip(self._leaves, tensors, strict=True)]).sum(0)


class JointPath(Path):
    """The gates of all sites at once: each pass is an ordinary gradient x activation pass with every branch scaled.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        ports: Where the units of each site are gated.
        target: Runs the model on a batch and returns F [B].
        batch: The examples.
        limit: The most rows of one pass.
        backend: Of the kernels.
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
        everyone = torch.arange(len(batch.labels), device=batch.labels.device)
        self._whole = self._run(everyone, torch.ones(len(everyone), device=everyone.device))
        self.end = self._whole.values

    def values(self, rows: Tensor, gate: Tensor) -> Tensor:
        found = []
        for some, gates in _split(rows, gate, self.limit):
            with scaled(self.model, [port for each in self.ports.values() for port in each], gates), torch.no_grad():
                found.append(self.target(self.batch.take(some)))
        return torch.cat(found)

    def _run(self, rows: Tensor, gate: Tensor) -> Pass:
        run = partial(self.target, self.batch.take(rows))
        value, by_site = gate_gradients(self.model, self.ports, run, gate, backend=self._backend)
        scores = torch.cat(list(by_site.values()), 1)
        return Pass(value, scores.sum(1), [scores])

    def _end(self, rows: Tensor) -> Pass:
        return Pass(self.end[rows], self._whole.slopes[rows], [tensor[rows] for tensor in self._whole.tensors])

    def _scores(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return tensors[0]


def _mixed(owner: Tensor, weights: Tensor, slopes: Tensor, tensor: Tensor, count: int) -> Tensor:
    """[3, count, ...]: the rows of `tensor` [n, ...] times the weights [2, n] of two rules, and times the first's and the
    slopes [n], summed for each owner [n]. By a product, because adding up by index is not deterministic on CUDA."""
    mixing = slopes.new_zeros(3, count, len(owner))
    each = torch.cat([weights, weights[:1] * slopes])
    mixing[:, owner, torch.arange(len(owner), device=owner.device)] = each.to(mixing)
    return (mixing.flatten(0, 1) @ tensor.to(mixing).flatten(1)).view(3, count, *tensor.shape[1:])


def _split(rows: Tensor, gate: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(rows, limit), torch.split(gate, limit), strict=True)
