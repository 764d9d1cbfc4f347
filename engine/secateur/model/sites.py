"""Sites: the prunable places of a model. A site is pure data and knows how its units behave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from secateur.support.errors import FieldError, InputError
from secateur.support.fields import checked_fields, shown, whole_number
from secateur.support.html import html_table

Stack = Literal["encoder", "decoder"]
Kind = Literal["ffn", "self_attention", "cross_attention"]
Unit = Literal["neuron", "head", "query_head", "qk_channel", "vo_channel"]
AttentionUnit = Literal["head", "channel"]
InStock = Literal["free", "shared", "whole"]


@dataclass(frozen=True, repr=False)
class Site:
    """One prunable place. It holds no tensors, so that scores and plans can carry it.

    Attributes:
        name: For example "encoder.0.ffn", "decoder.2.cross_attention" or "encoder.1.self_attention.qk".
        kind: The kind of the branch that the site belongs to.
        stack: The stack that the branch belongs to.
        layer: The number of the layer in its stack, from 0.
        unit: The kind of the units.
        units: The number of units.
        groups: The number of attention heads (key-value groups) that the units belong to; 1 for an FFN.
        parameters: The weights that one unit holds, biases included.
        flops: The FLOPs (2 for a multiply-add) that one unit costs for each token of its own stack.
        source_flops: The FLOPs that one unit costs for each encoder token (keys and values of cross-attention).
        core_flops: The FLOPs that one unit costs for each pair of a query token and a key token.
        in_stock: What a stock config can say of the site: "free", any number of units that all layers share; "shared", the same
            units in all layers of the stack; "whole", all units alone.
    """

    name: str
    kind: Kind
    stack: Stack
    layer: int
    unit: Unit
    units: int
    groups: int
    parameters: float
    flops: float
    source_flops: float
    core_flops: float
    in_stock: InStock = "free"

    @property
    def block(self) -> str:
        """The name of the block that the site belongs to, such as "encoder.0"."""
        return f"{self.stack}.{self.layer}"

    @property
    def is_channel(self) -> bool:
        """Whether the units are channels of attention heads, and not whole heads or neurons."""
        return self.unit in ("qk_channel", "vo_channel")

    @property
    def is_head(self) -> bool:
        """Whether the units are whole heads."""
        return is_head(self.unit)

    @property
    def read_by_output(self) -> bool:
        """Whether the out-projection reads the units. It reads all but Q and K channels, which end in attention weights."""
        return self.unit != "qk_channel"

    @property
    def channel_groups(self) -> int:
        """The number of heads that the units are channels of; 1 where the units are no channels."""
        return self.groups if self.is_channel else 1

    def ranked_groups(self, per_head: bool) -> int:
        """Return the number of groups within which units are ranked: the heads for channels if `per_head`, otherwise 1."""
        return self.channel_groups if per_head else 1

    def step(self, align: int, per_head: bool) -> int:
        """Return the number of units that come or go together.

        Args:
            align: The multiple that FFN widths are kept at; channels of a head are kept at multiples of at most 8.
            per_head: Whether all heads keep the same number of channels.
        """
        if self.unit == "neuron":
            return align
        return self.groups * min(align, 8) if per_head and self.is_channel else 1

    @property
    def group(self) -> str:
        """The stack and the kind of the site, as in "encoder ffn" or "decoder cross attention qk"."""
        return self.name.replace(f".{self.layer}.", ".", 1).replace(".", " ").replace("_", " ")

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {counted(self.units, self.unit)})"

    def to_json(self) -> dict[str, Any]:
        """Return the site as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, where: str, content: Any) -> Site:
        """Return the site of what `to_json` returned.

        Args:
            where: The place of the content, which an error message begins with.
            content: The JSON values.

        Raises:
            FieldError: A field is missing, unknown, of another type, or out of range.
        """
        site = cls(**checked_fields(where, content, cls))
        costs = (site.flops, site.source_flops, site.core_flops)
        if site.layer < 0 or site.groups < 1 or site.units < 1 or site.units % site.channel_groups:
            counts = f"layer {site.layer}, {site.units} units in {site.groups} groups"
            raise FieldError(f"{where}: expected a layer from 0 and units in whole groups, got {counts}")
        if site.parameters <= 0 or min(costs) < 0 or sum(costs) <= 0:
            raise FieldError(f"{where}: expected a positive cost of a unit, got {site.parameters} parameters, FLOPs {costs}")
        return site


class Sites(list[Site]):
    """A list of sites, whose repr is one line."""

    def __repr__(self) -> str:
        groups = (
            f"{group}: {counted(sum(site.units for site in sites), sites[0].unit)} in {counted(len(sites), 'site')}"
            for group, sites in by_group(self).items()
        )
        return f"Sites({'; '.join(groups)})"

    def _repr_html_(self) -> str:
        rows = [
            (
                group, len(sites), f"{sum(site.units for site in sites):,}", sites[0].unit.replace("_", " "),
                f"{sum(site.units * site.parameters for site in sites):,.0f}",
            )
            for group, sites in by_group(self).items()
        ]  # fmt: skip
        return html_table(f"{counted(len(self), 'site')}", ("sites", "number", "units", "unit", "parameters"), rows)


def by_group(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Return sites by their `Site.group`, in the order of the first site of each group."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return groups


def counted(number: int, what: str) -> str:
    """Return a number with the word for what it counts: "1 site", "2,048 neurons"."""
    return f"{number:,} {what.replace('_', ' ')}{'' if number == 1 else 's'}"


def sites_from_json(where: str, content: Any) -> tuple[Site, ...]:
    """Return sites of a list of what `Site.to_json` returned.

    Args:
        where: The place of the list, which an error message begins with.
        content: The list.

    Raises:
        FieldError: The content is not a list with at least one site, two sites have one name, or as in `Site.from_json`.
    """
    if not isinstance(content, list) or not content:
        raise FieldError(f"{where}: expected a list of sites, got {shown(content)}")
    sites = tuple(Site.from_json(f"{where}[{number}]", entry) for number, entry in enumerate(content))
    require_distinct(where, sites)
    return sites


def require_distinct(where: str, sites: Sequence[Site]) -> None:
    """Check that no two sites have one name.

    Args:
        where: The place of the sites, which the error message begins with.
        sites: The sites.

    Raises:
        FieldError: Two sites have one name.
    """
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise FieldError(f"{where}: expected each site once, got {repeated!r} twice")


def is_head(unit: Unit) -> bool:
    """Return whether units of this kind are whole heads."""
    return unit in ("head", "query_head")


def branch_name(site: str) -> str:
    """Return the name of the branch that a site of this name belongs to. The two channel sites of an attention share one."""
    return site.removesuffix(".qk").removesuffix(".vo")


def selected(sites: Sequence[Site], select: str, refused: str = "") -> list[Site]:
    """Return the sites that match a selection.

    Args:
        sites: The sites to choose from.
        select: The selection, as in `discovery.sites`.
        refused: The end of the error message, which says what the model refuses.

    Raises:
        InputError: The selection is malformed or matches no site.
    """
    if not isinstance(select, str):
        raise InputError(f"sites: expected a text such as 'encoder.ffn', got {shown(select)}")
    alternatives = [alternative.strip().split(".") for alternative in select.split(",")]
    chosen = [site for site in sites if any(all(_matches(site, word) for word in words) for words in alternatives)]
    if not chosen:
        few = f"{select!r} selects none of the model's {len(sites)} sites, such as {sites[0].name!r}"
        raise InputError(f"sites: {few}{refused}")
    return chosen


def _matches(site: Site, word: str) -> bool:
    first, dash, last = word.partition("-")
    lowest, highest = whole_number(first), whole_number(last if dash else first)
    if lowest is not None and highest is not None:
        return lowest <= site.layer <= highest
    traits: dict[str, bool] = {
        "encoder": site.stack == "encoder",
        "decoder": site.stack == "decoder",
        "ffn": site.kind == "ffn",
        "attention": site.kind != "ffn",
        "self": site.kind == "self_attention",
        "cross": site.kind == "cross_attention",
        "self_attention": site.kind == "self_attention",
        "cross_attention": site.kind == "cross_attention",
        "qk": site.unit == "qk_channel",
        "vo": site.unit == "vo_channel",
    }
    if word not in traits:
        raise InputError(f"sites: expected words of {', '.join(traits)}, a layer or a range as 0-3, got {word!r}")
    return traits[word]
