"""What every format gets to write, and the list of formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        name: The name of its folder.
        model: The model in float32, on the CPU, in eval mode.
        tokenizer: Its tokenizer.
        dtype: The dtype that matrices are written in.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: Its name on the command line.
        about: What it is, in a line.
        module: The module of `secateur.exporting` whose `write(source, folder)` writes it and returns what export.json says.
        packages: The packages that the module needs, by the extra that installs them.
    """

    name: str
    about: str
    module: str
    packages: tuple[tuple[str, str], ...] = ()


FORMATS = {
    each.name: each
    for each in (
        Format("gguf", "a file for llama.cpp", "gguf_file", (("gguf", "gguf"),)),
        Format("decilm", "a folder of DeciLM's kind (Nemotron-NAS) for vLLM and SGLang", "decilm"),
    )
}
