"""A latency table: what branches cost in milliseconds, as data. `measuring.latency` measures it."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.model.sites import AttentionUnit, branch_name
from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically

FORMAT = "secateur-latency/1"


@dataclass(frozen=True)
class LatencyTable:
    """What a dense model's forward pass and each of its branches cost on one machine, for one shape of batch.

    environment: of the measurement, as `benchmark` tells it; fingerprint, unit: of the model, and of its attention's sites.
    total: milliseconds of a whole dense pass. sites[site name]: number of units to milliseconds of the branch that keeps that
    many, ascending; the last is the whole one. both[attention name]: the same for V and O channels, where Q and K keep the
    same share: the core narrows with the wider of the two, so that the savings don't add up. rest: milliseconds of all between
    the branches, by the share of the branches' time that remains: it shrinks a little with them, as they hand back less memory
    and leave more room in caches.
    """

    environment: dict[str, Any]
    fingerprint: str
    unit: AttentionUnit
    batch_size: int
    length: int
    target_length: int
    total: float
    sites: dict[str, dict[int, float]]
    both: dict[str, dict[int, float]]
    rest: dict[float, float]

    def of(self, site: str, count: int) -> float:
        """Milliseconds of the site's branch when the site keeps `count` units and all else is whole, linear between measured
        counts; fewer than were measured cost as much as the fewest, and none nothing: the branch is gone. Raises InputError:
        a site that wasn't measured, a count out of range."""
        if site not in self.sites:
            known = next(iter(self.sites), "none")
            raise InputError(f"site: expected one of the table's {len(self.sites)} sites, such as {known!r}, got {site!r}")
        if not 0 <= count <= max(self.sites[site]):
            raise InputError(f"count: expected 0 to {max(self.sites[site])} units of {site}, got {count}")
        return _between(self.sites[site], count) if count else 0.0

    def milliseconds(self, counts: Mapping[str, int]) -> float:
        """Predicted milliseconds of a whole forward pass when each site keeps `counts` units; sites that aren't named stay
        whole. The channels of an attention are taken to lie evenly in its heads. Raises InputError as `of` does."""
        named: dict[str, dict[str, int]] = {}
        for site, count in counts.items():
            self.of(site, count)
            named.setdefault(branch_name(site), {})[site] = count
        saved = sum(self._saved(branch, of_branch) for branch, of_branch in named.items())
        whole = sum({branch_name(site): max(row.items())[1] for site, row in self.sites.items()}.values())
        return self.total - saved - (self.rest[1.0] - _between(self.rest, 1 - saved / whole))

    def _saved(self, branch: str, counts: Mapping[str, int]) -> float:
        whole = self.sites[next(iter(counts))]
        dense = whole[max(whole)]
        if not all(counts.values()):
            return dense
        saved = sum(dense - self.of(site, count) for site, count in counts.items())
        if branch in self.both and len(counts) == 2:
            # What the core saves, by as much as its wider side has narrowed: joint saving less the two single ones.
            share = max(count / max(self.sites[site]) for site, count in counts.items())
            alone = sum(dense - _between(self.sites[site], share * max(self.sites[site])) for site in counts)
            saved += dense - _between(self.both[branch], share * max(self.both[branch])) - alone
        return min(saved, dense)

    def dumps(self) -> str:
        """JSON of a few kB."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes `dumps` to a file."""
        write_atomically(path, self.dumps())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads what `save` wrote. Raises InputError for anything else."""
        if not Path(path).is_file():
            raise InputError(f"latency: no such file: {str(path)!r}")
        with reading("latency", path, "is no latency table"):
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about.pop("format") != FORMAT:
                raise ValueError(f"expected the format {FORMAT!r}")
            measured = {name: {site: _read(row, int) for site, row in about.pop(name).items()} for name in ("sites", "both")}
            rest = _read(about.pop("rest"), float)
            if 1.0 not in rest:
                raise ValueError("expected the rest of the whole model")
            return cls(**{**about, **measured, "total": float(about["total"]), "rest": rest})


def _between(row: Mapping[Any, float], count: float) -> float:
    """Linear between the row's counts, which ascend; constant below the first."""
    if count in row:
        return row[count]
    known = list(row)
    place = bisect.bisect_left(known, count)
    if place == 0:
        return row[known[0]]
    low, high = known[place - 1], known[min(place, len(known) - 1)]
    return row[low] if low == high else row[low] + (row[high] - row[low]) * (count - low) / (high - low)


def _read(row: Mapping[str, Any], key: type[Any]) -> dict[Any, float]:
    found = dict(sorted((key(name), float(value)) for name, value in row.items()))
    if not found or min(found) <= 0 or not all(math.isfinite(value) and value >= 0 for value in found.values()):
        raise ValueError("expected milliseconds by what remains")
    return found
