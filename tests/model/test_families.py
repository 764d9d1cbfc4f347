"""Properties of single families, in addition to the tests that run over all cases of tests/support/cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, Case, piece_tokenizer, uneven_plan
from comparing import relative
from torch import nn
from transformers import (
    CamembertConfig,
    CamembertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import secateur
from secateur import Plan
from secateur.model.discovery import fingerprint
from secateur.model.families import supported
from secateur.model.linear_layers import weight_of
from secateur.model.modeling import EmptyLinear
from secateur.pruning.masked import masked


def test_every_model_type_is_tested() -> None:
    """A model type has a case of its own, or is one of RoBERTa's siblings below."""
    configs: list[Any] = [case.build().config for case in CASES.values()]
    assert {config.model_type for config in configs} | {"xlm-roberta", "camembert"} == set(supported())


@pytest.mark.parametrize(
    ("cls", "kind"),
    [(XLMRobertaForSequenceClassification, XLMRobertaConfig), (CamembertForSequenceClassification, CamembertConfig)],
    ids=["xlm-roberta", "camembert"],
)
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_siblings_of_roberta_are_pruned_exactly(cls: Any, kind: Any, unit: Any) -> None:
    torch.manual_seed(0)
    config = kind(
        vocab_size=len(piece_tokenizer()), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, initializer_range=0.3, pad_token_id=0, id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    model = cls(config).double().eval()
    case: Case = CASES["roberta"]
    scores = secateur.attribute(model, case.task, case.examples, unit=unit)
    plan = secateur.plan(scores, flops=0.5, allocation="global")
    with masked(model, plan):
        expected = case.logits(model)
    assert relative(case.logits(secateur.prune(model, plan)), expected) < 1e-10


def multi_query_model(kept: list[int]) -> tuple[nn.Module, nn.Module, Plan]:
    """Return a model with one key-value head, the model that keeps the given query heads, and their plan."""
    model = CASES["llama-mqa"].model(torch.float64)
    sites = tuple(secateur.sites(model, select="attention"))
    plan = Plan({site.name: torch.tensor(kept, dtype=torch.int64) for site in sites}, sites, fingerprint(model))
    return model, secateur.prune(model, plan), plan


def test_with_one_key_value_head_query_heads_are_the_units() -> None:
    model, pruned, _ = multi_query_model([1, 4])
    assert {(site.unit, site.units, site.groups) for site in secateur.sites(model, select="attention")} == {
        ("query_head", 6, 1)
    }
    config: Any = pruned.config
    assert (config.num_attention_heads, config.num_key_value_heads, hasattr(config, "secateur")) == (2, 1, False)
    ours, dense = (part.get_submodule("model.layers.0.self_attn") for part in (pruned, model))
    assert torch.equal(ours.k_proj.weight, dense.k_proj.weight)  # type: ignore[union-attr, arg-type]
    rows = torch.cat([torch.arange(6, 12), torch.arange(24, 30)])
    assert torch.equal(ours.q_proj.weight, dense.q_proj.weight[rows])  # type: ignore[union-attr, arg-type, index]


def test_a_plan_without_query_heads_removes_the_key_value_head() -> None:
    model, pruned, plan = multi_query_model([])
    with masked(model, plan):
        expected = CASES["llama-mqa"].logits(model)
    assert relative(CASES["llama-mqa"].logits(pruned), expected) < 1e-10
    attention = pruned.get_submodule("model.layers.1.self_attn")
    assert all(isinstance(getattr(attention, f"{name}_proj"), EmptyLinear) for name in "qkvo")


@pytest.mark.parametrize("name", ["gpt2", "modernbert"])
def test_a_fused_projection_loses_query_key_channels_and_value_channels_separately(name: str) -> None:
    """Q/K channels remove no rows of the values. V channels remove no rows of the queries and keys."""
    case = CASES[name]
    model, whole = case.model(), uneven_plan(case, "channel")
    path = {"gpt2": "transformer.h.0.attn.c_attn", "modernbert": "model.layers.0.attn.Wqkv"}[name]
    dense = weight_of(model.get_submodule(path))
    size = len(dense) // 3
    for kind, stays in (("qk", slice(2 * size, None)), ("vo", slice(0, 2 * size))):
        sites = tuple(site for site in whole.sites if site.name.endswith(kind))
        kept = {site.name: torch.arange(0, site.units, 2) for site in sites}
        pruned = secateur.prune(model, Plan(kept, sites, whole.fingerprint))
        left = pruned.get_parameter(f"{path}.weight")
        assert len(left) < len(dense)
        untouched = left[-size:] if kind == "qk" else left[: 2 * size]
        assert torch.equal(untouched, dense[stays])
