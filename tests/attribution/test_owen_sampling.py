"""Owen sampling: gradients at the drawn gates equal slow loops, its mean is the integral, and that is near Shapley values."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import naive
import pytest
import torch
from cases import ALL, CASES, Case, unit_argument
from comparing import error, reduce
from torch import Tensor

import secateur
from secateur.attribution.criteria import OwenSampling
from secateur.support.errors import InputError

UNITS = ("head", "channel")


def gradients_at(case: Case, model: Any, places: Any, row: int, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return dF/dc of one example, where c are the gates [units] by site. It runs without a batch and without padding."""
    leaves = {site: values.double().requires_grad_(True) for site, values in gates.items()}
    with naive.gated(model, places, leaves):
        logits, gold = naive.alone(case, model, case.examples[row])
        value = naive.value(logits, gold, "log_probability")
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        site: torch.zeros_like(leaf) if gradient is None else gradient
        for (site, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def query_places(case: Case, model: Any, unit: str) -> dict[str, list[naive.Gated]]:
    """Return the places of the gates. Those of Q/K channels are at the queries alone."""
    return {site: places[:1] for site, places in naive.gates(case, model, unit).items()}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_scores_are_gradients_at_the_drawn_gates(case: Case, unit: str) -> None:
    model, criterion = case.model(torch.float64), OwenSampling(samples=2, seed=5)
    places = query_places(case, model, unit)
    actual = secateur.attribute(
        case.model(), case.task, case.examples, criterion=criterion, unit=unit_argument(unit), max_tokens=60
    )
    widths = [site.units for site in actual.sites]
    rows: dict[str, list[Tensor]] = {site: [] for site in actual}
    for row in range(len(case.examples)):
        samples: list[dict[str, Tensor]] = []
        for sample in range(2):
            drawn = torch.split(criterion.open_gates(sum(widths), row, sample), widths)
            samples.append(gradients_at(case, model, places, row, dict(zip(actual, drawn, strict=True))))
        for site, of_site in rows.items():
            of_site.append((samples[0][site] + samples[1][site]) / 2)
    by_site = {site: torch.stack(of_site) for site, of_site in rows.items()}  # [examples, units]
    assert error(actual, *reduce(by_site, "absolute")) < 1e-4
    assert actual.standard_errors is not None
    terms = {site: of_site.abs() for site, of_site in by_site.items()}
    expected = {site: of_site.std(0) * math.sqrt(len(of_site)) for site, of_site in terms.items()}
    assert error(actual.standard_errors, expected, reduce(by_site, "absolute")[0]) < 1e-4


def test_draws_are_shares_of_open_gates_in_antithetic_pairs() -> None:
    criterion, units = OwenSampling(lowest=0.2, seed=1), 4001
    shares = torch.tensor([float(criterion.open_gates(units, row, 0).double().mean()) for row in range(400)])
    assert 0.2 - 0.03 < float(shares.min()) < 0.22
    assert 0.98 < float(shares.max()) <= 1
    counts = torch.histc(shares.clamp(min=0.2), 8, 0.2, 1.0)  # Independent draws have a standard deviation of 6.6 in each part.
    assert (counts - 50).abs().max() <= 3  # The shares themselves differ by 1 at most.
    first, second = (criterion.open_gates(units, row, 0) for row in (10, 11))
    closed_in_both = (~first & ~second).double().mean()
    expected = max(0.0, 1 - float(shares[10]) - float(shares[11]))  # Independent gates would both be closed more often.
    assert float(closed_in_both) == pytest.approx(expected, abs=0.01)
    several = OwenSampling(lowest=0.2, seed=1, samples=4)
    assert torch.equal(several.open_gates(units, 3, 2), criterion.open_gates(units, 14, 0))
    assert not torch.equal(OwenSampling(lowest=0.2, seed=2).open_gates(units, 10, 0), first)


def tiny_case() -> tuple[Case, str]:
    return CASES["t5-gated"], "encoder.0.self_attention,decoder.1.self_attention"


def integral(case: Case, model: Any, places: Any, row: int, lowest: float) -> Tensor:
    """Return the integral over shares in lowest ... 1 of the expected gradients, over all 2^n settings of the gates [n]."""
    widths = list(naive.counts(places).values())
    n = sum(widths)
    total = torch.zeros(n, dtype=torch.float64)
    shares = torch.linspace(lowest, 1, 2001, dtype=torch.float64)
    for gates in itertools.product((False, True), repeat=n):
        opened = sum(gates)
        density = shares.pow(opened) * (1 - shares).pow(n - opened)
        weight = float(torch.trapezoid(density, shares)) / (1 - lowest)
        of_sites = dict(zip(places, torch.split(torch.tensor(gates), widths), strict=True))
        total += weight * torch.cat(list(gradients_at(case, model, places, row, of_sites).values()))
    return total


@pytest.mark.parametrize("lowest", [0.0, 0.3])
def test_the_mean_of_many_samples_is_the_integral(lowest: float) -> None:
    case, select = tiny_case()
    model = case.model(torch.float64)
    criterion = OwenSampling(lowest=lowest, samples=400, over_examples="signed")
    scores = secateur.attribute(model, case.task, case.examples, criterion=criterion, select=select, per_example=True)
    assert scores.per_example is not None
    places = {site: of_site for site, of_site in query_places(case, model, "head").items() if site in scores}
    for row in range(2):
        exact = integral(case, model, places, row, lowest)
        actual = torch.cat([of_site[row].double() for of_site in scores.per_example.values()])
        assert float((actual - exact).abs().max()) < 0.05 * float(exact.abs().max())


def shapley(value: Any, n: int) -> Tensor:
    """Return the Shapley values [n] of a game by enumeration."""
    values = {gates: value(gates) for gates in itertools.product((False, True), repeat=n)}
    result = torch.zeros(n, dtype=torch.float64)
    for gates, without in values.items():
        for i in range(n):
            if not gates[i]:
                opened = sum(gates)
                weight = math.factorial(opened) * math.factorial(n - opened - 1) / math.factorial(n)
                result[i] += weight * (values[(*gates[:i], True, *gates[i + 1 :])] - without)
    return result


def game(case: Case, model: Any, places: Any, gates: tuple[bool, ...], row: int) -> float:
    """Return F of one example with some gates closed."""
    widths = list(naive.counts(places).values())
    of_sites = torch.split(torch.tensor(gates, dtype=torch.float64), widths)
    with naive.gated(model, places, dict(zip(places, of_sites, strict=True))), torch.no_grad():
        logits, gold = naive.alone(case, model, case.examples[row])
        return float(naive.value(logits, gold, "log_probability"))


def test_scores_are_nearer_to_shapley_values_than_gradients_are() -> None:
    case, select = tiny_case()
    model = case.model(torch.float64)
    options: dict[str, Any] = {"select": select, "per_example": True}
    owen, gradient = (
        secateur.attribute(model, case.task, case.examples, criterion=criterion, **options)
        for criterion in (OwenSampling(lowest=0, samples=200, over_examples="signed"), "gradient:over_examples=signed")
    )
    assert owen.per_example is not None
    assert gradient.per_example is not None
    places = {site: of_site for site, of_site in query_places(case, model, "head").items() if site in owen}
    errors = {"owen": 0.0, "gradient": 0.0}
    for row in range(len(case.examples)):
        exact = shapley(partial(game, case, model, places, row=row), sum(naive.counts(places).values()))
        for name, scores in (("owen", owen.per_example), ("gradient", gradient.per_example)):
            errors[name] += float((torch.cat([of_site[row].double() for of_site in scores.values()]) - exact).abs().sum())
    assert errors["owen"] < errors["gradient"]


def test_standard_errors_are_saved(tmp_path: Any, t5_case: Case) -> None:
    scores = secateur.attribute(t5_case.model(), t5_case.task, t5_case.examples, criterion="owen")
    scores.save(tmp_path / "scores.safetensors")
    assert secateur.Scores.load(tmp_path / "scores.safetensors") == scores
    assert scores.standard_errors is not None
    assert scores.of("decoder.ffn").standard_errors is not None
    assert set(scores.of("decoder.ffn").standard_errors or {}) == set(scores.of("decoder.ffn"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowest": 1}, "lowest: expected a share of at least 0 and below 1, got 1"),
        ({"lowest": float("nan")}, "lowest: expected a share of at least 0 and below 1, got nan"),
        ({"samples": 0}, "samples: expected"),
        ({"seed": -1}, "seed: expected a number of at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        OwenSampling(**settings)
    assert str(caught.value).startswith(message)
