"""secateur: cut a multi-task language model down to the one task that you run.

scores = secateur.attribute(model, task, examples)
plan   = secateur.plan(scores, keep=0.6)
pruned = secateur.prune(model, plan)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.attribution.attribute import attribute
    from secateur.attribution.criteria import Criterion, GradientActivation, IntegratedGradients
    from secateur.attribution.layer_scores import layer_scores
    from secateur.attribution.scores import Scores
    from secateur.flow.choose import choose
    from secateur.flow.meet_latency import MetLatency, meet_latency
    from secateur.flow.rounds import attribute_in_rounds
    from secateur.flow.sweep import sweep
    from secateur.measuring.benchmark import benchmark
    from secateur.measuring.dry_run import dry_run
    from secateur.measuring.evaluate import evaluate
    from secateur.measuring.latency import latency_table
    from secateur.model import cost
    from secateur.model.discovery import sites
    from secateur.model.sites import Site
    from secateur.planning.latency_table import LatencyTable
    from secateur.planning.plan import Plan, plan
    from secateur.pruning.delete_layers import delete_layers
    from secateur.pruning.factorise import factorise
    from secateur.pruning.masked import masked
    from secateur.pruning.prune import prune, prune_
    from secateur.pruning.save import load, save
    from secateur.pruning.task_plans import TaskPlans
    from secateur.pruning.verify import verify
    from secateur.recovery import recover_
    from secateur.support.errors import InputError
    from secateur.tasks import CausalLM, ImageClassification, SequenceClassification, Task, TextToText, TokenClassification

__version__ = "0.1.0"

# Where each public name lives: it is imported when first used, so that `import secateur` stays cheap.
_HOMES = {
    "CausalLM": "secateur.tasks",
    "Criterion": "secateur.attribution.criteria",
    "GradientActivation": "secateur.attribution.criteria",
    "ImageClassification": "secateur.tasks",
    "InputError": "secateur.support.errors",
    "IntegratedGradients": "secateur.attribution.criteria",
    "LatencyTable": "secateur.planning.latency_table",
    "MetLatency": "secateur.flow.meet_latency",
    "Plan": "secateur.planning.plan",
    "Scores": "secateur.attribution.scores",
    "SequenceClassification": "secateur.tasks",
    "Site": "secateur.model.sites",
    "Task": "secateur.tasks",
    "TaskPlans": "secateur.pruning.task_plans",
    "TextToText": "secateur.tasks",
    "TokenClassification": "secateur.tasks",
    "attribute": "secateur.attribution.attribute",
    "attribute_in_rounds": "secateur.flow.rounds",
    "benchmark": "secateur.measuring.benchmark",
    "choose": "secateur.flow.choose",
    "delete_layers": "secateur.pruning.delete_layers",
    "dry_run": "secateur.measuring.dry_run",
    "evaluate": "secateur.measuring.evaluate",
    "factorise": "secateur.pruning.factorise",
    "latency_table": "secateur.measuring.latency",
    "layer_scores": "secateur.attribution.layer_scores",
    "load": "secateur.pruning.save",
    "masked": "secateur.pruning.masked",
    "meet_latency": "secateur.flow.meet_latency",
    "plan": "secateur.planning.plan",
    "prune": "secateur.pruning.prune",
    "prune_": "secateur.pruning.prune",
    "recover_": "secateur.recovery",
    "save": "secateur.pruning.save",
    "sites": "secateur.model.discovery",
    "sweep": "secateur.flow.sweep",
    "verify": "secateur.pruning.verify",
}

__all__ = [
    "CausalLM",
    "Criterion",
    "GradientActivation",
    "ImageClassification",
    "InputError",
    "IntegratedGradients",
    "LatencyTable",
    "MetLatency",
    "Plan",
    "Scores",
    "SequenceClassification",
    "Site",
    "Task",
    "TaskPlans",
    "TextToText",
    "TokenClassification",
    "attribute",
    "attribute_in_rounds",
    "benchmark",
    "choose",
    "cost",
    "delete_layers",
    "dry_run",
    "evaluate",
    "factorise",
    "latency_table",
    "layer_scores",
    "load",
    "masked",
    "meet_latency",
    "plan",
    "prune",
    "prune_",
    "recover_",
    "save",
    "sites",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "cost":
        return import_module("secateur.model.cost")
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
