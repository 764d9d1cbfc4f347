"""Blocks that a plan removes: masked, pruned and by hand they are gone; the folder is stock, and every stage takes the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL, CASES, GENERATING, Case, scores_of, uneven_plan
from comparing import relative
from hand_layers import deleted_by_hand
from new_process import BLOCK_SECATEUR, run_script
from torch import Tensor, nn

import secateur
from secateur import Plan
from secateur.model import cost
from secateur.model.blocks import block_parameters, blocks
from secateur.model.discovery import fingerprint
from secateur.model.removed_blocks import may_go
from secateur.planning.budget import Budget
from secateur.planning.plan import plans_alike
from secateur.pruning.masked import masked

every_case = pytest.mark.parametrize("case", ALL, ids=str)


def removals(case: Case) -> list[list[str]]:
    """Return the blocks that can go, by hand. An encoder keeps as many as its decoder; ModernBERT's first block is special."""
    if case.name in ("bart", "marian"):
        return [["decoder.0"], ["decoder.1"], ["encoder.0", "decoder.1"]]
    if case.kind == "encoder-decoder":
        return [["encoder.0"], ["encoder.1"], ["encoder.2"], ["decoder.0"], ["decoder.1"], ["encoder.0", "decoder.0"]]
    stack = case.kind
    return [[f"{stack}.1"]] if case.name == "modernbert" else [[f"{stack}.0"], [f"{stack}.1"]]


def without(plan: Plan, removed: list[str]) -> Plan:
    """Return the plan without some blocks."""
    kept = {site.name: plan[site.name][:0] if site.block in removed else plan[site.name] for site in plan.sites}
    return replace(plan, kept=kept, removed_blocks=tuple(removed))


def whole(case: Case, removed: list[str]) -> Plan:
    """Return the plan that removes blocks and nothing else."""
    scores = scores_of(case.name)
    return without(Plan({s.name: torch.arange(s.units) for s in scores.sites}, scores.sites, scores.fingerprint), removed)


def stock_plan(case: Case, removed: list[str]) -> Plan:
    """Return a plan without some blocks that also cuts a tenth of what is left."""
    scores = scores_of(case.name)
    counts = {site.name: 0 if site.block in removed else site.units for site in scores.sites}
    left = cost.remaining(scores.all_sites, scores.sites, counts, "flops", scores.tokens)
    return plans_alike(scores, Budget.of(flops=0.9 * left), removed_blocks=removed)[0]


def masked_logits(case: Case, model: nn.Module, plan: Plan) -> Tensor:
    with masked(model, plan):
        return case.logits(model)


@every_case
def test_masked_and_pruned_equal_a_model_without_the_modules(case: Case) -> None:
    model = case.model(torch.float64)
    for removed in removals(case):
        expected = case.logits(deleted_by_hand(case, model, removed))
        plan = whole(case, removed)
        pruned = secateur.prune(model, plan)
        assert relative(masked_logits(case, model, plan), expected) < 1e-12, removed
        assert relative(case.logits(pruned), expected) < 1e-12, removed
        assert relative(expected, case.logits(model)) > 1e-3, removed
        gone = sum(block_parameters(model)[name] for name in removed)
        assert cost.parameters(pruned) == cost.parameters(model) - gone


@every_case
def test_pruned_equals_masked_and_is_stock(case: Case) -> None:
    model = case.model(torch.float64)
    for removed in removals(case):
        plan = stock_plan(case, removed)
        pruned: Any = secateur.prune(model, plan)
        expected = masked_logits(case, model, plan)
        assert relative(case.logits(pruned), expected) < 1e-10, removed
        assert relative(expected, case.logits(model)) > 1e-3
        assert not hasattr(pruned.config, "secateur"), removed
        stock = type(model)(pruned.config).double().eval()
        stock.load_state_dict(pruned.state_dict())
        assert relative(case.logits(stock), expected) < 1e-10, removed
        assert len(blocks(pruned)) == len(blocks(model)) - len(removed)


@every_case
def test_units_and_blocks_go_together(case: Case) -> None:
    """Widths that differ by layer: the recipe follows the new numbers of the blocks."""
    model = case.model(torch.float64)
    for removed in removals(case):
        plan = without(uneven_plan(case, "head"), removed)
        expected = masked_logits(case, model, plan)
        assert relative(case.logits(secateur.prune(model, plan)), expected) < 1e-10, removed
        assert secateur.verify(model, secateur.prune(model, plan), plan, case.task, case.batches(model)).holds
        in_place = case.model(torch.float64)
        assert relative(case.logits(secateur.prune_(in_place, plan)), expected) < 1e-10


@every_case
def test_the_callers_model_is_unchanged(case: Case) -> None:
    model = case.model()
    weights, config = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()  # type: ignore[operator, union-attr]
    pruned = secateur.prune(model, stock_plan(case, removals(case)[0]))
    with masked(model, stock_plan(case, removals(case)[0])):
        pass
    assert model.config.to_dict() == config  # type: ignore[operator, union-attr]
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in pruned.parameters()}
    assert not shared


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_generation_with_and_without_a_cache_is_that_of_the_masked_model(case: Case) -> None:
    model: Any = case.model(torch.float64)
    options: dict[str, Any] = {"input_ids": torch.tensor([[2, 7, 9, 12, 20, 11]]), "max_new_tokens": 8, "do_sample": False}
    options["eos_token_id"] = None
    for removed in removals(case):
        plan = stock_plan(case, removed)
        pruned: Any = secateur.prune(model, plan)
        cached, plain, beams = (pruned.generate(**options, **o) for o in ({}, {"use_cache": False}, {"num_beams": 3}))
        assert torch.equal(cached, plain), removed
        assert torch.equal(beams, pruned.generate(**options, num_beams=3, use_cache=False)), removed
        with masked(model, plan):
            assert torch.equal(plain, model.generate(**options, use_cache=False)), removed
            assert torch.equal(plain, model.generate(**options)), removed


# One process loads all folders by classes of transformers alone.
SCRIPT = (
    BLOCK_SECATEUR
    + """
import json, pathlib, torch, transformers
for line in pathlib.Path("folders.jsonl").read_text().splitlines():
    name, auto_class = json.loads(line)
    model = getattr(transformers, auto_class).from_pretrained(name).eval()
    with torch.no_grad():
        logits = model(**torch.load(f"{name}.inputs")).logits
    torch.save(logits, f"{name}.logits")
"""
)


def test_plain_transformers_loads_the_folders(tmp_path: Path) -> None:
    lines, expected = [], {}
    for case in ALL:
        removed = removals(case)[-1]
        pruned: Any = secateur.prune(case.model(), stock_plan(case, removed))
        secateur.save(pruned, tmp_path / case.name, tokenizer=case.task.reader)
        assert not list((tmp_path / case.name).glob("*.py"))
        batch = case.batches(pruned)[0]
        inputs = {**batch.inputs, **({"labels": batch.labels} if case.kind == "encoder-decoder" else {})}
        torch.save(inputs, tmp_path / f"{case.name}.inputs")
        lines.append(f'["{case.name}", "{case.auto_class}"]')
        with torch.no_grad():
            expected[case.name] = pruned(**inputs).logits
    (tmp_path / "folders.jsonl").write_text("\n".join(lines))
    run_script(SCRIPT, tmp_path)
    for name, logits in expected.items():
        assert relative(torch.load(tmp_path / f"{name}.logits"), logits) < 1e-5, name


@pytest.mark.parametrize("name", ["bert-sequence", "t5-gated", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["least_squares", "scale"])
def test_recovery_fits_each_branch_to_its_own(name: str, method: Any) -> None:
    """The first block is gone, so each branch that stays is fitted to the dense branch of the next number."""
    case = CASES[name]
    model, first = case.model(torch.float64), "encoder.0" if CASES[name].kind != "decoder" else "decoder.0"
    plan = stock_plan(case, [first])
    pruned = secateur.prune(model, plan)
    refits = secateur.recover_(model, pruned, case.task, case.examples, method=method, removed_blocks=plan.removed_blocks)
    staying = [name for block in blocks(model).values() if block.name != first for name in (b.name for b in block.branches)]
    assert [refit.branch for refit in refits] == staying
    assert any(refit.after < refit.before for refit in refits)
    # The error before the refit of the first branch that stays, by hand: the dense stream behind it (what its block reads, and
    # its output) against that of the pruned model.
    branch = next(b for block in blocks(model).values() if block.name != first for b in block.branches)
    seen: dict[str, list[Tensor]] = {}
    moved = branch.output.replace(".1.", ".0.", 1)
    layer = next(block.path for block in blocks(model).values() if branch in block.branches)
    of_pruned = layer.removesuffix("1") + "0"
    for key, either, path, block_path in (
        ("dense", model, branch.output, layer), ("pruned", secateur.prune(model, plan), moved, of_pruned),
    ):  # fmt: skip
        seen[key], seen[f"{key} stream"] = [], []

        def reads(module: Any, given: Any, options: Any, k: str = f"{key} stream") -> None:
            seen[k].append(given[0] if given else options["hidden_states"])

        handles = [
            either.get_submodule(path).register_forward_hook(lambda m, a, o, k=key: seen[k].append(o)),
            either.get_submodule(block_path).register_forward_pre_hook(reads, with_kwargs=True),
        ]
        batches = case.batches(either, 4096)
        with torch.no_grad():
            for batch in batches:
                case.task.logits(either, batch)
        for handle in handles:
            handle.remove()
    error = total = 0.0
    for dense, ours, before, now, batch in zip(
        *(seen[f"{k}{s}"] for s in ("", " stream") for k in ("dense", "pruned")), batches, strict=True
    ):
        real = batch.real(target=False)
        wanted = dense + before - now
        error += float((wanted - ours)[real].square().sum())
        total += float(wanted[real].square().sum())
    assert refits[0].before == pytest.approx(error / total, rel=1e-6)


@pytest.mark.parametrize("name", ["bert-sequence", "t5-gated", "gpt2"])
def test_task_plans_remove_blocks(name: str) -> None:
    case = CASES[name]
    model = case.model()
    for removed in removals(case):
        for plan in (stock_plan(case, removed), without(uneven_plan(case, "head"), removed)):
            router = secateur.TaskPlans(model, {"task": plan})
            assert torch.equal(case.logits(router["task"]), case.logits(secateur.prune(model, plan).eval())), removed


@every_case
def test_which_blocks_may_go(case: Case) -> None:
    """Single blocks may go where `removals` says so; never all of a stack, nor more of an encoder than of its decoder."""
    model = case.model()
    alone = {removed[0] for removed in removals(case) if len(removed) == 1}
    assert {name for name in blocks(model) if may_go(model, [name])} == alone
    for stack in {block.stack for block in blocks(model).values()}:
        assert not may_go(model, [name for name in blocks(model) if name.startswith(stack)])


BAD: dict[str, tuple[str, list[str], str]] = {
    "all": ("bert-sequence", ["encoder.0", "encoder.1"], "expected 1 block of the encoder at least, got all but encoder.0, "),
    "decoder": ("t5-gated", ["decoder.0", "decoder.1"], "expected 1 block of the decoder at least, got all but decoder.0, "),
    "encoder": ("bart", ["encoder.0"], "expected 2 blocks of the encoder at least, got all but encoder.0"),
    "first": (
        "modernbert",
        ["encoder.0"],
        "expected blocks that a config of ModernBertForSequenceClassification can say, got all",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_blocks_that_cannot_go_are_refused(name: str) -> None:
    case, (model, plan) = CASES[BAD[name][0]], (CASES[BAD[name][0]].model(), whole(CASES[BAD[name][0]], BAD[name][1]))
    calls: list[Any] = [lambda: secateur.prune(model, plan), lambda: masked(model, plan).__enter__()]
    calls += [lambda: secateur.TaskPlans(model, {"t": plan})]
    calls += [lambda: secateur.recover_(model, model, case.task, case.examples, removed_blocks=plan.removed_blocks)]
    for call in calls:
        with pytest.raises(secateur.InputError) as raised:
            call()
        assert f"removed_blocks: {BAD[name][2]}" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_block_whose_number_scales_its_attention_is_refused() -> None:
    model: Any = CASES["gpt2"].model()
    model.config.scale_attn_by_inverse_layer_idx = True
    plan = replace(whole(CASES["gpt2"], ["decoder.0"]), fingerprint=fingerprint(model))
    with pytest.raises(secateur.InputError, match="removed_blocks: expected blocks that a config of GPT2LMHeadModel can say"):
        secateur.prune(model, plan)


def test_a_block_with_a_site_outside_the_plan_is_refused() -> None:
    case = CASES["bert-sequence"]
    ffn = whole(case, ["encoder.1"])
    kept = {name: units for name, units in ffn.items() if name.endswith("ffn")}
    partial = replace(ffn, kept=kept, sites=tuple(site for site in ffn.sites if site.name in kept))
    message = "removed_blocks: expected blocks whose sites are all in the plan, got one whose encoder.1.self_attention is not"
    for call in (lambda: secateur.prune(case.model(), partial), lambda: masked(case.model(), partial).__enter__()):
        with pytest.raises(secateur.InputError) as raised:
            call()
        assert str(raised.value) == message


def test_recovery_without_the_names_of_the_blocks_says_so() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    pruned = secateur.prune(model, stock_plan(case, ["encoder.0"]))
    with pytest.raises(
        secateur.InputError, match=r"^pruned: expected a model .* removed_blocks names blocks that its plan removed$"
    ):
        secateur.recover_(model, pruned, case.task, case.examples)
    with pytest.raises(secateur.InputError, match=r"^removed_blocks: expected some of encoder.0, encoder.1, got 'encoder.7'$"):
        secateur.recover_(model, pruned, case.task, case.examples, removed_blocks=["encoder.7"])
