"""Models whose outputs are not one softmax: values, several labels at once, and pairs of texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    _bart,
    _encoder,
    _grouped,
    pictures,
    piece_tokenizer,
    sentences,
    word_tokenizer,
)
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTForImageClassification,
)

import secateur
from secateur import GradientActivation, InputError, SequenceClassification
from secateur.corpus import mapper, score
from secateur.flow.choose import choose
from secateur.learned.layers.layer_gates import LayerGates
from secateur.learned.layers.layer_training import task_features
from secateur.measuring.divergence import divergence
from secateur.model.undisturbed import undisturbed
from secateur.tasks.metrics import correlations, f1_scores

TOPICS = ["war", "sport", "money", "art"]
SEVERAL = "multi_label_classification"
TEXTS = sentences(14, seed=3)
VALUES = [{"input": text, "target": 0.5 * k - 2} for k, text in enumerate(TEXTS)]
SETS = [{"input": text, "target": [TOPICS[i] for i in range(4) if (k >> i) & 1]} for k, text in enumerate(TEXTS)]


def bert(names: list[str], **options: Any) -> Any:
    torch.manual_seed(0)
    return _encoder(BertForSequenceClassification, BertConfig, names, **options).eval()


def one_output(name: str) -> tuple[Any, SequenceClassification]:
    torch.manual_seed(0)
    one: Any = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if name == "llama":
        task = SequenceClassification(word_tokenizer(start=True, end=False))
        return _grouped(LlamaForSequenceClassification, LlamaConfig, **one).eval(), task
    if name == "bart":
        task = SequenceClassification(word_tokenizer(start=False, end=True))
        return _bart(BartForSequenceClassification, BartConfig, **one).eval(), task
    return bert(["LABEL_0"]), SequenceClassification(piece_tokenizer())


def alone(model: Any, task: SequenceClassification, texts: list[str]) -> Tensor:
    """Return the model's outputs in single passes [texts, outputs]."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([task.tokenizer(text)["input_ids"]])).logits for text in texts])


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_one_output_is_scored_in_bulk_as_a_value(name: str) -> None:
    model, task = one_output(name)
    (batch,) = score(model, task, [*TEXTS, ""], threads=1)
    assert batch.schema.names == ["row", "value", "reason"]
    expected = alone(model, task, TEXTS).flatten().tolist()
    assert batch.column("value").to_pylist()[:-1] == pytest.approx(expected, abs=1e-5)
    assert batch.column("value").to_pylist()[-1] is None
    assert mapper(model, task)({"text": TEXTS})["value"] == pytest.approx(expected, abs=1e-5)
    assert task.probabilities(model, VALUES, 4096)[3] == pytest.approx({"LABEL_0": expected[3]}, abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
@pytest.mark.parametrize("kind", ["probability", "log_probability", "margin"])
def test_the_target_of_one_output_is_the_output(name: str, kind: Any) -> None:
    model, task = one_output(name)
    for all_labels in (False, True):
        batch = task.collate(task.items(model, VALUES, all_labels=all_labels), torch.device("cpu"))
        with torch.no_grad():
            assert torch.allclose(task.target(model, batch, kind), alone(model, task, TEXTS).flatten(), atol=1e-5)


@pytest.mark.parametrize("labels", ["given", "all"])
def test_scores_of_one_output_are_derivatives_of_the_output(labels: Any) -> None:
    model, task = one_output("bert")
    scores = secateur.attribute(model, task, VALUES, criterion=GradientActivation(labels=labels))
    gate = torch.ones(37, requires_grad=True)
    expected = torch.zeros(37)
    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda _, arguments: (arguments[0] * gate,))
    for text in TEXTS:
        output = model(torch.tensor([task.tokenizer(text)["input_ids"]])).logits
        expected += torch.autograd.grad(output.sum(), gate)[0].abs()
    handle.remove()
    assert torch.allclose(scores["encoder.1.ffn"].float(), expected, rtol=1e-4)
    assert float(expected.sum()) > 0


def test_values_are_evaluated_by_correlations() -> None:
    model, task = one_output("bert")
    result = secateur.evaluate(model, task, VALUES)
    outputs, wanted = alone(model, task, TEXTS).flatten().double().numpy(), np.array([row["target"] for row in VALUES])
    assert result.metric == "Pearson"
    assert result.value == pytest.approx(np.corrcoef(outputs, wanted)[0, 1], abs=1e-5)
    assert result.also is not None
    assert result.also.metric == "Spearman"
    order = np.corrcoef(outputs.argsort().argsort(), wanted.argsort().argsort())[0, 1]
    assert result.also.value == pytest.approx(order, abs=1e-9)
    assert result.low <= result.value <= result.high
    assert json.loads(json.dumps(result.to_json()))["also"]["metric"] == "Spearman"
    assert str(result).startswith("Pearson ")
    assert ", Spearman " in str(result)


def test_equal_values_share_their_rank_and_constants_have_no_correlation() -> None:
    result = correlations([1.0, 1.0, 2.0, 5.0], [3.0, 4.0, 4.0, 9.0])
    assert result.also is not None
    assert result.also.value == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    constant = correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert constant.value == 0
    assert constant.also is not None
    assert constant.also.value == 0


@pytest.mark.parametrize("target", ["high", True, float("nan"), float("inf"), [1.0]])
def test_a_target_that_is_no_number_is_refused(target: Any) -> None:
    model, task = one_output("bert")
    with pytest.raises(InputError, match=r"^examples, row 2: expected a number as target"):
        secateur.evaluate(model, task, [VALUES[0], {"input": "a", "target": target}])


def test_numbers_from_files_of_text_are_values() -> None:
    model, task = one_output("bert")
    written = [{**row, "target": str(row["target"])} for row in VALUES]
    assert secateur.evaluate(model, task, written) == secateur.evaluate(model, task, VALUES)


def test_several_labels_are_scored_in_bulk_by_sigmoids() -> None:
    model, task = bert(TOPICS, problem_type=SEVERAL), SequenceClassification(piece_tokenizer())
    (batch,) = score(model, task, TEXTS, threads=1)
    assert batch.schema.names == ["row", "labels", *(f"p_{topic}" for topic in TOPICS), "reason"]
    expected = alone(model, task, TEXTS).sigmoid()
    for k, topic in enumerate(TOPICS):
        assert batch.column(f"p_{topic}").to_pylist() == pytest.approx(expected[:, k].tolist(), abs=1e-5)
    above = [[topic for topic, p in zip(TOPICS, row, strict=True) if p > 0.5] for row in expected.tolist()]
    assert batch.column("labels").to_pylist() == above
    assert len({len(row) for row in above}) > 1
    assert mapper(model, task)({"text": TEXTS})["labels"] == above
    assert task.probabilities(model, SETS, 4096)[0] == pytest.approx(
        dict(zip(TOPICS, expected[0].tolist(), strict=True)), abs=1e-5
    )


def test_the_target_of_several_labels_is_their_log_likelihood() -> None:
    model, task = bert(TOPICS, problem_type=SEVERAL), SequenceClassification(piece_tokenizer())
    logits = alone(model, task, TEXTS)
    right = torch.tensor([[topic in row["target"] for topic in TOPICS] for row in SETS])
    batch = task.collate(task.items(model, SETS), torch.device("cpu"))
    with torch.no_grad():
        values = task.target(model, batch, "log_probability")
    expected = torch.where(right, logits, -logits)  # log sigmoid(logit), or log(1 - sigmoid(logit)) = log sigmoid(-logit)
    assert torch.allclose(values, torch.nn.functional.logsigmoid(expected).sum(1), atol=1e-5)
    single = task.collate(task.items(model, SETS, all_labels=True), torch.device("cpu"))
    with torch.no_grad():
        values = task.target(model, single, "log_probability").view(len(SETS), len(TOPICS))
    assert torch.allclose(values, torch.nn.functional.logsigmoid(logits), atol=1e-5)


def test_several_labels_are_evaluated_by_f1() -> None:
    model, task = bert(TOPICS, problem_type=SEVERAL), SequenceClassification(piece_tokenizer())
    result = secateur.evaluate(model, task, SETS)
    predicted = alone(model, task, TEXTS) > 0
    right = torch.tensor([[topic in row["target"] for topic in TOPICS] for row in SETS])
    both, either = (predicted & right).sum(0).double(), (predicted.int() + right.int()).sum(0).double()
    assert result.metric == "micro F1"
    assert result.value == pytest.approx(float(2 * both.sum() / either.sum()))
    assert result.also is not None
    assert result.also.metric == "macro F1"
    assert result.also.value == pytest.approx(float((2 * both / either).mean()))


def test_labels_that_are_neither_predicted_nor_right_have_an_f1_of_0() -> None:
    result = f1_scores(torch.tensor([[True, False], [True, False]]), torch.tensor([[True, False], [True, False]]))
    assert result.value == 1
    assert result.also is not None
    assert result.also.value == 0.5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("war", "expected a list of labels"),
        (["war", "peace"], "expected a target among the labels"),
        (["war", "war"], "expected each label once"),
        ([0, 1, 0, 1], "expected the names of the right labels"),
        ([0.0, 1.0, 0.0, 0.0], "expected the names of the right labels"),
    ],
)
def test_wrong_sets_of_labels_are_refused(target: Any, message: str) -> None:
    model, task = bert(TOPICS, problem_type=SEVERAL), SequenceClassification(piece_tokenizer())
    with pytest.raises(InputError, match=rf"^examples, row 2: {message}"):
        secateur.evaluate(model, task, [SETS[1], {"input": "a", "target": target}])


@pytest.mark.parametrize("kind", ["value", "labels"])
def test_the_whole_flow_runs(kind: str, tmp_path: Path) -> None:
    task, rows = SequenceClassification(piece_tokenizer()), VALUES if kind == "value" else SETS
    model = bert(["LABEL_0"]) if kind == "value" else bert(TOPICS, problem_type=SEVERAL)
    result = secateur.compress(model, rows, task, flops=0.6, evaluation=rows, out=tmp_path / "out", lengths=(9,))
    assert result.verification.holds
    assert len(result.candidates) > 1
    assert all(candidate.divergence is not None and candidate.divergence > 0 for candidate in result.candidates)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["pruned"]["also"]["metric"] == ("Spearman" if kind == "value" else "macro F1")
    assert ("Spearman" if kind == "value" else "macro F1") in str(result)
    loaded = secateur.load(tmp_path / "out")
    assert secateur.evaluate(loaded, task, rows) == secateur.evaluate(result.pruned, task, rows)


@pytest.mark.parametrize("kind", ["value", "labels"])
def test_divergence_is_that_of_the_predictions(kind: str) -> None:
    task, rows = SequenceClassification(piece_tokenizer()), VALUES if kind == "value" else SETS
    model = bert(["LABEL_0"]) if kind == "value" else bert(TOPICS, problem_type=SEVERAL)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.mul_(1.5)
    batches = list(task.batches(task.items(model, rows), torch.device("cpu"), 64))
    one, two = (alone(either, task, TEXTS).double() for either in (model, other))
    if kind == "value":
        expected = (one - two).square().sum(1) / 2
    else:
        p, q = one.sigmoid(), two.sigmoid()
        expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    assert divergence(model, other, task, batches) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_choose_needs_no_targets() -> None:
    model, task = one_output("bert")
    rows = [{"input": text} for text in TEXTS]
    scores = secateur.attribute(model, task, rows, criterion=GradientActivation(labels="all"))
    plans = [secateur.plan(scores, keep=keep) for keep in (0.4, 0.8)]
    best = choose(model, task, plans, rows, recoveries=(None,), unlabeled=True)
    assert best[0].plan is plans[1]


@pytest.mark.parametrize("kind", ["value", "labels"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_training_batches_give_the_models_own_loss(kind: str, name: str) -> None:
    model, task = one_output(name)
    if kind == "labels":
        model = bert(TOPICS, problem_type=SEVERAL)
        task = SequenceClassification(piece_tokenizer())
    rows = VALUES if kind == "value" else SETS
    features, collate = task_features(task, LayerGates(model, keep_layers=1), rows)
    with undisturbed(model), torch.no_grad():
        loss = float(model(**collate(features)).loss)
    outputs = alone(model, task, TEXTS)
    if kind == "value":
        expected = (outputs.flatten() - torch.tensor([row["target"] for row in VALUES])).square().mean()
    else:
        right = torch.tensor([[float(topic in row["target"]) for topic in TOPICS] for row in SETS])
        expected = nn.functional.binary_cross_entropy_with_logits(outputs, right)
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_wrong_labels_need_more_than_one_output() -> None:
    model, task = one_output("bert")
    with pytest.raises(InputError, match=r"^criterion: .* one output"):
        secateur.attribute(model, task, VALUES, criterion="rap")
    several = bert(TOPICS, problem_type=SEVERAL)
    assert secateur.attribute(several, task, SETS, criterion="rap")["encoder.0.ffn"].abs().sum() > 0


@pytest.mark.parametrize(("names", "problem"), [(TOPICS, "regression"), (["LABEL_0"], SEVERAL)])
def test_outputs_without_a_known_meaning_are_refused(names: list[str], problem: str) -> None:
    model, task = bert(names, problem_type=problem), SequenceClassification(piece_tokenizer())
    with pytest.raises(InputError, match=r"^model: expected .* \(config.problem_type\)"):
        secateur.evaluate(model, task, VALUES)
    with pytest.raises(InputError, match="problem_type"):
        list(score(model, task, TEXTS, threads=1))


def test_images_have_values_and_several_labels_too() -> None:
    from cases import CASES

    case, rows = CASES["vit"], pictures(["x"])
    config: Any = copy.deepcopy(case.build().config)
    config.problem_type = SEVERAL
    model: Any = ViTForImageClassification(config).eval()
    result = secateur.evaluate(model, case.task, [{**row, "target": ["neutral"]} for row in rows])
    assert result.metric == "micro F1"
    config.problem_type, config.id2label, config.label2id = None, {0: "LABEL_0"}, {"LABEL_0": 0}
    values = [{**row, "target": k} for k, row in enumerate(rows)]
    assert secateur.evaluate(ViTForImageClassification(config).eval(), case.task, values).metric == "Pearson"


def pair_tokenizer() -> Any:
    tokenizer = piece_tokenizer(model_max_length=16, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("mixed", [False, True])
def test_a_cross_encoder_reads_pairs_with_their_segments(mixed: bool) -> None:
    tokenizer, model = pair_tokenizer(), bert(["LABEL_0"])
    pairs: list[Any] = [[first, second] for first, second in zip(TEXTS, reversed(TEXTS), strict=True)]
    if mixed:
        pairs[2] = TEXTS[2]
    task, expected = SequenceClassification(tokenizer), []
    for pair in pairs:
        inputs = [pair] if isinstance(pair, str) else pair
        encoded = tokenizer(*inputs, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            expected.append(float(model(**encoded).logits))
    rows = [{"input": pair, "target": k} for k, pair in enumerate(pairs)]
    assert task.ranked(model, rows, 64).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    together, single = (secateur.attribute(model, task, rows, max_tokens=tokens)["encoder.0.ffn"] for tokens in (4096, 1))
    assert torch.allclose(together, single, rtol=1e-4)
    assert secateur.evaluate(model, task, rows).value == pytest.approx(np.corrcoef(expected, range(len(rows)))[0, 1], abs=1e-5)


def test_a_model_without_segments_gets_none() -> None:
    torch.manual_seed(0)
    model: Any = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=24, hidden_dim=37, n_layers=1, n_heads=4, max_position_embeddings=40)
    ).eval()
    task = SequenceClassification(pair_tokenizer())
    (logits,) = task.ranked(model, [{"input": ["the cat", "a dog"]}], 64)
    with torch.no_grad():
        ids = torch.tensor([task.tokenizer("the cat", "a dog")["input_ids"]])
        assert torch.allclose(logits, model(ids).logits[0], atol=1e-5)


@pytest.mark.parametrize("value", [["a"], ["a", "b", "c"], ["a", 1], 7, {"a": "b"}])
def test_inputs_that_are_neither_texts_nor_pairs_are_refused(value: Any) -> None:
    model, task = one_output("bert")
    with pytest.raises(InputError, match=r"^examples, row 2: expected a text or a pair of texts in column 'input'"):
        secateur.evaluate(model, task, [VALUES[0], {"input": value, "target": 1}])
