"""Shapes in the whole flow: blocks removed as wholes, stock folders that plain transformers loads, and what a shape cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, scores_of
from command import Run, assert_refused

import secateur
from secateur.flow.choose import divergence
from secateur.flow.compress import _as_stock
from secateur.flow.within_budget import _faster
from secateur.planning.budget import Budget
from secateur.planning.latency_table import LatencyTable
from secateur.planning.plan import plans_alike


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


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2", "bart"])
def test_blocks_that_still_do_something_are_not_removed(name: str) -> None:
    case = CASES[name]
    assert secateur.removable_blocks(case.model(), case.task, case.examples) == []


@pytest.mark.parametrize("name", ["t5-gated", "llama", "qwen3", "gemma3"])
def test_a_model_without_a_block_is_stock_and_the_same(name: str) -> None:
    case, scores = CASES[name], scores_of(name)
    model = case.model()
    blocks = {site.block for site in scores.sites} & {"encoder.0", "decoder.0"}
    plan = plans_alike(scores, Budget.of(flops=0.4), removed_blocks=blocks)[0]
    pruned = secateur.prune(model, plan)
    verification = secateur.verify(model, pruned, plan, case.task, case.batches(model))
    assert verification.holds
    stock: Any = _as_stock(pruned)
    assert not hasattr(stock.config, "secateur")
    assert hasattr(pruned.config, "secateur")
    for batch in case.batches(model):
        assert torch.allclose(case.task.logits(stock, batch), case.task.logits(pruned, batch), atol=1e-5)


def test_alternatives_have_several_depths() -> None:
    scores = scores_of("t5-gated")
    plans = secateur.alternatives(scores, flops=0.5, shape="stock", removable=["encoder.1", "decoder.0"])
    gone = [{site.layer for site in plan.sites if not len(plan[site.name]) and site.stack == "encoder"} for plan in plans]
    assert {len(of_plan) for of_plan in gone} == {0, 1}
    assert all(plan.spread is not None and plan.spread.remaining["flops"] <= 0.5 + 1e-9 for plan in plans)
    assert len(set(plans)) == len(plans)


ALONE = """
import json, sys
sys.modules["secateur"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps([type(model).__module__, model(ids).logits[0, -1].tolist()]))
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
    ids = [[2, 5, 9, 7]]
    process = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), json.dumps(ids)], capture_output=True, text=True, check=True
    )
    module, logits = json.loads(process.stdout)
    assert module.startswith("transformers.models.llama")
    with torch.no_grad():
        expected = compressed.pruned(torch.tensor(ids)).logits[0, -1]
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)


def test_the_correction_by_time_keeps_the_shape_and_the_blocks() -> None:
    scores = scores_of("t5-gated")
    gone = {site.name for site in scores.sites if site.block == "encoder.0"}
    best = plans_alike(scores, Budget.of(flops=0.5), removed_blocks=["encoder.0"])[0]
    rows = {site.name: {units: 0.5 + units * 0.01 for units in range(1, site.units + 1)} for site in scores.sites}
    total = 5.0 + sum(max(row.values()) for row in rows.values())
    table = LatencyTable({}, scores.fingerprint, "head", 1, 8, 8, total, rows, {}, {0.01: 5.0, 1.0: 5.0})
    faster = _faster(best, scores, Budget.of(latency=total - 3), {"table": table, "shape": "stock"})
    assert {name for name, kept in faster.items() if not len(kept)} == gone
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
    assert_refused(
        run("prune m --data d.jsonl --plan p.json --shape stock --out bad"), "shape: expected any with a plan", "bad"
    )
