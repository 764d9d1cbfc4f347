"""Decoder language models: labels that follow a prompt, or plain language modelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.base import Target, Task, texts
from secateur.tasks.batches import IGNORED, Batch, Item, model_device
from secateur.tasks.label_tree import LabelTree
from secateur.tasks.metrics import Evaluation, bootstrap, proportion

if TYPE_CHECKING:
    from transformers import DynamicCache


class CausalLM(Task):
    """labels: the candidate continuations of the input; None for any continuation.

    The target's pieces follow the input's (write the space between them where the model wants one). Metric: accuracy of the
    most likely label, or perplexity of the targets.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        inputs = self.encode(texts(examples, "input"))
        if all_labels:
            candidates = self._label_ids()
            return [self._item(row, ids, label) for row, ids in enumerate(inputs) for label in candidates]
        encoded = self._tokenize(self._targets(examples), add_special_tokens=False)
        return [self._item(row, *pair) for row, pair in enumerate(zip(inputs, encoded, strict=True))]

    def _item(self, row: int, prompt: list[int], target: list[int]) -> Item:
        if not target:
            raise InputError(f"examples, row {row + 1}: expected a target of at least one piece, got none")
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

    def encode(self, inputs: list[str]) -> list[list[int]]:
        # A prompt must have a token: without one nothing predicts the target's first piece.
        return [ids or [self._start()] for ids in self._tokenize(inputs)]

    @property
    def room(self) -> int | None:
        if self.max_length is None or self.labels is None:
            return self.max_length
        longest = self._tree.longest  # Encoded once: this is asked for each document.
        if longest >= self.max_length:
            raise InputError(f"labels: expected labels under {self.max_length} pieces, got one of {longest}")
        return self.max_length - longest

    def cut(self, ids: list[int]) -> list[int]:
        """The prompt's end, which the labels follow."""
        return ids if self.room is None else ids[-self.room :]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Padded on the left: what follows the prompts begins in one column."""
        turned = super().collate_inputs([replace(item, input_ids=item.input_ids[::-1]) for item in items], device, length)
        return replace(turned, inputs={name: ids.flip(1) for name, ids in turned.inputs.items()})

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """log P(label | prompt) [B, labels]: the prompts run once, then the tree of all labels on their cached states."""
        from transformers import DynamicCache

        tree, mask = self._tree, batch.inputs["attention_mask"]
        cache = DynamicCache() if len(tree) > 1 else None
        places = (mask.cumsum(1) - 1).clamp(min=0)
        output: Any = model(
            **batch.inputs, position_ids=places, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        )
        logits: Tensor = output.logits
        if cache is not None:
            nodes = self._after(model, mask, places[:, -1:], cache, logits.dtype)
            logits = torch.cat([logits, nodes], 1)
        return tree.log_probabilities(logits)

    def _after(self, model: nn.Module, mask: Tensor, last: Tensor, cache: DynamicCache, dtype: torch.dtype) -> Tensor:
        """The logits [B, nodes - 1, vocabulary] of the tree's nodes but for the root, on the cached states of prompts whose
        last positions are `last` [B, 1]."""
        tree, rows = self._tree, len(mask)
        places = last + tree.depths[1:].to(mask.device)
        among = tree.sees[1:, 1:].to(mask.device)
        sees = torch.cat([mask.bool()[:, None].expand(-1, len(among), -1), among.expand(rows, -1, -1)], 2)
        config = cast(Any, model.config)
        masks, window = {"full_attention": sees}, getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if window is not None and (kinds is None or "sliding_attention" in kinds):
            seen_at = torch.cat([mask.cumsum(1) - 1, places], 1)
            # Without kinds all layers slide (Mistral).
            kind = "full_attention" if kinds is None else "sliding_attention"
            masks[kind] = sees & (places[:, :, None] - seen_at[:, None, :] < window)
        added = {
            kind: torch.zeros_like(each, dtype=dtype).masked_fill(~each, torch.finfo(dtype).min)[:, None]
            for kind, each in masks.items()
        }
        output: Any = model(
            input_ids=tree.pieces(0)[1:].to(mask.device).expand(rows, -1),
            attention_mask=added if len(added) > 1 else added["full_attention"],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        answers = [""] * len(examples)
        for batch in self._input_batches(examples, model_device(model), max_tokens):
            ids = model.generate(**batch.inputs, max_new_tokens=longest, num_beams=1, do_sample=False)  # type: ignore[operator]
            outputs = self.tokenizer.batch_decode(ids[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, answer in zip(batch.rows, outputs, strict=True):
                answers[row] = answer
        return answers

    @cached_property
    def _tree(self) -> LabelTree:
        return LabelTree(self._label_ids())

    def _label_ids(self) -> list[list[int]]:
        return self._tokenize(self._closed_labels(), add_special_tokens=False)

    def _start(self) -> int:
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.tokenizer.eos_token_id)
