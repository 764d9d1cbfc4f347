"""Recovery without training: restore, in closed form, the branches' outputs that pruning has changed."""

from secateur.recovery.recover import Method, Refit, recover_

__all__ = ["Method", "Refit", "recover_"]
