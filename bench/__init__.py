"""Measurements: timings, comparisons, results, and the tables generated from the results. Run from the repository's root."""
