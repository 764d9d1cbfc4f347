"""Masks that are learned in fine-tuning: one encoder, pruned while it learns several tasks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.learned.layers.layer_gates import LayerGates
    from secateur.learned.multitask.encoder_tasks import Classification, Regression, Span
    from secateur.learned.multitask.exporting import export, load, save
    from secateur.learned.multitask.mixture import best, frontier
    from secateur.learned.multitask.model import MultitaskModel
    from secateur.learned.multitask.pruning import MultitaskPruning, attribution_scores, magnitude_scores
    from secateur.learned.multitask.schedule import CubicSchedule
    from secateur.learned.multitask.training import evaluate_task, features_of, train

# As in `secateur`: a name is imported when first used. None is that of a module here, which would take its place.
_HOMES = {
    "Classification": "secateur.learned.multitask.encoder_tasks",
    "CubicSchedule": "secateur.learned.multitask.schedule",
    "LayerGates": "secateur.learned.layers.layer_gates",
    "MultitaskModel": "secateur.learned.multitask.model",
    "MultitaskPruning": "secateur.learned.multitask.pruning",
    "Regression": "secateur.learned.multitask.encoder_tasks",
    "Span": "secateur.learned.multitask.encoder_tasks",
    "attribution_scores": "secateur.learned.multitask.pruning",
    "best": "secateur.learned.multitask.mixture",
    "evaluate_task": "secateur.learned.multitask.training",
    "export": "secateur.learned.multitask.exporting",
    "features_of": "secateur.learned.multitask.training",
    "frontier": "secateur.learned.multitask.mixture",
    "load": "secateur.learned.multitask.exporting",
    "magnitude_scores": "secateur.learned.multitask.pruning",
    "save": "secateur.learned.multitask.exporting",
    "train": "secateur.learned.multitask.training",
}

__all__ = [
    "Classification",
    "CubicSchedule",
    "LayerGates",
    "MultitaskModel",
    "MultitaskPruning",
    "Regression",
    "Span",
    "attribution_scores",
    "best",
    "evaluate_task",
    "export",
    "features_of",
    "frontier",
    "load",
    "magnitude_scores",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur.learned' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
