"""The public surface: the names that users import, and an import that stays cheap."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import secateur

DOCUMENTED = [
    *["TextToText", "SequenceClassification", "TokenClassification", "CausalLM", "GradientActivation"],
    *["attribute", "plan", "prune", "prune_", "save", "load", "benchmark", "sites", "evaluate"],
    *["Scores", "Plan", "TaskPlans", "Site", "InputError", "verify", "factorise", "recover_", "cost"],
]


def loaded_by(code: str) -> set[str]:
    """The modules in a fresh process after some code."""
    code += "\nimport json, sys; print('MODULES' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(result.stdout.partition("MODULES")[2]))


def test_import_is_cheap() -> None:
    modules = loaded_by("import secateur")
    assert "secateur" in modules
    heavy = {"torch", "triton", "transformers", "datasets", "pyarrow", "matplotlib", "ray", "secateur.attribution"}
    assert not modules & heavy


def test_the_engine_needs_no_triton_and_no_models_until_one_is_loaded() -> None:
    modules = loaded_by("import secateur\nfor name in secateur.__all__: getattr(secateur, name)")
    assert "secateur.attribution" in modules
    # torch may import Triton's own module for its compiler; the engine's kernels may not.
    assert not {name for name in modules if name.startswith("secateur_kernels") and name.endswith((".triton", ".tiles"))}
    assert not {name for name in modules if name.startswith(("transformers.models.", "datasets", "matplotlib", "ray"))}


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(secateur, name).__doc__


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_public(name: str) -> None:
    assert name in secateur.__all__
    assert name in dir(secateur)


def test_all_is_sorted_and_without_repeats() -> None:
    assert secateur.__all__ == sorted(set(secateur.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        secateur.prunes  # noqa: B018


def test_version() -> None:
    assert secateur.__version__.count(".") == 2


def test_input_error_is_a_value_error() -> None:
    assert issubclass(secateur.InputError, ValueError)
