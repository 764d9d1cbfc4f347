"""Sums of activations over real tokens: what criteria without gradients are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.attribution.checkpoint import PartialSums
from secateur.attribution.criteria.base import Result, Scorer, ScoringContext
from secateur.model.branches import Branch, Port
from secateur.model.discovery import branches_of
from secateur.model.families import branches
from secateur.model.hooks import observed
from secateur.model.offloading import read_weight
from secateur.model.sites import Site
from secateur.tasks import Batch


@dataclass(frozen=True)
class TokenMoments:
    """Over real tokens, float64: their count [B, 1], and the sums of |x|, x and x^2 of a port's channels [B, channels]."""

    count: Tensor
    absolute: Tensor
    plain: Tensor
    square: Tensor

    @classmethod
    def of(cls, x: Tensor, real: Tensor) -> TokenMoments:
        """x [B, T, channels]; real [B, T]: which tokens count."""
        real = real.to(x.device)
        x = x.double().masked_fill(~real.unsqueeze(-1), 0)
        return cls(real.sum(1, keepdim=True).double(), x.abs().sum(1), x.sum(1), x.square().sum(1))

    @classmethod
    def zero(cls, channels: int) -> TokenMoments:
        """Of no tokens, B = 1, on the CPU."""
        return cls(*(torch.zeros(1, width, dtype=torch.float64) for width in (1, channels, channels, channels)))

    def add_(self, batch: TokenMoments) -> None:
        """All examples of a batch to those that are there as one."""
        for total, sums in zip(vars(self).values(), vars(batch).values(), strict=True):
            total += sums.sum(0, keepdim=True).cpu()

    def variance(self) -> Tensor:
        """The sample variance of each channel; 0 where there is one token."""
        return (self.square - self.plain.square() / self.count).clamp(min=0) / (self.count - 1).clamp(min=1)


UnitScores = Callable[[Site, Sequence[tuple[Port, TokenMoments]]], Tensor]


class TokenSums(Scorer):
    """Scores units by a function of the sums of activations at each site's ports, with forward passes alone.

    The scores of all examples are the function of the sums over all examples. They may differ from the sum of the examples'
    own scores: an example's own scores are those that it would have alone.

    Args:
        context: The attribution.
        ports: Where to sum, by site.
        unit_scores: Makes scores [B, units] of a site and of its ports' sums.
    """

    def __init__(self, context: ScoringContext, ports: Mapping[Site, tuple[Port, ...]], unit_scores: UnitScores) -> None:
        self._model, self._task, self._ports, self._unit_scores = context.model, context.task, ports, unit_scores
        self._has_encoder = any(branch.stack == "encoder" for branch in branches(context.model).values())
        self._branches = branches_of(context.model, ports)
        self._totals = {port: TokenMoments.zero(port.map.channels) for of_site in ports.values() for port in of_site}

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        seen: dict[Port, TokenMoments] = {}

        def observe(port: Port, real: Tensor, activation: Tensor) -> None:
            seen[port] = TokenMoments.of(activation, real)

        observers = {
            port: partial(observe, port, self._real(self._branches[site], port, batch))
            for site, ports in self._ports.items()
            for port in ports
        }
        with torch.no_grad(), observed(self._model, observers):
            self._task.logits(self._model, batch)
        for port, sums in seen.items():
            self._totals[port].add_(sums)
        return self._scores(seen)

    def partial_sums(self) -> PartialSums:
        every = self._totals.items()
        names = {port: f"{port.path}/{port.side}" + f"/{port.map.before}" * bool(port.map.before) for port in self._totals}
        return PartialSums({f"{names[p]}/{kind}": tensor for p, sums in every for kind, tensor in vars(sums).items()})

    def result(self, totals: dict[str, Tensor]) -> Result:
        return Result({site.name: scores[0].cpu() for site, scores in self._scores(self._totals).items()})

    def _scores(self, sums: Mapping[Port, TokenMoments]) -> dict[Site, Tensor]:
        return {site: self._unit_scores(site, [(port, sums[port]) for port in ports]) for site, ports in self._ports.items()}

    def _real(self, branch: Branch, port: Port, batch: Batch) -> Tensor:
        """Which of the tokens that a port sees are real [B, T]: a decoder that has an encoder runs over the target, but for
        the keys and values of cross-attention; everything else runs over the input."""
        of_source = port.path in branch.source_linears
        return batch.real(target=branch.stack == "decoder" and self._has_encoder and not of_source)


def read_ports(model: nn.Module, sites: Sequence[Site]) -> dict[Site, tuple[Port, ...]]:
    """Where an out-projection reads each site's units; the outputs of both Q and K, which none reads."""
    return {site: branch.read_at(site.unit) for site, branch in branches_of(model, sites).items()}


def read_weights(
    model: nn.Module, ports: Mapping[Site, tuple[Port, ...]], reduce: Callable[[Tensor], Tensor]
) -> dict[Site, Tensor]:
    """What a function makes of the out-projections [out, channels] of the sites that `read_ports` found, in turn."""
    found = {site: model.get_submodule(each[-1].path) for site, each in ports.items() if each[-1].side == "input"}
    return {site: reduce(read_weight(module)) for site, module in found.items()}
