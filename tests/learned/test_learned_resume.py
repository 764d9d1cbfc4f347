"""A resumed training ends like an uninterrupted one, and two processes train one set of masks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from encoders import NAMES, SETTINGS, TASKS, arguments, encoder, examples, pair_tokenizer, same, state, tokenizer
from safetensors.torch import load_file
from torch import Tensor

from secateur import InputError
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.multitask.training import features_of, train
from secateur.support.trainer import last_checkpoint

RATES = {"weights": 1e-3, "scores": 0.3, "sigma": 0.02}


class Stopped(Exception):
    """Raised to end a run in the middle."""


def trained(kind: str, folder: Path, setting: dict[str, Any], *, stop: int | None = None, **options: Any) -> dict[str, Tensor]:
    """Train, or resume a training, and return the final state. Dropout is on: the Trainer's checkpoints restore its state.

    stop: Raise `Stopped` after this many steps.
    """
    pruning = MultitaskPruning(encoder(kind), TASKS, density=0.3, **setting)
    pieces = pair_tokenizer() if kind == "bert-sequence" else tokenizer(kind)
    features = features_of(pruning, pieces, examples(), 24)

    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Stopped

    given = arguments(folder, **{"save_strategy": "steps", "save_steps": 2, **options})
    train(pruning, features, given, tokenizer=pieces, learning_rates=RATES, resume=True, progress=progress)
    return state(pruning)


CASES = [("bert-sequence", number) for number in (2, 4)] + [("t5-gated", 0), ("t5-relu", 7)]


@pytest.mark.parametrize(("kind", "number"), CASES, ids=[f"{kind}-{NAMES[number]}" for kind, number in CASES])
def test_a_run_that_goes_on_ends_like_one_that_never_stopped(kind: str, number: int, tmp_path: Path) -> None:
    """Weights, scores and masks are bit-identical. The run stops in the middle of the schedule, a step after a checkpoint."""
    setting = SETTINGS[number]
    whole = trained(kind, tmp_path / "whole", setting)
    with pytest.raises(Stopped):
        trained(kind, tmp_path / "stopped", setting, stop=5)
    assert str(last_checkpoint(tmp_path / "stopped" / "checkpoints")).endswith("checkpoint-4")
    assert same(trained(kind, tmp_path / "stopped", setting), whole)
    # From the checkpoint of the last step, there is no step left to train; the masks are chosen again.
    assert same(trained(kind, tmp_path / "stopped", setting), whole)


def test_a_run_may_stop_more_than_once(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_total_limit": 1}
    whole = trained("bert-sequence", tmp_path / "whole", SETTINGS[4], **options)
    for stop in (3, 7):
        with pytest.raises(Stopped):
            trained("bert-sequence", tmp_path / "stopped", SETTINGS[4], stop=stop, **options)
    assert same(trained("bert-sequence", tmp_path / "stopped", SETTINGS[4], **options), whole)


def test_a_checkpoint_that_was_not_finished_is_not_gone_on_from(tmp_path: Path) -> None:
    whole = trained("bert-sequence", tmp_path, SETTINGS[4])
    checkpoints = tmp_path / "checkpoints"
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8")
    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    half = (checkpoints / "checkpoint-6" / "trainer_state.json").read_text()
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text(half[: len(half) // 2])
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-4")
    assert same(trained("bert-sequence", tmp_path, SETTINGS[4]), whole)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_of_another_model_are_not_gone_on_from(tmp_path: Path) -> None:
    trained("bert-sequence", tmp_path, SETTINGS[4])
    with pytest.raises(InputError, match=r"^output_dir: expected checkpoints of this model, got another's in '.*', by '"):
        trained("bert-sequence", tmp_path, SETTINGS[0])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damaged_checkpoints_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trained("bert-sequence", tmp_path, SETTINGS[4], stop=5)
    path = tmp_path / "checkpoints" / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"^out: .*checkpoint-4' is a damaged checkpoint; delete this folder") as caught:
        trained("bert-sequence", tmp_path, SETTINGS[4])
    assert "\n" not in str(caught.value)
    # A kill while a checkpoint is removed leaves a part of it.
    path.unlink()
    assert str(last_checkpoint(tmp_path / "checkpoints")).endswith("checkpoint-2")


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from encoders import TASKS, arguments, encoder, examples, pair_tokenizer, state
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.multitask.training import features_of, train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
pruning = MultitaskPruning(encoder("bert-sequence"), TASKS, density=0.3)
features = features_of(pruning, pair_tokenizer(), examples(), 24)
given = arguments(folder, ddp_backend="gloo", max_steps=6)
train(pruning, features, given, tokenizer=pair_tokenizer(), learning_rates={"scores": 0.3})
assert torch.distributed.get_world_size() == 2
save_file(state(pruning), folder / f"{torch.distributed.get_rank()}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_same_masks(tmp_path: Path) -> None:
    """Every process has its own batches, whose tasks may differ. Gradients are averaged."""
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["script.py", str(tmp_path)]
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert same(first, second)
    alone = MultitaskPruning(encoder("bert-sequence"), TASKS, density=0.3)
    features = features_of(alone, pair_tokenizer(), examples(), 24)
    train(alone, features, arguments(tmp_path, max_steps=6), tokenizer=pair_tokenizer(), learning_rates={"scores": 0.3})
    assert sum(int(tensor.sum()) for name, tensor in first.items() if "(mask)" in name) == alone.stored
    # Two processes see two batches a step, so their weights differ from those of one process.
    assert not same(first, state(alone))
