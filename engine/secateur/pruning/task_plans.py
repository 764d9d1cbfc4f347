"""TaskPlans: one dense model serves many tasks, each by a pruned model whose weights are gathered on request."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.model.recipe import Cut
from secateur.planning.plan import Plan, as_plan
from secateur.pruning.keep_blocks import remove_blocks_
from secateur.pruning.prune import rebuild_of, replica, ungathered
from secateur.support.errors import InputError
from secateur.tasks import Task
from secateur.tasks.pairs import is_pair

Answer = TypeVar("Answer")
Input = str | Sequence[str]


class TaskPlans:
    """A dense model with a plan for each task: `router[task]` is the task's pruned model.

    The pruned model computes what `prune(model, plan)` computes, bit for bit. It shares the weights that its plan does not cut
    with the dense model, whose weights must stay where and as they are. Pruned models are frozen and in eval mode. One that has
    left the cache stays valid. Threads may share a router.

    Args:
        model: The dense model.
        plans: By task, a Plan or the path of one.
        tasks: By name, the tasks that `score` and `generate` use.
        cache_bytes: The most bytes that the gathered weights of all cached models take. The least recently used model leaves
            first. None for no bound.

    Raises:
        InputError: With the name of the task: a plan of another model, a corrupted plan, or a cache smaller than a task needs.

    Reference:
        Algorithm 2 of Yang et al. 2023 (arXiv 2205.04157).
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Mapping[str, Plan | str | Path],
        tasks: Mapping[str, Task] | None = None,
        *,
        cache_bytes: int | None = None,
    ) -> None:
        if not plans:
            raise InputError("plans: expected a plan for at least one task, got none")
        self._tasks = dict(tasks or {})
        self._pruned: dict[str, _Pruned] = {}
        for name, plan in plans.items():
            with _naming(name):
                self._pruned[name] = _Pruned(model, as_plan(plan))
        for name in self._tasks:
            self._of(name)
        self._bound = math.inf if cache_bytes is None else cache_bytes
        name, largest = max(self.sizes.items(), key=lambda item: item[1])
        if largest > self._bound:
            raise InputError(f"cache_bytes: expected at least the {largest} bytes that task {name!r} needs, got {cache_bytes}")
        self._cache: OrderedDict[str, nn.Module] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, task: str) -> nn.Module:
        """Return the task's model, from the cache or with weights gathered now. Raises InputError for an unknown task."""
        pruned = self._of(task)
        with pruned.lock:  # Other threads wait for the weights of this task, but not for other tasks.
            with self._lock:
                if task in self._cache:
                    self._cache.move_to_end(task)
                    return self._cache[task]
                self._make_room(task)  # Before the weights are gathered, so that memory holds no more than it must.
            model = pruned.gathered()
            with self._lock:
                self._make_room(task)  # Other threads may have filled the cache meanwhile.
                self._cache[task] = model
        return model

    def __len__(self) -> int:
        return len(self._pruned)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pruned)

    def __contains__(self, task: object) -> bool:
        return task in self._pruned

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each task's gathered weights, which its model takes in addition to the dense one."""
        return {name: pruned.bytes for name, pruned in self._pruned.items()}

    @property
    def cached(self) -> list[str]:
        """The tasks whose weights are in the cache, the least recently used first."""
        with self._lock:
            return list(self._cache)

    @property
    def bytes(self) -> int:
        """The bytes of the gathered weights of all cached models."""
        return sum(self._pruned[name].bytes for name in self.cached)

    def score(self, task: str | Sequence[str], inputs: Sequence[Input], *, max_tokens: int = 8192) -> list[dict[str, float]]:
        """Return for each input the probability of each label of its task.

        Args:
            task: One task for all inputs, or one for each input.
            inputs: The texts. Where a task's prompt names several columns, or its inputs are pairs, a list of texts each.
            max_tokens: The most padded input tokens in a batch.

        Raises:
            InputError: A task is unknown, missing in `tasks`, or without closed labels.
        """
        return self._answers(task, inputs, lambda use, model, rows: use.probabilities(model, rows, max_tokens))

    def generate(
        self, task: str | Sequence[str], inputs: Sequence[Input], *, max_new_tokens: int = 64, max_tokens: int = 8192
    ) -> list[str]:
        """Return the greedy output for each input, of at most max_new_tokens pieces. All else is as in `score`."""
        return self._answers(task, inputs, lambda use, model, rows: use.generate(model, rows, max_tokens, max_new_tokens))

    def _answers(
        self,
        task: str | Sequence[str],
        inputs: Sequence[Input],
        answer: Callable[[Task, nn.Module, list[Example]], list[Answer]],
    ) -> list[Answer]:
        """Group the inputs by task and answer them; return the answers in the order of the inputs."""
        if isinstance(inputs, str):
            raise InputError(f"inputs: expected a list of texts, got the text {inputs!r}")
        names = [task] * len(inputs) if isinstance(task, str) else list(task)
        if len(names) != len(inputs):
            raise InputError(f"task: expected one name, or one for each of {len(inputs)} inputs, got {len(names)}")
        rows: dict[str, list[int]] = {}
        for row, (name, value) in enumerate(zip(names, inputs, strict=True)):
            if (reason := _why_not(self._tasks.get(name), value)) is not None:
                raise InputError(f"inputs, row {row + 1}: {reason}")
            rows.setdefault(name, []).append(row)
        uses = {name: self._use(name) for name in rows}
        by_row: dict[int, Answer] = {}
        for name, of_task in rows.items():
            with _naming(name), torch.inference_mode():
                uses[name].require_fit(self[name])
                answers = answer(uses[name], self[name], [{"input": inputs[row]} for row in of_task])
            by_row.update(zip(of_task, answers, strict=True))
        return [by_row[row] for row in range(len(names))]

    def _of(self, task: str) -> _Pruned:
        if task not in self._pruned:
            raise InputError(f"task: expected one of {', '.join(map(repr, self._pruned))}, got {task!r}")
        return self._pruned[task]

    def _use(self, task: str) -> Task:
        self._of(task)
        if task not in self._tasks:
            raise InputError(f"task {task!r}: expected a Task of that name in `tasks`, which says how it is used, got none")
        return self._tasks[task]

    def _make_room(self, task: str) -> None:
        while sum(self._pruned[name].bytes for name in (*self._cache, task)) > self._bound:
            self._cache.popitem(last=False)


def _why_not(task: Task | None, value: Any) -> str | None:
    """Return why a value cannot be an input of a task; None if it can."""
    prompt = getattr(task, "prompt", None)
    if prompt is not None:
        return prompt.why_not(value)  # type: ignore[no-any-return]
    pair = task is not None and task.takes_pairs and is_pair(value) and all(isinstance(text, str) for text in value)
    return None if isinstance(value, str) or pair else f"expected text, got {type(value).__name__} {value!r}"


class _Pruned:
    """One task's pruned model without its weights.

    Which slices are gathered is known from the beginning. The modules that hold them are made at the first request. Neither
    depends on the values of the weights.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._dense, self._rebuild, self._removed = model, rebuild_of(model, plan), plan.removed_blocks
        self._model: nn.Module | None = None
        self._cuts: dict[Tensor, tuple[Cut, Tensor]] = {}
        self.lock = Lock()
        cut = [(model.get_parameter(cut.source), cut) for cut in self._rebuild.cuts.values() if cut.blocks is not None]
        self.bytes = sum(math.prod(cut.shape(dense)) * dense.element_size() for dense, cut in cut)

    def gathered(self) -> nn.Module:
        """Return a model with newly gathered weights."""
        # No inference tensors, even in inference mode: the model may outlive the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._model is None:
                self._model = ungathered(self._dense, self._rebuild)
                self._cuts = {
                    self._model.get_parameter(name): (cut, self._dense.get_parameter(cut.source).detach())
                    for name, cut in self._rebuild.cuts.items()
                    if cut.blocks is not None
                }
                remove_blocks_(self._model, self._removed)
            gathered: dict[Tensor, Tensor] = {empty: cut.of(dense) for empty, (cut, dense) in self._cuts.items()}
            model: nn.Module = replica(self._model, gathered)
            return model


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """A context that adds the name of the task to input errors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task {task!r}: {error}") from error
