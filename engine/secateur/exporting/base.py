"""What every format gets to write, and the list of formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        name: The name of its folder.
        place: The folder that it was loaded from.
        model: The model in float32, on the CPU, in eval mode.
        tokenizer: Its tokenizer, or its image processor.
        dtype: The dtype that matrices are written in.
    """

    name: str
    place: Path
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
            Its `require(model, tokenizer)` raises InputError for an architecture or a tokenizer that the format does not hold.
        packages: The packages that the module needs, by the extra that installs them.
        task: The name of the task whose models it takes; None for those of any task.
        dtypes: The names of the dtypes that it can hold.
    """

    name: str
    about: str
    module: str
    packages: tuple[tuple[str, str], ...] = ()
    task: str | None = None
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


FORMATS = {
    each.name: each
    for each in (
        Format("gguf", "a file for llama.cpp", "gguf_file", (("gguf", "gguf"),), task="causal-lm"),
        Format("decilm", "a folder of DeciLM's kind (Nemotron-NAS) for vLLM and SGLang", "decilm", task="causal-lm"),
        Format("onnx", "an ONNX file of the logits", "onnx_file", (("onnx", "onnx"), ("onnxscript", "onnx"))),
        Format(
            "openvino",
            "an OpenVINO model of the logits",
            "openvino_file",
            (("openvino", "openvino"),),
            dtypes=("float32", "float16"),
        ),
        Format("ct2", "a folder for CTranslate2, of stock shapes alone", "ct2", (("ctranslate2", "ct2"),)),
    )
}
