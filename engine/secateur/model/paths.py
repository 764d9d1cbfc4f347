"""Paths of modules: the blocks of a model, and the prefixes of a path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module, *names: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the path of each item of the module lists whose path ends in one of `names`, in their order."""
    # With duplicates, so that a block or a stack that stands at two places is seen at both.
    modules = model.named_modules(remove_duplicate=False)
    lists = {path: len(module) for path, module in modules if isinstance(module, nn.ModuleList)}
    for layers in [path for name in names for path in lists if path == name or path.endswith(f".{name}")]:
        for layer in range(lists[layers]):
            yield layer, f"{layers}.{layer}"


def prefixes(path: str) -> list[str]:
    """Return the prefixes of a path, shortest first: "a.b.c" gives ["a", "a.b", "a.b.c"]."""
    parts = path.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]
