"""Criteria: how a unit's score is computed. Each criterion is one small file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from secateur.attribution.criteria.base import Criterion, FixedScores, Result, Scorer, ScoringContext, TargetCriterion
from secateur.attribution.criteria.fluctuation import Fluctuation
from secateur.attribution.criteria.gradient_activation import GradientActivation
from secateur.attribution.criteria.integrated_gradients import IntegratedGradients
from secateur.attribution.criteria.mean_activation import MeanActivation
from secateur.attribution.criteria.owen_sampling import OwenSampling
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
    "owen": OwenSampling,
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
    "OwenSampling",
    "RandomScores",
    "RandomTargets",
    "Result",
    "Scorer",
    "ScoringContext",
    "TargetCriterion",
    "Wanda",
    "WeightMagnitude",
    "criterion_named",
    "for_all_labels",
    "name_of",
    "summary",
]


def criterion_named(text: str) -> Criterion:
    """Build a criterion from its name on the command line.

    Args:
        text: A name of `PRESETS`, optionally with settings after a colon, such as "ig:nodes=8,path=joint".

    Returns:
        The criterion.

    Raises:
        InputError: The name or a setting is unknown.
    """
    name, _, settings = text.partition(":")
    if name not in PRESETS:
        raise InputError(f"criterion: expected one of {', '.join(PRESETS)}, got {name!r}")
    criterion = PRESETS[name]()
    known_settings = [field.name for field in fields(criterion)]
    changes: dict[str, Any] = {}
    for setting in settings.split(",") if settings else []:
        key, equals, value = setting.partition("=")
        if not known_settings:
            raise InputError(f"criterion: expected no settings after {name!r}, got {setting!r}")
        if key not in known_settings or not equals:
            raise InputError(
                f"criterion: expected NAME=VALUE after {name!r}, with a name of {', '.join(known_settings)}, got {setting!r}"
            )
        changes[key] = _number(value)
    return replace(criterion, **changes)


def for_all_labels(criterion: Criterion) -> Criterion:
    """Return the criterion as it scores examples without targets: for all candidate labels.

    The signed scores of all labels would cancel, so they become absolute.

    Args:
        criterion: The criterion. One that scores for all labels already stays as it is.

    Returns:
        The criterion for examples without targets.

    Raises:
        InputError: The criterion reads no targets that labels could replace.
    """
    settings = {field.name: getattr(criterion, field.name) for field in fields(criterion)}
    if "labels" not in settings:
        name = next((name for name, preset in PRESETS.items() if preset() == criterion), type(criterion).__name__)
        raise InputError(f"unlabeled: expected a criterion with the setting 'labels', such as gradient, got {name!r}")
    if settings["labels"] == "all":
        return criterion
    changes: dict[str, Any] = {"labels": "all"}
    if settings.get("over_examples") == "signed":
        changes["over_examples"] = "absolute"
    return replace(criterion, **changes)


def name_of(settings: Mapping[str, Any]) -> str:
    """Return the name of the criterion that some scores were made by, as `criterion_named` reads it.

    Args:
        settings: `Scores.criterion`, which `Criterion.to_json` returned.

    Returns:
        A name of `PRESETS`, with the settings that differ after a colon; the class's name for a criterion of another class.
    """
    names = []
    for name, preset in PRESETS.items():
        known = preset().to_json()
        if known.keys() == settings.keys() and known["criterion"] == settings["criterion"]:
            changed = [f"{key}={value}" for key, value in settings.items() if value != known[key]]
            names.append((len(changed), f"{name}:{','.join(changed)}" if changed else name))
    return min(names, key=lambda pair: pair[0], default=(0, str(settings.get("criterion", ""))))[1]


def summary(name: str) -> str:
    """Describe a criterion in one line.

    Args:
        name: A name of `PRESETS`.

    Returns:
        The first line of the docstring.
    """
    return (inspect.getdoc(PRESETS[name]) or "").partition("\n")[0]


def _number(text: str) -> int | float | str:
    """Return the text as a number, or the text itself if it is no number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
