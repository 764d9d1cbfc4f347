"""LayerGates: a trainable gate on the output that a layer adds to the residual stream. It learns if the task needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.learned.shared.gate_regularisers import REGULARISERS, Regulariser, regulariser
from secateur.model.blocks import LayerUnit, attach, contribution, layers, times
from secateur.pruning.delete_layers import delete_layers
from secateur.support.errors import InputError


class LayerGates(nn.Module):
    """Select layers by learned gates: LD-Net's method on transformers.

    LD-Net can leave layers out because its layers are densely connected. In a transformer the residual stream allows the same:
    x <- x + z_l f_l(x), where z_l is the gate of layer l.

    The gates work on the given model itself, not on a copy. `detach`, or the end of a with statement, removes the gates and
    restores the requires_grad flags and the train or eval modes. Fine-tuned weights keep their new values.
    `secateur.learned.layers.layer_training.train` trains the gates and the weights.

    Args:
        model: A model of a known family.
        keep_layers: How many gates should stay open, the paper's lambda_1.
        unit: "block" gives each block one gate, which its branches share. "branch" gives one gate to each self-attention,
            cross-attention and FFN.
        regularisation: "R1", "R2" or "R3"; see `secateur.learned.shared.gate_regularisers`.
        strength: The weight of the regularisation in the loss, the paper's lambda_0. R3 changes a gate z with the gradient
            2 lambda_0 (1 - z), so a small strength can leave more than keep_layers gates open. `left` lists the open gates.
        warmup: The share of the training steps before the regularisation counts, in [0, 1).
        drop: The probability that a training pass leaves out a block's contribution, without rescaling (LayerDrop), in [0, 1).
        frozen: Train only the gates.

    Attributes:
        z: The gates [gates] in the order of `names`, at least in float32.
        names: The names of the gated layers.

    Raises:
        InputError: The model has fewer layers than keep_layers, a setting is unknown or out of range, or the family is unknown.

    References:
        Liu et al. 2018, arXiv 1804.07827, section 3.2 (gates and regularisers).
        Fan et al. 2020, arXiv 1909.11556 (LayerDrop).
    """

    accepts_loss_kwargs = False  # The loss is a mean, so the Trainer itself must average it over accumulated steps.
    previous: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        keep_layers: int,
        unit: LayerUnit = "block",
        regularisation: Regulariser = "R3",
        strength: float = 0.05,
        warmup: float = 0.25,
        drop: float = 0.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        gated = layers(model, unit)
        _require(len(gated), keep_layers, regularisation, strength, warmup, drop)
        self.model, self.keep_layers, self.unit, self.frozen = model, keep_layers, unit, frozen
        self.regularisation, self.strength, self.warmup, self.drop = regularisation, strength, warmup, drop
        self.names = list(gated)
        self.active = strength
        like = next(model.parameters())
        start = torch.ones(len(gated), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.z = nn.Parameter(start)
        self.register_buffer("previous", start.clone(), persistent=False)
        # For each gate, the module path and the block of each of its branches.
        paths = [
            [(contribution(model, branch).path, f"{branch.stack}.{branch.layer}") for branch in gate_branches]
            for gate_branches in gated.values()
        ]
        self._gate_of = {path: number for number, gate_paths in enumerate(paths) for path, _ in gate_paths}
        # LayerDrop drops whole blocks, also when the unit is the branch.
        blocks = list(dict.fromkeys(block for gate_paths in paths for _, block in gate_paths))
        self._block_of = {path: blocks.index(block) for gate_paths in paths for path, block in gate_paths}
        self._dropped = [False] * len(blocks)
        self._modes = {module: module.training for module in model.modules()}
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._handles: list[RemovableHandle] = []
        self.training = model.training
        self._attach()

    @property
    def values(self) -> dict[str, float]:
        """The gates' values by layer name."""
        return dict(zip(self.names, self.z.detach().tolist(), strict=True))

    @property
    def left(self) -> list[str]:
        """The names of the layers whose gates are not zero."""
        return [name for name, value in self.values.items() if value != 0]

    @property
    def attached(self) -> bool:
        """True while the gates are on the model, False after `detach`."""
        return bool(self._handles)

    def forward(self, **batch: Any) -> Any:
        """Run the gated model.

        Args:
            batch: Keyword arguments of the model's forward pass.

        Returns:
            The model's own output. In training and with labels, its loss is the task's loss + lambda_0 R(z).
        """
        output = self.model(**batch)
        if self.training and output.get("loss") is not None:
            output["loss"] = output["loss"] + self.penalty()
        return output

    def penalty(self) -> Tensor:
        """Compute lambda_0 R(z), a scalar, with the lambda_0 of the current training step."""
        return self.active * regulariser(self.regularisation, self.z, self.keep_layers)

    def at_step_(self, step: int, steps: int) -> None:
        """Set lambda_0 for the steps that follow: 0 during warm-up, then `strength`.

        Args:
            step: The number of steps done.
            steps: The total number of steps.
        """
        self.active = 0.0 if step < self.warmup * steps else self.strength

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp the gates to [0, 1] after an optimizer step.

        With R3, a step never leaves fewer than keep_layers gates open. If a step closes too many, the largest of the gates that
        it closes open again, to 1. There are two reasons. R3's indicator stops the shrinking only after the step that went too
        far. And a gate that stayed at its old value near 0 would keep a layer that does nothing.
        """
        clamped = self.z.clamp(0, 1)
        missing = self.keep_layers - int(clamped.count_nonzero())
        if self.regularisation == "R3" and missing > 0:
            closing = (clamped == 0) & (self.previous > 0)
            order = self.z.masked_fill(~closing, -torch.inf).argsort(descending=True, stable=True)
            reopened = order[: min(missing, int(closing.sum()))]
            clamped[reopened] = 1
        self.z.copy_(clamped)
        self.previous.copy_(clamped)

    @torch.no_grad()
    def close_smallest_(self) -> list[str]:
        """Close the smallest gates until only keep_layers gates are open.

        Returns:
            The names of the layers whose gates were closed, smallest gate first.
        """
        open_names = self.left
        closing = sorted(open_names, key=self.values.__getitem__)[: max(0, len(open_names) - self.keep_layers)]
        for name in closing:
            self.z[self.names.index(name)] = 0
        return closing

    def parameter_groups(self, learning_rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
        """Build the optimizer's parameter groups.

        Args:
            learning_rates: The learning rates of the groups "gates" and "weights".
            weight_decay: The decay of weight matrices. Gates and vectors have none.

        Returns:
            The groups that are not empty, each with "params", "name", "lr" and "weight_decay".
        """
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [self.z], "name": "gates", "weight_decay": 0.0},
            {"params": [p for p in weights if p.dim() > 1], "name": "weights", "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "name": "weights", "weight_decay": 0.0},
        ]
        return [{**group, "lr": learning_rates[str(group["name"])]} for group in groups if group["params"]]

    def export(self) -> nn.Module:
        """Build a model without the closed layers, with the other gates multiplied into its weights.

        Returns:
            A new model in eval mode. It computes the same outputs as the gated model in eval mode, which stays unchanged.
        """
        closed = [name for name, value in self.values.items() if value == 0]
        scales = {name: value for name, value in self.values.items() if value != 0}
        with self.off():
            return delete_layers(self.model, closed, scales=scales).eval()

    def settings(self) -> dict[str, Any]:
        """Return the settings of this selection as JSON values by name."""
        names = ("keep_layers", "unit", "regularisation", "strength", "warmup", "drop", "frozen")
        return {name: getattr(self, name) for name in names}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Remove the gates inside the with statement, and restore them after it."""
        attached = self.attached
        self._remove()
        try:
            yield
        finally:
            if attached:
                self._attach()

    def detach(self) -> None:
        """Remove the gates' hooks from the model and restore its flags and modes. `z` keeps the gates' values."""
        self._remove()
        for module, mode in self._modes.items():
            module.training = mode

    def __enter__(self) -> LayerGates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _attach(self) -> None:
        """Put the gates on the model; freeze its parameters if `frozen`."""
        self._handles = attach(self.model, {path: partial(self._apply_gate, path) for path in self._gate_of})
        self._handles.append(self.model.register_forward_pre_hook(self._draw_dropped))
        if self.frozen:
            for parameter in self._flags:
                parameter.requires_grad_(False)

    def _remove(self) -> None:
        """Remove the hooks and restore the requires_grad flags."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    def _apply_gate(self, path: str, added: Tensor) -> Tensor:
        """Multiply a branch's contribution [B, T, D] by its gate; return zeros if LayerDrop drops its block."""
        gate = self._gate_of[path]
        gated = times(added, self.z[gate : gate + 1])  # [B, T, D]
        return torch.zeros_like(gated) if self._dropped[self._block_of[path]] else gated

    def _draw_dropped(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Draw the blocks that this forward pass drops."""
        samples = torch.rand(len(self._dropped)) if self.drop and self.model.training else torch.ones(len(self._dropped))
        self._dropped = (samples < self.drop).tolist()


def _require(gates: int, keep_layers: int, regularisation: str, strength: float, warmup: float, drop: float) -> None:
    """Raise InputError if the settings do not fit a model with this number of gates."""
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int) or not 1 <= keep_layers <= gates:
        raise InputError(f"keep_layers: expected a number from 1 to the model's {gates}, got {keep_layers!r}")
    if regularisation not in REGULARISERS:
        raise InputError(f"regularisation: expected one of {', '.join(REGULARISERS)}, got {regularisation!r}")
    if not strength >= 0:
        raise InputError(f"strength: expected a number of at least 0, got {strength}")
    for name, share in (("warmup", warmup), ("drop", drop)):
        if not 0 <= share < 1:
            raise InputError(f"{name}: expected a share in [0, 1), got {share}")
