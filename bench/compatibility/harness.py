"""lm-evaluation-harness with `--model hf`, compared with secateur's own evaluation of the same rows."""

from __future__ import annotations

import json
from typing import Any

import secateur
from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome

NAME = "secateur_language"


def harness(folder: Folder) -> Outcome:
    """Evaluate a multiple-choice task from a local JSON file. The text is the input, and the choices are the labels."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [json.loads(line) for line in (folder.path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["target"] for row in rows})
    tasks = folder.path / "tasks"
    tasks.mkdir(exist_ok=True)
    lines = [json.dumps({"text": row["input"], "label": labels.index(row["target"])}, ensure_ascii=False) for row in rows]
    (tasks / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tasks / f"{NAME}.yaml").write_text(_task(tasks / "rows.jsonl", labels), encoding="utf-8")
    model = HFLM(pretrained=str(folder.model), device="cpu", dtype="float32", batch_size=8, trust_remote_code=not folder.stock)
    evaluated: Any = simple_evaluate(
        model=model, tasks=[NAME], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0
    )
    harness_accuracy = evaluated["results"][NAME]["acc,none"]
    secateur_accuracy = _accuracy(folder, labels, rows)
    measured = {"lm_eval": harness_accuracy, "secateur": secateur_accuracy, "examples": len(rows)}
    if folder.family == "t5":
        # The harness adds no end token to the encoder's input and does not score the label's end token. The
        # measure differs, not the model.
        return Outcome(
            "works",
            f"acc {harness_accuracy:.3f}; secateur evaluate, which adds the end marks, {secateur_accuracy:.3f}",
            measured,
        )
    same = abs(harness_accuracy - secateur_accuracy) < 1e-9
    return Outcome(
        "works" if same else "fails", f"acc {harness_accuracy:.3f}, secateur evaluate {secateur_accuracy:.3f}", measured
    )


def _task(data: Any, labels: list[str]) -> str:
    """Return the harness's YAML description of the task."""
    return "\n".join(
        [
            f"task: {NAME}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}",
            "test_split: test", "output_type: multiple_choice", 'doc_to_text: "{{text}}"', "doc_to_target: label",
            f"doc_to_choice: {json.dumps(labels)}", "metric_list: [{metric: acc}]", "",
        ]
    )  # fmt: skip


def _accuracy(folder: Folder, labels: list[str], rows: list[dict[str, Any]]) -> float:
    """Return secateur's accuracy. lm-eval puts a space before a choice, and this tokenizer puts one before any text."""
    tokenizer = folder.tokenizer()
    if folder.family == "t5":
        return secateur.evaluate(secateur.load(folder.model), secateur.TextToText(tokenizer, labels=labels), rows).value
    task = secateur.CausalLM(tokenizer, labels=labels)
    return secateur.evaluate(secateur.load(folder.model), task, rows).value
