"""Check the values of JSON and YAML files against the types of dataclass fields."""

from __future__ import annotations

import json
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from secateur.support.errors import FieldError, InputError

_LARGEST = 2**63 - 1  # The largest whole number that torch, pyarrow and safetensors hold.
MOST_STEPS = 10**8  # More steps than any training takes; a typing error must not train for ever.
_MOST_DIGITS = 4300
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """Return a value as a text of one line and of bounded length, for an error message.

    A value of a YAML file may hold the same list billions of times, so its whole text is never made.
    """
    return " ".join(_SHORT.repr(value).split())


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Call it inside `errors.reading`, which names the file.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8 or not JSON.
        FieldError: The file holds something else.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise FieldError(f"expected an object, got {shown(content)}")
    return content


def whole_number(text: str) -> int | None:
    """Return the number that a text of ASCII digits writes; None for another text, or for more digits than Python converts."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def require_count(name: str, value: Any, least: int = 1, most: int = _LARGEST) -> None:
    """Check an argument that counts something.

    Args:
        name: The name of the argument.
        value: Its value.
        least: The least value that is allowed.
        most: The largest value that is allowed; by default, the largest that fits into 64 bits.

    Raises:
        InputError: It is not a whole number, or is out of this range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        expected = f"of at least {least}" if most == _LARGEST else f"from {least} to {most}"
        raise InputError(f"{name}: expected a whole number {expected}, got {shown(value)}")


@contextmanager
def field_of(where: str) -> Iterator[None]:
    """Turn an InputError about an argument into a FieldError about the field of a file that holds the argument.

    A FieldError, which names its field, passes through unchanged.

    Args:
        where: The place of the field, which the message begins with.

    Raises:
        FieldError: The code inside the context raised an InputError.
    """
    try:
        yield
    except FieldError:
        raise
    except InputError as error:
        raise FieldError(f"{where}.{error}") from error


def require_fields(where: str, content: Any, kinds: Mapping[str, Any]) -> None:
    """Check that an object of a file has some fields with values of their types. It may have more fields.

    Args:
        where: The place of the object, which an error message begins with.
        content: The object.
        kinds: The type of each field, as in `require_type`.

    Raises:
        FieldError: The content is not an object, a field is missing, or a value has another type.
    """
    if not isinstance(content, dict):
        raise FieldError(f"{where}: expected values by name, got {shown(content)}")
    for name, kind in kinds.items():
        if name not in content:
            raise FieldError(f"{where}: expected {name!r}, got {', '.join(shown(key) for key in content) or 'nothing'}")
        require_type(f"{where}.{name}", kind, content[name])


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Check that a number is in a range [low, high).

    Args:
        name: The name of the argument.
        value: The number.
        low: The least value.
        high: The value that it must be below.

    Raises:
        InputError: It is not in the range.
    """
    if not low <= value < high:
        raise InputError(f"{name}: expected a number of at least {low} and below {high}, got {shown(value)}")


def checked_fields(where: str, content: Any, fields_of: type, *, whole: bool = False) -> dict[str, Any]:
    """Check that an object has only the fields of a dataclass, with values of their types.

    Args:
        where: The place of the object, which an error message begins with.
        content: The object.
        fields_of: The dataclass. Fields of types that `require_type` does not know are not checked.
        whole: Whether fields with a default value are required too.

    Returns:
        The object. Lists of fields that hold tuples become tuples.

    Raises:
        FieldError: The content is not an object, a field is unknown or missing, or a value has another type.
    """
    if not isinstance(content, dict):
        raise FieldError(f"{where}: expected values by name, got {shown(content)}")
    hints, known = get_type_hints(fields_of), {field.name: field for field in fields(fields_of)}
    for name, value in content.items():
        if name not in known:
            raise FieldError(f"{where}: expected some of {', '.join(known)}, got {shown(name)}")
        require_type(f"{where}.{name}", hints[name], value)
    for name, field in known.items():
        if name not in content and (whole or (field.default is MISSING and field.default_factory is MISSING)):
            given = ", ".join(shown(key) for key in content)
            raise FieldError(f"{where}: expected {name!r}, got {given or 'nothing'}")
    holds_tuple = {name for name in content if get_origin(hints[name]) is tuple}
    return {name: tuple(value) if name in holds_tuple else value for name, value in content.items()}


def require_type(where: str, annotation: Any, value: Any) -> None:
    """Check that a value of a file has the type of a field.

    A float may be a whole number. Numbers must be finite, and whole numbers must fit into 64 bits.

    Args:
        where: The place of the value, which the error message begins with.
        annotation: The type: None, str, bool, int, float, a union, `Literal`, `tuple[x, ...]`, `list[x]`, `dict[str, x]` or
            `Mapping[str, x]`. Values of other types are not checked.
        value: The value.

    Raises:
        FieldError: The value has another type.
    """
    if not _fits(annotation, value):
        raise FieldError(f"{where}: expected {_named(annotation)}, got {shown(value)}")


def _fits(annotation: Any, value: Any) -> bool:
    """Tell whether a value has a type; True for types that are not known."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
        return whole or (annotation is float and isinstance(value, float) and math.isfinite(value))
    if annotation in (str, bool, type(None)):
        return isinstance(value, annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is Literal:
        return any(value == argument and isinstance(value, type(argument)) for argument in arguments)
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_fits(arguments[0], part) for part in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(arguments[0], key) and _fits(arguments[1], part) for key, part in value.items()
        )
    return True


def _named(annotation: Any) -> str:
    """Return the name of a type for an error message."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
