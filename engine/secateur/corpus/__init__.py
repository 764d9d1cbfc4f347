"""Bulk scoring: a label and its probability for each document of a corpus of any size."""

from secateur.corpus.scoring import mapper, score

__all__ = ["mapper", "score"]
