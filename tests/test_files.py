"""Outputs appear complete, with modes by the umask; killed writers leave nothing for good; locks keep other processes out."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from secateur.support.errors import InputError
from secateur.support.files import (
    claimed,
    create_own,
    new_folder,
    open_own,
    require_absent,
    require_regular,
    require_run_folder,
    write_atomically,
)
from secateur.support.ledger import Ledger, require_same

IMPORTS = "import os, signal, sys, time; from secateur.support.files import *; "
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def killed(code: str) -> None:
    """Run code that ends in a kill of its own process."""
    process = subprocess.run([sys.executable, "-c", IMPORTS + code], check=False)
    assert process.returncode == -signal.SIGKILL


@contextmanager
def running(code: str) -> Iterator[None]:
    """Run code beside the context. The code prints a line once it is where it should stay, and is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", IMPORTS + code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "text")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "weights").touch(mode=0o600)  # As safetensors creates its files.
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "inside" / "weights") == file_mode
    assert mode(tmp_path / "folder") == folder_mode


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(f"\nwith new_folder({str(out)!r}) as folder:\n    (folder / 'big').write_text('big')\n    {DIE}")
    (left,) = names(tmp_path)
    assert left.startswith(".out.")
    with new_folder(out):
        assert left not in names(tmp_path)
    assert names(tmp_path) == ["out"]
    killed(f"os.replace = lambda *_: {DIE}; write_atomically({str(tmp_path / 'file')!r}, 'text')")
    assert len(names(tmp_path)) == 2
    write_atomically(tmp_path / "file", "text")
    assert names(tmp_path) == ["file", "out"]


def test_files_of_living_writers_and_of_others_stay(tmp_path: Path) -> None:
    out, others = tmp_path / "out", [".out.txt", ".out.0123.partial", "out.01234567.partial", ".other.01234567.partial"]
    for name in others:
        (tmp_path / name).touch()
    with running(f"\nwith new_folder({str(out)!r}):\n    print(flush=True)\n    time.sleep(600)"):
        (living,) = set(names(tmp_path)) - set(others)
        with new_folder(out):
            assert living in names(tmp_path)
        assert living in names(tmp_path)


def test_one_process_at_a_time_makes_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(f"\nwith claimed({str(out)!r}):\n    print(flush=True)\n    time.sleep(600)"):
        with pytest.raises(InputError, match="is in use by another process"), claimed(out):
            pass
        assert names(tmp_path) == [".out.lock"]
    with claimed(out, "file"):  # The lock of a killed process is free.
        write_atomically(out, "text")
    assert names(tmp_path) == ["out"]
    with pytest.raises(InputError, match="expected a file that does not exist yet"), claimed(out, "file"):
        pass
    assert names(tmp_path) == ["out"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(InputError, match="which is a link"):
        open_own(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        open_own(tmp_path / "pipe")
    with create_own(tmp_path / "link") as file:
        file.write(b"new")
    assert (precious.read_text(), (tmp_path / "link").read_text()) == ("precious", "new")
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / ".out.lock").symlink_to(precious)
    with pytest.raises(InputError, match="which is a link"), claimed(tmp_path / "out"):
        pass


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    for check in (require_absent, require_run_folder):
        with pytest.raises(InputError, match="out: expected a folder that can be written to, got '/proc/self'"):
            check("/proc/self/out")
    with pytest.raises(InputError, match="out: expected a folder that can be written to, got '/proc/self/fdinfo'"):
        require_run_folder("/proc/self/fdinfo")
    with pytest.raises(InputError, match="File name too long"):
        require_absent(tmp_path / ("n" * 250))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="which exists"):
        require_absent(tmp_path / "dangling")
    require_run_folder(tmp_path)
    require_run_folder(tmp_path / "new")
    assert names(tmp_path) == ["dangling"]


def test_pipes_are_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="data: expected a file, got the pipe"):
        require_regular("data", tmp_path / "pipe.jsonl")
    require_regular("data", tmp_path / "missing")


def test_a_run_that_was_killed_before_its_settings_is_begun_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed(
        f"from secateur.support.ledger import Ledger; from pathlib import Path; os.replace = lambda *_: {DIE}; "
        f"Ledger(Path({str(folder)!r}), {{'seed': 0}})"
    )
    assert names(folder) != ["cells.jsonl", "settings.json"]
    with Ledger(folder, {"seed": 0}):
        assert names(folder) == ["cells.jsonl", "settings.json"]


@pytest.mark.parametrize("text", ["", "[1", "[]", "3", '"text"'])
def test_damaged_settings_of_a_run(tmp_path: Path, text: str) -> None:
    with Ledger(tmp_path / "run", {"seed": 0}):
        pass
    (tmp_path / "run" / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings.json' is damaged; delete its folder to begin the run anew") as caught:
        Ledger(tmp_path / "run", {"seed": 0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", "3", "[3]", '["a", 3]', "[1, 2, 3]"])
def test_a_damaged_cell_of_a_run(tmp_path: Path, line: str) -> None:
    with Ledger(tmp_path / "run", {"seed": 0}) as ledger:
        ledger.add({"cell": 1}, {"value": 1})
    (tmp_path / "run" / "cells.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"cells.jsonl' is damaged in line 1; delete this line, and its cell is run again"):
        Ledger(tmp_path / "run", {"seed": 0})


def test_settings_of_a_run_hide_passwords(tmp_path: Path) -> None:
    settings = {"data": "s3://me:word@bucket/a.jsonl?token=abc"}
    for _ in range(2):
        with Ledger(tmp_path / "run", settings):
            pass
    assert "word" not in (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(InputError, match=r"got 's3://\*\*\*@other'"):
        require_same("run", settings, {"data": "s3://me:word@other"})


def own_folder(path: Path, content: str) -> Path:
    """A folder as a command writes it."""
    path.mkdir()
    (path / "run.yaml").write_text("command: prune\n")
    (path / "content").write_text(content)
    return path


@pytest.mark.parametrize("swaps", [True, False], ids=["in one step", "in several steps"])
def test_an_output_is_replaced_when_the_new_one_is_complete(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **options: object())
    out = own_folder(tmp_path / "out", "former")
    with claimed(out, overwrite=True):
        with new_folder(out) as folder:
            (folder / "other").write_text("new")
            assert (out / "content").read_text() == "former"
        assert names(out) == ["other"]
    assert names(tmp_path) == ["out"]
    with pytest.raises(InputError, match="which exists"), new_folder(out):
        pass  # Nobody may replace it after the claim.


def test_a_failed_or_killed_run_leaves_the_former_output(tmp_path: Path) -> None:
    out = own_folder(tmp_path / "out", "former")
    with pytest.raises(ZeroDivisionError), claimed(out, overwrite=True), new_folder(out) as folder:
        (folder / "content").write_text(str(1 / 0))
    assert names(tmp_path) == ["out"]
    code = f"""
with claimed({str(out)!r}, overwrite=True), new_folder({str(out)!r}) as folder:
    (folder / "content").write_text("new")
    print(flush=True)
    time.sleep(600)"""
    with running(code), pytest.raises(InputError, match="is in use by another process"), claimed(out, overwrite=True):
        pass
    assert (out / "content").read_text() == "former"
    with claimed(out, overwrite=True):
        assert names(tmp_path) == [".out.lock", "out"]
    assert names(tmp_path) == ["out"]


def test_only_outputs_of_secateur_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    own_folder(tmp_path / "own", "former")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "rows.json").write_text('[{"input": "a"}]')
    (tmp_path / "object.json").write_text('{"format": 1}')
    (tmp_path / "empty").touch()
    (tmp_path / "weights.safetensors").write_bytes(save({"a": torch.zeros(1)}, {"format": "pt"}))
    (tmp_path / "plain.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    for name in ("rows.json", "object.json", "empty", "weights.safetensors", "plain.safetensors", "own"):
        refused = pytest.raises(InputError, match="overwrite: expected a file that secateur wrote")
        with refused, claimed(tmp_path / name, "file", overwrite=True):
            pass
    for name in ("photos", "link", "rows.json"):
        refused = pytest.raises(InputError, match="overwrite: expected a folder that secateur wrote")
        with refused, claimed(tmp_path / name, overwrite=True):
            pass
    (tmp_path / "scores.safetensors").write_bytes(save({"a": torch.zeros(1)}, {"secateur": "{}"}))
    (tmp_path / "plan.json").write_text('{"format": 1, "fingerprint": "a"}')
    for name in ("scores.safetensors", "plan.json"):
        with claimed(tmp_path / name, "file", overwrite=True):
            write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"


def test_an_input_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_folder(tmp_path / "out", "former")
    Path("link").symlink_to("out")
    for value in (
        "out",
        "./out/",
        "out/rows.jsonl",
        "a.jsonl,out/b.jsonl",
        "a.jsonl, out/*.jsonl",
        "link",
        str(tmp_path / "out"),
    ):
        refused = pytest.raises(InputError, match="expected an output that is no input, got 'out', which data names")
        with refused, claimed("out", overwrite=True, inputs=[("model", "m"), ("data", value)]):
            pass
    with claimed("out", overwrite=True, inputs=[("model", "out2"), ("data", "other/out"), ("labels", "")]):
        pass
    assert Path("out/content").read_text() == "former"
