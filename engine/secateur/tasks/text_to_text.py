"""Text-to-text with an encoder-decoder: closed labels ranked by likelihood, or open targets by greedy output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.model.families import family_of
from secateur.model.positions import table_positions
from secateur.support.errors import InputError
from secateur.tasks.batches import IGNORED, Batch, Item, pad
from secateur.tasks.generation import generated
from secateur.tasks.label_tree import LabelTree, require_pieces
from secateur.tasks.metrics import Evaluation, proportion
from secateur.tasks.model_config import require_decoder_start
from secateur.tasks.prompt import Prompt
from secateur.tasks.text import TextTask


class TextToText(TextTask):
    """Text in, text out, with an encoder-decoder.

    The metric is the accuracy of the most likely label (by the sum of its pieces' log-probabilities, the end mark included).
    Where targets are open it is the exact match of the greedy output with the target as the tokenizer writes it back.

    Args:
        tokenizer: The model's tokenizer.
        labels: The candidate targets; None where targets are open.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
        prompt: The text around each input, as in `TextTask`.
        columns: The columns of the data by the task's columns, as in `TextTask`.

    Raises:
        InputError: The tokenizer encodes a label to nothing, or two labels alike.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    name: ClassVar[str] = "text-to-text"

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        prompt: str | Prompt | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__(tokenizer, labels=labels, max_length=max_length, prompt=prompt, columns=columns)
        if labels is not None:
            require_pieces(labels, self._tokenize_targets(list(labels)), self._tokenize_targets([""])[0])

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task; or the config does not say how the decoder's input begins.
        """
        super().require_fit(model)
        require_decoder_start(model)

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items, whose target is the pieces of the target text."""
        inputs = self._encode_cut(model, examples, self.room(model))
        if all_labels:
            candidates = self._tokenize_targets(self._closed_labels())
            _require_places(self._target_positions(model), candidates, "labels")
            return [Item(row, ids, label) for row, ids in enumerate(inputs) for label in candidates]
        encoded = self._tokenize_targets(self._targets(examples))
        places = self._target_positions(model)
        for number, target in enumerate(encoded, start=1):
            _require_places(places, [target], f"examples, row {number}")
        return [Item(row, ids, target) for row, (ids, target) in enumerate(zip(inputs, encoded, strict=True))]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch with labels [B, T] for the decoder."""
        labels = pad([item.target for item in items], IGNORED, device)
        return Batch(self._inputs(items, device), labels, [item.row for item in items])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the decoder's logits [B, T, vocabulary] of an ordinary forward pass."""
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)  # type: ignore[operator]
        output: Any = model(**batch.inputs, decoder_input_ids=decoder_input_ids, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the accuracy or the exact match of a model in eval mode."""
        wanted = self.expected(model, examples)
        if self.labels is None:
            longest = max(map(len, self._tokenize_targets(self._targets(examples))))
            answers = self.generate(model, examples, max_tokens, longest + 1)
        else:
            answers = [self.labels[best] for best in self.ranked(model, examples, max_tokens).argmax(1).tolist()]
        right = sum(answer == target for answer, target in zip(answers, wanted, strict=True))
        return proportion("accuracy" if self.labels else "exact match", right, len(examples))

    def expected(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """Return the examples' targets; open ones as the tokenizer writes them back."""
        wanted = self._targets(examples)
        if self.labels is not None:
            return wanted
        decoded: list[str] = self.tokenizer.batch_decode(self._tokenize_targets(wanted), skip_special_tokens=True)
        return decoded

    def require_new_tokens(self, model: nn.Module, longest: int) -> None:
        """Check that the decoder has positions for an output of so many pieces. Raises InputError as `generating`."""
        places = self._target_positions(model)
        if places is not None and longest > places:
            raise InputError(f"longest: expected at most the decoder's {places} positions, got {longest}")

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the output for each input of a batch, as in `Task`."""
        ids = generated(model, batch, self.new_tokens or 0, self.beams)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """A context as in `Task.scoring`, in which the decoder takes the label tree's nodes to stand at their depths.

        Raises:
            InputError: As `ranked`; a model whose family has no `place_in_decoder`.
        """
        if self.new_tokens is not None:
            with super().scoring(model):
                yield
            return
        place_in_decoder = family_of(model).place_in_decoder
        if place_in_decoder is None:
            raise InputError(f"model: {type(model).__name__} cannot score labels side by side: its family tells no positions")
        handles = place_in_decoder(model, self.tree.depths)
        try:
            _require_places(self._target_positions(model), self._tokenize_targets(self._closed_labels()), "labels")
            with super().scoring(model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return log P(label | input) [B, labels]. The encoder runs once, the decoder once over the tree of all labels."""
        states: Tensor = model.get_encoder()(**batch.inputs).last_hidden_state  # type: ignore[operator]
        vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        rows = self.tree.rows(vocabulary)
        parts = zip(torch.split(states, rows), torch.split(batch.inputs["attention_mask"], rows), strict=True)
        return torch.cat([self._of_states(model, *part) for part in parts])

    def _of_states(self, model: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
        """Return `label_scores` of some rows, from the encoder's states [B, T, d_model] and the padding mask [B, T]."""
        of_tree = {
            name: tensor.to(states.device) for name, tensor in self.tree_inputs(model, len(states), states.dtype).items()
        }
        output: Any = model(
            encoder_outputs=(states,),
            attention_mask=mask,
            **of_tree,
            use_cache=False,
        )
        return self.tree.log_probabilities(output.logits)

    def tree_inputs(self, model: nn.Module, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the decoder's inputs for the label tree of some rows.

        They are the nodes' pieces [rows, nodes], and a mask of a dtype [rows, 1, nodes, nodes] that is added to the attention,
        so that a node sees its ancestors and itself.
        """
        hidden = torch.zeros(self.tree.sees.shape, dtype=dtype).masked_fill(~self.tree.sees, torch.finfo(dtype).min)
        start: int = model.config.decoder_start_token_id  # type: ignore[union-attr, assignment]
        return {
            "decoder_input_ids": self.tree.pieces(start).expand(rows, -1),
            "decoder_attention_mask": hidden.expand(rows, 1, -1, -1),
        }

    def _reading_part(self, model: nn.Module) -> nn.Module:
        encoder: nn.Module = model.get_encoder() if hasattr(model, "get_encoder") else model  # type: ignore[operator]
        return encoder

    def _target_positions(self, model: nn.Module) -> int | None:
        """The most pieces of a target that the decoder's table of positions serves, None without a table."""
        return table_positions(model, model.get_decoder() if hasattr(model, "get_decoder") else model)  # type: ignore[operator]

    @cached_property
    def tree(self) -> LabelTree:
        """The tree of the candidate labels."""
        return LabelTree(self._tokenize_targets(self._closed_labels()))

    def _tokenize_targets(self, targets: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(text_target=targets)["input_ids"]
        return encoded


def _require_places(places: int | None, targets: Sequence[Sequence[int]], where: str) -> None:
    """Raise InputError for targets with more pieces than a decoder has positions."""
    longest = max(map(len, targets))
    if places is not None and longest > places:
        raise InputError(f"{where}: expected at most {places} pieces, the decoder's positions, got a target of {longest}")
