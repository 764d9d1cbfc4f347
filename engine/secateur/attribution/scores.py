"""Scores: one number for each unit of each site, with the facts that a plan needs. Pure data."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.attribution.integrated.convergence import Convergence
from secateur.model.sites import Site, by_group, counted, selected, sites_from_json
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import require_type, shown
from secateur.support.files import object_or_file, write_atomically
from secateur.support.html import html_table
from secateur.support.tensors import same_tensors

FORMAT = "secateur-scores/1"
_TENSORS = ("by_site", "per_example", "standard_errors")  # The attributes that are tensors by site name.
# The types of the metadata of a file.
_FIELDS: dict[str, Any] = {
    "fingerprint": str, "criterion": dict[str, Any], "examples": int, "tokens": dict[str, float], "weights": int
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Mapping[str, Tensor]):
    """Scores of units: a mapping from site name to a float64 tensor [units]. A unit with a higher score is needed more.

    `attribute` makes them, and `plan` reads them. They hold no reference to the model.

    Attributes:
        by_site: Float64 [units] by site name. `scores[name]` reads it.
        sites: The sites that have scores.
        all_sites: All sites of the model's layers, with attention by heads. Budgets refer to these.
        fingerprint: The fingerprint of the model's architecture.
        criterion: The name and settings of the criterion.
        examples: The number of examples.
        tokens: The mean length of the examples in each stack, in tokens. It weighs FLOPs.
        weights: The number of weights of the whole model.
        per_example: Float32 [examples, units] by site name, in the order of the examples; None unless it was asked for.
        convergence: How exact the scores are, if they are integrals.
        standard_errors: The standard error of each score over the examples and the draws of gates, float64 [units] by site
            name, if gates were drawn at random.
        blocks: The number of parameters of each block, by name, norms and biases included; empty in a file of an older version.
        max_tokens: The most padded input tokens of a pass, as in `attribute`; None in a file of an older version.

    Example:
        >>> scores = secateur.attribute(model, task, examples)
        >>> scores.save("scores.safetensors")
        >>> scores = secateur.Scores.load("scores.safetensors")
        >>> least_needed = scores["encoder.0.ffn"].argmin()
    """

    by_site: dict[str, Tensor]
    sites: tuple[Site, ...]
    all_sites: tuple[Site, ...]
    fingerprint: str
    criterion: dict[str, Any]
    examples: int
    tokens: dict[str, float]
    weights: int
    per_example: dict[str, Tensor] | None = None
    convergence: Convergence | None = None
    standard_errors: dict[str, Tensor] | None = None
    blocks: dict[str, int] = field(default_factory=dict)
    max_tokens: int | None = None

    def __getitem__(self, site: str) -> Tensor:
        return self.by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scores):
            return NotImplemented
        others = [field.name for field in fields(self) if field.name not in _TENSORS]
        return all(getattr(self, name) == getattr(other, name) for name in others) and all(
            same_tensors(getattr(self, name), getattr(other, name)) for name in _TENSORS
        )

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.sites, self.examples))

    def __repr__(self) -> str:
        return f"Scores({self._about()})"

    def _repr_html_(self) -> str:
        rows = []
        for group, sites in by_group(self.sites).items():
            values = torch.cat([self[site.name] for site in sites])  # [units of the group]
            units = counted(len(values), sites[0].unit)
            rows.append((group, len(sites), units, *(f"{float(x):.4g}" for x in (values.min(), values.median(), values.max()))))
        return html_table(self._about(), ("sites", "number", "units", "lowest", "median", "highest"), rows)

    def _about(self) -> str:
        """The criterion and the numbers of sites, units and examples, in one line."""
        criterion = str(self.criterion.get("criterion", "no criterion"))
        units = sum(site.units for site in self.sites)
        counts = (counted(len(self), "site"), counted(units, "unit"), counted(self.examples, "example"))
        return f"{criterion}: {', '.join(counts)}"

    def save(self, path: str | Path) -> None:
        """Write the scores to one safetensors file. An existing file is replaced.

        Args:
            path: The file.

        Raises:
            InputError: The parent folder does not exist.
        """
        about = {
            "format": FORMAT,
            "sites": [site.to_json() for site in self.sites],
            "layers": [site.to_json() for site in self.all_sites],
            "fingerprint": self.fingerprint,
            "criterion": self.criterion,
            "examples": self.examples,
            "tokens": self.tokens,
            "weights": self.weights,
            "blocks": self.blocks,
            "max_tokens": self.max_tokens,
            "convergence": None if self.convergence is None else self.convergence.to_json(),
        }
        tensors = dict(self.by_site)
        for kind in _TENSORS[1:]:
            tensors.update({f"{kind}/{name}": value for name, value in (getattr(self, kind) or {}).items()})
        tensors.update({} if self.convergence is None else self.convergence.tensors())
        write_atomically(path, save(tensors, {"secateur": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores from a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The scores.

        Raises:
            InputError: The file does not exist, is not a scores file, or is damaged. Scores are damaged if they are not finite.
        """
        if not Path(path).is_file():
            raise InputError(f"scores: no such file: {str(path)!r}")
        with reading("scores", path, "is not a scores file"):
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("secateur", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise InputError(f"scores: expected the format {FORMAT!r} in {str(path)!r}, got {shown(about.get('format'))}")
            return cls._from(about, tensors)

    @classmethod
    def _from(cls, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> Scores:
        """Return scores from the metadata and the tensors of a file. Raise FieldError for what `save` does not write."""
        sites, layers = (sites_from_json(name, about[name]) for name in ("sites", "layers"))
        for name, kind in _FIELDS.items():
            require_type(name, kind, about[name])
        stacks = {"encoder"} | {site.stack for site in (*sites, *layers)}
        if not stacks <= about["tokens"].keys() or min(about["tokens"].values()) <= 0:
            raise FieldError(f"tokens: expected positive lengths of {sorted(stacks)}, got {shown(about['tokens'])}")
        blocks = about.get("blocks", {})
        require_type("blocks", dict[str, int], blocks)
        require_type("max_tokens", int | None, about.get("max_tokens"))
        if blocks and not {site.block for site in layers} <= blocks.keys():
            raise FieldError(f"blocks: expected the blocks of all layers, got {shown(list(blocks))}")
        if about["examples"] < 1 or about["weights"] < 1:
            counts = f"{about['examples']} examples, {about['weights']} weights"
            raise FieldError(f"expected at least one example and one weight, got {counts}")
        by_site = {site.name: tensors.get(site.name) for site in sites}
        per_example, standard_errors = (
            {key.removeprefix(f"{kind}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}
            for kind in _TENSORS[1:]
        )
        for site in sites:
            _require_scores(site.name, by_site[site.name], (site.units,), torch.float64)
            if per_example:
                shape = (about["examples"], site.units)
                _require_scores(f"per_example/{site.name}", per_example.get(site.name), shape, torch.float32)
            if standard_errors:
                name = f"standard_errors/{site.name}"
                _require_scores(name, standard_errors.get(site.name), (site.units,), torch.float64)
        convergence = about.get("convergence")
        return cls(
            by_site={name: tensor for name, tensor in by_site.items() if tensor is not None},
            sites=sites,
            all_sites=layers,
            fingerprint=about["fingerprint"],
            criterion=about["criterion"],
            examples=about["examples"],
            tokens=about["tokens"],
            weights=about["weights"],
            per_example=per_example or None,
            convergence=None if convergence is None else Convergence.read(convergence, tensors),
            standard_errors=standard_errors or None,
            blocks=blocks,
            max_tokens=about.get("max_tokens"),
        )

    def scored_blocks(self) -> list[str]:
        """Return the names of the blocks whose sites all have scores."""
        partly = {site.block for site in self.all_sites if site.name not in self}
        return [name for name in dict.fromkeys(site.block for site in self.all_sites) if name not in partly]

    def parameters_around(self, names: Collection[str]) -> int:
        """Return the number of parameters of some blocks that belong to no unit: norms, and biases of out-projections.

        Args:
            names: The names of the blocks.

        Returns:
            The number; 0 for scores of a file of an older version, which does not tell.
        """
        of_units = sum(round(site.units * site.parameters) for site in self.all_sites if site.block in names)
        return sum(self.blocks[name] for name in names) - of_units if self.blocks else 0

    def of(self, select: str) -> Scores:
        """Return the scores of selected sites alone. A plan from them leaves the other sites whole.

        Args:
            select: The sites, as in `sites`.

        Returns:
            The scores of these sites.

        Raises:
            InputError: The selection is malformed or matches no site.
        """
        kept = tuple(selected(self.sites, select))
        of_sites: dict[str, Any] = {}
        for kind in _TENSORS:
            values = getattr(self, kind)
            of_sites[kind] = None if values is None else {site.name: values[site.name] for site in kept}
        return replace(self, sites=kept, **of_sites)

    def relative_error(self) -> float | None:
        """Return the mean standard error of a score, relative to the mean absolute score; None without standard errors."""
        if self.standard_errors is None:
            return None
        # In the order of the sites, as a file has another one: both orders round differently.
        errors, scores = (torch.cat([of[site.name] for site in self.sites]) for of in (self.standard_errors, self.by_site))
        return float(errors.mean() / scores.abs().mean().clamp(min=torch.finfo(scores.dtype).tiny))

    def equal(self, other: Scores | str | Path) -> bool:
        """Tell whether two scores are bit-identical, for the same sites of the same architecture.

        Args:
            other: The scores to compare with, or the path of their file.

        Returns:
            Whether they are equal.
        """
        other = as_scores(other)
        same = self.sites == other.sites and self.fingerprint == other.fingerprint
        return same and same_tensors(self.by_site, other.by_site)


def as_scores(scores: Any) -> Scores:
    """Return the scores that an argument gives: scores, or the path of their file.

    Args:
        scores: The argument.

    Raises:
        InputError: It is neither, or the file is not a scores file.
    """
    return object_or_file("scores", scores, Scores, Scores.load, "secateur.attribute(model, task, examples) makes them")


def _require_scores(name: str, scores: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise FieldError unless there are scores of this name, shape and dtype, and they are finite."""
    expected = f"{name!r}: expected {dtype} {list(shape)}".replace("torch.", "")
    if scores is None or scores.shape != shape or scores.dtype != dtype:
        raise FieldError(f"{expected}, got {'none' if scores is None else f'{scores.dtype} {list(scores.shape)}'}")
    if not bool(scores.isfinite().all()):
        raise FieldError(f"{name!r}: expected finite scores, got some that are NaN or infinite")
