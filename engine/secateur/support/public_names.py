"""Public names that are imported when they are first used. A package's stub file is the one table of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """Reads a package's public names from its stub, the `__init__.pyi` that lies beside its `__init__.py`.

    Type checkers read the stub, and so does this function: each name stands in one place. The stub holds only lines such as
    `from secateur.tasks import CausalLM as CausalLM`. The imported thing is an attribute of the module, or a module in it.

    Args:
        package: The package's `__name__`.
        file: The package's `__file__`.

    Returns:
        The names in order, for `__all__`, and a function for `__getattr__`. That function imports a name's home, keeps the
        value in the package and returns it. It raises AttributeError for other names.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    homes = {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = homes[name]
        home = sys.modules[package] if module == package else import_module(module)
        value = vars(home).get(original) or import_module(f"{module}.{original}")
        setattr(sys.modules[package], name, value)
        return value

    return sorted(homes), attribute
