"""Attention in bfloat16 on a CPU as matrix products: as exact as the "eager" of transformers, and only where it is meant."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import eager_attention_forward
from undisturbed import state

from secateur.model.faster_forward import faster_forward

OURS: Any = sys.modules["secateur.model.shortcuts.bfloat16_attention"]
BERT = CASES["bert-sequence"]
ROWS, HEADS, TOKENS, CHANNELS = 3, 4, 70, 32
# Whose attention looks to both sides, and is given a mask of bools.
BOTH_SIDES = ("bert-sequence", "bert-token", "roberta", "electra", "distilbert", "modernbert", "vit", "bart", "marian")


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's CPU is."""
    monkeypatch.setattr(OURS, "_products_are_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that were attended with by products."""
    found: list[tuple[int, ...]] = []
    attend = OURS._attend

    def record(query: Tensor, *rest: Any) -> Any:
        found.append(tuple(query.shape))
        return attend(query, *rest)

    monkeypatch.setattr(OURS, "_attend", record)
    return found


def masks() -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([TOKENS, 41, 1])
    padding = (torch.arange(TOKENS) < lengths[:, None])[:, None, None]
    scattered = torch.rand(ROWS, 1, TOKENS, TOKENS, generator=draw) < 0.5
    return {
        "none": None,
        "padding": padding,
        "padding on the left": padding.flip(-1),
        "padding, a row for each token": padding.expand(-1, -1, TOKENS, -1),
        "all seen": torch.ones(1, 1, 1, TOKENS, dtype=torch.bool),
        "a window": (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()[None, None] < 9,
        "any": scattered | torch.eye(TOKENS, dtype=torch.bool),
    }


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[rows, tokens, heads, channels] in float64, a token at a time."""
    query, key, value = query.double(), key.double(), value.double()
    found = torch.empty(ROWS, TOKENS, HEADS, CHANNELS, dtype=torch.float64)
    seen = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool) if mask is None else mask.expand(ROWS, 1, TOKENS, TOKENS)
    for row in range(ROWS):
        for head in range(HEADS):
            for token in range(TOKENS):
                at = seen[row, 0, token]
                weights = (key[row, head, at] @ query[row, head, token] * scaling).softmax(0)
                found[row, token, head] = weights @ value[row, head, at]
    return found


@pytest.mark.parametrize("mask", masks(), ids=str)
def test_as_exact_as_eager(mask: str) -> None:
    draw, hidden, scaling = torch.Generator().manual_seed(1), masks()[mask], CHANNELS**-0.5
    made = [torch.randn(ROWS, TOKENS, HEADS, CHANNELS, generator=draw).bfloat16() for _ in range(3)]
    query, key, value = (each.transpose(1, 2) for each in made)
    expected = naive(query, key, value, hidden, scaling)
    added = None if hidden is None else torch.zeros(hidden.shape).masked_fill(~hidden, float("-inf")).bfloat16()
    eager, _ = eager_attention_forward(nn.Module().eval(), query, key, value, added, scaling)
    with torch.inference_mode():
        found = OURS._attend(query, key, value, hidden, scaling)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    ours, theirs = (float((each.double() - expected).pow(2).mean().sqrt()) for each in (found, eager))
    assert ours <= 1.1 * theirs
    assert ours <= 2**-7 * float(expected.pow(2).mean().sqrt())  # Of 8 bits.


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_family(case: Case, calls: list[tuple[int, ...]]) -> None:
    model = case.model(torch.bfloat16)
    exact, usual = case.logits(case.model(torch.float32)), case.logits(model)
    assert not calls
    with faster_forward(model):
        found = case.logits(model)
    assert bool(calls) == (case.name in BOTH_SIDES)
    if not calls:
        return
    ours, theirs = (float((each - exact).pow(2).mean().sqrt()) for each in (found, usual))
    assert ours <= 1.5 * theirs


def test_others_are_as_they_were(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow: Any = BERT.model(torch.bfloat16)
    batch, *_ = BERT.batches(narrow)
    with faster_forward(narrow):
        BERT.task.logits(narrow, batch)  # Gradients may be wanted.
    with faster_forward(narrow.train()):
        BERT.logits(narrow)
    narrow.eval().set_attn_implementation("eager")
    for model in (BERT.model(), BERT.model(torch.float16), narrow):
        with faster_forward(model):
            BERT.logits(model)
    narrow.set_attn_implementation("sdpa")
    monkeypatch.setattr(OURS, "_products_are_faster", lambda: False)
    with faster_forward(narrow):
        BERT.logits(narrow)
    assert not calls


@pytest.mark.parametrize("name", ["bert-sequence", "bart", "vit"])
def test_nothing_is_left_behind(name: str) -> None:
    model: Any = CASES[name].model(torch.bfloat16)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = state(model)
    with faster_forward(model):
        assert {config._attn_implementation for config in configs} == {OURS._NAME}
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Of modules that torch.compile imports.
def test_compiled_it_is_one_operation() -> None:
    model: nn.Module = BERT.model(torch.bfloat16)
    batch, *_ = BERT.batches(model)
    names: list[str] = []

    def see(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.inference_mode(), faster_forward(model):
        expected = BERT.task.logits(model, batch)
        found = torch.compile(BERT.task.logits, backend=see, fullgraph=True)(model, batch)  # type: ignore[no-untyped-call]
    assert any(OURS._NAME in name for name in names)
    assert torch.equal(found, expected)
