"""`secateur sites` and `secateur criteria`: list what can be pruned, and how units can be scored."""

from __future__ import annotations

from dataclasses import asdict

import secateur
from secateur.attribution.criteria import PRESETS, summary
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import (
    Json,
    Model,
    Select,
    UnitOption,
)
from secateur.flow.loaded import meta_model


def sites(model: Model, unit: UnitOption = "head", select: Select = None, as_json: Json = False) -> None:
    """List what can be pruned: name, units, and the cost of one unit."""
    prunable = secateur.sites(meta_model(model, task=None), unit=inputs.unit(unit), select=select)
    output.emit({"sites": [site.to_json() for site in prunable]}, as_json, output.sites_table(prunable))


def criteria(as_json: Json = False) -> None:
    """List the criteria that --criterion takes, with their settings and defaults."""
    described = [{"name": name, "summary": summary(name), "settings": asdict(make())} for name, make in PRESETS.items()]
    low_rank = "svd scores no units: secateur.factorise gives layers of low rank, which `secateur reproduce ap` compares with"
    output.emit({"criteria": described}, as_json, output.criteria_table(described), low_rank)
