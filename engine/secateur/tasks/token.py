"""Token classification: one tag for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.batches import IGNORED, Batch, Item, model_device, pad
from secateur.tasks.classification import class_names, class_number
from secateur.tasks.metrics import Evaluation, bootstrap, proportion
from secateur.tasks.text import TextTask


class TokenClassification(TextTask):
    """One tag for each word.

    An example has `tokens` (words) and `tags` (names or numbers). A word is tagged at its first piece. The metric is the F1 of
    entities as seqeval defines it (extra `tagging`) where the tags are BIO or BIOES, otherwise the accuracy of words.

    Args:
        tokenizer: The model's tokenizer.
        labels: The tags: the model's own (config.id2label, the default) in any order, or others in the order of its outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit.
    """

    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    name: ClassVar[str] = "token-classification"
    architecture: ClassVar[str] = "ForTokenClassification"
    labels_from_model: ClassVar[bool] = True

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items, whose target is the tag of each word. Raises InputError with all_labels."""
        if all_labels:
            raise InputError("criterion: all candidate labels are for tasks with one target an example, not for tags")
        names = class_names(model, self.labels)
        return [self._item(names, row, example) for row, example in enumerate(examples)]

    def _item(self, names: list[str], row: int, example: Example) -> Item:
        where = f"examples, row {row + 1}"
        # An array of a data set's format, such as NumPy's, becomes a list.
        tokens, tags = (
            value.tolist() if hasattr(value, "tolist") else value for value in (example[column] for column in self.columns)
        )
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise InputError(f"{where}: expected a list of words in column 'tokens', got {tokens!r}")
        if not isinstance(tags, list) or len(tags) != len(tokens):
            count = len(tags) if isinstance(tags, list) else type(tags).__name__
            raise InputError(f"{where}: expected {len(tokens)} tags in column 'tags', one a word, got {count}")
        limit = self.max_length
        encoded = self.tokenizer(tokens, is_split_into_words=True, truncation=limit is not None, max_length=limit)
        target, previous = [], None
        for word in encoded.word_ids():
            first = word is not None and word != previous
            target.append(class_number(names, tags[word], where) if first else IGNORED)
            previous = word
        return Item(row, encoded["input_ids"], target)

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch with labels [B, T], -100 at pieces without a tag."""
        return Batch(
            self._inputs(items, device), pad([item.target for item in items], IGNORED, device), [item.row for item in items]
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, T, tags] of an ordinary forward pass."""
        output: Any = model(**batch.inputs)
        logits: Tensor = output.logits
        return logits

    def require_variety(self, examples: Sequence[Example]) -> None:
        """Accept any examples: each has many tags."""

    def label_names(self, model: nn.Module) -> list[str]:
        """Raise InputError: words have labels, inputs have none."""
        raise InputError(f"task: expected one with a label for each input, got {type(self).__name__}")

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the F1 of entities or the accuracy of words of a model in eval mode."""
        names = class_names(model, self.labels)
        truth: dict[int, list[str]] = {}
        guess: dict[int, list[str]] = {}
        for batch in self.batches(self.items(model, examples), model_device(model), max_tokens):
            best = self.logits(model, batch).argmax(-1)
            for row, labels, predicted in zip(batch.rows, batch.labels, best, strict=True):
                tagged = labels != IGNORED
                truth[row] = [names[i] for i in labels[tagged].tolist()]
                guess[row] = [names[i] for i in predicted[tagged].tolist()]
        if not all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in names):
            right = sum(a == b for row in truth for a, b in zip(truth[row], guess[row], strict=True))
            return proportion("word accuracy", right, sum(map(len, truth.values())))
        return bootstrap("F1", len(examples), lambda rows: _f1([truth[r] for r in rows], [guess[r] for r in rows]))


def _f1(truth: list[list[str]], guess: list[list[str]]) -> float:
    try:
        from seqeval.metrics import f1_score
    except ImportError as error:
        raise InputError("metric: entity F1 needs the extra 'tagging': pip install 'secateur[tagging]'") from error
    return float(f1_score(truth, guess, zero_division=0))
