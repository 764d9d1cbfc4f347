"""Multitask pruning: the cost of masks in a training step, and the speed and size of the exported encoders."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bench.subjects.minilm import folder
from bench.support.interleaved import compare
from secateur.cli.commands.multitask import load_encoder
from secateur.learned.multitask.encoder_tasks import Classification
from secateur.learned.multitask.exporting import ENCODER, SPARSE, export, save
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.multitask.training import LEARNING_RATES
from secateur.measuring.benchmark import benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.support.environment import environment

TASKS = {"task": Classification(("a", "b", "c", "d"))}
SHAPES = {"builtin-t5": ((32, 64),), "minilm": ((32, 64), (32, 128))}
GOALS = {"masked step / dense step": 1.25, "measured speed-up / speed-up by FLOPs": 0.8}
STEP = (500, 1000)  # The middle of the schedule, where masks are neither open nor final.


def multitask(rounds: int = 15, pairs: int = 20, seconds: float = 20.0) -> dict[str, Any]:
    """Measure real encoders on random ids without padding, with one thread."""
    torch.set_num_threads(1)
    steps: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    elements: list[dict[str, Any]] = []
    for name, shapes in SHAPES.items():
        encoder, tokenizer = load_encoder("builtin" if name == "builtin-t5" else str(folder()))
        for part, rows in (
            (steps, (masked_steps(encoder, shape, rounds) for shape in shapes)),
            (ranks, exported_ranks(encoder, pairs, seconds)),
            (elements, exported_elements(encoder, tokenizer, pairs, seconds)),
        ):
            for row in rows:
                part.append({"model": name, **row})
                print(part[-1], flush=True)
    for row in exported_ranks(bert_base_layers(), pairs, seconds):
        ranks.append({"model": "bert-base-width", **row})
        print(ranks[-1], flush=True)
    about = {"environment": environment(encoder), "load": os.getloadavg(), "rounds": rounds, "pairs": pairs, "goals": GOALS}
    return {**about, "steps": steps, "ranks": ranks, "elements": elements}


def bert_base_layers() -> nn.Module:
    """Return four layers of BERT-base's width.

    BERT-base is the paper's model. Its twelve layers take three times as long, both pruned and dense.
    """
    encoder: nn.Module = BertModel(BertConfig(num_hidden_layers=4)).eval()
    return encoder


def masked_steps(encoder: nn.Module, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Time an optimizer's step with masks, and the choice of the masks within it, relative to the same step without masks.

    The optimizer is the Trainer's fused AdamW. The masks' scores are random, because scores of zero would all be equal.
    """
    batch = labelled(encoder, shape)
    dense = MultitaskModel(copy.deepcopy(encoder), TASKS)
    groups = [{"params": list(dense.parameters()), "lr": LEARNING_RATES["weights"], "weight_decay": 0.01}]
    functions: dict[str, Callable[[], Any]] = {"dense": _step(dense, groups, batch)}
    settings = [("element", method, scope) for method in ("movement", "magnitude") for scope in ("global", "local")]
    for granularity, method, scope in [*settings, ("rank", "movement", "global")]:
        options: Any = {"granularity": granularity, "method": method, "scope": scope}
        pruning = MultitaskPruning(encoder, TASKS, density=0.1, **options)
        for mask in pruning.masks.values():
            if mask.scores is not None:
                nn.init.normal_(mask.scores, std=0.02)
        name = f"{granularity} {method} {scope}"
        functions[name] = _step(pruning, pruning.parameter_groups(LEARNING_RATES, 0.01), batch)
        functions[f"{name}, masks alone"] = _masks(pruning)
    return {"batch": shape[0], "length": shape[1], **compare(functions, rounds=rounds)}


def labelled(encoder: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Return a batch of the task without padding."""
    (synthetic,) = synthetic_batches(encoder, [shape[0]], [shape[1]])
    inputs = {name: synthetic[name] for name in ("input_ids", "attention_mask")}
    return {"task": "task", **inputs, "labels": torch.arange(shape[0]) % TASKS["task"].outputs}


def _step(model: MultitaskModel, groups: list[dict[str, Any]], batch: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs one training step."""
    model.train()
    optimizer = torch.optim.AdamW(groups, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if isinstance(model, MultitaskPruning):
            model.update_masks_(*STEP)

    return step


def _masks(pruning: MultitaskPruning) -> Callable[[], None]:
    """Return a function that chooses the masks."""
    return lambda: pruning.update_masks_(*STEP)


def exported_ranks(encoder: nn.Module, pairs: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Time encoders of low rank in turn with the dense encoder, and compare the speed-up with the one that FLOPs allow.

    The whole encoder is timed, and the linear layers alone, because nothing else becomes smaller.
    """
    pruning = MultitaskPruning(encoder, TASKS, granularity="rank", method="magnitude", scope="local")
    batch = _inputs(encoder)
    for density in (0.1, 0.2, 0.3, 0.5):
        pruning.density = density
        pruning.update_masks_(1, 1)
        exported = export(pruning).encoder
        timing = benchmark(encoder, exported, [batch], pairs=pairs, seconds=seconds).timings[0]
        with torch.inference_mode():
            layer_runs = {
                "pruned": _layers(exported, pruning.linears, batch),
                "dense": _layers(encoder, pruning.linears, batch),
            }
            alone = compare(layer_runs, rounds=pairs)["dense_over_pruned"]
        yield {
            "density": density, "reached": round(pruning.reached, 4), "dense_ms": round(timing.dense_ms, 2),
            "pruned_ms": round(timing.pruned_ms, 2), "speedup": round(timing.speedup, 3),
            "quartiles": [round(timing.speedup_low, 3), round(timing.speedup_high, 3)],
            "by_flops": round(timing.flops_speedup, 3), "of_flops_allowed": round(timing.speedup / timing.flops_speedup, 3),
            "linears": alone, "linears_of_flops_allowed": round(alone["median"] * pruning.reached, 3),
        }  # fmt: skip


def exported_elements(encoder: nn.Module, tokenizer: Any, pairs: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Compare speed and bytes of dense weights that contain zeros with the same weights in compressed sparse rows."""
    batch = _inputs(encoder)
    for density in (0.1, 0.03):
        pruning = MultitaskPruning(encoder, TASKS, method="magnitude", density=density)
        pruning.update_masks_(1, 1)
        exported = export(pruning)
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "model"
            save(exported, target, tokenizer=tokenizer, sparse=True)
            sizes = {
                "dense": (target / ENCODER / "model.safetensors").stat().st_size,
                "sparse": (target / SPARSE).stat().st_size,
            }
        with torch.inference_mode():
            expected = exported.encoder(**batch).last_hidden_state
            functions: dict[str, Callable[[], Any]] = {"dense": _forward(exported.encoder, batch)}
            sparse = export(pruning).encoder
            for path in pruning.linears:
                parent, _, name = path.rpartition(".")
                setattr(sparse.get_submodule(parent), name, LinearCSR(sparse.get_submodule(path)))
            error = (sparse(**batch).last_hidden_state - expected).abs().max().item()
            functions["csr"] = _forward(sparse, batch)
            times = compare(functions, rounds=pairs)
        ratio = times.pop("csr_over_dense")
        low, high = ratio["quartiles"]
        yield {
            "density": density, **times, "speedup": round(1 / ratio["median"], 3),
            "quartiles": [round(1 / high, 3), round(1 / low, 3)], "largest_difference": error, "bytes": sizes,
        }  # fmt: skip


class LinearCSR(nn.Module):
    """A linear layer whose weight [m, n] is stored in compressed sparse rows."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.weight = dense.get_parameter("weight").detach().to_sparse_csr()
        self.bias = getattr(dense, "bias", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs for inputs [..., n]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        products: Tensor = torch.sparse.mm(self.weight, flat.t().contiguous()).t().reshape(*inputs.shape[:-1], -1)
        return products if self.bias is None else products + self.bias


def _inputs(encoder: nn.Module) -> dict[str, Tensor]:
    """Return a batch of 32 x 64 ids without labels."""
    batch = labelled(encoder, (32, 64))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _layers(model: nn.Module, paths: list[str], batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that runs the linear layers, with their inputs from a forward pass."""
    layers = [model.get_submodule(path) for path in paths]
    layer_inputs: dict[nn.Module, tuple[Any, ...]] = {}
    handles = [layer.register_forward_pre_hook(layer_inputs.__setitem__) for layer in layers]
    model(**batch)
    for handle in handles:
        handle.remove()

    def run() -> None:
        for layer in layers:
            layer(*layer_inputs[layer])

    return run


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a function that runs the forward pass."""
    return lambda: model(**batch)
