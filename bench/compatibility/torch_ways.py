"""PyTorch and transformers alone: loading without secateur, torch.compile, torch.export."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from typing import Any

import torch

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome, differences, dynamic_shapes, logits_of, ratio, run, same_outputs, timed


def without_secateur(folder: Folder) -> Outcome:
    """Load with `AutoModel...from_pretrained` in a process without secateur.

    The logits must equal the saved model's bit for bit.
    """
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] in ("secateur", "secateur_kernels"))
    if loaded:
        return Outcome("fails", f"secateur was imported: {loaded[0]}")
    model = folder.load()
    outputs = run(lambda **inputs: model(**inputs).logits, folder)
    how = "stock class" if folder.stock else "trust_remote_code=True"
    if all(torch.equal(output, saved) for output, (_, saved) in zip(outputs, folder.batches(), strict=True)):
        return Outcome("works", f"{how}; logits bit for bit those of the saved model")
    return same_outputs(differences(model, folder, outputs), how)


def saved_again(folder: Folder) -> Outcome:
    """Call `save_pretrained` on the model that transformers loaded, as after fine-tuning.

    The new folder must give the same bits.
    """
    model: Any = folder.load()
    saved_folder = replace(folder, path=folder.path / "again")
    model.save_pretrained(saved_folder.model)
    reloaded = saved_folder.load()
    outputs = [run(lambda loaded=loaded, **inputs: loaded(**inputs).logits, folder) for loaded in (model, reloaded)]
    if not all(torch.equal(first, second) for first, second in zip(*outputs, strict=True)):
        return Outcome("fails", "the second folder's logits are others")
    extra = {path.name for path in saved_folder.model.iterdir() if path.suffix == ".py"}
    return Outcome("works", f"the same logits{', and the modelling file goes along' if extra else ''}")


def compiled(folder: Folder) -> Outcome:
    """Compile the whole forward pass as one graph for any batch size and length."""
    if shutil.which("g++") is None:
        return Outcome("not tried", "needs a C++ compiler (g++)")
    model: Any = folder.load()
    module = logits_of(model, folder)
    fast = torch.compile(module, fullgraph=True, dynamic=True)
    outputs = run(fast, folder)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    inputs, _ = folder.batches()[0]
    with torch.inference_mode():
        times = timed(lambda: module(**inputs), lambda: fast(**inputs))
    note = f"no graph break, {graphs} graph{'s' * (graphs > 1)} for two batches of other sizes; {ratio(times)}"
    return same_outputs(differences(model, folder, outputs), note, graphs=graphs, **times)


def exported_strict(folder: Folder) -> Outcome:
    """Export with torch.export in strict mode."""
    return _exported(folder, strict=True)


def exported(folder: Folder) -> Outcome:
    """Export with torch.export in non-strict mode."""
    return _exported(folder, strict=False)


def _exported(folder: Folder, *, strict: bool) -> Outcome:
    """Export with a free batch size and length, save, load, and compare outputs."""
    model: Any = folder.load()
    inputs, _ = folder.batches()[0]
    program = torch.export.export(logits_of(model, folder), (), inputs, dynamic_shapes=dynamic_shapes(inputs), strict=strict)
    path = folder.path / "exported.pt2"
    torch.export.save(program, path)
    outputs = run(torch.export.load(path).module(), folder)
    path.unlink()
    return same_outputs(differences(model, folder, outputs))
