"""PEFT: LoRA on a pruned model, trained for a few steps and merged."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, differences, run

STEPS = 12


def plain_layers(folder: Folder) -> Outcome:
    """Train LoRA on the layers whose type is exactly nn.Linear, by their names.

    The loss must fall, and the merged model must compute the same outputs as the model with its adapter.
    """
    model: Any = folder.load()
    targets = [path for path, module in model.named_modules() if type(module) is nn.Linear and path != "lm_head"]
    return _tuned(folder, model, targets)


def all_layers(folder: Folder) -> Outcome:
    """Train LoRA with `target_modules="all-linear"`."""
    return _tuned(folder, folder.load(), "all-linear")


def _tuned(folder: Folder, model: Any, targets: Any) -> Outcome:
    """Train LoRA on these layers, merge it, and compare the outputs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    kind = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[folder.family]
    tuned: Any = get_peft_model(model, LoraConfig(task_type=kind, r=8, lora_dropout=0.0, target_modules=targets))
    batch = _batch(folder, model)
    trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    tuned.eval()
    adapted = run(lambda **inputs: tuned(**inputs).logits, folder)
    merged = tuned.merge_and_unload().eval()
    outputs = run(lambda **inputs: merged(**inputs).logits, folder)
    merge_difference = max(float((a - b).abs().max()) for a, b in zip(adapted, outputs, strict=True))
    largest = max(float(a.abs().max()) for a in adapted)
    rounding = differences(model, folder, [logits for _, logits in folder.batches()]).rounding
    note = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {STEPS} steps; merged differs by {merge_difference:.1e}"
    measured = {"losses": losses, "merged": merge_difference, "largest": largest, "rounding": rounding}
    works = losses[-1] < 0.9 * losses[0] and merge_difference < 100 * rounding
    return Outcome("works" if works else "fails", note, measured)


def _batch(folder: Folder, model: Any) -> dict[str, Tensor]:
    """Return 32 built-in examples with their labels, in the form that the family is trained on."""
    rows = [json.loads(line) for line in (folder.path / "rows.jsonl").read_text(encoding="utf-8").splitlines()][:32]
    tokenizer = folder.tokenizer()
    texts, targets = [row["input"] for row in rows], [row["target"] for row in rows]
    if folder.family == "llama":
        texts = [f"{text} {target}" for text, target in zip(texts, targets, strict=True)]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    if folder.family == "bert":
        batch["labels"] = torch.tensor([model.config.label2id[target] for target in targets])
    elif folder.family == "t5":
        encoded = tokenizer(targets, padding=True, return_tensors="pt")
        batch["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    else:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch
