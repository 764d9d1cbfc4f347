"""Tasks: metrics compared with slow computations of single examples, confidence intervals, batching, truncation and tokens."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import naive
import pytest
import torch
from cases import ALL, CASES, CLASSES, GENERATING, LABELS, TAGS, Case, piece_tokenizer, sentences, tagged, word_tokenizer
from seqeval.metrics import f1_score
from torch import Tensor

import secateur
from secateur.tasks import Item
from secateur.tasks.batches import buckets
from secateur.tasks.metrics import bootstrap, proportion

SOURCES = 24


def half_right(answers: list[str], others: list[str]) -> list[str]:
    """Return targets that differ from every third answer, so that the metric is neither 0 nor 1."""
    return [next(other for other in others if other != answer) if i % 3 == 0 else answer for i, answer in enumerate(answers)]


def log_probability(case: Case, model: Any, example: dict[str, Any], target: str) -> float:
    with torch.inference_mode():
        return float(naive.value(*naive.alone(case, model, example, target), "log_probability"))


def best_label(case: Case, model: Any, example: dict[str, Any], labels: list[str]) -> str:
    return max(labels, key=lambda label: log_probability(case, model, example, label))


@pytest.mark.parametrize("name", ["t5-gated", "t5-relu", "llama", "qwen3", "gemma3", "bert-sequence"])
@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
def test_accuracy_equals_that_of_single_examples_and_labels(name: str, max_tokens: int) -> None:
    """The expected accuracy comes from every label of every example alone: no batch, no padding, no shared encoder."""
    case, model = CASES[name], CASES[name].model()
    labels = CLASSES if case.kind == "encoder" else LABELS
    inputs: list[dict[str, Any]] = [{"input": text} for text in sentences(SOURCES, seed=1)]
    answers = [best_label(case, case.model(torch.float64), example, labels) for example in inputs]
    targets = half_right(answers, labels)
    examples = [{**example, "target": target} for example, target in zip(inputs, targets, strict=True)]
    result = secateur.evaluate(model, case.task, examples, max_tokens=max_tokens)
    assert result.metric == "accuracy"
    assert result.examples == SOURCES
    assert result.value == sum(a == t for a, t in zip(answers, targets, strict=True)) / SOURCES
    assert 0 < result.low < result.value < result.high < 1


# Some labels are the beginning of another label, and some begin alike.
NESTED = ["yes", "yes yes", "no way", "no way so", "maybe so then"]


@pytest.mark.parametrize("name", [case.name for case in GENERATING])
@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
def test_label_scores_equal_those_of_single_examples_and_labels(
    name: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task ranks all labels in one tree. The expected scores come from every label of every example alone."""
    # In float64, Gemma 2's attention gives NaN for padding that sees no token.
    dtype, limit = (torch.float32, 1e-4) if name == "gemma2" else (torch.float64, 1e-9)
    case, model = CASES[name], CASES[name].model(dtype)
    monkeypatch.setattr("secateur.tasks.label_tree._LOGITS", 600)  # The task scores two or three rows at a time.
    task = type(case.task)(case.task.reader, labels=NESTED)
    inputs: list[dict[str, Any]] = [{"input": text} for text in sentences(SOURCES, seed=3)]
    with torch.inference_mode():
        scores = task.ranked(model, inputs, max_tokens)
    expected = [[log_probability(case, model, example, label) for label in NESTED] for example in inputs]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=limit, atol=limit)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [case.name for case in GENERATING])
def test_labels_are_ranked_with_gradients_after_inference(name: str) -> None:
    case, model = CASES[name], CASES[name].model()
    task = type(case.task)(case.task.reader, labels=NESTED)
    inputs: list[dict[str, Any]] = [{"input": text} for text in sentences(3, seed=3)]
    with torch.inference_mode():
        expected = task.ranked(model, inputs, 50)
    scores = task.ranked(model, inputs, 50)
    scores.sum().backward()
    torch.testing.assert_close(scores, expected.clone())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def greedy(model: Any, ids: list[int], steps: int, end: int) -> list[int]:
    """Decode greedily with whole forward passes: no cache, no batch."""
    out = [model.config.decoder_start_token_id]
    for _ in range(steps):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([out]), use_cache=False).logits
        out.append(int(logits[0, -1].argmax()))
        if out[-1] == end:
            break
    return out[1:]


@pytest.fixture(scope="module")
def first_word() -> Any:
    """Return a T5 trained to answer with the text's first word, mostly right. A random T5 never ends its output."""
    case = CASES["t5-gated"]
    model: Any = case.model().eval()
    task = secateur.TextToText(case.task.reader)
    examples = [{"input": text, "target": text.split()[0]} for text in sentences(64, seed=5)]
    batches = list(task.batches(task.items(model, examples), torch.device("cpu"), max_tokens=1000))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        for batch in batches:
            optimizer.zero_grad()
            (-task.target(model, batch, "log_probability").mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
def test_exact_match_equals_that_of_greedy_decoding_by_hand(first_word: Any, max_tokens: int) -> None:
    tokenizer = CASES["t5-gated"].task.reader
    texts = sentences(SOURCES, seed=2)
    # The longest target limits the output: here to two words, the end mark, and one token more.
    targets = [*(text.split()[0] for text in texts[:-6]), *(" ".join(text.split()[:2]) for text in texts[-6:])]
    outputs = [greedy(first_word, tokenizer(text)["input_ids"], 4, tokenizer.eos_token_id) for text in texts]
    answers = [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]
    right = sum(answer == target for answer, target in zip(answers, targets, strict=True))
    examples = [{"input": text, "target": target} for text, target in zip(texts, targets, strict=True)]
    result = secateur.evaluate(first_word, secateur.TextToText(tokenizer), examples, max_tokens=max_tokens)
    assert (result.metric, result.value, result.examples) == ("exact match", right / SOURCES, SOURCES)
    assert 0 < right < SOURCES


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
def test_perplexity_is_per_token_of_the_targets(name: str, max_tokens: int) -> None:
    case, model = CASES[name], CASES[name].model()
    task = secateur.CausalLM(word_tokenizer(start=True, end=False))
    targets = sentences(9, seed=3)
    examples = [{"input": text, "target": target} for text, target in zip(sentences(9, seed=4), targets, strict=True)]
    loss = -sum(log_probability(case, case.model(torch.float64), e, e["target"]) for e in examples)
    result = secateur.evaluate(model, task, examples, max_tokens=max_tokens)
    assert result.metric == "perplexity"
    assert result.value == pytest.approx(math.exp(loss / sum(len(target.split()) for target in targets)), rel=1e-5)
    assert result.low < result.value < result.high


def predicted_tags(case: Case, model: Any, examples: list[dict[str, Any]]) -> list[list[str]]:
    with torch.inference_mode():
        return [[TAGS[int(i)] for i in naive.alone(case, model, e)[0].argmax(-1)] for e in examples]


@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
def test_entity_f1_equals_that_of_seqeval(max_tokens: int) -> None:
    case = CASES["bert-token"]
    model, examples = case.model(), tagged(16)
    guess = predicted_tags(case, model, examples)
    # Half the rows have the model's own tags, so that the model is right about some entities.
    examples = [
        {**example, "tags": tags if i % 2 else example["tags"]}
        for i, (example, tags) in enumerate(zip(examples, guess, strict=True))
    ]
    expected = f1_score([e["tags"] for e in examples], guess)
    result = secateur.evaluate(model, case.task, examples, max_tokens=max_tokens)
    assert (result.metric, result.examples) == ("F1", 16)
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert 0 < result.low < expected < result.high


def test_tags_that_are_no_entities_give_word_accuracy() -> None:
    case = CASES["bert-token"]
    model: Any = case.model()
    names = ["NOUN", "VERB", "DET", "ADJ", "X"]
    examples = [{"tokens": e["tokens"], "tags": [names[TAGS.index(tag)] for tag in e["tags"]]} for e in tagged(12)]
    guess = [[names[TAGS.index(tag)] for tag in row] for row in predicted_tags(case, model, tagged(12))]
    pairs = [(a, b) for e, g in zip(examples, guess, strict=True) for a, b in zip(e["tags"], g, strict=True)]
    result = secateur.evaluate(model, secateur.TokenClassification(piece_tokenizer(), labels=names), examples)
    assert (result.metric, result.examples) == ("word accuracy", len(pairs))
    assert result.value == sum(a == b for a, b in pairs) / len(pairs) > 0


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    case = CASES["bert-token"]
    model = case.model()
    example = {"tokens": ["cats", "play", "singishs"], "tags": ["B-PER", 2, "O"]}
    (item,) = case.task.items(model, [example])
    pieces = case.task.reader.convert_ids_to_tokens(item.input_ids)
    assert pieces == ["[CLS]", "cat", "##s", "play", "sing", "##ish", "##s", "[SEP]"]
    assert item.target == [-100, 1, -100, 2, 0, -100, -100, -100]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_values(right: int, total: int, low: float, high: float) -> None:
    result = proportion("accuracy", right, total)
    assert (result.value, result.examples) == (right / total, total)
    assert (round(result.low, 4), round(result.high, 4)) == (low, high)
    # The interval of the failures mirrors that of the successes.
    mirrored = proportion("accuracy", total - right, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((result.low, result.high), abs=1e-12)


def test_wilson_ends_solve_the_score_equation() -> None:
    result = proportion("accuracy", 17, 60)
    for p in (result.low, result.high):
        assert abs(17 / 60 - p) / math.sqrt(p * (1 - p) / 60) == pytest.approx(1.959964, rel=1e-6)


def test_bootstrap_is_seeded_and_covers_the_value() -> None:
    values = torch.randn(80).tolist()

    def mean(rows: list[int]) -> float:
        return float(sum(values[row] for row in rows) / len(rows))

    result = bootstrap("mean", 80, mean)
    assert result == bootstrap("mean", 80, mean)
    assert result.value == mean(list(range(80)))
    # The interval of a mean is known: about 1.96 standard errors on either side.
    half = 1.96 * float(torch.tensor(values).std()) / math.sqrt(80)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.25)


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 1000])
def test_buckets_cover_every_row_once_within_the_limit(max_tokens: int) -> None:
    items = [Item(row, [1] * (row * 7 % 13), [0]) for row in range(50)]
    batches = buckets(items, max_tokens)
    assert Counter(item.row for bucket in batches for item in bucket) == Counter(range(50))
    for bucket in batches:
        longest = max(item.length for item in bucket)
        assert len(bucket) == 1 or len(bucket) * longest <= max_tokens
    lengths = [item.length for bucket in batches for item in bucket]
    assert lengths == sorted(lengths, reverse=True)
    # No bucket has room for one item more, so there are as few batches as the limit allows.
    for bucket in batches[:-1]:
        assert (len(bucket) + 1) * bucket[0].length > max_tokens


@pytest.mark.parametrize("case", [case for case in ALL if case.name != "vit"], ids=str)
def test_batches_are_padded_and_masked_on_the_right(case: Case) -> None:
    model = case.model()
    items = {item.row: item for item in case.task.items(model, case.examples)}
    for batch in case.batches(model):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        for row, row_ids, row_mask in zip(batch.rows, ids, mask, strict=True):
            length = len(items[row].input_ids)
            assert row_ids[:length].tolist() == items[row].input_ids
            assert row_ids[length:].tolist() == [case.task.reader.pad_token_id] * (len(row_ids) - length)
            assert row_mask.tolist() == [1] * length + [0] * (len(row_ids) - length)
        assert (batch.labels != -100).any(1).all()


@pytest.mark.parametrize("kind", ["probability", "log_probability", "margin"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_target_equals_its_formula(case: Case, kind: Any) -> None:
    model = case.model(torch.float64)
    with torch.inference_mode():
        for batch in case.batches(model):
            values: Tensor = case.task.target(model, batch, kind)
            for row, value in zip(batch.rows, values.tolist(), strict=True):
                expected = float(naive.value(*naive.alone(case, model, case.examples[row]), kind))
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence"])
def test_long_inputs_are_cut_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    task = type(case.task)(case.task.reader, labels=case.task.labels, max_length=5)
    with caplog.at_level(logging.WARNING, logger="secateur"):
        items = task.items(case.model(), case.examples)
    whole = case.task.items(case.model(), case.examples)
    too_long = sum(len(item.input_ids) > 5 for item in whole)
    assert 0 < too_long < len(whole)
    assert [record.message for record in caplog.records] == [
        f"{too_long} of {len(whole)} inputs are longer than 5 pieces and were cut"
    ]
    for item, full in zip(items, whole, strict=True):
        # A cut input keeps its end mark.
        expected = full.input_ids if len(full.input_ids) <= 5 else [*full.input_ids[:4], full.input_ids[-1]]
        assert item.input_ids == expected


def test_a_decoders_prompt_loses_its_first_tokens() -> None:
    case = CASES["llama"]
    task = secateur.CausalLM(case.task.reader, labels=LABELS, max_length=5)
    (item,) = task.items(case.model(), [{"input": "the cat sat on the mat", "target": "no way"}])
    assert case.task.reader.decode(item.input_ids) == "on the mat no way"
    assert case.task.reader.decode(item.target) == "no way"


def test_the_tokenizers_limit_is_the_default_max_length() -> None:
    assert secateur.TextToText(word_tokenizer(start=False, end=True, model_max_length=6)).max_length == 6
    assert secateur.TextToText(word_tokenizer(start=False, end=True)).max_length is None


def test_an_empty_prompt_begins_with_the_start_mark() -> None:
    case = CASES["llama"]
    task = secateur.CausalLM(word_tokenizer(start=False, end=False), labels=LABELS)
    (item,) = task.items(case.model(), [{"input": "", "target": "yes"}])
    assert item.input_ids[0] == case.task.reader.bos_token_id
    assert math.isfinite(secateur.evaluate(case.model(), task, [{"input": "", "target": "yes"}]).value)


def test_a_target_may_be_the_number_of_its_class() -> None:
    case = CASES["bert-sequence"]
    by_number = [{**e, "target": CLASSES.index(e["target"])} for e in case.examples]
    model = case.model()
    assert secateur.evaluate(model, case.task, by_number) == secateur.evaluate(model, case.task, case.examples)
    assert secateur.attribute(model, case.task, by_number).equal(secateur.attribute(model, case.task, case.examples))


def test_labels_rename_the_models_classes() -> None:
    case, names = CASES["bert-sequence"], ["eins", "zwei", "drei"]
    task = secateur.SequenceClassification(piece_tokenizer(), labels=names)
    renamed = [{**e, "target": names[CLASSES.index(e["target"])]} for e in case.examples]
    model = case.model()
    assert secateur.evaluate(model, task, renamed) == secateur.evaluate(model, case.task, case.examples)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_an_evaluation_does_not_depend_on_the_batch_size(case: Case) -> None:
    model = case.model()
    small, large = (secateur.evaluate(model, case.task, case.examples, max_tokens=n) for n in (1, 100_000))
    assert small == large


def test_an_evaluation_has_its_text_and_json_form() -> None:
    assert str(proportion("accuracy", 5, 10)) == "accuracy 0.5000 [0.2366, 0.7634] on 10 examples"
    assert set(proportion("accuracy", 5, 10).to_json()) == {"metric", "value", "low", "high", "examples"}
