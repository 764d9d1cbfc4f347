"""Text-to-text with an encoder-decoder: closed labels ranked by likelihood, or open targets by greedy output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data import Example
from secateur.tasks.base import IGNORED, Batch, Evaluation, Item, Task, in_order, model_device, pad, proportion, texts


class TextToText(Task):
    """labels: the candidate targets; None where targets are open.

    Metric: accuracy of the most likely label (the sum of its pieces' log-probabilities, the end mark included), or exact
    match of the greedy output with the target as the tokenizer writes it back.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        inputs = self._truncate(self._tokenize(texts(examples, "input")))
        if all_labels:
            candidates = self._label_ids()
            return [Item(row, ids, label) for row, ids in enumerate(inputs) for label in candidates]
        encoded = self._tokenize_targets(self._targets(examples))
        return [Item(row, ids, target) for row, (ids, target) in enumerate(zip(inputs, encoded, strict=True))]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        labels = pad([item.target for item in items], IGNORED, device)
        return Batch(self._inputs(items, device), labels, [item.row for item in items])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)  # type: ignore[operator]
        output: Any = model(**batch.inputs, decoder_input_ids=decoder_input_ids, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        wanted = self._targets(examples)
        if self.labels is None:
            encoded = self._tokenize_targets(wanted)
            wanted = self.tokenizer.batch_decode(encoded, skip_special_tokens=True)
            answers = self.generate(model, examples, max_tokens, max(map(len, encoded)) + 1)
        else:
            answers = [self.labels[best] for best in self.ranked(model, examples, max_tokens).argmax(1).tolist()]
        right = sum(answer == target for answer, target in zip(answers, wanted, strict=True))
        return proportion("accuracy" if self.labels else "exact match", right, len(examples))

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        batches = self._input_batches(model, examples, max_tokens)
        scores = [self.label_scores(model, batch) for batch in batches]
        return in_order(scores, [row for batch in batches for row in batch.rows])

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        answers = [""] * len(examples)
        for batch in self._input_batches(model, examples, max_tokens):
            ids = model.generate(**batch.inputs, max_new_tokens=longest, num_beams=1, do_sample=False)  # type: ignore[operator]
            for row, answer in zip(batch.rows, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                answers[row] = answer
        return answers

    def _input_batches(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> list[Batch]:
        """Batches of inputs alone."""
        inputs = self._truncate(self._tokenize(texts(examples, "input")))
        items = [Item(row, ids, []) for row, ids in enumerate(inputs)]
        return list(self.batches(items, model_device(model), max_tokens))

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """log P(label | input) [B, labels]: the encoder runs once, the decoder once for each label."""
        candidates = pad(self._label_ids(), IGNORED, batch.labels.device)
        states: Tensor = model.get_encoder()(**batch.inputs).last_hidden_state  # type: ignore[operator]
        rows, count = states.shape[0], len(candidates)
        expanded = Batch(
            {
                "encoder_outputs": (states.repeat_interleave(count, 0),),  # type: ignore[dict-item]
                "attention_mask": batch.inputs["attention_mask"].repeat_interleave(count, 0),
            },
            candidates.repeat(rows, 1),
            [],
        )
        return self.target(model, expanded, "log_probability").view(rows, count)

    def _label_ids(self) -> list[list[int]]:
        return self._tokenize_targets(self._closed_labels())

    def _tokenize_targets(self, targets: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(text_target=targets)["input_ids"]
        return encoded
