"""One dense model with a plan for each task: time to gather a task's model, memory, throughput of a mixed stream."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import secateur
from bench.subjects.shapes import t5
from bench.support.interleaved import compare
from secateur import Plan, TaskPlans
from secateur.data import builtin
from secateur.model.discovery import fingerprint
from secateur.pruning.prune import rebuild_of
from secateur.support.environment import environment

KEEP = 0.5
SHAPES = {"t5-small-shape": (512, 2048, 8, 6), "t5-base-shape": (768, 3072, 12, 12)}


def routing(examples: int = 128, stream: int = 64) -> dict[str, Any]:
    """Measure all built-in tasks with few labels, with one thread.

    Args:
        examples: The examples of each task that score units.
        stream: The examples of each task in the mixed stream.
    """
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    tasks, plans = {}, {}
    for name in builtin.tasks():
        calibration = builtin.examples(name)
        labels = sorted({row["target"] for row in calibration})
        if len(labels) <= 32:
            tasks[name] = secateur.TextToText(tokenizer, labels=labels)
            plans[name] = secateur.plan(secateur.attribute(model, tasks[name], calibration[:examples]), keep=KEEP)
    document: dict[str, Any] = {"environment": environment(model), "keep": KEEP, "tasks": [*plans]}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in plans}
        for name, plan in plans.items():
            plan.save(paths[name])
        document["gathering"] = [_gathering("builtin-t5", model, plans)]
        document["memory"] = _memory(model, paths, Path(folder))
        document["throughput"] = _throughput(model, paths, tasks, stream)
    for name, shape in SHAPES.items():
        dense = t5(*shape).model
        document["gathering"].append(_gathering(name, dense, {str(k): _random_plan(dense, k) for k in range(2)}, rounds=41))
    return document


def _gathering(name: str, model: nn.Module, plans: dict[str, Plan], rounds: int = 201) -> dict[str, Any]:
    """Measure the milliseconds until a task's model is ready.

    They are measured at the first use, and again each time after another task's model has replaced it in the cache. For
    comparison, the row has the time to copy the same weights, and the time to gather them without building modules.
    """
    first = []
    for plan in plans:
        router = TaskPlans(model, {plan: plans[plan]})
        first.append(_milliseconds(partial(router.__getitem__, plan)))
    largest = max(TaskPlans(model, plans).sizes.values())
    router = TaskPlans(model, plans, cache_bytes=largest)
    weights = _own(router[next(iter(plans))], model)
    rebuild = rebuild_of(model, next(iter(plans.values())))
    cuts = [(cut, model.get_parameter(cut.source).detach()) for cut in rebuild.cuts.values() if cut.blocks is not None]
    turns = itertools.cycle(plans)
    held: dict[str, Any] = {}  # Results live until the next ones exist, as in a cache.
    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: held.update(copy=[weight.clone() for weight in weights]),
        "cuts": lambda: held.update(cuts=[cut.of(dense) for cut, dense in cuts]),
        "model": lambda: router[next(turns)],
    }
    row = {"name": name, "modules": len(list(model.modules())), "dense_bytes": _bytes(model), "gathered_bytes": largest}
    row["construction_ms"] = round(_milliseconds(lambda: TaskPlans(model, plans)) / len(plans), 2)
    row |= {"first_ms": round(median(first), 2), **compare(functions, rounds=rounds)}
    print(row, flush=True)
    return row


def _memory(model: nn.Module, paths: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Measure the bytes of all tasks in the router, and of a separately saved model for each task."""
    router = TaskPlans(model, paths)
    tracemalloc.start()
    for name in router:
        _ = router[name]
    objects = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for name, path in paths.items():
        secateur.save(secateur.prune(model, Plan.load(path)), folder / name)
    saved = sum(path.stat().st_size for name in paths for path in (folder / name).rglob("*") if path.is_file())
    separate = sum(_bytes(secateur.prune(model, Plan.load(path))) for path in paths.values())
    return {
        "dense": _bytes(model), "gathered": router.bytes, "modules": objects, "separate": separate,
        "plan_files": sum(path.stat().st_size for path in paths.values()), "saved_folders": saved,
    }  # fmt: skip


def _throughput(model: nn.Module, paths: dict[str, Path], tasks: dict[str, secateur.TextToText], count: int) -> dict[str, Any]:
    """Measure examples per second and accuracy of a mixed stream in batches of 32.

    The routers are: all tasks' models cached, one cached at a time, and the dense model under the same routing (its plans
    remove nothing).
    """
    rows = [(name, row) for name in tasks for row in builtin.examples(f"{name}.test")[:count]]
    random.Random(0).shuffle(rows)
    batches = [rows[k : k + 32] for k in range(0, len(rows), 32)]
    whole = {name: _everything(Plan.load(path)) for name, path in paths.items()}
    smallest = max(TaskPlans(model, paths).sizes.values())
    routers = {
        "dense": TaskPlans(model, whole, tasks),
        "cached": TaskPlans(model, paths, tasks),
        "one at a time": TaskPlans(model, paths, tasks, cache_bytes=smallest),
    }
    correct: dict[str, int] = {}

    def serve(router_name: str) -> None:
        correct[router_name] = 0
        for batch in batches:
            answers = routers[router_name].score([name for name, _ in batch], [row["input"] for _, row in batch])
            correct[router_name] += sum(
                max(probabilities, key=probabilities.__getitem__) == row["target"]
                for probabilities, (_, row) in zip(answers, batch, strict=True)
            )

    times = compare({router_name: partial(serve, router_name) for router_name in routers}, rounds=9, warmup=1)
    speeds = {router_name: round(1e3 * len(rows) / times[f"{router_name}_ms"], 1) for router_name in routers}
    ratios = {router_name: times[f"{router_name}_over_dense"] for router_name in routers if router_name != "dense"}
    accuracy = {router_name: round(count / len(rows), 4) for router_name, count in correct.items()}
    print(speeds, ratios, accuracy, flush=True)
    return {"examples": len(rows), "batch": 32, "examples_per_second": speeds, "over_dense": ratios, "accuracy": accuracy}


def _everything(plan: Plan) -> Plan:
    """Return a plan that keeps all units."""
    return Plan({site.name: torch.arange(site.units) for site in plan.sites}, plan.sites, plan.fingerprint)


def _random_plan(model: nn.Module, seed: int) -> Plan:
    """Return a plan that keeps random units."""
    generator, sites = torch.Generator().manual_seed(seed), tuple(secateur.sites(model))
    kept = {s.name: torch.randperm(s.units, generator=generator)[: round(KEEP * s.units)].sort().values for s in sites}
    return Plan(kept, sites, fingerprint(model))


def _own(model: nn.Module, dense: nn.Module) -> list[torch.Tensor]:
    """Return the parameters that the model does not share with the dense model."""
    shared = {p.data_ptr() for p in dense.parameters()}
    return [p.detach() for p in model.parameters() if p.data_ptr() not in shared]


def _bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters."""
    return sum(p.nbytes for p in model.parameters())


def _milliseconds(function: Callable[[], Any]) -> float:
    """Return the milliseconds that a call takes."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)
