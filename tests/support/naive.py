"""The formulas as slow loops that share no code with the engine: gates at hand-written paths, one example at a time."""

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
    """The input or output of a linear layer, with the unit of every channel.

    Attributes:
        path: The path of the linear layer.
        side: Which side it is.
        unit_of_channel: The unit of each channel, int64 [channels]; NONE for channels without a gate.
    """

    path: str
    side: Literal["input", "output"]
    unit_of_channel: Tensor


def gates(case: Case, model: Any, unit: str) -> dict[str, list[Gated]]:
    """Return the places at which the gates of each site's units multiply, by site name.

    A place differs from the engine's if the algebra is the same: a gate on a head's output equals a gate on its values, and a
    gate on a value channel equals a gate on the out-projection's input.

    Args:
        case: The case.
        model: Its model.
        unit: "head" or "channel".
    """
    c = model.config
    places: dict[str, list[Gated]] = {}
    if c.model_type in ("t5", "mt5"):
        for stack, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
            for i in range(layers):
                block = f"{stack}.block.{i}.layer"
                kinds = {"self_attention": f"{block}.0.SelfAttention"}
                if stack == "decoder":
                    kinds["cross_attention"] = f"{block}.1.EncDecAttention"
                for kind, path in kinds.items():
                    names = [f"{path}.{p}" for p in "qkvo"]
                    places |= _attention(f"{stack}.{i}.{kind}", names, c.num_heads, c.num_heads, c.d_kv, unit)
                last = 2 if stack == "decoder" else 1
                wo = f"{block}.{last}.DenseReluDense.wo"
                places[f"{stack}.{i}.ffn"] = [Gated(wo, "input", torch.arange(c.d_ff))]
        return places
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
                        places |= _attention(f"{stack}.{i}.{kind}", names, heads, heads, 24 // heads, unit)
                places[f"{stack}.{i}.ffn"] = [Gated(f"{block}.fc2", "input", torch.arange(inner))]
        return places
    layer, attention, down = BLOCKS[c.model_type]
    stack, heads = case.kind, c.num_attention_heads
    groups, width = getattr(c, "num_key_value_heads", None) or heads, getattr(c, "head_dim", None) or 24 // heads
    rotary = hasattr(c, "rope_parameters")
    for i in range(c.num_hidden_layers):
        names = [f"{layer}.{i}.{path}" for path in attention]
        site = f"{stack}.{i}.self_attention"
        places |= _attention(site, names, heads, groups, width, unit, rotary=rotary, qk=case.qk_channels)
        places[f"{stack}.{i}.ffn"] = [Gated(f"{layer}.{i}.{down}", "input", torch.arange(37))]
    return places


_BERT = ([f"attention.{p}" for p in ("self.query", "self.key", "self.value", "output.dense")], "output.dense")
_LLAMA = ("model.layers", [f"self_attn.{p}_proj" for p in "qkvo"], "mlp.down_proj")
# By model type: the list of blocks; within a block, the layers of queries, keys, values and outputs; the FFN's last layer.
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
    """Return the places of an attention's gates by site. `names` are the paths of queries, keys, values and out-projection."""
    q, k, v, o = names
    repeat = heads // groups
    group_of, channel_of = torch.arange(heads * width) // width // repeat, torch.arange(heads * width) % width
    if unit == "head" and groups == 1 < heads:  # Query heads are units: they share their values.
        return {site: [Gated(o, "input", torch.arange(heads * width) // width)]}
    if unit == "head":
        of_values = torch.arange(groups * width) // width
        return {site: [Gated(v, "output", of_values if v != k else _last(of_values))]}
    places = {f"{site}.vo": [Gated(o, "input", group_of * width + channel_of)]}
    if qk:
        # Rotary embeddings rotate channel c together with channel c + width/2, so the pair is one unit.
        pairs = width // 2 if rotary else width
        of_query = group_of * pairs + channel_of % pairs
        of_key = torch.arange(groups * width) // width * pairs + torch.arange(groups * width) % width % pairs
        if q == k:  # One layer makes queries, keys and values.
            none = torch.full_like(of_query, NONE)
            of_query, of_key = torch.cat([of_query, none, none]), torch.cat([none, of_key, none])
        places[f"{site}.qk"] = [Gated(q, "output", of_query), Gated(k, "output", of_key)]
    return places


NONE = -1  # The unit of a channel that has no gate.


def _last(units: Tensor) -> Tensor:
    """Return the units of a layer that computes queries, keys and values, if only the values have gates."""
    return torch.cat([torch.full_like(units, NONE).repeat(2), units])


@contextmanager
def gated(model: nn.Module, places: Mapping[str, Sequence[Gated]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the gate values of a site's units multiply their channels.

    Args:
        model: The model.
        places: The places of the gates, by site.
        values: The gate values [units], by site.
    """
    with ExitStack() as stack:
        for site, of_site in places.items():
            for place in of_site:
                with_none = torch.cat([values[site], values[site].new_ones(1)])  # The index NONE = -1 selects the 1 at the end.
                factor, module = with_none[place.unit_of_channel], model.get_submodule(place.path)
                if place.side == "input":
                    handle = module.register_forward_pre_hook(lambda m, a, f=factor: (a[0] * f.to(a[0].dtype),))
                else:
                    handle = module.register_forward_hook(lambda m, a, out, f=factor: out * f.to(out.dtype))
                stack.callback(handle.remove)
        yield


def alone(case: Case, model: Any, example: Mapping[str, Any], target: Any = None) -> tuple[Tensor, list[int]]:
    """Run one example without a batch and without padding.

    Args:
        case: The case.
        model: Its model.
        example: The example.
        target: A target in place of the example's own.

    Returns:
        The logits [target positions, classes], and the class of the target at each position.
    """
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
    """Compute the target F: a sum over the target positions.

    Args:
        logits: The logits [target positions, classes].
        gold: The class of the target at each position.
        kind: "probability", "log_probability" or "margin".
    """
    total = logits.new_zeros(())
    for row, label in zip(logits, gold, strict=True):
        others = torch.cat([row[:label], row[label + 1 :]])
        probability = row[label].exp() / row.exp().sum()
        terms = {"probability": probability, "log_probability": probability.log(), "margin": row[label] - others.max()}
        total = total + terms[kind]
    return total


def scores(case: Case, model: nn.Module, unit: str, kind: str, targets: Sequence[Any] | None = None) -> dict[str, Tensor]:
    """Return dF/dc of every unit for every example, [examples, units] by site. `targets` replaces the examples' targets."""
    places = gates(case, model, unit)
    rows: dict[str, list[Tensor]] = {site: [] for site in places}
    for number in range(len(case.examples)):
        for site, slope in slopes(case, model, places, 1.0, kind, number, targets).items():
            rows[site].append(slope)
    return {site: torch.stack(of_site) for site, of_site in rows.items()}


def integrated(
    case: Case, model: nn.Module, unit: str, kind: str, nodes: int, joint: bool, targets: Sequence[Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute integrated gradients of every unit for every example, by a Gauss-Radau rule and the control variate.

    Args:
        case: The case.
        model: Its model.
        unit: "head" or "channel".
        kind: The kind of target, as in `value`.
        nodes: The number of inner nodes of the rule.
        joint: Whether the gates of all sites go from 0 to 1 together. Otherwise the gates of one site do, and others stay at 1.
        targets: Targets in place of the examples' own.

    Returns:
        Integrated gradients [examples, units] by site, and F(1) - F(0) minus the rule's own sum [examples] by path.
    """
    scores: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    at, weights = radau(nodes)
    changes = change(case, model, unit, kind, joint, targets)
    for name, places in paths(case, model, unit, joint).items():
        rows, residuals_of_path = [], []
        for number in range(len(case.examples)):
            at_nodes = [slopes(case, model, places, node, kind, number, targets) for node in at]
            table = torch.stack([torch.cat([of_node[site] for site in places]) for of_node in at_nodes])  # [nodes + 1, units]
            plain = sum(weight * row for weight, row in zip(weights, table, strict=True))  # [units]
            residual = changes[name][number] - plain.sum()
            mean = sum(weight * row.sum() for weight, row in zip(weights, table, strict=True))
            spread = [row.sum() - mean for row in table]
            variance = sum(weight * of_node**2 for weight, of_node in zip(weights, spread, strict=True))
            strength = residual / max(variance + (0.1 * plain.abs().sum()) ** 2, residual.abs() * max(abs(s) for s in spread))
            corrected = [weight * (1 + strength * of_node) for weight, of_node in zip(weights, spread, strict=True)]
            rows.append(sum(weight * row for weight, row in zip(corrected, table, strict=True)))
            residuals_of_path.append(residual)
        of_sites = torch.split(torch.stack(rows), list(counts(places).values()), 1)
        scores |= zip(places, of_sites, strict=True)
        residuals[name] = torch.stack(residuals_of_path)
    return scores, residuals


def radau(nodes: int) -> tuple[list[float], list[float]]:
    """Return nodes on 0 ... 1, the last of which is 1, and weights that are exact for as many powers as there are nodes."""
    polynomial = Legendre.basis(nodes) - Legendre.basis(nodes + 1)
    at = (np.sort(polynomial.roots().real) + 1) / 2
    powers = np.vander(at, increasing=True).T
    weights = np.linalg.solve(powers, 1 / np.arange(1, nodes + 2))
    return at.tolist(), weights.tolist()


def change(
    case: Case, model: nn.Module, unit: str, kind: str, joint: bool, targets: Sequence[Any] | None = None
) -> dict[str, Tensor]:
    """Return F(1) - F(0) of every example, [examples] by path. A path is a site, or "joint"."""
    changes: dict[str, Tensor] = {}
    for name, places in paths(case, model, unit, joint).items():
        closed = {site: torch.zeros(count, dtype=torch.float64) for site, count in counts(places).items()}
        values = []
        for number, example in enumerate(case.examples):
            target = None if targets is None else targets[number]
            with torch.no_grad():
                open_value = value(*alone(case, model, example, target), kind)
                with gated(model, places, closed):
                    values.append(open_value - value(*alone(case, model, example, target), kind))
        changes[name] = torch.stack(values)
    return changes


def paths(case: Case, model: nn.Module, unit: str, joint: bool) -> dict[str, dict[str, list[Gated]]]:
    """Return the places of the gates that move together, by path and site."""
    places = gates(case, model, unit)
    return {"joint": places} if joint else {site: {site: of_site} for site, of_site in places.items()}


def counts(places: Mapping[str, Sequence[Gated]]) -> dict[str, int]:
    """Return the number of units of every site."""
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
    """Return dF/dc [units] of one example by site, for gates at these places that all have the same value."""
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
