"""Integrated gradients of the gates, along the path that opens one site's gates or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.attribution.checkpoint import PartialSums
from secateur.attribution.criteria.base import Result, Scorer, ScoringContext, TargetCriterion
from secateur.attribution.integrated.adaptive import PLACED, Integrator, Policy, fixed, pilot
from secateur.attribution.integrated.convergence import JOINT, Convergence, raise_
from secateur.attribution.integrated.paths import JointPath, LayerPath, Path
from secateur.attribution.integrated.replay import Replay
from secateur.model.discovery import scored_ports
from secateur.model.offloading import require_one_device
from secateur.model.sites import Site
from secateur.support.errors import InputError
from secateur.tasks import Batch


@dataclass(frozen=True)
class IntegratedGradients(TargetCriterion):
    """Integrated gradients of the gates, site by site.

    IG_i = integral from 0 to 1 of dF/dc_i, with c = a on S and 1 elsewhere, da (Sundararajan et al. 2017, arXiv 1703.01365,
    Eq. 1, with the gates as inputs and closed gates as baseline). Their sum over S is F(1) - F(c_S = 0).

    path: "layer", S = the units of one site at a time, of which only what lies above it runs again; "joint", S = those of
    all sites. nodes: "auto", as many for each site and example as the tolerance asks for, at most max_nodes, or how many
    nodes a Gauss-Radau rule has besides a = 1. tolerance: of the relative error sum_i |IG_i - exact_i| / sum_i |IG_i| of an
    example, as estimated; see `Scores.convergence`.
    """

    path: Literal["layer", "joint"] = "layer"
    nodes: int | Literal["auto"] = "auto"
    tolerance: float = 0.1
    max_nodes: int = 48

    @classmethod
    def joint(cls) -> IntegratedGradients:
        """Integrated gradients of the gates of all sites at once."""
        return cls(path="joint")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path not in ("layer", "joint"):
            raise InputError(f"path: expected 'layer' or 'joint', got {self.path!r}")
        if self.nodes != "auto" and (isinstance(self.nodes, bool) or not isinstance(self.nodes, int) or self.nodes < 1):
            raise InputError(f"nodes: expected 'auto' or a positive number, got {self.nodes!r}")
        if not isinstance(self.tolerance, float) or not 0 < self.tolerance < 1:
            raise InputError(f"tolerance: expected a relative error between 0 and 1, got {self.tolerance!r}")
        if isinstance(self.max_nodes, bool) or not isinstance(self.max_nodes, int) or self.max_nodes < PLACED:
            raise InputError(f"max_nodes: expected a number of at least {PLACED}, got {self.max_nodes!r}")

    def batch_tokens(self, max_tokens: int) -> int:
        """A quarter: nodes fill the passes, and a small batch of examples of like lengths has little padding."""
        return max(1, max_tokens // 4)

    def scorer(self, context: ScoringContext) -> Scorer:
        require_one_device(context.model, f"integrated gradients (path={self.path!r})")
        return _Integration(self, context)


class _Integration(Scorer):
    """Integrates each path of a batch with the nodes that its policy asks for, and records how exact the results are."""

    def __init__(self, criterion: IntegratedGradients, context: ScoringContext) -> None:
        self._criterion, self._context = criterion, context
        self._names = [JOINT] if criterion.path == "joint" else [site.name for site in context.sites]
        self._policies = self._chosen_policies()
        kinds = {"residuals": torch.float32, "errors": torch.float32, "nodes": torch.int64}
        self._of_rows = {  # By kind and path: [examples].
            kind: {name: torch.zeros(context.examples, dtype=dtype) for name in self._names} for kind, dtype in kinds.items()
        }
        self._doubled = {name: torch.zeros(2, dtype=torch.float64) for name in self._names}

    def _chosen_policies(self) -> dict[str, Policy]:
        """Return how each path is integrated: with the given number of nodes, or as the pilot batch shows."""
        criterion, batch = self._criterion, self._context.pilot
        if criterion.nodes != "auto":
            return {name: fixed(criterion.nodes) for name in self._names}
        rows = _all_rows(batch)
        return {name: pilot(path, rows, criterion.tolerance, criterion.max_nodes) for name, path in self._paths(batch)}

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        by_site: dict[Site, Tensor] = {}
        rows = torch.tensor(batch.rows)
        checked = [k for k, row in enumerate(batch.rows) if row in self._context.checked]
        for name, path in self._paths(batch):
            integrator = Integrator(path, _all_rows(batch), placed=self._criterion.nodes == "auto")
            integral = integrator.run(self._policies[name])
            for kind, of_path in self._of_rows.items():
                raise_(of_path[name], rows, getattr(integral, kind))
            self._doubled[name] += torch.tensor(integrator.doubled(integral, checked), dtype=torch.float64)
            by_site |= zip(path.sites, torch.split(integral.scores, [site.units for site in path.sites], 1), strict=True)
        return by_site

    def partial_sums(self) -> PartialSums:
        largest = {f"{kind}/{name}": tensor for kind, of_path in self._of_rows.items() for name, tensor in of_path.items()}
        return PartialSums({f"doubled/{name}": parts for name, parts in self._doubled.items()}, largest)

    def result(self, totals: dict[str, Tensor]) -> Result:
        convergence = Convergence(
            **self._of_rows,
            doubled={name: float(part / whole) if whole else 0.0 for name, (part, whole) in self._doubled.items()},
            tolerance=self._criterion.tolerance if self._criterion.nodes == "auto" else None,
        )
        return Result(totals, convergence)

    def _paths(self, batch: Batch) -> list[tuple[str, Path]]:
        """Return the paths of a batch with their names."""
        context = self._context
        model, sites, backend = context.model, context.sites, context.backend
        limit = max(1, context.max_tokens // batch.length)

        def target(batch: Batch) -> Tensor:
            return context.task.target(model, batch, self._criterion.target)

        if self._criterion.path == "joint":
            return [(JOINT, JointPath(model, scored_ports(model, sites), target, batch, limit, backend=backend))]
        replay = Replay(model, sites, target, batch, backend=backend)
        return [(site.name, LayerPath(replay, site, limit)) for site in sites]


def _all_rows(batch: Batch) -> Tensor:
    """Return the numbers of the batch's rows [B]."""
    return torch.arange(len(batch.labels), device=batch.labels.device)
