"""A claim of a paper, and whether it holds in a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        claim: The claim in a sentence, with the criterion by which it holds.
        paper: The paper's figures.
        ours: The run's figures.
        held: Whether the claim holds in the run.
    """

    claim: str
    paper: str
    ours: str
    held: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name."""
        return asdict(self)


def claims_table(claims: Sequence[Claim]) -> Iterator[str]:
    """Write the claims as a Markdown table, line by line."""
    yield "| the paper's claim | the paper | this run | held |"
    yield "|---|---|---|---|"
    for claim in claims:
        yield f"| {claim.claim} | {claim.paper} | {claim.ours} | {'yes' if claim.held else '**no**'} |"
