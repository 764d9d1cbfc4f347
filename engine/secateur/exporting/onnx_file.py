"""ONNX: one graph from token ids to logits, for any batch size and length."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.exporting.base import Source
from secateur.exporting.companions import notes_of, write_companions
from secateur.exporting.comparing import at_tokens, compared, expected, logits_for
from secateur.exporting.logits import dynamic_shapes, exactly, inputs_of, round_
from secateur.exporting.logits import require as require
from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError, first_line
from secateur.tasks.logits import OUTPUT, Logits

FILE = "model.onnx"
# A file of protobuf has at most 2 GiB. The graph itself takes some of it.
_LARGEST = 2**31 - 2**26


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the file, and compare onnxruntime with PyTorch on it where onnxruntime is installed.

    Args:
        source: The model.
        folder: The folder for the file.

    Returns:
        What was written, for export.json.

    Raises:
        InputError: torch.onnx does not export the model.
        VerificationError: onnxruntime computes something else from the file.
    """
    model: Any = source.model
    batches = inputs_of(source)
    round_(source)
    reference = expected(model, logits_for(batches))
    # torch 2.13's exporter fails on T5's other attention.
    model.set_attn_implementation("eager")
    export_onnx(model, batches[0], folder / FILE, source.dtype)
    write_companions(source, folder)
    verification: dict[str, Any] = {"run": False, "why": "not run: needs onnxruntime, pip install 'secateur[onnx]'"}
    if importlib.util.find_spec("onnxruntime") is not None:
        engine, given = _outputs(folder / FILE, batches)
        verification = compared(engine, "logits", reference, given)
    return {
        "architecture": stock_class(model).__name__, "inputs": list(batches[0]), "outputs": [OUTPUT],
        "notes": notes_of(model), "verification": verification,
    }  # fmt: skip


def export_onnx(model: nn.Module, example: Mapping[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model's logits as an ONNX file for any batch size and length. Above 2 GiB, the weights are in a file beside it.

    Args:
        model: The model in float32, whose weights have values of `dtype`.
        example: Inputs with at least two examples and two tokens.
        path: The file.
        dtype: The dtype that weights are stored in. The graph computes in float32.

    Raises:
        InputError: torch.onnx does not export the model.
    """
    from torch.onnx.errors import OnnxExporterError

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # It says that torchvision is missing, which no model here needs.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of the exporter, on what it leaves out by its own plan.
            program: Any = torch.onnx.export(
                Logits(model).eval(), (), kwargs=dict(example), dynamo=True, verbose=False,
                dynamic_shapes=dynamic_shapes(example), input_names=list(example), output_names=[OUTPUT],
            )  # fmt: skip
    except OnnxExporterError as error:
        cause = error.__cause__ or error
        raise InputError(
            f"model: expected one that torch.onnx exports, got {stock_class(model).__name__}: {first_line(cause)}"
        ) from error
    finally:
        logger.setLevel(level)
    if dtype != torch.float32:
        _store(program.model.graph, dtype)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(str(path), external_data=size > _LARGEST)


def _store(graph: Any, dtype: torch.dtype) -> None:
    """Store the numbers that a dtype holds exactly in that dtype, with a cast to float32 behind each."""
    import onnx_ir as ir

    kind = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        smaller = exactly(value.const_value.numpy(), kind.numpy())
        if smaller is None:
            continue
        stored = ir.Value(
            name=f"{name}.stored", type=ir.TensorType(kind), shape=value.shape, const_value=ir.Tensor(smaller, dtype=kind)
        )
        cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)})
        (back,) = cast.outputs
        back.type, back.shape = value.type, value.shape
        value.replace_all_uses_with(back)
        del graph.initializers[name]
        back.name = name
        graph.initializers.add(stored)
        graph.insert_before(graph[0], cast)


def _outputs(path: Path, batches: list[dict[str, Tensor]]) -> tuple[str, list[Tensor]]:
    """The name of onnxruntime with its version, and its logits at tokens."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = []
    for batch in batches:
        (logits,) = session.run([OUTPUT], {name: tensor.numpy() for name, tensor in batch.items()})
        outputs.append(at_tokens(torch.from_numpy(logits), batch))
    return f"onnxruntime {onnxruntime.__version__}", outputs
