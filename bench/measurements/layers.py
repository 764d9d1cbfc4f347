"""Deleting layers: by scores without training, by gates on frozen weights or in fine-tuning, with and without LayerDrop."""

from __future__ import annotations

import copy
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench.subjects import conll, minilm
from bench.subjects.shapes import cases
from bench.support import packages
from bench.support.interleaved import compare
from secateur.attribution.layer_scores import choose_layers
from secateur.data import builtin
from secateur.data.conll import SpanFile
from secateur.learned.layers.layer_gates import LayerGates
from secateur.learned.layers.layer_training import GatedAdamW, task_features, train
from secateur.measuring.benchmark import benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.model import blocks
from secateur.model.cost import parameters
from secateur.support.environment import environment
from secateur.support.trainer import trainer_arguments

SCORES = ("influence", "gradient", "ig")
STEPS, SIZE = 100, 32
STRENGTH, GATE_RATE, DROP = 5.0, 0.05, 0.2
WITH_GATES: dict[str, dict[str, Any]] = {
    "gates, frozen": {"frozen": True},
    "gates, fine-tuned": {},
    "gates, fine-tuned with LayerDrop": {"drop": DROP},
}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A model for one task, with the examples and settings that choose and train its layers."""

    name: str
    title: str
    model: nn.Module
    task: secateur.Task
    train: Rows
    test: Rows
    keeps: tuple[int, ...]
    learning_rate: float


def layers() -> dict[str, Any]:
    """Measure all studies with one thread. The first use takes an hour; later uses read the trained models from the cache."""
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "load": os.getloadavg(),
        "settings": {"steps": STEPS, "batch": SIZE, "strength": STRENGTH, "gates": GATE_RATE, "drop": DROP},
        "studies": {},
        "rows": [],
        "speeds": [],
    }
    for build in (lambda: _text("question", 5), _entities):
        study = build()  # type: ignore[no-untyped-call]
        rows, speeds = _study(study)
        document["studies"][study.name] = study.title
        document["rows"] += rows
        document["speeds"] += speeds
    return {"environment": environment(study.model), **document, "steps": steps()}


def steps(rounds: int = 7, names: Sequence[str] = ("builtin-t5", "minilm-shape")) -> Rows:
    """Time a training step with gates relative to the same step without gates, in CPU time, on batches of 32 x 64 tokens.

    On a frozen model, both steps run the backward pass to the embeddings.
    """
    rows = []
    for name in names:
        for frozen in (True, False):
            case = cases()[name]()
            model: Any = case.model.train().requires_grad_(not frozen)
            if frozen:
                tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
                for table in tables:
                    if table.num_embeddings == model.config.vocab_size:
                        table.register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))
            labels = case.batch.labels if model.config.is_encoder_decoder else case.batch.labels.squeeze(1)
            gates = LayerGates(model, keep_layers=2, frozen=frozen)
            with_gates, without = _steps(gates, {**case.batch.inputs, "labels": labels})
            times = compare({"plain": without, "gated": with_gates}, rounds=rounds, clock=time.process_time)
            rows.append({"model": name, "frozen": frozen, **times})
            print(rows[-1], flush=True)
    return rows


def _steps(gates: LayerGates, batch: dict[str, Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the training step with gates and the training step without gates."""
    optimizer = GatedAdamW(gates.parameter_groups({"gates": 1e-3, "weights": 1e-5}, 0.0))

    def gated() -> None:
        optimizer.zero_grad()
        gates(**batch)["loss"].backward()
        optimizer.step()
        gates.project_()
        gates.at_step_(1, 2)

    def plain() -> None:
        with gates.off():
            optimizer.zero_grad()
            gates.model(**batch)["loss"].backward()
            optimizer.step()

    return gated, plain


def _study(study: Study) -> tuple[Rows, Rows]:
    """Return the metric of each way at each number of layers, and the speed-up of a model with that many layers."""
    rows, speeds = [], []
    (batch,) = synthetic_batches(study.model, [32], [64])
    for keep, method, pruned, about in _models(study):
        left = [name for name in blocks.layers(study.model) if name not in about.get("deleted", ())]
        row = {"study": study.name, "keep": keep, "method": method, "left": left, "parameters": parameters(pruned), **about}
        rows.append({**row, **secateur.evaluate(pruned, study.task, study.test).to_json()})
        print(rows[-1], flush=True)
        if method == SCORES[0]:
            (timing,) = benchmark(study.model, pruned, [batch]).timings
            speed = {
                "speedup": timing.speedup, "low": timing.speedup_low,
                "high": timing.speedup_high, "flops": timing.flops_speedup,
            }  # fmt: skip
            speeds.append({"study": study.name, "keep": keep, **{name: round(value, 3) for name, value in speed.items()}})
            print(speeds[-1], flush=True)
    return rows, speeds


def _models(study: Study) -> Iterator[tuple[int, str, nn.Module, dict[str, Any]]]:
    """Yield the number of layers, the way, the model, and further facts for its row."""
    all_layers = len(blocks.layers(study.model))
    yield all_layers, "dense", study.model, {}
    yield all_layers, "dense, fine-tuned", *_tuned(study, "dense", study.model, strength=0.0)
    dropped, about = _tuned(study, "dropped", study.model, strength=0.0, drop=DROP)
    yield all_layers, "dense, fine-tuned with LayerDrop", dropped, about
    for keep in study.keeps:
        for score in SCORES:
            pruned, about = _scored(study, study.model, score, keep)
            yield keep, score, pruned, about
            if score == SCORES[0]:
                tuned, tuning_facts = _tuned(study, f"{score}-{keep}", pruned, strength=0.0)
                yield keep, f"{score}, then fine-tuned", tuned, {**about, **tuning_facts}
        yield keep, f"fine-tuned with LayerDrop, then {SCORES[0]}", *_scored(study, dropped, SCORES[0], keep)
        for name, options in WITH_GATES.items():
            yield keep, name, *_tuned(study, f"{name}-{keep}", study.model, keep=keep, **options)


def _scored(study: Study, model: nn.Module, score: str, keep: int) -> tuple[nn.Module, dict[str, Any]]:
    """Delete the layers with the lowest scores."""
    start = time.perf_counter()
    deleted = choose_layers(secateur.layer_scores(model, study.task, study.train[:200], score), keep)
    return secateur.delete_layers(model, deleted), {"deleted": deleted, "seconds": round(time.perf_counter() - start, 1)}


def _tuned(
    study: Study,
    name: str,
    model: nn.Module,
    *,
    keep: int | None = None,
    strength: float = STRENGTH,
    steps: int = STEPS,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a fine-tuned model. It comes from the cache after the first use.

    All models use one training loop, which has gates. With strength 0 the gates stay open.
    """
    gate_rate = GATE_RATE if strength else 0.0
    words = [study.name, *name.replace(",", "").split(), strength, gate_rate, steps, SIZE, study.learning_rate]
    target = packages.cache() / "-".join(map(str, ["layers", *words]))
    if not target.exists():
        start = time.perf_counter()
        torch.manual_seed(0)
        with LayerGates(
            copy.deepcopy(model), keep_layers=keep or len(blocks.layers(model)), strength=strength, **options
        ) as gates:
            _train(study, gates, steps, gate_rate)
            opened = len(gates.left)
            gates.close_smallest_()
            about: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
            if strength:
                deleted = [layer for layer in gates.names if layer not in gates.left]
                about |= {"deleted": deleted, "open": opened, "gates": gates.values}
            secateur.save(gates.export(), target, extra={"about.json": json.dumps(about)})
    return secateur.load(target).eval(), json.loads((target / "about.json").read_text())


def _train(study: Study, gates: LayerGates, steps: int, gate_rate: float) -> None:
    """Train the study's model through its gates, and print the log."""
    items, collate = task_features(study.task, gates, study.train)
    # A batch holds examples of similar length. The Trainer takes the batches as its examples.
    items.sort(key=lambda item: item.length)
    batches = [items[first : first + SIZE] for first in range(0, len(items), SIZE)]
    given = {
        "max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": study.learning_rate,
        "warmup_steps": steps // 10, "save_strategy": "no", "logging_steps": steps // 20,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer_arguments(Path(scratch), "cpu", given)
        log = train(gates, batches, arguments, collate=lambda rows: collate(rows[0]), learning_rates={"gates": gate_rate})
    for row in log:
        print({name: value if isinstance(value, int) else round(value, 3) for name, value in row.items()}, flush=True)


def _entities(sentences: int = 4000, steps: int = 375) -> Study:
    """Return all-MiniLM-L6-v2 as a tagger of CoNLL-2003's entities.

    The study has every third sentence. The first `sentences` of them are for training.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    rows = {
        split: [
            {"tokens": sentence.tokens, "tags": sentence.tags}
            for sentence in SpanFile(file, conll.COLUMNS["ner"], target="bio2")
        ][::3]
        for split, file in conll.files().items()
    }
    names = sorted({tag for row in rows["train"] for tag in row["tags"]})
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder())
    tokenizer.model_max_length = 128
    torch.manual_seed(0)
    start = AutoModelForTokenClassification.from_pretrained(
        minilm.folder(), num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    ).eval()
    title = f"all-MiniLM-L6-v2 (uncased), a tagger of CoNLL-2003's entities, {steps} steps on {sentences:,} sentences"
    task = secateur.TokenClassification(tokenizer)
    study = Study("entities", title, start, task, rows["train"][:sentences], rows["valid"][:700], (3, 2), 2e-4)
    whole, _ = _tuned(study, "whole", start, strength=0.0, steps=steps)
    return replace(study, model=whole, learning_rate=1e-4)


def _text(name: str, keep: int) -> Study:
    """Return the built-in T5 on one of its tasks."""
    model, tokenizer = builtin.load()
    file = minilm.DATA / f"{name}.train.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()][:4000]
    targets = sorted({row["target"] for row in rows})
    task = secateur.TextToText(tokenizer, labels=targets if len(targets) <= 32 else None)
    test = builtin.examples(f"{name}.test")[:400]
    return Study(name, f"The built-in T5 on its task *{name}*", model, task, rows, test, (keep,), 1e-3)


if __name__ == "__main__":
    layers()
