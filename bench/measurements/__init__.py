"""One measurement a file: each writes a file of bench/results/."""
