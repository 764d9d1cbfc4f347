"""Comparisons of tensors and of scores: the error against expected ones, and totals over examples."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

COMBINE = {"signed": lambda scores: scores, "absolute": Tensor.abs, "squared": Tensor.square}


REDUCED = ("head", "channel")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> float:
    """Return the largest error, relative to the largest value of `scale` at the same site.

    Args:
        actual: The scores to test, by site.
        expected: The expected scores, of the same shapes.
        scale: Scores that tell the size of the terms, by site. Not all of them may be 0.
    """
    assert set(actual) == set(expected)
    assert max(float(of_site.abs().max()) for of_site in scale.values()) > 0
    return max(
        float((actual[site] - expected[site]).abs().max() / scale[site].abs().max().clamp(min=1e-30)) for site in expected
    )


def reduce(by_example: Mapping[str, Tensor], over: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return totals over the examples, and sums of absolute terms, in which terms do not cancel.

    Args:
        by_example: Scores [examples, units] by site.
        over: How examples add up: "signed", "absolute" or "squared".

    Returns:
        Totals [units] by site, and sums of absolute terms [units] by site, which suit as the scale of `error`.
    """
    terms = {site: COMBINE[over](rows) for site, rows in by_example.items()}
    return {s: t.sum(0) for s, t in terms.items()}, {s: t.abs().sum(0) for s, t in terms.items()}
