"""Scores of units: from a model, a task and examples. It uses tasks, data, model, kernels and support."""
