"""Read a YAML file of plain values, of a bounded size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from secateur.support.errors import InputError, first_line
from secateur.support.files import require_regular

_MOST_VALUES = 1_000_000  # A file of this many values takes some 100 MB.


def read_yaml(path: Path, argument: str = "config") -> Any:
    """Read a YAML file. No object of Python's is made from it.

    Args:
        path: The file.
        argument: The argument that an error message begins with.

    Returns:
        The content as plain values.

    Raises:
        InputError: The file cannot be read, is not YAML, or holds more than a million values, aliases written out.
    """
    require_regular(argument, path)
    if not path.exists():
        raise InputError(f"{argument}: no such file: {str(path)!r}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{argument}: cannot read {str(path)!r}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{argument}: {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # PyYAML raises these for damaged tagged values.
        raise InputError(f"{argument}: {str(path)!r} is no YAML: {first_line(error)}") from error
    if _values_in(content, {}) > _MOST_VALUES:
        raise InputError(f"{argument}: expected at most {_MOST_VALUES} values, aliases written out, got more in {str(path)!r}")
    return content


def _values_in(content: Any, counted: dict[int, int]) -> int:
    """Count the values in nested containers, those of aliases at each alias. An alias inside itself counts as too many."""
    if not isinstance(content, (dict, list, tuple, set)):
        return 1
    if id(content) not in counted:
        counted[id(content)] = _MOST_VALUES + 1  # The count of an alias inside itself.
        parts = [*content, *content.values()] if isinstance(content, dict) else content
        counted[id(content)] = 1 + sum(_values_in(part, counted) for part in parts)
    return counted[id(content)]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that reads scalars as YAML 1.2 does: 3e-5 is a float without a point too; dates, yes and no are text.

    So a label can be a date, yes or no.
    """

    # By first character of a scalar: (tag, pattern) pairs.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [resolver for resolver in resolvers if resolver[0].rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
