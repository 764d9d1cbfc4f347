"""Compare pruning methods under the same budgets of FLOPs: accuracy by model, task, method, budget and draw of the examples.

python -m bench.measurements.budgets --out DIR [--models t5,bert] [--methods NAME,...] [--tasks NAME,...] [--draws N]
python -m bench.measurements.budgets --out DIR --timed [...]    times the models of one task; needs a quiet machine
python -m bench.measurements.budgets --out DIR --collect NAME   writes bench/results/NAME.json

A killed run continues with the next cell. Each model has its own ledger of cells, so two models can run at the same time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from bench.rivals.flap import CHANNELS, flap
from bench.rivals.kwon import CRITERION, Stage, kwon
from bench.rivals.optimal_brain_surgeon import tyr, ziplm
from bench.rivals.torch_pruning_taylor import T5, torch_pruning
from bench.subjects import minilm, smollm
from bench.support.budgeted import layer_flops
from bench.support.provenance import RESULTS, commit
from secateur.attribution.criteria import Criterion, Fluctuation, RandomScores, Wanda, WeightMagnitude, criterion_named
from secateur.data import builtin
from secateur.flow.choose import RECOVERIES, Candidate
from secateur.flow.effort import EFFORTS, Effort
from secateur.flow.within_budget import within_budget
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.sites import AttentionUnit
from secateur.planning.budget import Budget
from secateur.planning.shapes import Shape
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.ledger import Ledger
from secateur.tasks import Task

SHARES = (0.7, 0.5, 0.33)
TIMED, SHAPE = {"t5": "language", "bert": "domain"}, (32, 64)  # The task and the batch that --timed measures, on one thread.
# Prompts with examples. Without examples the dense model is hardly better than chance (.577 on movie).
SMOLLM_PROMPTS = {
    "movie": (
        "Review: movie review: A bland animated sequel that hardly seems worth the effort.\nSentiment: bad\n\n"
        "Review: movie review: Flawed but worthy look at life in U.S. relocation camps.\nSentiment: good\n\n"
        "Review: {input}\nSentiment:"
    ),
    "sentiment": (
        "sentiment: I agree with all negative opinions.\nanswer: negative\n\n"
        "sentiment: The food was great.\nanswer: positive\n\n"
        "{input}\nanswer:"
    ),
    "domain": (
        "domain: The room was clean and the breakfast was good.\nanswer: hotels\n\n"
        "domain: The doctor did not listen to me.\nanswer: medicine\n\n"
        "domain: The phone's battery is weak.\nanswer: products\n\n"
        "domain: The lecturer is strict in exams.\nanswer: reviews\n\n"
        "{input}\nanswer:"
    ),
    "language": (
        "Text: language: Im Allgemeinen empfehle ich den Schaden und die Nerven und das Geld nicht.\nLanguage: de\n\n"
        "Text: language: Nice, thick hair, claws and mucous membranes in good condition.\nLanguage: en\n\n"
        "Text: {input}\nLanguage:"
    ),
}
BERT_TASKS = ("domain", "qtype", "movie", "language", "sentiment")


@dataclass(frozen=True)
class Seconds:
    """Wall-clock time, and CPU time of this process. CPU time does not depend on other processes of the machine."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        """Return the current readings of both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Draw:
    """A model, a task, and one draw of the calibration examples.

    Scores are computed once for all budgets. `owed` adds up the seconds that a method saves by that. They count as the method's
    own.
    """

    model: nn.Module
    task: Task
    rows: list[dict[str, Any]]
    number: int
    owed: Seconds = field(default_factory=Seconds)
    _scores: dict[str, tuple[secateur.Scores, Seconds]] = field(default_factory=dict)

    def scores(
        self, criterion: Criterion, unit: AttentionUnit = "head", select: str | None = None, per_example: bool = False
    ) -> secateur.Scores:
        """Return the scores of a criterion, from the cache if they are known."""
        key = json.dumps([criterion.to_json(), unit, select, per_example])
        if key in self._scores:
            scores, seconds = self._scores[key]
            self.owed = self.owed + seconds
            return scores
        start = Seconds.now()
        scores = secateur.attribute(
            self.model, self.task, self.rows, criterion=criterion, unit=unit, select=select, per_example=per_example
        )
        self._scores[key] = scores, Seconds.now() - start
        return scores

    @property
    def tokens(self) -> Mapping[str, float]:
        """Return the mean lengths, which weight FLOPs. They need no pass over the model, so no method owes time for them."""
        owed = self.owed
        tokens = self.scores(RandomScores()).tokens
        self.owed = owed
        return tokens


Method = Callable[[Draw, float], nn.Module]


def by_secateur(unit: AttentionUnit = "head", rounds: int = 1, shape: Shape = "any", effort: Effort = "default") -> Method:
    """Prune as `secateur prune` does: try criteria, allocations, moves and recoveries, then refit the best on all examples."""

    def method(draw: Draw, share: float) -> nn.Module:
        best = best_candidate(draw, share, unit, rounds, shape, effort)
        pruned = secateur.prune(draw.model, best.plan)
        if best.recovery is not None:
            removed = best.plan.removed_blocks
            secateur.recover_(draw.model, pruned, draw.task, draw.rows, method=best.recovery, removed_blocks=removed)
        return pruned

    return method


def best_candidate(
    draw: Draw,
    share: float,
    unit: AttentionUnit = "head",
    rounds: int = 1,
    shape: Shape = "any",
    effort: Effort = "default",
) -> Candidate:
    """Find the plan and the recovery that `secateur prune` takes."""
    model, task, rows, work = draw.model, draw.task, draw.rows, EFFORTS[effort]
    criteria = [criterion_named(name) for name in work.criteria]
    if rounds == 1:
        scores = [draw.scores(criterion, unit=unit) for criterion in criteria]
    else:
        scores = [
            secateur.attribute_in_rounds(model, task, rows, rounds, {"flops": share}, unit=unit, criterion=criterion)
            for criterion in criteria
        ]
    removable = secateur.removable_blocks(model, task, rows) if shape == "stock" else []
    options: dict[str, Any] = {"per_head": unit == "channel", "shape": shape, "removable": removable}
    (best, *_), _ = within_budget(
        model, task, rows, scores, Budget("flops", share), ((), ()), RECOVERIES, work.moves, 4096,
        say=lambda text: None, progress=None, **options,
    )  # fmt: skip
    return best


def by_kwon(stage: Stage) -> Method:
    """Prune by Kwon et al. up to a stage."""

    def method(draw: Draw, share: float) -> nn.Module:
        return kwon(draw.model, draw.task, draw.rows, share, stage=stage, scores=draw.scores(CRITERION, per_example=True))

    return method


def by_flap(draw: Draw, share: float) -> nn.Module:
    """Prune by FLAP with its bias compensation."""
    scores = draw.scores(Fluctuation(), unit="channel", select=CHANNELS)
    return flap(draw.model, draw.task, draw.rows, share, scores=scores)


def by_surgeon(search: Callable[..., nn.Module]) -> Method:
    """Prune by the Optimal Brain Surgeon with one of its searches."""
    return lambda draw, share: search(draw.model, draw.task, draw.rows, share, seed=draw.number)


def uniform(criterion: Callable[[Draw], Criterion]) -> Method:
    """Keep the best heads and neurons of each layer by a criterion, at one rate for all layers, without recovery."""
    return lambda draw, share: secateur.prune(draw.model, secateur.plan(draw.scores(criterion(draw)), flops=share))


def by_torch_pruning(ranking: str, hidden: bool = False) -> Method:
    """Prune by Torch-Pruning with its Taylor importance."""

    def method(draw: Draw, share: float) -> nn.Module:
        return torch_pruning(draw.model, draw.task, draw.rows, share, draw.tokens, ranking=ranking, hidden=hidden)

    return method


METHODS: dict[str, Method] = {
    "secateur": by_secateur(),
    "secateur, low effort": by_secateur(effort="low"),
    "secateur, high effort": by_secateur(effort="high"),
    "secateur, 3 rounds": by_secateur(rounds=3),
    "secateur, channels": by_secateur("channel"),
    "secateur, stock": by_secateur(shape="stock"),
    "secateur, per-layer": by_secateur(shape="per-layer"),
    "Kwon et al.": by_kwon("tuning"),
    "Kwon et al., without tuning": by_kwon("rearrangement"),
    "Kwon et al., search alone": by_kwon("search"),
    "FLAP": by_flap,
    "ZipLM": by_surgeon(ziplm),
    "Týr": by_surgeon(tyr),
    "Wanda, structured": uniform(lambda draw: Wanda()),
    "magnitude": uniform(lambda draw: WeightMagnitude()),
    "random": uniform(lambda draw: RandomScores(seed=draw.number)),
    "Torch-Pruning Taylor": by_torch_pruning("local"),
    "Torch-Pruning Taylor, global": by_torch_pruning("global"),
    "Torch-Pruning Taylor, d_model too": by_torch_pruning("local", hidden=True),
}
LEFT_OUT = {("t5", name): T5 for name in METHODS if name.startswith("Torch-Pruning")}


@dataclass(frozen=True)
class Subject:
    """A model with a task and its test examples."""

    name: str
    model: nn.Module
    task: Task
    test: list[dict[str, Any]]


def t5_tasks(names: Sequence[str] | None, tested: int) -> Iterator[Subject]:
    """Yield the built-in model with each of its tasks."""
    model, tokenizer = builtin.load()
    for name in names or builtin.tasks():
        targets = sorted({row["target"] for row in builtin.examples(name)})
        task = secateur.TextToText(tokenizer, labels=targets if len(targets) <= 32 else None)
        yield Subject(name, model, task, builtin.examples(f"{name}.test")[:tested])


def bert_tasks(names: Sequence[str] | None, tested: int, source: Callable[[str], Any] = minilm.fine_tuned) -> Iterator[Subject]:
    """Yield a classifier for each task. All its weights are fine-tuned."""
    for name in names or BERT_TASKS:
        if name in BERT_TASKS:
            model, tokenizer = source(name)
            yield Subject(name, model, secateur.SequenceClassification(tokenizer), builtin.examples(f"{name}.test")[:tested])


def frozen_bert_tasks(names: Sequence[str] | None, tested: int) -> Iterator[Subject]:
    """Yield classifiers with a trained head alone, for a quick run. Training takes half a minute."""
    return bert_tasks(names, tested, minilm.classifier)


def smollm_tasks(names: Sequence[str] | None, tested: int) -> Iterator[Subject]:
    """Yield SmolLM2-135M-Instruct with each task that it does by a prompt better than by chance."""
    for name, text in SMOLLM_PROMPTS.items():
        if name in (names or SMOLLM_PROMPTS):
            model, tokenizer = smollm.load()
            labels = sorted({row["target"] for row in builtin.examples(name)})
            task = secateur.CausalLM(tokenizer, labels=labels, prompt=secateur.Prompt(text))
            yield Subject(name, model, task, builtin.examples(f"{name}.test")[:tested])


MODELS = {"t5": t5_tasks, "bert": bert_tasks, "bert-frozen": frozen_bert_tasks, "smollm": smollm_tasks}


def main() -> None:
    """Run the command line that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="Methods of pruning under the same budgets of FLOPs.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished cells")
    parser.add_argument("--models", default="t5,bert", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--methods", help=f"some of {'; '.join(METHODS)}, separated by semicolons")
    parser.add_argument("--tasks", help="all by default")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="shares of the layers' FLOPs")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--examples", type=int, default=300, help="number of calibration examples, at most 1000")
    parser.add_argument("--tested", type=int, default=500)
    parser.add_argument("--timed", action="store_true", help="time the pruned models of one task, draw 0, and run no cell")
    parser.add_argument("--collect", metavar="NAME", help="write all cells to bench/results/NAME.json, and run no cell")
    given = parser.parse_args()
    if given.collect:
        collect(given.out, RESULTS / f"{given.collect}.json")
        return
    methods = [name.strip() for name in given.methods.split(";")] if given.methods else list(METHODS)
    models = given.models.split(",")
    for kind, chosen, known in (("models", models, MODELS), ("methods", methods, METHODS)):
        if set(chosen) - set(known):
            sys.exit(f"{kind}: expected some of {'; '.join(known)}, got {'; '.join(chosen)}")
    torch.set_num_threads(1)
    shares = [float(share) for share in given.shares.split(",")]
    tasks = given.tasks.split(",") if given.tasks else None
    given.out.mkdir(parents=True, exist_ok=True)
    if given.timed:
        for model in models:
            time_models(given.out, model, methods, shares, given.examples, given.tested)
        return
    for model in models:
        with Ledger(given.out / model, {"examples": given.examples, "tested": given.tested}) as ledger:
            for subject in MODELS[model](tasks, given.tested):
                run_subject(ledger, model, subject, methods, shares, given.draws, given.examples)


def run_subject(
    ledger: Ledger, model: str, subject: Subject, methods: Sequence[str], shares: Sequence[float], draws: int, examples: int
) -> None:
    """Run the cells of one model and task that are not finished yet."""
    dense = secateur.evaluate(subject.model, subject.task, subject.test)
    measured_commit = commit()
    for number in range(draws):
        rows = random.Random(number).sample(builtin.examples(subject.name), examples)
        draw = Draw(subject.model, subject.task, rows, number)
        for name in methods:
            for share in shares:
                cell = {"model": model, "task": subject.name, "draw": number, "method": name, "share": share}
                if cell in ledger or (model, name) in LEFT_OUT:
                    continue
                row = {
                    "metric": dense.metric,
                    "dense": dense.value,
                    "commit": measured_commit,
                    **run_cell(draw, name, share, subject.test),
                }
                ledger.add(cell, row)
                summary = {key: row[key] for key in ("flops", "cpu_seconds", "accuracy", "error") if key in row}
                print(*cell.values(), summary, flush=True)


def run_cell(draw: Draw, name: str, share: float, test: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of the layers' FLOPs that is left, the seconds of the whole method, and the accuracy; or the error."""
    dense = layer_flops(draw.model, draw.tokens)
    draw.owed, start = Seconds(), Seconds.now()
    try:
        pruned = METHODS[name](draw, share)
    except InputError as error:
        return {"error": str(error)}
    spent = Seconds.now() - start + draw.owed
    remaining = layer_flops(pruned, draw.tokens) / dense
    value = secateur.evaluate(pruned, draw.task, test).value
    seconds = {"seconds": round(spent.wall, 2), "cpu_seconds": round(spent.cpu, 2)}
    return {"flops": round(remaining, 4), **seconds, "accuracy": value}


def time_models(out: Path, model: str, methods: Sequence[str], shares: Sequence[float], examples: int, tested: int) -> None:
    """Time each method's model of one task in turn with the dense model. Write accuracy and measured speed-up of a batch."""
    (subject,) = MODELS[model]([TIMED[model]], tested)
    rows = random.Random(0).sample(builtin.examples(subject.name), examples)
    draw = Draw(subject.model, subject.task, rows, 0)
    dense = secateur.evaluate(subject.model, subject.task, subject.test).value
    batches = synthetic_batches(subject.model, [SHAPE[0]], [SHAPE[1]])
    with Ledger(
        out / f"timed-{model}", {"examples": examples, "tested": tested, "task": subject.name, "batch": list(SHAPE)}
    ) as ledger:
        for name in methods:
            for share in shares:
                cell = {"model": model, "task": subject.name, "method": name, "share": share}
                if cell in ledger or (model, name) in LEFT_OUT:
                    continue
                try:
                    pruned = METHODS[name](draw, share)
                except InputError:
                    continue
                (timing,) = secateur.benchmark(subject.model, pruned, batches).timings
                value = secateur.evaluate(pruned, subject.task, subject.test).value
                row = {"dense": dense, "accuracy": value, "speedup": timing.speedup, "flops_speedup": timing.flops_speedup}
                ledger.add(cell, {**row, "quartiles": [timing.speedup_low, timing.speedup_high]})
                print(*cell.values(), row, flush=True)


def collect(out: Path, results: Path) -> None:
    """Write all cells to a file."""
    rows, timed, settings = [], [], list[dict[str, Any]]()
    for name in MODELS:
        if (out / f"timed-{name}").is_dir():
            with Ledger(out / f"timed-{name}", json.loads((out / f"timed-{name}" / "settings.json").read_text())) as ledger:
                timed += ledger.rows()
        if (out / name).is_dir():
            settings.append(json.loads((out / name / "settings.json").read_text()))
            with Ledger(out / name, settings[-1]) as ledger:
                rows += [{**row, **settings[-1]} for row in ledger.rows()]
    if not rows:
        sys.exit(f"out: expected finished cells in {str(out)!r}, got none")
    commits = sorted({row.pop("commit") for row in rows})
    left_out = [{"model": model, "method": method, "why": why} for (model, method), why in LEFT_OUT.items()]
    about = {"commit": ", ".join(commits), "environment": environment(builtin.load()[0])}
    if all(one == settings[0] for one in settings):
        about |= settings[0]
    shares = sorted({row["share"] for row in rows}, reverse=True)
    document = {**about, "shares": shares, "left_out": left_out, "rows": rows, "timed": timed}
    results.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
