"""secateur: cut a multi-task language model down to the one task that you run.

scores = secateur.attribute(model, task, examples)
plan   = secateur.plan(scores, keep=0.6)
pruned = secateur.prune(model, plan)

`__init__.pyi` lists the public names. Each is imported when it is first used, so that `import secateur` stays cheap.
"""

from secateur.support.public_names import lazy_names

__version__ = "0.1.0"
__all__, __getattr__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
