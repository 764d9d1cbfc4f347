"""Models whose weights Accelerate has offloaded, and models with weights that have no values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, uniform_plan
from torch import nn

import secateur

CASE = CASES["t5-relu"]


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def one_layer_on_meta(model: nn.Module) -> nn.Module:
    model.get_submodule("encoder.block.1").to("meta")
    return model


def one_buffer_on_meta(model: nn.Module) -> nn.Module:
    """As a model that was built on the meta device and then got its weights, which are not its buffers."""
    model.get_submodule("encoder").register_buffer("places", torch.empty(3, device="meta"), persistent=False)
    return model


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (on_meta, "shared.weight"),
        (one_layer_on_meta, "encoder.block.1.layer.0.SelfAttention.q.weight"),
        (one_buffer_on_meta, "encoder.places"),
    ],
)
def test_a_weight_without_values_is_named_before_the_work(
    change: Callable[[nn.Module], nn.Module], first: str, tmp_path: Path
) -> None:
    task, examples, plan, dense = CASE.task, CASE.examples, uniform_plan(CASE, "head"), CASE.model()
    model, batches = change(CASE.model()), CASE.batches(dense)
    calls: dict[str, list[Callable[[], Any]]] = {
        "model": [
            lambda: secateur.evaluate(model, task, examples),
            lambda: secateur.predict(model, task, examples),
            lambda: secateur.attribute(model, task, examples),
            lambda: secateur.layer_scores(model, task, examples),
            lambda: secateur.latency_table(model, cache=False),
            lambda: secateur.compress(model, examples, task, keep=0.5),
            lambda: secateur.recover_(model, dense, task, examples),
            lambda: secateur.verify(model, dense, plan, task, batches),
            lambda: secateur.save(model, tmp_path / "out"),
        ],
        "pruned": [
            lambda: secateur.recover_(dense, model, task, examples),
            lambda: secateur.verify(dense, model, plan, task, batches),
            lambda: secateur.benchmark(dense, model, []),
        ],
        "dense": [lambda: secateur.benchmark(model, dense, [])],
    }
    for name, of_argument in calls.items():
        line = rf"^{name}: expected weights that have values, got '{first}' on the meta device: load [^\n]*$"
        for call in of_argument:
            with pytest.raises(secateur.InputError, match=line):
                call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["cpu", "disk", "blocks"])
@pytest.mark.parametrize("name", ["t5-relu", "t5-gated", "bart", "marian", "llama", "bert-sequence"])
def test_an_offloaded_model_is_evaluated_as_the_model_in_memory(name: str, place: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    case, cpu = CASES[name], torch.device("cpu")
    expected = secateur.predict(case.model(), case.task, case.examples)
    if place == "cpu":
        model = accelerate.cpu_offload(case.model(), execution_device=cpu)
    elif place == "disk":
        model = accelerate.disk_offload(case.model(), tmp_path, execution_device=cpu)
    else:  # One hook loads the weights of a whole block.
        kinds = [kind.__name__ for kind in map(type, case.model().modules()) if kind.__name__.endswith(("Block", "Layer"))]
        model = accelerate.cpu_offload(case.model(), execution_device=cpu, preload_module_classes=kinds)
    assert any(parameter.is_meta for parameter in model.parameters())
    for ours, theirs in zip(secateur.predict(model, case.task, case.examples), expected, strict=True):
        assert ours["prediction"] == theirs["prediction"]
        probabilities = [column for column in theirs if column.startswith("p_")]
        # Float32 scores of two orders of addition: shortcuts pass over modules with hooks.
        own, expected_ones = ([row[p] for p in probabilities] for row in (ours, theirs))
        torch.testing.assert_close(own, expected_ones, rtol=1e-5, atol=1e-6)
