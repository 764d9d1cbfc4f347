"""secateur: cut a multi-task language model down to the one task that you run.

scores = secateur.attribute(model, task, examples)
plan   = secateur.plan(scores, keep=0.6)
pruned = secateur.prune(model, plan)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur import cost
    from secateur.attribution import attribute
    from secateur.benchmarking import benchmark
    from secateur.choosing import choose
    from secateur.criteria import Criterion, GradientActivation, IntegratedGradients
    from secateur.deletion import delete_layers
    from secateur.discovery import sites
    from secateur.errors import InputError
    from secateur.evaluation import evaluate
    from secateur.export import load, save
    from secateur.factorisation import factorise
    from secateur.gates import masked
    from secateur.latency import LatencyTable, MetLatency, latency_table, meet_latency
    from secateur.layer_scoring import layer_scores
    from secateur.planning import Plan, plan
    from secateur.recovery import recover_
    from secateur.rounds import attribute_in_rounds
    from secateur.routing import TaskPlans
    from secateur.scores import Scores
    from secateur.site import Site
    from secateur.sizing import dry_run
    from secateur.surgery import prune, prune_
    from secateur.sweeping import sweep
    from secateur.tasks import CausalLM, ImageClassification, SequenceClassification, Task, TextToText, TokenClassification
    from secateur.verification import verify

__version__ = "0.1.0"

# Where each public name lives: it is imported when first used, so that `import secateur` stays cheap.
_HOMES = {
    "CausalLM": "secateur.tasks",
    "Criterion": "secateur.criteria",
    "GradientActivation": "secateur.criteria",
    "ImageClassification": "secateur.tasks",
    "InputError": "secateur.errors",
    "IntegratedGradients": "secateur.criteria",
    "LatencyTable": "secateur.latency",
    "MetLatency": "secateur.latency",
    "Plan": "secateur.planning",
    "Scores": "secateur.scores",
    "SequenceClassification": "secateur.tasks",
    "Site": "secateur.site",
    "Task": "secateur.tasks",
    "TaskPlans": "secateur.routing",
    "TextToText": "secateur.tasks",
    "TokenClassification": "secateur.tasks",
    "attribute": "secateur.attribution",
    "attribute_in_rounds": "secateur.rounds",
    "benchmark": "secateur.benchmarking",
    "choose": "secateur.choosing",
    "delete_layers": "secateur.deletion",
    "dry_run": "secateur.sizing",
    "evaluate": "secateur.evaluation",
    "factorise": "secateur.factorisation",
    "latency_table": "secateur.latency",
    "layer_scores": "secateur.layer_scoring",
    "load": "secateur.export",
    "masked": "secateur.gates",
    "meet_latency": "secateur.latency",
    "plan": "secateur.planning",
    "prune": "secateur.surgery",
    "prune_": "secateur.surgery",
    "recover_": "secateur.recovery",
    "save": "secateur.export",
    "sites": "secateur.discovery",
    "sweep": "secateur.sweeping",
    "verify": "secateur.verification",
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
        return import_module("secateur.cost")
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
