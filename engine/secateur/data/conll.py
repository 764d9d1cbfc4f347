"""CoNLL-style column files (a token and its tag on a line, a blank line between sentences) and the schemes of span tags."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from secateur.support.errors import InputError, first_line
from secateur.support.files import require_regular

Scheme = Literal["bio1", "bio2", "bioes"]
SCHEMES: tuple[Scheme, ...] = ("bio1", "bio2", "bioes")
DOCUMENT = "-DOCSTART-"
HEADER = "# global.columns ="
_TAG_FORMS = "O, or B-, I-, E- or S- with a type"
Span = tuple[str, int, int]


@dataclass(frozen=True)
class Sentence:
    """The tokens of a sentence and their tags.

    Attributes:
        tokens: The tokens.
        tags: One tag for each token.
        line: The number of the sentence's first line in the file, from 1. Its other lines follow directly.
    """

    tokens: list[str]
    tags: list[str]
    line: int


def read_columns(path: str | Path, column: int | str, *, token: int | str = 1) -> Iterator[Sentence]:
    """Read the sentences of a column file one after another, in bounded memory, with the tags as the file has them.

    Fields are separated by tabs where a line has a tab, else by spaces. -DOCSTART- lines, the blank line after each of them,
    and blank lines at the end of the file are skipped.

    Args:
        path: A UTF-8 text file.
        column: The column of the tags: a number from 1, or a name where the file's first line is
            "# global.columns = NAME NAME ..." (as in CoNLL-U Plus).
        token: The column of the tokens, in the same form.

    Raises:
        InputError: The file cannot be read or has no sentence; the column does not exist; or, with the file and the line: a
            line is not UTF-8, it has more or fewer fields than the first line, a field is empty, or a blank line stands where
            no sentence ended (an empty sentence).
    """
    path = Path(path)
    lines = numbered_lines(path)
    first = next(lines, (1, ""))
    has_header = first[1].startswith(HEADER)
    names = first[1].removeprefix(HEADER).split() if has_header else []
    fields = 0
    for rows in _blocks(path, lines if has_header else chain([first], lines)):
        if not fields:
            fields = len(names) or len(rows[0][1])
            token_index, tag_index = _index(path, token, names, fields, "token"), _index(path, column, names, fields, "column")
        for number, parts in rows:
            _require_fields(path, number, parts, fields)
        yield Sentence([parts[token_index] for _, parts in rows], [parts[tag_index] for _, parts in rows], rows[0][0])
    if not fields:
        raise InputError(f"data: expected at least one sentence in {str(path)!r}, got none")


def _blocks(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Iterate over sentences: for each of its lines the line's number and its fields."""
    rows: list[tuple[int, list[str]]] = []
    after_document = False
    # The first blank line that ends no sentence. It is an error once anything but blank lines follows.
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
        # Only tabs and spaces separate fields: a token may contain other whitespace characters.
        parts = line.split("\t") if "\t" in line else [part for part in line.split(" ") if part]
        if parts[0] != DOCUMENT:
            rows.append((number, parts))
        elif rows:
            raise InputError(f"data: {str(path)!r}, line {number}: expected a blank line before {DOCUMENT}, got none")
        after_document = parts[0] == DOCUMENT
    if rows:
        yield rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the lines of a UTF-8 file, without their line ends, and their numbers from 1.

    Raises:
        InputError: The file cannot be read, or a line is not UTF-8.
    """
    try:
        require_regular("data", Path(path))
        with open(path, "rb") as file:
            yield from decoded_lines(file, f"data: {str(path)!r}")
    except OSError as error:
        raise InputError(f"data: cannot read {str(path)!r}: {error.strerror or first_line(error)}") from error


def decoded_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, str]]:
    """Decode lines from UTF-8, and number them from 1. Line ends and a byte order mark at the beginning are removed.

    Args:
        lines: The lines as bytes.
        where: The beginning of the error message.

    Raises:
        InputError: A line is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}, line {number}: expected UTF-8, got {raw[error.start : error.start + 8]!r}") from error


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Find the spans (type, first token, last token) that tags of any scheme mark, well-formed or not.

    They are the spans that seqeval counts in its default mode, which follows conlleval.

    Raises:
        TagError: A tag does not belong to a span scheme. The message gives its position.
    """
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
    """Write spans as well-formed tags.

    BIO1 has a B only where a span of the same type ends just before. BIO2 has a B at the start of every span. BIOES also has an
    E at the end of every span, and an S where the span is one token.

    Args:
        spans: The spans, in order and without overlap.
        length: The number of tokens in the sentence.
        scheme: The scheme of the tags.
    """
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
    """Convert tags into another scheme.

    Returns:
        The tags in the scheme `target`, and the number of tags that had to be repaired: those that `source` does not prescribe
        for the spans that they mark.
    """
    spans = spans_of(tags)
    repaired = sum(a != b for a, b in zip(tags, tags_of(spans, len(tags), source), strict=True))
    return tags_of(spans, len(tags), target), repaired


def parse(tag: str, position: int) -> tuple[str, str]:
    """Split a tag into its prefix and its type.

    Returns:
        ("O", ""), or one of B, I, E and S with the text after the hyphen.

    Raises:
        TagError: The tag does not belong to a span scheme.
    """
    if tag == "O":
        return "O", ""
    prefix, hyphen, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or not hyphen or not kind:
        raise TagError(position, tag)
    return prefix, kind


class TagError(InputError):
    """A tag does not belong to a span scheme.

    Attributes:
        position: The position of the tag in its sentence, from 0.
        tag: The tag.
    """

    def __init__(self, position: int, tag: str) -> None:
        super().__init__(f"tags, position {position}: expected {_TAG_FORMS}, got {tag!r}")
        self.position, self.tag = position, tag


def detect(sentences: Iterable[Sentence]) -> Scheme:
    """Detect the scheme of span tags.

    Returns:
        "bioes" if any tag has the prefix E or S, "bio2" if a B stands where BIO1 would not have one, else "bio1".

    Raises:
        TagError: A tag does not belong to a span scheme.
    """
    has_bio2_start = False
    for sentence in sentences:
        prefixes = [parse(tag, position) for position, tag in enumerate(sentence.tags)]
        if any(prefix in "ES" for prefix, _ in prefixes):
            return "bioes"
        for (_, before), (prefix, kind) in zip([("O", ""), *prefixes], prefixes, strict=False):
            has_bio2_start = has_bio2_start or (prefix == "B" and before != kind)
    return "bio2" if has_bio2_start else "bio1"


class SpanFile:
    """The sentences of a column file, with their span tags converted into one scheme. Each iteration reads the file again.

    After an iteration, `tags` is the number of tags that were read, and `repaired` the number of ill-formed ones among them.

    Args:
        path: The file.
        column: The column of the tags, as in `read_columns`.
        token: The column of the tokens, as in `read_columns`.
        scheme: The scheme of the file; "auto" detects it, in one more pass over the file.
        target: The scheme to convert the tags into.

    Raises:
        InputError: As in `read_columns`; or, with the line, a tag does not belong to a span scheme.
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
        """Iterate over the sentences as the file has them, and check their tags."""
        for sentence in read_columns(self.path, self.column, token=self.token):
            _require_known_tags(self.path, sentence)
            yield sentence


def _require_known_tags(path: str | Path, sentence: Sentence) -> None:
    """Raise InputError with the line of the first tag that does not belong to a span scheme."""
    for position, tag in enumerate(sentence.tags):
        try:
            parse(tag, position)
        except TagError as error:
            line = sentence.line + position
            raise InputError(f"data: {str(path)!r}, line {line}: expected {_TAG_FORMS}, got {tag!r}") from error


def _index(path: Path, column: int | str, names: Sequence[str], fields: int, option: str) -> int:
    """The index of a column, from 0."""
    if isinstance(column, int):
        if not 1 <= column <= fields:
            raise InputError(f"{option}: expected a number from 1 to {fields}, the columns of {str(path)!r}, got {column}")
        return column - 1
    if column not in names:
        known = f"one of {', '.join(names)}" if names else f"a number, as {str(path)!r} does not begin with {HEADER!r}"
        raise InputError(f"{option}: expected {known}, got {column!r}")
    return names.index(column)


def _require_fields(path: Path, number: int, parts: Sequence[str], fields: int) -> None:
    """Raise InputError if a line has another number of fields, or an empty field."""
    if len(parts) != fields:
        raise InputError(f"data: {str(path)!r}, line {number}: expected {fields} columns, got {len(parts)}")
    if not all(part.strip(" ") for part in parts):
        empty = [bool(part.strip(" ")) for part in parts].index(False) + 1
        raise InputError(f"data: {str(path)!r}, line {number}: expected a value in column {empty}, got none")
