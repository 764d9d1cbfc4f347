"""Criteria: their scores equal their formulas as slow loops, ignore padding and batches, and depend on seeds as they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
import torch
from cases import ALL, CASES, CLASSES, LABELS, Case, unit_argument
from comparing import error, reduce
from naive import Gated
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.attribution.criteria import (
    PRESETS,
    Criterion,
    Fluctuation,
    GradientActivation,
    MeanActivation,
    RandomScores,
    RandomTargets,
    Wanda,
    WeightMagnitude,
    criterion_named,
    summary,
)
from secateur.attribution.criteria.random_targets import wrong_labels

UNITS = ("head", "channel")
CHEAP = [name for name in PRESETS if not name.startswith("ig")]
FORWARD: list[Criterion] = [MeanActivation(), Wanda(), Fluctuation()]
Formula = Callable[[nn.Module, list[Gated], list[Tensor], int], Tensor]


def name_of(criterion: Criterion) -> str:
    return type(criterion).__name__


def out_projections(case: Case, model: nn.Module, unit: str) -> dict[str, list[Gated]]:
    """Return the places at which an out-projection reads each unit, at hand-written paths; for Q/K channels, Q and K."""
    channels, heads = naive.gates(case, model, "channel"), naive.gates(case, model, "head")
    if unit == "channel":
        return channels
    places = {}
    for site, (place,) in heads.items():
        places[site] = [place]
        if f"{site}.vo" in channels and place.side == "output":
            (output,) = channels[f"{site}.vo"]
            width = int((place.unit_of_channel == 0).sum())
            places[site] = [Gated(output.path, "input", output.unit_of_channel // width)]
    return places


def gates(case: Case, model: nn.Module, unit: str) -> dict[str, list[Gated]]:
    """Return the places of the units' gates: those of V channels are at the output of the projection to V."""
    places = out_projections(case, model, unit)
    if unit == "channel":
        for site, (place,) in naive.gates(case, model, "head").items():
            if f"{site}.vo" in places:
                own = place.unit_of_channel != naive.NONE
                path, count = place.path, int(own.sum())
                if place.side == "input":  # Query heads are units: they share the values of one head.
                    path, count = path.replace("o_proj", "v_proj"), model.config.head_dim  # type: ignore[union-attr, assignment]
                    own = torch.ones(count, dtype=torch.bool)
                units = torch.full_like(own, naive.NONE, dtype=torch.int64)
                units[own] = torch.arange(count)
                places[f"{site}.vo"] = [Gated(path, "output", units)]
    return places


def weight_at(model: nn.Module, place: Gated) -> Tensor:
    """Return the weight of the linear layer at a place [outputs, inputs]."""
    module = model.get_submodule(place.path)
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def activations(case: Case, model: nn.Module, places: list[Gated], examples: Any) -> list[Tensor]:
    """Return the activations at each place for all tokens of all examples [tokens, channels]. Examples run one at a time."""
    by_place: list[list[Tensor]] = [[] for _ in places]
    for example in examples:
        handles = []
        for place, tokens in zip(places, by_place, strict=True):
            module = model.get_submodule(place.path)
            if place.side == "input":
                handles.append(module.register_forward_pre_hook(lambda m, a, tokens=tokens: tokens.append(a[0].flatten(0, -2))))
            else:
                handles.append(module.register_forward_hook(lambda m, a, out, tokens=tokens: tokens.append(out.flatten(0, -2))))
        with torch.no_grad():
            naive.alone(case, model, example)
        for handle in handles:
            handle.remove()
    return [torch.cat(tokens).double() for tokens in by_place]


def mean_activation(model: nn.Module, places: list[Gated], inputs: list[Tensor], unit: int) -> Tensor:
    """Return one unit's score by MeanActivation, from the activations [tokens, channels] at its places."""
    of_unit = [x[:, place.unit_of_channel == unit] for place, x in zip(places, inputs, strict=True)]
    return torch.stack([x.abs().mean() for x in of_unit]).sum()


def wanda(model: nn.Module, places: list[Gated], inputs: list[Tensor], unit: int) -> Tensor:
    """Return one unit's score by Wanda, from the activations [tokens, channels] at its places."""
    if len(places) == 2:
        of_unit = [x[:, place.unit_of_channel == unit] for place, x in zip(places, inputs, strict=True)]
        product: Tensor = of_unit[0].norm() * of_unit[1].norm()
        return product
    (place,), (x,) = places, inputs
    weight = weight_at(model, place)
    channels = (place.unit_of_channel == unit).nonzero().flatten().tolist()
    return torch.stack([x[:, c].norm() * weight[:, c].abs().sum() for c in channels]).sum()


def fluctuation(model: nn.Module, places: list[Gated], inputs: list[Tensor], unit: int) -> Tensor:
    """Return one unit's score by Fluctuation, from the activations [tokens, channels] at its places."""
    if len(places) == 2:
        q, k = (x[:, place.unit_of_channel == unit] for place, x in zip(places, inputs, strict=True))
        q_square, k_square = q.square().mean(0).sum(), k.square().mean(0).sum()
        return q.var(0).sum() * k_square + k.var(0).sum() * q_square
    (place,), (x,) = places, inputs
    weight = weight_at(model, place)
    channels = (place.unit_of_channel == unit).nonzero().flatten().tolist()
    return torch.stack([x[:, c].var() * weight[:, c].norm() ** 2 for c in channels]).sum()


FORMULAS: list[tuple[Criterion, Formula, Any]] = [
    (MeanActivation(), mean_activation, gates),
    (Wanda(), wanda, out_projections),
    (Fluctuation(), fluctuation, out_projections),
]


def expected(case: Case, unit: str, formula: Formula, places_of: Any, examples: Any) -> dict[str, Tensor]:
    """Return the scores [units] of each site by a formula."""
    model, scores = case.model(torch.float64), {}
    for site, places in places_of(case, model, unit).items():
        inputs, count = activations(case, model, places, examples), int(places[0].unit_of_channel.max()) + 1
        scores[site] = torch.stack([formula(model, places, inputs, number) for number in range(count)])
    return scores


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize(("criterion", "formula", "places_of"), FORMULAS, ids=[name_of(f[0]) for f in FORMULAS])
def test_forward_criteria_equal_naive(case: Case, unit: str, criterion: Criterion, formula: Formula, places_of: Any) -> None:
    naively = expected(case, unit, formula, places_of, case.examples)
    actual = secateur.attribute(
        case.model(), case.task, case.examples, criterion=criterion, unit=unit_argument(unit), max_tokens=60
    )
    assert error(actual, naively, naively) < 1e-4
    assert all(scores.dtype == torch.float64 for scores in actual.values())


@pytest.mark.parametrize("case", [CASES["t5-gated"], CASES["llama"]], ids=str)
@pytest.mark.parametrize(("criterion", "formula", "places_of"), FORMULAS, ids=[name_of(f[0]) for f in FORMULAS])
def test_an_example_has_the_scores_that_it_has_alone(
    case: Case, criterion: Criterion, formula: Formula, places_of: Any
) -> None:
    actual = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion, unit="channel", per_example=True)
    assert actual.per_example is not None
    for number in (0, 3):
        alone = expected(case, "channel", formula, places_of, case.examples[number : number + 1])
        alone = {site: scores.nan_to_num(0.0) for site, scores in alone.items()}  # The sample variance of one token is 0 / 0.
        assert error({site: rows[number].double() for site, rows in actual.per_example.items()}, alone, alone) < 1e-4


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_magnitude_is_that_of_the_weights_that_pruning_removes(case: Case, unit: str) -> None:
    def magnitude(model: nn.Module) -> float:
        linears = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        return sum(float(m.weight.detach().abs().sum()) for m in linears)

    model = case.model(torch.float64)
    actual = secateur.attribute(model, case.task, case.examples[:2], criterion=WeightMagnitude(), unit=unit_argument(unit))
    for site in actual.sites:
        kept = torch.cat([torch.arange(1), torch.arange(2, site.units)])
        pruned = secateur.prune(model, secateur.Plan({site.name: kept}, (site,), actual.fingerprint))
        assert float(actual[site.name][1]) == pytest.approx(magnitude(model) - magnitude(pruned), rel=1e-9), site.name


def wrong(labels: list[int], classes: int, seed: int, row: int) -> list[int]:
    """Draw a class other than the label at each position."""
    drawn = np.random.default_rng((seed, row)).integers(classes - 1, size=len(labels)).tolist()
    return [[c for c in range(classes) if c != label][k] for label, k in zip(labels, drawn, strict=True)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_random_targets_equal_naive(case: Case, unit: str) -> None:
    model = case.model(torch.float64)
    places = naive.gates(case, model, unit)
    gradients: dict[str, list[Tensor]] = {site: [] for site in places}
    for row, example in enumerate(case.examples):
        ones = {
            site: torch.ones(count, dtype=torch.float64, requires_grad=True) for site, count in naive.counts(places).items()
        }
        with naive.gated(model, places, ones):
            logits, gold = naive.alone(case, model, example)
            value = naive.value(logits, wrong(gold, logits.shape[-1], 3, row), "probability")
        for site, gradient in zip(ones, torch.autograd.grad(value, list(ones.values()), allow_unused=True), strict=True):
            gradients[site].append(torch.zeros_like(ones[site]) if gradient is None else gradient)
    rows = {site: torch.stack(of_site) for site, of_site in gradients.items()}
    actual = secateur.attribute(
        case.model(), case.task, case.examples, criterion=RandomTargets(seed=3), unit=unit_argument(unit), max_tokens=60
    )
    assert error(actual, *reduce(rows, "signed")) < 1e-4


@pytest.mark.parametrize("case", ALL, ids=str)
def test_random_targets_are_never_the_label_and_depend_on_no_batch(case: Case) -> None:
    model, classes = case.model(), 5
    drawn: dict[int, set[tuple[int, ...]]] = {}
    for max_tokens in (1, 60, 100_000):
        for batch in case.batches(model, max_tokens):
            before = batch.labels.clone()
            batch.labels.clamp_(max=classes - 1)
            wrong_classes = wrong_labels(batch, classes, 0)
            real = before != -100
            assert torch.equal(wrong_classes != -100, real)
            assert not bool((wrong_classes == batch.labels)[real].any())
            assert int(wrong_classes.max()) < classes
            for row, labels in zip(batch.rows, wrong_classes, strict=True):
                drawn.setdefault(row, set()).add(tuple(labels[labels != -100].tolist()))
    assert all(len(of_row) == 1 for of_row in drawn.values())
    assert len(set.union(*drawn.values())) > 1


def test_random_targets_are_uniform() -> None:
    batch = CASES["bert-sequence"].batches(CASES["bert-sequence"].model(), 100_000)[0]
    counts = torch.zeros(4)
    for seed in range(2000):
        wrong_classes = wrong_labels(batch, 4, seed)[batch.labels == 1]
        counts += torch.bincount(wrong_classes, minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] / counts.sum()).sub(1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("criterion", [RandomTargets, RandomScores])
def test_a_seed_makes_the_scores(criterion: Any, t5_case: Case) -> None:
    def scores(**settings: int) -> secateur.Scores:
        return secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, criterion=criterion(**settings))

    assert scores().equal(scores(seed=0))
    assert not any(torch.equal(first, second) for first, second in zip(scores().values(), scores(seed=1).values(), strict=True))


def test_random_scores_are_uniform_and_depend_on_the_site(t5_case: Case) -> None:
    whole, part = (
        secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, criterion=RandomScores(), unit="channel", select=s)
        for s in (None, "decoder.ffn")
    )
    assert all(torch.equal(scores, whole[site]) for site, scores in part.items())
    all_scores = torch.cat(list(whole.values()))
    assert len(all_scores.unique()) == len(all_scores)  # type: ignore[no-untyped-call]
    assert 0 <= float(all_scores.min()) < float(all_scores.max()) < 1
    assert float(all_scores.mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_padding_does_not_count(case: Case, name: str) -> None:
    """An example alone has no padding, neither in its input nor in a decoder's target."""
    if isinstance(case.task, secateur.TokenClassification) and name == "ap-unsupervised":
        pytest.skip("tags have no candidate labels")
    model, criterion = case.model(), criterion_named(name)
    alone, together = (
        secateur.attribute(model, case.task, case.examples, criterion=criterion, unit="channel", max_tokens=tokens)
        for tokens in (1, 100_000)
    )
    assert error(together, alone, alone) < 1e-4


@pytest.mark.parametrize(
    ("criterion", "forwards"),
    [*[(c, 1) for c in FORWARD], (RandomScores(), 0), (WeightMagnitude(), 0)],
    ids=lambda value: name_of(value) if isinstance(value, Criterion) else str(value),
)
def test_criteria_take_no_more_passes_than_they_need(criterion: Criterion, forwards: int, t5_case: Case) -> None:
    model, needs_gradient = t5_case.model(), []
    model.register_forward_hook(lambda module, arguments, output: needs_gradient.append(output.logits.requires_grad))
    secateur.attribute(model, t5_case.task, t5_case.examples, criterion=criterion, max_tokens=60)
    assert needs_gradient == [False] * forwards * len(t5_case.batches(model, 60))


@pytest.mark.parametrize("name", ["rap", "fisher"])
@pytest.mark.parametrize(
    ("case", "labels"),
    [(CASES["t5-gated"], LABELS), (CASES["bert-sequence"], CLASSES), (CASES["llama"], LABELS)],
    ids=["t5-gated", "bert-sequence", "llama"],
)
def test_all_labels_equal_the_labels_one_by_one(case: Case, labels: list[str], name: str) -> None:
    inputs = [
        {"input": case.examples[0]["input"]}
    ]  # One example: a data set whose examples share one label is refused, and RAP draws by the row.
    actual = secateur.attribute(case.model(), case.task, inputs, criterion=criterion_named(f"{name}:labels=all"))
    criterion = criterion_named(name)
    by_label = [
        secateur.attribute(case.model(), case.task, [{**inputs[0], "target": label}], criterion=criterion) for label in labels
    ]
    total = {site: torch.stack([scores[site] for scores in by_label]).sum(0) for site in actual}
    scale = {site: torch.stack([scores[site] for scores in by_label]).abs().sum(0) for site in actual}
    assert error(actual, total, scale) < 1e-4


def test_fisher_is_the_squared_gradient(t5_case: Case) -> None:
    assert criterion_named("fisher") == GradientActivation(target="log_probability", over_examples="squared")


@pytest.mark.parametrize("name", PRESETS)
def test_every_criterion_has_a_summary_and_takes_its_settings(name: str) -> None:
    assert summary(name).endswith(".")
    assert len(summary(name)) < 120
    settings = criterion_named(name).to_json()
    assert settings.pop("criterion") == type(criterion_named(name)).__name__
    text = ",".join(f"{key}={value}" for key, value in settings.items())
    assert criterion_named(f"{name}:{text}" if text else name) == criterion_named(name)
