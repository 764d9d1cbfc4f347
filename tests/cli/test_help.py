"""The help of the command line: what it imports, what it lists, and examples that parse."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from secateur.cli.app import GROUPS, VERBS, Verb, app, load

ALL = [verb for verbs in VERBS.values() for verb in verbs]
WIDE = {"COLUMNS": "250"}
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
    shown = CliRunner().invoke(app, ["--help"], env=WIDE, catch_exceptions=False).output
    words = list(dict.fromkeys(verb.name.split()[0] for verb in ALL))
    assert words.index("attribute") < words.index("plan") < words.index("prune") < words.index("score")
    places = [shown.index(f"│ {word} ") for word in words]
    assert places == sorted(places)
    assert [shown.index(f"─ {panel} ─") for panel in VERBS] == sorted(shown.index(f"─ {panel} ─") for panel in VERBS)
    assert "--install-completion" in shown


@pytest.mark.parametrize("verb", ALL, ids=lambda verb: verb.name)
def test_the_example_of_a_verb_parses_and_is_shown(verb: Verb) -> None:
    words = shlex.split(verb.example)
    name = verb.name.split()
    assert words[: len(name)] == name
    context = load(verb).make_context(verb.name, words[len(name) :])  # Raises for options that are unknown or missing.
    assert context.params
    shown = CliRunner().invoke(app, [*name, "--help"], env=WIDE).output
    assert f"Example: secateur {verb.example}" in shown
    assert "--config" in shown


def test_the_help_of_each_group_lists_its_verbs() -> None:
    for group in GROUPS:
        shown = CliRunner().invoke(app, [group, "--help"], env=WIDE).output
        verbs = [verb for verb in ALL if verb.name.startswith(f"{group} ")]
        assert len(verbs) == 3
        assert all(f"│ {verb.name.split()[1]} " in shown and verb.about in shown for verb in verbs)


def test_an_option_that_a_verb_does_not_have_is_refused() -> None:
    result = CliRunner().invoke(app, ["sites", "builtin", "--flops", "0.5"])
    assert result.exit_code == 2
    assert "No such option: --flops" in result.output


def test_a_group_without_a_verb_prints_its_help_and_no_error() -> None:
    for words in ([], ["ldnet"]):
        result = subprocess.run([sys.executable, "-m", "secateur", *words], capture_output=True, text=True, timeout=300)
        assert result.returncode == 2
        assert "Usage:" in result.stdout + result.stderr
        assert "secateur:" not in result.stderr
