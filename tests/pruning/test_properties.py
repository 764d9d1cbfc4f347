"""Contracts 3 and 4 for arbitrary plans: hypothesis draws any legal plan of any family."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cases import CASES, Case, unit_argument
from comparing import relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.model.discovery import fingerprint
from secateur.model.sites import Site
from secateur.pruning.masked import masked

# The draws are the same in every run, so that a failure can be repeated.
fixed_draws = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def subset(draw: st.DrawFn, site: Site) -> Tensor:
    """Draw sorted units of a site: none, all, a run from the first unit, or scattered units."""
    kept = (
        draw(st.sets(st.integers(0, site.units - 1))) if draw(st.booleans()) else set(range(draw(st.integers(0, site.units))))
    )
    return torch.tensor(sorted(kept), dtype=torch.int64)


@st.composite
def pruned_cases(draw: st.DrawFn) -> tuple[Case, secateur.Plan]:
    """Draw a case and a plan for it."""
    case = CASES[draw(st.sampled_from(sorted(CASES)))]
    model = case.model()
    sites = secateur.sites(model, unit=unit_argument(draw(st.sampled_from(["head", "channel"]))))
    chosen = tuple(site for site in sites if draw(st.booleans())) or tuple(sites)
    kept = {site.name: subset(draw, site) for site in chosen}
    return case, secateur.Plan(kept, chosen, fingerprint(model))


@fixed_draws
@given(pruned_cases())
def test_a_model_pruned_by_any_plan_equals_the_masked_model(drawn: tuple[Case, secateur.Plan]) -> None:
    case, plan = drawn
    model = case.model(torch.float64)
    with masked(model, plan):
        expected = case.logits(model)
    assert relative(case.logits(secateur.prune(model, plan)), expected) < 1e-10


@fixed_draws
@given(pruned_cases())
def test_any_pruned_model_is_the_same_after_saving_and_loading(drawn: tuple[Case, secateur.Plan]) -> None:
    case, plan = drawn
    pruned: Any = secateur.prune(case.model(), plan)
    with TemporaryDirectory() as folder:
        secateur.save(pruned, Path(folder) / "model")
        loaded: Any = secateur.load(Path(folder) / "model").eval()
    assert loaded.config.to_dict().get("secateur") == pruned.config.to_dict().get("secateur")
    assert torch.equal(case.logits(loaded), case.logits(pruned))
