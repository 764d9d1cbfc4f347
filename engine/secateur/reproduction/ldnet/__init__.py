"""LD-Net (Liu et al. 2018, arXiv 1804.07827): its tables and figures in small, and which of its claims hold."""
