"""heal with LoRA: adapters alone are trained, and the result has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from healing import NAMES, pruned_of, rows_of
from torch import nn

import secateur
from secateur import InputError
from secateur.healing import student
from secateur.model.blocks import blocks
from secateur.support.tensors import same_tensors

LORA: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lora": 2, "learning_rate": 5e-3, "blockwise": False}


@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("name", [*NAMES, "gpt2"])
def test_only_linear_layers_of_blocks_change_by_a_low_rank(name: str, unit: Any) -> None:
    """Channels give ScatterLinear and GatherLinear, which hold an ordinary layer."""
    case = CASES[name]
    model = case.model()
    scores = secateur.attribute(model, case.task, case.examples, unit=unit)
    pruned = secateur.prune(model, secateur.plan(scores, keep=0.5))
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **LORA)
    assert healed.after < healed.before
    assert [type(module) for module in healed.model.modules()] == [type(module) for module in pruned.modules()]
    ours, theirs = healed.model.state_dict(), pruned.state_dict()
    assert ours.keys() == theirs.keys()
    inside = tuple(f"{block.path}." for block in blocks(pruned).values())
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert changed
    for weight in changed:
        assert weight.startswith(inside)
        assert ours[weight].ndim == 2
        assert torch.linalg.matrix_rank(ours[weight].double() - theirs[weight].double(), rtol=1e-3) <= 2


def test_blocks_may_be_trained_first_and_a_kept_run_gives_the_same_bits(tmp_path: Path) -> None:
    case = CASES["t5-gated"]
    model = case.model()
    pruned, given = pruned_of(case, model), {**LORA, "blockwise": True}
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **given)
    assert healed.blocks
    assert healed.after < healed.before
    for _ in range(2):  # The second call finds the finished training.
        again = secateur.heal(pruned, model, case.task, rows_of(case), checkpoints=tmp_path / "run", **given)
        assert again.after == healed.after
        assert same_tensors(again.model.state_dict(), healed.model.state_dict())
    with pytest.raises(InputError, match="was begun with 2, got 3"):
        secateur.heal(pruned, model, case.task, rows_of(case), checkpoints=tmp_path / "run", **{**given, "lora": 3})


def test_half_precision_is_rounded_once() -> None:
    case = CASES["llama"]
    model = case.model(torch.bfloat16)
    pruned = pruned_of(case, model)
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **LORA)
    assert {p.dtype for p in healed.model.parameters()} == {torch.bfloat16}
    assert healed.after < healed.before


def test_an_adapter_starts_as_the_model() -> None:
    case = CASES["bert-sequence"]
    model: nn.Module = case.model()
    expected = case.logits(model)
    adapters = student.adapters_in(model, 4)
    assert torch.equal(case.logits(model), expected)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    adapters.merge_and_unload()
    torch.testing.assert_close(case.logits(model), expected)


@pytest.mark.parametrize("lora", [0, -1, 1.5, True])
def test_a_rank_must_be_a_positive_whole_number(lora: Any) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    with pytest.raises(InputError, match=r"^lora: expected"):
        secateur.heal(pruned_of(case, model), model, case.task, rows_of(case), lora=lora)


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "is_peft_available", lambda: False)
    case = CASES["bert-sequence"]
    model = case.model()
    with pytest.raises(InputError, match=r"^lora: expected the package peft, got none: pip install 'secateur\[lora\]'$"):
        secateur.heal(pruned_of(case, model), model, case.task, rows_of(case), lora=4)
