"""Reproduction of LD-Net (Liu et al. 2018, arXiv 1804.07827) at a smaller size: tables, figures and claims."""
