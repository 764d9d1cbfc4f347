"""Walk reaches every branch with the tensors of a whole forward pass, and runs no module more often than necessary."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from cases import ALL, Case
from torch import Tensor, nn

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
                for mine, theirs in zip(reached, expected, strict=True):
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
