"""What joins the stages: rounds, choosing among plans, budgets of time, sweeps. It uses all stages below it."""
