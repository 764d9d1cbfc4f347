"""Tables of rows as files: JSONL, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.support.errors import InputError
from secateur.support.files import require_absent, write_atomically

_ENDINGS = (".jsonl", ".csv", ".parquet")


def require_writable_table(path: Path, argument: str = "predictions") -> None:
    """Check that a table can be written.

    Raises:
        InputError: The file exists, has another ending, or its folder cannot be written to.
    """
    if path.suffix not in _ENDINGS:
        raise InputError(f"{argument}: expected a file ending in {', '.join(_ENDINGS)}, got {str(path)!r}")
    require_absent(path, "file", argument)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same columns. The ending tells the format; CSV has lists and objects as JSON.

    Args:
        path: The file.
        rows: The rows, at least one.
    """
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), buffer)
        write_atomically(path, buffer.getvalue())
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for k, v in row.items()}
            )
        write_atomically(path, text.getvalue())
    else:
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
