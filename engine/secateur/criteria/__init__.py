"""Criteria: how a unit's score is computed. One small file each."""

from __future__ import annotations

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


def criterion_named(name: str) -> Criterion:
    """The criterion that the command line calls by this name."""
    if name not in PRESETS:
        raise InputError(f"criterion: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
