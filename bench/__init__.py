"""Measurements: what is timed and compared, the results, and the tables made of them. Run from the repository's root."""
