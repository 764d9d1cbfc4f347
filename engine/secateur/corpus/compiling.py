"""What a task does with a batch, compiled: the same few kernels in every run, whatever a corpus begins with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.corpus.shapes import longest
from secateur.support.compat import has_cpp_compiler, inductor_freezing, inductor_kernels, inductor_options
from secateur.support.errors import InputError, first_line
from secateur.tasks import Item, TextTask
from secateur.tasks.batches import Batch, model_device

LabelScores = Callable[[nn.Module, Batch], Tensor]

# Modes of torch.compile that are worth a measurement. CUDA graphs (reduce-overhead) are not among them: they are recorded for
# each pair of rows and length, of which a corpus has thousands, and belong to the thread that recorded them.
MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune-no-cudagraphs")}
# Rows and length of the batches that are compiled for. To the compiler one row is another case than several; all others of
# either case share its kernels.
SHAPES = ((2, 64), (1, 64))


class CompileError(InputError):
    """torch.compile cannot compile the model here."""


@contextmanager
def compiled(task: TextTask, model: nn.Module, mode: str, threads: int | None) -> Iterator[LabelScores]:
    """`task.label_scores` compiled for this model, to be called within the context and `task.scoring`, in inference mode, from
    any thread with so many CPU threads (None: torch's own number).

    What a kernel computes may depend on the batch that it was compiled for, so all are compiled beforehand for batches of
    SHAPES, and a batch that they do not take (of length 1, say) is scored without: a run that goes on must have the kernels of
    the first. Meanwhile this process compiles nothing else. On a CPU the weights are laid out anew for its matrix products, a
    second copy of them, which no longer follows the model's own. Raises CompileError.
    """
    on_cpu = model_device(model).type == "cpu"
    if on_cpu:
        _require_compiler()
    function = _in_turn(torch.compile(task.label_scores, dynamic=True, backend=_backend(mode, on_cpu)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with inductor_freezing(on_cpu):
            _compile(function, task, model)
    finally:
        torch.set_num_threads(before)
    with torch.compiler.set_stance("eager_on_recompile"):
        yield function


class _Turn(threading.local):
    """Whose turn it is to check the guards of what is compiled. Checking keeps state, so that of two threads at once one may
    see the other's, and be told to compile again. The kernels of several threads run at the same time."""

    lock = threading.Lock()
    mine = False

    def take(self) -> None:
        self.lock.acquire()
        self.mine = True

    def give(self) -> None:
        if self.mine:
            self.mine = False
            self.lock.release()


_TURN = _Turn()


def _in_turn(function: LabelScores) -> LabelScores:
    def run(model: nn.Module, batch: Batch) -> Tensor:
        _TURN.take()
        try:
            return function(model, batch)
        finally:
            _TURN.give()

    return run


@functools.cache  # The same one each time: what another has compiled would be compiled again.
def _backend(mode: str, on_cpu: bool) -> Callable[[Any, Any], Callable[..., Any]]:
    """Inductor, whose kernels begin where the guards are done with."""
    # The model's own graph leaves Python once; cpp_wrapper makes that hold for its parts, so that threads do not wait for it.
    options: dict[str, Any] = {"cpp_wrapper": True} if on_cpu else inductor_options(mode)

    def made(graph: Any, inputs: Any) -> Callable[..., Any]:
        kernels = inductor_kernels(graph, inputs, options)

        def run(*arguments: Any) -> Any:
            _TURN.give()
            return kernels(*arguments)

        return run

    return made


def _compile(function: LabelScores, task: TextTask, model: nn.Module) -> None:
    with torch.inference_mode():
        for rows, length in SHAPES:
            batch = task.collate_inputs([Item(0, [1] * min(length, longest(task, model)), [])] * rows, model_device(model))
            task.label_scores(model, batch)  # What is made once and kept must be there, or it would be compiled too.
            try:
                function(model, batch)
            except RuntimeError as error:  # Dynamo's and Inductor's own are among them.
                why = first_line(getattr(error, "inner_exception", error))
                raise CompileError(f"compile: torch.compile cannot do it: {why}") from error


def _require_compiler() -> None:
    if not has_cpp_compiler():
        raise CompileError("compile: expected a C++ compiler (the environment variable CXX names one), got none")
