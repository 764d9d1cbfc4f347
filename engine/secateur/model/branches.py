"""Branches: a feed-forward or an attention of one layer, and how its units lie in its linear layers.

`FeedForward` and `Attention` have the same attributes and methods, so that callers need not ask which one a branch is. Where
code is about one of the two, `feed_forwards` and `attentions` choose from branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from secateur.model.recipe import Rebuild
from secateur.model.sites import AttentionUnit, Kind, Stack, Unit, is_head

T = TypeVar("T")


@dataclass(frozen=True)
class UnitMap:
    """How units lie in the channels of a linear layer. The channels have the shape `shape`, and those that differ only along
    the dimensions `shared` belong to one unit.

    For example, key-value groups of two heads with three channels each have shape (groups, 6) and shared (1,).

    Attributes:
        shape: The shape that the channels of the units are viewed in.
        shared: The dimensions of `shape` along which channels belong to one unit.
        before: The number of channels before those of the units. They belong to no unit. A layer that makes queries, keys and
            values at once has some.
        after: The number of channels after those of the units.
    """

    shape: tuple[int, ...]
    shared: tuple[int, ...] = ()
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """The number of channels that belong to units."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """The number of all channels."""
        return self.before + self.size + self.after

    def fold(self, values: Tensor) -> Tensor:
        """Return the sums over each unit's channels, from [..., channels] to [..., units]."""
        if self.before or self.after:
            values = values.narrow(-1, self.before, self.size)
        if not self.shared:
            return values
        lead = values.shape[:-1]
        folded = values.reshape(*lead, *self.shape).sum([len(lead) + dim for dim in self.shared])  # [..., *unshared dims]
        return folded.reshape(*lead, -1)  # [..., units]

    def expand(self, units: Tensor) -> Tensor:
        """Return [..., channels] from [..., units]. Each channel gets the value of its unit; a channel of no unit gets 1."""
        lead = units.shape[:-1]
        folded = [1 if dim in self.shared else size for dim, size in enumerate(self.shape)]
        values = units.reshape(*lead, *folded).expand(*lead, *self.shape).reshape(*lead, -1)
        return torch.cat([values.new_ones(*lead, self.before), values, values.new_ones(*lead, self.after)], -1)

    def times(self, activation: Tensor, gate: Tensor) -> Tensor:
        """Return the activation [B, T, channels] with the units' channels multiplied by the gates of each example.

        Args:
            activation: The activation.
            gate: One value for all units of an example [B], or one for each unit [B, units].
        """
        # The product has the dtype of the gate: a gate rounded to 8 or 11 bits would be another gate.
        if gate.dim() == 2:
            return (activation * self.expand(gate).unsqueeze(1)).to(activation.dtype)  # Factors [B, 1, channels].
        scaled = (activation.narrow(-1, self.before, self.size) * gate.view(-1, 1, 1)).to(activation.dtype)
        if scaled.shape == activation.shape:
            return scaled
        return torch.cat([activation[..., : self.before], scaled, activation[..., self.before + self.size :]], -1)


@dataclass(frozen=True)
class Port:
    """The input or output side of a linear layer.

    Attributes:
        path: The path of the linear layer.
        side: Which side it is.
        map: How the units of a site lie in the channels of this side.
    """

    path: str
    side: Literal["input", "output"]
    map: UnitMap

    def channels(self, kept: Tensor, units: int) -> Tensor:
        """Return the sorted channels (int64) that belong to kept units or to no unit, out of `units` units."""
        mask = torch.zeros(units, dtype=torch.bool)
        mask[kept] = True
        return self.map.expand(mask).nonzero().flatten()


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward branch.

    Attributes:
        name: For example "encoder.0.ffn".
        stack: The stack that the branch belongs to.
        layer: The number of its layer.
        inputs: The paths of its in-projections, two if it is gated.
        output: The path of its out-projection.
        width: The number of its neurons.
        parts: How often each neuron occurs in the outputs of an in-projection. It is 2 where one layer makes the gates too.
    """

    name: str
    stack: Stack
    layer: int
    inputs: tuple[str, ...]
    output: str
    width: int
    parts: int = 1

    @property
    def kind(self) -> Kind:
        """The kind of the branch."""
        return "ffn"

    @property
    def path(self) -> str:
        """The path of the module that a forward pass calls first."""
        return self.inputs[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """The paths of its linear layers, in forward order."""
        return (*self.inputs, self.output)

    @property
    def linear_fields(self) -> dict[str, str]:
        """The fields that hold paths of linear layers, with the paths."""
        return {**{f"inputs[{number}]": path for number, path in enumerate(self.inputs)}, "output": self.output}

    @property
    def source(self) -> Stack:
        """The stack whose tokens keys and values are made of: without keys and values, its own."""
        return self.stack

    @property
    def source_linears(self) -> tuple[str, ...]:
        """The paths of the linear layers that read the states of another stack: none."""
        return ()

    @property
    def groups(self) -> int:
        """The number of key-value heads that the units belong to: 1, as neurons belong to no heads."""
        return 1

    @property
    def empty(self) -> bool:
        """Whether the branch has no units left."""
        return self.width == 0

    @property
    def output_width(self) -> int:
        """The number of channels that the out-projection reads."""
        return self.width

    @property
    def cached_channels(self) -> int:
        """The number of channels that a cache of keys and values holds for each token: none."""
        return 0

    @property
    def channels_refused(self) -> str | None:
        """Why channels of queries and keys cannot be pruned: None, as there are no such channels."""
        return None

    def match(self, *, ffn: Callable[[FeedForward], T], attention: Callable[[Attention], T]) -> T:
        """Return what the function for this class of branch returns for this branch."""
        return ffn(self)

    def core_flops(self, unit: Unit) -> float:
        """Return the FLOPs of attention's core for each pair of tokens that go with the units: none."""
        return 0.0

    def channels_of_unit(self, inputs: int) -> int:
        """Return the number of neighbouring inputs of the out-projection, which reads `inputs`, that belong to one unit: 1."""
        return 1

    def sites(self, unit: AttentionUnit) -> dict[str, tuple[Unit, int]]:
        """Return the site names of this branch, with the kind and the number of the units."""
        return {self.name: ("neuron", self.width)}

    def cut_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return every side of a linear layer that loses channels when units go."""
        hidden = UnitMap((self.width,))
        projected = UnitMap((self.parts, self.width), (0,)) if self.parts > 1 else hidden
        return (*(Port(path, "output", projected) for path in self.inputs), Port(self.output, "input", hidden))

    def cut_whole(self) -> tuple[Port, ...]:
        """Return every side of a linear layer that has channels of units."""
        return self.cut_at("neuron")

    def observed_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return where the activations of the units are observed: the input of the out-projection."""
        return self.cut_at(unit)[-1:]

    def read_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return where the out-projection reads the units."""
        return self.cut_at(unit)[-1:]

    def gated_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return the ports whose tensors a common gate on all units scales by that gate."""
        return self.cut_at(unit)[-1:]

    def unchanged_by_gate(self, unit: Unit) -> tuple[str, ...]:
        """Return the paths of its linear layers that return the same with and without a gate on the units."""
        return self.linears[:-1]

    def replaced_by_nothing(self, rebuild: Rebuild) -> None:
        """Note in a rebuild what changes, besides linear layers, when all units go: nothing."""


@dataclass(frozen=True)
class Attention:
    """An attention branch.

    Attributes:
        name: For example "decoder.2.cross_attention".
        kind: Whether it is self-attention or cross-attention.
        stack: The stack that the branch belongs to.
        layer: The number of its layer.
        path: The path of its module, which a forward pass calls first.
        query: The path of the projection of queries.
        key: The path of the projection of keys.
        value: The path of the projection of values. Where one layer makes all three, one after the other, the three paths are
            the same (`joint`); there is no GQA then.
        output: The path of its out-projection.
        heads: The number of query heads.
        groups: The number of key-value heads, equal to `heads` without GQA.
        head_dim: The number of channels of a head.
        rotary: Whether Q and K channels c and c + head_dim/2 are rotated together. Such a pair is one unit.
        channels_refused: Why Q and K channels cannot be pruned, or None.
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

    @property
    def linear_fields(self) -> dict[str, str]:
        """The fields that hold paths of linear layers, with the paths."""
        return {"query": self.query, "key": self.key, "value": self.value, "output": self.output}

    @property
    def source(self) -> Stack:
        """The stack whose tokens keys and values are made of."""
        return "encoder" if self.kind == "cross_attention" else self.stack

    @property
    def source_linears(self) -> tuple[str, ...]:
        """The paths of the linear layers that read the states of another stack: the keys and values of cross-attention."""
        return (self.key, self.value) if self.kind == "cross_attention" else ()

    @property
    def empty(self) -> bool:
        """Whether the branch has no units left."""
        return self.heads == 0

    @property
    def output_width(self) -> int:
        """The number of channels that the out-projection reads."""
        return self.heads * self.head_dim

    @property
    def cached_channels(self) -> int:
        """The number of channels that a cache of keys and values holds for each token."""
        return 2 * self.groups * self.head_dim

    def match(self, *, ffn: Callable[[FeedForward], T], attention: Callable[[Attention], T]) -> T:
        """Return what the function for this class of branch returns for this branch."""
        return attention(self)

    def core_flops(self, unit: Unit) -> float:
        """Return the FLOPs of attention's core for each pair of tokens that go with the units: all, if they are heads.

        Channels count with their weights alone, as what they save in the core depends on how they lie in the heads.
        """
        return 4.0 * self.head_dim * self.heads if is_head(unit) else 0.0

    def channels_of_unit(self, inputs: int) -> int:
        """Return the number of neighbouring inputs of the out-projection, which reads `inputs`, that belong to one unit: the
        channels of a head where all heads are whole, otherwise 1."""
        return self.head_dim if inputs == self.output_width else 1

    def sites(self, unit: AttentionUnit) -> dict[str, tuple[Unit, int]]:
        """Return the site names of this branch, with the kind and the number of the units.

        A key-value head goes with its query heads. With one key-value head (multi-query attention) single query heads go.
        """
        if unit == "head":
            return {self.name: ("query_head", self.heads) if self.groups == 1 < self.heads else ("head", self.groups)}
        channels = self.groups * self.head_dim
        value: dict[str, tuple[Unit, int]] = {f"{self.name}.vo": ("vo_channel", channels)}
        if self.channels_refused is not None:
            return value
        return {f"{self.name}.qk": ("qk_channel", channels // 2 if self.rotary else channels), **value}

    def cut_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return every side of a linear layer that loses channels when units go."""
        groups, repeat, width = self.groups, self.heads // max(self.groups, 1), self.head_dim
        if unit == "query_head":
            by_head = UnitMap((self.heads, width), (1,))
            return (Port(self.query, "output", by_head), Port(self.output, "input", by_head))
        if unit == "head":
            # Queries and the out-projection have `repeat` heads for each head of keys and values.
            of_queries, of_keys = UnitMap((groups, repeat * width), (1,)), UnitMap((groups, width), (1,))
            output = Port(self.output, "input", of_queries)
            if self.joint:
                return (Port(self.query, "output", UnitMap((3, groups, width), (0, 2))), output)
            projections = zip((self.query, self.key, self.value), (of_queries, of_keys, of_keys), strict=True)
            return (*(Port(path, "output", units) for path, units in projections), output)
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

    def cut_whole(self) -> tuple[Port, ...]:
        """Return every side of a linear layer that has channels of units."""
        return self.cut_at("head")

    def query_and_key(self) -> tuple[Port, Port]:
        """Return where the Q channels are, and where the K channels are."""
        groups, repeat, width = self.groups, self.heads // max(self.groups, 1), self.head_dim
        if self.rotary:
            query, key = UnitMap((groups, repeat, 2, width // 2), (1, 2)), UnitMap((groups, 2, width // 2), (1,))
        else:
            query, key = UnitMap((groups, repeat, width), (1,)), UnitMap((groups * width,))
        if self.joint:
            query, key = replace(query, after=2 * query.size), replace(key, before=key.size, after=key.size)
        return Port(self.query, "output", query), Port(self.key, "output", key)

    def observed_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return where the activations of the units are observed: the head output, the V channels, or the Q and K channels."""
        if unit == "qk_channel":
            return self.query_and_key()
        ports = self.cut_at(unit)
        return ports[:1] if unit == "vo_channel" else ports[-1:]

    def read_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return where the out-projection reads the units, or the outputs of both Q and K, which no layer reads."""
        return self.query_and_key() if unit == "qk_channel" else self.cut_at(unit)[-1:]

    def gated_at(self, unit: Unit) -> tuple[Port, ...]:
        """Return the ports whose tensors a common gate on all units scales by that gate.

        A common gate on the V channels passes through the attention, which is linear in them, to the out-projection's input.
        """
        ports = self.cut_at(unit)
        return ports if unit == "qk_channel" else ports[-1:]

    def unchanged_by_gate(self, unit: Unit) -> tuple[str, ...]:
        """Return the paths of its linear layers that return the same with and without a gate on the units at `gated_at`."""
        return (self.value,) if unit == "qk_channel" else self.linears[:-1]

    def whole_heads(self, kept: Mapping[Unit, Tensor]) -> Tensor | None:
        """Return the kept heads if whole heads go, otherwise None.

        Args:
            kept: The kept units (int64) by kind. Without V channels no head gives anything, whatever its Q and K.
        """
        for unit, units in kept.items():
            if is_head(unit) or (unit == "vo_channel" and not len(units)):
                return units
        return None

    def replaced_by_nothing(self, rebuild: Rebuild) -> None:
        """Note in a rebuild what changes, besides linear layers, when all heads go: nothing is attended to."""
        own = self.output.startswith(f"{self.path}.")
        rebuild.recipe["no_attention"][self.path] = self.output.removeprefix(f"{self.path}.") if own else None


Branch = FeedForward | Attention


def feed_forwards(branches: Iterable[Branch]) -> list[FeedForward]:
    """Return the feed-forward branches among branches."""
    return [branch for branch in branches if isinstance(branch, FeedForward)]


def attentions(branches: Iterable[Branch]) -> list[Attention]:
    """Return the attention branches among branches."""
    return [branch for branch in branches if isinstance(branch, Attention)]
