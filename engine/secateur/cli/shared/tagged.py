"""Read column files of tokens and tags for the commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.cli.shared import output
from secateur.data.conll import SCHEMES, Scheme, Sentence, SpanFile, TagError, parse, read_columns
from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.support.fields import whole_number
from secateur.tasks.classification import class_number


def tagged_sentences(
    path: str | Path, column: str, token: str, scheme: str, *, target: Scheme = "bioes"
) -> tuple[list[Sentence], dict[str, Any]]:
    """Read the sentences of a column file, and convert span tags into the scheme `target`. Repairs are reported on stderr.

    Args:
        path: The file.
        column: The column of the tags: a number from 1, or a name.
        token: The column of the tokens, in the same form.
        scheme: The scheme of the file: auto, one of SCHEMES, or plain for tags that mark no spans, which are not converted.
        target: The scheme to convert into.

    Returns:
        The sentences, and a JSON document about the file.

    Raises:
        InputError: As in `SpanFile`, or the scheme is unknown.
    """
    columns: list[int | str] = []
    for name in (column, token):
        number = whole_number(name.removeprefix("-"))
        columns.append(name if number is None else -number if name.startswith("-") else number)
    if scheme == "plain":
        sentences = list(read_columns(path, columns[0], token=columns[1]))
        return sentences, {"file": str(path), "sentences": len(sentences), "scheme": "plain"}
    if scheme not in ("auto", *SCHEMES):
        raise InputError(f"scheme: expected one of auto, {', '.join(SCHEMES)}, plain, got {scheme!r}")
    file = SpanFile(path, columns[0], token=columns[1], scheme=scheme, target=target)  # type: ignore[arg-type]
    sentences = list(file)
    if file.repaired:
        output.say(f"{path}: {file.repaired} of {file.tags} tags were ill-formed {file.scheme.upper()} and repaired")
    about = {
        "file": str(path),
        "sentences": len(sentences),
        "scheme": file.scheme,
        "tags": file.tags,
        "repaired": file.repaired,
    }
    return sentences, about


def tagged_examples(path: str, column: str, token: str, names: Sequence[str]) -> list[Example]:
    """Read the examples of a column file for a model with classes of these names. The names also decide the tags' scheme.

    Raises:
        InputError: As in `tagged_sentences`; or, with the line, a tag is not among the names.
    """
    scheme, target = ("auto", _scheme_of(names)) if _span_tags(names) else ("plain", "bio2")
    sentences, _ = tagged_sentences(path, column, token, scheme, target=target)
    for sentence in sentences:
        for line, tag in enumerate(sentence.tags, start=sentence.line):
            class_number(names, tag, f"data: {path!r}, line {line}", numbers=False)
    return [{"tokens": sentence.tokens, "tags": sentence.tags} for sentence in sentences]


def _span_tags(names: Sequence[str]) -> bool:
    """Whether the names are span tags."""
    try:
        return all(parse(name, 0) for name in names)
    except TagError:
        return False


def _scheme_of(names: Sequence[str]) -> Scheme:
    """The scheme of span tags."""
    return "bioes" if any(name.startswith(("E-", "S-")) for name in names) else "bio2"
