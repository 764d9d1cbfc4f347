"""A tagger with its examples, as a folder and as column files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cases import CASES
from torch import nn

import secateur

CASE = CASES["bert-token"]


def written(path: str, rows: list[dict[str, Any]], rename: Mapping[str, str] | None = None) -> None:
    """Examples as a column file: number, token, tag."""
    lines = [
        "".join(
            f"{n} {token} {(rename or {}).get(tag, tag)}\n" for n, (token, tag) in enumerate(zip(*row.values(), strict=True))
        )
        for row in rows
    ]
    Path(path).write_text("\n".join(lines))


def saved(model: nn.Module) -> None:
    secateur.save(model, "m", tokenizer=CASE.task.reader)
