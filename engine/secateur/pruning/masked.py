"""The masked model, which specifies what the pruned model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.model.branches import Port
from secateur.model.discovery import scored_ports
from secateur.model.hooks import intercepted
from secateur.model.ordinary import require_uncompiled
from secateur.model.removed_blocks import skipped
from secateur.planning.plan import Plan, as_plan
from secateur.pruning.keep_blocks import removed_branches


@contextmanager
def masked(model: nn.Module, plan: Plan | str | Path) -> Iterator[None]:
    """A context in which the units that the plan removes have activation zero: the specification of the pruned model.

    A block that the plan removes returns its input.

    Args:
        model: The dense model. It is as before after the context.
        plan: The plan, or the path of its file. Its sites are sites of this model.

    Raises:
        InputError: The plan names a site that the model does not have, or removes blocks that the model cannot lose; or the
            model is compiled.

    Example:
        `with secateur.masked(model, plan): logits = model(**inputs).logits`
    """

    require_uncompiled(model)
    plan = as_plan(plan)
    removed_branches(model, plan)  # Checks the blocks.

    def transform(port: Port, kept: Tensor, units: int) -> Callable[[Tensor], Tensor]:
        mask = torch.zeros(units)
        mask[kept] = 1
        channels = port.map.expand(mask)
        return lambda activation: activation * channels.to(activation)

    transforms = {
        port: transform(port, plan[site.name], site.units)
        for site, ports in scored_ports(model, plan.sites).items()
        for port in ports
        if site.block not in plan.removed_blocks and len(plan[site.name]) < site.units
    }
    with skipped(model, plan.removed_blocks), intercepted(model, transforms):
        yield
