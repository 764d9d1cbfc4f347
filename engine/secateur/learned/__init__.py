"""Pruning methods that learn masks or gates in fine-tuning: one encoder pruned while it learns several tasks, and layer gates.

`__init__.pyi` lists the public names. A name is imported when it is first used.
"""

from secateur.support.public_names import lazy_names

__all__, __getattr__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
