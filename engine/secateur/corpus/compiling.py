"""Compile a task's scoring of batches, so that every run over a corpus uses the same few kernels."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.compat import has_cpp_compiler, inductor_freezing, inductor_kernels, inductor_options
from secateur.support.errors import InputError, first_line
from secateur.tasks import Task
from secateur.tasks.batches import Batch, model_device

LabelScores = Callable[[nn.Module, Batch], Tensor]

# Modes of torch.compile that are worth a measurement. CUDA graphs (reduce-overhead) are not: they are recorded for each pair of
# rows and length, of which a corpus has thousands, and they belong to the thread that recorded them.
MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune-no-cudagraphs")}
# Rows and length of the batches that kernels are compiled for. The compiler treats one row and several rows as different cases.
# All batches of a case share its kernels.
SHAPES = ((2, 64), (1, 64))


class CompileError(InputError):
    """torch.compile cannot compile the model on this machine."""


@contextmanager
def compiled(task: Task, model: nn.Module, mode: str, threads: int | None) -> Iterator[LabelScores]:
    """Compile `task.label_scores` for a model, and yield the compiled function.

    The function may be called from any thread, inside this context and `task.scoring`, in inference mode.

    What a kernel computes may depend on the batch that it was compiled for. A run that is resumed must have the kernels of the
    first run. So all kernels are compiled beforehand, for batches of SHAPES, and a batch that they do not take (of length 1,
    for example) is scored without compilation. Inside the context, this process compiles nothing else. On a CPU the weights are
    laid out again for its matrix products: a second copy, which does not follow changes of the model's own weights.

    Args:
        task: The task.
        model: Its model.
        mode: A mode of torch.compile, one of MODES.
        threads: CPU threads of each call; None means torch's own number.

    Raises:
        CompileError: torch.compile cannot compile the model.
    """
    on_cpu = model_device(model).type == "cpu"
    if on_cpu:
        _require_compiler()
    function = _with_lock(torch.compile(task.label_scores, dynamic=True, backend=_backend(mode, on_cpu)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with inductor_freezing(on_cpu):
            _compile(function, task, model)
    finally:
        torch.set_num_threads(before)
    with torch.compiler.set_stance("eager_on_recompile"):
        yield function


class _GuardLock(threading.local):
    """Lets one thread at a time check the guards of compiled code. The kernels of several threads run at the same time.

    Checking guards keeps state. Of two threads that check at once, one may see the other's state and compile again.
    """

    lock = threading.Lock()
    held = False

    def acquire(self) -> None:
        """Wait for the lock, for this thread."""
        self.lock.acquire()
        self.held = True

    def release(self) -> None:
        """Release the lock, if this thread holds it."""
        if self.held:
            self.held = False
            self.lock.release()


_GUARD_LOCK = _GuardLock()


def _with_lock(function: LabelScores) -> LabelScores:
    """The function, which holds the lock until its guards are checked."""

    def run(model: nn.Module, batch: Batch) -> Tensor:
        _GUARD_LOCK.acquire()
        try:
            return function(model, batch)
        finally:
            _GUARD_LOCK.release()

    return run


@functools.cache  # Always the same backend object, because torch.compile compiles again for another one.
def _backend(mode: str, on_cpu: bool) -> Callable[[Any, Any], Callable[..., Any]]:
    """Inductor, which releases the lock where the guards are checked and its kernels begin."""
    # cpp_wrapper calls all kernels of a graph from C++, so that threads do not wait for Python's lock between kernels.
    options: dict[str, Any] = {"cpp_wrapper": True} if on_cpu else inductor_options(mode)

    def compile_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
        kernels = inductor_kernels(graph, inputs, options)

        def run(*arguments: Any) -> Any:
            _GUARD_LOCK.release()
            return kernels(*arguments)

        return run

    return compile_graph


def _compile(function: LabelScores, task: Task, model: nn.Module) -> None:
    """Call the function on batches of SHAPES, so that all kernels are compiled."""
    with torch.inference_mode():
        for rows, length in SHAPES:
            batch = task.collate_inputs([task.blank(model, length)] * rows, model_device(model))
            task.label_scores(
                model, batch
            )  # Fills the model's caches first, or the code that fills them would be compiled too.
            try:
                function(model, batch)
            except RuntimeError as error:  # The errors of Dynamo and Inductor are RuntimeErrors.
                why = first_line(getattr(error, "inner_exception", error))
                raise CompileError(f"compile: torch.compile cannot compile the model: {why}") from error


def _require_compiler() -> None:
    """Raise CompileError if there is no C++ compiler."""
    if not has_cpp_compiler():
        raise CompileError("compile: expected a C++ compiler (the environment variable CXX names one), got none")
