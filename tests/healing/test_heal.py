"""heal: nearer to the teacher, never worse, repeatable, and without any other change."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, uniform_plan
from healing import NAMES, pruned_of, rows_of, state
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import secateur
from secateur import InputError
from secateur.healing.lessons import Lessons
from secateur.model.blocks import blocks
from secateur.model.undisturbed import undisturbed
from secateur.recovery.matching import blocks_of_dense
from secateur.recovery.targets import HELD
from secateur.support.tensors import same_tensors

FAST: dict[str, Any] = {"epochs": 3, "batch_size": 4}


@pytest.mark.parametrize("name", NAMES)
def test_predictions_come_nearer_to_the_teachers(name: str) -> None:
    case = CASES[name]
    model = case.model()
    pruned = pruned_of(case, model)
    before, dense = state(pruned), state(model)
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **FAST)
    assert healed.after < 0.95 * healed.before
    assert [step for step, _ in healed.history] == [8, 16, 24]
    assert healed.after == pytest.approx(min(divergence for _, divergence in healed.history))
    assert healed.examples == {"fitted": 32, "held_out": 8}
    assert same_tensors(state(pruned), before)
    assert same_tensors(state(model), dense)


@pytest.mark.parametrize("name", ["t5-relu", "bert-sequence"])
def test_only_the_values_of_weights_change(name: str) -> None:
    case = CASES[name]
    model = case.model()
    pruned = pruned_of(case, model).train()
    frozen = next(iter(pruned.parameters())).requires_grad_(False)
    config = pruned.config.to_dict()  # type: ignore[union-attr, operator]
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **FAST).model
    assert healed.training
    assert pruned.training
    assert not frozen.requires_grad
    assert healed.config.to_dict() == config  # type: ignore[union-attr, operator]
    assert [p.requires_grad for p in healed.parameters()] == [p.requires_grad for p in pruned.parameters()]
    ours, theirs = healed.state_dict(), pruned.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    for buffer, tensor in healed.named_buffers():
        assert torch.equal(tensor, pruned.get_buffer(buffer))
    assert len(list(healed.parameters())) == len(list(pruned.parameters()))  # Tied weights stay tied.
    changed = [n for n, p in healed.named_parameters() if p.numel() and not torch.equal(p, pruned.get_parameter(n))]
    assert len(changed) > 0.9 * sum(bool(p.numel()) for p in pruned.parameters())


def test_one_seed_gives_one_model() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    pruned = pruned_of(case, model)
    one, two, other = (
        secateur.heal(pruned, model, case.task, rows_of(case), seed=seed, **FAST).model.state_dict() for seed in (1, 1, 2)
    )
    assert same_tensors(one, two)
    assert not same_tensors(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_that_destroys_gives_back_the_start(name: str) -> None:
    case = CASES[name]
    model = case.model()
    pruned = pruned_of(case, model)
    healed = secateur.heal(pruned, model, case.task, rows_of(case), learning_rate=30.0, **FAST)
    assert healed.after == healed.before
    assert min(divergence for _, divergence in healed.history) > healed.before
    assert same_tensors(healed.model.state_dict(), pruned.state_dict())
    assert "no evaluation was better than the start" in str(healed)


def test_the_training_ends_when_it_does_not_become_better(tmp_path: Path) -> None:
    """The same call again trains no further."""
    case = CASES["llama"]
    model = case.model()
    given = {**FAST, "epochs": 20, "learning_rate": 0.3, "training": {"lr_scheduler_type": "constant"}, "patience": 2}
    pruned = pruned_of(case, model)
    healed = secateur.heal(pruned, model, case.task, rows_of(case), checkpoints=tmp_path / "run", **given)
    values = [divergence for _, divergence in healed.history]
    assert len(values) < 20
    assert len(values) - 1 - values.index(min(values)) == 2
    again = secateur.heal(pruned, model, case.task, rows_of(case), checkpoints=tmp_path / "run", **given)
    assert again.history == healed.history
    assert same_tensors(again.model.state_dict(), healed.model.state_dict())


def test_half_precision_is_trained_in_float32_and_given_back() -> None:
    case = CASES["llama"]
    model = case.model(torch.bfloat16)
    pruned = pruned_of(case, model)
    healed = secateur.heal(pruned, model, case.task, rows_of(case), learning_rate=1e-4, **FAST)
    assert {p.dtype for p in healed.model.parameters()} == {torch.bfloat16}
    assert healed.after < healed.before


@pytest.mark.parametrize("name", NAMES)
def test_rebuilt_modules_are_trained_and_folders_load_again(name: str, tmp_path: Path) -> None:
    """Heads of unequal width give ScatterLinear and GatherLinear, whose slots are buffers."""
    case = CASES[name]
    model = case.model()
    scores = secateur.attribute(model, case.task, case.examples, unit="channel")
    pruned = secateur.prune(model, secateur.plan(scores, keep=0.5))
    healed = secateur.heal(pruned, model, case.task, rows_of(case), **FAST)
    assert healed.after < healed.before
    around = [path for path, module in healed.model.named_modules() if hasattr(module, "slots")]
    assert around
    for path in around:
        assert not torch.equal(*(m.get_submodule(path).linear.weight for m in (healed.model, pruned)))  # type: ignore[arg-type, union-attr]
        assert torch.equal(*(m.get_submodule(path).slots for m in (healed.model, pruned)))  # type: ignore[arg-type]
    secateur.save(healed.model, tmp_path / "folder", tokenizer=case.task.reader)
    assert torch.equal(case.logits(secateur.load(tmp_path / "folder").eval()), case.logits(healed.model))
    if name == "t5-gated":
        stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
        assert torch.equal(case.logits(stock.eval()), case.logits(healed.model))


@pytest.mark.parametrize("name", ["t5-relu", "bert-sequence", "llama"])
def test_all_labels_of_inputs_without_targets(name: str) -> None:
    case = CASES[name]
    model = case.model()
    inputs = [{"input": row["input"]} for row in rows_of(case)]
    healed = secateur.heal(pruned_of(case, model), model, case.task, inputs, targets="all", **FAST)
    assert healed.after < healed.before


def test_the_teachers_own_texts_are_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["t5-gated"]
    model = case.model()
    task = secateur.TextToText(case.task.reader)
    inputs = [{"input": row["input"]} for row in rows_of(case)]
    with undisturbed(model), torch.inference_mode():
        told = [row["prediction"] for row in task.predictions(model, inputs, 4096, 64)]
    given = [{**row, "target": text} for row, text in zip(inputs, told, strict=True) if text]
    assert len(given) >= 10
    pruned = pruned_of(case, model)
    one = secateur.heal(pruned, model, task, inputs, targets="teacher", **FAST)
    two = secateur.heal(pruned, model, task, given, **FAST)
    assert same_tensors(one.model.state_dict(), two.model.state_dict())
    assert one.after < one.before


@pytest.mark.parametrize("name", NAMES)
def test_the_states_behind_blocks_count(name: str) -> None:
    """The states come nearer to the teacher's than without their weight in the loss."""
    case = CASES[name]
    model = case.model()
    pruned, rows = pruned_of(case, model), rows_of(case)
    distances = []
    for weight in (0.0, 30.0):
        healed = secateur.heal(pruned, model, case.task, rows, hidden_weight=weight, learning_rate=3e-3, **FAST).model
        distances.append(float((last_states(case, healed) - last_states(case, model)).norm()))
    assert distances[1] < distances[0]


def last_states(case: Case, model: nn.Module) -> torch.Tensor:
    """Return the states behind the last block for one batch."""
    (batch,) = case.batches(model, max_tokens=10_000)
    block = list(blocks(model).values())[-1]
    seen: list[Any] = []
    handle = model.get_submodule(block.path).register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        case.task.logits(model, batch)
    handle.remove()
    return torch.as_tensor(seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])


@pytest.mark.parametrize("name", [*NAMES, "bert-token"])
def test_outputs_that_are_computed_anew_give_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    pruned = pruned_of(case, model)
    items = case.task.items(model, case.examples)
    pairs = blocks_of_dense(model, pruned, ())
    losses = []
    for held in (HELD, 0):
        monkeypatch.setattr("secateur.healing.lessons.HELD", held)
        with undisturbed(model), undisturbed(pruned):
            lessons = Lessons(model, case.task, items, pairs, max_tokens=24)
            losses.append([float(lessons.loss(pruned, [5, 1, 3], 2.0)), lessons.divergence(pruned)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] > 0


def refused(case: Case, match: str, **given: Any) -> None:
    """Check that a call of `heal` is refused with one line."""
    model = given.pop("teacher", None) or case.model()
    pruned = given.pop("pruned", None) or pruned_of(case, model)
    with pytest.raises(InputError, match=match) as caught:
        secateur.heal(pruned, model, given.pop("task", case.task), given.pop("examples", rows_of(case)), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"targets": "truth"}, r"^targets: expected one of labels, all, teacher, got 'truth'"),
        ({"epochs": 1, "minutes": 1}, r"^epochs: expected epochs or minutes, got both"),
        ({"epochs": 0}, r"^epochs: expected a positive number, got 0"),
        ({"minutes": float("nan")}, r"^minutes: expected a positive number, got nan"),
        ({"minutes": 1e-9}, r"^minutes: expected at least [\d.e-]+, for one step and its evaluation, got 1e-09"),
        ({"learning_rate": 0}, r"^learning_rate: expected a positive number, got 0"),
        ({"hidden_weight": -1}, r"^hidden_weight: expected a positive number, got -1"),
        ({"batch_size": 0}, r"^batch_size: expected a whole number from 1"),
        ({"patience": 1.5}, r"^patience: expected a whole number"),
        ({"seed": -1}, r"^seed: expected a whole number from 0"),
        ({"blockwise": 1}, r"^blockwise: expected True or False, got 1"),
        ({"training": {"max_steps": 3}}, r"^training: expected values of TrainingArguments other than "),
        ({"training": {"optim": "nosuch"}}, r"^training: "),
        ({"progress": 3}, r"^progress: "),
        ({"examples": [{"input": "a cat", "target": "yes"}] * 9}, r"^examples: expected at least 10, of which .*, got 9"),
        ({"checkpoints": "no/such/parent"}, r"^checkpoints: "),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(CASES["t5-relu"], match, **given)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_each_other_are_refused() -> None:
    case, t5 = CASES["t5-relu"], CASES["t5-relu"].model()
    refused(
        case,
        r"^teacher: expected the dense model that the pruned one was made from, got the pruned model",
        pruned=t5,
        teacher=t5,
    )
    refused(
        case, r"^teacher: expected a T5ForConditionalGeneration, .*, got a BartFor", teacher=CASES["bart"].model(), pruned=t5
    )
    larger = copy.deepcopy(t5)
    larger.resize_token_embeddings(100)  # type: ignore[operator]
    refused(case, r"^teacher: expected the pruned model's vocab_size \d+, got 100", teacher=larger, pruned=t5)
    router = secateur.TaskPlans(t5, {"one": uniform_plan(case, "head")})
    refused(
        case,
        r"^pruned: expected a model with weights of its own, .* as the models of TaskPlans do",
        teacher=t5,
        pruned=router["one"],
    )
    with torch.device("meta"):
        empty = case.build()
    refused(case, r"^model: expected weights that have values", teacher=t5, pruned=empty)
    deeper = secateur.delete_layers(t5, ["encoder.1"])
    refused(case, r"^pruned: .* with other branches; removed_blocks", teacher=t5, pruned=deeper, blockwise=True)


def test_a_model_that_lost_blocks_is_healed() -> None:
    case = CASES["t5-relu"]
    model = case.model()
    pruned = secateur.delete_layers(model, ["encoder.1"])
    healed = secateur.heal(pruned, model, case.task, rows_of(case), removed_blocks=["encoder.1"], blockwise=True, **FAST)
    assert healed.after < healed.before


def test_minutes_are_kept() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    healed = secateur.heal(pruned_of(case, model), model, case.task, rows_of(case), minutes=0.05, patience=10**6)
    assert healed.steps > 0
    assert healed.seconds < 6  # 3 and what a slow machine adds.
    assert healed.after <= healed.before


TWO = """
import sys
import torch
from cases import CASES
from healing import pruned_of, rows_of
import secateur
from safetensors.torch import save_file

torch.set_num_threads(1)
case = CASES["llama"]
model = case.model()
given = {"batch_size": 2, "checkpoints": "run", "training": {"ddp_backend": "gloo"}, sys.argv[1]: float(sys.argv[2])}
healed = secateur.heal(pruned_of(case, model), model, case.task, rows_of(case), **given)
assert torch.distributed.get_world_size() == 2
assert healed.after < healed.before
rank = torch.distributed.get_rank()
save_file({name: tensor.clone() for name, tensor in healed.model.named_parameters()}, f"{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "amount"), [("epochs", 3), ("minutes", 0.1)])
def test_two_processes_train_one_model(unit: str, amount: float, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "script.py",
        unit,
        str(amount),
    ]
    result = subprocess.run(command, env=variables(), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert same_tensors(*(load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)))


def variables() -> dict[str, str]:
    """Return the environment of a new process that imports what the tests share."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


SCRIPT = """
import os, signal, sys
import torch
from cases import CASES
from healing import pruned_of, rows_of
import secateur
from safetensors.torch import save_file

torch.set_num_threads(1)
case = CASES[sys.argv[1]]
model = case.model()
stop = int(sys.argv[4])

def progress(done, total):
    if total == 16 and done == stop:
        os.kill(os.getpid(), signal.SIGKILL)

healed = secateur.heal(
    pruned_of(case, model), model, case.task, rows_of(case), epochs=2, batch_size=4, blockwise=True, checkpoints=sys.argv[2],
    progress=progress,
)
assert healed.after < healed.before
save_file({name: tensor.clone() for name, tensor in healed.model.named_parameters()}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence"])
def test_a_killed_run_goes_on_and_ends_in_the_same_weights(name: str, tmp_path: Path) -> None:
    """The process is killed in the middle of the second epoch, a few steps behind a checkpoint."""

    def process(folder: str, out: str, stop: int) -> int:
        command = [sys.executable, "-c", SCRIPT, name, folder, out, str(stop)]
        return subprocess.run(command, env=variables(), cwd=tmp_path, timeout=600, check=False).returncode

    assert process("whole", "whole.safetensors", -1) == 0
    assert process("killed", "killed.safetensors", 11) == -signal.SIGKILL
    assert not (tmp_path / "killed.safetensors").exists()
    assert process("killed", "killed.safetensors", -1) == 0
    assert same_tensors(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "killed.safetensors"))
    # Once more from the checkpoint of the last step.
    assert process("killed", "again.safetensors", -1) == 0
    assert same_tensors(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "again.safetensors"))


def test_a_stopped_run_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    pruned, rows = pruned_of(case, model), rows_of(case)

    def progress(done: int, total: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    whole = secateur.heal(pruned, model, case.task, rows, **FAST)
    with pytest.raises(KeyboardInterrupt):
        secateur.heal(pruned, model, case.task, rows, checkpoints=tmp_path / "run", progress=progress, **FAST)
    with pytest.raises(InputError, match=r"^seed: .* was begun with 0, got 1"):
        secateur.heal(pruned, model, case.task, rows, checkpoints=tmp_path / "run", seed=1, **FAST)
    with pytest.raises(InputError, match=r"^rows: .*the examples have changed"):
        secateur.heal(pruned, model, case.task, rows[1:], checkpoints=tmp_path / "run", **FAST)
    healed = secateur.heal(pruned, model, case.task, rows, checkpoints=tmp_path / "run", **FAST)
    assert same_tensors(healed.model.state_dict(), whole.model.state_dict())
    assert healed.history == whole.history


def test_gradient_accumulation_and_bfloat16() -> None:
    case = CASES["llama"]
    model = case.model()
    training = {"gradient_accumulation_steps": 2, "bf16": True}
    healed = secateur.heal(pruned_of(case, model), model, case.task, rows_of(case), training=training, **FAST)
    assert healed.steps == 12
    assert healed.after < healed.before
