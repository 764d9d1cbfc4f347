"""Cut a large file into parts: shards of its own rows, so that an interruption loses only the part at work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from secateur.corpus.sources import Part, Source
from secateur.data.formats import COMPRESSED, UNREADABLE, RowRange, row_ranges

# A part is about so many seconds of work by the speed of a sample. The speed elsewhere in the corpus may be half of it.
SECONDS = 30
# Bounds of the rows of a part, and the characters (in Parquet files the bytes without compression) after which it ends early.
FEWEST, MOST, CHARACTERS = 64, 1 << 16, 1 << 26
# A file of fewer bytes is not cut.
SMALLEST = 1 << 16


def part_rows(rows_a_second: float) -> int:
    """Return the most rows of a part, from the rows that the model scores in a second."""
    return int(min(max(rows_a_second * SECONDS, FEWEST), MOST))


def may_be_cut(source: Source) -> bool:
    """Whether a source is a file that is large enough to be cut and not compressed."""
    return source.rows is None and source.size >= SMALLEST and not source.place.lower().endswith(COMPRESSED)


def cut(source: Source, columns: list[str], rows: int) -> list[Source] | str:
    """Return the parts of a file in order, or why it has none. A file with few rows, and one that cannot be read, stay whole.

    Args:
        source: The whole file.
        columns: The columns that are needed.
        rows: The most rows of a part.
    """
    if source.rows is not None or source.size < SMALLEST:
        return [source]
    import fsspec

    try:
        with fsspec.open(source.place, "rb") as raw:
            ranges = row_ranges(raw, source.place, columns, rows, CHARACTERS)
    except UNREADABLE:
        return [source]  # Scoring the file reports the error.
    if isinstance(ranges, str):
        return ranges
    return [source] if len(ranges) < 2 else _parts(source, ranges)


def _parts(source: Source, ranges: list[RowRange]) -> list[Source]:
    """The parts of a file with these rows. Their sizes add up to the file's."""
    total = ranges[-1].first + ranges[-1].rows
    ends = [*(rows.offset for rows in ranges[1:]), source.size] if ranges[-1].offset else None
    parts = []
    for index, rows in enumerate(ranges):
        if ends is None:
            size = source.size * (rows.first + rows.rows) // total - source.size * rows.first // total
        else:
            size = ends[index] - (rows.offset if index else 0)
        parts.append(as_part(source, Part(source.name, index, len(ranges), rows, source.size), size))
    return parts


def as_part(source: Source, part: Part, size: int) -> Source:
    """Return a part of a file as a shard, whose name begins with the file's."""
    return replace(source, name=f"{part.of}.part-{part.index:05d}-of-{part.count:05d}", size=size, part=part)


def finished_parts(source: Source, finished: Iterable[Mapping[str, Any]]) -> list[Source] | None:
    """Return the parts of a file that has not changed, if all of them are finished; None otherwise.

    Args:
        source: The whole file.
        finished: The metadata of the finished parts of files of its name.
    """
    same = [shard for shard in finished if (shard["size"], shard["stamp"]) == (source.size, source.stamp)]
    parts = [Part(**{**shard["part"], "rows": RowRange(*shard["part"]["rows"]), "file_size": source.size}) for shard in same]
    if not parts or {part.count for part in parts} != {len(parts)}:
        return None
    return [as_part(source, part, 0) for part in sorted(parts, key=lambda part: part.index)]


def about_part(source: Source) -> dict[str, Any]:
    """Return the metadata that a finished part's file keeps of the part; none for a whole file."""
    if source.part is None:
        return {}
    part = asdict(source.part)
    return {"part": {**{name: part[name] for name in ("of", "index", "count")}, "rows": list(source.part.rows)}}
