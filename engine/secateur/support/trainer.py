"""A Hugging Face Trainer that writes nothing to stdout, its arguments, and the search for the last complete checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import is_accelerate_available

from secateur.support.compat import use_one_gpu
from secateur.support.errors import InputError, first_line, reading
from secateur.support.fields import MOST_STEPS, require_count
from secateur.support.progress import Progress, Report, reporting, require_progress

logger = logging.getLogger("secateur")
# The Trainer writes these files to each checkpoint, and reads all of them when it resumes.
_CHECKPOINT_FILES = ("model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")


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
        InputError: The Trainer refuses a value, there are more than `MOST_STEPS` steps, or accelerate is not installed.
    """
    require_accelerate()
    if given.get("max_steps") is not None:
        require_count("max_steps", given["max_steps"], -1, MOST_STEPS)  # -1 counts epochs instead.
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

    The Trainer writes trainer_state.json last, so a checkpoint with a readable one was complete. If a run was killed while it
    removed the checkpoint, other files are missing.

    Args:
        folder: The Trainer's output directory.

    Returns:
        The checkpoint's path, or None if there is no complete checkpoint.
    """
    complete = {steps: path for path in folder.glob("checkpoint-*") if (steps := _steps(path)) is not None}
    return str(complete[max(complete)]) if complete else None


def _steps(checkpoint: Path) -> int | None:
    """Return the steps that a complete checkpoint contains; None for another folder."""
    if not all(any(checkpoint.glob(name)) for name in _CHECKPOINT_FILES):
        return None
    try:
        steps = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    except (OSError, ValueError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


@contextmanager
def _resuming(checkpoint: str) -> Iterator[None]:
    """Turn the errors of a damaged checkpoint into an InputError of one line."""
    with reading(
        "out", checkpoint, "is a damaged checkpoint; delete this folder to resume", also=(RuntimeError, UnpicklingError)
    ):
        yield


class QuietTrainer(Trainer):  # type: ignore[misc]
    """A Hugging Face Trainer that writes nothing to stdout and reports its progress through a callback.

    Args:
        model: The model to train.
        arguments: The Trainer's arguments. With several GPUs in one process, only one is used.
        progress: True for a progress bar, a function of (steps done, all steps), or None. It is called before the first step
            and after each.
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
        require_progress(progress)
        super().__init__(model=model, args=arguments, callbacks=list(callbacks), **options)
        # These two write to stdout, which is reserved for results.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._shown_progress = progress

    def run(self, *, resume: bool) -> list[dict[str, Any]]:
        """Train, from the last complete checkpoint if `resume` is set and there is one; return the log."""
        checkpoint = last_checkpoint(Path(str(self.args.output_dir))) if resume else None
        with reporting(self._shown_progress, "training steps") as report:
            self.add_callback(_ProgressReport(report))
            self.train(resume_from_checkpoint=checkpoint)
        return list(self.state.log_history)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train for one epoch, but not after the last step.

        From a checkpoint of the last step, the Trainer's own method would train another step if the step ends no epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *arguments: Any, **options: Any) -> None:
        """Load the weights. Raise InputError if the checkpoint is damaged."""
        with _resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *arguments, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's and the scheduler's state. Raise InputError if the checkpoint is damaged."""
        with _resuming(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the states of the random generators. Raise InputError if the checkpoint is damaged."""
        with _resuming(str(checkpoint)):
            super()._load_rng_state(checkpoint)

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
    """Report the steps done before the first step and after each."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the steps of the checkpoint that the training starts from, and the total."""
        self._report(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the steps done and the total."""
        self._report(state.global_step, state.max_steps)
