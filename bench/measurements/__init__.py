"""The measurements, one per file. Each writes a file of bench/results/."""
