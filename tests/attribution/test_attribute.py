"""Contract 1: scores equal the naive float64 loop. They do not depend on batches, padding, order or the model's mode."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from cases import ALL, CASES, CLASSES, LABELS, Case, unit_argument
from comparing import REDUCED, error, reduce
from torch import Tensor, nn

import secateur
from secateur.attribution.criteria import GradientActivation


@pytest.mark.parametrize("unit", REDUCED)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("target", ["probability", "log_probability", "margin"])
def test_equals_naive_float32(case: Case, unit: str, target: Any) -> None:
    by_example = naive.scores(case, case.model(torch.float64), unit, target)
    for over in ("signed", "absolute", "squared"):
        criterion = GradientActivation(target=target, over_examples=over)
        actual = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion, unit=unit_argument(unit))
        assert error(actual, *reduce(by_example, over)) < 1e-4, over
        assert all(scores.dtype == torch.float64 for scores in actual.values())


@pytest.mark.parametrize("unit", REDUCED)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_naive_float64(case: Case, unit: str) -> None:
    model = case.model(torch.float64)
    by_example = naive.scores(case, model, unit, "log_probability")
    actual = secateur.attribute(model, case.task, case.examples, unit=unit_argument(unit))
    limit = 1e-10 if case.exact else 1e-5
    assert error(actual, *reduce(by_example, "absolute")) < limit


@pytest.mark.parametrize(
    ("case", "labels"),
    [(CASES["t5-gated"], LABELS), (CASES["bert-sequence"], CLASSES), (CASES["llama"], LABELS)],
    ids=["t5-gated", "bert-sequence", "llama"],
)
def test_all_labels_equals_naive(case: Case, labels: list[str]) -> None:
    """Eq. 10: the absolute value is taken for each example and label, after the sum over tokens. Targets are not read."""
    inputs = [{"input": example["input"]} for example in case.examples]
    criterion = GradientActivation.paper_unsupervised()
    actual = secateur.attribute(case.model(), case.task, inputs, criterion=criterion, per_example=True)
    model = case.model(torch.float64)
    by_label = [naive.scores(case, model, "head", "probability", [label] * len(inputs)) for label in labels]
    rows: dict[str, Any] = {site: sum(of_label[site].abs() for of_label in by_label) for site in by_label[0]}
    assert error(actual, *reduce(rows, "absolute")) < 1e-4
    assert actual.per_example is not None
    assert error({s: v.double() for s, v in actual.per_example.items()}, rows, rows) < 1e-4


@pytest.mark.parametrize("case", [CASES["bert-sequence"], CASES["bert-token"]], ids=str)
@pytest.mark.parametrize("unit", REDUCED)
def test_equals_finite_difference(case: Case, unit: str) -> None:
    model, example, step = case.model(torch.float64), case.examples[0], 1e-4
    places = naive.gates(case, model, unit)
    criterion = GradientActivation(over_examples="signed")
    actual = secateur.attribute(model, case.task, [example], criterion=criterion, unit=unit_argument(unit))
    for site, of_site in places.items():
        ones = torch.ones(int(of_site[0].unit_of_channel.max()) + 1, dtype=torch.float64)
        for number in range(0, len(ones), 3):
            sides = []
            for sign in (1, -1):
                moved = ones.clone()
                moved[number] += sign * step
                with torch.inference_mode(), naive.gated(model, {site: of_site}, {site: moved}):
                    sides.append(float(naive.value(*naive.alone(case, model, example), "log_probability")))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(actual[site][number]) == pytest.approx(slope, rel=1e-5, abs=1e-7), (site, number)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_batch_size_and_padding_change_rounding_only(case: Case) -> None:
    model = case.model()
    single = secateur.attribute(model, case.task, case.examples, unit="channel", max_tokens=1)
    together = secateur.attribute(model, case.task, case.examples, unit="channel", max_tokens=100_000)
    assert error(together, single, single) < 1e-4


@pytest.mark.parametrize("case", ALL, ids=str)
def test_order_changes_rounding_only(case: Case) -> None:
    model, order = case.model(), [3, 0, 6, 2, 5, 1, 4]
    plain = secateur.attribute(model, case.task, case.examples, per_example=True)
    mixed = secateur.attribute(model, case.task, [case.examples[i] for i in order], per_example=True)
    assert error(mixed, plain, plain) < 1e-4
    assert plain.per_example is not None
    assert mixed.per_example is not None
    rows = {site: of_site[order] for site, of_site in plain.per_example.items()}
    assert error(mixed.per_example, rows, rows) < 1e-4


@pytest.mark.parametrize("case", ALL, ids=str)
def test_two_runs_are_bit_identical(case: Case) -> None:
    model = case.model()
    first, second = (secateur.attribute(model, case.task, case.examples, per_example=True) for _ in range(2))
    assert first.equal(second)
    assert first.per_example is not None
    assert second.per_example is not None
    assert all(torch.equal(rows, second.per_example[site]) for site, rows in first.per_example.items())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_per_example_rows_are_in_input_order_and_sum_to_the_total(case: Case) -> None:
    criterion = GradientActivation(over_examples="signed")
    by_example = naive.scores(case, case.model(torch.float64), "head", "log_probability")
    actual = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion, per_example=True)
    assert actual.per_example is not None
    assert error({s: v.double() for s, v in actual.per_example.items()}, by_example, by_example) < 1e-4
    sums = {site: rows.double().sum(0) for site, rows in actual.per_example.items()}
    assert error(sums, actual, reduce(by_example, "absolute")[1]) < 1e-5
    assert all(rows.dtype == torch.float32 for rows in actual.per_example.values())


def test_per_example_is_there_on_request_only(t5_case: Case) -> None:
    assert secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples).per_example is None


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_is_off(t5_case: Case, mode: str) -> None:
    model = t5_case.model().train(mode == "train")
    expected = secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples)
    assert secateur.attribute(model, t5_case.task, t5_case.examples).equal(expected)


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("max_tokens", [1, 40, 100_000])
def test_one_forward_and_one_backward_pass_for_each_batch(case: Case, max_tokens: int) -> None:
    model = case.model()
    batches = len(case.batches(model, max_tokens))
    forwards, backwards = 0, 0

    def count_forward(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal forwards
        forwards += 1
        output.logits.register_hook(count_backward)

    def count_backward(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += 1

    model.register_forward_hook(count_forward)
    secateur.attribute(model, case.task, case.examples, max_tokens=max_tokens)
    assert (forwards, backwards) == (batches, batches)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_no_weight_gradient_is_computed(case: Case) -> None:
    model = case.model()
    computed: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # Marian's table of positions needs no gradient.
            parameter.register_hook(lambda gradient, name=name: computed.append(name))  # type: ignore[no-untyped-call]
    secateur.attribute(model, case.task, case.examples, unit="channel")
    assert computed == []
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("select", ["ffn", "encoder.attention", "decoder.cross,encoder.ffn.0-1"])
def test_a_selection_has_the_scores_of_the_whole(t5_case: Case, select: str) -> None:
    whole = secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples)
    part = secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, select=select)
    assert 0 < len(part) < len(whole)
    assert list(part) == [site.name for site in secateur.sites(t5_case.model(), select=select)]
    assert error(part, {site: whole[site] for site in part}, whole) < 1e-6


def test_scores_carry_the_facts_that_a_plan_needs(t5_case: Case) -> None:
    model = t5_case.model()
    actual = secateur.attribute(model, t5_case.task, t5_case.examples, unit="channel")
    lengths = [len(t5_case.task.reader(example["input"])["input_ids"]) for example in t5_case.examples]
    targets = [len(t5_case.task.reader(example["target"])["input_ids"]) for example in t5_case.examples]
    assert list(actual.sites) == secateur.sites(model, unit="channel")
    assert list(actual.all_sites) == secateur.sites(model)
    assert actual.examples == len(lengths)
    assert actual.tokens == {"encoder": sum(lengths) / len(lengths), "decoder": sum(targets) / len(targets)}
    assert actual.criterion == GradientActivation().to_json()


def test_any_iterable_of_examples(t5_case: Case) -> None:
    expected = secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples)
    lazily = secateur.attribute(t5_case.model(), t5_case.task, (dict(example) for example in t5_case.examples))
    assert lazily.equal(expected)


def test_progress_is_told_of_every_batch(t5_case: Case) -> None:
    told: list[tuple[int, int]] = []
    secateur.attribute(
        t5_case.model(), t5_case.task, t5_case.examples, max_tokens=30, progress=lambda done, total: told.append((done, total))
    )
    count = len(t5_case.examples)
    assert len(told) > 2
    assert told[0] == (0, count)
    assert told[-1] == (count, count)
    assert told == sorted(set(told))


def test_lengths_of_the_stacks_do_not_depend_on_which_sites_are_scored(t5_case: Case) -> None:
    """They weigh the FLOPs of all layers. A selection in the decoder once took the length of the inputs for the targets'."""
    model = t5_case.model()
    whole = secateur.attribute(model, t5_case.task, t5_case.examples)
    part = secateur.attribute(model, t5_case.task, t5_case.examples, select="decoder.ffn")
    assert part.tokens == whole.tokens
    assert part.tokens["decoder"] < part.tokens["encoder"]
