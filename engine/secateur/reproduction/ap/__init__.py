"""Reproduction of attribution-based pruning (Yang et al. 2023, arXiv 2205.04157): experiments, figures and claims."""
