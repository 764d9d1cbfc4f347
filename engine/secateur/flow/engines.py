"""Engines that serve models: the widest shape that each one takes of an architecture, and what it reads.

Sources: vLLM 0.33.0, vllm/model_executor/models/registry.py; SGLang 0.5.23, python/sglang/srt/models; text-embeddings-inference
1.9.3, backends/candle/src. llama.cpp, OpenVINO, ONNX Runtime and CTranslate2 were run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.planning.shapes import Shape
from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError
from secateur.support.fields import shown


@dataclass(frozen=True)
class Needs:
    """What an engine needs of a pruned model.

    Attributes:
        shape: The widest shape that it takes, as in `plan`.
        align: FFN widths are multiples of it. With 1, the device alone decides.
        format: The format that it reads, as in `export`; None for the folder itself.
        serve: The command that serves what the engine reads, "" where there is none. "{}" stands for the path.
    """

    shape: Shape
    align: int = 1
    format: str | None = None
    serve: str = ""


_LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_DECODERS = ("Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM")
_CLASSIFIERS = ("BertForSequenceClassification", "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")
_MORE_ENCODERS = ("BertForTokenClassification", "ModernBertForSequenceClassification", "ModernBertForTokenClassification")
# Those whose folders a test compares. CTranslate2's converter knows more. Of Gemma 2 and 3, its folders compute other logits.
CTRANSLATE2 = (
    "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel", *_LLAMAS,
    "Qwen3ForCausalLM", "GPT2LMHeadModel",
    *(f"{family}For{task}Classification" for family in ("Bert", "Roberta", "DistilBert") for task in ("Sequence", "Token")),
)  # fmt: skip
_VLLM, _SGLANG, _LLAMA_CPP = "vllm serve {}", "python -m sglang.launch_server --model-path {}", "llama-server -m {}/model.gguf"
# By engine, what it needs of architectures; an empty tuple stands for all.
_ENGINES: Mapping[str, Mapping[tuple[str, ...], Needs]] = {
    "vllm": {
        _LLAMAS: Needs("per-layer", format="decilm", serve=_VLLM),
        _DECODERS: Needs("stock", serve=_VLLM),
        (*_CLASSIFIERS, *_MORE_ENCODERS): Needs("stock", serve=f"{_VLLM} --runner pooling"),
    },
    "sglang": {
        # It computes the width of an FFN from a factor, which gives multiples of 256.
        _LLAMAS: Needs("per-layer", 256, "decilm", serve=_SGLANG),
        _DECODERS: Needs("stock", serve=_SGLANG),
        _CLASSIFIERS[:1]: Needs("stock", serve=f"{_SGLANG} --is-embedding"),
    },
    "llama.cpp": {
        # The blocks of its quantised types have 32 columns.
        _LLAMAS: Needs("any", 32, "gguf", serve=_LLAMA_CPP),
        _DECODERS[:1]: Needs("stock", 32, "gguf", serve=_LLAMA_CPP),
    },
    "tei": {_CLASSIFIERS: Needs("stock", serve="text-embeddings-router --model-id {}")},
    "ctranslate2": {CTRANSLATE2: Needs("stock", format="ct2")},
    "openvino": {(): Needs("any", format="openvino")},
    "onnx": {(): Needs("any", format="onnx")},
}
ENGINES = tuple(_ENGINES)


def require_engine(name: Any) -> str:
    """Return the name of an engine. Raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in _ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, got {shown(name)}")
    return str(name)


def needs_of(engine: str, model: nn.Module) -> Needs:
    """Return what an engine needs of a pruned model: the widest shape that it takes, and the format that it reads.

    Args:
        engine: The name of the engine: "vllm", "sglang", "llama.cpp", "tei" (text-embeddings-inference), "ctranslate2",
            "openvino" or "onnx" (ONNX Runtime).
        model: The dense model.

    Raises:
        InputError: The engine is unknown, or does not take the model's architecture.

    Example:
        >>> needs = secateur.needs_of("vllm", model)
        >>> compressed = secateur.compress(model, examples, task, flops=0.5, shape=needs.shape, align=needs.align)
    """
    known, architecture = _ENGINES[require_engine(engine)], stock_class(model).__name__
    for architectures, needs in known.items():
        if not architectures or architecture in architectures:
            return needs
    taken = ", ".join(name for architectures in known for name in architectures)
    raise InputError(f"engine: expected for {engine} one of {taken}, got {architecture}")


def servers_of(architecture: str) -> dict[str, str]:
    """Return the commands that serve the folder of an architecture with a stock config, by engine. "{}" stands for the folder.

    Args:
        architecture: The name of the model's own class, such as "BertForSequenceClassification".
    """
    return {
        engine: needs.serve
        for engine, known in _ENGINES.items()
        for architectures, needs in known.items()
        if architecture in architectures and needs.serve and needs.format in (None, "decilm")
    }
