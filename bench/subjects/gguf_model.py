"""Models whose real weights are in a quantised GGUF file: converted once to a folder in float32."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.support.packages import cache
from secateur.pruning.save import forget_gguf_


def convert(file: Path, target: Path) -> None:
    """Dequantise the weights of a file and save the model with its tokenizer, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    forget_gguf_(model)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        model.save_pretrained(Path(scratch) / "model")
        tokenizer.save_pretrained(Path(scratch) / "model")
        shutil.move(Path(scratch) / "model", target)


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Return the model of a folder and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
