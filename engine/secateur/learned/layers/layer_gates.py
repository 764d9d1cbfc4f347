"""LayerGates: a gate on what each layer adds to the residual stream, which learns whether the task needs the layer."""

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
    """Selection of layers by learned gates: LD-Net (Liu et al. 2018, arXiv 1804.07827) on today's transformers, where what it
    has by dense connectivity, layers that can be left out, comes from the residual stream: x <- x + z_l f_l(x).

    The model is gated where it is, not copied: `detach`, or the end of a with statement, takes the gates off and puts flags and
    modes back. Weights that were fine-tuned meanwhile stay so. `secateur.learned.layer_training.train` trains both.
    model: of a known family. keep_layers: lambda_1, how many gates should stay open. unit: "block" has a gate for each block,
    which its branches share; "branch" one for each self-attention, cross-attention and FFN.
    regularisation: "R1", "R2" or "R3" (see `layer_regularisers`). strength: lambda_0, its weight in the loss. R3 pulls a gate z
    by 2 lambda_0 (1 - z), so that a weak one leaves more than keep_layers open in the end: `left` tells which. warmup: the
    share of the steps of training before it counts. drop: the probability that a training pass leaves a block's contribution
    out, without any rescaling (LayerDrop, Fan et al. 2020, arXiv 1909.11556). frozen: the gates alone learn.
    `z` [gates] holds the gates, in the order of `names`, in float32 at least.
    Raises InputError: a number of layers that the model does not have, unknown settings, an unknown family.
    """

    accepts_loss_kwargs = False  # Tells the Trainer that the loss is a mean, over which it averages accumulated steps itself.
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
        paths = [
            [(contribution(model, branch).path, f"{branch.stack}.{branch.layer}") for branch in of] for of in gated.values()
        ]
        self._gate_of = {path: number for number, of in enumerate(paths) for path, _ in of}
        # LayerDrop drops whole blocks, whatever has a gate of its own.
        names = list(dict.fromkeys(block for of in paths for _, block in of))
        self._block_of = {path: names.index(block) for of in paths for path, block in of}
        self._dropped = [False] * len(names)
        self._modes = {module: module.training for module in model.modules()}
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._handles: list[RemovableHandle] = []
        self.training = model.training
        self._attach()

    @property
    def values(self) -> dict[str, float]:
        """The gates by name."""
        return dict(zip(self.names, self.z.detach().tolist(), strict=True))

    @property
    def left(self) -> list[str]:
        """The names whose gates are not zero."""
        return [name for name, value in self.values.items() if value != 0]

    @property
    def attached(self) -> bool:
        """Whether the model is gated: not after `detach`."""
        return bool(self._handles)

    def forward(self, **batch: Any) -> Any:
        """The model's own output; with labels and in training, its loss is that of the task + lambda_0 R."""
        output = self.model(**batch)
        if self.training and output.get("loss") is not None:
            output["loss"] = output["loss"] + self.penalty()
        return output

    def penalty(self) -> Tensor:
        """lambda_0 R(z), with lambda_0 as it is at this step of the training."""
        return self.active * regulariser(self.regularisation, self.z, self.keep_layers)

    def at_step_(self, step: int, steps: int) -> None:
        """Sets lambda_0 for the steps after `step` of `steps`: zero in the first stage, its value in the second."""
        self.active = 0.0 if step < self.warmup * steps else self.strength

    @torch.no_grad()
    def project_(self) -> None:
        """Puts the gates back into [0, 1] after an optimizer's step.

        With R3, a step does not leave fewer than keep_layers of them open: of those that it would close, the largest open to 1
        again. (The indicator alone stops the shrinking only after the step that has gone too far; and a gate that stayed where
        it was, near 0, would keep a layer that does nothing.)
        """
        clamped = self.z.clamp(0, 1)
        missing = self.keep_layers - int(clamped.count_nonzero())
        if self.regularisation == "R3" and missing > 0:
            closing = (clamped == 0) & (self.previous > 0)
            order = self.z.masked_fill(~closing, -torch.inf).argsort(descending=True, stable=True)
            held = order[: min(missing, int(closing.sum()))]
            clamped[held] = 1
        self.z.copy_(clamped)
        self.previous.copy_(clamped)

    @torch.no_grad()
    def close_smallest_(self) -> list[str]:
        """Closes the smallest gates while more than keep_layers are open, and returns their names."""
        opened = self.left
        closing = sorted(opened, key=self.values.__getitem__)[: max(0, len(opened) - self.keep_layers)]
        for name in closing:
            self.z[self.names.index(name)] = 0
        return closing

    def parameter_groups(self, learning_rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
        """The groups of an optimizer: the "gates", which have no decay, and the "weights", of which matrices decay."""
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [self.z], "name": "gates", "weight_decay": 0.0},
            {"params": [p for p in weights if p.dim() > 1], "name": "weights", "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "name": "weights", "weight_decay": 0.0},
        ]
        return [{**group, "lr": learning_rates[str(group["name"])]} for group in groups if group["params"]]

    def export(self) -> nn.Module:
        """A new model, in eval mode, without the layers whose gates are zero, and with the other gates within its weights: it
        computes what the gated model computes in eval mode. The gated one stays as it is."""
        gone = [name for name, value in self.values.items() if value == 0]
        scales = {name: value for name, value in self.values.items() if value != 0}
        with self.off():
            return delete_layers(self.model, gone, scales=scales).eval()

    def settings(self) -> dict[str, Any]:
        """What tells this selection from another, as JSON."""
        names = ("keep_layers", "unit", "regularisation", "strength", "warmup", "drop", "frozen")
        return {name: getattr(self, name) for name in names}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is without gates; afterwards they are as they were."""
        attached = self.attached
        self._remove()
        try:
            yield
        finally:
            if attached:
                self._attach()

    def detach(self) -> None:
        """Takes the gates off the model: its hooks, its flags and modes are as they were. The gates' values stay here."""
        self._remove()
        for module, mode in self._modes.items():
            module.training = mode

    def __enter__(self) -> LayerGates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _attach(self) -> None:
        self._handles = attach(self.model, {path: partial(self._through, path) for path in self._gate_of})
        self._handles.append(self.model.register_forward_pre_hook(self._draw))
        if self.frozen:
            for parameter in self._flags:
                parameter.requires_grad_(False)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    def _through(self, path: str, added: Tensor) -> Tensor:
        gate = self._gate_of[path]
        gated = times(added, self.z[gate : gate + 1])
        return torch.zeros_like(gated) if self._dropped[self._block_of[path]] else gated

    def _draw(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Which blocks this forward pass drops."""
        chances = torch.rand(len(self._dropped)) if self.drop and self.model.training else torch.ones(len(self._dropped))
        self._dropped = (chances < self.drop).tolist()


def _require(gates: int, keep_layers: int, regularisation: str, strength: float, warmup: float, drop: float) -> None:
    """Raises InputError for settings that do not fit a model with so many gates."""
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int) or not 1 <= keep_layers <= gates:
        raise InputError(f"keep_layers: expected a number from 1 to the model's {gates}, got {keep_layers!r}")
    if regularisation not in REGULARISERS:
        raise InputError(f"regularisation: expected one of {', '.join(REGULARISERS)}, got {regularisation!r}")
    if not strength >= 0:
        raise InputError(f"strength: expected a number of at least 0, got {strength}")
    for name, share in (("warmup", warmup), ("drop", drop)):
        if not 0 <= share < 1:
            raise InputError(f"{name}: expected a share in [0, 1), got {share}")
