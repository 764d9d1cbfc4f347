"""OpenVINO: one graph from token ids to logits, for any batch size and length, under the names that optimum-intel loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.exporting.base import Source
from secateur.exporting.companions import notes_of, write_companions
from secateur.exporting.comparing import at_tokens, compared, expected, logits_for
from secateur.exporting.logits import exactly, inputs_of, round_
from secateur.exporting.logits import require as require
from secateur.pruning.describe import stock_class
from secateur.tasks.logits import OUTPUT, openvino_graph

FILE = "openvino_model.xml"
_PRECISION = "INFERENCE_PRECISION_HINT"


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the model, and compare OpenVINO on the CPU with PyTorch on it.

    Args:
        source: The model.
        folder: The folder for the files.

    Returns:
        What was written, for export.json.

    Raises:
        VerificationError: OpenVINO computes something else from the files.
    """
    import openvino

    model: Any = source.model
    batches = inputs_of(source)
    round_(source)
    reference = expected(model, logits_for(batches))
    graph = openvino_graph(model, batches[0])
    if source.dtype == torch.float16:
        _store_in_half(graph)
    openvino.save_model(graph, folder / FILE, compress_to_fp16=False)
    write_companions(source, folder)
    core = openvino.Core()
    default = core.compile_model(folder / FILE, "CPU").get_property(_PRECISION).to_string()
    notes = notes_of(model)
    if default != "f32":
        notes.append(f"on this CPU, OpenVINO computes in {default} unless {_PRECISION} is f32")
    given = _outputs(core.compile_model(folder / FILE, "CPU", {_PRECISION: "f32"}), batches)
    engine = f"openvino {openvino.__version__.partition('-')[0]}"
    return {
        "architecture": stock_class(model).__name__, "inputs": list(batches[0]), "outputs": [OUTPUT], "notes": notes,
        "verification": compared(engine, "logits", reference, given),
    }  # fmt: skip


def _store_in_half(graph: Any) -> None:
    """Store the numbers that float16 holds exactly in float16, with a conversion to float32 behind each.

    OpenVINO's own compression rounds the others too.
    """
    from openvino import Type, opset13

    for constant in [operation for operation in graph.get_ops() if operation.get_type_name() == "Constant"]:
        if constant.get_element_type() != Type.f32:
            continue
        smaller = exactly(constant.data, np.float16)
        if smaller is not None:
            back = opset13.convert(opset13.constant(smaller), Type.f32)
            constant.output(0).replace(back.output(0))


def _outputs(compiled: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """OpenVINO's logits at tokens."""
    outputs = []
    for batch in batches:
        result = compiled({name: tensor.numpy() for name, tensor in batch.items()})
        outputs.append(at_tokens(torch.from_numpy(result[OUTPUT].copy()), batch))
    return outputs
