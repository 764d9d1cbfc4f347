"""compress: the whole flow in one call. Attribute, choose, prune, verify, recover, evaluate, benchmark, and write a folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from secateur.attribution.criteria import Criterion, criterion_named, for_all_labels
from secateur.attribution.pass_tokens import LEAST
from secateur.attribution.scores import Scores, as_scores
from secateur.data.columns import Columns
from secateur.data.examples import Example, Examples, only_split
from secateur.flow.choose import RECOVERIES, Candidate, choose
from secateur.flow.depth import removable_blocks
from secateur.flow.effort import Effort, work_of
from secateur.flow.folder import round_weights_, write_folder
from secateur.flow.loaded import Loaded, load_model, loaded_from, make_task, prompt_of, read_for
from secateur.flow.meet_latency import MetLatency
from secateur.flow.model_card import making_now, name_of_data, removed_by
from secateur.flow.pruned_folder import plan_files
from secateur.flow.rounds import attribute_in_rounds, require_rounds
from secateur.flow.usage import Usage, usage_of
from secateur.flow.within_budget import Say, between_rounds, within_budget
from secateur.healing.healed import Healed
from secateur.healing.settings import require_positive
from secateur.measuring.compare import Comparison, compare
from secateur.measuring.evaluate import evaluate
from secateur.measuring.synthetic import MOST, require_lengths
from secateur.model.blocks import blocks
from secateur.model.discovery import fingerprint, sites
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_ordinary, require_own_forwards, require_writable
from secateur.model.sites import AttentionUnit
from secateur.planning.allocation import Allocation
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, as_plan
from secateur.planning.shapes import Shape, require_shape
from secateur.pruning.delete_layers import delete_layers
from secateur.pruning.describe import require_all_layers
from secateur.pruning.prune import prune
from secateur.pruning.verify import Verification, some_batches, verify
from secateur.recovery import Method, Refit, recover_
from secateur.recovery.recover import require_methods
from secateur.support.errors import InputError, VerificationError
from secateur.support.fields import require_count, shown
from secateur.support.files import require_absent
from secateur.support.progress import Progress, require_progress
from secateur.support.urls import redacted
from secateur.tasks import Evaluation, Prompt, Task
from secateur.tasks.base import without_targets
from secateur.tasks.task_file import name_of

_SHOWN = 3  # Candidates that were not taken and are told in words.


@dataclass(frozen=True)
class Free:
    """The model that the same budget gives without a shape, for comparison.

    Attributes:
        candidate: Its plan and its recovery.
        evaluation: Its metric on the held-out examples.
    """

    candidate: Candidate
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the candidate and the evaluation as JSON values."""
        return {"candidate": self.candidate.to_json(), "evaluation": self.evaluation.to_json()}


@dataclass(frozen=True, repr=False)
class Compressed:
    """A model cut down to a task, with the evidence.

    Attributes:
        pruned: The pruned and recovered model, in the dtype that it was computed in.
        plan: The plan that was carried out.
        candidates: The plans and recoveries that were tried. The first one was taken.
        met: How a budget of time was met, None for another budget.
        verification: That the pruned model computes what the masked model computes, measured before the recovery.
        recovery: What the recovery did for each branch, empty without a recovery.
        comparison: The evaluation, size and speed of the dense and the pruned model.
        task: The task.
        tokenizer: The tokenizer or image processor.
        task_name: The name of the task in secateur.json, empty for a task of another class.
        stored: The dtype that `save` writes.
        made_by: The call of `compress`, for the folder's card; "" where it is not known.
        held_out: The name of the held-out examples, "" for examples in memory.
        healing: How the model was healed, None where it was not.
        free: What the shape cost: the model of shape "any" within the same budget. None under "any", and without held-out
            examples.
    """

    pruned: nn.Module
    plan: Plan
    candidates: list[Candidate]
    met: MetLatency | None
    verification: Verification
    recovery: list[Refit]
    comparison: Comparison
    task: Task
    tokenizer: Any
    task_name: str
    stored: torch.dtype
    made_by: str = ""
    held_out: str = ""
    free: Free | None = None
    healing: Healed | None = None

    def to_json(self) -> dict[str, Any]:
        """The report: everything but the model, the tokenizer and the kept units."""
        return {
            "plan": {**self.plan.budget_json(), **self.plan.removed_json()},
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "met": None if self.met is None else self.met.to_json(),
            "verification": self.verification.to_json(),
            "recovery": [refit.to_json() for refit in self.recovery],
            **({} if self.healing is None else {"healing": self.healing.to_json()}),
            **({} if self.free is None else {"any_shape": self.free.to_json()}),
            **self.comparison.to_json(),
        }

    def save(self, out: str | Path) -> None:
        """Write a folder: the model in its stored dtype, its tokenizer, secateur.json, plan.json, report.json, two
        plots, and a model card (README.md).

        Args:
            out: The folder, which must not exist yet. It appears when complete.

        Raises:
            InputError: As `secateur.save` does.
        """
        files = plan_files(self.plan, self.pruned, self.task_name or type(self.task).__name__)
        budget = "" if self.plan.budget is None else str(self.plan.budget)
        making = making_now(removed_by(self.plan, len(blocks(self.pruned))), budget, self.made_by, self.held_out)
        write_folder(
            self.pruned, out, task=self.task, task_name=self.task_name, tokenizer=self.tokenizer, stored=self.stored,
            document={**self.to_json(), "out": str(out)}, comparison=self.comparison, making=making, files=files,
        )  # fmt: skip

    def usage(self, folder: str | Path) -> Usage:
        """Return how a folder that `save` wrote is loaded, scored with and served: `print(*usage.lines(), sep="\\n")`."""
        return usage_of(self.pruned, self.task, folder, named=bool(self.task_name))

    def lines(self) -> list[str]:
        """What was chosen, delivered, recovered and verified, in words."""
        return [
            *_choice(self.candidates), *_depth(self.plan), *_delivery(self.met), *_cost_of_shape(self),
            *_improvement(self.recovery), *([] if self.healing is None else self.healing.lines()), str(self.verification),
        ]  # fmt: skip

    def __repr__(self) -> str:
        return f"Compressed({self.comparison.about()})"

    def _repr_html_(self) -> str:
        return self.comparison._repr_html_()

    def __str__(self) -> str:
        sizes, metrics = self.comparison.parameters, self.comparison.evaluation
        lines = [f"parameters: {sizes['dense']:,} dense, {sizes['pruned']:,} pruned ({sizes['pruned'] / sizes['dense']:.0%})"]
        if metrics:
            dense, pruned = metrics["dense"], metrics["pruned"]
            pairs = [(one, two) for one, two in ((dense, pruned), (dense.also, pruned.also)) if one and two]
            lines[:0] = [f"{one.metric}: {one.value:.4f} dense, {two.value:.4f} pruned" for one, two in pairs]
        for timing in self.comparison.benchmark.timings:
            lines.append(f"speed-up at {timing.batch_size} x {timing.length}: {timing.speedup:.2f}x")
        return "\n".join([*lines, *self.lines()])


@dataclass(frozen=True)
class _Settings:
    """How `compress` scores and chooses. The fields are arguments of `compress`."""

    budget: Budget | None
    plan: Plan | None
    scores: tuple[Scores, ...]
    unit: AttentionUnit
    criteria: tuple[Criterion, ...]
    effort: Effort
    select: str | None
    rounds: int
    allocation: Allocation | None
    floor: float | None
    align: int | None
    per_head: bool
    shape: Shape
    recoveries: Sequence[Method | None]
    max_tokens: int | None
    shapes: tuple[Sequence[int], Sequence[int]]
    heal: float | None

    def __post_init__(self) -> None:
        require_rounds(self.rounds)
        if self.heal is not None:
            require_positive("heal", self.heal)
        if self.budget is not None:
            allocation, floor = self.allocation, self.floor
            self.budget.check_spread(
                "uniform" if allocation is None else allocation, 0.0 if floor is None else floor,
                1 if self.align is None else self.align,
            )  # fmt: skip
            between_rounds(self.budget, self.rounds)
        require_shape(self.shape, (), self.allocation or "uniform", per_head=self.per_head)
        if self.shape != "any" and (self.plan is not None or self.unit == "channel"):
            raise InputError(f"shape: expected any with a plan, and with channels of heads, got {self.shape!r}")
        if self.scores:
            self._check_scores()
        if self.plan is not None:
            self._check_plan()
        if self.unit not in get_args(AttentionUnit):
            raise InputError(f"unit: expected {' or '.join(get_args(AttentionUnit))}, got {self.unit!r}")
        if self.per_head and self.unit != "channel" and not self.scores:
            raise InputError(f"per_head: expected unit 'channel', got unit {self.unit!r}")
        if self.select is not None and not isinstance(self.select, str):
            raise InputError(f"select: expected words such as 'encoder.ffn', got {self.select!r}")
        for method in self.recoveries:
            if method is not None and method not in get_args(Method):
                raise InputError(f"recoveries: expected some of {', '.join(get_args(Method))}, None, got {method!r}")
        if not self.recoveries:
            raise InputError("recoveries: expected one at least, which may be None, got none")
        if self.max_tokens is not None:
            require_count("max_tokens", self.max_tokens)
        for name, numbers in zip(("batch_sizes", "lengths"), self.shapes, strict=True):
            if not numbers:
                raise InputError(f"{name}: expected one number at least, got none")
            for number in numbers:
                require_count(name, number, most=MOST[name])

    def _check_plan(self) -> None:
        """Raise InputError for settings of scoring and planning beside a plan."""
        given = {
            "effort": self.effort != "default", "select": self.select is not None,
            "unit": self.unit != "head", "rounds": self.rounds != 1, "allocation": self.allocation is not None,
            "floor": self.floor is not None, "align": self.align is not None, "per_head": self.per_head,
        }  # fmt: skip
        for name, is_given in given.items():
            if is_given:
                raise InputError(f"{name}: expected none with a plan, where it has no effect, got {shown(getattr(self, name))}")

    def _check_scores(self) -> None:
        """Raise InputError for scores beside a plan or rounds."""
        if self.plan is not None:
            raise InputError("scores: expected none with a plan, which needs no scores, got both")
        if self.rounds > 1:
            raise InputError(f"rounds: expected 1 with scores that are given, got {self.rounds}")

    def check_model(self, model: nn.Module) -> None:
        """Raise InputError for a model that the settings do not fit: its weights, scores, sites, positions or biases."""
        require_values(model)
        for scores in self.scores:
            if scores.fingerprint != fingerprint(model):
                raise InputError(
                    f"scores: expected scores of this model (fingerprint {fingerprint(model)}), got scores of another one "
                    f"({scores.fingerprint})"
                )
        if self.shape == "stock":
            chosen = self.scores[0].sites if self.scores else sites(model, unit=self.unit, select=self.select)
            require_all_layers(model, chosen)
        require_lengths(model, self.shapes[1])
        require_methods(model, self.recoveries)


def compress(
    model: nn.Module | Loaded | str | Path,
    examples: Examples,
    task: Task | str | None = None,
    *,
    keep: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    memory: float | None = None,
    speedup: float | None = None,
    latency: float | None = None,
    plan: Plan | str | Path | None = None,
    scores: Scores | str | Path | None = None,
    evaluation: Examples | None = None,
    out: str | Path | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    criterion: Criterion | str | None = None,
    effort: Effort = "default",
    unlabeled: bool = False,
    rounds: int = 1,
    allocation: Allocation | None = None,
    floor: float | None = None,
    align: int | None = None,
    per_head: bool = False,
    shape: Shape = "any",
    recoveries: Sequence[Method | None] = RECOVERIES,
    heal: float | None = None,
    tokenizer: Any = None,
    labels: str | Sequence[str] = "auto",
    prompt: str | Prompt | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    lengths: Sequence[int] = (64,),
    device: str = "auto",
    dtype: str = "auto",
    say: Say | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Cut a model down to a task: attribute, choose a plan, prune, verify, recover, evaluate and benchmark.

    Exactly one budget is given, or a plan. The stages and their defaults are those of `secateur prune`, which calls this
    function. Nothing is printed.

    Args:
        model: A loaded model, or a folder, Hub name or "builtin". A loaded model is left untouched.
        examples: The examples to score, choose and recover on, as in `attribute`.
        task: The task. A loaded model needs one. For a folder it may be a name such as "text-to-text"; by default it is the
            task that the folder or its config tells.
        keep: As in `plan`, as are `flops`, `params` and `memory`.
        flops: See `keep`.
        params: See `keep`.
        memory: See `keep`.
        speedup: The wanted dense time over pruned time, measured at the largest batch size and length.
        latency: The wanted milliseconds of a forward pass, measured at the largest batch size and length.
        plan: A plan, or the file of one, to carry out in place of scoring under a budget.
        scores: Scores of this model, or the file of some, in place of scoring it.
        evaluation: Held-out examples to evaluate both models on.
        out: A folder to write, which must not exist yet; see `Compressed.save`. It appears when complete.
        unit: The unit of attention: "head" or "channel".
        select: The sites to prune, as in `sites`.
        criterion: The criterion, or its name, as in `attribute`. By default there are those of the effort.
        effort: How much to try. "low" scores by gradient x activation alone, and tries the `alternatives`. "default" scores by
            `fisher` and `owen` too, and then moves budget between groups of sites where that brings the predictions nearer to
            the dense model's. "high" has more criteria and more moves.
        unlabeled: Score for all candidate labels, from inputs alone. The task must have labels.
        rounds: How often to score, as in `attribute_in_rounds`.
        allocation: How the budget is spread over the sites. By default several allocations are tried, as in `alternatives`.
        floor: The share of its units that every site keeps at least.
        align: FFN widths are multiples of it. By default 16 on a CPU and 64 on an accelerator.
        per_head: Rank channels within each head, so that heads stay alike.
        shape: What an engine can load, as in `plan`: "any", "per-layer", "uniform", or "stock", whose folder needs no code.
            Under "stock" whole blocks may go, if their absence changes the predictions least.
        recoveries: The recoveries to try, None for no recovery.
        heal: The minutes of training against the dense model after the recovery, as `minutes` in `heal`. None for none.
        tokenizer: The tokenizer to save with a loaded model. By default the task's.
        labels: The candidate labels for a folder's model: a sequence; names between commas, a JSON list, or a file of labels,
            as for the commands' `--labels`; "open" for open targets; "auto" for the labels that the folder remembers, or the
            examples tell.
        prompt: The text around each input for a folder's model, as in `CausalLM`; by default the one that the folder
            remembers, or that of the built-in data.
        columns: The columns of the data by the task's columns for a folder's model, such as {"input": "text", "target":
            "label"}. Common names are found without.
        limit: Use only the first that many examples. Labels come from all of them.
        max_tokens: Padded input tokens in a batch. None means 4096, and for scores on a GPU as in `attribute`.
        max_length: Cut inputs after that many tokens, for a folder's model.
        batch_sizes: Batch sizes to time.
        lengths: Input lengths to time, in tokens. They are at most the model's number of positions, where it has one.
        device: The device for a folder's model: "auto", "cpu", "cuda", ...
        dtype: The dtype for a folder's model: "auto", "float32", "float16" or "bfloat16".
        say: Receives a line at each stage.
        progress: True for a progress bar at each stage, or a function of (done, total). Every stage counts from 0: examples
            scored, plans tried, widths and plans measured, branches recovered, examples evaluated, batch shapes timed.

    Returns:
        The pruned model, its plan and the evidence.

    Raises:
        InputError: An argument has an unknown value (before any work is done), examples cannot be used, or the budget cannot
            be met.
        VerificationError: The pruned model does not compute what the masked model computes. Nothing was written.

    Example:
        `secateur.compress("builtin", "builtin:movie", flops=0.5, evaluation="builtin:movie.test", out="pruned")`
    """
    made_by = _call(locals())
    amounts = {"keep": keep, "flops": flops, "params": params, "memory": memory, "speedup": speedup, "latency": latency}
    settings = _Settings(
        _budget(amounts, plan), None if plan is None else as_plan(plan), () if scores is None else (as_scores(scores),), unit,
        _criteria(criterion, effort, unlabeled, plan), effort, select, rounds,
        allocation, floor, align, per_head, shape, _several("recoveries", recoveries), max_tokens,
        (_several("batch_sizes", batch_sizes), _several("lengths", lengths)), heal,
    )  # fmt: skip
    require_progress(progress)
    if limit is not None:
        require_count("limit", limit)
    if max_length is not None:
        require_count("max_length", max_length, 2)
    if not isinstance(out, (str, Path, type(None))):
        raise InputError(f"out: expected the path of a folder, got {out!r}")
    if out is not None:
        require_absent(out)
    if isinstance(task, Task) and (labels != "auto" or any(given is not None for given in (max_length, prompt, columns))):
        raise InputError("task: expected the task's own labels, prompt, columns and max_length where it is a Task, got others")
    evaluation = only_split(evaluation, "evaluation")
    loaded = _loaded(model, task, tokenizer, device, dtype)
    require_ordinary(loaded.model)
    settings.check_model(loaded.model)
    (require_own_forwards if out is None else require_writable)(loaded.model)
    if out is not None and not hasattr(loaded.tokenizer, "save_pretrained"):
        raise InputError(
            f"tokenizer: expected one with save_pretrained, to write to out, got {type(loaded.tokenizer).__name__}"
        )
    if isinstance(task, Task):
        rows = task.read(examples, all_labels=unlabeled)
    else:
        known = prompt_of(loaded, prompt, examples)
        rows = read_for(loaded, examples, prompt=known, columns=columns, unlabeled=unlabeled)
        task = make_task(loaded, labels, rows, max_length, prompt=known, columns=columns)
    rows = rows[:limit]
    held_out = None if evaluation is None else task.read(evaluation)
    if held_out is not None:
        task.items(loaded.model, held_out)  # Refuse unusable examples before the scoring, which takes long.
    say = say or _silent
    if settings.budget is not None and not settings.scores:
        settings = replace(settings, rounds=1, scores=_scores(loaded.model, task, rows, settings.budget, settings, progress))
    candidates, met = _candidates(loaded, task, rows, settings, say, progress)
    compressed = _carried_out(loaded, task, candidates, met, rows, held_out, settings, say, progress)
    free = None
    if settings.shape != "any" and held_out is not None:
        say("the same budget without the shape, for comparison")
        free = _free(loaded, task, rows, held_out, replace(settings, shape="any"), say, progress)
    compressed = replace(compressed, made_by=made_by, held_out=name_of_data(evaluation), free=free)
    if out is not None:
        compressed.save(out)
    return compressed


def _call(given: Mapping[str, Any]) -> str:
    """A call of `compress` as Python: the arguments that are not the defaults. Objects stand under their arguments' names."""
    parts = []
    for name, parameter in inspect.signature(compress).parameters.items():
        value = given[name]
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        plain = all(item is None or isinstance(item, (str, Path, bool, int, float)) for item in items)
        if value is parameter.default or (plain and value == parameter.default):
            continue
        text = (repr(str(value)) if isinstance(value, Path) else repr(value)) if plain else name
        parts.append(text if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else f"{name}={text}")
    return redacted(f"secateur.compress({', '.join(parts)})")


def preferred_alignment(device: str) -> int:
    """The widths that a device's matrix units take whole: tiles of 64 on an accelerator, vectors of 16 floats on a CPU."""
    return 16 if device == "cpu" else 64


def _several(name: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple. Raises InputError for a single value or a text."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name}: expected several values, such as a list, got {values!r}")
    return tuple(values)


def _budget(amounts: dict[str, float | None], plan: object) -> Budget | None:
    """The budget, None where a plan is given. Raises InputError for both, or neither."""
    if plan is None:
        return Budget.of(**amounts)
    if any(amount is not None for amount in amounts.values()):
        raise InputError("plan: expected a plan or a budget, got both")
    return None


def _criteria(criterion: Criterion | str | None, effort: str, unlabeled: bool, plan: object) -> tuple[Criterion, ...]:
    """The criterion, or those of the effort; for all candidate labels where the examples have no targets.

    Raises InputError for an unknown one, or for a criterion beside a plan.
    """
    named = work_of(effort).criteria
    if plan is not None and criterion is not None:
        raise InputError(f"criterion: expected none with a plan, where it has no effect, got {shown(criterion)}")
    criteria = []
    for given in named if criterion is None else (criterion,):
        made = criterion_named(given) if isinstance(given, str) else given
        if not isinstance(made, Criterion):
            raise InputError(f"criterion: expected a Criterion or the name of one, got {type(made).__name__}")
        criteria.append(for_all_labels(made) if unlabeled else made)
    return tuple(criteria)


def _loaded(
    model: nn.Module | Loaded | str | Path,
    task: Task | str | None,
    tokenizer: Any,
    device: str,
    dtype: str,
) -> Loaded:
    """The model with its tokenizer. Raises InputError for arguments that the kind of model does not take."""
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise InputError("tokenizer: expected none with a model folder, which has its own, got one")
        if isinstance(task, Task):
            loaded = load_model(str(model), task=name_of(task), device=device, dtype=dtype)
            return replace(loaded, labels=task.labels)
        return load_model(str(model), task=task, device=device, dtype=dtype)
    if device != "auto" or dtype != "auto":
        raise InputError("device, dtype: expected none with a loaded model, which has its own, got some")
    if isinstance(model, Loaded):
        if isinstance(task, str) or tokenizer is not None:
            raise InputError("task, tokenizer: expected none with a Loaded, which has its own, got some")
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a model, a folder or a Hub name, got {type(model).__name__}")
    if not isinstance(task, Task):
        got = "none" if task is None else repr(task)
        raise InputError(f"task: expected a Task with a loaded model, which does not tell its own, got {got}")
    return loaded_from(model, task, tokenizer)


def _scores(
    model: nn.Module, task: Task, rows: Sequence[Example], budget: Budget, settings: _Settings, progress: Progress | None
) -> tuple[Scores, ...]:
    """The scores that the budget's plans are made from, by each criterion."""
    return tuple(
        attribute_in_rounds(
            model, task, rows, settings.rounds, between_rounds(budget, settings.rounds),
            planning={"per_head": settings.per_head}, criterion=criterion, unit=settings.unit, select=settings.select,
            max_tokens=settings.max_tokens, progress=progress,
        )
        for criterion in settings.criteria
    )  # fmt: skip


def _free(
    loaded: Loaded,
    task: Task,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    settings: _Settings,
    say: Say,
    progress: Progress | None,
) -> Free:
    """The best candidate of any shape, pruned, recovered and evaluated."""
    candidates, _ = _candidates(loaded, task, rows, settings, say, progress)
    best = candidates[0]
    pruned = prune(loaded.model, best.plan)
    _recovered_(loaded, pruned, task, rows, best, progress)
    healing = _healed(loaded, pruned, task, rows, best.plan, settings, say, progress)
    return Free(best, evaluate(pruned if healing is None else healing.model, task, held_out, progress=progress))


def _recovered_(
    loaded: Loaded,
    pruned: nn.Module,
    task: Task,
    rows: Sequence[Example],
    made_by: Candidate,
    progress: Progress | None,
) -> list[Refit]:
    """Recover a pruned model in place, in the numbers that its folder will store. Returns what was refitted."""
    if made_by.recovery is None:
        return []
    refits = recover_(
        loaded.model, pruned, task, rows, method=made_by.recovery, unlabeled=without_targets(task, rows), progress=progress,
        removed_blocks=made_by.plan.removed_blocks,
    )  # fmt: skip
    round_weights_(pruned, loaded.stored)
    return refits


def _candidates(
    loaded: Loaded, task: Task, rows: Sequence[Example], settings: _Settings, say: Say, progress: Progress | None
) -> tuple[list[Candidate], MetLatency | None]:
    """The candidates, best first, and how a budget of time was met."""
    model, budget, recoveries, max_tokens = loaded.model, settings.budget, settings.recoveries, settings.max_tokens or LEAST
    if budget is None or not settings.scores:
        plans = [] if settings.plan is None else [settings.plan]
        unlabeled = without_targets(task, rows)
        return choose(
            model, task, plans, rows, recoveries=recoveries, unlabeled=unlabeled, max_tokens=max_tokens, progress=progress
        ), None
    removable: list[str] = []
    if settings.shape == "stock":
        say("ordering the blocks")
        unlabeled = without_targets(task, rows)
        removable = removable_blocks(
            model, task, rows, among=settings.scores[0].scored_blocks(), unlabeled=unlabeled, max_tokens=max_tokens,
            progress=progress,
        )  # fmt: skip
    return within_budget(
        model, task, rows, settings.scores, budget, settings.shapes, recoveries, work_of(settings.effort).moves, max_tokens,
        say, progress,
        floor=settings.floor, per_head=settings.per_head, allocation=settings.allocation, shape=settings.shape,
        removable=removable, align=preferred_alignment(loaded.device) if settings.align is None else settings.align,
    )  # fmt: skip


def _carried_out(
    loaded: Loaded,
    task: Task,
    candidates: list[Candidate],
    met: MetLatency | None,
    rows: Sequence[Example],
    held_out: Sequence[Example] | None,
    settings: _Settings,
    say: Say,
    progress: Progress | None,
) -> Compressed:
    """Prune by the first candidate, verify, recover, heal and compare."""
    model, plan = loaded.model, candidates[0].plan
    say("rebuilding and verifying")
    pruned = prune(model, plan)
    verification = verify(model, pruned, plan, task, some_batches(model, task, rows))
    if not verification.holds:
        raise VerificationError(f"nothing was written: {verification}")
    if candidates[0].recovery is not None:
        say(f"recovering on {len(rows)} examples")
    refits = _recovered_(loaded, pruned, task, rows, candidates[0], progress)
    if plan.spread is not None and plan.spread.shape == "stock":
        pruned = _as_stock(pruned)
    healing = _healed(loaded, pruned, task, rows, plan, settings, say, progress)
    pruned = pruned if healing is None else healing.model
    comparison = compare(model, pruned, task, held_out, *settings.shapes, say=say, progress=progress)
    return Compressed(
        pruned, plan, candidates, met, verification, refits, comparison, task, loaded.tokenizer, loaded.task, loaded.stored,
        healing=healing,
    )  # fmt: skip


def _healed(
    loaded: Loaded,
    pruned: nn.Module,
    task: Task,
    rows: Sequence[Example],
    plan: Plan,
    settings: _Settings,
    say: Say,
    progress: Progress | None,
) -> Healed | None:
    """Heal a pruned model, in the numbers that its folder will store; None where no minutes are given."""
    if settings.heal is None:
        return None
    from secateur.healing.heal import heal  # The Trainer takes a second to import.

    say(f"healing for {settings.heal:g} minutes")
    healing = heal(
        pruned, loaded.model, task, rows, targets="all" if without_targets(task, rows) else "labels", minutes=settings.heal,
        removed_blocks=plan.removed_blocks, max_tokens=settings.max_tokens or LEAST, progress=progress,
    )  # fmt: skip
    round_weights_(healing.model, loaded.stored)
    return healing


def _as_stock(pruned: nn.Module) -> nn.Module:
    """The same model, of the stock class. Raises VerificationError if it is of none.

    A plan of an earlier version empties the sites of blocks in place of removing the blocks, which are deleted here.
    """
    if hasattr(pruned.config, "secateur"):
        pruned = delete_layers(pruned, [])
    if hasattr(pruned.config, "secateur"):
        raise VerificationError("nothing was written: no stock config describes the model that shape stock gave")
    return pruned


def _silent(text: str) -> None:
    """The `say` that tells nothing."""


def _choice(candidates: Sequence[Candidate]) -> list[str]:
    """The candidate that was taken and those that were not, where there were several."""
    if len(candidates) == 1:
        return []
    others = [f"  not: {candidate}" for candidate in candidates[1 : 1 + _SHOWN]]
    if len(candidates) > 1 + _SHOWN:
        others.append(f"  nor {len(candidates) - 1 - _SHOWN} others, which the report lists")
    return [f"picked as the closest on held-out examples: {candidates[0]}", *others]


def _depth(plan: Plan) -> list[str]:
    """The removed blocks."""
    return [f"removed blocks: {', '.join(plan.removed_blocks)}"] if plan.removed_blocks else []


def _delivery(met: MetLatency | None) -> list[str]:
    """The speed that was delivered under a budget of time."""
    if met is None:
        return []
    timing, times = met.timing, len(met.history)
    return [
        f"delivered: {timing.speedup:.2f}x (quartiles {timing.speedup_low:.2f} to {timing.speedup_high:.2f}), "
        f"{timing.pruned_ms:.1f} ms at {timing.batch_size} x {timing.length}, after measuring {times} plan{'s' * (times > 1)}"
    ]


def _cost_of_shape(compressed: Compressed) -> list[str]:
    """What the shape cost, where that was measured."""
    if compressed.free is None or compressed.plan.spread is None:
        return []
    shaped, free = compressed.comparison.evaluation["pruned"], compressed.free.evaluation
    return [
        f"shape {compressed.plan.spread.shape}: {shaped.metric} {shaped.value:.4f}, and {free.value:.4f} with any shape within "
        "the same budget"
    ]


def _improvement(refits: Sequence[Refit]) -> list[str]:
    """How far the branches' outputs were off before and after the recovery."""
    if not refits:
        return []
    before, after = (sum(getattr(refit, name) for refit in refits) / len(refits) for name in ("before", "after"))
    return [f"recovery: the branches' outputs were {before:.1%} off (squared, mean of {len(refits)}), are {after:.1%} off"]
