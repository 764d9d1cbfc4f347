"""A transformers model as secateur sees it: sites and branches, hooks, cost, rebuilt modules. It uses support and kernels."""
