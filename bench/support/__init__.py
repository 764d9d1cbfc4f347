"""Helpers that measurements share: the measured commit, JSON results, timing in turns, packages with weights."""
