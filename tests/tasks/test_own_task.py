"""A user-defined subclass of Task goes through every stage: no stage asks for the class of a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cases import CASES, CLASSES, sentences
from torch import Tensor, nn

import secateur
from secateur.learned.layers.layer_gates import LayerGates
from secateur.learned.layers.layer_training import task_features
from secateur.tasks import Batch, Evaluation, Item
from secateur.tasks.batches import pad

CASE = CASES["bert-sequence"]
EXAMPLES = [{"text": text, "mood": CLASSES[k % len(CLASSES)]} for k, text in enumerate(sentences(9, seed=5))]


class Mood(secateur.Task):
    """Classify texts in columns of its own. The task names no class of transformers and loads its inputs itself."""

    columns: ClassVar[tuple[str, ...]] = ("text", "mood")

    def items(self, model: nn.Module, examples: Sequence[Any], *, all_labels: bool = False) -> list[Item]:
        ids = self.reader([example["text"] for example in examples])["input_ids"]
        if all_labels:
            return [Item(row, of_row, [k]) for row, of_row in enumerate(ids) for k in range(len(CLASSES))]
        return [Item(row, of_row, [CLASSES.index(examples[row]["mood"])]) for row, of_row in enumerate(ids)]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        ids = pad([item.input_ids for item in items], 0, device)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return Batch(inputs, torch.tensor([item.target for item in items]), [item.row for item in items])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.inputs).logits
        return logits.unsqueeze(1)

    def evaluate(self, model: nn.Module, examples: Sequence[Any], max_tokens: int) -> Evaluation:
        batch = self.collate(self.items(model, examples), torch.device("cpu"))
        right = float((self.logits(model, batch).argmax(-1) == batch.labels).float().mean())
        return Evaluation("mood", right, 0.0, 1.0, len(examples))

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        batch = super().training_batch(items)
        return {**batch, "labels": batch["labels"].flatten()}


@pytest.fixture
def task() -> Mood:
    return Mood(CASE.task.reader, labels=CLASSES)


def test_a_user_defined_task_is_scored_pruned_verified_recovered_and_evaluated(task: Mood, tmp_path: Path) -> None:
    model = CASE.model()
    scores = secateur.attribute(model, task, EXAMPLES)
    plan = secateur.plan(scores, keep=0.5)
    pruned = secateur.prune(model, plan)
    batches = task.batches(task.items(model, EXAMPLES), torch.device("cpu"), 64)
    assert secateur.verify(model, pruned, plan, task, batches).holds
    assert any(refit.after < refit.before for refit in secateur.recover_(model, pruned, task, EXAMPLES))
    assert secateur.evaluate(pruned, task, EXAMPLES).metric == "mood"
    secateur.save(pruned, tmp_path / "out", tokenizer=task.reader)
    assert secateur.evaluate(secateur.load(tmp_path / "out"), task, EXAMPLES) == secateur.evaluate(pruned, task, EXAMPLES)


def test_its_scores_equal_those_of_secateurs_own_task(task: Mood) -> None:
    own = secateur.attribute(CASE.model(), task, EXAMPLES)
    rows = [{"input": example["text"], "target": example["mood"]} for example in EXAMPLES]
    stock = secateur.attribute(CASE.model(), CASE.task, rows)
    for name in own:
        assert torch.allclose(own[name], stock[name], rtol=1e-5), name


def test_its_features_give_a_finite_loss(task: Mood) -> None:
    with LayerGates(CASE.model(), keep_layers=1) as gates:
        items, collate = task_features(task, gates, EXAMPLES)
        assert torch.isfinite(gates.model(**collate(items)).loss)


def test_it_needs_two_different_targets(task: Mood) -> None:
    alike = [{**example, "mood": CLASSES[0]} for example in EXAMPLES]
    with pytest.raises(secateur.InputError, match=rf"^examples: expected at least two different targets, got '{CLASSES[0]}'"):
        secateur.attribute(CASE.model(), task, alike)


def test_its_texts_cannot_be_scored_in_bulk(task: Mood) -> None:
    with pytest.raises(secateur.InputError, match=r"^task: expected one that scores a corpus, got Mood$"):
        next(secateur.corpus.score(CASE.model(), task, ["a text"]))
