"""The inputs of out-projections: what several methods measure in one pass over the calibration examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.discovery import branches_of
from secateur.model.hooks import observed
from secateur.model.sites import Site
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Task
from secateur.tasks.batches import model_device


def each_input(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    chosen: Sequence[Site],
    add: Callable[[Site, Tensor], None],
) -> None:
    """Run a model on examples, and call `add` with each site and the inputs of its out-projection.

    Args:
        model: The model.
        task: The task.
        rows: The examples.
        chosen: The sites.
        add: Gets the inputs of the real tokens of a batch, float64 [tokens, channels].
    """
    ports = {branch.cut_at(site.unit)[-1]: site for site, branch in branches_of(model, chosen).items()}
    has_encoder = any(site.stack == "encoder" for site in chosen)

    def add_real(site: Site, real: Tensor, activation: Tensor) -> None:
        add(site, activation[real].double())

    with undisturbed(model), torch.no_grad():
        for batch in task.batches(task.items(model, [dict(row) for row in rows]), model_device(model), 4096):
            real = {stack: batch.real(target=stack == "decoder" and has_encoder) for stack in ("encoder", "decoder")}
            with observed(model, {port: partial(add_real, site, real[site.stack]) for port, site in ports.items()}):
                task.logits(model, batch)
