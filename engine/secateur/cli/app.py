"""The application: all commands under their names. A command's module is imported when the command is used."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

import secateur


class Verb(NamedTuple):
    """A command.

    Attributes:
        name: Its name on the command line.
        target: Its function, or its application of several commands, as "module:name" below `secateur.cli.commands`.
        about: The line about it in the list of commands. It is the first sentence of the function's docstring.
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
            "score smaller --data 'documents/*.parquet' --column text --out scored",
        ),
        Verb(
            "layers", "layers:layers", "Delete the whole layers that a task needs least; write a model folder.",
            "layers MODEL --data train.jsonl --keep-layers 6 --out shallower",
        ),
    ],
    LEARNED: [
        Verb(
            "layer-gates", "layer_gates:layer_gates", "Learn with gates which layers a task needs, and delete the others.",
            "layer-gates MODEL --data train.jsonl --keep-layers 6 --out gates",
        ),
        Verb(
            "multitask", "multitask:multitask", "Train one encoder on several tasks, and prune it for all of them.",
            "multitask run.yaml --out run",
        ),
        Verb(
            "ldnet", "ldnet:app", "Language models of densely connected layers, pruned for a sequence labelling task.",
            "ldnet train-lm sentences.txt --steps 1000 --out lm",
        ),
    ],
}  # fmt: skip
REPRODUCED = [
    Verb("ap", "reproduce_ap:ap_", "Repeat attribution-based pruning (Yang et al. 2023).", "reproduce ap --out ap"),
    Verb(
        "multitask", "reproduce_multitask:multitask", "Repeat multitask pruning (Xia and Shin 2021).",
        "reproduce multitask --out multitask",
    ),
    Verb(
        "ldnet", "reproduce_ldnet:ldnet", "Repeat LD-Net (Liu et al. 2018).",
        "reproduce ldnet --data train.conll --eval dev.conll --column ner=ner --out ldnet",
    ),
]  # fmt: skip


def load(verb: Verb) -> Any:
    """Return the command of a verb, whose module is imported now."""
    module, _, name = verb.target.partition(":")
    target = getattr(import_module(f"secateur.cli.commands.{module}"), name)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name=verb.name, epilog=f"Example: secateur {verb.example}")(target)
    return typer.main.get_command(alone)


def register(group: typer.Typer, verb: Verb, panel: str | None = None, *, name: str = "", hidden: bool = False) -> None:
    """Add a verb to an application, under `name` if it is given, without importing its module."""

    class Lazy(TyperCommand):
        """Stands for the verb's command in a list of commands. Its context is that of the command itself."""

        def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
            return load(verb).make_context(info_name, args, parent, **extra)

    register_command = group.command(name or verb.name, cls=Lazy, help=verb.about, rich_help_panel=panel, hidden=hidden)
    register_command(lambda: None)


app = typer.Typer(
    help="Cut a multi-task language model down to the one task that you run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _panel, _verbs in VERBS.items():
    for _verb in _verbs:
        register(app, _verb, _panel)
        if _verb.name == "benchmark":
            register(app, _verb, name="bench", hidden=True)  # The command's earlier name.

reproduce = typer.Typer(
    help="Repeat papers' experiments as resumable runs, with figures and a check of the papers' claims.", no_args_is_help=True
)
for _verb in REPRODUCED:
    register(reproduce, _verb)
app.add_typer(reproduce, name="reproduce", rich_help_panel=PAPERS)


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
