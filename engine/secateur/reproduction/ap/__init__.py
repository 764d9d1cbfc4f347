"""Attribution-based pruning (Yang et al. 2023, arXiv 2205.04157): its experiments, figures and claims."""
