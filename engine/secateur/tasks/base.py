"""Task: how examples become items and length-bucketed batches, the target function, and the evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from secateur.data.columns import Columns, require_columns_given
from secateur.data.examples import Example, Examples, read_examples, require_text
from secateur.model.families import branches
from secateur.model.families.registry import is_known
from secateur.model.faster_forward import faster_forward
from secateur.model.finite import first_not_finite
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_model
from secateur.support.compat import auto_model_classes
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.progress import watched
from secateur.tasks.batches import IGNORED, Batch, Encoded, Item, buckets, in_order, model_device
from secateur.tasks.metrics import Evaluation
from secateur.tasks.model_config import OutputKind, require_blind_to_padding, require_dictionaries
from secateur.tasks.prompt import Prompt

Target = Literal["probability", "log_probability", "margin"]


class Task(ABC):
    """A way to use a model. Subclasses say which columns their examples have and how examples are scored.

    Attributes:
        columns: The columns of an example: the input first, the target last.
        auto_class: The class of transformers that loads a model for this task, such as "AutoModelForCausalLM"; "" if there is
            none, in which case the class of a model is not checked.
        name: What the command line calls the task.
        reader_class: The class of transformers that loads what reads the inputs.
        labels_from_model: Whether the model's config names the labels.
        spaces_in_labels: Whether spaces around a label are part of it, where labels are given in one text.
        decodes_target: Whether a decoder that has an encoder runs over the target. If not, it runs over the input again.
        reader: What turns inputs into what the model reads: a tokenizer, or an image processor.
        labels: The candidate labels, or None where targets are open or the model names the labels.
        takes_pairs: Whether an input may be a pair of texts, as a list or tuple of two.
        columns_of_data: The columns of the data that are `columns`, where the user named them.
        prompt: The text around each input, if there is one.
        max_length: The most pieces of an input, where the tokenizer or the user bounds it.
        new_tokens: The most pieces of an output, in a task that `generating` returned; None otherwise.
        beams: The number of beams of such a task.
    """

    columns: ClassVar[tuple[str, ...]] = ("input", "target")
    auto_class: ClassVar[str] = ""
    name: ClassVar[str] = ""
    reader_class: ClassVar[str] = "AutoTokenizer"
    labels_from_model: ClassVar[bool] = False
    spaces_in_labels: ClassVar[bool] = False
    decodes_target: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = False
    columns_of_data: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    prompt: Prompt | None = None
    max_length: int | None = None
    new_tokens: int | None = None
    beams: int = 1
    reader: Any
    labels: list[str] | None

    def __init__(self, reader: Any, *, labels: Sequence[str] | None = None, columns: Columns | None = None) -> None:
        if isinstance(labels, str):  # Its letters would be the labels.
            raise InputError(f"labels: expected a list of labels, got the text {labels!r}")
        if labels is not None and not (isinstance(labels, Sequence) and all(isinstance(label, str) for label in labels)):
            raise InputError(f"labels: expected a list of texts, got {shown(labels)}")
        if labels is not None and len(set(labels)) < 2:
            raise InputError(f"labels: expected at least two different labels, got {list(labels)!r}")
        if labels is not None and len(set(labels)) < len(labels):
            raise InputError(f"labels: expected different labels, got one of them twice: {list(labels)!r}")
        self.reader = reader
        self.labels = None if labels is None else list(labels)
        self.columns_of_data = require_columns_given(columns, self.columns)

    @abstractmethod
    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items.

        Args:
            model: The model that will read the items.
            examples: The examples.
            all_labels: Whether to make one item for each example and candidate label, without reading targets.
        """

    @abstractmethod
    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, T, classes] of an ordinary forward pass, aligned with `batch.labels`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the task's metric of a model in eval mode. max_tokens: as in `batches`."""

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' inputs as items without targets. Tasks with a label for each input define it."""
        raise NotImplementedError

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, for `label_scores`. Tasks with a label for each input define it.

        Args:
            items: The items.
            device: Where the batch goes.
            length: The least number of tokens that the inputs are padded to.
        """
        raise NotImplementedError

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return `ranked` for a batch of inputs, in its order. Tasks with a label for each input define it."""
        raise NotImplementedError

    def why_no_input(self, value: Any) -> str | None:
        """Return why a value of a corpus cannot be an input; None if it can.

        Raises:
            InputError: The task scores no corpus: it does not define this method.
        """
        raise InputError(f"task: expected one that scores a corpus, got {type(self).__name__}")

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return inputs, encoded and cut to `room`, in their order. Tasks that score a corpus define it.

        Args:
            model: The model.
            inputs: Values for which `why_no_input` returns None, in the prompt (`prompted`).
            room: The most tokens of an input.
        """
        raise NotImplementedError

    def blank(self, model: nn.Module, length: int) -> Item:
        """Return an item that stands for any input, of at most `length` tokens. Tasks that score a corpus define it."""
        raise NotImplementedError

    def room(self, model: nn.Module) -> int | None:
        """Return the most tokens of an input that the model takes; None for any number."""
        return None

    def prompted(self, value: Any) -> Any:
        """Return the prompt with an input in it; the input itself if there is no prompt."""
        return value

    def written(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Return what a model says of each input of a batch, where `output_kind` is "text" or "spans".

        Raises:
            NotFiniteError: A logit is NaN or inf.
        """
        raise NotImplementedError

    def generating(self, model: nn.Module, longest: int, beams: int = 1) -> Self:
        """Return the same task to generate texts with a model: `output_kind` is then "text", and `written` gives the texts.

        Args:
            model: The model.
            longest: The most new pieces of an output.
            beams: The number of beams, as in `generated`; 1 is greedy.

        Raises:
            InputError: The model has no positions for so many, or the task generates no text.
        """
        raise InputError(f"task: expected one that generates text, got {type(self).__name__}")

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        """Return how likely each candidate label is for each example's input.

        Args:
            model: The model, in eval mode.
            examples: The examples, whose targets are not read.
            max_tokens: As in `batches`.

        Returns:
            [examples, labels], logarithms of probabilities, up to a constant for each example. Where `output_kind` is "labels",
                the logits of sigmoids; where it is "value", values [examples, 1].

        Raises:
            InputError: Inputs have more than one label each, the task has no labels, or a score is NaN or inf.
        """
        with self.scoring(model):
            scores, rows = list[Tensor](), list[int]()
            for batch in self.input_batches(model, examples, max_tokens):
                scores.append(self.finite(model, batch, self.label_scores))
                rows += batch.rows
            return in_order(scores, rows)

    def input_batches(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Iterator[Batch]:
        """Yield batches of the examples' inputs, without targets."""
        for bucket in watched(buckets(self.input_items(model, examples), max_tokens), len):
            yield self.collate_inputs(bucket, model_device(model))

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """A context in which `label_scores` may be called, also from several threads.

        Inside, some of the model's modules are replaced by others that compute the same. Raises InputError as `ranked`.
        """
        self.require_fit(model)
        self.label_names(model)
        with faster_forward(model):
            yield

    @contextmanager
    def sharing(self, model: nn.Module) -> Iterator[None]:
        """A context in which passes without gradients may share what the model computes for all examples alike.

        The weights must not change inside, and hooks may not see each example's every token. By default nothing is shared.
        """
        yield

    def output_kind(self, model: nn.Module) -> OutputKind:
        """Return the kind of a model's results.

        "label", "labels" and "value" are the meanings of `ranked`, as `model_config.output_kind` says. Where it is "text" or
        "spans", `written` gives the results.
        """
        return "label"

    def label_names(self, model: nn.Module) -> list[str]:
        """Return the candidate labels in the order of `ranked`. Raises InputError as `ranked`."""
        return self._closed_labels()

    def probabilities(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> list[dict[str, float]]:
        """Return for each example's input the probability of each candidate label among them. Raises InputError as `ranked`."""
        scores = self.ranked(model, examples, max_tokens).double().softmax(1).tolist()
        names = self.label_names(model)
        return [dict(zip(names, of_example, strict=True)) for of_example in scores]

    def predictions(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[dict[str, Any]]:
        """Return what a model in eval mode says of each example's input.

        Args:
            model: The model.
            examples: The examples, whose targets are not read.
            max_tokens: As in `batches`.
            longest: The most pieces of a generated text, where targets are open.

        Returns:
            For each example `prediction` and, for each candidate label, its probability `p_LABEL`.
        """
        if self.labels is None and not self.labels_from_model:
            return [{"prediction": text} for text in self.generate(model, examples, max_tokens, longest)]
        return [
            {"prediction": max(of_labels, key=of_labels.__getitem__), **{f"p_{label}": p for label, p in of_labels.items()}}
            for of_labels in self.probabilities(model, examples, max_tokens)
        ]

    def expected(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """Return the examples' targets in the form of `predictions`. Raises InputError for a target that cannot be one."""
        return self._targets(examples)

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        """Return the greedy output, of at most `longest` pieces, for each example's input.

        Raises:
            InputError: The task generates no text.
        """
        raise InputError(f"task: expected one that generates text, got {type(self).__name__}")

    def finite(self, model: nn.Module, batch: Batch, run: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
        """Return what `run` computes from a batch [B, ...], for example its `logits`.

        Raises:
            InputError: A value at a position that counts is NaN or inf. The message names the row, and where that begins.
        """
        values = run(model, batch)
        wrong = ~torch.isfinite(values)
        if values.shape[:2] == batch.labels.shape and values.dim() == 3:
            wrong &= (batch.labels != IGNORED).to(wrong.device).unsqueeze(-1)
        if not bool(wrong.any()):
            return values
        row = min(batch.rows[k] for k in wrong.view(len(wrong), -1).any(1).nonzero().flatten().tolist())
        raise InputError(
            f"examples, row {row + 1}: the model's outputs are not finite (NaN or inf)"
            f"{_where_not_finite(model, partial(run, model, batch))}; is the dtype too narrow?"
        )

    def target(self, model: nn.Module, batch: Batch, kind: Target) -> Tensor:
        """Return F [B] of the batch's own labels, as in `target_of`."""
        return target_of(self.logits(model, batch), batch.labels, kind)

    def batches(self, items: Sequence[Item], device: torch.device, max_tokens: int) -> Iterator[Batch]:
        """Yield batches of items of similar length, longest first.

        Args:
            items: The items.
            device: Where the batches go.
            max_tokens: The most tokens of a batch's padded input; a batch has one item at least.
        """
        for bucket in watched(buckets(items, max_tokens), len):
            yield self.collate(bucket, device)

    def read(self, examples: Examples, *, all_labels: bool = False) -> list[Example]:
        """Read examples whose columns have other names than the task's.

        Args:
            examples: The examples, as `read_examples` takes them.
            all_labels: Whether only the inputs are read.

        Returns:
            The examples with `columns_for(all_labels=...)`.

        Raises:
            InputError: As `read_examples`.
        """
        roles = self.columns_for(all_labels=all_labels)
        named = {role: names for role, names in self.columns_of_data.items() if role in roles}
        return read_examples(examples, roles, names=named, pairs=self.takes_pairs)

    def columns_for(self, *, all_labels: bool) -> tuple[str, ...]:
        """Return the columns that `items` reads: with all_labels the input alone."""
        return self.columns[:1] if all_labels else self.columns

    def require_variety(self, examples: Sequence[Example]) -> None:
        """Refuse examples of a closed task that all have the same target: no score tells labels apart on them.

        Raises:
            InputError: Two or more examples have one target between them.
        """
        targets = {str(example[self.columns[-1]]) for example in examples}
        if len(examples) > 1 and len(targets) < 2 and (self.labels is not None or self.labels_from_model):
            raise InputError(
                f"examples: expected at least two different targets, got {targets.pop()!r} in all {len(examples)} rows"
            )

    def model_inputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a batch's inputs, or `training_batch`, as keyword arguments for this model. By default they stay the same."""
        return dict(inputs)

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return items as keyword arguments of the model's forward pass, with labels for the model's own loss, on the CPU."""
        batch = self.collate(items, torch.device("cpu"))
        return {**batch.inputs, "labels": batch.labels}

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task, before a forward pass fails deep inside.

        Raises:
            InputError: No model, weights without values, a class of transformers for another kind of task, a model that reads
                padding, a config whose options the passes cannot serve, or what `require_reader` refuses.
        """
        import transformers

        require_model(model)
        require_values(model)
        config: Any = getattr(model, "config", None)
        stock = isinstance(model, transformers.PreTrainedModel) and type(model).__module__.startswith("transformers.")
        if stock and self.auto_class and not isinstance(model, auto_model_classes(self.auto_class, config)):
            raise InputError(
                f"model: expected one of {self.auto_class} for {type(self).__name__}, got a {type(model).__name__}"
            )
        require_dictionaries(model)
        require_blind_to_padding(model)
        self.require_reader(model, self.reader)

    @classmethod  # noqa: B027 (tasks of texts check more)
    def require_reader(cls, model: nn.Module, reader: Any) -> None:
        """Refuse a reader of the inputs that belongs to another model, where the two can tell.

        Raises:
            InputError: The reader does not belong to the model.
        """

    def _closed_labels(self) -> list[str]:
        if self.labels is None:
            raise InputError("labels: expected the candidate labels of a closed task, got None (open targets)")
        return self.labels

    def _targets(self, examples: Sequence[Example]) -> list[str]:
        """Return the targets, which must be text, and among the labels of a closed task."""
        targets = texts(examples, "target")
        for number, target in enumerate(targets, start=1):
            if self.labels is not None and target not in self.labels:
                expected = ", ".join(map(repr, self.labels[:12])) + (" ..." if len(self.labels) > 12 else "")
                raise InputError(f"examples, row {number}: expected a target among the labels {expected}, got {target!r}")
        return targets


def target_of(logits: Tensor, labels: Tensor, kind: Target) -> Tensor:
    """Return F [B], the target function of each example, summed over its target positions j.

    Args:
        logits: [B, T, classes].
        labels: [B, T], int64: the target ids y_j, -100 where there is none.
        kind: What is summed: the probability P(y_j | x, y_<j), its logarithm, or the margin between y_j's logit and the largest
            other logit. One class has no probability: whatever the kind, F is the logit, which is the output of a model with
            one output.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index = labels.clamp(min=0).unsqueeze(-1)  # [B, T, 1]
    gold = logits.gather(-1, index).squeeze(-1)  # [B, T]
    if logits.shape[-1] == 1:
        value = gold
    elif kind == "margin":
        value = gold - logits.scatter(-1, index, -math.inf).amax(-1)
    else:
        value = gold - logits.logsumexp(-1)
        value = value.exp() if kind == "probability" else value
    return (value * (labels != IGNORED)).sum(1)


def texts(examples: Sequence[Example], column: str) -> list[str]:
    """Return one text column of all examples."""
    return [require_text(example, column, number) for number, example in enumerate(examples, start=1)]


def _where_not_finite(model: nn.Module, run: Callable[[], Any]) -> str:
    """Return words that name the first branch with activations that are not finite; "" for none, or an unknown family."""
    if not is_known(model):
        return ""
    name = first_not_finite(model, {branch.name: branch.output for branch in branches(model).values()}, run)
    return "" if name is None else f", first at {name!r}"


def without_targets(task: Task, rows: Sequence[Example]) -> bool:
    """Return whether examples are inputs alone."""
    return task.columns[-1] not in rows[0]


def require_fit(task: Any, model: Any) -> None:
    """Check that two arguments are a task and a model, and that the model fits the task, as `Task.require_fit` says.

    Raises:
        InputError: The arguments are something else, or do not fit each other.
    """
    if not isinstance(task, Task):
        raise InputError(f"task: expected a Task, such as secateur.TextToText(tokenizer, labels=[...]), got {shown(task)}")
    require_model(model)
    task.require_fit(model)
