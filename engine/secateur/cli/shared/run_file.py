"""Options of a command from a YAML file, and the file in an output folder that repeats its command."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from secateur.cli.shared.tell import speaking
from secateur.support.command import RUN_FILE, RUNNING, Running
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.files import write_atomically
from secateur.support.urls import redacted
from secateur.support.yaml_files import read_yaml

Quiet = Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Also print the library's log lines at level INFO, and the warnings of transformers.")
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log", help="File that all lines of stderr are appended to, with their times, also those that --quiet hides."
    ),
]
# Parameters that are no options of the command itself, so that the file of its options does not have them.
# What happens to an existing output, and who gets the new one. Neither the file nor the line that repeats a run says it.
_ONCE = ("overwrite", "resume", "push", "private")
_SHARED = ("options_file", "quiet", "verbose", "log_file", "help", None)


def configurable(command: Callable[..., None], name: str) -> Callable[..., None]:
    """Return a command with the options of all commands, which leaves its options as `run.yaml` in its output folder.

    They are --config, --quiet, --verbose and --log; the last three change nothing that is computed and are not in the file.

    A command with the option --push then uploads the folder.

    The folder is the command's `out`. A command without one, one that writes a file, and a dry run leave nothing.

    Args:
        command: The command's function.
        name: The words of the command line that call it.
    """

    @wraps(command)
    def run(
        context: typer.Context, options_file: Path | None = None, quiet: bool = False, verbose: bool = False,
        log_file: Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        with speaking(quiet, verbose, log_file):
            out = "" if options.get("out") is None or options.get("dry") else str(options["out"])
            made = Running(
                _command_line(context, name), str(options.get("evaluation") or ""), out, _run_file(context, name, options)
            )
            running = RUNNING.set(made)
            try:
                command(**options)
            finally:
                RUNNING.reset(running)
            if out:
                _keep(out, made.run_file)
                if options.get("push"):
                    _upload(out, options["push"], private=options["private"])

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            context.default_map = _defaults(name, context, path)
        return path

    Config = Annotated[
        Path | None,
        typer.Option(
            "--config", is_eager=True, callback=read,
            help=f"YAML file of options by name, such as an output folder's {RUN_FILE}. Options of the command line win.",
        ),
    ]  # fmt: skip
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("options_file", kind, default=None, annotation=Config),
        inspect.Parameter("quiet", kind, default=False, annotation=Quiet),
        inspect.Parameter("verbose", kind, default=False, annotation=Verbose),
        inspect.Parameter("log_file", kind, default=None, annotation=Log),
    ]
    parameters = [p.replace(kind=kind) for p in inspect.signature(command, eval_str=True).parameters.values()]
    run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    return run


def _defaults(command: str, context: typer.Context, path: Path) -> dict[str, Any]:
    """The options in a file, by the names of the command's parameters."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"config: expected options by name in {str(path)!r}, got {shown(content)}")
    names, defaults = _names(context), dict[str, Any]()
    for name, value in content.items():
        if name == "command":
            if value != command:
                raise InputError(f"config: expected options of {command} in {str(path)!r}, got those of {shown(value)}")
        elif name not in names:
            raise InputError(f"config: expected some of {', '.join(names)} in {str(path)!r}, got {shown(name)}")
        elif value is not None:
            defaults[names[name].name] = _as_given(name, value, names[name])
    return defaults


def _as_given(name: str, value: Any, parameter: Any) -> Any:
    """A value of a file as the command line would give it: a list of numbers is text with commas."""
    if parameter.multiple or parameter.nargs != 1:
        parts = value if isinstance(value, list) else [value]
        if not any(isinstance(part, (dict, list)) for part in parts):
            return [str(part) for part in parts]
    elif isinstance(value, list) and not any(isinstance(part, (dict, list)) for part in value):
        # Labels may hold commas.
        return json.dumps(value) if name == "labels" else ",".join(str(part) for part in value)
    elif getattr(parameter, "is_flag", False):
        if isinstance(value, bool):
            return value
        raise InputError(f"config: expected true or false for {name}, got {shown(value)}")
    elif not isinstance(value, (dict, list)):
        return str(value)
    raise InputError(f"config: expected a number, a text or a list of them for {name}, got {shown(value)}")


def _run_file(context: typer.Context, command: str, options: Mapping[str, Any]) -> str:
    """The text of the file that repeats a command. Passwords in URLs are hidden."""
    names = {name: parameter for name, parameter in _names(context).items() if name not in _ONCE}
    given = {name: _plain(options[parameter.name]) for name, parameter in names.items()}
    document = {"command": command, **{name: value for name, value in given.items() if value is not None}}
    head = f"# secateur {command} --config {RUN_FILE} --out OTHER repeats this run.\n"
    return head + redacted(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000))


def _keep(out: str, text: str) -> None:
    """Write the file of a finished command into its output folder. `new_folder` has done so where it made the folder."""
    if "://" in out:
        from secateur.corpus.output import Folder

        Folder(out).write(RUN_FILE, text)
    elif Path(out).is_dir():
        write_atomically(Path(out) / RUN_FILE, text)


def _upload(out: str, repository: str, *, private: bool) -> None:
    """Upload a finished folder, and say where it is. Standard output stays as it is."""
    import secateur
    from secateur.cli.shared.output import say

    say(f"pushed to {secateur.push(out, repository, private=private)}")


def _command_line(context: typer.Context, command: str) -> str:
    """The command as it can be typed again: the options that are not the defaults. Passwords in URLs are hidden."""
    words, options = ["secateur", *command.split()], []
    for name, parameter in _names(context).items():
        if name in _ONCE:
            continue
        value = _plain(context.params.get(parameter.name))
        if parameter.param_type_name == "argument":
            words += [str(part) for part in (value if isinstance(value, list) else [value]) if part is not None]
        elif getattr(parameter, "is_flag", False):
            if value != parameter.default:
                options.append(f"--{name}" if value else (parameter.secondary_opts or [f"--no-{name}"])[0])
        elif value is not None and value != _plain(parameter.default):
            for part in value if isinstance(value, list) else [value]:
                options += [f"--{name}", str(part)]
    return redacted(shlex.join([*words, *options]))


def _plain(value: Any) -> Any:
    """An option's value as plain YAML."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _names(context: typer.Context) -> dict[str, Any]:
    """The command's options and arguments, by the names that they have in a file."""
    names = {}
    for parameter in context.command.params:
        if parameter.name not in _SHARED:
            long = [option for option in parameter.opts if option.startswith("--")]
            names[long[0][2:] if long else str(parameter.name)] = parameter
    return names
