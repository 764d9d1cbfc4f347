"""The outcome of an attempt, and how outputs are compared and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.compatibility.folder import Folder
from bench.support.interleaved import compare

Verdict = Literal["works", "works, but", "fails", "not tried", "not run"]
SLACK = 10.0


@dataclass(frozen=True)
class Outcome:
    """One cell of the table.

    Attributes:
        verdict: The result in one or two words.
        note: One line that explains the verdict.
        measured: Figures for the JSON file.
    """

    verdict: Verdict
    note: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        return asdict(self)


def missing(*packages: str) -> list[str]:
    """Return the distributions that are not installed."""
    return [package for package in packages if installed(package) is None]


def installed(package: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Difference:
    """Largest absolute errors of logits against the same model in float64.

    Attributes:
        error: The error of the compared outputs.
        rounding: The error of the float32 model's own outputs.
        difference: The largest difference between the compared outputs and the saved model's.
        largest: The largest absolute logit.
    """

    error: float
    rounding: float
    difference: float
    largest: float

    @property
    def within_rounding(self) -> bool:
        """Whether the error is at most ten times the eager model's own rounding error.

        Sums in another order round differently, so this counts as the same output.
        """
        return self.error <= SLACK * self.rounding

    def __str__(self) -> str:
        return f"largest logit difference {self.difference:.1e}, logits up to {self.largest:.2g}"


def differences(model: nn.Module, folder: Folder, outputs: Sequence[Tensor]) -> Difference:
    """Compare logits for the folder's batches with the saved model's logits and with the model in float64."""
    exact = copy.deepcopy(model).double()
    error = rounding = difference = largest = 0.0
    for (inputs, saved), output in zip(folder.batches(), outputs, strict=True):
        with torch.inference_mode():
            true = exact(**inputs).logits
        error = max(error, _largest(output - true))
        rounding = max(rounding, _largest(saved - true))
        difference = max(difference, _largest(output - saved))
        largest = max(largest, _largest(true))
    return Difference(error, rounding, difference, largest)


def same_outputs(difference: Difference, note: str = "", **measured: Any) -> Outcome:
    """Return "works" if the outputs equal the eager model's up to rounding, else "fails".

    Wrong outputs are never "works, but".
    """
    measured = {**measured, **asdict(difference)}
    notes = "; ".join(part for part in (str(difference), note) if part)
    return Outcome("works" if difference.within_rounding else "fails", notes, measured)


def timed(eager: Callable[[], Any], other: Callable[[], Any], rounds: int = 15) -> dict[str, Any]:
    """Time both functions in turn, in process time of one thread.

    Return their milliseconds and the other's time over eager's.
    """
    import time

    return compare({"eager": eager, "other": other}, rounds=rounds, clock=time.process_time)


def ratio(times: dict[str, Any]) -> str:
    """Return the measured ratio in words."""
    return f"{times['other_over_eager']['median']:.2f} of eager's time"


def relative(output: Tensor, expected: Tensor) -> float:
    """Return the relative difference of the output in the Frobenius norm."""
    return float((output - expected).norm() / expected.norm())


class Logits(nn.Module):
    """A model that returns only its logits, without a cache. Exporters accept this form."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        """Return the logits."""
        decoder = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **decoder).logits
        return logits


class BodyLogits(nn.Module):
    """`Logits` for a model whose forward pass takes no `use_cache`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def logits_of(model: nn.Module, folder: Folder) -> nn.Module:
    """Return the model as a module with tensors as input and logits as output."""
    return (BodyLogits(model) if folder.family == "bert" else Logits(model)).eval()


def dynamic_shapes(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Return export shapes with a free batch size and length."""
    from torch.export import Dim

    return {name: dict.fromkeys(range(tensor.dim()), Dim.DYNAMIC) for name, tensor in inputs.items()}


def run(module: Callable[..., Tensor], folder: Folder) -> list[Tensor]:
    """Return the module's outputs for the folder's batches."""
    with torch.inference_mode():
        return [module(**inputs) for inputs, _ in folder.batches()]


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value."""
    return float(tensor.abs().max())
