"""Tasks of heads (classes, numbers, spans): their features, losses and metrics are compared with hand-made ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, word_tokenizer
from counting import Counting
from encoders import pair_tokenizer, still_encoder
from torch import Tensor, nn

from secateur import InputError
from secateur.learned.multitask.encoder_tasks import Classification, Regression, Span, task_from_json, word_f1
from secateur.learned.multitask.model import MultitaskModel, encoder_of
from secateur.tasks.metrics import Evaluation

CPU = torch.device("cpu")
CONTEXT = "a big red dog sat on the mat and then ran under the small tree so the bird flew"


def asked(answer: str, question: str = "the cat", at: int | None = None) -> dict[str, Any]:
    start = CONTEXT.index(answer) if at is None else at
    return {"question": question, "context": CONTEXT, "answers": {"text": [answer], "answer_start": [start]}}


def rows(targets: list[Any]) -> list[dict[str, Any]]:
    return [{"input": "the cat sat", "target": target} for target in targets]


def scored(task: Classification | Regression, targets: list[Any], logits: Tensor) -> Evaluation:
    examples = rows(targets)
    return task.score(examples, task.features(pair_tokenizer(), examples, 16), list(logits))


def test_accuracy_is_the_share_of_right_classes() -> None:
    task = Classification(("bad", "good", "so"))
    logits = torch.tensor([[0.1, 0.7, 0.2], [2.0, 1.0, 0.0], [0.0, 0.1, 0.3], [5.0, 4.9, 1.0]])
    evaluation = scored(task, ["good", "bad", "good", "so"], logits)
    assert (evaluation.metric, evaluation.value, evaluation.examples) == ("accuracy", 0.5, 4)
    assert 0 < evaluation.low < 0.5 < evaluation.high < 1
    assert scored(task, [1, 0, 2, 0], logits).value == 1  # Classes by number.


def test_matthews_correlation_is_the_formula() -> None:
    task = Classification(("no", "yes"), metric="matthews")
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        true, predicted = (torch.randint(0, 2, (40,), generator=generator) for _ in range(2))
        tp, tn = int((predicted & true).sum()), int(((1 - predicted) & (1 - true)).sum())
        fp, fn = int((predicted & (1 - true)).sum()), int(((1 - predicted) & true).sum())
        exact = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        logits = nn.functional.one_hot(predicted, 2).float()
        result = scored(task, [task.names[k] for k in true], logits)
        assert result.metric == "matthews"
        assert result.value == pytest.approx(exact, abs=1e-12)
        assert result.low <= result.value <= result.high
    # A single predicted class has no correlation.
    assert scored(task, ["yes", "no", "yes"], torch.tensor([[0.0, 1.0]] * 3)).value == 0


def test_pearsons_correlation_is_numpys() -> None:
    true = [0.0, 1.5, 5, 3.25, 2]
    predicted = torch.tensor([[0.4], [1.0], [4.0], [4.5], [-1.0]])
    result = scored(Regression(), true, predicted)
    assert result.metric == "pearson"
    assert result.value == pytest.approx(float(np.corrcoef(true, predicted[:, 0].double())[0, 1]), abs=1e-12)
    assert scored(Regression(), true, torch.ones(5, 1)).value == 0


def test_losses_are_those_of_the_formulas() -> None:
    logits = torch.randn(3, 4)
    classes = Classification(("a", "b", "c", "d"))
    exact: Any = -sum(logits[row].log_softmax(0)[label] for row, label in enumerate([2, 0, 3])) / 3
    assert torch.allclose(classes.loss(logits, classes.labels([2, 0, 3], CPU)), exact)
    numbers = Regression()
    loss = numbers.loss(logits[:, :1], numbers.labels([1, 2.5, -1], CPU))
    assert torch.allclose(loss, ((logits[:, 0] - torch.tensor([1, 2.5, -1])) ** 2).mean())
    spans, by_token = Span(), torch.randn(2, 7, 2)
    exact = -sum(
        by_token[row, :, k].log_softmax(0)[place] for row, pair in enumerate([(2, 4), (0, 0)]) for k, place in enumerate(pair)
    )
    assert torch.allclose(spans.loss(by_token, spans.labels([(2, 4), (0, 0)], CPU)), exact / 4)


def test_features_are_the_tokenizers() -> None:
    examples = [{"input": "the cat", "pair": "a dog sat", "target": 2}, {"input": "so", "pair": "plays", "target": -1.5}]
    features = Regression().features(pair_tokenizer(), examples, 16)
    assert features == [
        {"row": 0, "label": 2.0, "input_ids": [1, 4, 6, 2, 5, 7, 9, 2], "token_type_ids": [0, 0, 0, 0, 1, 1, 1, 1]},
        {"row": 1, "label": -1.5, "input_ids": [1, 28, 2, 34, 31, 2], "token_type_ids": [0, 0, 0, 1, 1, 1]},
    ]
    # A pair that is too long loses pieces of its longer text. A single text has the marks of a single text.
    assert Regression().features(pair_tokenizer(), examples, 7)[0]["input_ids"] == [1, 4, 6, 2, 5, 7, 2]
    del examples[0]["pair"]
    assert Regression().features(pair_tokenizer(), examples[:1], 3)[0]["input_ids"] == [1, 4, 2]
    plain = Regression().features(word_tokenizer(start=False, end=True), examples[:1], 16)
    assert plain == [{"row": 0, "label": 2.0, "input_ids": [4, 6, 1]}]


@pytest.mark.parametrize("side", ["right", "left"])
def test_little_of_a_long_text_is_encoded_to_the_same_features(side: str) -> None:
    tokenizer = Counting(pair_tokenizer())
    tokenizer.tokenizer.truncation_side = side
    text = "the cat sat so " * 300
    for example in ({"input": text}, {"input": text, "pair": "a dog"}, {"input": "a", "pair": text}):
        (feature,) = Regression().features(tokenizer, [{**example, "target": 1}], 9)
        whole = tokenizer.tokenizer(*([one] for one in example.values()), truncation=True, max_length=9)
        assert feature["input_ids"] == whole["input_ids"][0]
        assert feature["token_type_ids"] == whole["token_type_ids"][0]
        tokenizer.characters = 0
        longer = {name: one * 100 if len(one) > 9 else one for name, one in example.items()}
        Regression().features(tokenizer, [{**longer, "target": 1}], 9)
        assert tokenizer.characters < len(text) * 2


def test_little_of_a_long_question_is_encoded() -> None:
    question, tokenizer = "the cat sat so " * 300, Counting(pair_tokenizer())
    features = Span().features(tokenizer, [asked("red dog", question)], 32)
    assert features == Span().features(tokenizer, [asked("red dog", "the cat sat so the cat sat so")], 32)
    tokenizer.characters = 0
    assert Span().features(tokenizer, [asked("red dog", question * 100)], 32) == features
    assert tokenizer.characters < len(question) * 2


def windows(task: Span, example: dict[str, Any], max_length: int) -> list[dict[str, Any]]:
    """Return the features of an example, with the texts of their pieces."""
    features = task.features(pair_tokenizer(), [example], max_length)
    for feature in features:
        feature["pieces"] = [None if place is None else CONTEXT[place[0] : place[1]] for place in feature["places"]]
    return features


def test_windows_overlap_by_the_stride_and_cover_the_context() -> None:
    words = CONTEXT.split()
    for max_length, stride in ((20, 3), (20, 6), (21, 1), (22, 0), (64, 20)):
        features = windows(Span(stride=stride), asked("red dog"), max_length)
        width = max_length - 5  # Three marks and two pieces of question.
        starts = list(range(0, max(1, len(words) - stride), width - stride))
        assert len(features) == len(starts), (max_length, stride)
        for feature, start in zip(features, starts, strict=True):
            assert feature["row"] == 0
            assert feature["pieces"] == [None] * 4 + words[start : start + width] + [None]
            assert len(feature["input_ids"]) == len(feature["token_type_ids"]) == len(feature["places"]) <= max_length
            inside = [piece for piece, word in enumerate(feature["pieces"]) if word in ("red", "dog")]
            # The label points at both words if the window has both, else at the mark at the start.
            assert feature["label"] == ((inside[0], inside[1]) if len(inside) == 2 else (0, 0))


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [("a", ["a"]), ("red dog sat", ["red", "dog", "sat"]), ("flew", ["flew"]), ("og sa", ["dog", "sat"]), (" mat ", ["mat"])],
)
def test_a_label_is_the_first_and_last_piece_of_the_answer(answer: str, pieces: list[str]) -> None:
    """If an answer has parts of words, the label has the whole words. Spaces around an answer do not count."""
    (window,) = windows(Span(stride=4), asked(answer), 64)
    first, last = window["label"]
    assert window["pieces"][first : last + 1] == pieces


@pytest.mark.parametrize(("answer", "offsets"), [("bird", [(4, 8)]), ("birds", [(4, 8), (8, 9)]), ("s", [(8, 9)])])
def test_a_piece_beside_the_answer_is_no_part_of_it(answer: str, offsets: list[tuple[int, int]]) -> None:
    context = "the birds flew"
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    examples = [{"question": "the cat", "context": context, "answers": answers}]
    (feature,) = Span(stride=4).features(pair_tokenizer(), examples, 64)
    first, last = feature["label"]
    assert feature["places"][first : last + 1] == offsets


def test_the_best_span_is_the_one_that_logits_point_at() -> None:
    """Logits that point at the labels, in several windows, give F1 = 1. Logits that point elsewhere give less."""
    task = Span(stride=4)
    answers = ["red dog", "ran under", "the bird flew", "a big"]
    examples = [asked(answer) for answer in answers]
    features = task.features(pair_tokenizer(), examples, 20)
    assert len(features) > len(examples)
    logits = []
    for feature in features:
        feature_logits = torch.randn(len(feature["input_ids"]), 2)
        start, end = feature["label"]
        feature_logits[start, 0] += 20
        feature_logits[end, 1] += 20
        logits.append(feature_logits)
    evaluation = task.score(examples, features, logits)
    assert (evaluation.metric, evaluation.value, evaluation.examples) == ("f1", 1.0, 4)
    # One of the two words of the first answer; for the other answers the context's first word, an article.
    for feature, feature_logits in zip(features, logits, strict=True):
        feature_logits.zero_()
        if feature["row"] == 0 and feature["label"] != (0, 0):
            feature_logits[feature["label"][0]] = 10.0
    assert task.score(examples, features, logits).value == pytest.approx((2 / 3) / 4)


def test_the_best_span_against_a_loop_over_all() -> None:
    for longest, seed in ((1, 0), (2, 1), (3, 2), (30, 3)):
        generator = torch.Generator().manual_seed(seed)
        (feature,) = Span(stride=4).features(pair_tokenizer(), [asked("red dog")], 64)
        logits = torch.randn(len(feature["places"]), 2, generator=generator)
        logits[:5] += 100  # Neither a mark nor the question can be the answer.
        logits[4] -= 100
        spans = [
            (float(logits[first, 0].double() + logits[last, 1].double()), place[0], end[1])
            for first, place in enumerate(feature["places"])
            for last, end in enumerate(feature["places"])
            if place is not None and end is not None and first <= last < first + longest
        ]
        assert Span(longest=longest)._best_span(logits, feature["places"]) == max(spans)


@pytest.mark.parametrize(
    ("answer", "wanted", "exact"),
    [
        ("the red dog", "red dog", 1.0),
        ("The, Red dog!", "a red dog.", 1.0),
        ("red", "red dog", 2 / 3),
        ("dog dog red", "dog", 0.5),
        ("dog dog", "dog dog cat", 0.8),
        ("cat", "dog", 0.0),
        ("the", "a", 1.0),
        ("", "dog", 0.0),
    ],
)
def test_f1_of_words(answer: str, wanted: str, exact: float) -> None:
    assert word_f1(answer, wanted) == pytest.approx(exact)


def test_the_nearest_of_several_answers_counts() -> None:
    example = asked("red dog")
    example["answers"] = {"text": ["mat", "big red dog", "red"], "answer_start": [23, 2, 6]}
    features = Span(stride=4).features(pair_tokenizer(), [example], 64)
    logits = torch.zeros(len(features[0]["input_ids"]), 2)
    logits[features[0]["places"].index((6, 9)), 0] = 9
    logits[features[0]["places"].index((10, 13)), 1] = 9
    assert Span().score([example], features, [logits]).value == pytest.approx(0.8)


def test_a_head_reads_the_tokens_that_are_there() -> None:
    """A head reads the mean of all tokens but padding, or the first token. A span's logits are lowest at padding."""
    encoder, ids = still_encoder(), torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 4, 2]])
    mask, tasks = (ids != 0).long(), {"a": Classification(("x", "y")), "b": Span()}
    with torch.no_grad():
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        for pooling in ("mean", "first"):
            model = MultitaskModel(encoder, tasks, pooling=pooling).eval()
            pooled = torch.stack([states[0, :4].mean(0), states[1].mean(0)]) if pooling == "mean" else states[:, 0]
            linear: Any = model.heads["a"].get_submodule("linear")
            assert torch.allclose(model("a", ids, mask).logits, linear(pooled), atol=1e-6)
            spans = model("b", ids, mask).logits
            assert spans.shape == (2, 6, 2)
            assert (spans[0, 4:] == torch.finfo(torch.float32).min).all()
            assert (spans[0, :4].abs() < 100).all()


def test_heads_are_the_seeds_and_of_the_encoders_dtype() -> None:
    tasks, encoder = {"a": Classification(("x", "y")), "b": Regression()}, still_encoder().double()
    before = torch.get_rng_state()
    first, second, other = (MultitaskModel(encoder, tasks, seed=seed).heads for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(first["a"].get_parameter("linear.weight"), other["a"].get_parameter("linear.weight"))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float64}


@pytest.mark.parametrize("task", [Classification(("x", "y"), "matthews"), Regression(), Span(stride=5, longest=7)])
def test_a_task_is_read_as_it_was_written(task: Any) -> None:
    assert task_from_json(task.to_json()) == task


BAD: dict[str, tuple[Any, str]] = {
    "one text": (lambda: Classification("xyz"), r"^labels: expected several labels, got the text 'xyz'$"),  # type: ignore[arg-type]
    "one label": (lambda: Classification(("x",)), r"^labels: expected at least two different labels, got \['x'\]$"),
    "a label twice": (lambda: Classification(("x", "y", "x")), r"^labels: expected at least two different labels, got "),
    "metric": (lambda: Classification(("x", "y"), "f1"), r"^metric: expected accuracy or matthews, got 'f1'$"),  # type: ignore[arg-type]
    "matthews of three": (
        lambda: Classification(("x", "y", "z"), "matthews"),
        r"^metric: expected accuracy with 3 labels, got",
    ),
    "kind": (lambda: task_from_json({"kind": "tags"}), r"^tasks: expected one of the kinds classification, regression, span"),
    "fields": (lambda: task_from_json({"kind": "span", "size": 1}), r"^tasks: expected one of the kinds"),
    "class": (
        lambda: Classification(("x", "y")).features(pair_tokenizer(), rows(["x", "z"]), 16),
        r"^examples, row 2: expected a target among the labels 'x', 'y' or its number, got 'z'$",
    ),
    "number": (
        lambda: Regression().features(pair_tokenizer(), rows([1, 2, "3"]), 16),
        r"^examples, row 3: expected a number as target, got '3'$",
    ),
    "a truth as number": (
        lambda: Regression().features(pair_tokenizer(), rows([True]), 16),
        r"^examples, row 1: expected a number as target, got True$",
    ),
    "text": (
        lambda: Regression().features(pair_tokenizer(), [{"input": 5, "target": 1.0}], 16),
        r"^examples, row 1: expected text in column 'input', got int 5$",
    ),
    "no room for a text": (
        lambda: Regression().features(pair_tokenizer(), rows([1.0]), 2),
        r"^max_length: expected more than 2, the number of the tokenizer's marks, got 2$",
    ),
    "no answer": (
        lambda: Span(stride=4).features(
            pair_tokenizer(), [asked("red"), {**asked("red"), "answers": {"text": [], "answer_start": []}}], 64
        ),
        r"^examples, row 2: expected answers with a text and an answer_start, got \{\"text\": \[\], ",
    ),
    "an answer as text": (
        lambda: Span(stride=4).features(pair_tokenizer(), [{**asked("red"), "answers": "red"}], 64),
        r"^examples, row 1: expected answers with a text and an answer_start, got \"red\"$",
    ),
    "an answer of a number": (
        lambda: Span(stride=4).features(
            pair_tokenizer(), [{**asked("red"), "answers": {"text": [3], "answer_start": [0]}}], 64
        ),
        r"^examples, row 1: expected answers with a text and an answer_start, got ",
    ),
    "windows without room": (
        lambda: Span(stride=64).features(pair_tokenizer(), [asked("red")], 19),
        r"^max_length: expected at least 20 for a question and its context, got 19$",
    ),
    "a slow tokenizer": (
        lambda: Span().features(Slow(), [asked("red")], 128),
        r"^tokenizer: expected a fast one, .* got Slow$",
    ),
    "no tasks": (lambda: MultitaskModel(still_encoder(), {}), r"^tasks: expected at least one, got none$"),
    "a point": (lambda: MultitaskModel(still_encoder(), {"a.b": Span()}), r"^tasks: expected names without points, got 'a.b'$"),
    "no name": (lambda: MultitaskModel(still_encoder(), {"": Span()}), r"^tasks: expected names without points, got ''$"),
    "a name of torch's": (
        lambda: MultitaskModel(still_encoder(), {"type": Span()}),
        r"^tasks: expected names that .* got 'type'$",
    ),
    "pooling": (
        lambda: MultitaskModel(still_encoder(), {"a": Span()}, pooling="max"),  # type: ignore[arg-type]
        r"^pooling: expected mean or first, got 'max'$",
    ),
}


class Slow:
    is_fast = False


@pytest.mark.parametrize("name", BAD)
def test_bad_tasks_and_examples(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_a_long_question_about_a_short_text_is_none() -> None:
    """A context that fits is not split into windows, even beside a long question."""
    answers = {"text": ["red"], "answer_start": [4]}
    example = {"question": "the cat sat on the mat so", "context": "big red", "answers": answers}
    (feature,) = Span(stride=4).features(pair_tokenizer(), [example], 28)
    assert feature["label"] == (10, 10)


def test_a_decoder_is_no_encoder() -> None:
    for name in ("llama", "qwen3"):
        with pytest.raises(InputError, match=r"^model: expected one with an encoder, got "):
            encoder_of(CASES[name].model())
        with pytest.raises(InputError, match=r"^model: expected an encoder, got "):
            MultitaskModel(CASES[name].model(), {"a": Span()})
