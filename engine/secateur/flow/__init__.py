"""Whole runs made of the stages below: rounds, choosing a plan, budgets of time, sweeps, and `compress`."""
