"""Logits that are NaN or inf: no stage takes them for a result."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from cases import CASES, CLASSES, LABELS, labelled, sentences
from torch import nn

import secateur
from secateur import InputError
from secateur.corpus import mapper, score
from secateur.corpus.pipeline import Runner
from secateur.corpus.tuning import _Trial
from secateur.measuring.divergence import divergence
from secateur.model.families import branches
from secateur.tasks import CausalLM

NAMES = ["bert-sequence", "bert-token", "t5-relu", "llama", "vit"]


def broken(name: str, value: float = float("nan")) -> nn.Module:
    """Return the case's model with an out-projection of its last branch that gives NaN or inf."""
    model = CASES[name].model()
    last = list(branches(model).values())[-1]
    with torch.no_grad():
        model.get_submodule(last.output).weight.fill_(value)  # type: ignore[operator]
    return model


def overflowing() -> Any:
    """Return a BERT that is finite in float32 but not in float16."""
    model: Any = CASES["bert-sequence"].model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1e6)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_evaluate_names_a_row(name: str, value: float) -> None:
    case = CASES[name]
    with pytest.raises(InputError, match=r"^examples, row \d+: the model's outputs are not finite"):
        secateur.evaluate(broken(name, value), case.task, case.examples)


def test_evaluate_names_the_layer_in_which_float16_overflows() -> None:
    case, model = CASES["bert-sequence"], overflowing()
    assert secateur.evaluate(model, case.task, case.examples).examples == len(case.examples)
    with pytest.raises(InputError, match=r"row \d+: .* not finite \(NaN or inf\), first at 'encoder.1.self_attention'"):
        secateur.evaluate(model.half(), case.task, case.examples)


def test_probabilities_name_a_row() -> None:
    case = CASES["t5-relu"]
    with pytest.raises(InputError, match=r"^examples, row \d+: .* not finite"):
        case.task.probabilities(broken("t5-relu"), case.examples, 4096)


def test_perplexity_names_a_row() -> None:
    case = CASES["llama"]
    with pytest.raises(InputError, match=r"^examples, row \d+: .* not finite"):
        secateur.evaluate(broken("llama"), CausalLM(case.task.tokenizer), labelled(LABELS))


def test_bulk_scoring_rejects_the_rows_that_are_not_finite() -> None:
    case, model = CASES["bert-sequence"], cast(Any, CASES["bert-sequence"].model())
    texts = ["cat sat", "big dog", "big red"]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[case.task.tokenizer("dog")["input_ids"][1]] = float("nan")
    rows = [row for batch in score(model, case.task, texts, threads=1) for row in batch.to_pylist()]
    assert [row["reason"] is None for row in rows] == [True, False, True]
    assert rows[1]["reason"] == "not finite: the model's scores are NaN or inf"
    assert rows[1]["label"] is None
    assert rows[1][f"p_{CLASSES[0]}"] is None
    assert sum(rows[0][f"p_{label}"] for label in CLASSES) == pytest.approx(1)
    columns = mapper(model, case.task)({"text": texts})
    assert columns["label"] == [rows[0]["label"], None, rows[2]["label"]]


def test_a_setting_that_makes_scores_not_finite_is_not_taken() -> None:
    case, model = CASES["bert-sequence"], overflowing()
    items = case.task.input_items(model, [{"input": text} for text in sentences(8)])
    runner = Runner(model, case.task, max_tokens=64)
    narrow = Runner(overflowing().half(), case.task, max_tokens=64)
    trial = _Trial(runner, items)
    assert trial.change(runner, runner) == 0
    assert not trial.change(runner, narrow) <= 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_plan_names_the_site_whose_scores_are_not_finite(value: float) -> None:
    case, model = CASES["bert-sequence"], CASES["bert-sequence"].model()
    scores = secateur.attribute(model, case.task, case.examples)
    scores["encoder.1.ffn"][3] = value
    with pytest.raises(InputError, match=r"^scores: expected finite numbers, got NaN or inf at site 'encoder.1.ffn'"):
        secateur.plan(scores, keep=0.5)


def test_verify_choose_and_recover_refuse_logits_that_are_not_finite() -> None:
    case, model, bad = CASES["bert-sequence"], CASES["bert-sequence"].model(), broken("bert-sequence")
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    batches = case.batches(model)
    with pytest.raises(InputError, match=r"^model: the masked model's logits are not finite"):
        secateur.verify(bad, secateur.prune(bad, plan), plan, case.task, batches)
    with pytest.raises(InputError, match=r"^model: the pruned model's logits are not finite"):
        secateur.verify(model, secateur.prune(bad, plan), plan, case.task, batches)
    with pytest.raises(InputError, match=r"^examples, row \d+: .* not finite"):
        divergence(model, secateur.prune(bad, plan), case.task, batches)
    with pytest.raises(InputError, match=r"^model: activations of 'encoder.1.ffn' are not finite"):
        secateur.recover_(bad, secateur.prune(model, plan), case.task, case.examples)


@pytest.mark.parametrize("criterion", ["influence", "gradient"])
def test_scores_of_layers_that_are_not_finite_are_refused(criterion: str) -> None:
    case = CASES["bert-sequence"]
    with pytest.raises(InputError, match=r"^model: the score of 'encoder.\d' is not finite"):
        secateur.layer_scores(broken("bert-sequence"), case.task, case.examples, criterion)
    with pytest.raises(InputError, match=r"^model: the score of 'encoder.0' is not finite"):
        secateur.choose_layers({"encoder.0": float("nan"), "encoder.1": 1.0}, keep_layers=1)
