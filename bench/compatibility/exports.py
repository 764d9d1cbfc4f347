"""`secateur export`: each format on each folder. The export runs the engine beside PyTorch, and refuses a wrong file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import secateur
from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome


def gguf(folder: Folder) -> Outcome:
    """Export for llama.cpp, with a byte-level tokenizer. The folder's own one, of Llama 2's kind, is refused."""
    model = folder.path / "byte-level"
    shutil.copytree(folder.model, model, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    texts = [json.loads(line)["input"] for line in (folder.path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    _byte_level_tokenizer(texts).save_pretrained(model)
    outcome = _exported(folder, "gguf", model)
    return replace(outcome, note=f"{outcome.note}; with a byte-level tokenizer in place of the folder's")


def decilm(folder: Folder) -> Outcome:
    """Export for vLLM and SGLang, which are not run."""
    return _exported(folder, "decilm")


def onnx(folder: Folder) -> Outcome:
    """Export for ONNX Runtime."""
    return _exported(folder, "onnx")


def openvino(folder: Folder) -> Outcome:
    """Export for OpenVINO."""
    return _exported(folder, "openvino")


def ct2(folder: Folder) -> Outcome:
    """Export for CTranslate2."""
    return _exported(folder, "ct2")


def _byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer as in GPT-2. It has at most as many tokens as the folder's Llama."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=[*special.values()], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, pad_token="</s>", **special)


def _exported(folder: Folder, format: str, model: Path | None = None) -> Outcome:
    """Export a folder, or a copy of its model. A refusal is the outcome "fails", with its line."""
    try:
        document = secateur.export(model or folder.model, folder.path / format, format=format).document
    except secateur.InputError as error:
        return Outcome("fails", str(error).replace("|", "/"))
    proof = document["verification"]
    if not proof["run"]:
        return Outcome("not run", f"written as {document['architecture']}; {proof['why'].removeprefix('not run: ')}")
    measured = {"difference": proof["largest_difference"], "bound": proof["bound"]}
    what = f"{proof.get('what', 'log-probabilities')} of {proof['engine']}"
    return Outcome("works", f"{what} within {proof['largest_difference']:.1e} of PyTorch's", measured)
