"""Shapes in the whole flow: blocks removed as wholes, stock folders that plain transformers loads, and what a shape cost."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, scores_of, sentences
from command import Run, assert_refused
from hand_layers import deleted_by_hand
from torch import nn

import secateur
from secateur.flow import depth
from secateur.flow.compress import _as_stock
from secateur.flow.within_budget import _faster
from secateur.measuring.divergence import divergence
from secateur.model.blocks import blocks
from secateur.model.families import branches
from secateur.planning.budget import Budget
from secateur.planning.latency_table import LatencyTable
from secateur.planning.plan import plans_alike
from secateur.recovery.targets import HELD


@pytest.mark.parametrize("name", ["t5-gated", "llama", "gemma3"])
def test_blocks_go_in_the_order_of_the_least_change(name: str) -> None:
    """Each step equals the best of all models from which one more block is physically deleted."""
    case = CASES[name]
    model = case.model().eval()
    order = secateur.removable_blocks(model, case.task, case.examples, max_tokens=60)
    assert order
    batches = case.batches(model)
    gone: list[str] = []
    for name_of_block in order:
        changes = {}
        for other in secateur.layer_scores(model, case.task, case.examples):
            left = {n for n in secateur.layer_scores(model, case.task, case.examples) if n not in (*gone, other)}
            encoder, decoder = (sum(n.startswith(stack) for n in left) for stack in ("encoder", "decoder"))
            if other not in gone and decoder and (name != "t5-gated" or encoder >= decoder):
                changes[other] = divergence(model, secateur.delete_layers(model, [*gone, other]), case.task, batches)
        assert changes[name_of_block] == pytest.approx(min(changes.values()), rel=1e-3, abs=1e-7)
        gone.append(name_of_block)


def deeper(name: str, count: int) -> nn.Module:
    """Return the model of a case with other weights and this many blocks in each stack."""
    model: Any = CASES[name].build()
    for field in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(model.config, field):
            setattr(model.config, field, count)
    torch.manual_seed(1)
    built: nn.Module = type(model)(model.config)
    return built.eval()


@pytest.mark.parametrize("name", ["bert-sequence", "distilbert", "gpt2", "opt", "opt-post-norm", "vit", "bart"])
def test_the_order_is_that_of_models_without_the_modules(name: str) -> None:
    """Post-norm blocks and blocks with biases, taken out of their lists. The least change known is computed anew."""
    case, model = CASES[name], deeper(name, 4)
    batches, names = case.batches(model), list(blocks(model))

    def may_go(gone: list[str]) -> bool:
        left = [n for n in names if n not in gone]
        encoder, decoder = (sum(n.startswith(stack) for n in left) for stack in ("encoder", "decoder"))
        return name != "bart" or encoder >= decoder

    gone: list[str] = []
    known = dict.fromkeys(names, 0.0)
    while len(gone) < len(names) // 2:
        allowed, fresh = [n for n in known if may_go([*gone, n])], set()
        while (least := min(allowed, key=known.__getitem__)) not in fresh:
            known[least] = divergence(model, deleted_by_hand(case, model, [*gone, least]), case.task, batches)
            fresh.add(least)
        gone.append(least)
        del known[least]
        assert len(fresh) == len(allowed) or len(gone) > 1  # The first one is the best of all.
    assert secateur.removable_blocks(model, case.task, case.examples, max_tokens=60) == gone


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bart", "llama"])
def test_held_states_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = CASES[name], deeper(name, 3)
    runs: list[int] = []
    first = next(iter(blocks(model).values()))
    model.get_submodule(branches(model)[f"{first.name}.ffn"].output).register_forward_hook(lambda *_: runs.append(1))
    orders, counts = [], []
    for held in (HELD, 0):
        monkeypatch.setattr(depth, "HELD", held)
        orders.append(secateur.removable_blocks(model, case.task, case.examples, max_tokens=60))
        counts.append(len(runs))
        runs.clear()
    assert orders[0] == orders[1]
    assert counts[0] < counts[1]


def test_a_shared_prefix_changes_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's first tokens run once for each pass, with the blocks gone, and no example runs on them."""
    case, model = CASES["llama"], deeper("llama", 4)
    head = "the cat sat on the mat and the dog ran under the big red tree so the bird flew away"
    task = secateur.CausalLM(case.task.reader, labels=LABELS, prompt=f"{head} {{input}} is")
    rows = [{"input": text, "target": LABELS[k % len(LABELS)]} for k, text in enumerate(sentences(12, seed=3))]
    widths: list[int] = []
    block = model.get_submodule(next(iter(blocks(model).values())).path)
    block.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    order = secateur.removable_blocks(model, task, rows)
    assert max(widths) == len(head.split()) + 1  # With the start mark.
    monkeypatch.setattr(task, "sharing", nullcontext)
    assert secateur.removable_blocks(model, task, rows) == order
    assert max(widths) > len(head.split()) + 1


def test_no_block_is_removed_where_a_config_cannot_say_it() -> None:
    case = CASES["gpt2"]
    model: Any = case.model()
    model.config.scale_attn_by_inverse_layer_idx = True
    assert secateur.removable_blocks(model, case.task, case.examples) == []


@pytest.mark.parametrize("name", ["t5-gated", "llama", "qwen3", "gemma3"])
def test_a_plan_of_an_earlier_version_gives_a_stock_model(name: str) -> None:
    """Such a plan keeps no unit in a block, and does not say that the block is removed."""
    case, scores = CASES[name], scores_of(name)
    model = case.model()
    removed = {site.block for site in scores.sites} & {"encoder.0", "decoder.0"}
    plan = plans_alike(scores, Budget.of(flops=0.4), removed_blocks=removed)[0]
    without = secateur.prune(model, plan)
    earlier = secateur.prune(model, replace(plan, removed_blocks=()))
    stock: Any = _as_stock(earlier)
    assert not hasattr(stock.config, "secateur")
    assert hasattr(earlier.config, "secateur")
    assert _as_stock(without) is without
    for batch in case.batches(model):
        for other in (earlier, stock):
            assert torch.allclose(case.task.logits(other, batch), case.task.logits(without, batch), atol=1e-5)


def test_alternatives_have_several_depths() -> None:
    scores = scores_of("t5-gated")
    plans = secateur.alternatives(scores, flops=0.5, shape="stock", removable=["encoder.1", "decoder.0"])
    assert {plan.removed_blocks for plan in plans} >= {(), ("encoder.1",)}
    assert all(bool(len(plan[site.name])) != (site.block in plan.removed_blocks) for plan in plans for site in plan.sites)
    assert all(plan.spread is not None and plan.spread.remaining["flops"] <= 0.5 + 1e-9 for plan in plans)
    assert len(set(plans)) == len(plans)


def test_a_block_with_unscored_sites_stays() -> None:
    scores = scores_of("llama").of("ffn,decoder.1")
    plans = secateur.alternatives(scores, flops=0.6, shape="stock", removable=["decoder.0", "decoder.1"])
    assert {plan.removed_blocks for plan in plans} == {(), ("decoder.1",)}


def test_blocks_that_are_not_among_the_given_ones_stay() -> None:
    """BART's encoder keeps as many blocks as its decoder, so none of its blocks may go alone."""
    case, model = CASES["bart"], deeper("bart", 2)
    order = secateur.removable_blocks(model, case.task, case.examples, among=["encoder.0", "encoder.1"])
    assert order == []
    order = secateur.removable_blocks(model, case.task, case.examples, among=["encoder.0", "decoder.1"])
    assert order == ["decoder.1", "encoder.0"]
    with pytest.raises(secateur.InputError, match=r"^among: expected some of encoder.0, .* got 'encoder'$"):
        secateur.removable_blocks(model, case.task, case.examples, among=["encoder"])


def test_compress_keeps_blocks_whose_sites_are_not_all_selected() -> None:
    case, model = CASES["llama"], deeper("llama", 3)
    compressed = secateur.compress(
        model, case.examples, case.task, flops=0.7, shape="stock", select="ffn", align=1, batch_sizes=(1,),
        lengths=(8,), recoveries=[None],
    )  # fmt: skip
    assert compressed.plan.removed_blocks == ()
    assert not hasattr(compressed.pruned.config, "secateur")


@pytest.mark.parametrize(
    ("name", "chosen", "field"),
    [("t5-gated", "encoder", "num_heads"), ("llama", "0", "num_attention_heads"), ("bert-sequence", "0", "intermediate_size")],
)
def test_a_part_of_the_layers_that_share_a_field_is_refused_before_the_scoring(name: str, chosen: str, field: str) -> None:
    case, model = CASES[name], deeper(name, 3)
    message = rf"^sites: expected all sites of a stock model's {field}, got \S+0\.\S+ without \S+\.\S+, which has the same"
    calls: list[Any] = []
    with pytest.raises(secateur.InputError, match=message):
        secateur.compress(model, case.examples, case.task, flops=0.7, shape="stock", select=chosen, say=calls.append)
    assert calls == []
    with torch.device("meta"):
        sizes = type(model)(model.config)
    with pytest.raises(secateur.InputError, match=message):
        secateur.dry_run(sizes, flops=0.7, shape="stock", select=chosen)


ALONE = """
import json, sys
sys.modules["secateur"] = None
import torch, transformers
model = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps([type(model).__module__, model(ids).logits[0].flatten().tolist()]))
"""


def test_compress_to_a_stock_folder_without_code(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = case.model().eval()
    compressed = secateur.compress(
        model, case.examples, case.task, flops=0.45, shape="stock", evaluation=case.examples, out=tmp_path / "out",
        batch_sizes=(1,), lengths=(8,), align=1,
    )  # fmt: skip
    assert compressed.plan.spread is not None
    assert compressed.plan.spread.remaining["flops"] <= 0.45 + 1e-9
    assert not list((tmp_path / "out").glob("*.py"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["plan"]["shape"] == "stock"
    free = secateur.compress(
        model, case.examples, case.task, flops=0.45, evaluation=case.examples, batch_sizes=(1,), lengths=(8,), align=1
    )
    assert report["any_shape"]["evaluation"]["value"] == free.comparison.evaluation["pruned"].value
    assert any(line.startswith("shape stock: accuracy ") for line in compressed.lines())
    assert_loads_alone(compressed.pruned, tmp_path / "out", "AutoModelForCausalLM")


def assert_loads_alone(model: Any, folder: Path, auto_class: str) -> None:
    """A process without secateur loads the folder by a class of transformers, and gets the model's logits."""
    ids = [[2, 5, 9, 7]]
    command = [sys.executable, "-c", ALONE, str(folder), json.dumps(ids), auto_class]
    module, logits = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert module.startswith(f"transformers.models.{model.config.model_type}")
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits[0].flatten()
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)


def test_compress_removes_blocks_of_bert(tmp_path: Path) -> None:
    """The budget is below what the heads of four blocks take, so blocks must go. The folder's plan gives the same model."""
    case, model = CASES["bert-sequence"], deeper("bert-sequence", 4)
    options: dict[str, Any] = {"batch_sizes": (1,), "lengths": (8,)}
    compressed = secateur.compress(
        model, case.examples, case.task, flops=0.45, shape="stock", align=1, out=tmp_path / "out", evaluation=case.examples,
        **options,
    )  # fmt: skip
    plan = compressed.plan
    assert plan.spread is not None
    assert plan.spread.remaining["flops"] <= 0.45 + 1e-9
    assert plan.removed_blocks
    assert len(blocks(compressed.pruned)) == 4 - len(plan.removed_blocks)
    assert f"removed blocks: {', '.join(plan.removed_blocks)}" in compressed.lines()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["plan"]["removed_blocks"] == list(plan.removed_blocks)
    assert f"| blocks | 4 | {4 - len(plan.removed_blocks)} |" in (tmp_path / "out/README.md").read_text()
    assert not list((tmp_path / "out").glob("*.py"))
    assert_loads_alone(compressed.pruned, tmp_path / "out", "AutoModelForSequenceClassification")
    again = secateur.compress(
        model, case.examples, case.task, plan=tmp_path / "out/plan.json", recoveries=[compressed.candidates[0].recovery],
        **options,
    )  # fmt: skip
    assert again.plan == plan
    assert torch.equal(case.logits(again.pruned), case.logits(compressed.pruned))


def test_the_correction_by_time_keeps_the_shape_and_the_blocks() -> None:
    scores = scores_of("t5-gated")
    gone = {site.name for site in scores.sites if site.block == "encoder.0"}
    best = plans_alike(scores, Budget.of(flops=0.5), removed_blocks=["encoder.0"])[0]
    rows = {site.name: {units: 0.5 + units * 0.01 for units in range(1, site.units + 1)} for site in scores.sites}
    total = 5.0 + sum(max(row.values()) for row in rows.values())
    table = LatencyTable({}, scores.fingerprint, "head", 1, 8, 8, total, rows, {}, {0.01: 5.0, 1.0: 5.0})
    faster = _faster(best, scores, Budget.of(latency=total - 3), {"table": table, "shape": "stock"})
    assert {name for name, kept in faster.items() if not len(kept)} == gone
    assert faster.removed_blocks == ("encoder.0",)
    assert len({len(faster[site.name]) for site in faster.sites if not site.is_head} - {0}) == 1


def test_the_commands_take_a_shape(run: Run) -> None:
    case = CASES["bert-sequence"]
    secateur.save(case.model(), "m", tokenizer=case.task.reader)
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.examples))
    line = "prune m --data d.jsonl --flops 0.8 --batch-sizes 1 --lengths 8 --align 1"
    result = run(f"{line} --shape stock --eval d.jsonl --out out --json")
    assert result.code == 0, result.errors
    assert result.document["plan"]["shape"] == "stock"
    assert "any_shape" in result.document
    assert "secateur" not in json.loads(Path("out/config.json").read_text())
    assert_refused(run(f"{line} --shape round --out bad"), "shape: expected one of any, per-layer, uniform, stock", "bad")
    assert_refused(run(f"{line} --shape stock --unit channel --out bad"), "shape: expected any with a plan, and with", "bad")
    assert run("attribute m --data d.jsonl --out s.safetensors").code == 0
    assert run("plan s.safetensors --flops 0.8 --shape stock --out p.json").code == 0
    assert json.loads(Path("p.json").read_text())["budget"]["shape"] == "stock"
    for options in ("--data d.jsonl --out bad", "--dry-run"):
        refused = run(f"prune m {options} --plan p.json --shape stock")
        assert_refused(refused, "shape: expected none with --plan, where it has no effect, got 'stock'", "bad")
