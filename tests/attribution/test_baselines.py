"""The peers under bench/: they meet the budget, their stages follow their equations, and the dense model stays whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from bench.rivals import flap as flap_
from bench.rivals import kwon as kwon_
from bench.rivals import optimal_brain_surgeon as surgeon
from bench.support import budgeted
from cases import CASES, Case
from torch import nn

import secateur
from secateur.attribution.criteria import GradientActivation
from secateur.model.discovery import branches_of
from secateur.model.sites import Site

BOTH = [CASES["t5-gated"], CASES["bert-sequence"]]


@pytest.fixture(params=BOTH, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    parameter: Case = request.param
    return parameter


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_budgets_are_met_and_the_dense_model_is_left_alone(case: Case, share: float) -> None:
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = kwon_.gate_gradients(model, case.task, case.examples)
    for pruned in (
        kwon_.kwon(model, case.task, case.examples, share, scores=scores),
        flap_.flap(model, case.task, case.examples, share),
        surgeon.ziplm(model, case.task, case.examples, share, steps=5),
        surgeon.tyr(model, case.task, case.examples, share),
    ):
        left = budgeted.layer_flops(pruned, scores.tokens) / budgeted.layer_flops(model, scores.tokens)
        assert 0.8 * share < left <= share
        secateur.evaluate(pruned, case.task, case.examples)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_built_flops_are_those_of_the_cost_model(case: Case) -> None:
    model = case.model()
    scores = secateur.attribute(model, case.task, case.examples)
    plan = secateur.plan(scores, keep=0.5)
    dense = budgeted.layer_flops(model, scores.tokens)
    assert dense == pytest.approx(budgeted.all_flops(scores), rel=1e-9)
    left = budgeted.layer_flops(secateur.prune(model, plan), scores.tokens) / dense
    assert left == pytest.approx(plan.budget_json()["remaining"]["flops"], rel=1e-9)


def test_squared_gate_gradients_are_the_fisher_criterion(case: Case) -> None:
    model = case.model()
    gradients = kwon_.gate_gradients(model, case.task, case.examples).per_example
    fisher = secateur.attribute(model, case.task, case.examples, criterion=GradientActivation.fisher())
    assert gradients is not None
    for name, values in fisher.items():
        torch.testing.assert_close(gradients[name].double().square().sum(0), values, rtol=1e-5, atol=0)


def test_the_search_removes_the_least_information_of_all_plans() -> None:
    """In BERT, units of a kind cost the same. So the best plan is the best of all numbers of heads and filters."""
    case = CASES["bert-sequence"]
    model = case.model()
    scores = kwon_.gate_gradients(model, case.task, case.examples)
    kept = kwon_.searched(scores, 0.6)
    information = {site: kwon_._gradients(scores, site).square().mean(0) for site in scores.sites}
    pinned = {site: int(values.argmax()) for site, values in information.items()}
    rest: dict[str, list[float]] = {"self_attention": [], "ffn": []}
    for site, values in information.items():
        rest[site.kind] += [value for unit, value in enumerate(values.tolist()) if unit != pinned[site]]
    cost = {site.kind: budgeted.unit_flops(site, scores) for site in scores.sites}
    budget = 0.6 * budgeted.all_flops(scores) - sum(budgeted.unit_flops(site, scores) for site in scores.sites)
    ordered = {kind: sorted(values, reverse=True) for kind, values in rest.items()}
    best = max(
        sum(ordered["self_attention"][:heads]) + sum(ordered["ffn"][:filters])
        for heads, filters in itertools.product(range(len(rest["self_attention"]) + 1), range(len(rest["ffn"]) + 1))
        if heads * cost["self_attention"] + filters * cost["ffn"] <= budget
    )
    kept_information = sum(float(values[kept[site]].sum()) for site, values in information.items())
    assert kept_information == pytest.approx(
        best + sum(float(information[site][unit]) for site, unit in pinned.items()), rel=1e-9
    )


def test_rearranging_lowers_the_quadratic_form_and_leaves_no_better_exchange() -> None:
    gradients = torch.randn(30, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    start = torch.arange(5)
    rearranged = kwon_.rearranged(gradients, start)

    def loss(kept: torch.Tensor) -> float:
        removed = torch.ones(12, dtype=torch.float64)
        removed[kept] = 0
        return float((gradients @ removed).square().sum())

    assert len(rearranged) == 5
    assert loss(rearranged) < loss(start)
    for removed_unit, unit in itertools.product(rearranged.tolist(), set(range(12)) - set(rearranged.tolist())):
        exchanged = torch.tensor([*(kept for kept in rearranged.tolist() if kept != removed_unit), unit])
        assert loss(exchanged) >= loss(rearranged) - 1e-9


def test_tuning_brings_the_streams_closer_layer_after_layer(case: Case) -> None:
    model = case.model()
    pruned = kwon_.kwon(model, case.task, case.examples, 0.7, stage="rearrangement")
    batches = list(case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000))

    def error(name: str) -> float:
        with torch.no_grad():
            streams = [kwon_._streams(either.eval(), case.task, batches)[name] for either in (model, pruned)]
        real = [batch.real(target=name.startswith("decoder")) for batch in batches]
        return sum(float((a - b)[r].square().sum()) for a, b, r in zip(*streams, real, strict=True))

    first, before = next((site.name, error(site.name)) for site in secateur.sites(pruned) if error(site.name) > 0)
    assert kwon_.tune_(pruned, model, case.task, case.examples) > 0
    assert error(first) < before


def test_compensation_keeps_the_mean_of_a_branch() -> None:
    """After one site is cut, the mean of its output over the examples' tokens equals the dense model's."""
    case = CASES["t5-gated"]
    model = case.model()
    site = secateur.sites(model, select="encoder.ffn.0")[0]
    scores = secateur.attribute(model, case.task, case.examples)
    plan = budgeted.plan_of(scores, {site: torch.arange(3)}, None)
    pruned = secateur.prune(model, plan)
    flap_._compensate_(pruned, model, case.task, case.examples, plan)
    means = []
    for either in (model, pruned):
        outputs: list[torch.Tensor] = []
        path = branches_of(model, [site])[site].output
        linear = either.get_submodule(path)
        handle = linear.register_forward_hook(lambda m, a, output, outputs=outputs: outputs.append(output))
        (batch,) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000)
        with torch.no_grad():
            case.task.logits(either.eval(), batch)
        handle.remove()
        means.append(outputs[0][batch.real(target=False)].mean(0))
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="stage"):
        kwon_.kwon(nn.Identity(), None, [], 0.5, stage="prayer")  # type: ignore[arg-type]


def test_the_surgeon_s_errors_are_those_of_its_weights_and_its_first_removal_is_the_best(case: Case) -> None:
    levels_of_site = surgeon.measured(case.model(torch.float64), case.task, case.examples)
    for site, levels in levels_of_site.items():

        def error(weight: torch.Tensor, levels: surgeon.Levels = levels) -> float:
            missing = levels.weight - weight
            lost, whole = (((w @ levels.hessian) * w).sum() for w in (missing, levels.weight))
            return float((lost / whole).sqrt())

        for count in levels.counts:
            assert levels.errors[count] == pytest.approx(error(levels.updated(count)), rel=1e-6, abs=1e-7)
        assert levels.errors == sorted(levels.errors, reverse=True)
        first = levels.order[0]
        others = []
        for unit in range(site.units):
            levels.order[0] = unit
            others.append(error(levels.updated(site.units - 1)))
        assert others[first] == min(others)


def test_the_programme_of_ziplm_finds_the_best_levels(case: Case) -> None:
    model = case.model()
    search = surgeon._Search(model, case.task, case.examples, 0.5)
    search.levels = dict(itertools.islice(search.levels.items(), 3))
    search.budget = 0.5 * sum(search.cost[site] * site.units for site in search.levels)
    factors = {site: 1.0 + number for number, site in enumerate(search.levels)}

    def lost(choice: dict[Site, int]) -> float:
        return sum(factors[site] * search.levels[site].errors[count] ** 2 for site, count in choice.items())

    counts = [levels.counts for levels in search.levels.values()]
    choices = [dict(zip(search.levels, choice, strict=True)) for choice in itertools.product(*counts)]
    # The programme rounds each site's cost up to a two-thousandth of the budget.
    narrow = 0.997 * search.budget
    found = surgeon._programme(search, factors)
    assert search.spent(found) <= search.budget
    assert lost(found) <= min(lost(choice) for choice in choices if search.spent(choice) <= narrow)
