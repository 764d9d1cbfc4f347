"""Sites: their names, their selection, and the cost of a unit compared with the model's parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable

import naive
import pytest
import torch
from cases import ALL, CASES, UNITS, Case, scores_of, uneven_plan, uniform_plan
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import secateur
from secateur.model import cost


@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_sites_are_those_of_the_hand_written_table(case: Case, unit: str) -> None:
    model = case.model()
    expected = {name: int(places[0].unit_of_channel.max()) + 1 for name, places in naive.gates(case, model, unit).items()}
    assert {site.name: site.units for site in secateur.sites(model, unit=unit)} == expected  # type: ignore[arg-type]


def test_sites_come_in_forward_order(t5: nn.Module) -> None:
    encoder = [f"encoder.{i}.{kind}" for i in range(3) for kind in ("self_attention", "ffn")]
    decoder = [f"decoder.{i}.{kind}" for i in range(2) for kind in ("self_attention", "cross_attention", "ffn")]
    assert [site.name for site in secateur.sites(t5)] == encoder + decoder


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("ffn", ["encoder.0.ffn", "encoder.1.ffn", "encoder.2.ffn", "decoder.0.ffn", "decoder.1.ffn"]),
        ("encoder.attention.1-2", ["encoder.1.self_attention", "encoder.2.self_attention"]),
        ("decoder.cross,encoder.ffn.0", ["encoder.0.ffn", "decoder.0.cross_attention", "decoder.1.cross_attention"]),
        ("encoder.2.self_attention", ["encoder.2.self_attention"]),
        ("decoder.self.1, encoder.ffn.2", ["encoder.2.ffn", "decoder.1.self_attention"]),
    ],
)
def test_a_selection_names_its_sites(t5: nn.Module, select: str, expected: list[str]) -> None:
    assert [site.name for site in secateur.sites(t5, select=select)] == expected


def test_a_selection_of_channels_names_its_sites(t5: nn.Module) -> None:
    sites = secateur.sites(t5, unit="channel", select="encoder.0.qk")
    assert [site.name for site in sites] == ["encoder.0.self_attention.qk"]


@pytest.mark.parametrize("select", ["mlp", "ffn.x-3", "", "ffn..1", "layer9", "ffn.7"])
def test_a_bad_selection_is_refused(t5: nn.Module, select: str) -> None:
    with pytest.raises(secateur.InputError, match=r"^sites: .*(expected words of|selects none)"):
        secateur.sites(t5, select=select)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_unit_parameters_add_up_to_the_layers_parameters(case: Case) -> None:
    """Every parameter of the projections belongs to a unit, except the out-projections' biases."""
    model = case.model()
    marks: tuple[str, ...] = ("SelfAttention", "EncDecAttention", "DenseReluDense", "attn.", "mlp.", "encoder.layer.")
    marks += ("fc1", "fc2", "attention.", "ffn.")
    excluded: tuple[str, ...] = ("norm", "Norm", "relative_attention_bias")
    excluded += tuple(
        f"{name}.bias" for name in ("output.dense", "fc2", "out_proj", "attention.o_proj", "lin2", "out_lin", "c_proj")
    )
    if case.name == "llama-mqa":
        excluded += ("k_proj", "v_proj")  # All query heads share them.
    expected = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(mark in name for mark in marks) and not any(part in name for part in excluded)
    )
    assert sum(site.parameters * site.units for site in secateur.sites(model)) == expected


def attend_by(implementation: str, model: nn.Module) -> None:
    """Set the attention implementation of every stack: the stacks of a T5 have separate configs."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(implementation)


def unpadded(case: Case, batch: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return inputs without padding, and their length in tokens by stack."""
    if case.name == "vit":
        return {"pixel_values": torch.rand(batch, 3, 8, 8)}, {"encoder": 17.0, "decoder": 1.0}
    source, target = 7, 5
    ids = torch.arange(4, 4 + source).repeat(batch, 1)
    inputs, tokens = {"input_ids": ids}, {"encoder": float(source), "decoder": float(source)}
    if case.kind == "encoder-decoder":
        inputs["decoder_input_ids"], tokens["decoder"] = ids[:, :target], float(target)
    return inputs, tokens


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_unit_flops_are_what_torch_counts(case: Case, implementation: str) -> None:
    """Removing one unit saves exactly the FLOPs that its site states, including the attention core."""
    model = case.model()
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no SDPA attention for the family")
    attend_by(implementation, model)
    inputs, tokens = unpadded(case)
    dense = cost.flops(model, inputs)
    sites = tuple(secateur.sites(model))
    for site in sites:
        kept = {other.name: torch.arange(other.units) for other in sites}
        kept[site.name] = kept[site.name][:-1]
        pruned = secateur.prune(model, secateur.Plan(kept, sites, _fingerprint(model)))
        attend_by(implementation, pruned)
        assert dense - cost.flops(pruned, inputs) == cost.unit_cost(site, "flops", tokens), site.name


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", [c for c in ALL if c.name != "gemma2"], ids=str)  # Gemma 2 has eager attention only.
def test_attention_implementations_count_equal_flops(case: Case, unit: str) -> None:
    """Eager attention and SDPA count equal FLOPs, also where heads have lost channels."""
    inputs, _ = unpadded(case, batch=2)
    counts = {}
    for implementation in ("eager", "sdpa"):
        model = case.model()
        attend_by(implementation, model)
        pruned = [secateur.prune(model, plan) for plan in (uniform_plan(case, unit), uneven_plan(case, unit))]
        for smaller in pruned:
            attend_by(implementation, smaller)
        counts[implementation] = [cost.flops(variant, inputs) for variant in (model, *pruned)]
    assert counts["eager"] == counts["sdpa"]
    assert counts["sdpa"][0] > max(counts["sdpa"][1:])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("groups", "channels"), [(6, 8), (2, 8), (2, 5)], ids=["plain", "grouped", "other-value-width"])
def test_the_attention_core_counts_for_every_query_head(groups: int, channels: int, inference: bool) -> None:
    class Core(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    sides = {"query": torch.rand(2, 6, 4, 8), "key": torch.rand(2, groups, 3, 8), "value": torch.rand(2, groups, 3, channels)}
    with torch.inference_mode(inference):
        assert cost.flops(Core(), sides) == 2 * 2 * 6 * (4 * 3 * 8 + 4 * 3 * channels)


@pytest.mark.parametrize("make", [uniform_plan, uneven_plan], ids=["uniform", "uneven"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_planners_flops_are_what_torch_counts(case: Case, make: Callable[[Case, str], secateur.Plan]) -> None:
    """A plan by heads removes the FLOPs that the planner predicts, on a batch with the lengths that the scores state."""
    inputs, tokens = unpadded(case, batch=3)
    scores, plan = scores_of(case.name), make(case, "head")
    counts = {name: len(kept) for name, kept in plan.items()}
    removed = cost.flops(case.model(), inputs) - cost.flops(secateur.prune(case.model(), plan), inputs)
    layers = 3 * sum(cost.unit_cost(site, "flops", tokens) * site.units for site in scores.all_sites)
    remaining = cost.remaining(scores.all_sites, scores.sites, counts, "flops", tokens)
    assert removed == pytest.approx(layers * (1 - remaining), rel=1e-12)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_parameters_counts_tied_weights_once(case: Case) -> None:
    model = case.model()
    distinct = {p.data_ptr(): math.prod(p.shape) for p in model.parameters()}
    assert cost.parameters(model) == sum(distinct.values())


def test_units_map_to_whole_groups_under_gqa() -> None:
    model = CASES["llama"].model()
    assert {site.units for site in secateur.sites(model, select="attention")} == {3}


def _fingerprint(model: nn.Module) -> str:
    from secateur.model.discovery import fingerprint

    return fingerprint(model)


def test_models_with_equal_shapes_and_different_heads_have_different_fingerprints() -> None:
    """Four heads of six channels and six heads of four channels have weights of the same shapes, but different units."""

    def bert(heads: int) -> nn.Module:
        config = BertConfig(vocab_size=30, hidden_size=24, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=37)
        model: nn.Module = BertForSequenceClassification(config)
        return model

    four, six = bert(4), bert(6)
    sites = tuple(secateur.sites(four))
    plan = secateur.Plan({site.name: torch.arange(2) for site in sites}, sites, _fingerprint(four))
    with pytest.raises(secateur.InputError, match="expected a plan of this model"):
        secateur.prune(six, plan)
    secateur.prune(bert(4), plan)
