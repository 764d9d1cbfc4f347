"""What secateur's trainers share: Hugging Face's Trainer without a word on stdout, and the checkpoint to go on from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_accelerate_available

from secateur.support.compat import use_one_gpu
from secateur.support.errors import InputError, first_line

logger = logging.getLogger("secateur")
Progress = Callable[[int, int], None]


def require_accelerate() -> None:
    """Raises InputError without the package that Hugging Face's Trainer runs on."""
    if not is_accelerate_available():
        raise InputError("accelerate: expected this package, which training needs, got none: pip install 'secateur[learned]'")


def trainer_arguments(folder: Path, device: str, given: Mapping[str, Any]) -> TrainingArguments:
    """The given arguments over secateur's defaults: silent, one checkpoint at a time, on the CPU where the device says so.
    Raises InputError for those that the Trainer refuses, and as `require_accelerate`."""
    require_accelerate()
    defaults = {"save_total_limit": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": device == "cpu"}
    try:
        return TrainingArguments(str(folder), **{**defaults, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"training: {first_line(error)}") from error


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer's state comes last."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


class QuietTrainer(Trainer):  # type: ignore[misc]
    """progress: called with the steps done and their number."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        progress: Progress | None,
        *,
        callbacks: Sequence[TrainerCallback],
        **options: Any,
    ) -> None:
        if arguments.n_gpu > 1:
            logger.warning("one of %d devices is used; torchrun --nproc-per-node starts a process for each", arguments.n_gpu)
            use_one_gpu(arguments)  # torch.nn.DataParallel cannot gather what our models return.
        steps = [] if progress is None else [_Steps(progress)]
        super().__init__(model=model, args=arguments, callbacks=[*callbacks, *steps], **options)
        # They write to stdout, which is for results.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Of parameters that share memory (T5's embeddings), safetensors takes one."""
        state = self.model.state_dict() if state_dict is None else state_dict
        once = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
        super()._save(output_dir, {name: state[name] for name in state if once[state[name].data_ptr()] == name})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What `_save` left out is there as soon as what it shares memory with is. (The Trainer asks the model for names, which
        only models of transformers have.) Raises InputError where a checkpoint is another model's."""
        state = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if state[name].data_ptr() not in loaded]
        if lost or load_result.unexpected_keys:
            name, place = (lost or load_result.unexpected_keys)[0], str(self.args.output_dir)
            raise InputError(f"output_dir: expected checkpoints of this model, got another's in {place!r}, by {name!r}")


class _Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
