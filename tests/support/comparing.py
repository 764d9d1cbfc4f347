"""Errors of tensors and of scores against expected ones, and the expected totals over examples."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

COMBINE = {"signed": lambda s: s, "absolute": Tensor.abs, "squared": Tensor.square}


REDUCED = ("head", "channel")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> float:
    """The largest error, relative to the largest score of its site."""
    assert set(found) == set(expected)
    assert max(float(of_site.abs().max()) for of_site in scale.values()) > 0
    return max(
        float((found[site] - expected[site]).abs().max() / scale[site].abs().max().clamp(min=1e-30)) for site in expected
    )


def reduce(each: Mapping[str, Tensor], over: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Totals over the examples, and the sums of their terms' absolute values, which do not cancel."""
    terms = {site: COMBINE[over](rows) for site, rows in each.items()}
    return {s: t.sum(0) for s, t in terms.items()}, {s: t.abs().sum(0) for s, t in terms.items()}
