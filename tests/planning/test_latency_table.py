"""Latency tables: a file is read as it was written, and refused in one line where it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from secateur import InputError, LatencyTable

ATTENTION = "encoder.0.self_attention"
TABLE = LatencyTable(
    {"torch": "2"}, "0" * 16, "channel", 2, 6, 3, 50.0,
    {f"{ATTENTION}.qk": {2: 19.0, 4: 20.0}, f"{ATTENTION}.vo": {4: 18.0, 8: 20.0}}, {ATTENTION: {4: 11.0, 8: 20.0}},
    {0.5: 4.0, 1.0: 5.0},
)  # fmt: skip

# How a file is damaged, and the reason that the refusal gives.
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another-format": (lambda about: about.update(format="secateur-latency/99"), "expected the format 'secateur-latency/1'"),
    "no-format": (lambda about: about.pop("format"), "'format'"),
    "no-sites": (lambda about: about.pop("sites"), "'sites'"),
    "no-rest": (lambda about: about.pop("rest"), "'rest'"),
    "no-rest-of-the-whole": (lambda about: about["rest"].pop("1.0"), "expected the rest of the whole model"),
    "unknown-field": (lambda about: about.update(colour="red"), "'colour'"),
    "no-counts": (lambda about: about["sites"].update({f"{ATTENTION}.qk": {}}), "expected milliseconds by what remains"),
    "count-of-zero": (lambda about: about["sites"][f"{ATTENTION}.qk"].update({"0": 0.0}), "milliseconds by what remains"),
    "negative": (lambda about: about["both"][ATTENTION].update({"4": -1.0}), "expected milliseconds by what remains"),
    "infinite": (lambda about: about["rest"].update({"0.5": float("inf")}), "expected milliseconds by what remains"),
    "count-is-no-number": (lambda about: about["sites"][f"{ATTENTION}.qk"].update(two=1.0), "'two'"),
}  # fmt: skip


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == TABLE


def test_counts_are_read_in_ascending_order(tmp_path: Path) -> None:
    about = json.loads(TABLE.dumps())
    about["sites"][f"{ATTENTION}.qk"] = {"4": 20.0, "2": 19.0}
    (tmp_path / "table.json").write_text(json.dumps(about))
    assert list(LatencyTable.load(tmp_path / "table.json").sites[f"{ATTENTION}.qk"]) == [2, 4]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    change, reason = DAMAGE[damage]
    about = json.loads(TABLE.dumps())
    change(about)
    (tmp_path / "table.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"^latency: .*table.json.* is no latency table .*{reason}"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^latency: no such file: '.*table\.json'$"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        TABLE.total = 1.0  # type: ignore[misc]
