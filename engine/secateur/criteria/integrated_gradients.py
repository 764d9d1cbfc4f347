"""Integrated gradients of the gates, along the path that opens one site's gates or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.criteria.base import Scorer, TargetCriterion
from secateur.discovery import scored_ports
from secateur.errors import InputError
from secateur.integrated.adaptive import PLACED, Integral, Integrator, Policy, fixed, pilot
from secateur.integrated.convergence import JOINT, Convergence, gather
from secateur.integrated.paths import JointPath, LayerPath, Path
from secateur.integrated.replay import Replay
from secateur.site import Site
from secateur.tasks import Batch, Task


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

    def scorer(self, model: nn.Module, task: Task, sites: Sequence[Site], max_tokens: int) -> Scorer:
        return _Integration(self, model, task, sites, max_tokens)


class _Integration(Scorer):
    def __init__(
        self, criterion: IntegratedGradients, model: nn.Module, task: Task, sites: Sequence[Site], tokens: int
    ) -> None:
        self._criterion, self._model, self._task = criterion, model, task
        self._sites, self._tokens = sites, tokens
        self._policies: dict[str, Policy] = {}
        self._rows: list[Tensor] = []
        self._integrals: dict[str, list[Integral]] = {name: [] for name in self._names()}
        self._checked: frozenset[int] = frozenset()
        self._doubled: dict[str, list[tuple[float, float]]] = {name: [] for name in self._names()}

    def prepare(self, pilot_batch: Batch, checked: frozenset[int]) -> None:
        self._checked = checked
        if self._criterion.nodes != "auto":
            self._policies = {name: fixed(self._criterion.nodes) for name in self._names()}
            return
        for name, path in self._paths(pilot_batch):
            self._policies[name] = pilot(path, _everyone(pilot_batch), self._criterion.tolerance, self._criterion.max_nodes)

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        self._rows.append(torch.tensor(batch.rows))
        checked = [k for k, row in enumerate(batch.rows) if row in self._checked]
        for name, path in self._paths(batch):
            integrator = Integrator(path, _everyone(batch), placed=self._criterion.nodes == "auto")
            integral = integrator.run(self._policies[name])
            self._integrals[name].append(replace(integral, scores=integral.scores[:0]))
            self._doubled[name].append(integrator.doubled(integral, checked))
            found |= zip(path.sites, torch.split(integral.scores, [site.units for site in path.sites], 1), strict=True)
        return found

    def convergence(self, examples: int) -> Convergence:
        every = self._integrals.items()
        return Convergence(
            residuals={name: gather(self._rows, [i.residuals.float() for i in each], examples) for name, each in every},
            errors={name: gather(self._rows, [i.errors.float() for i in each], examples) for name, each in every},
            nodes={name: gather(self._rows, [i.nodes for i in each], examples) for name, each in every},
            doubled={name: _ratio(each) for name, each in self._doubled.items()},
            tolerance=self._criterion.tolerance if self._criterion.nodes == "auto" else None,
        )

    def _names(self) -> list[str]:
        return [JOINT] if self._criterion.path == "joint" else [site.name for site in self._sites]

    def _paths(self, batch: Batch) -> list[tuple[str, Path]]:
        limit = max(1, self._tokens // batch.inputs["input_ids"].shape[1])

        def target(batch: Batch) -> Tensor:
            return self._task.target(self._model, batch, self._criterion.target)

        if self._criterion.path == "joint":
            return [(JOINT, JointPath(self._model, scored_ports(self._model, self._sites), target, batch, limit))]
        replay = Replay(self._model, self._sites, target, batch)
        return [(site.name, LayerPath(replay, site, limit)) for site in self._sites]


def _ratio(parts: list[tuple[float, float]]) -> float:
    whole = sum(size for _, size in parts)
    return sum(part for part, _ in parts) / whole if whole else 0.0


def _everyone(batch: Batch) -> Tensor:
    return torch.arange(len(batch.labels), device=batch.labels.device)
