"""Scores of whole layers: they equal loops over single examples, and integrals equal their definition."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import naive
import numpy as np
import pytest
import torch
from cases import ALL, CASES, Case
from comparing import relative
from hand_layers import by_hand, places
from torch import Tensor, nn
from undisturbed import assert_undisturbed, lived_in

import secateur
from secateur.attribution.layer_scores import LAYER_CRITERIA, choose_layers, closing_effects, joint_gradients, layer_scores
from secateur.model.blocks import blocks, layers
from secateur.model.undisturbed import undisturbed
from secateur.pruning.delete_layers import delete_layers

PANELS = 24
every_case = pytest.mark.parametrize("case", ALL, ids=str)


def values(case: Case, model: nn.Module, gates: dict[str, Any]) -> list[Tensor]:
    """Return F of each example alone, with hand-written gates."""
    with by_hand(case, model, gates):
        return [naive.value(*naive.alone(case, model, example), "log_probability") for example in case.examples]


def slopes(case: Case, model: nn.Module, names: list[str], at: dict[str, float]) -> dict[str, list[float]]:
    """Return dF/dz of each example alone, by layer."""
    leaves = {name: torch.tensor(at[name], dtype=torch.float64, requires_grad=True) for name in names}
    by_layer: dict[str, list[float]] = {name: [] for name in names}
    for value in values(case, model, leaves):
        for name, gradient in zip(names, torch.autograd.grad(value, list(leaves.values()), retain_graph=True), strict=True):
            by_layer[name].append(float(gradient))
    return by_layer


def batch_of(case: Case, model: nn.Module) -> Any:
    """Return one batch of all examples, in order."""
    items = case.task.items(model, case.examples)
    return case.task.collate(items, torch.device("cpu"))


@every_case
def test_block_influence_is_the_naive_one(case: Case) -> None:
    model = case.model(torch.float64)
    sums: dict[str, list[float]] = {}

    def add(name: str, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        for x, y in zip(before[0], after[0], strict=True):
            sums.setdefault(name, []).append(1 - float((x @ y) / (x.norm() * y.norm())))

    paths = {name: places(case, branch)[1] for branch in layers(model, "branch") for name in [branch.rpartition(".")[0]]}
    for name, path in paths.items():
        model.get_submodule(path).register_forward_hook(partial(add, name), with_kwargs=True)
    with torch.no_grad():
        for example in case.examples:
            naive.alone(case, model, example)
    expected = {name: sum(of_layer) / len(of_layer) for name, of_layer in sums.items()}
    actual = layer_scores(case.model(torch.float64), case.task, case.examples, "influence", max_tokens=60)
    assert list(actual) == list(blocks(model))
    assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unit", ["block", "branch"])
@every_case
def test_gradient_scores_are_the_naive_ones(case: Case, unit: Any) -> None:
    model = case.model(torch.float64)
    names = list(layers(model, unit))
    by_example = slopes(case, model, names, dict.fromkeys(names, 1.0))
    expected = {name: sum(map(abs, of_layer)) / len(of_layer) for name, of_layer in by_example.items()}
    actual = layer_scores(model, case.task, case.examples, "gradient", unit=unit, max_tokens=60)
    assert list(actual) == names
    assert actual == pytest.approx(expected, rel=1e-4 if case.name == "gemma3" else 1e-7)


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bert-token", "llama", "gemma3"])
def test_integrated_gradients_are_the_integrals_of_the_derivative(name: str) -> None:
    """The integral of dF/dz is taken by hand, with a gate z of each example: a Gauss rule on many panels. The panels are narrow
    near 0, where norms make the derivative change fast."""
    case = CASES[name]
    model = case.model(torch.float64)
    names, batch = list(layers(model)), batch_of(case, model)
    with undisturbed(model):
        actual = closing_effects(model, case.task, layers(model), batch, "log_probability")
        for layer in (names[0], names[-1]):
            integral = torch.zeros(len(case.examples), dtype=torch.float64)
            nodes, weights = np.polynomial.legendre.leggauss(5)
            for low, high in pairwise((np.linspace(0, 1, PANELS + 1) ** 3).tolist()):
                for node, weight in zip(nodes, weights, strict=True):
                    at = low + (high - low) * (node + 1) / 2
                    z = torch.full((len(case.examples), 1, 1), at, dtype=torch.float64, requires_grad=True)
                    with by_hand(case, model, {layer: z}):
                        value = case.task.target(model, batch, "log_probability")
                    (slope,) = torch.autograd.grad(value.sum(), z)
                    integral += weight / 2 * (high - low) * slope.flatten()
            assert relative(actual[layer], integral) < 1e-3, layer
    scores = layer_scores(model, case.task, case.examples, "ig", max_tokens=60)
    assert scores == pytest.approx({layer: float(effects.abs().mean()) for layer, effects in actual.items()}, rel=1e-5)


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama"])
def test_joint_gradients_are_complete(name: str, unit: Any) -> None:
    """Their sum over the layers is F(1) - F(0), and a finer rule comes closer to it."""
    case = CASES[name]
    model = case.model(torch.float64)
    names = list(layers(model, unit))
    closed = values(case, model, dict.fromkeys(names, 0.0))
    change = torch.stack(values(case, model, {})).detach() - torch.stack(closed).detach()
    errors = []
    with undisturbed(model):
        for nodes in (4, 64):
            batch = batch_of(case, model)
            joint = joint_gradients(model, case.task, layers(model, unit), batch, "log_probability", nodes=nodes)
            errors.append(relative(torch.stack(list(joint.values())).sum(0), change))
    assert errors[1] < 2e-3
    assert errors[1] < errors[0]


def test_joint_gradients_differ_from_single_effects() -> None:
    """A layer's share when all gates open together differs from its effect when all other gates are open already."""
    case = CASES["llama"]
    model = case.model(torch.float64)
    own, joint = (layer_scores(model, case.task, case.examples, criterion) for criterion in ("ig", "ig-joint"))
    assert list(own) == list(joint) == ["decoder.0", "decoder.1"]
    assert own != pytest.approx(joint, rel=0.05)


def test_a_layer_that_adds_nothing_scores_nothing() -> None:
    case = CASES["llama"]
    model: Any = case.model()
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for criterion in LAYER_CRITERIA:
        scores = layer_scores(model, case.task, case.examples, criterion)
        assert abs(scores["decoder.1"]) < 1e-6 < scores["decoder.0"], criterion
        assert choose_layers(scores, 1) == ["decoder.1"]


@pytest.mark.parametrize("criterion", LAYER_CRITERIA)
@every_case
def test_the_model_is_left_as_it_was(case: Case, criterion: str) -> None:
    model = lived_in(case)
    assert_undisturbed(model, lambda: layer_scores(model, case.task, case.examples, criterion, nodes=2))


@pytest.mark.parametrize("criterion", LAYER_CRITERIA)
def test_the_model_is_left_as_it_was_after_an_exception(criterion: str) -> None:
    case = CASES["t5-relu"]
    model = lived_in(case)
    model.get_submodule("lm_head").register_forward_hook(lambda *_: 1 / 0)

    def call() -> None:
        with pytest.raises(ZeroDivisionError):
            layer_scores(model, case.task, case.examples, criterion)

    assert_undisturbed(model, call)


def test_the_lowest_layers_are_deleted_but_each_stack_keeps_its_best() -> None:
    scores = {"encoder.0": 0.1, "encoder.1": 0.2, "decoder.0": 5.0, "decoder.1": 3.0, "decoder.2": 3.0}
    assert choose_layers(scores, 5) == []
    assert choose_layers(scores, 4) == ["encoder.0"]
    assert choose_layers(scores, 3) == ["encoder.0", "decoder.1"]
    assert choose_layers(scores, 2) == ["encoder.0", "decoder.1", "decoder.2"]
    for wrong in (1, 6, True, 2.0):
        with pytest.raises(
            secateur.InputError, match="keep_layers: expected a number from 2, one for each stack, to the model's 5"
        ):
            choose_layers(scores, wrong)  # type: ignore[arg-type]


def test_scores_of_a_model_that_has_lost_layers() -> None:
    """Deleted blocks and emptied branches have no scores."""
    case = CASES["t5-relu"]
    model = delete_layers(case.model(), ["encoder.0", "encoder.2", "decoder.0.cross_attention"])
    for criterion in LAYER_CRITERIA:
        assert list(layer_scores(model, case.task, case.examples, criterion)) == ["encoder.1", "decoder.0", "decoder.1"]
    without = delete_layers(model, ["decoder.1.cross_attention"])
    # Without cross-attention, the encoder has no effect on the output.
    assert layer_scores(without, case.task, case.examples, "gradient")["encoder.1"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "wanda"}, "criterion: expected one of influence, gradient, ig, ig-joint, got 'wanda'"),
        ({"criterion": "influence", "unit": "branch"}, "unit: expected 'block' with criterion 'influence', got 'branch'"),
        ({"criterion": "gradient", "unit": "head"}, "unit: expected 'block' or 'branch', got 'head'"),
        ({"criterion": "ig-joint", "nodes": 0}, "nodes: expected a positive number, got 0"),
    ],
)
def test_bad_input(t5: nn.Module, t5_case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(secateur.InputError, match=message):
        layer_scores(t5, t5_case.task, t5_case.examples, **options)


def test_scores_that_are_not_finite_are_refused(t5: nn.Module, t5_case: Case) -> None:
    with torch.no_grad():
        t5.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").fill_(torch.nan)
    with pytest.raises(secateur.InputError, match=r"model: the score of 'encoder\.0' is not finite"):
        layer_scores(t5, t5_case.task, t5_case.examples, "gradient")
