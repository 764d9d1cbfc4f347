"""Dry runs: the sizes of a model of 70 billion parameters, and of its pruned form, in seconds and without a weight."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, scores_of, uniform_plan

import secateur
from secateur.cli import main
from secateur.measuring import dry_run as sizing
from secateur.measuring.synthetic import forward_options, synthetic_batches
from secateur.model import cost

Run = Callable[[str], tuple[int, str, str]]

HIDDEN, LAYERS, HEADS, GROUPS, WIDTH, VOCABULARY = 8192, 80, 64, 8, 28672, 128256
LARGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "intermediate_size": WIDTH, "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in a folder that holds only `large`, a config of 70 billion parameters; returns the exit code, stdout and
    stderr."""
    monkeypatch.chdir(tmp_path)
    Path("large").mkdir()
    Path("large/config.json").write_text(json.dumps(LARGE))

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *line.split()])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return command


def layer_parameters(groups: int, width: int) -> int:
    """Parameters of one layer's projections, which have no biases."""
    head = HIDDEN // HEADS
    queries = groups * (HEADS // GROUPS) * head
    return HIDDEN * (2 * queries + 2 * groups * head) + 3 * HIDDEN * width


def parameters(groups: int, width: int) -> int:
    """Parameters of the whole model: two norms in each layer and one at the end, an embedding and an output head."""
    return LAYERS * (layer_parameters(groups, width) + 2 * HIDDEN) + HIDDEN + 2 * VOCABULARY * HIDDEN


def test_a_large_model_in_seconds(run: Run) -> None:
    started = time.process_time()
    code, out, _ = run("prune large --dry-run --params 0.5 --batch-sizes 1,2 --lengths 64 --json")
    assert time.process_time() - started < 60
    assert code == 0
    document = json.loads(out)
    dense, pruned = document["dense"], document["pruned"]
    assert dense["parameters"] == parameters(GROUPS, WIDTH) == 70_553_706_496
    assert dense["layer_parameters"] == LAYERS * layer_parameters(GROUPS, WIDTH)
    assert dense["weight_bytes"] == {"bfloat16": 2 * dense["parameters"], "float32": 4 * dense["parameters"]}
    assert dense["cache_bytes"] == {"decoder": LAYERS * 2 * GROUPS * (HIDDEN // HEADS) * 2}
    # Projections, attention's two products over all pairs of tokens, and the output head at the last position.
    batch, tokens = document["shape"]
    assert (batch, tokens) == (2, 64)
    layer_flops = 2 * tokens * layer_parameters(GROUPS, WIDTH) + 4 * tokens * tokens * HIDDEN
    assert dense["flops"] == batch * (LAYERS * layer_flops + 2 * HIDDEN * VOCABULARY)
    assert {site["kept"] for site in document["sites"] if site["kind"] == "ffn"} == {WIDTH // 2}
    assert pruned["parameters"] == parameters(GROUPS // 2, WIDTH // 2)
    assert document["stock"] is True
    assert document["attribution"]["weights"] > dense["weight_bytes"]["bfloat16"]
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["large", "large/config.json"]


def test_the_table_that_is_printed(run: Run) -> None:
    code, out, _ = run("prune large --dry-run --keep 0.5 --out d")
    assert code == 0
    assert "70,553,706,496" in out
    assert "a stock LlamaForCausalLM" in out
    assert "nothing was scored, measured or written" in out
    assert not Path("d").exists()


def test_sites_need_no_weights(run: Run) -> None:
    code, out, _ = run("sites large --sites ffn --json")
    assert code == 0
    assert [site["units"] for site in json.loads(out)["sites"]] == [WIDTH] * LAYERS


REFUSED = {
    "latency": ("--latency 5", "latency: expected keep, flops, params or memory in a dry run, which measures no time, got 5.0"),
    "speedup": ("--speedup 2", "speedup: expected keep, flops, params or memory in a dry run, which measures no time, got 2.0"),
    "knapsack": (
        "--flops 0.5 --allocation knapsack",
        "allocation: expected uniform in a dry run without scores, as other allocations need scores, got 'knapsack'",
    ),
    "global": ("--flops 0.5 --allocation global", "allocation: expected uniform in a dry run without scores"),
    "no budget": ("", "budget: expected exactly one of keep, flops, params, memory, speedup, latency, got none"),
    "scores of nothing": ("--flops 0.5 --scores s", "scores: no such file: 's'"),
    "sites of nothing": ("--flops 0.5 --sites encoder", "sites: 'encoder' selects none of the model's 160 sites"),
    "out of reach": ("--memory 0.01", "memory: expected at least 0."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(run: Run, name: str) -> None:
    options, expected = REFUSED[name]
    code, out, errors = run(f"prune large --dry-run {options}")
    assert code == 2
    assert errors.startswith(f"secateur: {expected}")
    assert (out, errors.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--keep 0.5 --out d", "data: expected --data with examples, which only --dry-run goes without, got none"),
        (
            "--keep 0.5 --data d.jsonl",
            "out: expected --out with a folder, which only --dry-run goes without, got none",
        ),
        ("--keep 0.5 --data d.jsonl --out d --scores s", "scores: expected --dry-run with it"),
    ],
)
def test_what_a_real_run_needs(run: Run, options: str, expected: str) -> None:
    code, _, errors = run(f"prune large {options}")
    assert code == 2
    assert errors.startswith(f"secateur: {expected}")


def shaped(case: Case) -> torch.nn.Module:
    """The case's model on the meta device."""
    with torch.device("meta"):
        return case.build().eval()


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_sizes_are_those_of_the_real_model(case: Case) -> None:
    """Compare parameters and FLOPs of a dry run, without weights, with those of the model that is really pruned."""
    model, result = case.model(), secateur.dry_run(shaped(case), keep=0.5, batch_size=2, length=8, max_tokens=32)
    scored, pruned = uniform_plan(case, "head"), secateur.prune(model, result.plan)
    assert {name: len(kept) for name, kept in result.plan.items()} == {name: len(kept) for name, kept in scored.items()}
    (batch,) = synthetic_batches(model, [2], [8])
    for sizes, real in ((result.dense, model), (result.pruned, pruned)):
        assert sizes.parameters == cost.parameters(real)
        assert sizes.flops == cost.flops(real, {**batch, **forward_options(real)})
    assert result.stock is not hasattr(pruned.config, "secateur")


def test_scores_and_plans_decide_which_units_stay() -> None:
    case = CASES["llama"]
    by_scores = secateur.dry_run(shaped(case), scores=scores_of("llama"), flops=0.5, allocation="knapsack")
    assert by_scores.plan.budget_json()["allocation"] == "knapsack"
    plan = secateur.plan(scores_of("llama"), flops=0.5, allocation="knapsack")
    again = secateur.dry_run(shaped(case), given=plan)
    assert again.to_json() == by_scores.to_json()
    assert not again.stock  # Layers of unequal width.


@pytest.mark.parametrize(("flops", "removed"), [(0.8, 0), (0.4, 1)])
def test_stock_removes_as_few_blocks_as_the_budget_allows(flops: float, removed: int) -> None:
    case = CASES["bert-sequence"]
    result = secateur.dry_run(shaped(case), flops=flops, shape="stock", length=8, batch_size=2)
    assert result.plan.removed_blocks == ("encoder.1",)[:removed]
    assert result.stock
    pruned = secateur.prune(case.model(), result.plan)
    assert result.pruned.parameters == cost.parameters(pruned)
    assert result.to_json()["plan"].get("removed_blocks", []) == ["encoder.1"][:removed]


def test_a_plan_beside_a_budget_or_scores_is_refused() -> None:
    plan = secateur.plan(scores_of("llama"), flops=0.5)
    for options in ({"flops": 0.5}, {"shape": "stock"}, {"scores": scores_of("llama")}):
        with pytest.raises(secateur.InputError, match=r"^given: expected a plan alone, .* got both: (flops|shape|scores)$"):
            secateur.dry_run(shaped(CASES["llama"]), given=plan, **options)


def test_a_model_with_weights_is_refused() -> None:
    with pytest.raises(secateur.InputError, match=r"^model: expected a model on the meta device"):
        secateur.dry_run(CASES["llama"].model(), keep=0.5)


MEASURE = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from cases import LABELS, WORDS, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
import secateur
from secateur.measuring.dry_run import attribution_memory

torch.set_num_threads(1)
tokens, length = 4096, 256
config = LlamaConfig(
    vocab_size=40, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512
)
with torch.device("meta"):
    shaped = LlamaForCausalLM(config).eval()
predicted = attribution_memory(shaped, secateur.sites(shaped), tokens, length)
model, task = LlamaForCausalLM(config).eval(), secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)
text = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(length - 2)) for i in range(tokens // length)]
rows = [{"input": line, "target": LABELS[i % 3]} for i, line in enumerate(text)]
secateur.attribute(model, task, rows[:2], max_tokens=length)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
secateur.attribute(model, task, rows, max_tokens=tokens)
status = open("/proc/self/status").read().splitlines()  # getrusage would include the parent process's memory.
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
print(json.dumps([predicted.activations, peak - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from Linux")
def test_the_memory_is_within_a_factor_of_the_measured_one() -> None:
    """The factor is 1.4. The measured memory is the process's peak, less what it had with the model loaded."""
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parents[1] / "support")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    predicted, measured = json.loads(result.stdout)
    assert predicted > 100e6
    assert measured / 1.4 < predicted < measured * 1.4


def test_the_meta_device_counts_the_bytes_of_a_real_one() -> None:
    """The same pass with values has the same peak of live bytes."""
    peaks: dict[str, Any] = {}
    for device in ("meta", "cpu"):
        with torch.device(device), sizing._LiveBytes() as live:
            weight = torch.ones(64, 64, requires_grad=True)
            hidden = (torch.ones(32, 64) @ weight).relu() @ weight
            hidden.sum().backward()  # type: ignore[no-untyped-call]
            del hidden
        peaks[device] = live.peak
    assert peaks["meta"] == peaks["cpu"]
    # At least the input, the weight, the product, its positive part and the second product are alive at once.
    assert peaks["cpu"] >= 4 * (64 * 64 + 4 * 32 * 64)
