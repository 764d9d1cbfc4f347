"""Masks that are learned in fine-tuning: one encoder, pruned while it learns several tasks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.learned.encoder_tasks import Classification, Regression, Span
    from secateur.learned.exporting import export, load, save
    from secateur.learned.layer_gates import LayerGates
    from secateur.learned.mixture import best, frontier
    from secateur.learned.multitask import MultitaskPruning, attribution_scores, magnitude_scores
    from secateur.learned.multitask_model import MultitaskModel
    from secateur.learned.schedule import CubicSchedule
    from secateur.learned.training import evaluate_task, features_of, train

# As in `secateur`: a name is imported when first used. None is that of a module here, which would take its place.
_HOMES = {
    "Classification": "secateur.learned.encoder_tasks",
    "CubicSchedule": "secateur.learned.schedule",
    "LayerGates": "secateur.learned.layer_gates",
    "MultitaskModel": "secateur.learned.multitask_model",
    "MultitaskPruning": "secateur.learned.multitask",
    "Regression": "secateur.learned.encoder_tasks",
    "Span": "secateur.learned.encoder_tasks",
    "attribution_scores": "secateur.learned.multitask",
    "best": "secateur.learned.mixture",
    "evaluate_task": "secateur.learned.training",
    "export": "secateur.learned.exporting",
    "features_of": "secateur.learned.training",
    "frontier": "secateur.learned.mixture",
    "load": "secateur.learned.exporting",
    "magnitude_scores": "secateur.learned.multitask",
    "save": "secateur.learned.exporting",
    "train": "secateur.learned.training",
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
