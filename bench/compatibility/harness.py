"""lm-evaluation-harness with `--model hf`, beside secateur's own evaluation of the same rows."""

from __future__ import annotations

import json
from typing import Any

import secateur
from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome

NAME = "secateur_language"


def harness(folder: Folder) -> Outcome:
    """A multiple-choice task out of a local JSON file: the input, then each label."""
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
    found: Any = simple_evaluate(
        model=model, tasks=[NAME], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0
    )
    theirs = found["results"][NAME]["acc,none"]
    ours = _accuracy(folder, labels, rows)
    measured = {"lm_eval": theirs, "secateur": ours, "examples": len(rows)}
    if folder.family == "t5":
        # It gives the encoder no end mark, and doesn't score the label's: another measure, not another model.
        return Outcome("works", f"acc {theirs:.3f}; secateur evaluate, which adds the end marks, {ours:.3f}", measured)
    same = abs(theirs - ours) < 1e-9
    return Outcome("works" if same else "fails", f"acc {theirs:.3f}, secateur evaluate {ours:.3f}", measured)


def _task(data: Any, labels: list[str]) -> str:
    return "\n".join(
        [
            f"task: {NAME}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}",
            "test_split: test", "output_type: multiple_choice", 'doc_to_text: "{{text}}"', "doc_to_target: label",
            f"doc_to_choice: {json.dumps(labels)}", "metric_list: [{metric: acc}]", "",
        ]
    )  # fmt: skip


def _accuracy(folder: Folder, labels: list[str], rows: list[dict[str, Any]]) -> float:
    """The accuracy that secateur finds. lm-eval puts a space before a choice, as this tokenizer does before any text."""
    tokenizer = folder.tokenizer()
    if folder.family == "t5":
        return secateur.evaluate(secateur.load(folder.model), secateur.TextToText(tokenizer, labels=labels), rows).value
    task = secateur.CausalLM(tokenizer, labels=labels)
    return secateur.evaluate(secateur.load(folder.model), task, rows).value
