"""The speed of engines on a CPU, dense against pruned, beside PyTorch: one forward pass, all in one run.

Each model is saved dense, and pruned to half of its layers' FLOPs in two shapes: stock, whose layers are alike, and any. Each
folder is exported for the engines that take it, which verifies it. Then all take turns.

python -m bench.run engines measures all models. python -m bench.measurements.engines MODEL ... measures some of bert, t5 and
smollm, and keeps the known rows of the others.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench.subjects import minilm, smollm
from bench.support.interleaved import compare
from bench.support.provenance import RESULTS, commit
from secateur.data import builtin
from secateur.flow.choose import alternatives
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.tasks import Task

RESULT = RESULTS / "engines.json"
SHAPES = ("dense", "stock", "any")
THREADS, SHARE, LENGTH, TARGET = 2, 0.5, 64, 4
BATCHES = (1, 8)
Run = Callable[[], Any]
Make = Callable[[Path, int], Run | None]  # From a folder and a batch size.


@dataclass(frozen=True)
class Subject:
    """A model with its task, and examples that it is pruned on."""

    name: str
    model: nn.Module
    task: Task
    rows: list[dict[str, Any]]


def _bert() -> Subject:
    model, tokenizer = minilm.fine_tuned("domain")
    return Subject("MiniLM (BERT)", model, secateur.SequenceClassification(tokenizer), builtin.examples("domain")[:100])


def _t5() -> Subject:
    model, tokenizer = builtin.load()
    labels = sorted({row["target"] for row in builtin.examples("language")})
    return Subject("built-in T5", model, secateur.TextToText(tokenizer, labels=labels), builtin.examples("language")[:100])


def _smollm() -> Subject:
    model, tokenizer = smollm.load()
    labels = sorted({row["target"] for row in builtin.examples("movie")})
    return Subject("SmolLM2-135M (Llama)", model, secateur.CausalLM(tokenizer, labels=labels), builtin.examples("movie")[:16])


# An encoder, an encoder-decoder and a decoder with real weights.
SUBJECTS = {"bert": _bert, "t5": _t5, "smollm": _smollm}


def engines(names: Iterable[str] = SUBJECTS, rounds: int = 5) -> dict[str, Any]:
    """Measure some models."""
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    measured = commit()
    for name in names:
        subject = SUBJECTS[name]()
        with tempfile.TemporaryDirectory() as scratch:
            folders = dict(_folders(subject, Path(scratch)))
            for batch in BATCHES:
                about = {"model": subject.name, "commit": measured, "batch": batch, "length": LENGTH}
                rows.append({**about, "load": os.getloadavg(), **_measured(folders, batch, rounds)})
                print(rows[-1], flush=True)
                gc.collect()
        seen = environment(subject.model)
    return {"environment": seen, "threads": THREADS, "share": SHARE, "rounds": rounds, "rows": rows}


def _folders(subject: Subject, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Save the model in each shape. Yields the folders by shape."""
    scores = secateur.attribute(subject.model, subject.task, subject.rows)
    removable = secateur.removable_blocks(subject.model, subject.task, subject.rows[:8])  # Only the speed is measured.
    for shape in SHAPES:
        model: nn.Module = subject.model
        if shape != "dense":
            options: dict[str, Any] = {"removable": removable} if shape == "stock" else {}
            plans = alternatives(scores, flops=SHARE, shape=shape, align=16, **options)
            # Under "any", the first plan has the same share in all layers, and the second one spreads the budget.
            model = secateur.prune(subject.model, plans[0 if shape == "stock" else 1])
        secateur.save(model, scratch / shape, task=subject.task)
        yield shape, scratch / shape


def _measured(folders: dict[str, Path], batch: int, rounds: int) -> dict[str, Any]:
    """Time all engines with all shapes in turn. Returns the times, and why a shape is missing for an engine."""
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for engine, make in ENGINES.items():
        for shape, folder in folders.items():
            try:
                run = make(folder, batch)
            except InputError as error:
                missing[f"{engine}, {shape}"] = str(error)
                continue
            if run is not None:
                runs[f"{engine}, {shape}"] = run
    return {"times": compare(runs, rounds=rounds, warmup=1, apart=0.25), "missing": missing}


def _inputs(model: Any, batch: int) -> dict[str, Tensor]:
    """Random tokens [batch, length] without padding, and for an encoder-decoder those of a short target."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (batch, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(10, 1000, (batch, TARGET), generator=generator)
    return inputs


def _torch(dtype: torch.dtype) -> Make:
    def make(folder: Path, batch: int) -> Run:
        model: Any = secateur.load(folder).to(dtype).eval()
        inputs = _inputs(model, batch)
        options = {} if "Classification" in type(model).__name__ else {"use_cache": False}

        def run() -> None:
            with torch.inference_mode():
                model(**inputs, **options)

        return run

    return make


def _exported(folder: Path, format: str) -> Path:
    """Export a folder once."""
    out = folder / format
    if not out.exists():
        secateur.export(folder, out, format=format)
    return out


def _fed(folder: Path, names: Any, batch: int) -> dict[str, Any]:
    """The inputs of a graph as arrays, by its names. Segments are 0."""
    inputs = _inputs(secateur.load(folder), batch)
    return {name: inputs.get(name, torch.zeros_like(inputs["input_ids"])).numpy() for name in names}


def _onnx(folder: Path, batch: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    path = str(_exported(folder, "onnx") / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = _fed(folder, [entry.name for entry in session.get_inputs()], batch)
    return lambda: session.run(None, fed)


def _openvino(precision: str) -> Make:
    def make(folder: Path, batch: int) -> Run:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS}
        path = _exported(folder, "openvino") / "openvino_model.xml"
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        fed = _fed(folder, [entry.get_any_name() for entry in compiled.inputs], batch)
        return lambda: compiled(fed)

    return make


def _ct2(compute: str) -> Make:
    def make(folder: Path, batch: int) -> Run:
        import ctranslate2

        path, model = str(_exported(folder, "ct2")), secateur.load(folder)
        inputs = {name: tensor.tolist() for name, tensor in _inputs(model, batch).items()}
        options = {"device": "cpu", "compute_type": compute, "intra_threads": THREADS, "inter_threads": 1}
        if "decoder_input_ids" in inputs:
            from transformers import AutoTokenizer

            words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens
            texts, targets = ([words(row) for row in inputs[name]] for name in ("input_ids", "decoder_input_ids"))
            translator = ctranslate2.Translator(path, **options)
            return lambda: translator.score_batch(texts, targets)
        engine = (ctranslate2.Encoder if "Classification" in type(model).__name__ else ctranslate2.Generator)(path, **options)
        return lambda: engine.forward_batch(inputs["input_ids"])

    return make


def _llama_cpp(folder: Path, batch: int) -> Run | None:
    """llama.cpp takes prompts one by one here, and computes the logits of the last token alone. Others are not measured."""
    if batch > 1:
        return None
    import xllamacpp

    model: Any = secateur.load(folder)
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = str(_exported(folder, "gguf") / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(parameters)
    prompt = _inputs(model, 1)["input_ids"][0].tolist()
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False}
    return lambda: server.handle_completions(asked)


def _bfloat16_products() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return bool(torch.backends.cpu.get_cpu_capability()) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


_OPTIONAL: dict[str, dict[str, Make]] = {
    "onnxruntime": {"ONNX Runtime float32": _onnx},
    "openvino": {"OpenVINO float32": _openvino("f32")},
    "ctranslate2": {"CTranslate2 float32": _ct2("float32"), "CTranslate2 int8": _ct2("int8")},
    "xllamacpp": {"llama.cpp float32": _llama_cpp},
}
# The first one is the reference of all ratios.
ENGINES: dict[str, Make] = {"torch float32": _torch(torch.float32)}
if _bfloat16_products():
    ENGINES["torch bfloat16"] = _torch(torch.bfloat16)
    _OPTIONAL["openvino"]["OpenVINO bfloat16"] = _openvino("bf16")
for _package, _of_package in _OPTIONAL.items():
    if importlib.util.find_spec(_package) is not None:
        ENGINES |= _of_package


def main() -> None:
    """Measure the models that the command line names. The rows of the others stay as they are in the file."""
    known = json.loads(RESULT.read_text())
    new = engines(sys.argv[1:])
    if known["environment"] != new["environment"]:
        sys.exit(f"environment: expected that of {RESULT}, to keep its other rows, got {new['environment']}")
    replaced = {row["model"] for row in new["rows"]}
    rows = [row for row in known["rows"] if row["model"] not in replaced]
    RESULT.write_text(json.dumps({**known, **new, "rows": rows + new["rows"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
