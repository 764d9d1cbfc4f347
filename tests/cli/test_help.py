"""The help of the command line: what it imports, what it lists, and examples that parse."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from secateur.cli.app import REPRODUCED, VERBS, Verb, app, load

ALL = [verb for verbs in VERBS.values() for verb in verbs] + REPRODUCED
HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "matplotlib", "pandas", "secateur.model")


@pytest.mark.parametrize("arguments", ["['--help']", "['--version']", "['reproduce', '--help']"])
def test_help_imports_no_heavy_package(arguments: str) -> None:
    code = f"""
import sys
sys.argv[1:] = {arguments}
import atexit
atexit.register(lambda: print("imported", *[name for name in {HEAVY} if name in sys.modules]))
from secateur.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.splitlines()[-1].strip() == "imported"


def test_the_help_lists_the_verbs_in_the_order_of_the_flow() -> None:
    shown = CliRunner().invoke(app, ["--help"], terminal_width=200, catch_exceptions=False).output
    places = [shown.index(f"│ {verb.name} ") for verbs in VERBS.values() for verb in verbs]
    assert places == sorted(places)
    assert [shown.index(panel) for panel in VERBS] == sorted(shown.index(panel) for panel in VERBS)
    assert "--install-completion" in shown


@pytest.mark.parametrize("verb", ALL, ids=lambda verb: verb.example.split(" --")[0])
def test_the_example_of_a_verb_parses(verb: Verb) -> None:
    words = shlex.split(verb.example)
    command = load(verb)
    words = words[2:] if words[0] == "reproduce" else words[1:]
    if verb.target.endswith(":app"):
        name, command, words = command.resolve_command(command.make_context(verb.name, list(words)), list(words))
        assert name == "train-lm"
    context = command.make_context(verb.name, list(words))  # Unknown or missing options raise an exception.
    assert not [value for value in context.params.values() if value is ...]
    shown = CliRunner().invoke(app, [*verb.example.split()[: 2 if words and verb in REPRODUCED else 1], "--help"]).output
    assert verb.example.split()[-1].split("/")[-1] in shown or verb.target.endswith(":app")


def test_an_option_that_a_verb_does_not_have_is_refused() -> None:
    result = CliRunner().invoke(app, ["sites", "builtin", "--flops", "0.5"])
    assert result.exit_code == 2
    assert "No such option: --flops" in result.output
