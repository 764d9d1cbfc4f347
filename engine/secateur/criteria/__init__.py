"""Criteria: how a unit's score is computed. One small file each."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from secateur.criteria.base import Criterion, Scorer
from secateur.criteria.gradient_activation import GradientActivation
from secateur.criteria.integrated_gradients import IntegratedGradients
from secateur.errors import InputError

PRESETS: dict[str, Criterion] = {
    "gradient": GradientActivation(),
    "ap": GradientActivation.paper(),
    "ap-unsupervised": GradientActivation.paper_unsupervised(),
    "ig": IntegratedGradients(),
    "ig-joint": IntegratedGradients(path="joint"),
}

__all__ = ["PRESETS", "Criterion", "GradientActivation", "IntegratedGradients", "Scorer", "criterion_named"]


def criterion_named(text: str) -> Criterion:
    """The criterion that the command line calls by this name, with fields changed after a colon: "ig:nodes=8,path=joint"."""
    name, _, settings = text.partition(":")
    if name not in PRESETS:
        raise InputError(f"criterion: expected one of {', '.join(PRESETS)}, got {name!r}")
    known = [field.name for field in fields(PRESETS[name])]
    changes: dict[str, Any] = {}
    for setting in settings.split(",") if settings else []:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            raise InputError(
                f"criterion: expected NAME=VALUE with a name of {', '.join(known)} after {name!r}, got {setting!r}"
            )
        changes[key] = _number(value)
    return replace(PRESETS[name], **changes)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
