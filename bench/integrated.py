"""Integrated gradients: error, rank and time against nodes; time at equal error against Captum and a loop of full passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import minilm
import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur import builtin
from secateur.benchmarking import environment
from secateur.criteria import GradientActivation, IntegratedGradients
from secateur.discovery import branches_of, sites
from secateur.gates import undisturbed
from secateur.paths import LayerPath
from secateur.replay import Replay, leaf_ports
from secateur.site import Site
from secateur.tasks import Batch, Task

TOKENS = 4096
GAUSS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
RIEMANN = (10, 20, 50, 100, 200)
TOLERANCES = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)


@dataclass(frozen=True)
class Case:
    model: nn.Module
    task: Task
    rows: list[dict[str, Any]]

    def score(self, criterion: Any, select: str | None = None) -> tuple[secateur.Scores, float]:
        """Scores with those of each example, and the seconds they took."""
        start = time.perf_counter()
        scores = secateur.attribute(
            self.model, self.task, self.rows, criterion=criterion, select=select, max_tokens=TOKENS, per_example=True
        )
        return scores, time.perf_counter() - start

    def batch(self) -> Batch:
        (batch,) = self.task.batches(self.task.items(self.model, self.rows), torch.device("cpu"), TOKENS)
        return batch


def bert(examples: int) -> Case:
    model, tokenizer = minilm.classifier("domain")
    return Case(model, secateur.SequenceClassification(tokenizer), builtin.examples("domain")[:examples])


def t5(examples: int) -> Case:
    model, tokenizer = builtin.load()
    names = ("domain", "language", "movie", "sentiment")
    rows = [row for name in names for row in builtin.examples(name)[: examples // len(names)]]
    return Case(model, secateur.TextToText(tokenizer), rows)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "bert": lambda: against_peers(bert(24)),
    "t5": lambda: at_equal_error(t5(12), t5(64)),
    "rough": lambda: rough(t5(4)),
    "passes": lambda: {"bert": passes(bert(16)), "t5": passes(t5(16))},
    "nodes": lambda: {"bert": by_nodes(bert(8), 64), "t5": by_nodes(t5(12), 256)},
}


def integrated(parts: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """All parts, or some, on one thread."""
    torch.set_num_threads(1)
    return {"environment": environment(builtin.load()[0]), **{part: PARTS[part]() for part in parts}}


def against_peers(case: Case, rounds: int = 3) -> dict[str, Any]:
    """(i) All sites of the BERT classifier: the loosest tolerance whose error against 64 nodes is below 1% (mean over sites),
    against 20 Riemann steps and Captum's 50, whatever their errors are."""
    exact, _ = case.score(_ig(nodes=64))
    found = _fewest(case, exact, exact.sites, 0.01, TOLERANCES, lambda t: _ig(tolerance=t))
    ours = [case.score(_ig(tolerance=found["setting"])) for _ in range(rounds)]
    seconds = statistics.median(seconds for _, seconds in ours)
    rows = [{**_row(f"secateur, tolerance {found['setting']}", ours[0][0], exact, seconds), "nodes": found["nodes"]}]
    fixed, seconds = case.score(_ig(nodes=3))
    rows.append({**_row("secateur, 3 nodes", fixed, exact, seconds), "nodes": 3})
    batch = case.batch()
    for name, steps, run in (
        ("Riemann steps", 20, lambda site: peers.riemann(case.model, case.task, batch, site, 20, "probability")),
        ("Captum's steps", 50, lambda site: peers.captum(case.model, case.task, batch, site, 50, "probability", TOKENS)),
    ):
        scores, seconds = _by_site(case, batch, run)
        rows.append({**_row(f"{steps} {name}", scores, exact, seconds), "nodes": steps})
    return {"examples": len(case.rows), "sites": len(exact), "rows": rows}


def at_equal_error(case: Case, many: Case) -> dict[str, Any]:
    """(ii) The built-in T5: each method with the fewest steps, or the loosest tolerance, whose error is below 5% and 1%.

    Seconds are for the examples of `case`. Secateur's are taken on `many` examples and scaled down, because its pilot and its
    check are of a thirty-second of the examples each, but of four at least; the others treat each example alike.
    The error is the mean over sites against 256 nodes, or 1,024 where 128 nodes differ from 256 by more than 1%. The goal
    of 5% is over all sites, that of 1% over those for which 256 nodes are exact enough: nothing here reaches it elsewhere.
    """
    exact, _ = case.score(_ig(nodes=256))
    half, _ = case.score(_ig(nodes=128))
    batch, own = case.batch(), {site.name: _error(half, exact, site) for site in exact.sites}
    moving = [site for site in exact.sites if own[site.name] > 0.01]
    finer, _ = case.score(_ig(nodes=1024), select=_select(moving))
    _each(exact).update(_each(finer))
    result: dict[str, Any] = {"examples": len(case.rows), "128 against 256": own, "goals": {}}
    for goal in (0.05, 0.01):
        chosen = [site for site in exact.sites if goal == 0.05 or site not in moving]
        plain = _fewest(case, exact, chosen, goal, GAUSS, lambda n: _ig(nodes=n))
        auto = _fewest(case, exact, chosen, goal, TOLERANCES, lambda t: _ig(tolerance=t, max_nodes=192))
        scores, seconds = many.score(_ig(tolerance=auto["setting"], max_nodes=192), select=_select(chosen))
        auto["seconds"] = seconds * len(case.rows) / len(many.rows)
        auto["nodes"] = statistics.mean(s["nodes"] for s in _summary(scores).values())
        methods = {"secateur": auto, "secateur, Gauss-Legendre": plain}
        run = partial(peers.captum, case.model, case.task, batch)
        seconds = sum(_timed(partial(run, site, plain["setting"], "probability", TOKENS))[1] for site in chosen)
        methods["Captum"] = {**plain, "seconds": seconds}
        steps, error = _riemann_steps(case, batch, chosen, exact, goal)
        run = partial(peers.riemann, case.model, case.task, batch)
        seconds = sum(_timed(partial(run, site, steps, "probability"))[1] for site in chosen)
        methods["Riemann steps"] = {"setting": steps, "nodes": steps, "error": error, "seconds": seconds}
        result["goals"][str(goal)] = {"sites": [site.name for site in chosen], "methods": methods}
        print(goal, methods, flush=True)
    return result


def rough(case: Case, names: Sequence[str] = ("encoder.self.0", "encoder.ffn.0", "decoder.self.0")) -> dict[str, Any]:
    """The sites where F moves most: errors against 1,024 nodes, plain Gauss-Legendre and with nodes where F moves."""
    found = {}
    for words in names:
        exact, _ = case.score(_ig(nodes=1024), select=words)
        (site,) = exact.sites
        rows = []
        for nodes in (24, 48, 96, 192):
            plain, _ = case.score(_ig(nodes=nodes), select=words)
            placed, _ = case.score(_ig(tolerance=1e-6, max_nodes=nodes), select=words)
            spent = _summary(placed)[site.name]["nodes"]
            rows.append(
                {"nodes": nodes, "plain": _error(plain, exact, site), "placed": _error(placed, exact, site), "spent": spent}
            )
        found[site.name] = rows
        print(site.name, rows, flush=True)
    return {"examples": len(case.rows), "sites": found}


def passes(case: Case) -> dict[str, Any]:
    """FLOPs of one replayed forward pass of each site, against those that lie above the site in a full pass."""
    batch, chosen = case.batch(), sites(case.model)
    counted = {"run": 0, "ideal": 0}
    with undisturbed(case.model):
        replay = Replay(case.model, chosen, lambda b: case.task.target(case.model, b, "probability"), batch)
        rows, gate = torch.arange(len(batch.labels)), torch.full((len(batch.labels),), 0.5)
        for site, branch in branches_of(case.model, chosen).items():
            (port,) = leaf_ports(branch, site)
            below: list[int] = []
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module = case.model.get_submodule(port.path)
                handle = module.register_forward_hook(lambda m, a, o, c=counter, b=below: b.append(c.get_total_flops()))  # type: ignore[misc]
                case.task.target(case.model, batch, "probability")
                handle.remove()
            counted["ideal"] += counter.get_total_flops() - below[0]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                replay.run(site, rows, gate)
            counted["run"] += counter.get_total_flops()
    return {**counted, "ratio": counted["run"] / counted["ideal"]}


def by_nodes(case: Case, reference: int) -> dict[str, Any]:
    """Error, Spearman correlation, kept units and time against nodes and tolerances, for the default target and reduction."""
    exact, _ = case.score(IntegratedGradients(nodes=reference))
    plain, unit = case.score(GradientActivation())
    rows = [{"setting": "gradient x activation", **_likeness(plain, exact), "time": 1.0}]
    for nodes in (n for n in GAUSS if n <= min(64, reference // 2)):
        scores, seconds = case.score(IntegratedGradients(nodes=nodes))
        rows.append({"setting": f"{nodes} nodes", "nodes": nodes, **_likeness(scores, exact), "time": seconds / unit})
    for tolerance in TOLERANCES[:-1]:
        scores, seconds = case.score(IntegratedGradients(tolerance=tolerance, max_nodes=96))
        nodes = statistics.mean(s["nodes"] for s in _summary(scores).values())
        rows.append({"setting": f"tolerance {tolerance}", "nodes": nodes, **_likeness(scores, exact), "time": seconds / unit})
    return {"examples": len(case.rows), "reference": reference, "rows": rows, "other half": _halves(exact)}


def _ig(**settings: Any) -> IntegratedGradients:
    return IntegratedGradients(target="probability", over_examples="signed", **settings)


def _summary(scores: secateur.Scores) -> dict[str, dict[str, float]]:
    if scores.convergence is None:
        raise ValueError("scores: expected those of integrated gradients")
    return scores.convergence.summary()


def _error(scores: Any, exact: secateur.Scores, site: Site) -> float:
    """sum |difference| / sum |exact| over examples and units."""
    found, wanted = (_each(s)[site.name].double() for s in (scores, exact))
    return float((found - wanted).abs().sum() / wanted.abs().sum())


def _each(scores: Any) -> dict[str, Tensor]:
    each: dict[str, Tensor] | None = scores.per_example if isinstance(scores, secateur.Scores) else scores
    if each is None:
        raise ValueError("scores: expected those of each example")
    return each


def _row(name: str, each: Any, exact: secateur.Scores, seconds: float) -> dict[str, Any]:
    errors = [_error(each, exact, site) for site in exact.sites]
    print(name, statistics.mean(errors), max(errors), seconds, flush=True)
    return {"method": name, "error": statistics.mean(errors), "worst": max(errors), "seconds": seconds}


def _by_site(case: Case, batch: Batch, run: Callable[[Site], Tensor]) -> tuple[dict[str, Tensor], float]:
    found, total = {}, 0.0
    for site in sites(case.model):
        scores, seconds = _timed(lambda s=site: run(s))  # type: ignore[misc]
        found[site.name] = torch.zeros_like(scores).index_add_(0, torch.tensor(batch.rows), scores)
        total += seconds
    return found, total


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _fewest(
    case: Case, exact: secateur.Scores, chosen: Sequence[Site], goal: float, settings: Sequence[Any], make: Callable[[Any], Any]
) -> dict[str, Any]:
    """The first of the settings, which go from coarse to fine, whose mean error over the chosen sites is below the goal."""
    tried: dict[int, dict[str, Any]] = {}
    low, high = 0, len(settings) - 1
    while low not in tried:
        middle = (low + high) // 2
        scores, seconds = case.score(make(settings[middle]), select=_select(chosen))
        error = statistics.mean(_error(scores, exact, site) for site in chosen)
        nodes = statistics.mean(s["nodes"] for s in _summary(scores).values())
        tried[middle] = {"setting": settings[middle], "nodes": nodes, "error": error, "seconds": seconds}
        if error <= goal:
            high = middle
        else:
            low = min(middle + 1, high)
    return tried[low]


def _select(chosen: Sequence[Site]) -> str:
    return ",".join(f"{site.stack}.{site.kind}.{site.layer}" for site in chosen)


def _riemann_steps(case: Case, batch: Batch, chosen: Sequence[Site], exact: secateur.Scores, goal: float) -> tuple[int, float]:
    """The fewest steps of a right Riemann sum; replayed, since the nodes of the finest sum are those of the others too."""
    finest, everyone = max(RIEMANN), torch.arange(len(batch.labels))
    errors: dict[int, list[float]] = {steps: [] for steps in RIEMANN}
    with undisturbed(case.model):
        replay = Replay(case.model, chosen, lambda b: case.task.target(case.model, b, "probability"), batch)
        for site in chosen:
            path = LayerPath(replay, site, TOKENS // batch.inputs["input_ids"].shape[1])
            sums = {steps: torch.zeros(len(everyone), site.units) for steps in RIEMANN}
            for k in range(1, finest + 1):
                wanted = [steps for steps in RIEMANN if k % (finest // steps) == 0]
                if wanted:
                    gate = torch.full((len(everyone), 1), k / finest)
                    _, scores = path.weighted(everyone, gate, torch.ones_like(gate), torch.zeros(len(everyone)))
                    for steps in wanted:
                        sums[steps] += scores / steps
            for steps, total in sums.items():
                placed = torch.zeros_like(total).index_add_(0, torch.tensor(batch.rows), total)
                errors[steps].append(_error({site.name: placed}, exact, site))
    means = {steps: statistics.mean(found) for steps, found in errors.items()}
    return next(((n, means[n]) for n in RIEMANN if means[n] <= goal), (finest, means[finest]))


def _likeness(scores: secateur.Scores, exact: secateur.Scores) -> dict[str, float]:
    """Means over sites: error by example, rank correlation of the scores, and of the better half (or fifth) what is common."""
    found = {
        "error": statistics.mean(_error(scores, exact, site) for site in exact.sites),
        "spearman": statistics.mean(_spearman(scores[name], exact[name]) for name in exact),
    }
    for keep in (0.5, 0.2):
        found[f"kept {keep}"] = statistics.mean(_common(scores[name], exact[name], keep) for name in exact if "ffn" in name)
    return found


def _halves(exact: secateur.Scores) -> dict[str, float]:
    """The same likeness between the scores of one half of the examples and of the other: what the choice of examples does."""
    each = {name: rows.double().abs() for name, rows in _each(exact).items()}
    first, second = ({name: rows[k::2].sum(0) for name, rows in each.items()} for k in (0, 1))
    found = {"spearman": statistics.mean(_spearman(first[name], second[name]) for name in first)}
    for keep in (0.5, 0.2):
        found[f"kept {keep}"] = statistics.mean(_common(first[name], second[name], keep) for name in first if "ffn" in name)
    return found


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _common(a: Tensor, b: Tensor, keep: float) -> float:
    count = max(1, round(keep * len(a)))
    return len(set(a.topk(count).indices.tolist()) & set(b.topk(count).indices.tolist())) / count
