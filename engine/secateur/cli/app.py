"""The application: all commands under their names. A command's module is imported when the command is used."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

import secateur
from secateur.cli.shared.run_file import configurable


class Verb(NamedTuple):
    """A command.

    Attributes:
        name: The words of the command line that call it.
        target: Its function, as "module:name" below `secateur.cli.commands`.
        about: The line about it in the list of commands.
        example: A command line that uses it.
    """

    name: str
    target: str
    about: str
    example: str


FLOW, LEARNED, PAPERS = "The flow", "Training that learns what to prune", "Papers"
VERBS: dict[str, list[Verb]] = {
    FLOW: [
        Verb("demo", "demo:demo", "Score, prune and compare the built-in model on built-in data.", "demo --out demo-out"),
        Verb("sites", "sites:sites", "List what can be pruned: name, units, and the cost of one unit.", "sites MODEL"),
        Verb(
            "criteria", "sites:criteria", "List the criteria that --criterion takes, with their settings.", "criteria"
        ),
        Verb(
            "attribute", "attribute:attribute", "Score each unit by its effect on a task; write the scores.",
            "attribute MODEL --data train.jsonl --out scores.safetensors",
        ),
        Verb(
            "plan", "plan:plan", "Choose from scores which units stay within a budget; write the plan.",
            "plan scores.safetensors --flops 0.5 --out plan.json",
        ),
        Verb(
            "prune", "prune:prune", "Run the whole flow; write a smaller model folder with its report.",
            "prune MODEL --data train.jsonl --eval dev.jsonl --speedup 2 --out smaller",
        ),
        Verb(
            "evaluate", "evaluate:evaluate", "Measure a model's metric on examples, with its 95% interval.",
            "evaluate smaller --data test.jsonl",
        ),
        Verb(
            "benchmark", "benchmark:benchmark", "Time a dense against a pruned model over batch shapes.",
            "benchmark MODEL smaller --batch-sizes 1,32 --lengths 64,256",
        ),
        Verb(
            "sweep", "sweep:sweep_", "Measure accuracy, size and speed at several rates of pruning.",
            "sweep MODEL --data train.jsonl --eval dev.jsonl --keeps 0.75,0.5,0.25 --out rates",
        ),
        Verb(
            "score", "score:score", "Score a corpus, shard by shard, into Parquet files.",
            "score smaller --data 'documents/*.parquet' --input-column text --out scored",
        ),
        Verb(
            "export", "export:export", "Write a model folder as what llama.cpp, vLLM or SGLang load.",
            "export smaller --format gguf --out smaller-gguf",
        ),
        Verb(
            "push", "push:push", "Upload a folder with its card to the Hugging Face Hub.",
            "push smaller OWNER/NAME --private",
        ),
        Verb(
            "layers", "layers:layers", "Delete the whole layers that a task needs least; write a model folder.",
            "layers MODEL --data train.jsonl --keep-layers 6 --out shallower",
        ),
    ],
    LEARNED: [
        Verb(
            "heal", "heal:heal", "Train a pruned folder against the dense model that it was made from.",
            "heal smaller --data train.jsonl --eval dev.jsonl --minutes 10 --out healed",
        ),
        Verb(
            "layer-gates", "layer_gates:layer_gates", "Learn with gates which layers a task needs, and delete the others.",
            "layer-gates MODEL --data train.jsonl --keep-layers 6 --out gates",
        ),
        Verb(
            "multitask", "multitask:multitask", "Train one encoder on several tasks, and prune it for all of them.",
            "multitask run.yaml --out run",
        ),
        Verb(
            "ldnet train-lm", "ldnet:train_lm", "Train a forward and a backward language model of densely connected layers.",
            "ldnet train-lm sentences.txt --steps 1000 --out lm",
        ),
        Verb(
            "ldnet train-tagger", "ldnet:train_tagger", "Train a tagger on the models, and delete the layers it can spare.",
            "ldnet train-tagger lm/model --data train.conll --eval dev.conll --target-column ner --out tagger",
        ),
        Verb("ldnet tag", "ldnet:tag", "Tag text, one sentence on a line.", "ldnet tag tagger/model sentences.txt"),
    ],
    PAPERS: [
        Verb(
            "reproduce ap", "reproduce_ap:ap_", "Repeat attribution-based pruning (Yang et al. 2023).", "reproduce ap --out ap"
        ),
        Verb(
            "reproduce multitask", "reproduce_multitask:multitask", "Repeat multitask pruning (Xia and Shin 2021).",
            "reproduce multitask --out multitask",
        ),
        Verb(
            "reproduce ldnet", "reproduce_ldnet:ldnet", "Repeat LD-Net (Liu et al. 2018).",
            "reproduce ldnet --data train.conll --eval dev.conll --target-column ner=ner --out ldnet",
        ),
    ],
}  # fmt: skip
# Help of the verbs that are the first of two words.
GROUPS = {
    "ldnet": "LD-Net (Liu et al. 2018): prune a language model's layers for sequence labelling.",
    "reproduce": "Repeat papers' experiments as resumable runs, with figures and a check of the papers' claims.",
}


def load(verb: Verb) -> Any:
    """Return the command of a verb, whose module is imported now."""
    module, _, name = verb.target.partition(":")
    target = getattr(import_module(f"secateur.cli.commands.{module}"), name)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(epilog=f"Example: secateur {verb.example}")(configurable(target, verb.name))
    return typer.main.get_command(alone)


def _register(group: typer.Typer, verb: Verb, name: str, **options: Any) -> None:
    """Add a verb to an application, without importing its module."""

    class Lazy(TyperCommand):
        """Stands for the verb's command in a list of commands. Its context is that of the command itself."""

        def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
            return load(verb).make_context(info_name, args, parent, **extra)

    group.command(name, cls=Lazy, help=verb.about, **options)(lambda: None)


app = typer.Typer(
    help="Cut a multi-task language model down to the one task that you run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_groups: dict[str, typer.Typer] = {}
for _panel, _verbs in VERBS.items():
    for _verb in _verbs:
        _first, _, _second = _verb.name.partition(" ")
        if not _second:
            _register(app, _verb, _first, rich_help_panel=_panel)
            if _first == "benchmark":
                _register(app, _verb, "bench", hidden=True)  # The command's earlier name.
            continue
        if _first not in _groups:
            _groups[_first] = typer.Typer(help=GROUPS[_first], no_args_is_help=True)
            app.add_typer(_groups[_first], name=_first, rich_help_panel=_panel)
        _register(_groups[_first], _verb, _second)


def _print_version(requested: bool) -> None:
    """Print the version and exit, if --version is given."""
    if requested:
        print(secateur.__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass
