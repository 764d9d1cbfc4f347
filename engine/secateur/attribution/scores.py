"""Scores: a number for each unit of each site, with what is needed to plan from them. Pure data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.attribution.integrated.convergence import Convergence
from secateur.model.sites import Site, selected
from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically

FORMAT = "secateur-scores/1"


@dataclass(frozen=True)
class Scores(Mapping[str, Tensor]):
    """scores[site name]: float64 [units]; higher means more needed.

    sites: what the scores are of. all_sites: every site of the model's layers with attention by heads, which budgets refer to.
    tokens: mean length of the examples in each stack, which weighs FLOPs. weights: how many the whole model has.
    per_example: site name to float32 [examples, units], in the order of the examples, if it was asked for.
    convergence: how exact the scores are, where they are integrals.
    """

    by_site: dict[str, Tensor]
    sites: tuple[Site, ...]
    all_sites: tuple[Site, ...]
    fingerprint: str
    criterion: dict[str, Any]
    examples: int
    tokens: dict[str, float]
    weights: int
    per_example: dict[str, Tensor] | None = field(default=None, repr=False)
    convergence: Convergence | None = field(default=None, repr=False)

    def __getitem__(self, site: str) -> Tensor:
        return self.by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def save(self, path: str | Path) -> None:
        """One safetensors file."""
        about = {
            "format": FORMAT,
            "sites": [site.to_json() for site in self.sites],
            "layers": [site.to_json() for site in self.all_sites],
            "fingerprint": self.fingerprint,
            "criterion": self.criterion,
            "examples": self.examples,
            "tokens": self.tokens,
            "weights": self.weights,
            "convergence": None if self.convergence is None else self.convergence.to_json(),
        }
        tensors = dict(self.by_site)
        tensors.update({f"per_example/{name}": value for name, value in (self.per_example or {}).items()})
        tensors.update({} if self.convergence is None else self.convergence.tensors())
        write_atomically(path, save(tensors, {"secateur": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Args:
            path: The file.

        Raises:
            InputError: There is no such file, or it is something else.
        """
        if not Path(path).is_file():
            raise InputError(f"scores: no such file: {str(path)!r}")
        with reading("scores", path, "is not a scores file"):
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("secateur", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise InputError(f"scores: expected the format {FORMAT!r} in {str(path)!r}, got {about.get('format')!r}")
            return cls._from(about, tensors)

    @classmethod
    def _from(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> Scores:
        sites = tuple(Site(**site) for site in about["sites"])
        for site in sites:
            found = tensors[site.name]
            if found.shape != (site.units,) or found.dtype != torch.float64:
                raise ValueError(f"{site.name}: expected float64 [{site.units}], got {found.dtype} {list(found.shape)}")
        examples = {k.removeprefix("per_example/"): v for k, v in tensors.items() if k.startswith("per_example/")}
        convergence = about.get("convergence")
        return cls(
            by_site={site.name: tensors[site.name] for site in sites},
            sites=sites,
            all_sites=tuple(Site(**site) for site in about["layers"]),
            fingerprint=about["fingerprint"],
            criterion=about["criterion"],
            examples=about["examples"],
            tokens=about["tokens"],
            weights=about["weights"],
            per_example=examples or None,
            convergence=None if convergence is None else Convergence.read(convergence, tensors),
        )

    def of(self, select: str) -> Scores:
        """The scores of the selected sites alone: a plan from them leaves the other sites whole. `select` as in `sites`."""
        kept = tuple(selected(self.sites, select))
        return replace(self, sites=kept, by_site={site.name: self[site.name] for site in kept})

    def equal(self, other: Scores) -> bool:
        """Bit for bit the same scores of the same sites."""
        same = self.sites == other.sites and self.fingerprint == other.fingerprint
        return same and all(torch.equal(self[name], other[name]) for name in self)
