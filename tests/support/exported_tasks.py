"""Folders of models for a task to export: the cases of all families, dense, in a stock shape, or with layers that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import CASES, sentences
from torch import Tensor

import secateur
from secateur.model.discovery import fingerprint

# Families whose configs say no number of heads that differs from hidden size / head size.
_ALL_HEADS = ("bert", "roberta", "distilbert", "bart", "gpt2")


def task_folder(path: Path, name: str, shape: str, model: Any = None) -> Path:
    """Write the folder of a case's model, and return its path.

    Args:
        path: The folder.
        name: The name of the case.
        shape: "dense"; "stock", with half of the units; or "any", without heads in the first layer of each stack.
        model: The dense model, by default the case's.
    """
    case = CASES[name]
    model = model or case.model()
    if shape != "dense":
        sites, kept, generator = secateur.sites(model), {}, torch.Generator().manual_seed(0)
        for number, site in enumerate(sites):
            whole = site.is_head and name.startswith(_ALL_HEADS)
            count = site.units if whole else site.units // 2
            if shape == "any":
                count = 0 if site.is_head and site.layer == 0 else site.units - 1 - number % 3
            drawn = torch.randperm(site.units, generator=generator)[:count].sort().values
            # T5's layers share a table of positions, so a stock T5 keeps the same heads everywhere.
            kept[site.name] = torch.arange(count) if site.is_head and shape == "stock" else drawn
        model = secateur.prune(model, secateur.Plan(kept, tuple(sites), fingerprint(model)))
    assert hasattr(model.config, "secateur") == (shape == "any")
    secateur.save(model, path, task=case.task)
    return path


def padded_texts(name: str, inputs: list[str]) -> dict[str, Tensor]:
    """Return texts of several lengths as a padded batch of some inputs of a case's model."""
    encoded = CASES[name].task.reader(sentences(4, seed=5), padding=True, return_tensors="pt")
    batch = {key: encoded[key] for key in inputs if key in encoded}
    assert not batch["attention_mask"].all()
    if "decoder_input_ids" in inputs:
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 9]]).repeat(4, 1)
    return batch
