"""Integrated gradients: they equal the naive float64 loop, report their completeness, and run no more than they need."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from cases import ALL, CASES, CLASSES, LABELS, Case, piece_tokenizer, unit_argument
from comparing import COMBINE, REDUCED, error, reduce
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import secateur
from secateur import GradientActivation, IntegratedGradients
from secateur.attribution.criteria import Criterion
from secateur.attribution.integrated.convergence import raise_

PATHS = ("layer", "joint")
THREE = [CASES["t5-gated"], CASES["bert-sequence"], CASES["llama"]]
NODES = 3
SELECT = "encoder.1,decoder.0"  # One site of every kind, because all sites would take long.
CHECKED = 3  # The number of examples, of seven, whose scores are checked against rules of twice as many nodes.


def integrated(path: Any, **options: Any) -> IntegratedGradients:
    """Return the criterion with few nodes and signed sums."""
    return IntegratedGradients(**{"path": path, "nodes": NODES, "over_examples": "signed", **options})


def attribute(case: Case, model: nn.Module, criterion: Criterion, unit: str = "head", **options: Any) -> secateur.Scores:
    """Score a case's examples, and keep each example's scores."""
    options = {"per_example": True, **options}
    return secateur.attribute(model, case.task, case.examples, criterion=criterion, unit=unit_argument(unit), **options)


def few(case: Case) -> Case:
    """Return the case with three examples."""
    return replace(case, examples=case.examples[:3])


def by_example(scores: secateur.Scores) -> dict[str, Tensor]:
    """Return each example's scores, float64 [examples, units] by site."""
    assert scores.per_example is not None
    return {site: rows.double() for site, rows in scores.per_example.items()}


def by_path(scores: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the scores [examples, units] of the units that a path integrates over, by path."""
    return {"joint": torch.cat(list(scores.values()), 1)} if path == "joint" else scores


def limit(case: Case) -> float:
    """Return the largest relative error of scores in float64."""
    return 1e-10 if case.exact else 1e-5


@functools.cache
def expected(name: str, unit: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the naive integrated gradients of few examples, and the residuals of the rule."""
    case = few(CASES[name])
    return naive.integrated(case, case.model(torch.float64), unit, "log_probability", NODES, path == "joint")


@functools.cache
def change(name: str, unit: str, path: str) -> dict[str, Tensor]:
    """Return F(1) - F(0) of few examples by path."""
    case = few(CASES[name])
    return naive.change(case, case.model(torch.float64), unit, "log_probability", path == "joint")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("unit", REDUCED)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_naive_float64_and_is_as_complete_as_it_says(case: Case, unit: str, path: str) -> None:
    scores = attribute(few(case), case.model(torch.float64), integrated(path), unit)
    naively, naive_residuals = expected(case.name, unit, path)
    assert error(scores, *reduce(naively, "signed")) < limit(case)
    assert error(by_example(scores), naively, naively) < max(limit(case), 1e-6)  # Examples are kept in float32.
    convergence, actual, exact = scores.convergence, by_path(by_example(scores), path), by_path(naively, path)
    assert convergence is not None
    assert set(convergence.residuals) == set(exact)
    for name, difference in change(case.name, unit, path).items():
        size, residual = exact[name].abs().sum(1), naive_residuals[name].abs()
        assert float(residual.max()) > 0
        residuals = convergence.residuals[name].double()
        assert float((residuals - residual / size).abs().max()) < 1e-5
        assert bool(((actual[name].sum(1) - difference).abs() <= (residuals + 1e-5) * size).all())
        assert convergence.nodes[name].tolist() == [NODES] * len(few(case).examples)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("unit", REDUCED)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_naive_float32(case: Case, unit: str, path: str) -> None:
    actual = attribute(few(case), case.model(), integrated(path), unit)
    for over in COMBINE:
        assert error(reduce(by_example(actual), over)[0], *reduce(expected(case.name, unit, path)[0], over)) < 1e-4, over
    assert all(scores.dtype == torch.float64 for scores in actual.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("over", COMBINE)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_sums_over_examples_equal_naive(case: Case, over: str, path: str) -> None:
    actual = attribute(few(case), case.model(), integrated(path, over_examples=over), "channel", per_example=False)
    assert error(actual, *reduce(expected(case.name, "channel", path)[0], over)) < 1e-4
    assert actual.per_example is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", ["probability", "margin"])
@pytest.mark.parametrize("case", THREE, ids=str)
def test_targets_equal_naive(case: Case, target: Any, path: str) -> None:
    case = few(case)
    actual = attribute(case, case.model(), integrated(path, target=target))
    naively, _ = naive.integrated(case, case.model(torch.float64), "head", target, NODES, path == "joint")
    assert error(by_example(actual), naively, naively) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("case", "labels"), list(zip(THREE, [LABELS, CLASSES, LABELS], strict=True)), ids=["t5", "bert", "llama"]
)
def test_all_labels_equals_naive(case: Case, labels: list[str], path: str) -> None:
    """There is an integral for each example and label. Targets are not read."""
    case = replace(case, examples=[{"input": example["input"]} for example in few(case).examples])
    actual = attribute(case, case.model(), integrated(path, over_examples="absolute", labels="all"))
    model, count, joint = case.model(torch.float64), len(case.examples), path == "joint"
    naively = [naive.integrated(case, model, "head", "log_probability", NODES, joint, [label] * count)[0] for label in labels]
    rows: dict[str, Any] = {site: sum(of_label[site].abs() for of_label in naively) for site in naively[0]}
    assert error(by_example(actual), rows, rows) < 1e-4
    convergence = actual.convergence
    assert convergence is not None
    assert all(len(residuals) == count for residuals in convergence.residuals.values())


def test_an_example_of_several_labels_has_the_largest_of_their_errors() -> None:
    largest = torch.zeros(4)
    raise_(largest, torch.tensor([2, 0, 2]), torch.tensor([1.0, 5.0, 2.0]))
    raise_(largest, torch.tensor([2, 1]), torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert largest.tolist() == [5.0, 0.5, 3.0, 0.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [CASES["bert-sequence"], CASES["bert-token"]], ids=str)
def test_many_nodes_are_complete(case: Case, path: str) -> None:
    actual = attribute(few(case), case.model(torch.float64), integrated(path, nodes=24), "channel")
    assert actual.convergence is not None
    for residuals in actual.convergence.residuals.values():
        assert float(residuals.max()) < 1e-4
    for name, difference in change(case.name, "channel", path).items():
        assert torch.allclose(by_path(by_example(actual), path)[name].sum(1), difference, rtol=1e-4, atol=1e-4)


@contextmanager
def passes(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Record the shapes of the input ids of the model's passes inside the context, or the number of images and their tokens."""
    shapes: list[tuple[int, int]] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        images = keywords.get("pixel_values")
        shapes.append(tuple(keywords["input_ids"].shape) if images is None else (len(images), 17))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@contextmanager
def tokens_of_products() -> Iterator[list[int]]:
    """Record the number of tokens in each call of a linear layer inside the context."""
    tokens: list[int] = []
    plain = nn.functional.linear

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens.append(input.numel() // input.shape[-1])
        return plain(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counted)
        yield tokens


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_max_tokens_bounds_every_pass_and_changes_rounding_only(case: Case, path: str) -> None:
    model, by_limit = case.model(), {}
    for max_tokens in (1, 40, 100_000):
        with passes(model) as shapes:
            scores = attribute(few(case), model, integrated(path), "channel", select=SELECT, max_tokens=max_tokens)
        by_limit[max_tokens] = by_example(scores)
        assert all(rows * length <= max_tokens or rows == 1 for rows, length in shapes)
    assert error(by_limit[40], by_limit[1], by_limit[1]) < 1e-4
    assert error(by_limit[100_000], by_limit[1], by_limit[1]) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_memory_does_not_grow_with_the_nodes(case: Case, path: str) -> None:
    """The tokens of linear layers are counted, because a path by layers runs only parts of the model."""
    model, largest = case.model(), {}
    for nodes in (2, 16):
        with tokens_of_products() as tokens:
            attribute(case, model, integrated(path, nodes=nodes), select=SELECT, max_tokens=24)
        largest[nodes] = max(tokens)
    # Above the site, BERT's last block runs on one token of each row.
    least = 8 if case.name == "bert-sequence" and path == "layer" else 12
    assert least < largest[2] <= 24
    assert least < largest[16] <= 24


@pytest.mark.parametrize("path", PATHS)
def test_max_tokens_bounds_the_passes_of_automatic_nodes(path: str) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    with passes(model) as shapes:
        attribute(case, model, integrated(path, nodes="auto", tolerance=0.01), max_tokens=40)
    assert all(rows * length <= 40 for rows, length in shapes)


def test_a_linear_site_needs_one_node() -> None:
    """Without norm and activation above it, the margin of two classes is linear in the last FFN's gates."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(piece_tokenizer()), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, initializer_range=0.3, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    model.bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    model.bert.pooler.activation = nn.Identity()
    case = CASES["bert-sequence"]
    case = replace(case, examples=[{**row, "target": ("bad", "good")[i % 2]} for i, row in enumerate(case.examples)])

    def scores(criterion: Criterion, select: str = "ffn.1") -> secateur.Scores:
        return attribute(case, model, criterion, select=select)

    gradient = scores(GradientActivation(target="margin", over_examples="signed"))
    for nodes in (1, 8, "auto"):
        actual = scores(integrated("layer", nodes=nodes, target="margin"))
        assert error(actual, gradient, gradient) < 1e-10
        assert actual.convergence is not None
        assert float(actual.convergence.residuals["encoder.1.ffn"].max()) < 1e-10
        # "auto" stops at the first rule, which has one inner node besides the end point a = 1.
        assert actual.convergence.nodes["encoder.1.ffn"].tolist() == [1 if nodes == "auto" else nodes] * len(case.examples)
    curved = scores(integrated("layer", nodes=1, target="margin"), "ffn.0")
    below = scores(GradientActivation(target="margin", over_examples="signed"), "ffn.0")
    assert error(curved, below, below) > 1e-3


@contextmanager
def linear_rows(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the rows that the model's linear layers compute inside the context, by path, in the order of their first calls."""
    paths = {id(module.weight): path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows: Counter[str] = Counter()
    plain = nn.functional.linear

    def count(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows[paths[id(weight)]] += len(input)
        return plain(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", count)
        yield rows


@pytest.mark.parametrize("unit", REDUCED)
@pytest.mark.parametrize("case", [CASES["t5-relu"], *THREE], ids=str)
def test_nothing_below_a_site_runs_again(case: Case, unit: str) -> None:
    """With path="layer", a linear layer below the site runs once for each example, in the pass that captures the batch."""
    model = case.model()
    outputs = {site.removesuffix(".vo"): places[0].path for site, places in naive.gates(case, model, "channel").items()}
    with linear_rows(model) as plain, torch.no_grad():
        case.task.target(model, case.batches(model, 100_000)[0], "log_probability")
    order = list(plain)
    assert set(plain.values()) == {len(case.examples)}
    for site in secateur.sites(model, unit=unit_argument(unit)):
        output = order.index(outputs[site.name.removesuffix(".vo").removesuffix(".qk")])
        below = set(order[: output + (site.unit != "qk_channel")])
        if site.stack == "decoder":
            below |= {path for path in order if path.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
        # The first token of BERT's last block attends without keys and values, unless the channels of these are scored.
        of_last = "encoder.layer.1.attention.self."
        watched = unit == "channel" and site.name.startswith("encoder.1.self_attention")
        left_out = {path for path in order if path.endswith((f"{of_last}key", f"{of_last}value")) and not watched}
        with linear_rows(model) as rows:
            attribute(case, model, integrated("layer", nodes=4), unit, select=site.name, max_tokens=40)
        # The captured pass, the pass at a gate of 0, and the nodes; and twice the nodes for the checked examples.
        count = len(case.examples)
        above = count * (1 + 1 + 4) + CHECKED * 8
        expected_rows = {path: count if path in below else above for path in order if path not in left_out}
        assert dict(rows) == expected_rows, site.name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_train_mode_gives_the_same_scores(case: Case, path: str) -> None:
    evaluated = attribute(case, case.model(), integrated(path))
    assert attribute(case, case.model().train(), integrated(path)).equal(evaluated)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_no_weight_gradient_is_computed(case: Case, path: str) -> None:
    model, computed = case.model(), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: computed.append(name))  # type: ignore[no-untyped-call]
    attribute(case, model, integrated(path), "channel")
    assert computed == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bert-sequence", "bert.encoder.layer.0"),
        ("llama", "model.layers.0.self_attn.o_proj"),
        ("t5-gated", "encoder.block.1.layer.0"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_users_hook_acts_once(name: str, module: str, path: str) -> None:
    """This holds also if the hook changes the return value of a module that does not run again."""
    case = few(CASES[name])
    model = case.model(torch.float64)

    def steer(module: nn.Module, arguments: Any, output: Any) -> Any:
        return 1.5 * output if isinstance(output, Tensor) else (1.5 * output[0], *output[1:])

    model.get_submodule(module).register_forward_hook(steer)
    naively, _ = naive.integrated(case, model, "head", "log_probability", NODES, path == "joint")
    assert error(by_example(attribute(case, model, integrated(path))), naively, naively) < 1e-5


@functools.cache
def reference(name: str, path: str) -> dict[str, Tensor]:
    """Return scores by 200 nodes, by path."""
    case = CASES[name]
    return by_path(by_example(attribute(case, case.model(), integrated(path, nodes=200), select=SELECT, max_tokens=1000)), path)


@functools.cache
def automatic(name: str, path: str, tolerance: float) -> secateur.Scores:
    """Return scores by as many nodes as the tolerance asks for."""
    case = CASES[name]
    criterion = integrated(path, nodes="auto", tolerance=tolerance, max_nodes=96)
    return attribute(case, case.model(), criterion, select=SELECT)


def total_nodes(scores: secateur.Scores) -> int:
    """Return the number of gradient passes of all examples and paths."""
    assert scores.convergence is not None
    return sum(int(nodes.sum()) for nodes in scores.convergence.nodes.values())


@pytest.mark.parametrize("tolerance", [0.05, 0.005])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_automatic_nodes_reach_the_tolerance(case: Case, path: str, tolerance: float) -> None:
    actual, exact = automatic(case.name, path, tolerance), reference(case.name, path)
    convergence = actual.convergence
    assert convergence is not None
    assert convergence.tolerance == tolerance
    for name, scores in by_path(by_example(actual), path).items():
        assert float((scores - exact[name]).abs().sum() / exact[name].abs().sum()) < 3 * tolerance, name
        assert bool((convergence.errors[name] <= tolerance).all())
    assert convergence.missed() == {name: [] for name in exact}
    assert max(of_path["doubled"] for of_path in convergence.summary().values()) < 10 * tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_smaller_tolerance_takes_no_fewer_nodes(case: Case, path: str) -> None:
    nodes = [total_nodes(automatic(case.name, path, tolerance)) for tolerance in (0.05, 0.005)]
    assert nodes[0] < nodes[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_an_impossible_tolerance_is_reported(case: Case, path: str) -> None:
    """All examples are listed as missed. No example takes more nodes than those of the last rule and the rules before."""
    criterion = integrated(path, nodes="auto", tolerance=1e-9, max_nodes=12)
    actual = attribute(case, case.model(torch.float64), criterion, select=SELECT)
    convergence, all_examples = actual.convergence, list(range(len(case.examples)))
    assert convergence is not None
    missed, summary = convergence.missed(), convergence.summary()
    assert set(missed) == set(summary) == set(by_path(by_example(actual), path))
    assert set(map(tuple, missed.values())) == {tuple(all_examples)}
    for name, of_path in summary.items():
        assert of_path["missed"] == len(all_examples)
        assert of_path["nodes"] == pytest.approx(float(convergence.nodes[name].double().mean()))
        assert of_path["residual"] == pytest.approx(float(convergence.residuals[name].mean()), rel=1e-5)
        assert of_path["error"] == pytest.approx(float(convergence.errors[name].mean()), rel=1e-5)
        assert of_path["error"] > 1e-9
        assert int(convergence.nodes[name].min()) >= 12
        assert int(convergence.nodes[name].max()) <= 1 + 2 + 4 + 3 + 6 + 12


@pytest.mark.parametrize("path", PATHS)
def test_a_given_number_of_nodes_misses_nothing(path: str) -> None:
    case = CASES["bert-sequence"]
    convergence = attribute(case, case.model(), integrated(path)).convergence
    assert convergence is not None
    assert convergence.tolerance is None
    assert set(map(tuple, convergence.missed().values())) == {()}


@pytest.mark.parametrize("path", PATHS)
def test_doubled_is_the_difference_to_twice_the_nodes(path: str) -> None:
    """A single example is the sample."""
    case = CASES["bert-sequence"]
    case = replace(case, examples=case.examples[:1])
    four, eight = (attribute(case, case.model(), integrated(path, nodes=nodes)) for nodes in (4, 8))
    assert four.convergence is not None
    twice = by_path(by_example(eight), path)
    for name, scores in by_path(by_example(four), path).items():
        difference = float((scores - twice[name]).abs().sum() / twice[name].abs().sum())
        assert four.convergence.doubled[name] == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("nodes", [NODES, "auto"])
@pytest.mark.parametrize("path", PATHS)
def test_saved_scores_keep_their_convergence(path: str, nodes: Any, tmp_path: Path) -> None:
    case = CASES["llama"]
    actual = attribute(case, case.model(), integrated(path, nodes=nodes, tolerance=0.05), "channel")
    actual.save(tmp_path / "scores")
    loaded = secateur.Scores.load(tmp_path / "scores")
    assert loaded.equal(actual)
    assert loaded.criterion == actual.criterion
    before, after = actual.convergence, loaded.convergence
    assert before is not None
    assert after is not None
    assert set(before.tensors()) == set(after.tensors())
    for name, tensor in before.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)
        assert after.tensors()[name].dtype == tensor.dtype
    assert (after.doubled, after.tolerance) == (before.doubled, before.tolerance)
    assert after.summary() == before.summary()
    assert loaded.per_example is not None
    assert set(loaded.per_example) == set(loaded)


def test_gradients_have_no_convergence(t5_case: Case, tmp_path: Path) -> None:
    actual = attribute(t5_case, t5_case.model(), GradientActivation())
    assert actual.convergence is None
    actual.save(tmp_path / "scores")
    assert secateur.Scores.load(tmp_path / "scores").convergence is None


@pytest.mark.parametrize("nodes", [NODES, "auto"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_two_runs_are_bit_identical(case: Case, path: str, nodes: Any) -> None:
    model, criterion = case.model(), integrated(path, nodes=nodes, tolerance=0.05)
    first, second = (attribute(case, model, criterion, "channel", select=SELECT) for _ in range(2))
    assert first.equal(second)
    assert first.convergence is not None
    assert second.convergence is not None
    tensors = second.convergence.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.convergence.tensors().items())
    assert first.convergence.doubled == second.convergence.doubled
    scores = by_example(second)
    assert all(torch.equal(rows, scores[site]) for site, rows in by_example(first).items())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_order_changes_rounding_only(case: Case, path: str) -> None:
    model, order = case.model(), [3, 0, 6, 2, 5, 1, 4]
    mixed = attribute(replace(case, examples=[case.examples[i] for i in order]), model, integrated(path))
    plain = attribute(case, model, integrated(path))
    assert error(by_example(mixed), {site: rows[order] for site, rows in by_example(plain).items()}, by_example(plain)) < 1e-4
    assert mixed.convergence is not None
    assert plain.convergence is not None
    for name, residuals in plain.convergence.residuals.items():
        assert torch.allclose(mixed.convergence.residuals[name], residuals[order], atol=1e-4)


@pytest.mark.parametrize("select", ["qk", "vo", "attention", "ffn"])
@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_selection_has_the_scores_of_the_whole(case: Case, select: str) -> None:
    """This holds for path="layer". The joint path opens the selected sites alone."""
    case = few(case)
    whole = by_example(attribute(case, case.model(), integrated("layer"), "channel"))
    part = by_example(attribute(case, case.model(), integrated("layer"), "channel", select=select))
    assert 0 < len(part) < len(whole)
    assert error(part, {site: whole[site] for site in part}, whole) < 1e-6


@pytest.mark.parametrize("select", ["qk", "decoder.cross,encoder.ffn.0-1", "decoder.0.vo"])
def test_the_joint_path_is_that_of_the_selected_sites(t5_case: Case, select: str) -> None:
    actual = attribute(t5_case, t5_case.model(), integrated("joint", nodes=24), "channel", select=select)
    model = t5_case.model(torch.float64)
    places = {site: of_site for site, of_site in naive.gates(t5_case, model, "channel").items() if site in actual}
    assert set(places) == set(actual)
    closed = {site: torch.zeros(count) for site, count in naive.counts(places).items()}
    total = by_path(by_example(actual), "joint")["joint"].sum(1)
    for example, whole in zip(t5_case.examples, total.tolist(), strict=True):
        with torch.no_grad():
            change = naive.value(*naive.alone(t5_case, model, example), "log_probability")
            with naive.gated(model, places, closed):
                change -= naive.value(*naive.alone(t5_case, model, example), "log_probability")
        assert whole == pytest.approx(float(change), rel=1e-3, abs=1e-3)


def test_a_layer_that_runs_twice_is_refused_by_the_layer_path_alone() -> None:
    case = CASES["llama"]
    model: Any = case.model()
    mlp = model.model.layers[0].mlp

    class RunsTwice(type(mlp)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> Any:
            super().forward(states)
            return super().forward(states)

    mlp.__class__ = RunsTwice
    with pytest.raises(
        secateur.InputError,
        match=r"^model: expected each module to run once in a pass, got 'model\.layers\.0.*' more than once: use path='joint'$",
    ):
        attribute(case, model, integrated("layer"))
    actual = attribute(case, model, integrated("joint", nodes=64))
    assert actual.convergence is not None
    assert float(actual.convergence.residuals["joint"].max()) < 1e-3
    assert float(actual.convergence.residuals["joint"].max()) > 0
