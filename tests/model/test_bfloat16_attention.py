"""Attention in bfloat16 on a CPU by matrix products: as exact as transformers' "eager", and only where it is intended."""

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
# Families with bidirectional attention and a boolean mask.
BOTH_SIDES = ("bert-sequence", "bert-token", "roberta", "electra", "distilbert", "modernbert", "vit", "bart", "marian")


@pytest.fixture(autouse=True)
def products_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat matrix products as faster, whichever CPU runs the test."""
    monkeypatch.setattr(OURS, "_products_are_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the list of the query shapes whose attention runs by products."""
    shapes: list[tuple[int, ...]] = []
    attend = OURS._attend

    def record(query: Tensor, *rest: Any) -> Any:
        shapes.append(tuple(query.shape))
        return attend(query, *rest)

    monkeypatch.setattr(OURS, "_attend", record)
    return shapes


def masks() -> dict[str, Tensor | None]:
    """Return masks by name: True where a query sees a key; None for no mask."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([TOKENS, 41, 1])
    padding = (torch.arange(TOKENS) < lengths[:, None])[:, None, None]
    scattered = torch.rand(ROWS, 1, TOKENS, TOKENS, generator=draw) < 0.5
    return {
        "none": None,
        "padding": padding,
        "padding on the left": padding.flip(-1),
        "padding, a row per token": padding.expand(-1, -1, TOKENS, -1),
        "all seen": torch.ones(1, 1, 1, TOKENS, dtype=torch.bool),
        "a window": (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()[None, None] < 9,
        "any": scattered | torch.eye(TOKENS, dtype=torch.bool),
    }


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute attention in float64, one token at a time. Returns [rows, tokens, heads, channels]."""
    query, key, value = query.double(), key.double(), value.double()
    output = torch.empty(ROWS, TOKENS, HEADS, CHANNELS, dtype=torch.float64)
    seen = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool) if mask is None else mask.expand(ROWS, 1, TOKENS, TOKENS)
    for row in range(ROWS):
        for head in range(HEADS):
            for token in range(TOKENS):
                visible = seen[row, 0, token]
                weights = (key[row, head, visible] @ query[row, head, token] * scaling).softmax(0)
                output[row, token, head] = weights @ value[row, head, visible]
    return output


@pytest.mark.parametrize("mask", masks(), ids=str)
def test_attention_by_products_is_as_exact_as_eager(mask: str) -> None:
    draw, hidden, scaling = torch.Generator().manual_seed(1), masks()[mask], CHANNELS**-0.5
    states = [torch.randn(ROWS, TOKENS, HEADS, CHANNELS, generator=draw).bfloat16() for _ in range(3)]
    query, key, value = (state.transpose(1, 2) for state in states)
    expected = naive(query, key, value, hidden, scaling)
    added = None if hidden is None else torch.zeros(hidden.shape).masked_fill(~hidden, float("-inf")).bfloat16()
    eager, _ = eager_attention_forward(nn.Module().eval(), query, key, value, added, scaling)
    with torch.inference_mode():
        actual = OURS._attend(query, key, value, hidden, scaling)
    assert actual.dtype == torch.bfloat16
    assert actual.is_contiguous()
    ours, theirs = (float((output.double() - expected).pow(2).mean().sqrt()) for output in (actual, eager))
    assert ours <= 1.1 * theirs
    assert ours <= 2**-7 * float(expected.pow(2).mean().sqrt())  # bfloat16 has 8 significant bits.


def test_a_token_that_sees_none_gets_zeros() -> None:
    """As from "sdpa". Padding beyond the window of all tokens is such a token."""
    hidden = masks()["a window"] & masks()["padding"]  # type: ignore[operator]
    query, key, value = (torch.randn(ROWS, HEADS, TOKENS, CHANNELS).bfloat16() for _ in range(3))
    blind = ~hidden.any(-1)[:, 0]  # [ROWS, TOKENS]
    assert blind.any()
    with torch.inference_mode():
        assert (OURS._attend(query, key, value, hidden, 1.0)[blind] == 0).all()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_families_with_bidirectional_attention_use_products(case: Case, calls: list[tuple[int, ...]]) -> None:
    model = case.model(torch.bfloat16)
    exact, usual = case.logits(case.model(torch.float32)), case.logits(model)
    assert not calls
    with faster_forward(model):
        faster = case.logits(model)
    assert bool(calls) == (case.name in BOTH_SIDES)
    # Other shortcuts run too. They also change the logits by rounding only.
    ours, theirs = (float((logits - exact).pow(2).mean().sqrt()) for logits in (faster, usual))
    assert ours <= 1.5 * theirs


def test_products_do_not_run_in_other_modes_and_dtypes(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow: Any = BERT.model(torch.bfloat16)
    batch, *_ = BERT.batches(narrow)
    with faster_forward(narrow):
        BERT.task.logits(narrow, batch)  # Gradients are enabled.
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
def test_the_model_is_as_before_after_faster_forward(name: str) -> None:
    model: Any = CASES[name].model(torch.bfloat16)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = state(model)
    with faster_forward(model):
        assert {config._attn_implementation for config in configs} == {OURS._NAME}
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Modules that torch.compile imports give warnings.
def test_torch_compile_sees_the_attention_as_one_operation() -> None:
    model: nn.Module = BERT.model(torch.bfloat16)
    batch, *_ = BERT.batches(model)
    names: list[str] = []

    def see(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.inference_mode(), faster_forward(model):
        expected = BERT.task.logits(model, batch)
        compiled = torch.compile(BERT.task.logits, backend=see, fullgraph=True)(model, batch)  # type: ignore[no-untyped-call]
    assert any(OURS._NAME in name for name in names)
    assert torch.equal(compiled, expected)
