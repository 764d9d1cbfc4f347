"""Decoder language models: labels that follow a prompt, or plain language modelling."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.model.families import takes_label_tree
from secateur.model.positions import hard_limit, sliding_window
from secateur.support.errors import InputError
from secateur.tasks.batches import IGNORED, Batch, Encoded, Item, model_device, pad
from secateur.tasks.generation import generated
from secateur.tasks.label_tree import LabelTree, require_pieces
from secateur.tasks.metrics import Evaluation, bootstrap, proportion
from secateur.tasks.model_config import require_causal
from secateur.tasks.prompt import Prompt
from secateur.tasks.shared_prefix import FEWEST, SharedPrefix, can_share, common, held, padded_on_the_left, prefix_of
from secateur.tasks.text import TextTask, warn_of_cuts

if TYPE_CHECKING:
    from transformers import DynamicCache

# Inputs of several kinds. What prompts with them begin with alike, prompts with most inputs begin with.
_INPUTS = ("a", "The film", "b c", "1", "(", '"')


class CausalLM(TextTask):
    """A continuation of each input, with a decoder.

    The target's pieces follow the input's pieces (write the space between them where the model needs one). The metric is the
    accuracy of the most likely label, or the perplexity of the targets without labels.

    Args:
        tokenizer: The model's tokenizer.
        labels: The candidate continuations of the input; None for any continuation.
        max_length: The most pieces of input and target together; by default the tokenizer's own limit, else the model's
            positions.
        prompt: The text around each input, as in `TextTask`.
        columns: The columns of the data by the task's columns, as in `TextTask`.

    Raises:
        InputError: The tokenizer encodes a label to nothing, or two labels alike.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    name: ClassVar[str] = "causal-lm"
    spaces_in_labels: ClassVar[bool] = True

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
            require_pieces(labels, self._label_ids(), [])

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items, whose input ids are those of the prompt and the target."""
        limit = self.limit(model)
        inputs = self._encoded(examples, limit)
        if all_labels:
            candidates = self._label_ids()
            pairs = [(row, ids, label) for row, ids in enumerate(inputs) for label in candidates]
        else:
            encoded = self._tokenize(self._targets(examples), add_special_tokens=False)
            pairs = [(row, *pair) for row, pair in enumerate(zip(inputs, encoded, strict=True))]
        items = [self._item(row, prompt, target, limit) for row, prompt, target in pairs]
        cut = {item.row for item in items if len(item.input_ids) < len(inputs[item.row]) + len(item.target)}
        warn_of_cuts(len(cut), len(inputs), limit)
        return items

    def _item(self, row: int, prompt: list[int], target: list[int], limit: int | None) -> Item:
        """An example as an item of at most `limit` ids. The prompt is cut to leave room for the target."""
        if not target:
            raise InputError(f"examples, row {row + 1}: expected a target of at least one piece, got none")
        if limit is not None:
            room = limit - len(target)
            if room < 1:
                raise InputError(f"examples, row {row + 1}: expected a target under {limit} pieces, got {len(target)}")
            prompt = self.cut(prompt, room)
        return Item(row, [*prompt, *target], target)

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch, with the positions whose logits predict pieces of a target."""
        # Logits at other positions are not computed: the vocabulary is the widest matrix of a small decoder.
        spans = [range(len(i.input_ids) - len(i.target) - 1, len(i.input_ids) - 1) for i in items]
        positions = sorted({position for span in spans for position in span})
        column = {position: k for k, position in enumerate(positions)}
        labels = torch.full((len(items), len(positions)), IGNORED, dtype=torch.int64)
        for row, (span, item) in enumerate(zip(spans, items, strict=True)):
            labels[row, [column[position] for position in span]] = torch.tensor(item.target)
        rows = [item.row for item in items]
        return Batch(
            self._inputs(items, device), labels.to(device), rows, {"positions": torch.tensor(positions, device=device)}
        )

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return items as keyword arguments of the model's forward pass, with labels [B, T] at the pieces of the targets."""
        # The model shifts the labels itself, so that each input piece has its own place.
        prompts = [len(item.input_ids) - len(item.target) for item in items]
        labels = [[IGNORED] * prompt + item.target for prompt, item in zip(prompts, items, strict=True)]
        cpu = torch.device("cpu")
        return {**self._inputs(items, cpu), "labels": pad(labels, IGNORED, cpu)}

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task; or the model's tokens see the tokens after them.
        """
        super().require_fit(model)
        require_causal(model)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, positions, vocabulary] of an ordinary forward pass."""
        parameters, positions = inspect.signature(type(model).forward).parameters, batch.extra["positions"]
        if "logits_to_keep" not in parameters:
            whole: Any = model(**batch.inputs)
            return cast(Tensor, whole.logits)[:, positions]
        prefix = self._prefix_before(model, batch.inputs["input_ids"], positions)
        if prefix is None:
            output: Any = model(**batch.inputs, use_cache=False, logits_to_keep=positions)
        else:
            ids, begin = batch.inputs["input_ids"], prefix.length
            output = model(
                input_ids=ids[:, begin:],
                attention_mask=batch.inputs["attention_mask"],
                position_ids=torch.arange(begin, ids.shape[1], device=ids.device).expand(len(ids), -1),
                past_key_values=prefix.for_rows(len(ids), grows=False),
                use_cache=True,
                logits_to_keep=positions - begin,
            )
        logits: Tensor = output.logits
        return logits

    def _prefix_before(self, model: nn.Module, ids: Tensor, positions: Tensor) -> SharedPrefix | None:
        """The prefix with which all rows of ids [B, T] begin, before all positions; None if there is none in `sharing`."""
        prefix = prefix_of(model, self._head)
        if prefix is None or int(positions[0]) < prefix.length:
            return None
        same = ids[:, : prefix.length] == torch.tensor(prefix.ids, device=ids.device)
        return prefix if bool(same.all()) else None

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the accuracy or the perplexity of a model in eval mode."""
        if self.labels is not None:
            targets = self._targets(examples)
            best = self.ranked(model, examples, max_tokens).argmax(1).tolist()
            right = sum(self.labels[label] == target for label, target in zip(best, targets, strict=True))
            return proportion("accuracy", right, len(examples))
        loss, pieces = [0.0] * len(examples), [0] * len(examples)
        with self.sharing(model):
            for batch in self.batches(self.items(model, examples), model_device(model), max_tokens):
                counts = (batch.labels != IGNORED).sum(1)
                scores = self.finite(model, batch, partial(self.target, kind="log_probability"))
                for row, score, count in zip(batch.rows, scores, counts, strict=True):
                    loss[row], pieces[row] = -float(score), int(count)
        return bootstrap(
            "perplexity", len(examples), lambda rows: math.exp(sum(loss[r] for r in rows) / sum(pieces[r] for r in rows))
        )

    def encode(self, inputs: list[str], room: int | None = None) -> list[list[int]]:
        """Return the ids of inputs, uncut, as in `TextTask`.

        An end mark that the tokenizer adds is left out: the target follows the prompt.
        """
        encoded = super().encode(inputs, room)
        if self._adds_end:
            encoded = [ids[:-1] for ids in encoded]
        # A prompt must have a token: without one nothing predicts the target's first piece.
        return [ids or [self._start()] for ids in encoded]

    @cached_property
    def _adds_end(self) -> bool:
        """Whether the tokenizer adds an end mark to a text. One mark that may be start or end mark is taken for the start's."""
        start, end = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        return self._marks[-1:] == [end] and (len(self._marks) > 1 or start != end)

    def room(self, model: nn.Module) -> int | None:
        """Return the most ids of a prompt before the longest label or the output.

        Raises:
            InputError: That label alone is too long.
        """
        if self.new_tokens is not None:
            return self._room_before(model, self.new_tokens)
        limit = self.limit(model)
        if limit is None or self.labels is None:
            return limit
        longest = self._tree.longest
        if longest >= limit:
            raise InputError(f"labels: expected labels under {limit} pieces, got one of {longest}")
        return limit - longest

    def cut(self, ids: list[int], room: int | None) -> list[int]:
        """Return at most `room` of a prompt's ids: its end, which the target follows, or as in `TextTask` with a `Prompt`."""
        if self.prompt is not None:
            return super().cut(ids, room)
        return ids if room is None else ids[-room:]

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return inputs as in `TextTask`, each with the number of its ids that the shared prefix holds: all of it or nothing.

        A tokenizer may join the prompt's last characters with an input's first ones. So the ids decide, input by input.
        """
        encoded, head = super().encode_cut_each(model, inputs, room), self._shared(model)
        begins = [bool(head) and len(one.ids) > len(head) and one.ids[: len(head)] == head for one in encoded]
        return [replace(one, shared=len(head)) if same else one for one, same in zip(encoded, begins, strict=True)]

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' inputs as in `TextTask`. A single one shares nothing: its prompt runs in one pass."""
        items = super().input_items(model, examples)
        return items if len(items) > 1 else [replace(item, shared=0) for item in items]

    def blank(self, model: nn.Module, length: int) -> Item:
        """Return an item of one piece, repeated, after the shared prefix."""
        head, item = self._shared(model), super().blank(model, length)
        return replace(item, input_ids=[*head, *item.input_ids], shared=len(head))

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return prompts as one batch, with padding before each prompt, so that what follows them begins in one column.

        If all prompts begin with the shared prefix, it fills the first columns, and the padding stands behind it. `length` is
        then the number of the other columns.
        """
        shared = min(item.shared for item in items)
        own = [replace(item, input_ids=item.input_ids[shared:][::-1], shared=0) for item in items]
        turned = super().collate_inputs(own, device, length)
        inputs = {name: ids.flip(1) for name, ids in turned.inputs.items()}
        if shared:
            head = super().collate_inputs([replace(items[0], input_ids=items[0].input_ids[:shared])], device)
            inputs = {name: torch.cat([head.inputs[name].expand(len(items), -1), ids], 1) for name, ids in inputs.items()}
        return replace(turned, inputs=inputs, extra={"shared": shared})

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """A context as in `Task.scoring`, and in which prompts share their first tokens as in `sharing`."""
        with super().scoring(model), held(model, self._shared(model)):
            yield

    @contextmanager
    def sharing(self, model: nn.Module) -> Iterator[None]:
        """A context in which the tokens that all prompts begin with are run once. Each batch reads their keys and values.

        That needs a `Prompt` with at least `FEWEST` tokens before the input, and a model that `can_share`. Otherwise every
        prompt runs as a whole, which gives the same up to rounding.
        """
        with held(model, self._shared(model), at_once=True):
            yield

    def _shared(self, model: nn.Module) -> list[int]:
        """The ids that prompts begin with and that are run once for a model; none where nothing is shared."""
        head = self._head
        return head if len(head) >= FEWEST and can_share(model) and self._in_window(model, len(head)) else []

    def _in_window(self, model: nn.Module, length: int) -> bool:
        """Whether texts that follow so many columns can be generated after a shared prefix.

        `generate` counts a window in columns, and the padding after the prefix would take some of it. So all columns must be in
        the window. Labels have masks by position.
        """
        window = None if self.new_tokens is None else sliding_window(model)
        return window is None or length + (self.new_tokens or 0) <= window

    @cached_property
    def _head(self) -> list[int]:
        """The ids that prompts with inputs of several kinds begin with."""
        if self.prompt is None:
            return []
        encoded = self.encode_each([self.prompted([text] * len(self.prompt.fields)) for text in _INPUTS])
        return common([[] if isinstance(ids, str) else ids for ids in encoded])

    def _read_by(self, model: nn.Module, batch: Batch, *, exact: bool = True) -> tuple[Batch, SharedPrefix | None]:
        """A batch with the prefix that it shares; without one, as where gradients flow, it is padded on the left alone."""
        if not batch.extra.get("shared"):
            return batch, None
        prefix = prefix_of(model, self._head) if exact else None
        return (padded_on_the_left(batch) if prefix is None else batch), prefix

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return log P(label | prompt) [B, labels].

        The prompts run once, then the label tree on their cached states; after a shared prefix both run together. Models that
        are not known to read the tree rightly, as `takes_label_tree` says, run on each prompt with each label: some have no
        positions or masks that a call can give.
        """
        batch, prefix = self._read_by(model, batch)
        if not takes_label_tree(model):
            return self._label_by_label(model, batch)
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        rows, begin = self._tree.rows(config.vocab_size), 0 if prefix is None else prefix.length
        ids, masks = (torch.split(batch.inputs[name][:, begin:], rows) for name in ("input_ids", "attention_mask"))
        return torch.cat([self._of_prompts(model, *part, prefix) for part in zip(ids, masks, strict=True)])

    def _label_by_label(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return `label_scores` by an ordinary forward pass for each label, over the prompts with this label."""
        rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
        prompts = [ids[seen].tolist() for ids, seen in rows]
        columns = []
        for label in self._label_ids():
            items = [Item(row, [*prompt, *label], label) for row, prompt in enumerate(prompts)]
            columns.append(self.target(model, self.collate(items, batch.inputs["input_ids"].device), "log_probability"))
        return torch.stack(columns, 1)

    def _of_prompts(self, model: nn.Module, ids: Tensor, mask: Tensor, prefix: SharedPrefix | None) -> Tensor:
        """Return `label_scores` of some prompts, from their ids and the padding mask, both [B, T]; both without the prefix."""
        from transformers import DynamicCache

        tree = self._tree
        places = (mask.cumsum(1) - 1).clamp(min=0)
        if prefix is not None:
            cache = prefix.for_rows(len(ids), grows=False)
            return tree.log_probabilities(self._on_cache(model, cache, ids, mask, places, prefix=prefix.length))
        cache = DynamicCache() if len(tree) > 1 else None
        output: Any = model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=1,
        )  # fmt: skip
        logits: list[Tensor] = [output.logits]
        if cache is not None:
            logits.append(self._on_cache(model, cache, ids, mask, places, run=ids.shape[1]))
        return tree.log_probabilities(*logits)

    def _on_cache(
        self, model: nn.Module, cache: DynamicCache, ids: Tensor, mask: Tensor, places: Tensor, *, prefix: int = 0, run: int = 0
    ) -> Tensor:
        """Return the logits [B, nodes, vocabulary] of the label tree's nodes; without the root if the prompts have run.

        Args:
            model: The model.
            cache: The cached states: those of the prefix, then those of the columns that have run.
            ids: The prompts' ids without the prefix [B, T].
            mask: Their padding mask [B, T].
            places: Their positions, counted from the prefix's end [B, T].
            prefix: The length of the prefix.
            run: How many columns have run: 0 or T.
        """
        tree, (rows, length) = self._tree, ids.shape
        nodes, device = len(tree) - 1, ids.device  # The root is the prompt's last token.
        ids = torch.cat([ids, tree.pieces(0)[1:].to(device).expand(rows, -1)], 1)  # [B, T + nodes]
        places = torch.cat([places, places[:, -1:] + tree.depths[1:].to(device)], 1) + prefix
        among = torch.ones(length + nodes, length + nodes, dtype=torch.bool, device=device).tril()
        among[length:, length:] = tree.sees[1:, 1:]
        real = functional.pad(mask.bool(), (prefix, nodes), value=True)  # [B, prefix + T + nodes]
        sees = functional.pad(among[run:], (prefix, 0), value=True) & real[:, None]  # [B, tokens that run, prefix + T + nodes]
        masks, window = {"full_attention": sees}, sliding_window(model)
        if window is not None:
            seen_at = torch.cat([torch.arange(prefix, device=device).expand(rows, -1), places], 1)
            # Without kinds all layers slide (Mistral).
            kind = "full_attention" if getattr(model.config, "layer_types", None) is None else "sliding_attention"
            masks[kind] = sees & (places[:, run:, None] - seen_at[:, None] < window)
        dtype = next(layer.keys.dtype for layer in cache.layers if layer.keys is not None)
        added = {
            kind: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None]
            for kind, mask in masks.items()
        }
        output: Any = model(
            input_ids=ids[:, run:],
            attention_mask=added if len(added) > 1 else added["full_attention"],
            position_ids=places[:, run:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=nodes + (run == 0),
        )
        logits: Tensor = output.logits
        return logits

    def require_new_tokens(self, model: nn.Module, longest: int) -> None:
        """Check that the model has positions for a prompt and so many pieces. Raises InputError as `generating`."""
        hard = hard_limit(model)
        if hard is not None and longest >= hard:
            raise InputError(f"longest: expected under {hard} pieces, the model's positions, got {longest}")

    @torch.no_grad()
    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the continuation of each prompt of a batch, as in `Task`."""
        longest = self.new_tokens or 0
        batch, prefix = self._read_by(model, batch, exact=self._in_window(model, batch.length))
        ids = generated(model, batch, longest, self.beams, prefix)
        new = ids[:, batch.inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _room_before(self, model: nn.Module, longest: int) -> int | None:
        """The most ids of a prompt before an output of so many pieces."""
        room, hard = self.limit(model), hard_limit(model)
        # Without a hard limit, an output that is longer than the limit goes beyond it, and the prompt stays whole.
        room = room - longest if room is not None and room > longest else room
        return room if room is None or hard is None else min(room, hard - longest)

    @cached_property
    def _tree(self) -> LabelTree:
        return LabelTree(self._label_ids())

    def _label_ids(self) -> list[list[int]]:
        return self._tokenize(self._closed_labels(), add_special_tokens=False)

    def _start(self) -> int:
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.tokenizer.eos_token_id)
