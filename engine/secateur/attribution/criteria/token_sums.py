"""Sums of activations over real tokens. Criteria without gradients are functions of these sums."""

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
from secateur.support.tensors import on_cpu
from secateur.tasks import Batch


@dataclass(frozen=True)
class TokenMoments:
    """Sums over the real tokens of each example, for the activations x of a port. All tensors are float64.

    Attributes:
        count: The number of real tokens [B, 1].
        absolute: The sums of |x| [B, channels].
        plain: The sums of x [B, channels].
        square: The sums of x^2 [B, channels].
    """

    count: Tensor
    absolute: Tensor
    plain: Tensor
    square: Tensor

    @classmethod
    def of(cls, x: Tensor, real: Tensor) -> TokenMoments:
        """Sum activations over real tokens.

        Args:
            x: The activations [B, T, channels].
            real: Which tokens are real, bool [B, T].

        Returns:
            The sums of each example.
        """
        real = real.to(x.device)
        x = x.double().masked_fill(~real.unsqueeze(-1), 0)  # [B, T, channels], padding set to 0
        return cls(real.sum(1, keepdim=True).double(), x.abs().sum(1), x.sum(1), x.square().sum(1))

    @classmethod
    def zero(cls, channels: int) -> TokenMoments:
        """Return the sums over no tokens, as one example (B = 1) on the CPU.

        Args:
            channels: The number of channels.
        """
        return cls(*(torch.zeros(1, width, dtype=torch.float64) for width in (1, channels, channels, channels)))

    def variance(self) -> Tensor:
        """Return the sample variance of each channel over the tokens [B, channels]; 0 if there is only one token."""
        return (self.square - self.plain.square() / self.count).clamp(min=0) / (self.count - 1).clamp(min=1)


UnitScores = Callable[[Site, Sequence[tuple[Port, TokenMoments]]], Tensor]


class TokenSums(Scorer):
    """A scorer by a function of the sums of activations at each site's ports, with forward passes alone.

    The scores of all examples are the function of the sums over all examples. They may differ from the sum of the examples'
    own scores, because an example's own scores are the function of its own sums.

    Args:
        context: The arguments of the attribution.
        ports: The ports at which activations are summed, by site.
        unit_scores: A function of a site and its ports' sums, which returns scores [B, units].
    """

    def __init__(self, context: ScoringContext, ports: Mapping[Site, tuple[Port, ...]], unit_scores: UnitScores) -> None:
        self._model, self._task, self._ports, self._unit_scores = context.model, context.task, ports, unit_scores
        has_encoder = any(branch.stack == "encoder" for branch in branches(context.model).values())
        self._over_target = context.task.decodes_target and has_encoder
        self._branches = branches_of(context.model, ports)
        self._totals = {port: TokenMoments.zero(port.map.channels) for of_site in ports.values() for port in of_site}

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return the function of each example's own sums, [B, units] by site. Add these sums to those of all examples."""
        of_batch: dict[Port, TokenMoments] = {}

        def observe(port: Port, real: Tensor, activation: Tensor) -> None:
            of_batch[port] = TokenMoments.of(activation, real)

        observers = {
            port: partial(observe, port, self._real(self._branches[site], port, batch))
            for site, ports in self._ports.items()
            for port in ports
        }
        with torch.no_grad(), observed(self._model, observers):
            self._task.logits(self._model, batch)
        totals = [total for port in of_batch for total in vars(self._totals[port]).values()]
        sums = [of_port.sum(0, keepdim=True) for moments in of_batch.values() for of_port in vars(moments).values()]
        for total, moved in zip(totals, on_cpu(sums), strict=True):  # [1, ...]
            total += moved
        return self._scores(of_batch)

    def partial_sums(self) -> PartialSums:
        """Return the sums over all examples so far, by port and kind of sum."""
        names = {port: f"{port.path}/{port.side}" + f"/{port.map.before}" * bool(port.map.before) for port in self._totals}
        moments = [(names[port], kind, tensor) for port, sums in self._totals.items() for kind, tensor in vars(sums).items()]
        return PartialSums({f"{name}/{kind}": tensor for name, kind, tensor in moments})

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the function of the sums over all examples. The totals of the examples' own scores are not used."""
        return Result({site.name: scores[0].cpu() for site, scores in self._scores(self._totals).items()})

    def _scores(self, sums: Mapping[Port, TokenMoments]) -> dict[Site, Tensor]:
        """Return the scores [B, units] of each site from the sums at its ports."""
        return {site: self._unit_scores(site, [(port, sums[port]) for port in ports]) for site, ports in self._ports.items()}

    def _real(self, branch: Branch, port: Port, batch: Batch) -> Tensor:
        """Return which tokens at a port are real, bool [B, T].

        A decoder that has an encoder runs over the target, if the task's `decodes_target` says so. The keys and values of its
        cross-attention are the exception: they run over the input, as all other ports do.
        """
        reads_encoder = port.path in branch.source_linears
        return batch.real(target=branch.stack == "decoder" and self._over_target and not reads_encoder)


def read_ports(model: nn.Module, sites: Sequence[Site]) -> dict[Site, tuple[Port, ...]]:
    """Return the ports at which an out-projection reads the units of each site.

    No out-projection reads Q/K channels. Their ports are the outputs of both Q and K.

    Args:
        model: The model.
        sites: The sites.

    Returns:
        The ports by site: one port, or the two ports of Q and K.
    """
    return {site: branch.read_at(site.unit) for site, branch in branches_of(model, sites).items()}


def read_weights(
    model: nn.Module, ports: Mapping[Site, tuple[Port, ...]], reduce: Callable[[Tensor], Tensor]
) -> dict[Site, Tensor]:
    """Reduce the weight of each site's out-projection.

    Args:
        model: The model. Offloaded weights are loaded one after another.
        ports: The ports of each site, from `read_ports`.
        reduce: A function of a weight [out, channels], such as the norms of its columns [channels].

    Returns:
        The function's results by site. Sites of Q/K channels have no out-projection and are left out.
    """
    output_ports = {site: of_site[-1] for site, of_site in ports.items() if of_site[-1].side == "input"}
    modules = {site: model.get_submodule(port.path) for site, port in output_ports.items()}
    return {site: reduce(read_weight(module)) for site, module in modules.items()}
