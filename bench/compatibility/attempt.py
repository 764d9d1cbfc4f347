"""The ways to run a pruned folder, and one attempt at one way. An attempt has a process of its own."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Way:
    """A way to run a pruned folder.

    Attributes:
        title: The title in the table.
        function: "module:name" in this package. The function takes the folder.
        needs: The distributions without which the way is not tried.
        families: The families that the way applies to.
        elsewhere: The reason why the way does not apply to other families.
        alone: The attempt must not import secateur.
        seconds: The time limit.
    """

    title: str
    function: str
    needs: tuple[str, ...] = ()
    families: tuple[str, ...] = ("t5", "bert", "llama")
    elsewhere: str = ""
    alone: bool = True
    seconds: int = 420


WAYS = {
    "auto": Way("transformers, without secateur", "torch_ways:without_secateur"),
    "again": Way("save_pretrained, without secateur", "torch_ways:saved_again"),
    "compile": Way("torch.compile, fullgraph, dynamic shapes", "torch_ways:compiled", seconds=900),
    "export": Way("torch.export, non-strict", "torch_ways:exported"),
    "export-strict": Way("torch.export, strict", "torch_ways:exported_strict"),
    "onnx": Way("ONNX: torch.onnx and onnxruntime", "onnx_way:onnxruntime", ("onnx", "onnxscript", "onnxruntime")),
    "optimum": Way("ONNX: optimum", "onnx_way:optimum", ("optimum-onnx",)),
    "torchao-weights": Way("int8 weights, torchao", "quantising:torchao_weights", ("torchao",)),
    "torchao-dynamic": Way("int8 weights and activations, torchao", "quantising:torchao_dynamic", ("torchao",)),
    "torch-dynamic": Way("int8, torch.ao's quantize_dynamic", "quantising:torch_dynamic"),
    "bitsandbytes": Way("int8, bitsandbytes on CPU", "quantising:bitsandbytes", ("bitsandbytes", "accelerate")),
    "lora": Way("LoRA on plain nn.Linear layers (PEFT)", "lora:plain_layers", ("peft",)),
    "lora-all": Way('LoRA on "all-linear" (PEFT)', "lora:all_layers", ("peft",)),
    "pipeline": Way(
        "pipeline()", "pipelines:pipelines", families=("bert", "llama"), elsewhere="transformers 5 has no text2text pipeline"
    ),
    "infinity": Way(
        "Infinity (infinity-emb)", "infinity_way:infinity", families=("bert",), elsewhere="classifiers alone", seconds=900
    ),
    "gguf": Way("GGUF: llama.cpp", "gguf_way:gguf", ("gguf",), families=("llama",), elsewhere="tried for Llama alone"),
    "export-onnx": Way("secateur export: ONNX Runtime", "exports:onnx", ("onnx", "onnxscript", "onnxruntime"), alone=False),
    "export-openvino": Way("secateur export: OpenVINO", "exports:openvino", ("openvino",), alone=False),
    "export-ct2": Way("secateur export: CTranslate2", "exports:ct2", ("ctranslate2",), alone=False),
    "export-gguf": Way(
        "secateur export: llama.cpp",
        "exports:gguf",
        ("gguf", "xllamacpp"),
        families=("llama",),
        alone=False,
        elsewhere="decoders alone",
    ),
    "export-decilm": Way(
        "secateur export: vLLM, SGLang", "exports:decilm", families=("llama",), alone=False, elsewhere="decoders alone"
    ),
    "lm-eval": Way(
        "lm-eval --model hf",
        "harness:harness",
        ("lm-eval",),
        families=("t5", "llama"),
        alone=False,
        elsewhere="lm-eval scores text, not a classifier's labels",
    ),
    "vllm": Way("vLLM", "servers:vllm", families=("bert", "llama"), elsewhere="no encoder-decoders of this kind since 2025"),
    "tei": Way(
        "text-embeddings-inference", "servers:text_embeddings_inference", families=("bert",), elsewhere="encoders alone"
    ),
    "tgi": Way(
        "text-generation-inference", "servers:text_generation_inference", families=("t5", "llama"), elsewhere="generation alone"
    ),
}


class Forbidden:
    """An import hook that makes the import of secateur fail."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for secateur and its kernels."""
        if name.partition(".")[0] in ("secateur", "secateur_kernels"):
            raise ImportError(f"{name} is forbidden here")


def attempt(name: str, folder: Path, result: Path, log: Path) -> None:
    """Try one way on one folder in this process, and write the outcome."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    way = WAYS[name]
    if way.alone:
        sys.meta_path.insert(0, Forbidden())
    warnings.simplefilter("ignore")
    import torch

    from bench.compatibility.folder import Folder
    from bench.compatibility.outcome import Outcome, missing

    torch.set_num_threads(1)
    torch.manual_seed(0)
    absent = missing(*way.needs)
    if absent:
        outcome = Outcome("not tried", f"needs {', '.join(absent)}")
    else:
        module, _, function = way.function.partition(":")
        try:
            outcome = getattr(import_module(f"bench.compatibility.{module}"), function)(Folder.read(folder))
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("fails", first_line(error))
    result.write_text(json.dumps(outcome.to_json()))


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]
