"""8-bit weights after pruning: torchao, PyTorch's own dynamic quantisation, bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, relative, run

# Rounding to 8 bits changes a layer's output by a few hundredths of its norm. A lost scatter or gather changes it by its norm.
BOUND = 0.2


def torchao_weights(folder: Folder) -> Outcome:
    """Quantise only the weights to 8 bits. The outputs must equal those of the same weights converted back to float32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model: Any = folder.load()
    quantize_(model, Int8WeightOnlyConfig())
    outcome = _compared(folder, model)
    outputs = run(lambda **inputs: model(**inputs).logits, folder)
    dense: Any = folder.load()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
                # A new parameter, because the output layer may share the memory of the embeddings, which were not quantised.
                dense.get_submodule(path).weight = nn.Parameter(module.weight.dequantize())
    saved = [logits for _, logits in folder.batches()]
    change = max(float((a - b).abs().max()) for a, b in zip(outputs, saved, strict=True))
    difference = max(
        float((a - b).abs().max()) for a, b in zip(outputs, run(lambda **inputs: dense(**inputs).logits, folder), strict=True)
    )
    if difference > change / 10:
        return Outcome("fails", f"differs by {difference:.1e} from the same weights turned back to float32", outcome.measured)
    note = f"{outcome.note}; {difference:.1e} from the same weights turned back to float32"
    return Outcome(outcome.verdict, note, {**outcome.measured, "from_dequantised": difference})


def torchao_dynamic(folder: Folder) -> Outcome:
    """Quantise weights and activations to 8 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model: Any = folder.load()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compared(folder, model)


def torch_dynamic(folder: Folder) -> Outcome:
    """Quantise linear layers with `torch.ao.quantization.quantize_dynamic`."""
    torch.backends.quantized.engine = "x86"
    model: Any = torch.ao.quantization.quantize_dynamic(folder.load(), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return _compared(folder, model)


def bitsandbytes(folder: Folder) -> Outcome:
    """Load with `BitsAndBytesConfig(load_in_8bit=True)` on this CPU."""
    from transformers import BitsAndBytesConfig

    model: Any = folder.load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    return _compared(folder, model)


def _compared(folder: Folder, model: Any) -> Outcome:
    """Compare each quantised layer with its original layer on the same inputs.

    The outcome also says how far the logits moved and which layers were not quantised.
    """
    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    float_paths = [path for path, module in linears.items() if _is_float(module)]
    worst = _largest_change(folder, model, [path for path in linears if path not in float_paths])
    outputs = run(lambda **inputs: model(**inputs).logits, folder)
    pairs = [(output, saved) for output, (_, saved) in zip(outputs, folder.batches(), strict=True)]
    moved = max(relative(output, saved) for output, saved in pairs)
    agree = min(float((output.argmax(-1) == saved.argmax(-1)).double().mean()) for output, saved in pairs)
    measured: dict[str, Any] = {"relative": moved, "argmax_same": agree, "worst_layer": worst, "layers": len(linears)}
    note = f"layers move by up to {worst:.1%}, logits by {moved:.1%} of their size, {agree:.0%} of the largest ones the same"
    kinds = sorted({type(linears[path]).__name__ for path in float_paths})
    measured["left_float"] = {kind: sum(type(linears[path]).__name__ == kind for path in float_paths) for kind in kinds}
    if worst > BOUND:
        return Outcome("fails", f"{note}: more than rounding does", measured)
    if float_paths:
        kept = ", ".join(f"{count} {kind}" for kind, count in measured["left_float"].items())
        return Outcome("works, but", f"{note}; of {len(linears)} layers these stay float32: {kept}", measured)
    return Outcome("works", f"{note}; all {len(linears)} layers in 8 bits", measured)


def _largest_change(folder: Folder, model_in_8_bits: nn.Module, quantised: list[str]) -> float:
    """Return the largest relative change of a layer's output, for the layer's inputs in the original model."""
    model, changes = folder.load(), [0.0]

    def compare_with(layer: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            changes.append(relative(layer(arguments[0]), output))

        return hook

    for path in quantised:
        # A layer that scatters or gathers as a whole, and not just its product.
        whole = path.removesuffix(".linear")
        model.get_submodule(whole).register_forward_hook(compare_with(model_in_8_bits.get_submodule(whole)))
    run(model, folder)
    return max(changes)


def _is_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear layer, quantised or not."""
    return isinstance(module, nn.Linear) or type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")


def _is_float(module: Any) -> bool:
    """Return whether the module's weight is an ordinary parameter of floating-point numbers."""
    return type(module.weight) is nn.Parameter and module.weight.dtype.is_floating_point
