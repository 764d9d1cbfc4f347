"""Time attribution of whole models on this GPU: with Triton, with the reference, and the bare passes.

python -m bench.measurements.gpu_models [--out FILE]
    writes bench/results/<device>-<commit>-models.json; the last line is the same JSON
python -m bench.measurements.gpu_models --tiny
    runs tiny shapes, on the CPU too, and writes nothing; it shows that the module runs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measurements.gpu_kernels import environment, result_path
from bench.subjects import shapes
from bench.subjects.shapes import Case, bare
from bench.support.interleaved import compare
from secateur import GradientActivation, IntegratedGradients
from secateur.attribution.criteria import Criterion, ScoringContext
from secateur.model.discovery import sites
from secateur.model.undisturbed import undisturbed
from secateur_kernels.backend import Backend, uses_triton

NODES = 4
# Bare passes and gradient x activation use the whole batch. Integrated gradients use its first examples.
SHAPES: dict[str, Callable[[], Case]] = {
    "T5-base": lambda: shapes.t5(768, 3072, 12, 12, size=(32, 512)),
    "Llama-1B": lambda: shapes.llama(2048, 8192, 32, 8, 16, size=(32, 512)),
}
TINY: dict[str, Callable[[], Case]] = {
    "T5": lambda: shapes.t5(32, 64, 2, 2, size=(4, 16)),
    "Llama": lambda: shapes.llama(32, 64, 2, 1, 2, size=(4, 16)),
}


def measure(case: Case, few: int, rounds: int) -> dict[str, Any]:
    """Time gradient x activation of all sites relative to the bare forward and backward pass, and time integrated gradients.

    Both criteria run with the reference, and with Triton where it runs.
    """
    backends: list[Backend] = ["reference"]
    if uses_triton("auto", next(case.model.parameters())):
        backends.insert(0, "triton")
    gradient: dict[str, Callable[[], Any]] = {name: scoring(case, GradientActivation(), name) for name in backends}
    with_bare = compare({"bare": finished(lambda: bare(case)), **gradient}, rounds=rounds)
    first = Case(case.model, case.task, case.batch.take(torch.arange(few, device=case.batch.labels.device)))
    integrated: dict[str, Callable[[], Any]] = {
        name: scoring(first, IntegratedGradients(nodes=NODES), name) for name in reversed(backends)
    }
    return {"gradient": with_bare, "integrated": compare(integrated, rounds=max(2, rounds // 3), warmup=1)}


def scoring(case: Case, criterion: Criterion, backend: Backend) -> Callable[[], None]:
    """Return a function that builds the criterion's scorer and scores the case's batch with a backend of the kernels."""
    context = ScoringContext(
        case.model,
        case.task,
        sites(case.model),
        max_tokens=case.batch.inputs["input_ids"].numel(),
        pilot=case.batch,
        examples=len(case.batch.rows),
        backend=backend,
    )

    def run() -> None:
        with undisturbed(case.model):
            criterion.scorer(context).scores(case.batch)

    return finished(run)


def finished(function: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that also waits for the GPU."""

    def run() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def on(case: Case, device: torch.device) -> Case:
    """Return the case in bfloat16 on the device."""
    batch = case.batch.take(torch.arange(len(case.batch.labels)))
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    moved = type(batch)(inputs, batch.labels.to(device), batch.rows, {k: v.to(device) for k, v in batch.extra.items()})
    return Case(case.model.to(device, torch.bfloat16), case.task, moved)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; writes nothing")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.exit(2, "bench/measurements/gpu_models.py: expected a CUDA device, found none (--tiny needs none)\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {} if arguments.tiny else environment()
    for name, build in (TINY if arguments.tiny else SHAPES).items():
        torch.manual_seed(0)
        result[name] = measure(on(build(), device), few=2 if arguments.tiny else 8, rounds=3 if arguments.tiny else 9)
        print(name, result[name], flush=True)
    if not arguments.tiny:
        path = arguments.out or result_path(result, "-models")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
