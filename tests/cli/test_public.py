"""The public surface: the names that users import, and an import that stays cheap."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import secateur
from secateur import learned
from secateur.learned.multitask.config import read_config, training_arguments
from secateur.support import trainer

DOCUMENTED = [
    *["TextToText", "SequenceClassification", "TokenClassification", "CausalLM", "GradientActivation"],
    *["attribute", "plan", "prune", "prune_", "save", "load", "benchmark", "sites", "evaluate"],
    *["Scores", "Plan", "TaskPlans", "Site", "InputError", "verify", "factorise", "recover_", "cost"],
]


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh process has loaded after running some code."""
    code += "\nimport json, sys; print('MODULES' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    return set(json.loads(result.stdout.partition("MODULES")[2]))


def test_import_is_cheap() -> None:
    modules = loaded_by("import secateur")
    assert "secateur" in modules
    heavy = {"torch", "triton", "transformers", "datasets", "pyarrow", "matplotlib", "ray", "secateur.attribution.attribute"}
    assert not modules & heavy


def test_the_engine_needs_no_triton_and_no_models_until_one_is_loaded() -> None:
    modules = loaded_by("import secateur\nfor name in vars(secateur)['__all__']: getattr(secateur, name)")
    assert "secateur.attribution.attribute" in modules
    # torch may import Triton for its compiler, but the engine may not import its Triton kernels.
    assert not {name for name in modules if name.startswith("secateur_kernels") and name.endswith((".triton", ".tiles"))}
    assert not {name for name in modules if name.startswith(("transformers.models.", "datasets", "matplotlib", "ray"))}


def test_import_of_learned_pruning_is_cheap() -> None:
    modules = loaded_by("import secateur.learned")
    assert "secateur.learned" in modules
    assert not modules & {"torch", "transformers", "datasets", "accelerate", "yaml", "secateur.learned.multitask.pruning"}


@pytest.mark.parametrize("name", vars(learned)["__all__"])
def test_learned_pruning_resolves_and_is_documented(name: str) -> None:
    assert getattr(learned, name).__doc__
    assert name in dir(learned)
    # A module of the same name would replace it when it is imported.
    assert find_spec(f"secateur.learned.{name}") is None


def test_the_package_that_training_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: builtin\ntasks: {domain: 'builtin:domain'}\ntraining: {max_steps: 1}\n")
    config, _ = read_config(tmp_path / "c.yaml")
    assert training_arguments(config, {"domain": 1}, tmp_path, "cpu").max_steps == 1
    monkeypatch.setattr(trainer, "is_accelerate_available", lambda: False)
    with pytest.raises(secateur.InputError, match=r"^accelerate: .*pip install 'secateur\[learned\]'$"):
        training_arguments(config, {"domain": 1}, tmp_path, "cpu")


@pytest.mark.parametrize("name", vars(secateur)["__all__"])
def test_every_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(secateur, name).__doc__


@pytest.mark.parametrize("package", [secateur, learned], ids=["secateur", "learned"])
def test_docstrings_tell_every_argument(package: ModuleType) -> None:
    """Google style: a line `name: ...` for every parameter of a public function or class."""
    untold = []
    for name in vars(package)["__all__"]:
        value = getattr(package, name)
        if isinstance(value, ModuleType) or value is secateur.InputError:
            continue
        text = inspect.getdoc(value) or ""
        for parameter in inspect.signature(value).parameters:
            if not re.search(rf"^\s+\*{{0,2}}{parameter}( \(.*\))?: \S", text, re.MULTILINE):
                untold.append(f"{name}: {parameter}")
    assert not untold


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_public(name: str) -> None:
    assert name in vars(secateur)["__all__"]
    assert name in dir(secateur)


def test_all_is_sorted_and_without_repeats() -> None:
    for package in (secateur, learned):
        assert package.__all__ == sorted(set(package.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    for package in (secateur, learned):
        with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'prunes'"):
            package.prunes  # noqa: B018


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert secateur.__version__ == project["version"]


def test_input_error_is_a_value_error() -> None:
    assert issubclass(secateur.InputError, ValueError)
