"""Paths of modules: the blocks of a model, and the prefixes of a path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module, *names: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the path of each item of the module lists whose path ends in one of `names`, in their order."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for layers in [path for name in names for path in paths if path == name or path.endswith(f".{name}")]:
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            yield layer, f"{layers}.{layer}"


def prefixes(path: str) -> list[str]:
    """Return the prefixes of a path, shortest first: "a.b.c" gives ["a", "a.b", "a.b.c"]."""
    parts = path.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]
