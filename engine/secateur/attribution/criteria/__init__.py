"""Criteria: how a unit's score is computed. One small file each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from secateur.attribution.criteria.base import Criterion, FixedScores, Result, Scorer, ScoringContext, TargetCriterion
from secateur.attribution.criteria.fluctuation import Fluctuation
from secateur.attribution.criteria.gradient_activation import GradientActivation
from secateur.attribution.criteria.integrated_gradients import IntegratedGradients
from secateur.attribution.criteria.mean_activation import MeanActivation
from secateur.attribution.criteria.random_scores import RandomScores
from secateur.attribution.criteria.random_targets import RandomTargets
from secateur.attribution.criteria.wanda import Wanda
from secateur.attribution.criteria.weight_magnitude import WeightMagnitude
from secateur.support.errors import InputError

PRESETS: dict[str, Callable[[], Criterion]] = {
    "gradient": GradientActivation,
    "ap": GradientActivation.paper,
    "ap-unsupervised": GradientActivation.paper_unsupervised,
    "fisher": GradientActivation.fisher,
    "ig": IntegratedGradients,
    "ig-joint": IntegratedGradients.joint,
    "fpp": MeanActivation,
    "rap": RandomTargets,
    "random": RandomScores,
    "magnitude": WeightMagnitude,
    "wanda": Wanda,
    "flap": Fluctuation,
}

__all__ = [
    "PRESETS",
    "Criterion",
    "FixedScores",
    "Fluctuation",
    "GradientActivation",
    "IntegratedGradients",
    "MeanActivation",
    "RandomScores",
    "RandomTargets",
    "Result",
    "Scorer",
    "ScoringContext",
    "TargetCriterion",
    "Wanda",
    "WeightMagnitude",
    "criterion_named",
    "summary",
]


def criterion_named(text: str) -> Criterion:
    """The criterion that the command line calls by this name, with fields changed after a colon: "ig:nodes=8,path=joint"."""
    name, _, settings = text.partition(":")
    if name not in PRESETS:
        raise InputError(f"criterion: expected one of {', '.join(PRESETS)}, got {name!r}")
    criterion = PRESETS[name]()
    known = [field.name for field in fields(criterion)]
    changes: dict[str, Any] = {}
    for setting in settings.split(",") if settings else []:
        key, equals, value = setting.partition("=")
        if not known:
            raise InputError(f"criterion: expected no settings after {name!r}, got {setting!r}")
        if key not in known or not equals:
            raise InputError(
                f"criterion: expected NAME=VALUE with a name of {', '.join(known)} after {name!r}, got {setting!r}"
            )
        changes[key] = _number(value)
    return replace(criterion, **changes)


def summary(name: str) -> str:
    """One line about a criterion that the command line has a name for."""
    return (inspect.getdoc(PRESETS[name]) or "").partition("\n")[0]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
