"""Branches: a feed-forward or an attention of one layer, and how its units lie in its linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from secateur.model.sites import AttentionUnit, Stack, Unit


@dataclass(frozen=True)
class UnitMap:
    """How units lie in the channels of a linear layer: the channels, seen in `shape`, belong to one unit along `shared`.

    A key-value group of two heads with three channels: shape (groups, 6), shared (1,). A layer that makes queries, keys and
    values at once has channels `before` and `after` these that are no unit's.
    """

    shape: tuple[int, ...]
    shared: tuple[int, ...] = ()
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """How many channels belong to units."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """How many there are in all."""
        return self.before + self.size + self.after

    def fold(self, values: Tensor) -> Tensor:
        """[..., channels] to [..., units]: the sum over each unit's channels."""
        if self.before or self.after:
            values = values.narrow(-1, self.before, self.size)
        if not self.shared:
            return values
        lead = values.shape[:-1]
        folded = values.reshape(*lead, *self.shape).sum([len(lead) + dim for dim in self.shared])
        return folded.reshape(*lead, -1)

    def expand(self, units: Tensor) -> Tensor:
        """[units] to [channels]: each channel gets its unit's value, and one of no unit 1."""
        folded = [1 if dim in self.shared else size for dim, size in enumerate(self.shape)]
        values = units.reshape(folded).expand(self.shape).reshape(-1)
        return torch.cat([values.new_ones(self.before), values, values.new_ones(self.after)])

    def times(self, activation: Tensor, gate: Tensor) -> Tensor:
        """activation [B, T, channels], the units' channels multiplied by each example's gate [B]."""
        # In the gate's dtype first: a gate rounded to 8 or 11 bits would be another gate.
        scaled = (activation.narrow(-1, self.before, self.size) * gate.view(-1, 1, 1)).to(activation.dtype)
        if scaled.shape == activation.shape:
            return scaled
        return torch.cat([activation[..., : self.before], scaled, activation[..., self.before + self.size :]], -1)


@dataclass(frozen=True)
class Port:
    """The input or output side of a linear layer, indexed by a site's units."""

    path: str
    side: Literal["input", "output"]
    map: UnitMap

    def channels(self, kept: Tensor, units: int) -> Tensor:
        """The channels that belong to the kept units, or to none, sorted (int64)."""
        mask = torch.zeros(units, dtype=torch.bool)
        mask[kept] = True
        return self.map.expand(mask).nonzero().flatten()


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward branch: the paths of its in-projections (two if gated) and of its out-projection.

    parts: how often each neuron occurs in the outputs of an in-projection: 2 where one layer makes the gates, too.
    """

    name: str
    stack: Stack
    layer: int
    inputs: tuple[str, ...]
    output: str
    width: int
    parts: int = 1

    @property
    def linears(self) -> tuple[str, ...]:
        """The paths of its linear layers, in forward order."""
        return (*self.inputs, self.output)

    def sites(self, unit: AttentionUnit) -> dict[str, tuple[Unit, int]]:
        """Site names of this branch, with unit kind and count."""
        return {self.name: ("neuron", self.width)}

    def cut_at(self, unit: Unit) -> tuple[Port, ...]:
        """Every side of a linear layer that loses channels when units go."""
        read = UnitMap((self.width,))
        made = UnitMap((self.parts, self.width), (0,)) if self.parts > 1 else read
        return (*(Port(path, "output", made) for path in self.inputs), Port(self.output, "input", read))

    def observed_at(self, unit: Unit) -> tuple[Port, ...]:
        """Where the units' activations are seen."""
        return (self.cut_at(unit)[-1],)


@dataclass(frozen=True)
class Attention:
    """An attention branch: the paths of its module and projections, and its shape.

    query, key, value: one path where one layer makes all three, one after the other (`joint`; no GQA then).
    heads: query heads; groups: key-value heads (equal to heads without GQA); head_dim: channels of a head.
    rotary: Q and K channels c and c + head_dim/2 are rotated together, so they are one unit.
    channels_refused: why Q/K channels cannot be pruned, or None.
    """

    name: str
    kind: Literal["self_attention", "cross_attention"]
    stack: Stack
    layer: int
    path: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    groups: int
    head_dim: int
    rotary: bool = False
    channels_refused: str | None = None

    @property
    def joint(self) -> bool:
        """Whether one layer makes queries, keys and values."""
        return self.query == self.value

    @property
    def linears(self) -> tuple[str, ...]:
        """The paths of its linear layers, in forward order."""
        return tuple(dict.fromkeys((self.query, self.key, self.value, self.output)))

    def sites(self, unit: AttentionUnit) -> dict[str, tuple[Unit, int]]:
        """Site names of this branch, with unit kind and count. A key-value head goes with its query heads; where there is but
        one (multi-query attention), single query heads go."""
        if unit == "head":
            return {self.name: ("query_head", self.heads) if self.groups == 1 < self.heads else ("head", self.groups)}
        channels = self.groups * self.head_dim
        found: dict[str, tuple[Unit, int]] = {f"{self.name}.vo": ("vo_channel", channels)}
        if self.channels_refused is None:
            found = {f"{self.name}.qk": ("qk_channel", channels // 2 if self.rotary else channels), **found}
        return found

    def cut_at(self, unit: Unit) -> tuple[Port, ...]:
        """Every side of a linear layer that loses channels when units go."""
        groups, repeat, width = self.groups, self.heads // max(self.groups, 1), self.head_dim
        if unit == "query_head":
            of_heads = UnitMap((self.heads, width), (1,))
            return (Port(self.query, "output", of_heads), Port(self.output, "input", of_heads))
        if unit == "head":
            of_heads, of_groups = UnitMap((groups, repeat * width), (1,)), UnitMap((groups, width), (1,))
            made = zip((self.query, self.key, self.value), (of_heads, of_groups, of_groups), strict=True)
            read = Port(self.output, "input", of_heads)
            if self.joint:
                return (Port(self.query, "output", UnitMap((3, groups, width), (0, 2))), read)
            return (*(Port(path, "output", units) for path, units in made), read)
        if unit == "vo_channel":
            before = 2 * groups * width if self.joint else 0
            return (
                Port(self.value, "output", UnitMap((groups * width,), before=before)),
                Port(self.output, "input", UnitMap((groups, repeat, width), (1,))),
            )
        if not self.joint:
            return self.query_and_key()
        pairs = UnitMap((2, groups, 2, width // 2), (0, 2)) if self.rotary else UnitMap((2, groups * width), (0,))
        return (Port(self.query, "output", replace(pairs, after=groups * width)),)

    def query_and_key(self) -> tuple[Port, Port]:
        """Where the Q and K channels are, each for itself."""
        groups, repeat, width = self.groups, self.heads // max(self.groups, 1), self.head_dim
        if self.rotary:
            query, key = UnitMap((groups, repeat, 2, width // 2), (1, 2)), UnitMap((groups, 2, width // 2), (1,))
        else:
            query, key = UnitMap((groups, repeat, width), (1,)), UnitMap((groups * width,))
        if self.joint:
            query, key = replace(query, after=2 * query.size), replace(key, before=key.size, after=key.size)
        return Port(self.query, "output", query), Port(self.key, "output", key)

    def observed_at(self, unit: Unit) -> tuple[Port, ...]:
        """Where the units' activations are seen: the head output, the V channels, or the Q and K channels."""
        if unit == "qk_channel":
            return self.query_and_key()
        ports = self.cut_at(unit)
        return ports[:1] if unit == "vo_channel" else ports[-1:]


Branch = FeedForward | Attention
