"""Which columns of a user's rows are the input and the target of a task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from secateur.support.errors import InputError
from secateur.support.fields import shown

logger = logging.getLogger("secateur")

Columns = Mapping[str, str | Sequence[str]]

# Names that data sets give to a task's columns, where no column has the task's own name.
NAMES: dict[str, tuple[str, ...]] = {
    "input": (
        "text", "sentence", "content", "document", "review", "body", "article", "question", "query", "prompt", "instruction",
        "utterance",
    ),
    "target": (
        "label", "labels", "class", "category", "intent", "topic", "sentiment", "score", "answer", "output", "completion",
        "response",
    ),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "chunk_tags", "labels"),
    "image": ("img", "picture", "image_path"),
}  # fmt: skip
# Names of two columns that are an input of two texts.
PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"),
    ("question", "sentence"), ("question", "passage"), ("query", "passage"), ("query", "document"),
)  # fmt: skip


def resolve(
    roles: Sequence[str], present: Sequence[str], given: Columns | None = None, *, pairs: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the columns of the rows that are a task's columns.

    A column that `given` does not name is the one with the task's own name; or else the only one with a common name, which is
    said once. Inputs of two texts have common names too.

    Args:
        roles: The task's columns, such as "input" and "target".
        present: The columns of the rows.
        given: The columns of the rows by the task's columns. Several names between commas, or in a list, are an input of
            several texts.
        pairs: Whether the task takes pairs of texts.

    Returns:
        For each of `roles` one column of the rows, or several.

    Raises:
        InputError: `given` is wrong, or no column or several columns could be a task's column.
    """
    chosen = require_columns_given(given, roles)
    guessed = {}
    for role in roles:
        if role in chosen:
            if missing := [name for name in chosen[role] if name not in present]:
                raise InputError(f"columns: expected some of {_quoted(present)} for the {role}, got {_quoted(missing)}")
        elif role in present:
            chosen[role] = (role,)
        else:
            chosen[role] = guessed[role] = _common(role, present, pairs)
    if guessed:
        _say(", ".join(f"the {role} is {' and '.join(map(repr, names))}" for role, names in guessed.items()))
    return {role: chosen[role] for role in roles}


def require_columns_given(given: Columns | None, roles: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the columns that a user names, with several names as a tuple.

    Args:
        given: As in `resolve`.
        roles: As in `resolve`.

    Raises:
        InputError: `given` has other keys than `roles`, or a value is neither a name nor several names.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"columns: expected names by {_quoted(roles)}, got {shown(given)}")
    chosen = {}
    for role, names in (given or {}).items():
        if role not in roles:
            raise InputError(f"columns: expected names for {_quoted(roles)}, got one for {shown(role)}")
        split = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names
        if not isinstance(split, (list, tuple)) or not split or not all(isinstance(name, str) and name for name in split):
            raise InputError(f"columns: expected a name or several for the {role}, got {shown(names)}")
        chosen[role] = tuple(split)
    return chosen


def _common(role: str, present: Sequence[str], pairs: bool) -> tuple[str, ...]:
    """The only column, or pair of columns, with a common name."""
    for pair in PAIRS:
        if role == "input" and pairs and all(name in present for name in pair):
            return pair
    known = NAMES.get(role, ())
    matching = [name for name in known if name in present]
    if len(matching) == 1:
        return (matching[0],)
    option = "--target-column" if role in ("target", "tags") else "--input-column"
    how = f"name it: {option}, in Python columns={{{role!r}: ...}}"
    if matching:
        raise InputError(f"columns: expected one column that can be the {role}, got {_quoted(matching)}; {how}")
    raise InputError(f"columns: expected the column {role!r}, got {_quoted(present) or 'no columns'}; {how}")


@cache
def _say(text: str) -> None:
    """Log a line, once a process."""
    logger.warning("columns: %s", text)


def _quoted(names: Sequence[str]) -> str:
    """The names in quotation marks, for an error message."""
    return ", ".join(map(repr, names))
