"""Measure a small fixed part of each result file again, and compare ratios and accuracies with the committed values.

python -m bench.check [NAME ...]     takes minutes on a CPU; NAME is a result file without its ending

The exit code is 1 if a figure differs. Seconds are not compared, because they depend on the machine. A part that cannot be
measured in minutes on a CPU is printed as "not rerun" with the reason. It does not count as passed.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import secateur
from bench.support.provenance import RESULTS
from bench.support.tables import result
from secateur.data import builtin

Pair = tuple[str, float, float]  # The figure's name, the committed value and the value measured now.


@dataclass(frozen=True)
class Check:
    """One part of a result file that is measured again.

    Attributes:
        name: The result file, without its ending.
        part: What is measured again.
        tolerance: The largest difference that is accepted.
        relative: The tolerance is a share of the committed value. Otherwise it is absolute.
        why: The reason for the tolerance.
        measure: Measures again, and yields pairs of figures.
    """

    name: str
    part: str
    tolerance: float
    relative: bool
    why: str
    measure: Callable[[], Iterator[Pair]]

    def accepts(self, committed: float, measured: float) -> bool:
        """Return True if the measured value is within the tolerance of the committed one."""
        scale = abs(committed) if self.relative else 1.0
        return abs(measured - committed) <= self.tolerance * scale + 1e-12


def committed_row(file: str, part: str, /, **wanted: Any) -> dict[str, Any]:
    """Return the one row of a result file that has these values."""
    rows: list[dict[str, Any]] = result(file)[part]
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


def domain_task(examples: int, tested: int) -> Any:
    """Return the built-in model and the built-in task `domain` with its examples."""
    from bench.support.task_examples import builtin_tasks

    model, tokenizer = builtin.load()
    return model, next(task for task in builtin_tasks(tokenizer, examples, tested) if task.name == "domain")


def quality() -> Iterator[Pair]:
    """Measure accuracies of gradient x activation with the default settings."""
    from secateur.attribution.criteria import GradientActivation

    wanted = {"task": "domain", "units": "heads and neurons", "setting": "log-probability, absolute"}
    row = committed_row("quality", "rows", **wanted)
    model, domain = domain_task(300, 500)
    yield "dense", row["dense"], secateur.evaluate(model, domain.task, domain.test).value
    scores = secateur.attribute(model, domain.task, domain.calibration, criterion=GradientActivation())
    for keep, accuracy in row["accuracy"].items():
        pruned = secateur.prune(model, secateur.plan(scores, keep=float(keep)))
        yield f"keep {keep}", accuracy, secateur.evaluate(pruned, domain.task, domain.test).value


def recovery() -> Iterator[Pair]:
    """Measure accuracies before and after the refit."""
    row = committed_row("recovery", "rows", task="domain", unit="head", keep=0.5)
    model, domain = domain_task(300, 500)
    scores = secateur.attribute(model, domain.task, domain.calibration)
    pruned = secateur.prune(model, secateur.plan(scores, keep=0.5))
    yield "plain", row["plain"], secateur.evaluate(pruned, domain.task, domain.test).value
    secateur.recover_(model, pruned, domain.task, domain.calibration)
    yield "recovered", row["recovered"], secateur.evaluate(pruned, domain.task, domain.test).value


def healing() -> Iterator[Pair]:
    """Measure one task before and after healing."""
    from bench.measurements.healing import Start
    from bench.support.task_examples import builtin_tasks

    run, row = result("healing"), committed_row("healing", "rows", task="question", flops=0.2)
    model, tokenizer = builtin.load()
    subjects = builtin_tasks(tokenizer, run["examples"], run["tested"])
    now = Start(model, next(subject for subject in subjects if subject.name == "question"), 0.2).healed()
    yield from ((name, row[name], now[name]) for name in ("recovered", "healed"))


def worth() -> Iterator[Pair]:
    """Measure accuracies of one draw of the calibration examples."""
    wanted = {"task": "domain", "draw": 0, "criterion": "gradient x activation", "stack": "both"}
    row = committed_row("worth", "rows", **wanted)
    model, domain = domain_task(1000, 200)
    calibration = random.Random(0).sample(builtin.examples("domain"), result("worth")["examples"])
    scores = secateur.attribute(model, domain.task, calibration)
    for keep, accuracy in row["accuracy"].items():
        pruned = secateur.prune(model, secateur.plan(scores, keep=float(keep)))
        yield f"keep {keep}", accuracy, secateur.evaluate(pruned, domain.task, domain.test).value


def budgets() -> Iterator[Pair]:
    """Measure the remaining share of FLOPs and the accuracy of secateur's own method."""
    from bench.measurements.budgets import Draw, run_cell, t5_tasks

    row = committed_row("budgets", "rows", model="t5", task="domain", draw=0, method="secateur", share=0.5)
    (subject,) = t5_tasks(["domain"], 500)
    examples = random.Random(0).sample(builtin.examples("domain"), 300)
    cell = run_cell(Draw(subject.model, subject.task, examples, 0), "secateur", 0.5, subject.test)
    yield "share of FLOPs", row["flops"], cell["flops"]
    yield "accuracy", row["accuracy"], cell["accuracy"]


def integrated() -> Iterator[Pair]:
    """Count the FLOPs of a replayed forward pass, relative to the FLOPs above the site."""
    from bench.measurements.integrated import passes, t5

    yield "FLOPs run / FLOPs above the sites", result("integrated")["passes"]["t5"]["ratio"], passes(t5(16))["ratio"]


def latency() -> Iterator[Pair]:
    """Measure the speed-up of a uniform plan."""
    from bench.measurements.latency import _uniform
    from secateur.measuring.synthetic import synthetic_batches

    predicted = committed_row("latency", "models", name="builtin-t5")["predicted"]
    (row,) = (row for row in predicted if row["keep"] == 0.5)
    model, _ = builtin.load()
    (batch,) = synthetic_batches(model, [32], [64])
    (timing,) = secateur.benchmark(model, secateur.prune(model, _uniform(model, 0.5)), [batch], pairs=15).timings
    yield "speed-up, keep 0.5", row["measured"], timing.speedup


def speed() -> Iterator[Pair]:
    """Time the bare passes and the Taylor pass in turn with attribution."""
    from bench.measurements.bench_attribution import passes
    from bench.subjects.shapes import cases
    from bench.support.interleaved import compare

    row = committed_row("speed", "rows", group="attribution", model="builtin-t5")
    times = compare(passes(cases()["builtin-t5"]()))
    for name in ("bare_over_attribution", "taylor_over_attribution"):
        yield name, row[name]["median"], times[name]["median"]


def pruning() -> Iterator[Pair]:
    """Measure all steps of pruning in forward passes over the calibration examples."""
    from bench.measurements.pruning import _steps

    row = committed_row("pruning", "rows", name="builtin-t5")
    model, tokenizer = builtin.load()
    labels = sorted({example["target"] for example in builtin.examples("language")})
    measured = _steps("builtin-t5", model, secateur.TextToText(tokenizer, labels=labels), builtin.examples("language")[:1000])
    yield "forward passes in all", row["total"], measured["total"]
    yield "speed-up", row["speedup"], measured["speedup"]


def routing() -> Iterator[Pair]:
    """Measure the time to gather a task's model, relative to the time to copy its weights."""
    from bench.measurements.routing import KEEP, _gathering

    row = committed_row("routing", "gathering", name="builtin-t5")
    model, tokenizer = builtin.load()
    plans = {}
    for name in ("domain", "language"):
        examples = builtin.examples(name)
        task = secateur.TextToText(tokenizer, labels=sorted({example["target"] for example in examples}))
        plans[name] = secateur.plan(secateur.attribute(model, task, examples[:128]), keep=KEEP)
    measured = _gathering("builtin-t5", model, plans)
    for name in ("cuts_over_copy", "model_over_copy"):
        yield name, row[name]["median"], measured[name]["median"]


def multitask() -> Iterator[Pair]:
    """Time a training step with masks, relative to the step without masks."""
    from bench.measurements.multitask import masked_steps
    from secateur.cli.commands.multitask import load_encoder

    row = committed_row("multitask", "steps", model="builtin-t5", length=64)
    encoder, _ = load_encoder("builtin")
    measured = masked_steps(encoder, (32, 64), rounds=5)
    for name in ("element movement global_over_dense", "rank movement global_over_dense"):
        yield name, row[name]["median"], measured[name]["median"]


def ldnet() -> Iterator[Pair]:
    """Measure the speed-up of a tagger with one remaining layer."""
    from bench.measurements.ldnet import ldnet

    row = committed_row("ldnet", "rows", tagger="1 left")
    measured = ldnet(lefts=(1,), rounds=3)["rows"][1]
    yield "speed-up by FLOPs", row["implied"], measured["implied"]
    yield "measured speed-up", row["measured"], measured["measured"]


def layers() -> Iterator[Pair]:
    """Time a training step with gates, relative to the step without gates."""
    from bench.measurements.layers import steps

    for measured in steps(rounds=5, names=["builtin-t5"]):
        row = committed_row("layers", "steps", model="builtin-t5", frozen=measured["frozen"])
        name = f"gated over plain, {'frozen' if measured['frozen'] else 'trained'}"
        yield name, row["gated_over_plain"]["median"], measured["gated_over_plain"]["median"]


def startup() -> Iterator[Pair]:
    """Time the help again, relative to the import of torch."""
    from bench.measurements.startup import startup as measure

    committed, names = result("startup")["times"], ("torch", "help", "prune_help", "score_help")
    measured = measure(rounds=5, names=names)["times"]
    for name in names[1:]:
        yield f"{name} over torch", committed[f"{name}_over_torch"]["median"], measured[f"{name}_over_torch"]["median"]


def demo() -> Iterator[Pair]:
    """Measure the accuracy at one rate of the sweep, in the same way as `secateur demo`."""
    row = committed_row("demo", "sweep", keep=0.5)
    examples = builtin.examples("language")
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=sorted({example["target"] for example in examples}))
    plan = secateur.plan(secateur.attribute(model, task, examples, unit="channel"), keep=0.5, per_head=True)
    pruned = secateur.prune(model, plan)
    secateur.recover_(model, pruned, task, examples[: result("demo")["refitted"]])
    yield "accuracy", row["value"], secateur.evaluate(pruned, task, builtin.examples("language.test")).value
    yield "parameters", row["parameters"], sum(parameter.numel() for parameter in pruned.parameters())


ROUNDING = "rounding of another CPU or release changes some answers"
CLOCK = "a ratio of times that drifts with the CPU's caches and with other processes"
CHECKS = (
    Check("quality", "domain, heads and neurons, log-probability", 0.02, False, f"10 of 500 answers: {ROUNDING}", quality),
    Check("recovery", "domain, heads, keep 0.5", 0.02, False, f"10 of 500 answers: {ROUNDING}", recovery),
    Check("healing", "question, a fifth of the FLOPs", 0.06, False, f"30 of 500 answers, after training: {ROUNDING}", healing),
    Check("worth", "domain, draw 0, gradient x activation", 0.03, False, f"6 of 200 answers: {ROUNDING}", worth),
    Check("budgets", "built-in T5, domain, draw 0, secateur, half", 0.02, False, f"10 of 500 answers: {ROUNDING}", budgets),
    Check("demo", "language, channels, keep 0.5", 0.02, False, f"20 of 1,000 answers: {ROUNDING}", demo),
    Check("integrated", "passes of the built-in T5", 0.001, False, "FLOPs are counted, not timed", integrated),
    Check("latency", "built-in T5, keep 0.5", 0.25, True, CLOCK, latency),
    Check("speed", "attribution of the built-in T5", 0.25, True, CLOCK, speed),
    Check("pruning", "steps of pruning the built-in T5", 0.3, True, f"{CLOCK}; the recovery that is picked differs", pruning),
    Check("routing", "gathering plans of two tasks", 0.4, True, f"{CLOCK}; calls of a millisecond", routing),
    Check("multitask", "masked steps of the built-in encoder", 0.25, True, CLOCK, multitask),
    Check("ldnet", "one layer left of 20", 0.3, True, f"{CLOCK}; 27 times as fast, so 4 ms count", ldnet),
    Check("startup", "help in new processes", 0.3, True, f"{CLOCK}; files that the system has cached", startup),
    Check("layers", "training steps with gates, built-in T5", 0.25, True, CLOCK, layers),
)
NOT_RERUN = {
    "compatibility": "needs packages of other projects, g++ and llama.cpp, and an hour",
    "corpus": "tuning, compilation and three rounds of every way take more than minutes",
    "corpus-again": "as corpus",
    "corpus-other-cpu": "is of another CPU",
    "corpus-ray": "needs Ray",
    "engines": "needs packages with weights, and the packages of all engines",
    "runners": "needs OpenVINO and ONNX Runtime, and tuning and three rounds of every way take more than minutes",
    "efforts": "as budgets, whose check prunes the same way",
    "shapes": "as budgets, whose check prunes the same way",
    "healing-probes": "is of settings and code that were given up",
    "prompts": "needs a package with weights, and takes a quarter of an hour",
    "real-models": "needs packages with weights, and hours",
    "reproduce-ap": "hours of runs; a page's test recomputes the claims from the cells",
    "reproduce-ldnet": "hours of training; a page's test recomputes the claims from the cells",
    "reproduce-multitask": "hours of training; a page's test recomputes the claims from the cells",
}


def main(names: list[str]) -> int:
    """Run the checks of these result files, or of all, and return the exit code."""
    known = {path.stem for path in RESULTS.glob("*.json")}
    if unknown := set(names) - known:
        raise SystemExit(f"name: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    passed, differing = 0, 0
    for check in CHECKS:
        if names and check.name not in names:
            continue
        start = time.perf_counter()
        limit = f"{check.tolerance:.0%} of it" if check.relative else f"{check.tolerance:g}"
        for figure, committed, measured in check.measure():
            right = check.accepts(committed, measured)
            passed, differing = passed + right, differing + (not right)
            word = "same" if right else "DIFFERS"
            print(f"{word:8}{check.name}: {figure}: committed {committed:.4g}, now {measured:.4g}, within {limit}", flush=True)
        print(f"        {check.name}: {check.part}; {check.why}; {time.perf_counter() - start:.0f} s", flush=True)
    missing = [name for name in sorted(known) if not names or name in names]
    for name in missing:
        if name in NOT_RERUN:
            print(f"not rerun: {name}: {NOT_RERUN[name]}")
    print(f"{passed} figures the same, {differing} differ, {sum(name in NOT_RERUN for name in missing)} files not rerun")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
