"""The tables and plots of the documentation, made of bench/results/."""
