"""Reproduction of pruning with a multitask objective (Xia and Shin 2021, arXiv 2112.05705): experiments, figures, claims."""
