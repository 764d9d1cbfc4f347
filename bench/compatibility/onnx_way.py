"""torch.onnx's exporter, and its file in onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, differences, dynamic_shapes, logits_of, ratio, same_outputs, timed


def onnxruntime(folder: Folder) -> Outcome:
    """Export one ONNX file for any batch size and length, and compare outputs and time with one thread."""
    import onnxruntime as ort
    from torch.onnx.errors import OnnxExporterError

    model, path, note = folder.load(), folder.path / "model.onnx", ""
    try:
        _export(folder, model, path)
    except OnnxExporterError as error:
        note = f'with attn_implementation="eager"; without, {type(error).__name__}'
        _export(folder, folder.load(attn_implementation="eager"), path)
    module = logits_of(model, folder)
    inputs, _ = folder.batches()[0]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.unlink()

    def run_session(batch: dict[str, torch.Tensor]) -> Any:
        return session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})[0]

    outputs = [torch.from_numpy(run_session(batch)) for batch, _ in folder.batches()]
    with torch.inference_mode():
        times = timed(lambda: module(**inputs), lambda: run_session(inputs))
    outcome = same_outputs(differences(model, folder, outputs), "; ".join(filter(None, [ratio(times), note])), **times)
    return replace(outcome, verdict="works, but") if note and outcome.verdict == "works" else outcome


def _export(folder: Folder, model: nn.Module, path: Path) -> None:
    """Export the model's logits."""
    inputs, _ = folder.batches()[0]
    torch.onnx.export(
        logits_of(model, folder), (), str(path), kwargs=inputs, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=dynamic_shapes(inputs), input_names=list(inputs), output_names=["logits"],
    )  # fmt: skip


def optimum(folder: Folder) -> Outcome:
    """Load the folder with `ORTModelFor...from_pretrained(folder, export=True)` and compare outputs."""
    from optimum import onnxruntime as ort

    name = {"t5": "ORTModelForSeq2SeqLM", "bert": "ORTModelForSequenceClassification", "llama": "ORTModelForCausalLM"}
    model: Any = getattr(ort, name[folder.family]).from_pretrained(
        folder.model, export=True, trust_remote_code=not folder.stock
    )
    outputs = [model(**inputs).logits for inputs, _ in folder.batches()]
    return same_outputs(differences(folder.load(), folder, outputs))
