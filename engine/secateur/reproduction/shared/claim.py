"""A claim of a paper, and whether it holds in a run; estimates with intervals, which tell whether the run decides it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% interval. Without an interval, low and high are the value.

    Attributes:
        value: The value.
        low: The lower end of the interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Return whether the two intervals overlap. Values without intervals never do."""
        exact = self.low == self.high and other.low == other.high
        return not exact and self.low <= other.high and other.low <= self.high

    def reaches(self, limit: float) -> bool:
        """Return whether a limit lies in the interval. No limit lies in the interval of a value without one."""
        return self.low < self.high and self.low <= limit <= self.high


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return the sum of independent estimates with factors. Distances to the ends of the intervals add up in quadrature.

    Args:
        parts: The factor of each estimate, and the estimate.
    """
    value = sum(factor * part.value for factor, part in parts)
    ends = [sorted((factor * (part.low - part.value), factor * (part.high - part.value))) for factor, part in parts]
    return Estimate(value, value - math.hypot(*(low for low, _ in ends)), value + math.hypot(*(high for _, high in ends)))


def averaged(parts: Sequence[Estimate]) -> Estimate:
    """Return the mean of estimates on the same examples, whose errors do not average out."""
    count = len(parts)
    return Estimate(*(sum(getattr(part, name) for part in parts) / count for name in ("value", "low", "high")))


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        claim: The claim in a sentence, with the criterion by which it holds.
        paper: The paper's figures.
        ours: The run's figures.
        held: Whether the claim holds for the run's values.
        decided: Whether the 95% intervals of the values leave no doubt: the compared intervals do not overlap, and a limit is
            outside the interval of what it limits. Values without intervals leave no doubt.
    """

    claim: str
    paper: str
    ours: str
    held: bool
    decided: bool = True

    @property
    def verdict(self) -> str:
        """ "yes", "no", or "undecided"."""
        return ("yes" if self.held else "no") if self.decided else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the verdict as JSON values by name."""
        return {**asdict(self), "verdict": self.verdict}


def verdicts(claims: Sequence[Claim]) -> str:
    """Return how many claims held, did not hold, or are undecided, in words."""
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in ("yes", "no", "undecided")}
    undecided = f", {counts['undecided']} undecided" if counts["undecided"] else ""
    return f"{counts['yes']} of {len(claims)} claims held{undecided}"


def claims_table(claims: Sequence[Claim]) -> Iterator[str]:
    """Write the claims as a Markdown table, line by line, and what "undecided" means where a claim is undecided."""
    yield "| the paper's claim | the paper | this run | held |"
    yield "|---|---|---|---|"
    for claim in claims:
        verdict = claim.verdict if claim.verdict == "yes" else f"**{claim.verdict}**"
        yield f"| {claim.claim} | {claim.paper} | {claim.ours} | {verdict} |"
    if any(not claim.decided for claim in claims):
        yield ""
        yield "Undecided: the 95% intervals of the compared values overlap, or a limit is inside the interval of its value."
