"""Recovery without training: what pruning took from each branch's output, given back in closed form."""

from secateur.recovery.recover import Method, Refit, recover_

__all__ = ["Method", "Refit", "recover_"]
