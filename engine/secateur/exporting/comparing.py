"""The proof of an exported model: an engine's outputs beside PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.pruning.verify import in_wider_dtype
from secateur.support.errors import VerificationError
from secateur.tasks.logits import Logits

# An engine sums in another order, and has its own exp, erf and tanh. Over 36 small models of 17 families, onnxruntime's error
# was at most 3.3 times PyTorch's own in float32, and OpenVINO's 3.5 times. A wrong graph is wrong by thousands of times.
OF_ROUNDING = 10.0


@dataclass(frozen=True)
class Expected:
    """Outputs of a model in PyTorch, and what float32 costs there.

    Attributes:
        exact: The outputs for each batch, computed in float64.
        rounding: The largest error of the same model in float32.
    """

    exact: list[Tensor]
    rounding: float


def expected(model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> Expected:
    """Compute a model's outputs in float64 and in float32.

    Args:
        model: The model in float32.
        run: Returns the outputs of a model for all batches. Only what is to be compared is returned, without padding.
    """
    with torch.inference_mode():
        exact, own = run(in_wider_dtype(model)), run(model)
    return Expected(exact, _largest(exact, own))


def logits_for(batches: Sequence[Mapping[str, Tensor]]) -> Callable[[nn.Module], list[Tensor]]:
    """Return the function that gives a model's logits at all tokens of batches."""

    def run(model: nn.Module) -> list[Tensor]:
        module = Logits(model)
        return [at_tokens(module(**batch), batch) for batch in batches]

    return run


def at_tokens(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits at tokens alone, without those at padding.

    Args:
        logits: The logits [batch, classes] or [batch, length, classes].
        batch: The inputs.
    """
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() < 3 or "decoder_input_ids" in batch:
        return logits
    return logits[mask.bool()]


def compared(
    engine: str, what: str, reference: Expected, given: Sequence[Tensor], on: str = "batches of other sizes"
) -> dict[str, Any]:
    """Compare an engine's outputs in float32 with PyTorch's.

    Args:
        engine: The name and the version of the engine.
        what: What the outputs are, in words.
        reference: PyTorch's outputs.
        given: The engine's outputs for the same inputs.
        on: What these inputs are, in words.

    Returns:
        What export.json says of the verification.

    Raises:
        VerificationError: The engine's error is above `OF_ROUNDING` times PyTorch's own in float32, plus the spacing of
            float32's numbers at the largest output.
    """
    largest = max(float(outputs.abs().max()) for outputs in reference.exact)
    bound = OF_ROUNDING * reference.rounding + torch.finfo(torch.float32).eps * largest
    difference = _largest(reference.exact, given)
    if not difference <= bound:
        raise VerificationError(
            f"nothing was written: {what} of {engine} differ from PyTorch's by {difference:.2g}, and rounding explains "
            f"{bound:.2g}"
        )
    return {
        "run": True, "engine": engine, "what": what, "on": f"{len(given)} {on}",
        "largest_difference": difference, "bound": bound, "rounding_of_pytorch": reference.rounding, "largest": largest,
    }  # fmt: skip


def _largest(exact: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The largest absolute difference, NaN where there is one. Raises VerificationError where shapes differ."""
    for one, other in zip(exact, outputs, strict=True):
        if one.shape != other.shape:
            raise VerificationError(
                f"nothing was written: the engine gives outputs of the shape {list(other.shape)}, and PyTorch {list(one.shape)}"
            )
    return float(torch.stack([(one - other.double()).abs().max() for one, other in zip(exact, outputs, strict=True)]).max())
