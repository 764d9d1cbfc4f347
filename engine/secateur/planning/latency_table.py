"""Latency tables: the milliseconds that branches take, as data. `measuring.latency` measures them."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.model.sites import AttentionUnit, branch_name
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import checked_fields, read_object
from secateur.support.files import object_or_file, write_atomically
from secateur.support.html import html_table

FORMAT = "secateur-latency/1"


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """The milliseconds of a dense model's forward pass and of each of its branches, on one machine and for one shape of batch.

    Attributes:
        environment: The environment of the measurement, as `benchmark` tells it.
        fingerprint: The fingerprint of the model.
        unit: The unit of the attention sites.
        batch_size: Examples in the measured batch.
        length: Input tokens of an example.
        target_length: Decoder tokens of an example, where there is an encoder.
        total: Milliseconds of a whole dense pass.
        sites: By site name, milliseconds of the branch by the number of units that the site keeps, ascending. The last entry is
            the whole site.
        both: By attention name, the same for V and O channels where Q and K keep the same share. The attention core narrows
            with the wider of the two, so that their savings do not add up.
        rest: Milliseconds of everything between the branches, by the share of the branches' time that remains. The rest shrinks
            a little with the branches: they hand back less memory and leave more room in caches.
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

    def __repr__(self) -> str:
        return f"LatencyTable({self._about()})"

    def _repr_html_(self) -> str:
        rows = [
            (site, ", ".join(map(str, row)), f"{row[min(row)]:.3g} to {row[max(row)]:.3g}")
            for site, row in self.sites.items()
            if row
        ]
        return html_table(self._about(), ("site", "measured units", "ms of the branch"), rows)

    def _about(self) -> str:
        """The dense model's time, the shape and the machine, in one line."""
        shape = f"{self.total:.4g} ms at {self.batch_size} x {self.length}"
        return f"{shape}, {len(self.sites)} sites, {self.environment.get('device', 'no device')}"

    def of(self, site: str, count: int) -> float:
        """Predict the milliseconds of a site's branch when the site keeps `count` units and everything else is whole.

        Times are linear between measured counts. Counts below the lowest measured one take as long as that one. No units take
        no time: the branch is gone.

        Args:
            site: The name of the site.
            count: The number of units that it keeps.

        Returns:
            Milliseconds.

        Raises:
            InputError: The site was not measured, or the count is out of range.
        """
        if site not in self.sites:
            known = next(iter(self.sites), "none")
            raise InputError(f"site: expected one of the table's {len(self.sites)} sites, such as {known!r}, got {site!r}")
        if not 0 <= count <= max(self.sites[site]):
            raise InputError(f"count: expected 0 to {max(self.sites[site])} units of {site}, got {count}")
        return _between(self.sites[site], count) if count else 0.0

    def milliseconds(self, counts: Mapping[str, int]) -> float:
        """Predict the milliseconds of a whole forward pass.

        The channels of an attention are assumed to lie evenly in its heads.

        Args:
            counts: The number of units that each site keeps, by site name. Other sites stay whole.

        Returns:
            Milliseconds.

        Raises:
            InputError: As `of` does.
        """
        by_branch: dict[str, dict[str, int]] = {}
        for site, count in counts.items():
            self.of(site, count)  # Checks both.
            by_branch.setdefault(branch_name(site), {})[site] = count
        saved = sum(self._saved(branch, of_branch) for branch, of_branch in by_branch.items())
        whole = sum({branch_name(site): max(row.items())[1] for site, row in self.sites.items()}.values())
        return self.total - saved - (self.rest[1.0] - _between(self.rest, 1 - saved / whole))

    def _saved(self, branch: str, counts: Mapping[str, int]) -> float:
        """The milliseconds that a branch saves when its sites keep `counts` units."""
        whole = self.sites[next(iter(counts))]
        dense = whole[max(whole)]
        if not all(counts.values()):
            return dense
        saved = sum(dense - self.of(site, count) for site, count in counts.items())
        if branch in self.both and len(counts) == 2:
            # The core saves by its wider side: add the joint saving at that share, less the two single savings.
            share = max(count / max(self.sites[site]) for site, count in counts.items())
            alone = sum(dense - _between(self.sites[site], share * max(self.sites[site])) for site in counts)
            saved += dense - _between(self.both[branch], share * max(self.both[branch])) - alone
        return min(saved, dense)

    def dumps(self) -> str:
        """The table as JSON of a few kB."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `dumps` to a file. The file appears when complete; an existing one is replaced."""
        write_atomically(path, self.dumps())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The table.

        Raises:
            InputError: There is no such file, or it is not a latency table.
        """
        if not Path(path).is_file():
            raise InputError(f"latency: no such file: {str(path)!r}")
        with reading("latency", path, "is no latency table"):
            about = read_object(path)
            if about.pop("format") != FORMAT:
                raise FieldError(f"expected the format {FORMAT!r}")
            measured = {name: {site: _read(row, int) for site, row in about.pop(name).items()} for name in ("sites", "both")}
            rest = _read(about.pop("rest"), float)
            if 1.0 not in rest:
                raise FieldError("expected the rest of the whole model")
            fields = checked_fields("table", {**about, **measured, "rest": rest}, cls)
            table = cls(**{**fields, "total": float(fields["total"])})
            if not table.sites or min(table.total, table.batch_size, table.length, table.target_length + 1) <= 0:
                raise FieldError("expected measured sites, a positive total and positive sizes")
            return table


def as_table(table: Any) -> LatencyTable:
    """Return the latency table that an argument gives: a table, or the path of its file.

    Args:
        table: The argument.

    Raises:
        InputError: It is neither, or the file is not a latency table.
    """
    return object_or_file("table", table, LatencyTable, LatencyTable.load, "secateur.latency_table(model) measures one")


def _between(row: Mapping[Any, float], count: float) -> float:
    """The value at `count`: linear between the row's ascending keys, constant below the first one."""
    if count in row:
        return row[count]
    known = list(row)
    place = bisect.bisect_left(known, count)
    if place == 0:
        return row[known[0]]
    low, high = known[place - 1], known[min(place, len(known) - 1)]
    return row[low] if low == high else row[low] + (row[high] - row[low]) * (count - low) / (high - low)


def _read(row: Mapping[str, Any], key: type[Any]) -> dict[Any, float]:
    """A row of the file, its keys converted and ascending. Raises ValueError for keys or milliseconds out of range."""
    milliseconds = dict(sorted((key(name), float(value)) for name, value in row.items()))
    finite = all(math.isfinite(value) and value >= 0 for value in milliseconds.values())
    if not milliseconds or min(milliseconds) <= 0 or not finite:
        raise ValueError("expected milliseconds by what remains")
    return milliseconds
