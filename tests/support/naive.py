"""The formulas as slow loops that share nothing with the engine: gates at hand-written paths, one example at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from cases import Case
from numpy.polynomial import Legendre
from torch import Tensor, nn

import secateur


@dataclass(frozen=True)
class Gated:
    """One linear layer's input or output, and the unit that each of its channels belongs to."""

    path: str
    side: Literal["input", "output"]
    unit_of_channel: Tensor


def gates(case: Case, model: Any, unit: str) -> dict[str, list[Gated]]:
    """Site name to the places that its units' gates multiply.

    Where algebra allows it the place is another one than the engine's: a gate on a head's output is one on its values, and a
    gate on a value channel is one on the out-projection's input.
    """
    c = model.config
    found: dict[str, list[Gated]] = {}
    if c.model_type in ("t5", "mt5"):
        for stack, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
            for i in range(layers):
                block = f"{stack}.block.{i}.layer"
                kinds = {"self_attention": f"{block}.0.SelfAttention"}
                if stack == "decoder":
                    kinds["cross_attention"] = f"{block}.1.EncDecAttention"
                for kind, path in kinds.items():
                    names = [f"{path}.{p}" for p in "qkvo"]
                    found |= _attention(f"{stack}.{i}.{kind}", names, c.num_heads, c.num_heads, c.d_kv, unit)
                last = 2 if stack == "decoder" else 1
                wo = f"{block}.{last}.DenseReluDense.wo"
                found[f"{stack}.{i}.ffn"] = [Gated(wo, "input", torch.arange(c.d_ff))]
        return found
    if c.model_type in ("bart", "marian"):
        for stack, heads, inner in (
            ("encoder", c.encoder_attention_heads, c.encoder_ffn_dim),
            ("decoder", c.decoder_attention_heads, c.decoder_ffn_dim),
        ):
            for i in range(2):
                block = f"model.{stack}.layers.{i}"
                for kind, path in {"self_attention": "self_attn", "cross_attention": "encoder_attn"}.items():
                    if stack == "decoder" or kind == "self_attention":
                        names = [f"{block}.{path}.{p}_proj" for p in ("q", "k", "v", "out")]
                        found |= _attention(f"{stack}.{i}.{kind}", names, heads, heads, 24 // heads, unit)
                found[f"{stack}.{i}.ffn"] = [Gated(f"{block}.fc2", "input", torch.arange(inner))]
        return found
    layer, attention, down = BLOCKS[c.model_type]
    stack, heads = case.kind, c.num_attention_heads
    groups, width = getattr(c, "num_key_value_heads", None) or heads, getattr(c, "head_dim", None) or 24 // heads
    rotary = hasattr(c, "rope_parameters")
    for i in range(c.num_hidden_layers):
        names = [f"{layer}.{i}.{path}" for path in attention]
        site = f"{stack}.{i}.self_attention"
        found |= _attention(site, names, heads, groups, width, unit, rotary=rotary, qk=case.qk_channels)
        found[f"{stack}.{i}.ffn"] = [Gated(f"{layer}.{i}.{down}", "input", torch.arange(37))]
    return found


_BERT = ([f"attention.{p}" for p in ("self.query", "self.key", "self.value", "output.dense")], "output.dense")
_LLAMA = ("model.layers", [f"self_attn.{p}_proj" for p in "qkvo"], "mlp.down_proj")
# By model type: the list of blocks, and in a block queries, keys, values and out-projection, and the FFN's last layer.
BLOCKS = {
    **{name: (f"{name}.encoder.layer", *_BERT) for name in ("bert", "roberta", "electra")},
    "distilbert": ("distilbert.transformer.layer", [f"attention.{p}_lin" for p in ("q", "k", "v", "out")], "ffn.lin2"),
    "modernbert": ("model.layers", ["attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo"], "mlp.Wo"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _LLAMA),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"], "mlp.c_proj"),
    "vit": ("vit.layers", [f"attention.{p}_proj" for p in "qkvo"], "mlp.fc2"),
    "opt": ("model.decoder.layers", [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")], "fc2"),
}


def _attention(
    site: str, names: list[str], heads: int, groups: int, width: int, unit: str, rotary: bool = False, qk: bool = True
) -> dict[str, list[Gated]]:
    q, k, v, o = names
    repeat = heads // groups
    group_of, channel_of = torch.arange(heads * width) // width // repeat, torch.arange(heads * width) % width
    if unit == "head" and groups == 1 < heads:  # Single query heads: no value is one's own.
        return {site: [Gated(o, "input", torch.arange(heads * width) // width)]}
    if unit == "head":
        of_values = torch.arange(groups * width) // width
        return {site: [Gated(v, "output", of_values if v != k else _last(of_values))]}
    found = {f"{site}.vo": [Gated(o, "input", group_of * width + channel_of)]}
    if qk:
        # Rotary positions turn channels c and c + width/2 into each other: one unit.
        pairs = width // 2 if rotary else width
        of_query = group_of * pairs + channel_of % pairs
        of_key = torch.arange(groups * width) // width * pairs + torch.arange(groups * width) % width % pairs
        if q == k:  # One layer makes queries, keys and values.
            none = torch.full_like(of_query, NONE)
            of_query, of_key = torch.cat([of_query, none, none]), torch.cat([none, of_key, none])
        found[f"{site}.qk"] = [Gated(q, "output", of_query), Gated(k, "output", of_key)]
    return found


NONE = -1  # Instead of a unit: the channel has no gate.


def _last(units: Tensor) -> Tensor:
    """Of a layer that makes queries, keys and values, the values."""
    return torch.cat([torch.full_like(units, NONE).repeat(2), units])


@contextmanager
def gated(model: nn.Module, places: Mapping[str, Sequence[Gated]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies each site's channels by its units' gate values inside."""
    with ExitStack() as stack:
        for site, of_site in places.items():
            for place in of_site:
                with_none = torch.cat([values[site], values[site].new_ones(1)])
                factor, module = with_none[place.unit_of_channel], model.get_submodule(place.path)
                if place.side == "input":
                    handle = module.register_forward_pre_hook(lambda m, a, f=factor: (a[0] * f.to(a[0].dtype),))
                else:
                    handle = module.register_forward_hook(lambda m, a, out, f=factor: out * f.to(out.dtype))
                stack.callback(handle.remove)
        yield


def alone(case: Case, model: Any, example: Mapping[str, Any], target: Any = None) -> tuple[Tensor, list[int]]:
    """One example without batch or padding: logits [target positions, classes] and the wanted class at each."""
    reader: Any = case.task.reader
    if isinstance(case.task, secateur.TokenClassification):
        encoded = reader(example["tokens"], is_split_into_words=True)
        logits, words = model(torch.tensor([encoded["input_ids"]])).logits[0], encoded.word_ids()
        first = [words.index(word) for word in range(len(example["tokens"]))]
        names = list(model.config.id2label.values())
        return logits[first], [names.index(tag) for tag in example["tags"]]
    if case.name == "vit":
        pixels = reader(images=[example["image"]], return_tensors="pt")["pixel_values"]
        names = list(model.config.id2label.values())
        return model(pixels).logits, [names.index(example["target"] if target is None else target)]
    ids = reader(example["input"])["input_ids"]
    target = example["target"] if target is None else target
    if isinstance(case.task, secateur.SequenceClassification):
        names = list(model.config.id2label.values())
        return model(torch.tensor([ids])).logits, [names.index(target)]
    if case.kind == "encoder-decoder":
        gold = reader(target)["input_ids"]
        decoder_input = torch.tensor([[model.config.decoder_start_token_id, *gold[:-1]]])
        return model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder_input).logits[0], gold
    gold = reader(target, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids + gold])).logits[0]
    return logits[len(ids) - 1 : -1], gold


def value(logits: Tensor, gold: Sequence[int], kind: str) -> Tensor:
    """F: the sum over the target's positions, one at a time."""
    total = logits.new_zeros(())
    for row, wanted in zip(logits, gold, strict=True):
        others = torch.cat([row[:wanted], row[wanted + 1 :]])
        probability = row[wanted].exp() / row.exp().sum()
        terms = {"probability": probability, "log_probability": probability.log(), "margin": row[wanted] - others.max()}
        total = total + terms[kind]
    return total


def scores(case: Case, model: nn.Module, unit: str, kind: str, targets: Sequence[Any] | None = None) -> dict[str, Tensor]:
    """dF/dc of every unit for every example, [examples, units] by site; `targets` replaces the examples' own."""
    places = gates(case, model, unit)
    rows: dict[str, list[Tensor]] = {site: [] for site in places}
    for number in range(len(case.examples)):
        for site, slope in slopes(case, model, places, 1.0, kind, number, targets).items():
            rows[site].append(slope)
    return {site: torch.stack(of_site) for site, of_site in rows.items()}


def integrated(
    case: Case, model: nn.Module, unit: str, kind: str, nodes: int, joint: bool, targets: Sequence[Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Integrated gradients of every unit for every example, [examples, units] by site: the gates of all sites go from 0 to 1
    together (joint), or those of one site while the others stay at 1. By a Gauss-Radau rule and the control variate.
    And by path what the rule lacked before that, [examples]."""
    scores: dict[str, Tensor] = {}
    lacked: dict[str, Tensor] = {}
    at, weights = radau(nodes)
    changes = change(case, model, unit, kind, joint, targets)
    for name, places in paths(case, model, unit, joint).items():
        rows, of_rows = [], []
        for number in range(len(case.examples)):
            found = [slopes(case, model, places, node, kind, number, targets) for node in at]
            table = torch.stack([torch.cat([of_node[site] for site in places]) for of_node in found])  # [nodes + 1, units]
            plain = sum(weight * row for weight, row in zip(weights, table, strict=True))
            lacking = changes[name][number] - plain.sum()
            mean = sum(weight * row.sum() for weight, row in zip(weights, table, strict=True))
            spread = [row.sum() - mean for row in table]
            variance = sum(weight * of_node**2 for weight, of_node in zip(weights, spread, strict=True))
            strength = lacking / max(variance + (0.1 * plain.abs().sum()) ** 2, lacking.abs() * max(abs(s) for s in spread))
            new = [weight * (1 + strength * of_node) for weight, of_node in zip(weights, spread, strict=True)]
            rows.append(sum(weight * row for weight, row in zip(new, table, strict=True)))
            of_rows.append(lacking)
        of_path = torch.split(torch.stack(rows), list(counts(places).values()), 1)
        scores |= zip(places, of_path, strict=True)
        lacked[name] = torch.stack(of_rows)
    return scores, lacked


def radau(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes on 0 ... 1 with 1 as the last, and weights that are exact for as many powers as there are nodes."""
    polynomial = Legendre.basis(nodes) - Legendre.basis(nodes + 1)
    at = (np.sort(polynomial.roots().real) + 1) / 2
    powers = np.vander(at, increasing=True).T
    weights = np.linalg.solve(powers, 1 / np.arange(1, nodes + 2))
    return at.tolist(), weights.tolist()


def change(
    case: Case, model: nn.Module, unit: str, kind: str, joint: bool, targets: Sequence[Any] | None = None
) -> dict[str, Tensor]:
    """F(1) - F(0) of every example, [examples] by path: a site, or "joint"."""
    found: dict[str, Tensor] = {}
    for name, places in paths(case, model, unit, joint).items():
        closed = {site: torch.zeros(count, dtype=torch.float64) for site, count in counts(places).items()}
        values = []
        for number, example in enumerate(case.examples):
            target = None if targets is None else targets[number]
            with torch.no_grad():
                whole = value(*alone(case, model, example, target), kind)
                with gated(model, places, closed):
                    values.append(whole - value(*alone(case, model, example, target), kind))
        found[name] = torch.stack(values)
    return found


def paths(case: Case, model: nn.Module, unit: str, joint: bool) -> dict[str, dict[str, list[Gated]]]:
    """The gates that move together."""
    places = gates(case, model, unit)
    return {"joint": places} if joint else {site: {site: of_site} for site, of_site in places.items()}


def counts(places: Mapping[str, Sequence[Gated]]) -> dict[str, int]:
    """How many units each site has."""
    return {site: int(of_site[0].unit_of_channel.max()) + 1 for site, of_site in places.items()}


def slopes(
    case: Case,
    model: nn.Module,
    places: Mapping[str, Sequence[Gated]],
    gate: float,
    kind: str,
    number: int,
    targets: Sequence[Any] | None = None,
) -> dict[str, Tensor]:
    """dF/dc of one example at these places, whose gates all have one value."""
    values = {
        site: torch.full((count,), gate, dtype=torch.float64, requires_grad=True) for site, count in counts(places).items()
    }
    with gated(model, places, values):
        target = value(*alone(case, model, case.examples[number], None if targets is None else targets[number]), kind)
    gradients = torch.autograd.grad(target, list(values.values()), allow_unused=True)
    return {
        site: torch.zeros_like(values[site]) if gradient is None else gradient
        for site, gradient in zip(values, gradients, strict=True)
    }
