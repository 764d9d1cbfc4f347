"""The kernels' backend belongs to one call of `attribute`: two calls at the same time run on different backends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor

import secateur
from secateur import GradientActivation, IntegratedGradients
from secateur.attribution.criteria import Criterion
from secateur_kernels.backend import Backend

# All modules that ask which implementation of a kernel runs.
CHOOSERS = [
    "secateur.attribution.attribute",
    "secateur.attribution.fused_ffn",
    *(f"secateur_kernels.{name}.api" for name in ("interpolated_norm", "neuron_attribution", "product_sum")),
    "secateur_kernels.scored_mlp_backward.api",
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, torch.dtype, Backend]]:
    """Triples of the module that asked, the dtype of its tensors, and the backend. The reference runs everywhere."""
    questions: set[tuple[str, torch.dtype, Backend]] = set()
    for name in CHOOSERS:

        def record(backend: Backend, tensor: Tensor, name: str = name) -> bool:
            questions.add((name, tensor.dtype, backend))
            return name.endswith("fused_ffn")  # True here, so that feed-forward branches call their kernel.

        monkeypatch.setattr(import_module(name), "uses_triton", record)
    return questions


@pytest.mark.parametrize(
    ("criterion", "kernels"),
    [
        (GradientActivation(), {"product_sum", "scored_mlp_backward"}),
        (IntegratedGradients(nodes=2), {"interpolated_norm", "neuron_attribution"}),
        (IntegratedGradients(nodes=2, path="joint"), {"product_sum"}),
    ],
    ids=["gradient", "ig", "ig-joint"],
)
def test_two_calls_at_once_use_their_own_backends(criterion: Criterion, kernels: set[str], asked: set[Any]) -> None:
    case = CASES["bert-sequence"]  # Its norms compute in float64 too.
    backends: dict[torch.dtype, Backend] = {torch.float64: "reference", torch.float32: "triton"}
    models = {dtype: case.model(dtype) for dtype in backends}
    both = threading.Barrier(2, timeout=300)

    def in_step(done: int, total: int) -> None:
        if done < total:  # A batch follows.
            both.wait()

    def call(dtype: torch.dtype) -> None:
        options: dict[str, Any] = {"criterion": criterion, "max_tokens": 200, "progress": in_step}
        secateur.attribute(models[dtype], case.task, case.examples, backend=backends[dtype], **options)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, backends))
    assert {(dtype, backend) for _, dtype, backend in asked} == set(backends.items())
    for kernel in kernels:
        assert {dtype for name, dtype, _ in asked if name == f"secateur_kernels.{kernel}.api"} == set(backends)
