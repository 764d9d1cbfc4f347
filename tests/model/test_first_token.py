"""Where the head reads only the first token, the last block runs for that token alone and gives the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import ALL, CASES, CLASSES, Case, emptied_plan, sequence, uneven_plan
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from undisturbed import state

import secateur
from secateur.model.branches import Attention, FeedForward
from secateur.model.families import branches
from secateur.model.faster_forward import faster_forward
from secateur.model.sites import AttentionUnit

BERT = CASES["bert-sequence"]


def small(cls: type[nn.Module], kind: type[Any], **options: Any) -> Case:
    """Return a case of a model class that the case matrix lacks."""
    config = dict(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, pad_token_id=0,
        max_position_embeddings=40, initializer_range=0.3, id2label=dict(enumerate(CLASSES)), **options,
    )  # fmt: skip
    return sequence(cls.__name__, lambda: cls(kind(**config)))


READING = [
    *(CASES[name] for name in ("bert-sequence", "roberta", "distilbert", "vit")),
    small(ElectraForSequenceClassification, ElectraConfig, embedding_size=16),
    small(XLMRobertaForSequenceClassification, XLMRobertaConfig),
    small(CamembertForSequenceClassification, CamembertConfig),
]
OTHERS = [case for case in ALL if case.kind == "encoder" and case not in READING]


@contextmanager
def tokens_seen(model: nn.Module) -> Iterator[dict[str, set[int]]]:
    """Yield the numbers of tokens that the last block's linear layers read within the context, by path."""
    paths = {model.get_submodule(path): path for path in layers(model)}
    tokens: dict[str, set[int]] = {}

    def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module in paths:
            tokens.setdefault(paths[module], set()).add(arguments[0].shape[1])

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        yield tokens
    finally:
        handle.remove()


def layers(model: nn.Module) -> list[str]:
    """Return the paths of the last block's linear layers."""
    *_, attention, feed_forward = branches(model).values()
    assert isinstance(attention, Attention)
    assert isinstance(feed_forward, FeedForward)
    return [attention.query, attention.key, attention.value, attention.output, *feed_forward.inputs, feed_forward.output]


def assert_the_same(case: Case, model: nn.Module, *, reduced: bool, tolerance: float = 1e-12) -> None:
    """Compare the logits with and without `faster_forward`. If `reduced`, the last block must read one token only."""
    with tokens_seen(model) as usual:
        expected = case.logits(model)
    with faster_forward(model), tokens_seen(model) as seen:
        actual = case.logits(model)
    assert all(max(tokens) > 1 for tokens in usual.values())
    assert seen
    if reduced:
        assert all(tokens == {1} for tokens in seen.values())
        *_, attention, _ = branches(model).values()
        assert isinstance(attention, Attention)
        assert not {attention.key, attention.value} & seen.keys()
    else:
        assert seen == usual
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", READING, ids=str)
def test_the_last_block_runs_for_one_token(case: Case, attention: str) -> None:
    model: Any = case.model(torch.float64)
    model.set_attn_implementation(attention)
    # ViT's eager attention computes the softmax in float32.
    tolerance = 1e-6 if (case.name, attention) == ("vit", "eager") else 1e-12
    assert_the_same(case, model, reduced=True, tolerance=tolerance)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_heads_read_all_tokens(case: Case) -> None:
    assert_the_same(case, case.model(torch.float64), reduced=False)


@pytest.mark.parametrize("make_plan", [uneven_plan, emptied_plan])
@pytest.mark.parametrize("case", READING[:4], ids=str)
def test_the_last_block_of_pruned_models_runs_for_one_token(
    case: Case, make_plan: Callable[[Case, str], secateur.Plan]
) -> None:
    assert_the_same(case, secateur.prune(case.model(torch.float64), make_plan(case, "head")), reduced=True)


@pytest.mark.parametrize("case", READING[:4], ids=str)
def test_a_last_attention_without_heads_gives_the_same_logits(case: Case) -> None:
    plan = uneven_plan(case, "head")
    last = [site.name for site in plan.sites if site.kind == "self_attention"][-1]
    kept = {name: units[:0] if name == last else units for name, units in plan.items()}
    plan = secateur.Plan(kept, plan.sites, plan.fingerprint)
    assert_the_same(case, secateur.prune(case.model(torch.float64), plan), reduced=True)


@pytest.mark.parametrize("case", READING, ids=str)
def test_gradients_are_the_same(case: Case) -> None:
    model = case.model(torch.float64)
    batch, *_ = case.batches(model)

    def gradients() -> list[Tensor]:
        loss = (case.task.logits(model, batch) ** 2).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    expected = gradients()
    with faster_forward(model):
        actual = gradients()
    for (name, _), ours, theirs in zip(model.named_parameters(), actual, expected, strict=True):
        # A key's bias shifts all attention scores equally, so its gradient is rounding error.
        scale = max(float(theirs.abs().max()), 1.0 if name.endswith(("key.bias", "k_lin.bias", "k_proj.bias")) else 0.0)
        assert float((ours - theirs).abs().max()) <= 1e-10 * scale, name


@pytest.mark.parametrize("path", ["bert", "bert.encoder.layer.1.output", "bert.pooler", "classifier"])
def test_a_module_with_a_hook_still_reads_all_tokens(path: str) -> None:
    model = BERT.model(torch.float64)
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    assert_the_same(BERT, model, reduced=False)


class Mean(nn.Module):
    """A user-defined pooler: the mean over all tokens."""

    def forward(self, states: Tensor) -> Tensor:
        return states.mean(1)


def test_a_user_defined_head_reads_all_tokens() -> None:
    model: Any = BERT.model(torch.float64)
    model.bert.pooler = Mean()
    assert_the_same(BERT, model, reduced=False)


def test_a_user_defined_model_class_reads_all_tokens() -> None:
    class Own(BertForSequenceClassification):  # type: ignore[misc]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            return super().forward(*arguments, **named)

    model: Any = BERT.model(torch.float64)
    model.__class__ = Own
    assert_the_same(BERT, model, reduced=False)


def test_causal_attention_reads_all_tokens() -> None:
    case = small(BertForSequenceClassification, BertConfig, is_decoder=True)
    assert_the_same(case, case.model(torch.float64), reduced=False)


@pytest.mark.parametrize("case", READING, ids=str)
def test_the_model_is_as_before_after_faster_forward(case: Case) -> None:
    model = case.model()
    before = state(model)
    with faster_forward(model):
        assert state(model) != before
    assert state(model) == before


@pytest.mark.parametrize(("unit", "criterion", "one"), [
    ("head", "gradient", True), ("head", "ig", True), ("channel", "gradient", False), ("head", "fpp", False),
])  # fmt: skip
@pytest.mark.parametrize("case", READING[:4], ids=str)
def test_attribution_runs_the_last_block_for_one_token_where_the_target_alone_counts(
    case: Case, unit: AttentionUnit, criterion: str, one: bool
) -> None:
    """Channels of the last block's keys are watched, and sums of activations need all tokens."""
    model = case.model()
    with tokens_seen(model) as seen:
        secateur.attribute(model, case.task, case.examples, unit=unit, criterion=criterion)
    *_, feed_forward = layers(model)
    assert (seen[feed_forward] == {1}) == one
