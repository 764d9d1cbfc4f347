"""Public names that are imported when they are first used. A package's stub file is their only table."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """Read a package's public names from its stub, the file `__init__.pyi` beside its `__init__.py`.

    Type checkers read the stub, and so does this function. So every name is written in one place. The stub contains only lines
    such as `from secateur.tasks import CausalLM as CausalLM`. A name is an attribute of the module, or a module in it.

    Args:
        package: The package's `__name__`.
        file: The package's `__file__`.

    Returns:
        The sorted names, for `__all__`, and a function for `__getattr__`. The function imports the module of a name, stores the
        value in the package and returns it. It raises AttributeError for any other name.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    origins = {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}

    def attribute(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module_name, original = origins[name]
        module = sys.modules[package] if module_name == package else import_module(module_name)
        value = vars(module).get(original) or import_module(f"{module_name}.{original}")
        setattr(sys.modules[package], name, value)
        return value

    return sorted(origins), attribute
