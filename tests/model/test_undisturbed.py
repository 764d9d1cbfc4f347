"""Contract 5: every call leaves the caller's model as it was, also after an exception."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, CORE, Case, uniform_plan
from torch import Tensor, nn
from undisturbed import assert_undisturbed, lived_in

import secateur
from secateur import IntegratedGradients
from secateur.attribution.criteria import Criterion, criterion_named
from secateur.pruning.masked import masked

LAYER = IntegratedGradients(nodes=2)
JOINT = IntegratedGradients(path="joint", nodes=2)
OTHERS = {name: criterion_named(name) for name in ("fpp", "rap", "wanda", "flap")}


def calls(case: Case, model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return calls of the public functions on the model, by name."""
    plan = uniform_plan(case, "head")

    def run_masked() -> None:
        with masked(model, plan):
            case.logits(model)

    def run_verify() -> None:
        secateur.verify(model, secateur.prune(case.model(), plan), plan, case.task, case.batches(model))

    return {
        **{
            f"attribute-{name}": partial(
                secateur.attribute, model, case.task, case.examples, criterion=criterion, unit="channel"
            )
            for name, criterion in OTHERS.items()
        },
        "attribute": lambda: secateur.attribute(model, case.task, case.examples, unit="channel"),
        "attribute-layer": lambda: secateur.attribute(model, case.task, case.examples[:2], criterion=LAYER, unit="channel"),
        "attribute-joint": lambda: secateur.attribute(model, case.task, case.examples[:2], criterion=JOINT, unit="channel"),
        "evaluate": lambda: secateur.evaluate(model, case.task, case.examples),
        "verify": run_verify,
        "masked": run_masked,
        "prune": lambda: secateur.prune(model, plan),
        "factorise": lambda: secateur.factorise(model, 0.5),
        "sites": lambda: secateur.sites(model),
    }


ATTRIBUTE = ["attribute", "attribute-layer", "attribute-joint", *(f"attribute-{name}" for name in OTHERS)]
VERBS = [*ATTRIBUTE, "evaluate", "verify", "masked", "prune", "factorise", "sites"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_a_call_leaves_the_model_undisturbed(case: Case, verb: str) -> None:
    model = lived_in(case)
    assert_undisturbed(model, calls(case, model)[verb])


@pytest.mark.parametrize("case", CORE, ids=str)
def test_verify_leaves_the_pruned_model_undisturbed(case: Case) -> None:
    model, plan = case.model(), uniform_plan(case, "head")
    pruned = secateur.prune(lived_in(case), plan)
    assert_undisturbed(pruned, lambda: secateur.verify(model, pruned, plan, case.task, case.batches(model)))


@pytest.mark.parametrize("verb", [*ATTRIBUTE, "evaluate", "verify", "masked"])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_the_model_is_undisturbed_when_the_forward_raises(case: Case, verb: str) -> None:
    model = lived_in(case)
    raised = 0

    def fail(*arguments: Any, **options: Any) -> None:
        nonlocal raised
        raised += 1
        raise RuntimeError("the device went away")

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
    last.forward = fail  # type: ignore[assignment]

    def call() -> None:
        with pytest.raises(RuntimeError, match="the device went away"):
            calls(case, model)[verb]()

    assert_undisturbed(model, call)
    assert raised > 0


@pytest.mark.parametrize("criterion", [LAYER, JOINT], ids=["layer", "joint"])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_the_model_is_undisturbed_when_a_target_along_the_path_raises(
    case: Case, criterion: Criterion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes in the middle of a pass, while the layer path has replaced the forward of modules."""
    model, target, called = lived_in(case), case.task.target, 0

    def fail(*arguments: Any) -> Tensor:
        nonlocal called
        called += 1
        if called == 5:
            raise RuntimeError("the task went away")
        return torch.as_tensor(target(*arguments))

    monkeypatch.setattr(case.task, "target", fail)

    def call() -> None:
        with pytest.raises(RuntimeError, match="the task went away"):
            secateur.attribute(model, case.task, case.examples, criterion=criterion, max_tokens=30)

    assert_undisturbed(model, call)
    assert called == 5


@pytest.mark.parametrize(("criterion", "passes"), [(None, 1), (LAYER, 2), (JOINT, 2)], ids=["gradient", "layer", "joint"])
def test_the_model_is_undisturbed_when_the_backward_raises(t5_case: Case, criterion: Criterion | None, passes: int) -> None:
    """The error comes in the given backward pass, counted from one."""
    model, seen = lived_in(t5_case), 0

    def fail(gradient: Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen == passes:
            raise RuntimeError("out of memory in the backward pass")

    def watch(module: nn.Module, arguments: Any, output: Any) -> None:
        if output.logits.requires_grad:
            output.logits.register_hook(fail)

    model.register_forward_hook(watch)

    def call() -> None:
        with pytest.raises(RuntimeError, match="out of memory in the backward pass"):
            secateur.attribute(model, t5_case.task, t5_case.examples, criterion=criterion)

    assert_undisturbed(model, call)
    assert seen == passes


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("t5-gated", ["encoder", "decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.1.layer.2"]),
        ("bert-sequence", ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1.output.dense"]),
    ],
)
@pytest.mark.parametrize("criterion", [LAYER, JOINT], ids=["layer", "joint"])
def test_a_forward_that_another_library_has_wrapped_stays_wrapped(name: str, paths: list[str], criterion: Criterion) -> None:
    case = CASES[name]
    model = lived_in(case)
    expected = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion)
    for path in paths:
        module = model.get_submodule(path)
        module.forward = functools.partial(module.forward)

    def call() -> None:
        # Shortcuts pass over modules with another forward, so sums are rounded otherwise.
        for site, scores in secateur.attribute(model, case.task, case.examples, criterion=criterion).items():
            torch.testing.assert_close(scores, expected[site], rtol=1e-4, atol=1e-6)

    assert_undisturbed(model, call)


@pytest.mark.parametrize("verb", ["attribute", "attribute-layer", "attribute-joint", "evaluate"])
def test_the_model_is_undisturbed_when_stopped_from_the_keyboard(t5_case: Case, verb: str) -> None:
    model = lived_in(t5_case)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("decoder.block.1").register_forward_hook(stop)

    def call() -> None:
        with pytest.raises(KeyboardInterrupt):
            calls(t5_case, model)[verb]()

    assert_undisturbed(model, call)
    handle.remove()


@pytest.mark.parametrize(
    ("name", "path", "site"),
    [
        ("t5-gated", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "'encoder.1.ffn'"),
        ("t5-relu", "decoder.block.0.layer.1.EncDecAttention.v.weight", "'decoder.0.cross_attention'"),
        # A non-finite weight outside all units is reported at the next site.
        ("t5-relu", "encoder.block.2.layer.0.layer_norm.weight", "'encoder.2.self_attention'"),
        ("llama", "model.layers.1.self_attn.q_proj.weight", "'decoder.1.self_attention'"),
        ("bert-sequence", "bert.encoder.layer.0.output.dense.weight", "'encoder.1.self_attention'"),
        ("bert-sequence", "classifier.weight", "all sites' activations are"),
    ],
)
@pytest.mark.parametrize("criterion", [None, LAYER, JOINT], ids=["gradient", "layer", "joint"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_non_finite_value_is_reported_with_its_site_and_leaves_the_model_undisturbed(
    name: str, path: str, site: str, broken: float, criterion: Criterion | None
) -> None:
    case = CASES[name]
    model = lived_in(case)
    with torch.no_grad():
        model.get_parameter(path).fill_(broken)

    def call() -> None:
        with pytest.raises(secateur.InputError, match=rf"^model: .*{site}"):
            secateur.attribute(model, case.task, case.examples, criterion=criterion)

    assert_undisturbed(model, call)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_masks_end_with_their_context(case: Case) -> None:
    model, plan = case.model(), uniform_plan(case, "head")
    dense = case.logits(model)
    with masked(model, plan):
        assert not torch.allclose(case.logits(model), dense, rtol=1e-3)
    assert torch.equal(case.logits(model), dense)
