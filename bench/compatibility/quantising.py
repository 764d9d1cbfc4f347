"""8-bit weights on top of pruning: torchao, PyTorch's own dynamic quantisation, bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, relative, run

# Rounding to 8 bits moves what a layer gives by a few hundredths of its size; a lost scatter or gather, by its own size.
BOUND = 0.2


def torchao_weights(folder: Folder) -> Outcome:
    """Weights alone in 8 bits. What the quantised model computes must be what its own weights, turned back, compute."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model: Any = folder.load()
    quantize_(model, Int8WeightOnlyConfig())
    found = _compared(folder, model)
    outputs = run(lambda **inputs: model(**inputs).logits, folder)
    dense: Any = folder.load()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
                # A new parameter: the output layer may share the embeddings' memory, and they were not quantised.
                dense.get_submodule(path).weight = nn.Parameter(module.weight.dequantize())
    saved = [logits for _, logits in folder.batches()]
    moved = max(float((a - b).abs().max()) for a, b in zip(outputs, saved, strict=True))
    same = max(
        float((a - b).abs().max()) for a, b in zip(outputs, run(lambda **inputs: dense(**inputs).logits, folder), strict=True)
    )
    if same > moved / 10:
        return Outcome("fails", f"differs by {same:.1e} from the same weights turned back to float32", found.measured)
    note = f"{found.note}; {same:.1e} from the same weights turned back to float32"
    return Outcome(found.verdict, note, {**found.measured, "from_dequantised": same})


def torchao_dynamic(folder: Folder) -> Outcome:
    """Weights and activations in 8 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model: Any = folder.load()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compared(folder, model)


def torch_dynamic(folder: Folder) -> Outcome:
    """`torch.ao.quantization.quantize_dynamic` of linear layers."""
    torch.backends.quantized.engine = "x86"
    model: Any = torch.ao.quantization.quantize_dynamic(folder.load(), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return _compared(folder, model)


def bitsandbytes(folder: Folder) -> Outcome:
    """`BitsAndBytesConfig(load_in_8bit=True)` on this CPU."""
    from transformers import BitsAndBytesConfig

    model: Any = folder.load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    return _compared(folder, model)


def _compared(folder: Folder, model: Any) -> Outcome:
    """Each layer against the one that it was, on the same inputs; how far the logits have moved; which layers stayed."""
    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    left = [path for path, module in linears.items() if _is_float(module)]
    worst = _largest_change(folder, {path: module for path, module in linears.items() if path not in left})
    outputs = run(lambda **inputs: model(**inputs).logits, folder)
    pairs = [(output, saved) for output, (_, saved) in zip(outputs, folder.batches(), strict=True)]
    moved = max(relative(output, saved) for output, saved in pairs)
    agree = min(float((output.argmax(-1) == saved.argmax(-1)).double().mean()) for output, saved in pairs)
    measured: dict[str, Any] = {"relative": moved, "argmax_same": agree, "worst_layer": worst, "layers": len(linears)}
    note = f"layers move by up to {worst:.1%}, logits by {moved:.1%} of their size, {agree:.0%} of the largest ones the same"
    kinds = sorted({type(linears[path]).__name__ for path in left})
    measured["left_float"] = {kind: sum(type(linears[path]).__name__ == kind for path in left) for kind in kinds}
    if worst > BOUND:
        return Outcome("fails", f"{note}: more than rounding does", measured)
    if left:
        kept = ", ".join(f"{count} {kind}" for kind, count in measured["left_float"].items())
        return Outcome("works, but", f"{note}; of {len(linears)} layers these stay float32: {kept}", measured)
    return Outcome("works", f"{note}; all {len(linears)} layers in 8 bits", measured)


def _largest_change(folder: Folder, quantised: dict[str, nn.Module]) -> float:
    """The largest relative change of what a layer gives for its inputs in the model before."""
    model, worst = folder.load(), [0.0]

    def against(layer: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            worst.append(relative(layer(arguments[0]), output))

        return hook

    for path, layer in quantised.items():
        model.get_submodule(path).register_forward_hook(against(layer))
    run(model, folder)
    return max(worst)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")


def _is_float(module: Any) -> bool:
    """Its weight is an ordinary parameter of floating-point numbers."""
    return type(module.weight) is nn.Parameter and module.weight.dtype.is_floating_point
