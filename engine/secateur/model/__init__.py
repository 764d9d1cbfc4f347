"""The parts of a transformers model: sites and branches, hooks, cost, rebuilt modules. It uses support and kernels."""
