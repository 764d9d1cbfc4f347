"""A Hugging Face Trainer that writes nothing to stdout, its arguments, and the search for the last complete checkpoint."""

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
    """Check that accelerate, which Hugging Face's Trainer needs, is installed.

    Raises:
        InputError: accelerate is not installed.
    """
    if not is_accelerate_available():
        raise InputError("accelerate: expected this package, which training needs, got none: pip install 'secateur[learned]'")


def trainer_arguments(folder: Path, device: str, given: Mapping[str, Any]) -> TrainingArguments:
    """Build the Trainer's arguments from secateur's defaults and the given values.

    The defaults: no reports and no progress bars, one checkpoint at a time, and the CPU if `device` is "cpu".

    Args:
        folder: The output directory, where checkpoints go.
        device: The device's name; "cpu" makes the Trainer use the CPU.
        given: Values for transformers.TrainingArguments by name. They override the defaults.

    Returns:
        The arguments.

    Raises:
        InputError: The Trainer refuses a value, or accelerate is not installed.
    """
    require_accelerate()
    defaults = {"save_total_limit": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": device == "cpu"}
    try:
        return TrainingArguments(str(folder), **{**defaults, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"training: {first_line(error)}") from error


def learning_rates_of(defaults: Mapping[str, float], given: Mapping[str, float] | None) -> dict[str, float]:
    """Complete the learning rates of the parameter groups.

    Args:
        defaults: The default rate of every group.
        given: The rates to use instead, by group.

    Returns:
        The rate of every group.

    Raises:
        InputError: A group is unknown.
    """
    rates = {**defaults, **(given or {})}
    if set(rates) != set(defaults):
        raise InputError(f"learning_rates: expected some of {', '.join(defaults)}, got {', '.join(given or {})}")
    return rates


def last_checkpoint(folder: Path) -> str | None:
    """Find the last complete checkpoint in a folder.

    The Trainer writes trainer_state.json last, so a checkpoint with a readable one is complete.

    Args:
        folder: The Trainer's output directory.

    Returns:
        The checkpoint's path, or None if there is no complete checkpoint.
    """
    complete = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(path: Path) -> bool:
    """Tell whether the file exists and holds valid JSON."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


class QuietTrainer(Trainer):  # type: ignore[misc]
    """A Hugging Face Trainer that writes nothing to stdout and reports its progress through a callback.

    Args:
        model: The model to train.
        arguments: The Trainer's arguments. With several GPUs in one process, only one is used.
        progress: A function called after each step with the steps done and the total number of steps, or None.
        callbacks: Further callbacks. They run before the progress callback.
        options: Further keyword arguments of transformers.Trainer.
    """

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
            # With more, the Trainer uses torch.nn.DataParallel, which cannot gather the outputs of these models.
            use_one_gpu(arguments)
        progress_callbacks = [] if progress is None else [_ProgressReport(progress)]
        super().__init__(model=model, args=arguments, callbacks=[*callbacks, *progress_callbacks], **options)
        # These two write to stdout, which is reserved for results.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def run(self, *, resume: bool) -> list[dict[str, Any]]:
        """Train, from the last complete checkpoint if `resume` is set and there is one; return the log."""
        checkpoint = last_checkpoint(Path(str(self.args.output_dir))) if resume else None
        self.train(resume_from_checkpoint=checkpoint)
        return list(self.state.log_history)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save one name for each tensor: safetensors refuses parameters that share memory, as T5's embeddings do."""
        state = self.model.state_dict() if state_dict is None else state_dict
        first_names = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
        super()._save(output_dir, {name: state[name] for name in state if first_names[state[name].data_ptr()] == name})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Check that the checkpoint is this model's; raise InputError if it is another model's.

        A name that `_save` left out counts as loaded if a tensor that shares its memory was loaded. The Trainer's own method
        reads attributes that only transformers models have.
        """
        state = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in loaded]
        if missing or load_result.unexpected_keys:
            name, folder = (missing or load_result.unexpected_keys)[0], str(self.args.output_dir)
            raise InputError(f"output_dir: expected checkpoints of this model, got another's in {folder!r}, by {name!r}")


class _ProgressReport(TrainerCallback):  # type: ignore[misc]
    """Report the steps done after each step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the steps done and the total."""
        self.progress(state.global_step, state.max_steps)
