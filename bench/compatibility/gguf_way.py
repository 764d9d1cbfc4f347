"""GGUF: llama.cpp's own converter on the folder. transformers reads the file back, and llama.cpp runs it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, installed

CONVERTER = "convert_hf_to_gguf.py"


def gguf(folder: Folder) -> Outcome:
    """Convert the folder, read it back, and run it.

    $LLAMA_CPP names llama.cpp's source folder, which contains the converter.
    """
    source = os.environ.get("LLAMA_CPP")
    if source is None:
        return Outcome("not tried", f"needs LLAMA_CPP, the folder with llama.cpp's {CONVERTER}")
    path = folder.path / "model.gguf"
    command = [sys.executable, str(Path(source) / CONVERTER), str(folder.model), "--outfile", str(path), "--outtype", "f32"]
    converted = subprocess.run(command, capture_output=True, text=True, check=False)
    if converted.returncode:
        return Outcome("fails", f"{CONVERTER}: {converted.stderr.strip().splitlines()[-1][:200]}")
    read_note, exact = _read_back(folder, path)
    run_note, difference = _run(folder, path)
    measured = {"read_back_equal": exact, "llama_cpp_log_probability": difference}
    if not folder.stock or exact is False or (difference is not None and difference > 1e-4):
        return Outcome("fails", f"converted; {read_note}; {run_note}", measured)
    return Outcome("works", f"converted; {read_note}; {run_note}", measured)


def _read_back(folder: Folder, path: Path) -> tuple[str, bool | None]:
    """Read the file into transformers' stock class. The weights must equal those of the folder."""
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, RuntimeError, ImportError, KeyError, NotImplementedError, OSError) as error:
        return f"transformers does not read it back ({type(error).__name__}: {str(error).splitlines()[0][:120]})", None
    weights = folder.load().state_dict()
    same = all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    return ("transformers reads the same weights back" if same else "transformers reads OTHER weights back"), same


def _run(folder: Folder, path: Path) -> tuple[str, float | None]:
    """Compare llama.cpp's log-probabilities of the next token with the model's for the same ids."""
    if installed("xllamacpp") is None:
        return "not run by llama.cpp (needs xllamacpp)", None
    import xllamacpp

    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    # llama.cpp computes attention in half precision by default.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError:
        return "llama.cpp refuses the file: its layers have one width, out of the metadata", None
    model: Any = folder.load()
    worst = 0.0
    for inputs, _ in folder.batches():
        ids = inputs["input_ids"][0].tolist()  # The first row has no padding.
        answer = server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": 10})
        with torch.inference_mode():
            expected = model(input_ids=inputs["input_ids"][:1]).logits[0, -1].log_softmax(-1)
        for token, value in _log_probabilities(answer):
            worst = max(worst, abs(float(expected[token]) - value))
    return f"llama.cpp's log-probabilities (attention in float32) differ by up to {worst:.1e}", worst


def _log_probabilities(answer: Any) -> list[tuple[int, float]]:
    """Return ids and log-probabilities of the ten most likely tokens."""
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [(entry["id"], entry["logprob"]) for entry in likeliest if math.isfinite(entry["logprob"])]
