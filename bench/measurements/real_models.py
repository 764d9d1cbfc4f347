"""The whole flow on real weights: a 6-layer BERT, and Gemma 3 270M on news text and on topics that follow a prompt.

python -m bench.measurements.real_models [--subjects gemma-news] [--unit head] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import secateur
from bench.subjects import conll, gemma, minilm
from bench.support.provenance import RESULTS, commit
from secateur.data import builtin
from secateur.flow.choose import alternatives
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.cost import parameters
from secateur.model.sites import AttentionUnit
from secateur.recovery import Method
from secateur.support.environment import environment
from secateur.tasks import Task

Value = TypeVar("Value")
Rows = list[dict[str, str]]
CONTEXT, CONTINUATION = 32, 24  # Tokens of a news text: the given beginning, and the scored continuation.
# The token that continues the prompt for each topic. It is a likely continuation for some text of the topic.
TOPICS = {"products": " product", "medicine": " doctor", "hotels": " hotel", "reviews": " course"}
PROMPTS = ("The capital of France is", "Water boils at a temperature of")
GREATEST_PERPLEXITY = 60.0  # On news. A model whose weights are read wrongly has thousands.
ALONE = """
import sys
sys.modules["secateur"] = None  # Every import of secateur fails.
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto, trust, inputs, output = sys.argv[1:]
torch.set_num_threads(1)
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust == "trust", dtype="auto").eval()
for parameter in model.parameters():  # The rounding of a product depends on where its operands begin in memory.
    parameter.data = parameter.data.clone()
with torch.inference_mode():
    save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, output)
"""


@dataclass(frozen=True)
class Subject:
    """A model with a task.

    Attributes:
        load: Returns the model, the task, the calibration examples and the test examples.
        unit: The unit of attention.
        budgets: Shares of the model's layers' FLOPs.
        recoveries: The recoveries that `choose` tries.
        tried: The number of calibration examples that `choose` uses.
        refitted: The number of examples for a recovery.
        shape: Batch size and length of the timed batches.
        max_tokens: The largest number of tokens in a batch.
    """

    load: Callable[[], tuple[Any, Task, Rows, Rows]]
    unit: AttentionUnit
    budgets: tuple[float, ...]
    recoveries: tuple[Method | None, ...]
    tried: int
    refitted: int
    shape: tuple[int, int]
    max_tokens: int


def bert() -> tuple[Any, Task, Rows, Rows]:
    """Return all-MiniLM-L6-v2, fine-tuned on the topics of reviews."""
    model, tokenizer = minilm.fine_tuned("domain")
    return (
        model,
        secateur.SequenceClassification(tokenizer),
        builtin.examples("domain")[:200],
        builtin.examples("domain.test")[:500],
    )


def gemma_news() -> tuple[Any, Task, Rows, Rows]:
    """Return plain language modelling of Reuters news. The metric is the perplexity of a text's continuation."""
    model, tokenizer = gemma.load()
    calibration, test = (_news(tokenizer, split, count) for split, count in (("train", 100), ("test", 32)))
    return model, secateur.CausalLM(tokenizer), calibration, test


def gemma_topics() -> tuple[Any, Task, Rows, Rows]:
    """Return topic classification of reviews. The label is the word that follows a prompt without examples."""
    model, tokenizer = gemma.load()
    calibration, test = (_prompts(split, count) for split, count in (("domain", 100), ("domain.test", 100)))
    return model, secateur.CausalLM(tokenizer, labels=list(TOPICS.values())), calibration, test


SUBJECTS = {
    "bert-topics": Subject(bert, "head", (0.7, 0.5, 0.33), ("least_squares", "scale", None), 200, 200, (32, 64), 4096),
    "gemma-topics": Subject(gemma_topics, "head", (0.8, 0.5), (None,), 25, 64, (8, 32), 512),
    "gemma-news": Subject(gemma_news, "head", (0.8, 0.5), (None,), 25, 48, (8, 32), 512),
}


def real_models(subjects: Sequence[str] = tuple(SUBJECTS), unit: AttentionUnit | None = None) -> dict[str, Any]:
    """Run the subjects with one thread. `unit` sets the unit of attention of all subjects; by default each has its own."""
    torch.set_num_threads(1)
    return {"subjects": {name: _flow(name, SUBJECTS[name], unit) for name in subjects}}


def _flow(name: str, subject: Subject, unit: AttentionUnit | None) -> dict[str, Any]:
    """Run the whole flow for one subject."""
    unit = unit or subject.unit
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "scores.safetensors"
        # A process of its own, so that its peak memory is that of loading and attribution alone.
        command = [
            sys.executable,
            "-m",
            "bench.measurements.real_models",
            "--attribute",
            str(file),
            "--subjects",
            name,
            "--unit",
            unit,
        ]
        subprocess.run(command, check=True)
        attribution, scores = json.loads(file.with_suffix(".json").read_text()), secateur.Scores.load(file)
        model, task, calibration, test = subject.load()
        reading = _reading(model, task.reader) if name == "gemma-news" else None
        dense, seconds = _timed(lambda: secateur.evaluate(model, task, test, max_tokens=subject.max_tokens))
        row = {
            "unit": unit, "environment": environment(model), "reading": reading, "attribution": attribution,
            "examples": len(calibration), "tested": len(test), "tokens": scores.tokens, "sites": _sites(scores),
            "dense": {
                "evaluation": dense.to_json(), "parameters": parameters(model), "seconds": seconds,
                "layers": sum(site.parameters * site.units for site in scores.all_sites),
                "megabytes": _saved(model, Path(scratch) / "dense"),
            },
            "budgets": [],
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        for flops in subject.budgets:
            target = Path(scratch) / f"pruned-{flops}"
            budget_row = _pruned(subject, model, task, scores, calibration, test, flops, target)
            row["budgets"].append(budget_row)
            print(json.dumps(budget_row), flush=True)
    return row


def _pruned(
    subject: Subject, model: Any, task: Task, scores: secateur.Scores, calibration: Rows, test: Rows,
    flops: float, target: Path,
) -> dict[str, Any]:  # fmt: skip
    """Choose, prune, verify, evaluate, recover, evaluate, save, load and compare."""
    seconds: dict[str, dict[str, float]] = {}

    def step(name: str, function: Callable[[], Value]) -> Value:
        value, seconds[name] = _timed(function)
        return value

    plans = alternatives(scores, flops=flops, align=16)
    tokens, tried_examples = subject.max_tokens, calibration[: subject.tried]
    candidates = step(
        "choose", lambda: secateur.choose(model, task, plans, tried_examples, recoveries=subject.recoveries, max_tokens=tokens)
    )
    best = candidates[0]
    pruned = step("prune", lambda: secateur.prune(model, best.plan))
    few_batches = list(task.batches(task.items(model, calibration[:4]), torch.device("cpu"), 256))[:2]
    verification = step("verify", lambda: secateur.verify(model, pruned, best.plan, task, few_batches))
    plain = step("evaluate", lambda: secateur.evaluate(pruned, task, test, max_tokens=tokens))
    method: Method = best.recovery or "least_squares"
    refit_examples = calibration[: subject.refitted]
    refits = step("recover", lambda: secateur.recover_(model, pruned, task, refit_examples, method=method, max_tokens=tokens))
    recovered = secateur.evaluate(pruned, task, test, max_tokens=tokens)
    megabytes = step("save", lambda: _saved(pruned, target))
    batches = synthetic_batches(model, [subject.shape[0]], [subject.shape[1]])
    (timing,) = step("benchmark", lambda: secateur.benchmark(model, pruned, batches, seconds=5.0)).timings
    return {
        "flops": flops, "candidates": [str(candidate) for candidate in candidates],
        "remaining": best.plan.budget_json()["remaining"],
        "emptied": [site.name for site in best.plan.sites if not len(best.plan[site.name])],
        "verification": verification.to_json(), "plain": plain.to_json(), "recovered": recovered.to_json(),
        "recovery": method, "before": _mean([refit.before for refit in refits]),
        "after": _mean([refit.after for refit in refits]),
        "parameters": parameters(pruned), "megabytes": megabytes, "stock": not hasattr(pruned.config, "secateur"),
        "loaded": _loaded(pruned, task, few_batches[0].inputs["input_ids"][:1, :16], target), "timing": asdict(timing),
        "flops_speedup": timing.flops_speedup, "seconds": seconds,
    }  # fmt: skip


def _loaded(pruned: Any, task: Task, ids: Tensor, target: Path) -> dict[str, Any]:
    """Return whether the folder gives the model's logits, by `secateur.load` and in a process that cannot import secateur."""
    from safetensors.torch import load_file, save_file

    trust = "trust" if hasattr(pruned.config, "secateur") else "stock"
    inputs, output = target.with_suffix(".inputs"), target.with_suffix(".output")
    save_file({"input_ids": ids.contiguous()}, inputs)
    with tempfile.TemporaryDirectory() as home:
        variables = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-c", ALONE, str(target), task.auto_class, trust, str(inputs), str(output)],
            env=variables,
            check=True,
        )
    loaded = secateur.load(target).eval()
    with torch.inference_mode():
        pruned_logits, loaded_logits, stock_logits = pruned(ids).logits, loaded(ids).logits, load_file(output)["logits"]
    return {
        "largest": float(pruned_logits.abs().max()), "load_error": float((pruned_logits - loaded_logits).abs().max()),
        "alone_equals_load": bool(torch.equal(loaded_logits, stock_logits)), "remote_code": trust == "trust",
    }  # fmt: skip


def attribute(name: str, unit: AttentionUnit, file: Path) -> None:
    """Save a subject's scores. Next to them, save the seconds and the peak memory of the attribution."""
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    (model, task, calibration, _), loading = _timed(subject.load)
    loaded = _peak()
    scores, seconds = _timed(
        lambda: secateur.attribute(model, task, calibration, unit=unit, max_tokens=subject.max_tokens, progress=True)
    )
    scores.save(file)
    about = {"seconds": seconds, "load_seconds": loading, "loaded_bytes": loaded, "peak_bytes": _peak()}
    file.with_suffix(".json").write_text(json.dumps(about))


def _reading(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Check that the weights are read correctly, by the perplexity of whole texts and by texts through the tokenizer and back.

    Returns:
        The perplexity, the number of tokens, and the continuations of prompts.

    Raises:
        RuntimeError: The perplexity is too high, or the tokenizer does not return a text.
    """
    texts = _documents("valid", tokenizer, 8)
    loss, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :128]
        with torch.inference_mode():
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        if tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) != text:
            raise RuntimeError(f"the tokenizer does not give back {text[:60]!r}")
    perplexity = math.exp(loss / count)
    if perplexity > GREATEST_PERPLEXITY:
        raise RuntimeError(
            f"expected a perplexity under {GREATEST_PERPLEXITY} on news, got {perplexity:.1f}: are the weights read wrongly?"
        )
    continuations = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        continuations.append(tokenizer.decode(generated[0], skip_special_tokens=True))
    return {"perplexity": perplexity, "pieces": count, "said": continuations}


def _news(tokenizer: Any, split: str, count: int) -> Rows:
    """Return rows with the first tokens of a text as input and the next tokens as target."""
    rows = []
    for text in _documents(split, tokenizer, count):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        parts = ids[:CONTEXT], ids[CONTEXT : CONTEXT + CONTINUATION]
        rows.append(dict(zip(("input", "target"), map(tokenizer.decode, parts), strict=True)))
    return rows


def _documents(split: str, tokenizer: Any, count: int) -> list[str]:
    """Return texts of at least the wanted length from the whole split. The texts are split into words, joined by spaces."""
    parts = conll.files()[split].read_text(encoding="utf-8").split("-DOCSTART-")[1:]
    texts = [" ".join(line.split()[0] for line in part.splitlines()[1:] if line.strip()) for part in parts]
    long_texts = [text for text in texts if len(text.split()) >= CONTEXT + CONTINUATION]
    return long_texts[:: len(long_texts) // count][:count]


def _prompts(name: str, count: int) -> Rows:
    """Return reviews with a prompt as input and the topic's word as target."""
    return [
        {"input": f"Review: {row['input'].partition(': ')[2]}\nThis review is about a", "target": TOPICS[row["target"]]}
        for row in builtin.examples(name)[:count]
    ]


def _sites(scores: secateur.Scores) -> dict[str, Any]:
    """Return, for each unit, the number of sites and the units of a site."""
    return {site.unit: {"sites": sum(s.unit == site.unit for s in scores.sites), "units": site.units} for site in scores.sites}


def _saved(model: nn.Module, target: Path) -> float:
    """Save the folder and return the megabytes of its weights."""
    secateur.save(model, target)
    return sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e6


def _timed(function: Callable[[], Value]) -> tuple[Value, dict[str, float]]:
    """Return the function's value and its seconds: wall-clock time, and CPU time of this process alone."""
    wall, own = time.perf_counter(), time.process_time()
    value = function()
    return value, {"wall": round(time.perf_counter() - wall, 2), "own": round(time.process_time() - own, 2)}


def _peak() -> int:
    """Return the peak memory of this process in bytes. (getrusage would include the memory of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--unit", choices=("head", "channel"))
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "real-models.json",
        help="result file; subjects that do not run keep their results",
    )
    parser.add_argument("--attribute", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attribute:
        attribute(given.subjects[0], given.unit, given.attribute)
        return
    document = {"commit": commit(), **real_models(given.subjects, given.unit)}
    if given.out.exists():
        document["subjects"] = {**json.loads(given.out.read_text())["subjects"], **document["subjects"]}
    given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
