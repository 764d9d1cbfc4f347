"""Sites: the places of a model that can be pruned, and how their units lie in the model's linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from secateur.support.errors import InputError

Stack = Literal["encoder", "decoder"]
Kind = Literal["ffn", "self_attention", "cross_attention"]
Unit = Literal["neuron", "head", "query_head", "qk_channel", "vo_channel"]
AttentionUnit = Literal["head", "channel"]


@dataclass(frozen=True)
class Site:
    """One prunable place: pure data, so that scores and plans can carry it.

    name: for example "encoder.0.ffn", "decoder.2.cross_attention", "encoder.1.self_attention.qk".
    units: how many there are; groups: the attention heads (key-value groups) that the units belong to, 1 for an FFN.
    parameters: weights that one unit holds, biases included.
    flops, source_flops: multiply-adds x 2 that one unit costs per token of its own stack, and per encoder token
    (cross-attention's keys and values); core_flops: per pair of query and key token.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def branch_name(site: str) -> str:
    """The branch that a site of this name belongs to: the two channel sites of an attention share one."""
    return site.removesuffix(".qk").removesuffix(".vo")


def selected(found: Sequence[Site], select: str, refused: str = "") -> list[Site]:
    """Those of the sites that match a selection (see `discovery.sites`). Raises InputError where it is malformed or empty, in
    words that end in what the model refuses."""
    alternatives = [alternative.strip().split(".") for alternative in select.split(",")]
    chosen = [site for site in found if any(all(_matches(site, w) for w in words) for words in alternatives)]
    if not chosen:
        few = f"{select!r} selects none of the model's {len(found)} sites, such as {found[0].name!r}"
        raise InputError(f"sites: {few}{refused}")
    return chosen


def _matches(site: Site, word: str) -> bool:
    first, dash, last = word.partition("-")
    if first.isdigit() and (not dash or last.isdigit()):
        return int(first) <= site.layer <= int(last if dash else first)
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
