"""Folders from before the rebuilt modules held plain linear layers: their tensors have other names, and they load as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, emptied_plan, uneven_plan
from encoders import TASKS, encoder, logits, tokenizer, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur.learned.multitask import exporting
from secateur.model.discovery import fingerprint
from secateur.model.modeling import AroundLinear
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError

FLAT = ((".linear.weight", ".weight"), (".linear.bias", ".bias"), (".basis.weight", ".basis"))
CUTS: dict[str, Callable[[Case, nn.Module], nn.Module]] = {
    "channels": lambda case, model: secateur.prune(model, uneven_plan(case, "channel")),
    "emptied": lambda case, model: secateur.prune(model, emptied_plan(case, "channel")),
    "low-rank": lambda case, model: secateur.factorise(model, 0.6),
}


def make_older(path: Path, model: nn.Module) -> int:
    """Give the tensors of a file the names that they had in earlier versions, and return how many have others now."""
    tensors, changed = load_file(path), 0
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    for around in (name for name, module in model.named_modules() if isinstance(module, AroundLinear)):
        for new, old in FLAT:
            if "shapes" in metadata:
                metadata["shapes"] = metadata["shapes"].replace(f'"{around}{new}"', f'"{around}{old}"')
            for kind in ("", ".values", ".bits"):
                if around + new + kind in tensors:
                    tensors[around + old + kind] = tensors.pop(around + new + kind)
                    changed += 1
    save_file(tensors, path, metadata=metadata)
    return changed


def saved_as_older(model: nn.Module, folder: Path) -> Path:
    """Save a model, with the tensors' names of earlier versions."""
    secateur.save(model, folder)
    assert make_older(folder / "model.safetensors", model)
    return folder


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama", "gpt2"])
def test_an_older_folder_loads_bit_for_bit_and_is_saved_as_a_new_one(name: str, cut: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = CUTS[cut](case, case.model())
    loaded = secateur.load(saved_as_older(model, tmp_path / "old")).eval()
    assert torch.equal(case.logits(loaded), case.logits(model))
    secateur.save(loaded, tmp_path / "new")
    inside = {name for name, _ in model.named_parameters() if ".linear." in name or ".basis." in name}
    assert load_file(tmp_path / "new" / "model.safetensors").keys() >= inside
    assert torch.equal(case.logits(secateur.load(tmp_path / "new").eval()), case.logits(model))


def test_an_older_folder_of_a_base_model_loads(tmp_path: Path) -> None:
    """The recipe's paths begin with "bert.", and the names of the tensors do not."""
    case = CASES["bert-sequence"]
    base: Any = CUTS["channels"](case, case.model()).bert
    loaded = secateur.load(saved_as_older(base, tmp_path / "old")).state_dict()
    assert loaded.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in base.state_dict().items())


def test_an_older_folder_in_several_files_loads(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = CUTS["channels"](case, case.model())
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    files = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    assert len(files) > 1
    assert sum(make_older(path, model) for path in files)
    for new, old in FLAT:
        text = text.replace(f'{new}"', f'{old}"')
    index.write_text(text)
    assert torch.equal(case.logits(secateur.load(tmp_path).eval()), case.logits(model))


def test_an_older_sparse_file_loads(tmp_path: Path) -> None:
    pruning = trained(encoder("bert-sequence"), TASKS, method="movement", granularity="rank", density=0.2)
    exported = exporting.export(pruning)
    exporting.save(exported, tmp_path / "out", tokenizer=tokenizer("bert-sequence"), sparse=True)
    assert make_older(tmp_path / "out" / exporting.ENCODER / "model.safetensors", exported.encoder)
    assert make_older(tmp_path / "out" / exporting.SPARSE, exported.encoder)
    for sparse in (False, True):
        outputs, expected = logits(exporting.load(tmp_path / "out", sparse=sparse)), logits(exported)
        assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)


def test_a_folder_with_old_and_new_names_is_refused(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = CUTS["channels"](case, case.model())
    secateur.save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".linear.weight"))
    stray = name.replace(".linear.weight", ".weight")
    save_file({**tensors, stray: tensors[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"^model: expected a checkpoint of .* with {stray}, which the model would leave out"):
        secateur.load(tmp_path / "out")


# What the code before the change gives for these models: fingerprints of scores and plans, and the identity of a scoring run.
RECORDED = {
    "channels": ("180721ec7e7a7b3d", "e610225643d1587e"),
    "low-rank": ("22f84e50fe5d3357", "2bb3d8bde7ee15ce"),
}


@pytest.mark.parametrize("cut", RECORDED)
def test_fingerprints_and_digests_are_those_of_earlier_versions(cut: str) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number / 64)
    if cut == "low-rank":
        pruned = secateur.factorise(model, 0.6)
        with torch.no_grad():  # Singular vectors may differ in their last bits from machine to machine.
            for parameter in pruned.parameters():
                parameter.fill_(0.5)
    else:
        pruned = CUTS[cut](case, model)
    assert (fingerprint(pruned), weights_digest(pruned)) == RECORDED[cut]
