"""Masks that are learned in fine-tuning: one encoder, pruned while it learns several tasks.

`__init__.pyi` lists the public names. Each is imported when it is first used.
"""

from secateur.support.public_names import lazy_names

__all__, __getattr__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
