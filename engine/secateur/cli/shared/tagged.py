"""Column files of tokens and their tags, as commands read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.cli.shared import output
from secateur.data.conll import SCHEMES, Scheme, Sentence, SpanFile, TagError, parse, read_columns
from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.classification import class_number


def tagged_sentences(
    path: str | Path, column: str, token: str, scheme: str, *, target: Scheme = "bioes"
) -> tuple[list[Sentence], dict[str, Any]]:
    """The sentences of a file, with tags of spans in the scheme `target`, and what was read; repairs are said on stderr.

    column, token: numbers from 1, or names. scheme: that the file is in: auto, one of SCHEMES, or plain for tags of no spans,
    which stay as they are. Raises InputError as `SpanFile`, and for an unknown scheme.
    """
    columns = [int(name) if name.lstrip("-").isdigit() else name for name in (column, token)]
    if scheme == "plain":
        found = list(read_columns(path, columns[0], token=columns[1]))
        return found, {"file": str(path), "sentences": len(found), "scheme": "plain"}
    if scheme not in ("auto", *SCHEMES):
        raise InputError(f"scheme: expected one of auto, {', '.join(SCHEMES)}, plain, got {scheme!r}")
    file = SpanFile(path, columns[0], token=columns[1], scheme=scheme, target=target)  # type: ignore[arg-type]
    found = list(file)
    if file.repaired:
        output.say(f"{path}: {file.repaired} of {file.tags} tags were ill-formed {file.scheme.upper()} and repaired")
    about = {"file": str(path), "sentences": len(found), "scheme": file.scheme, "tags": file.tags, "repaired": file.repaired}
    return found, about


def tagged_examples(path: str, column: str, token: str, names: Sequence[str]) -> list[Example]:
    """The examples of a column file for a model whose classes have these names, which also tell the tags' scheme.

    Raises InputError as `tagged_sentences`, and with the line for a tag that is not among the names.
    """
    scheme, target = ("auto", _scheme_of(names)) if _span_tags(names) else ("plain", "bio2")
    found, _ = tagged_sentences(path, column, token, scheme, target=target)
    for sentence in found:
        for line, tag in enumerate(sentence.tags, start=sentence.line):
            class_number(names, tag, f"data: {path!r}, line {line}")
    return [{"tokens": sentence.tokens, "tags": sentence.tags} for sentence in found]


def _span_tags(names: Sequence[str]) -> bool:
    try:
        return all(parse(name, 0) for name in names)
    except TagError:
        return False


def _scheme_of(names: Sequence[str]) -> Scheme:
    return "bioes" if any(name.startswith(("E-", "S-")) for name in names) else "bio2"
