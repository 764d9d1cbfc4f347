"""Bulk scoring: a label and its probability for each document of a corpus, however large."""

from secateur.corpus.scoring import mapper, score

__all__ = ["mapper", "score"]
