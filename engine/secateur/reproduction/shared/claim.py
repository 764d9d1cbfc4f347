"""A claim of a paper, and what a run found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """claim: in a sentence, with what counts as held. paper, ours: its figures and the run's."""

    claim: str
    paper: str
    ours: str
    held: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def claims_table(claims: Sequence[Claim]) -> Iterator[str]:
    """The claims in Markdown."""
    yield "| the paper's claim | the paper | this run | held |"
    yield "|---|---|---|---|"
    for claim in claims:
        yield f"| {claim.claim} | {claim.paper} | {claim.ours} | {'yes' if claim.held else '**no**'} |"
