"""Walk reaches every branch with the tensors of a whole forward pass, and runs no module more often than necessary."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from cases import ALL, Case
from torch import Tensor, nn

from secateur.model.blocks import blocks
from secateur.model.families import branches
from secateur.model.undisturbed import undisturbed
from secateur.recovery.walk import Walk
from secateur.tasks import Batch


def batches_of(case: Case, model: nn.Module) -> list[Batch]:
    """Return the case's examples in batches of at most 24 tokens."""
    return list(case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 24))


def inputs_and_outputs(case: Case, model: nn.Module, batch: Batch, path: str) -> tuple[Tensor, Tensor]:
    """Return the inputs and the outputs of a linear layer in an ordinary forward pass."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda layer, arguments, output: seen.append((arguments[0], output))
    )
    with torch.no_grad():
        case.task.logits(model, batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_walk_brings_the_tensors_of_a_whole_pass_though_weights_change_on_the_way(case: Case) -> None:
    model = case.model()
    batches = batches_of(case, model)
    assert len(batches) > 1
    with undisturbed(model):
        walk = Walk(model, case.task, batches)
        for branch in branches(model).values():
            for k, batch in enumerate(batches):
                reached, expected = walk.reach(k, branch), inputs_and_outputs(case, model, batch, branch.output)
                for mine, theirs in zip((reached.inputs, reached.outputs), expected, strict=True):
                    # OPT puts the tokens of all examples into one row.
                    torch.testing.assert_close(mine, theirs.view_as(mine), rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                model.get_submodule(branch.output).get_parameter("weight").mul_(1.5)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_in_projections_run_once_per_batch_and_the_model_is_as_before(case: Case) -> None:
    model = case.model()
    batches = batches_of(case, model)
    runs: Counter[str] = Counter()
    by_name = branches(model)

    def counted(path: str, forward: Any, inputs: Tensor) -> Any:
        runs[path] += 1
        return forward(inputs)

    for branch in by_name.values():
        for path in branch.linears:
            module = model.get_submodule(path)
            module.forward = partial(counted, path, module.forward)
    with undisturbed(model):
        walk = Walk(model, case.task, batches)
        for branch in by_name.values():
            for k in range(len(batches)):
                walk.reach(k, branch)
    for number, branch in enumerate(by_name.values()):
        for path in branch.linears[:-1]:
            assert runs[path] == len(batches), path
        again = number + 1 < len(by_name)  # It runs again for the layers above, because its weights may have changed.
        assert runs[branch.output] == (1 + again) * len(batches)
    wrapped = {path for branch in by_name.values() for path in branch.linears}
    assert not any(module._forward_hooks for module in model.modules())
    assert {path for path, module in model.named_modules() if "forward" in vars(module)} == wrapped


def streams(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Return the stream in front of the first branch of each block, from a walk in which weights change on the way."""
    (batch,) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000)
    first = {block.branches[0].name for block in blocks(model).values()}
    found = {}
    with undisturbed(model):
        walk = Walk(model, case.task, [batch])
        for branch in branches(model).values():
            stream = walk.reach(0, branch).stream
            if branch.name in first and stream is not None:
                found[branch.name] = stream
            with torch.no_grad():
                model.get_submodule(branch.output).get_parameter("weight").mul_(1.5)
    return found


@pytest.mark.parametrize("case", ALL, ids=str)
def test_streams_of_two_models_differ_as_the_inputs_of_their_blocks_do(case: Case) -> None:
    models = [case.model(torch.float64), case.model(torch.float64)]
    with torch.no_grad():
        for branch in branches(models[1]).values():
            models[1].get_submodule(branch.output).get_parameter("weight").mul_(0.3)
    walked = [streams(case, model) for model in models]
    inputs: list[dict[str, Tensor]] = [{}, {}]
    for model, seen in zip(models, inputs, strict=True):
        for block in blocks(model).values():

            def reads(_: nn.Module, given: Any, options: Any, name: str = block.branches[0].name, seen: Any = seen) -> None:
                seen.setdefault(name, given[0] if given else options["hidden_states"])

            model.get_submodule(block.path).register_forward_pre_hook(reads, with_kwargs=True)
        (batch,) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000)
        with torch.no_grad():
            case.task.logits(model, batch)
    # A norm follows each of Gemma's out-projections.
    assert set(walked[0]) == (set() if case.name.startswith("gemma") else set(inputs[0]))
    for name in walked[0]:
        difference = inputs[0][name] - inputs[1][name]
        torch.testing.assert_close(walked[0][name] - walked[1][name], difference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_walk_holds_the_outputs_of_one_block_of_each_stack(case: Case) -> None:
    """However many blocks there are, the last one of a stack stands for those before it."""
    model = case.model()
    (batch,) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000)
    paths = {block.path: block.stack for block in blocks(model).values()}
    with undisturbed(model):
        walk = Walk(model, case.task, [batch])
        for branch in branches(model).values():
            walk.reach(0, branch)
            held: dict[str, set[int]] = {}
            for path in set(paths) & set(walk._returned[0]):
                held.setdefault(paths[path], set()).add(id(walk._returned[0][path]))
            assert all(len(outputs) == 1 for outputs in held.values())
