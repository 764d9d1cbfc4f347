"""Blockwise distillation: the walk computes what a plain forward pass does, and training lowers the error of the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case
from healing import pruned_of, rows_of
from torch import nn

import secateur
from secateur.healing.block_walk import BlockWalk
from secateur.healing.blockwise import heal_blocks_
from secateur.healing.lessons import Lessons
from secateur.healing.student import master_copy
from secateur.model.blocks import blocks
from secateur.model.discovery import fingerprint
from secateur.model.hooks import states_of
from secateur.model.undisturbed import undisturbed
from secateur.recovery.matching import blocks_of_dense
from secateur.tasks import Batch


def plain(case: Case, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the states behind every block in one forward pass."""
    states: dict[str, torch.Tensor] = {}
    handles = []
    for name, block in blocks(model).items():

        def keep(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            states[name] = states_of(output)

        handles.append(model.get_submodule(block.path).register_forward_hook(keep))
    with torch.no_grad():
        case.task.logits(model, batch)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_walk_gives_the_states_of_a_forward_pass(case: Case) -> None:
    model = case.model()
    batches = case.batches(model)
    assert len(batches) > 1
    expected = [plain(case, model, batch) for batch in batches]
    walk = BlockWalk(model, case.task, batches)
    with undisturbed(model):
        for name, block in blocks(model).items():
            for k in range(len(batches)):
                assert torch.equal(walk.behind(k, block), expected[k][name])


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama", "bart", "gpt2", "opt", "gemma3"])
def test_each_block_comes_nearer_to_the_dense_states(name: str) -> None:
    """The error of the last block in a whole forward pass is the one that the last block's training reports."""
    case = CASES[name]
    model = case.model()
    pruned, rows = pruned_of(case, model), rows_of(case, 60)
    items = case.task.items(model, rows)
    pairs = blocks_of_dense(model, pruned, ())
    student = master_copy(pruned)
    given: dict[str, Any] = {"batch_size": 4, "seed": 0, "over": answering(False)}
    with undisturbed(model):
        fitted, held_out = Lessons(model, case.task, items[:48]), Lessons(model, case.task, items[48:])
        fits = heal_blocks_(student, fitted, held_out, pairs, **given)
        assert [fit.block for fit in fits] == [dense.name for _, dense in pairs]
        assert all(fit.after <= fit.before for fit in fits)
        assert sum(fit.after for fit in fits) < 0.98 * sum(fit.before for fit in fits)
        (_, dense), batch = pairs[-1], held_out.batch(range(12))
        ours, theirs = (plain(case, m, batch)[dense.name][held_out.real(batch, dense)] for m in (student, model))
        assert float((ours - theirs).square().sum() / theirs.square().sum()) == pytest.approx(fits[-1].after, rel=1e-3)


@pytest.mark.parametrize("name", ["t5-gated", "llama", "bert-sequence"])
def test_a_block_without_units_stays(name: str) -> None:
    case = CASES[name]
    model = case.model()
    sites = tuple(secateur.sites(model))
    last = sites[-1].block
    kept = {site.name: torch.arange(0 if site.block == last else site.units // 2) for site in sites}
    student = master_copy(secateur.prune(model, secateur.Plan(kept, sites, fingerprint(model))))
    items, pairs = case.task.items(model, rows_of(case, 24)), blocks_of_dense(model, student, ())
    with undisturbed(model):
        lessons = Lessons(model, case.task, items)
        fits = heal_blocks_(student, lessons, lessons, pairs, batch_size=4, seed=0, over=answering(False))
    by_block = {fit.block: fit for fit in fits}
    assert len(by_block) == len(pairs)
    assert all(fit.after <= fit.before for fit in fits)
    if name != "bert-sequence":  # BERT's norms stand behind the branches, so an empty block still has something to train.
        assert by_block[last].after == by_block[last].before


def answering(over: bool) -> Callable[[float], bool]:
    """Return a clock's function that always gives one answer."""
    return lambda seconds: over


def test_blocks_that_lost_nothing_and_blocks_after_the_end_of_time_stay() -> None:
    case = CASES["llama"]
    model = case.model()
    pruned = pruned_of(case, model)
    items = case.task.items(model, rows_of(case))
    with undisturbed(model):
        lessons = Lessons(model, case.task, items)
        for student, over in ((master_copy(case.model()), False), (master_copy(pruned), True)):
            before = {name: p.clone() for name, p in student.named_parameters()}
            pairs = blocks_of_dense(model, student, ())
            given: dict[str, Any] = {"batch_size": 4, "seed": 0}
            fits = heal_blocks_(student, lessons, lessons, pairs, over=answering(over), **given)
            assert not fits
            assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
