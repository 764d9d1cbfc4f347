"""Decoder language models: labels that follow a prompt, or plain language modelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data import Example
from secateur.errors import InputError
from secateur.tasks.base import (
    IGNORED,
    Batch,
    Evaluation,
    Item,
    Target,
    Task,
    bootstrap,
    buckets,
    model_device,
    proportion,
    texts,
)


class CausalLM(Task):
    """labels: the candidate continuations of the input; None for any continuation.

    The target's pieces follow the input's (write the space between them where the model wants one). Metric: accuracy of the
    most likely label, or perplexity of the targets.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        inputs = self._tokenize(texts(examples, "input"))
        if all_labels:
            candidates = self._label_ids()
            return [self._item(row, ids, label) for row, ids in enumerate(inputs) for label in candidates]
        encoded = self._tokenize(self._targets(examples), add_special_tokens=False)
        return [self._item(row, *pair) for row, pair in enumerate(zip(inputs, encoded, strict=True))]

    def _item(self, row: int, prompt: list[int], target: list[int]) -> Item:
        if not target:
            raise InputError(f"examples, row {row + 1}: expected a target of at least one piece, got none")
        # A prompt must have a token: without one the target's first piece has nothing to be predicted from.
        prompt = prompt or [self._start()]
        if self.max_length is not None:
            room = self.max_length - len(target)
            if room < 1:
                raise InputError(
                    f"examples, row {row + 1}: expected a target under {self.max_length} pieces, got {len(target)}"
                )
            prompt = prompt[-room:]
        return Item(row, [*prompt, *target], target)

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        # Logits are wanted at these positions alone: the vocabulary is the widest matrix of a small decoder.
        wanted = [range(len(i.input_ids) - len(i.target) - 1, len(i.input_ids) - 1) for i in items]
        positions = sorted({position for span in wanted for position in span})
        column = {position: k for k, position in enumerate(positions)}
        labels = torch.full((len(items), len(positions)), IGNORED, dtype=torch.int64)
        for row, (span, item) in enumerate(zip(wanted, items, strict=True)):
            labels[row, [column[position] for position in span]] = torch.tensor(item.target)
        rows = [item.row for item in items]
        return Batch(
            self._inputs(items, device), labels.to(device), rows, {"positions": torch.tensor(positions, device=device)}
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Any = model(**batch.inputs, use_cache=False, logits_to_keep=batch.extra["positions"])
        logits: Tensor = output.logits
        return logits

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        if self.labels is not None:
            targets = self._targets(examples)
            best = self.ranked(model, examples, max_tokens).argmax(1).tolist()
            right = sum(self.labels[label] == target for label, target in zip(best, targets, strict=True))
            return proportion("accuracy", right, len(examples))
        loss, pieces = [0.0] * len(examples), [0] * len(examples)
        for batch in self.batches(self.items(model, examples), model_device(model), max_tokens):
            value: Target = "log_probability"
            counts = (batch.labels != IGNORED).sum(1)
            for row, score, count in zip(batch.rows, self.target(model, batch, value), counts, strict=True):
                loss[row], pieces[row] = -float(score), int(count)
        return bootstrap(
            "perplexity", len(examples), lambda rows: math.exp(sum(loss[r] for r in rows) / sum(pieces[r] for r in rows))
        )

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        # items() orders by example, then label: number them so, to put the scores back.
        items = [Item(k, i.input_ids, i.target) for k, i in enumerate(self.items(model, examples, all_labels=True))]
        scores = torch.empty(len(items))
        for batch in self.batches(items, model_device(model), max_tokens):
            scores[batch.rows] = self.target(model, batch, "log_probability").float().cpu()
        return scores.view(len(examples), -1)

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        prompts = [ids or [self._start()] for ids in self._tokenize(texts(examples, "input"))]
        items = [Item(row, ids if self.max_length is None else ids[-self.max_length :], []) for row, ids in enumerate(prompts)]
        answers = [""] * len(items)
        for bucket in buckets(items, max_tokens):
            # Padded on the left: what is generated follows the prompt's last piece.
            turned = [replace(item, input_ids=item.input_ids[::-1]) for item in bucket]
            inputs = {name: ids.flip(1) for name, ids in self._inputs(turned, model_device(model)).items()}
            ids = model.generate(**inputs, max_new_tokens=longest, num_beams=1, do_sample=False)  # type: ignore[operator]
            outputs = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for item, answer in zip(bucket, outputs, strict=True):
                answers[item.row] = answer
        return answers

    def _label_ids(self) -> list[list[int]]:
        return self._tokenize(self._closed_labels(), add_special_tokens=False)

    def _start(self) -> int:
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.tokenizer.eos_token_id)
