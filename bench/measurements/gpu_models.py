"""The whole models of the GPU report: attribution over bare passes, and the latency of pruned models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import secateur
from bench.measurements.gpu_kernels import BACKEND, DEVICE
from bench.subjects import shapes
from bench.subjects.shapes import Case, bare_passes
from bench.support.interleaved import compare
from secateur import GradientActivation, IntegratedGradients
from secateur.attribution.criteria import Criterion, ScoringContext
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint, sites
from secateur.model.undisturbed import undisturbed
from secateur.planning.plan import Plan
from secateur_kernels.backend import Backend

NODES = 8
Builder = Callable[[], Case]
MODELS: dict[str, Builder] = {
    "T5-base": lambda: shapes.t5(768, 3072, 12, 12, size=(32, 512)),
    "BERT-base": lambda: shapes.bert(768, 3072, 12, 12, size=(32, 512)),
    "Llama-1B": lambda: shapes.llama(2048, 8192, 32, 8, 16, size=(32, 512)),
}
REHEARSED: dict[str, Builder] = {
    "tiny T5": lambda: shapes.t5(32, 64, 2, 2, size=(2, 8)),
    "tiny BERT": lambda: shapes.bert(32, 64, 2, 2, size=(2, 8)),
    "tiny Llama": lambda: shapes.llama(32, 64, 2, 2, 2, size=(2, 8)),
}


def attribution(case: Case, rounds: int) -> dict[str, Any]:
    """Time gradient x activation of all sites relative to the bare forward and backward pass.

    A scorer is built once and scores many batches. So building it is no part of a pass.
    """
    backends: tuple[Backend, ...] = tuple(dict.fromkeys((BACKEND, "reference")))
    passes = {"bare": _finished(lambda: bare_passes(case))}
    passes |= {name: scoring(case, GradientActivation(), name) for name in backends}
    with undisturbed(case.model):
        return {"tokens": case.batch.inputs["input_ids"].numel(), **compare(passes, rounds=rounds)}


def integrated(case: Case, rounds: int) -> dict[str, Any]:
    """Time integrated gradients of the joint path relative to gradient x activation."""
    passes = {
        "gradient": scoring(case, GradientActivation(), BACKEND),
        "joint": scoring(case, IntegratedGradients(path="joint", nodes=NODES), BACKEND),
    }
    with undisturbed(case.model):
        return {"nodes": NODES, **compare(passes, rounds=rounds, warmup=1)}


def scoring(case: Case, criterion: Criterion, backend: Backend) -> Callable[[], None]:
    """Return a function that scores the case's batch with a backend of the kernels, and waits for the device."""
    tokens = case.batch.inputs["input_ids"].numel()
    count = len(case.batch.rows)
    context = ScoringContext(case.model, case.task, sites(case.model), tokens, case.batch, count, backend=backend)
    with undisturbed(case.model):
        scorer = criterion.scorer(context)
    return _finished(lambda: scorer.scores(case.batch))


def halved(model: nn.Module) -> nn.Module:
    """Return the model with every second unit of each site: half of the layers' FLOPs, and widths that divide by 64 or more.

    The choice of the units does not change the speed.
    """
    all_sites = tuple(sites(model))
    kept = {site.name: torch.arange(0, site.units, 2) for site in all_sites}
    return secateur.prune(model, Plan(kept, all_sites, fingerprint(model), secateur.Budget("keep", 0.5)))


def latency(dense: nn.Module, pruned: nn.Module, batch: int, length: int, pairs: int) -> dict[str, Any]:
    """Time forward passes of the dense and the pruned model, in turn."""
    (inputs,) = synthetic_batches(dense, [batch], [length])
    (timing,) = secateur.benchmark(dense, pruned, [inputs], pairs=pairs, seconds=3.0).timings
    return {
        "batch": batch,
        "length": length,
        **asdict(timing),
        "speedup": timing.speedup,
        "flops_speedup": timing.flops_speedup,
        "of_flops_allowed": timing.speedup / timing.flops_speedup,
    }


def compiled_latency(
    dense: nn.Module, pruned: nn.Module, batch: int, length: int, rounds: int, **options: Any
) -> dict[str, Any]:
    """Time forward passes of both models by torch.compile, in turn.

    Args:
        dense: The dense model.
        pruned: The pruned model.
        batch: The number of texts.
        length: The tokens of a text.
        rounds: How often each model is timed.
        options: Further options of torch.compile.
    """
    (inputs,) = synthetic_batches(dense, [batch], [length])
    passes = {}
    for name, model in (("pruned", pruned), ("dense", dense)):
        compiled = torch.compile(model, dynamic=False, **options)
        passes[name] = _finished(lambda compiled=compiled: compiled(**inputs))  # type: ignore[misc]
    with undisturbed(dense), undisturbed(pruned), torch.inference_mode():
        row = {"batch": batch, "length": length, **compare(passes, rounds=rounds)}
    torch.compiler.reset()
    return row


def on_device(case: Case) -> Case:
    """Return the case in bfloat16 on the device."""
    batch, device = case.batch, torch.device(DEVICE)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    extra = {name: tensor.to(device) for name, tensor in batch.extra.items()}
    return Case(
        case.model.to(device, torch.bfloat16), case.task, type(batch)(inputs, batch.labels.to(device), batch.rows, extra)
    )


def _finished(function: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that also waits for the device."""

    def run() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
