"""Papers' experiments, run again: a resumable grid of cells, the paper's figures, and which of its claims held."""
