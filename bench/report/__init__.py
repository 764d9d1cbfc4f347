"""The tables and figures of the documentation, made from bench/results/."""
