"""CoNLL-style column files: a token and its tag a line, a blank line between sentences; tags of spans and their schemes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from secateur.support.errors import InputError, first_line

Scheme = Literal["bio1", "bio2", "bioes"]
SCHEMES: tuple[Scheme, ...] = ("bio1", "bio2", "bioes")
DOCUMENT = "-DOCSTART-"
HEADER = "# global.columns ="
Span = tuple[str, int, int]


@dataclass(frozen=True)
class Sentence:
    """Tokens with their tags. line: the number of its first line in the file, from 1; its lines follow one another."""

    tokens: list[str]
    tags: list[str]
    line: int


def read_columns(path: str | Path, column: int | str, *, token: int | str = 1) -> Iterator[Sentence]:
    """The sentences of a file one after another, in bounded memory; tags as they stand there.

    column, token: which column has the tags and which the tokens, by number from 1, or by name where the file's first line is
    "# global.columns = NAME NAME ..." (as in CoNLL-U Plus). Fields are between tabs where a line has one, else between spaces.
    -DOCSTART- lines, with the blank line after each, and blank lines at the file's end are skipped.
    Raises InputError with the file and the line: not UTF-8, a line with more or fewer fields than the first, an empty field, a
    blank line where no sentence ended (an empty sentence), no such column; and where the file cannot be read or has no
    sentence.
    """
    path = Path(path)
    lines = numbered_lines(path)
    first = next(lines, (1, ""))
    named = first[1].startswith(HEADER)
    names = first[1].removeprefix(HEADER).split() if named else []
    fields = 0
    for rows in _blocks(path, lines if named else chain([first], lines)):
        if not fields:
            fields = len(names) or len(rows[0][1])
            token_index, tag_index = _index(path, token, names, fields, "token"), _index(path, column, names, fields, "column")
        for number, parts in rows:
            _require_fields(path, number, parts, fields)
        yield Sentence([parts[token_index] for _, parts in rows], [parts[tag_index] for _, parts in rows], rows[0][0])
    if not fields:
        raise InputError(f"data: expected at least one sentence in {str(path)!r}, got none")


def _blocks(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, list[str]]]]:
    """The fields of each sentence's lines, with the lines' numbers."""
    rows: list[tuple[int, list[str]]] = []
    after_document = False
    # The first blank line that ends no sentence: an error once anything but blank lines follows.
    empty: int | None = None
    for number, line in lines:
        if not line.strip(" \t"):
            if rows:
                yield rows
                rows = []
            elif not after_document and empty is None:
                empty = number
            after_document = False
            continue
        if empty is not None:
            raise InputError(f"data: {str(path)!r}, line {empty}: expected a token, got an empty sentence")
        # Of blanks, these two alone divide: a token may hold others.
        parts = line.split("\t") if "\t" in line else [part for part in line.split(" ") if part]
        if parts[0] != DOCUMENT:
            rows.append((number, parts))
        elif rows:
            raise InputError(f"data: {str(path)!r}, line {number}: expected a blank line before {DOCUMENT}, got none")
        after_document = parts[0] == DOCUMENT
    if rows:
        yield rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, without their ends. Raises InputError: no such file, or a line
    that is not UTF-8."""
    try:
        with open(path, "rb") as file:
            yield from decoded_lines(file, f"data: {str(path)!r}")
    except OSError as error:
        raise InputError(f"data: cannot read {str(path)!r}: {error.strerror or first_line(error)}") from error


def decoded_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, str]]:
    """Lines decoded from UTF-8, with their numbers from 1, without their ends and without a byte order mark at the beginning.
    Raises InputError that begins with `where`."""
    for number, line in enumerate(lines, start=1):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}, line {number}: expected UTF-8, got {raw[error.start : error.start + 8]!r}") from error


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The spans (type, first token, last token) that tags of any of the schemes mark, well-formed or not: those that seqeval
    counts (its default mode, after conlleval). Raises InputError for a tag of another form, with its position."""
    spans: list[Span] = []
    opened: tuple[str, int] | None = None
    previous = "O"
    for position, tag in enumerate([*tags, "O"]):
        prefix, kind = parse(tag, position)
        goes_on = opened is not None and kind == opened[0] and prefix in "IE" and previous in "BI"
        if opened is not None and not goes_on:
            spans.append((*opened, position - 1))
            opened = None
        if opened is None and prefix != "O":
            opened = (kind, position)
        previous = prefix
    return spans


def tags_of(spans: Iterable[Span], length: int, scheme: Scheme) -> list[str]:
    """The well-formed tags of spans, which must be in order and apart. BIO1 has B only where a span of the type ends just
    before; BIO2 has B at each span's start; BIOES has E at its end too, and S where it is one token."""
    tags = ["O"] * length
    before: tuple[str, int] = ("", -2)
    for kind, first, last in spans:
        tags[first : last + 1] = [f"I-{kind}"] * (last + 1 - first)
        if scheme != "bio1" or before == (kind, first - 1):
            tags[first] = f"B-{kind}"
        if scheme == "bioes":
            tags[last] = f"{'S' if first == last else 'E'}-{kind}"
        before = (kind, last)
    return tags


def convert(tags: Sequence[str], source: Scheme, target: Scheme) -> tuple[list[str], int]:
    """The tags in another scheme, and how many of them had to be repaired: are not as `source` writes the spans that they
    mark."""
    spans = spans_of(tags)
    repaired = sum(a != b for a, b in zip(tags, tags_of(spans, len(tags), source), strict=True))
    return tags_of(spans, len(tags), target), repaired


def parse(tag: str, position: int) -> tuple[str, str]:
    """The prefix and the type of a tag: "O" and "", or one of B, I, E, S and what comes after the hyphen."""
    if tag == "O":
        return "O", ""
    prefix, hyphen, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or not hyphen or not kind:
        raise TagError(position, tag)
    return prefix, kind


class TagError(InputError):
    """A tag of no span scheme. position: in its sentence, from 0."""

    def __init__(self, position: int, tag: str) -> None:
        super().__init__(f"tags, position {position}: expected O or B-, I-, E- or S- and a type, got {tag!r}")
        self.position, self.tag = position, tag


def detect(sentences: Iterable[Sentence]) -> Scheme:
    """Which scheme tags of spans are in: BIOES where any has E or S, BIO2 where a B stands that BIO1 would not have, else BIO1.
    Raises TagError, as `spans_of`."""
    second = False
    for sentence in sentences:
        prefixes = [parse(tag, position) for position, tag in enumerate(sentence.tags)]
        if any(prefix in "ES" for prefix, _ in prefixes):
            return "bioes"
        for (_, before), (prefix, kind) in zip([("O", ""), *prefixes], prefixes, strict=False):
            second = second or (prefix == "B" and before != kind)
    return "bio2" if second else "bio1"


class SpanFile:
    """The sentences of a column file with their tags of spans in another scheme: each iteration reads the file anew.

    column, token: of `read_columns`. scheme: that the file is in; "auto" for what `detect` says, in a pass of its own. target:
    the scheme that the tags come in. After an iteration, `tags` and `repaired` are how many tags were read and how many of them
    were ill-formed. Raises InputError as `read_columns`, and with the line for a tag of another form.
    """

    def __init__(
        self,
        path: str | Path,
        column: int | str,
        *,
        token: int | str = 1,
        scheme: Scheme | Literal["auto"] = "auto",
        target: Scheme = "bioes",
    ) -> None:
        self.path, self.column, self.token, self.target = path, column, token, target
        self.scheme: Scheme = detect(self._checked()) if scheme == "auto" else scheme
        self.tags = self.repaired = 0

    def __iter__(self) -> Iterator[Sentence]:
        self.tags = self.repaired = 0
        for sentence in self._checked():
            tags, repaired = convert(sentence.tags, self.scheme, self.target)
            self.tags += len(tags)
            self.repaired += repaired
            yield Sentence(sentence.tokens, tags, sentence.line)

    def _checked(self) -> Iterator[Sentence]:
        for sentence in read_columns(self.path, self.column, token=self.token):
            _require_known_tags(self.path, sentence)
            yield sentence


def _require_known_tags(path: str | Path, sentence: Sentence) -> None:
    for position, tag in enumerate(sentence.tags):
        try:
            parse(tag, position)
        except TagError as error:
            line = sentence.line + position
            raise InputError(
                f"data: {str(path)!r}, line {line}: expected O or B-, I-, E- or S- and a type, got {tag!r}"
            ) from error


def _index(path: Path, column: int | str, names: Sequence[str], fields: int, what: str) -> int:
    if isinstance(column, int):
        if not 1 <= column <= fields:
            raise InputError(f"{what}: expected a number from 1 to {fields}, the columns of {str(path)!r}, got {column}")
        return column - 1
    if column not in names:
        known = f"one of {', '.join(names)}" if names else f"a number, as {str(path)!r} does not begin with {HEADER!r}"
        raise InputError(f"{what}: expected {known}, got {column!r}")
    return names.index(column)


def _require_fields(path: Path, number: int, parts: Sequence[str], fields: int) -> None:
    if len(parts) != fields:
        raise InputError(f"data: {str(path)!r}, line {number}: expected {fields} columns, got {len(parts)}")
    if not all(part.strip(" ") for part in parts):
        empty = [bool(part.strip(" ")) for part in parts].index(False) + 1
        raise InputError(f"data: {str(path)!r}, line {number}: expected a value in column {empty}, got none")
