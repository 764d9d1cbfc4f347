"""Usage: how the folder of a pruned model is loaded, scored with and served."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.flow.engines import servers_of
from secateur.pruning.describe import stock_class
from secateur.support.compat import auto_model_classes
from secateur.support.errors import InputError
from secateur.tasks import Task
from secateur.tasks.model_config import end_mark
from secateur.tasks.task_file import name_of


@dataclass(frozen=True)
class Usage:
    """How the folder of a model is used.

    Attributes:
        folder: The folder, as the lines name it.
        auto_class: The Auto class of transformers that loads the model, "" where only `secateur.load` does.
        own_code: Whether the folder carries a modelling file, which the Auto class runs with `trust_remote_code=True`.
        reader_class: The Auto class of the tokenizer or image processor.
        architecture: The name of the model's stock class.
        task: The name of the task that secateur.json holds, "" for none.
        scores: Whether `secateur score` needs no more to score a corpus: the task has labels.
        column: The column of a corpus that the lines name.
        exports: Whether `secateur export` writes the model as ONNX.
    """

    folder: str
    auto_class: str
    own_code: bool
    reader_class: str
    architecture: str
    task: str
    scores: bool
    column: str = "text"
    exports: bool = False

    def python(self) -> list[str]:
        """Three lines of Python that load the tokenizer or image processor and the model."""
        reader = self.reader_class.removeprefix("Auto")
        reader = "tokenizer" if reader == "Tokenizer" else "processor"
        where = repr(self.folder)
        read = f"{reader} = {self.reader_class}.from_pretrained({where})"
        if not self.auto_class:
            return [
                "import secateur, transformers", read.replace("Auto", "transformers.Auto"), f"model = secateur.load({where})"
            ]  # fmt: skip
        trust = ", trust_remote_code=True" if self.own_code else ""
        return [
            f"from transformers import {self.auto_class}, {self.reader_class}", read,
            f"model = {self.auto_class}.from_pretrained({where}{trust})",
        ]  # fmt: skip

    def command(self) -> str:
        """The command that scores a corpus with the folder, or evaluates it; "" where secateur.json names no task."""
        folder = shlex.quote(self.folder)
        folder = f"./{folder}" if folder.startswith("-") else folder
        if not self.task:
            return ""
        if self.scores:
            data = "'images/*.parquet'" if self.column == "image" else "'documents/*.parquet'"
            return f"secateur score {folder} --data {data} --input-column {self.column} --out scored"
        return f"secateur evaluate {folder} --data test.jsonl"

    def export(self) -> str:
        """The command that writes the folder for another engine; "" where there is none."""
        folder = f"./{self.folder}" if self.folder.startswith("-") else self.folder
        return (
            f"secateur export {shlex.quote(folder)} --format onnx --out {shlex.quote(f'{folder}-onnx')}" if self.exports else ""
        )

    def serving(self) -> str:
        """Where the folder can be served, in one or two sentences."""
        folder = shlex.quote(self.folder)
        if self.own_code or not self.auto_class:
            load = f"transformers ({self.auto_class}, with trust_remote_code=True) and " if self.auto_class else ""
            return (
                f"it runs in {load}secateur.load. vLLM and text-embeddings-inference are not expected to take the folder "
                "itself, because they have model classes of their own and no stock config describes its shape."
            )
        start = f"it runs in transformers ({self.auto_class}). Its config is a stock one"
        servers = [command.format(folder) for command in servers_of(self.architecture).values()]
        if servers:
            return f"{start}, which these servers take by their code (not run here): {', or '.join(servers)}"
        return f"{start}. No server is known to take this architecture."

    def lines(self, *, elsewhere: bool = True) -> list[str]:
        """The use of the folder as lines for a terminal.

        Args:
            elsewhere: Whether to say how the folder is exported and served, too.
        """
        command, export = self.command(), self.export()
        return [
            "load it:", *(f"  {line}" for line in self.python()),
            *([f"{'score' if self.scores else 'evaluate'} with it:", f"  {command}"] if command else []),
            *(["export it (other formats: secateur export --help):", f"  {export}"] if export and elsewhere else []),
            *([f"serve it: {self.serving()}"] if elsewhere else []),
        ]  # fmt: skip


def usage_of(model: nn.Module, task: Task, folder: str | Path, *, named: bool = True) -> Usage:
    """Return how the folder of a model is used.

    Args:
        model: The model in the folder.
        task: Its task.
        folder: The path of the folder.
        named: Whether the folder has a secateur.json that names the task.
    """
    stock = stock_class(model)
    return Usage(
        folder=str(folder),
        auto_class=_auto_class(stock, model.config, task.auto_class),
        own_code=hasattr(model.config, "secateur"),
        reader_class=task.reader_class,
        architecture=stock.__name__,
        task=name_of(task) if named else "",
        scores=_gives_labels(task, model),
        column="image" if task.reader_class == "AutoImageProcessor" else "text",
        exports=bool(name_of(task)) and end_mark(model) is None,
    )


def _auto_class(stock: type[nn.Module], config: Any, preferred: str) -> str:
    """The Auto class that loads a class of transformers: the task's own if it does; "" for none."""
    import transformers

    names = [preferred, *(name for name in dir(transformers) if name.startswith("AutoModelFor")), "AutoModel"]
    for name in filter(None, names):
        classes = auto_model_classes(name, config)
        # A folder's own code is named under the Auto classes that know one class for its config (`save`).
        if classes == (stock,) or (stock in classes and not hasattr(config, "secateur")):
            return name
    return ""


def _gives_labels(task: Task, model: nn.Module) -> bool:
    """Whether a task gives each input labels or a value."""
    try:
        task.label_names(model)
    except InputError:
        return False
    return True
