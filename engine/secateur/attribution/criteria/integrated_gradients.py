"""Integrated gradients of the gates, along a path that opens the gates of one site or of all sites."""

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

    A gate c_i multiplies the activation of unit i. Along the path, the gates of a set S of units open together from 0 to 1, and
    all other gates stay at 1. The score of unit i in S for one example is the integral of its derivative along the path:

        IG_i = integral from 0 to 1 of dF/dc_i da, with c = a on S and c = 1 elsewhere

    The scores are complete: their sum over S is F(1) - F(c_S = 0). They cost several passes. They are worth this cost when a
    plan removes many units, because the gradient of a confident model at c = 1 has vanished.

    Attributes:
        target: The target F, as in `GradientActivation`.
        over_examples: How the examples' scores add up, as in `GradientActivation`.
        labels: Each example's own target or all candidate labels, as in `GradientActivation`.
        path: "layer": S is the units of one site at a time. Only the layers above the site run again. "joint": S is the units
            of all sites at once. The whole model runs for each node.
        nodes: The number of nodes of the quadrature rule. "auto" takes as many for each site and example as the tolerance
            asks for. A number n takes a Gauss-Radau rule with n nodes besides a = 1.
        tolerance: With nodes="auto", the largest estimated relative error sum_i |IG_i - exact_i| / sum_i |IG_i| of an
            example. `Scores.convergence` lists the estimates.
        max_nodes: The most nodes of a rule with nodes="auto".

    Raises:
        InputError: A setting is out of range.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion=secateur.IntegratedGradients(nodes=8))
        >>> residuals = {site: row["residual"] for site, row in scores.convergence.summary().items()}
        >>> scores = secateur.attribute(model, task, examples, criterion="ig-joint:tolerance=0.05")

    Reference:
        Sundararajan et al. 2017, arXiv 1703.01365, Eq. 1, with the gates as inputs and closed gates as the baseline.
    """

    path: Literal["layer", "joint"] = "layer"
    nodes: int | Literal["auto"] = "auto"
    tolerance: float = 0.1
    max_nodes: int = 48

    @classmethod
    def joint(cls) -> IntegratedGradients:
        """Integrated gradients of the gates of all sites at once.

        Returns:
            The criterion.
        """
        return cls(path="joint")

    def __post_init__(self) -> None:
        """Check the settings."""
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
        """Return a quarter of `max_tokens`: nodes fill the passes, and small batches of similar lengths need little padding."""
        return max(1, max_tokens // 4)

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that integrates along the paths. Raise InputError if the model is spread over devices."""
        require_one_device(context.model, f"integrated gradients (path={self.path!r})")
        return _Integration(self, context)


class _Integration(Scorer):
    """A scorer that integrates along each path by the path's policy, and records how exact the results are."""

    def __init__(self, criterion: IntegratedGradients, context: ScoringContext) -> None:
        self._criterion, self._context = criterion, context
        self._names = [JOINT] if criterion.path == "joint" else [site.name for site in context.sites]
        self._policies = self._make_policies()
        kinds = {"residuals": torch.float32, "errors": torch.float32, "nodes": torch.int64}
        self._of_examples = {  # Tensors [examples] by kind and path.
            kind: {name: torch.zeros(context.examples, dtype=dtype) for name in self._names} for kind, dtype in kinds.items()
        }
        # For each path, sum |difference to the doubled rule| and sum |scores|.
        self._doubled = {name: torch.zeros(2, dtype=torch.float64) for name in self._names}

    def _make_policies(self) -> dict[str, Policy]:
        """Return the policy of each path: a fixed number of nodes, or the policy that suits the pilot batch."""
        criterion, batch = self._criterion, self._context.pilot
        if criterion.nodes != "auto":
            return {name: fixed(criterion.nodes) for name in self._names}
        rows = _all_rows(batch)
        return {name: pilot(path, rows, criterion.tolerance, criterion.max_nodes) for name, path in self._paths(batch)}

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return integrated gradients of each unit for each example, [B, units] by site."""
        by_site: dict[Site, Tensor] = {}
        rows = torch.tensor(batch.rows)
        checked = [k for k, row in enumerate(batch.rows) if row in self._context.checked]
        for name, path in self._paths(batch):
            integrator = Integrator(path, _all_rows(batch), placed=self._criterion.nodes == "auto")
            integral = integrator.run(self._policies[name])
            for kind, by_path in self._of_examples.items():
                raise_(by_path[name], rows, getattr(integral, kind))
            self._doubled[name] += torch.tensor(integrator.doubled(integral, checked), dtype=torch.float64)
            of_sites = torch.split(integral.scores, [site.units for site in path.sites], 1)  # [B, units] of each site
            by_site |= zip(path.sites, of_sites, strict=True)
        return by_site

    def partial_sums(self) -> PartialSums:
        """Return the convergence records: sums of the doubled rules' differences, and each example's largest values."""
        records = self._of_examples.items()
        largest = {f"{kind}/{name}": tensor for kind, by_path in records for name, tensor in by_path.items()}
        return PartialSums({f"doubled/{name}": parts for name, parts in self._doubled.items()}, largest)

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the totals with the record of their convergence."""
        convergence = Convergence(
            **self._of_examples,
            doubled={name: float(error / size) if size else 0.0 for name, (error, size) in self._doubled.items()},
            tolerance=self._criterion.tolerance if self._criterion.nodes == "auto" else None,
        )
        return Result(totals, convergence)

    def _paths(self, batch: Batch) -> list[tuple[str, Path]]:
        """Return the names and paths of a batch: one for each site, or one for all."""
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
