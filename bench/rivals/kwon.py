"""Kwon et al. 2022: heads and filters chosen by their Fisher information under a FLOPs budget, then masks tuned by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import secateur
from bench.support.budgeted import all_flops, plan_of, unit_flops
from secateur.attribution.criteria import GradientActivation
from secateur.model.branches import Branch
from secateur.model.discovery import branches_of, sites
from secateur.model.families import branches
from secateur.model.hooks import replaced
from secateur.model.sites import Site
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Batch, Task
from secateur.tasks.batches import model_device

Stage = Literal["search", "rearrangement", "tuning"]
CRITERION = GradientActivation(target="log_probability", over_examples="signed")
DAMP, RANGE = 1.0, 10.0  # Of the least squares, and of the tuned masks (Sec. 4.3, Sec. 5).


def kwon(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    flops: float,
    *,
    stage: Stage = "tuning",
    scores: secateur.Scores | None = None,
) -> nn.Module:
    """The model pruned to this share of its layers' FLOPs as in arXiv 2204.09656, up to and with the given stage.

    Written from the paper, with what an encoder-decoder needs added: heads cost more in one place than in another there, so
    units are ranked by information per FLOP, which is the paper's ranking where all cost the same. Each layer keeps one head
    and one filter at least, as a layer without is not built here. scores: those that `gate_gradients` returns.
    """
    if stage not in get_args(Stage):
        raise ValueError(f"stage: expected one of {', '.join(get_args(Stage))}, got {stage!r}")
    scores = scores or gate_gradients(model, task, rows)
    kept = searched(scores, flops)
    if stage != "search":
        kept = {site: rearranged(_gradients(scores, site), units) for site, units in kept.items()}
    pruned = secateur.prune(model, plan_of(scores, kept, secateur.Budget("flops", flops)))
    if stage == "tuning":
        tune_(pruned, model, task, rows)
    return pruned


def gate_gradients(model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]]) -> secateur.Scores:
    """Scores whose `per_example` are the gradients of each example's -log p at the masks, but for the sign."""
    return secateur.attribute(model, task, rows, criterion=CRITERION, per_example=True)


def searched(scores: secateur.Scores, flops: float) -> dict[Site, Tensor]:
    """The mask search: the least sum of the removed units' diagonal Fisher information within the budget (Sec. 4.1, Alg. 1).

    For each number of heads the most filters that the budget leaves room for, either kind from the most informative down.
    """
    budget, kept = flops * all_flops(scores), {site: torch.zeros(site.units, dtype=torch.bool) for site in scores.sites}
    information = {site: _gradients(scores, site).square().mean(0) for site in scores.sites}
    for site, values in information.items():
        kept[site][values.argmax()] = True
        budget -= unit_flops(site, scores)
    if budget < 0:
        raise secateur.InputError(f"flops: expected more than one unit of each site costs, got {flops}")
    heads = _by_worth(scores, {s: v for s, v in information.items() if s.kind != "ffn"}, kept)
    filters = _by_worth(scores, {s: v for s, v in information.items() if s.kind == "ffn"}, kept)
    of_heads, of_filters = _sums(heads), _sums(filters)
    affordable = int((of_heads[0] <= budget).sum())
    counts = torch.searchsorted(of_filters[0], budget - of_heads[0][:affordable], right=True) - 1
    best = int((of_heads[1][:affordable] + of_filters[1][counts]).argmax())  # Most kept is least removed.
    for site, unit, _, _ in [*heads[:best], *filters[: int(counts[best])]]:
        kept[site][unit] = True
    return {site: mask.nonzero().flatten() for site, mask in kept.items()}


Unit = tuple[Site, int, float, float]  # With its cost and its information.


def _by_worth(scores: secateur.Scores, information: Mapping[Site, Tensor], kept: Mapping[Site, Tensor]) -> list[Unit]:
    """The units that are not kept yet, those with the most information per FLOP first."""
    found = [
        (site, unit, unit_flops(site, scores), value)
        for site, values in information.items()
        for unit, value in enumerate(values.tolist())
        if not kept[site][unit]
    ]
    return sorted(found, key=lambda each: -each[3] / each[2])


def _sums(units: Sequence[Unit]) -> Tensor:
    """[2, n + 1]: cost and information of the first 0, 1, ... n units."""
    sums = torch.tensor([[cost, value] for _, _, cost, value in units], dtype=torch.float64).reshape(-1, 2).cumsum(0)
    return torch.cat([torch.zeros(1, 2, dtype=torch.float64), sums]).T.contiguous()


def _gradients(scores: secateur.Scores, site: Site) -> Tensor:
    """Float64 [examples, units]."""
    if scores.per_example is None:
        raise ValueError("scores: expected those of each example")
    return scores.per_example[site.name].double()


def rearranged(gradients: Tensor, kept: Tensor, rounds: int = 10) -> Tensor:
    """The mask rearrangement: as many units of one layer, with (1 - m)' I (1 - m) less, I being the Fisher information of the
    layer's masks with all that is off the diagonal (Sec. 4.2): one removed unit after the other is exchanged for the kept one
    that lowers it most, from the mask search's solution on, until no exchange does."""
    fisher = gradients.T @ gradients / len(gradients)
    diagonal, removed = fisher.diagonal(), torch.ones(len(fisher), dtype=torch.bool)
    removed[kept] = False
    pull = fisher @ removed.double()  # I (1 - m).
    for _ in range(rounds):
        before = removed.clone()
        for unit in before.nonzero().flatten().tolist():
            removed[unit] = False
            pull -= fisher[unit]
            other = int((2 * pull + diagonal).masked_fill(removed, torch.inf).argmin())
            removed[other] = True
            pull += fisher[other]
        if torch.equal(before, removed):
            break
    return (~removed).nonzero().flatten()


def tune_(pruned: nn.Module, model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]], max_tokens: int = 4096) -> int:
    """The mask tuning: layer after layer the kept units' masks m that minimise |x + layer(x; m) - x' - layer(x'; 1)|^2, x and
    x' being what the pruned and the dense layer read (Sec. 4.3), put into the columns of the out-projection. Returns how many
    layers were tuned: at the first one whose masks leave [-10, 10] the tuning stops, as in the paper.

    That was never seen in BERT. In T5 it is the decoder's first FFN, whose few positions are too much alike to tell hundreds of
    filters apart; to pass over that layer and tune those above it was no better in seven comparisons (mean accuracy .691
    against .707: the tasks domain, movie and negation).

    The least squares are in m - 1, damped as LSMR damps, but solved by their normal equations. A classifier reads the last
    layer at its first token alone, so its last filters are fitted there.
    """
    batches = list(task.batches(task.items(model, [dict(row) for row in rows]), model_device(model), max_tokens))
    found = branches_of(pruned, sites(pruned))
    last = list(found.values())[-1]
    has_encoder_below = {branch.stack for branch in found.values()} == {"encoder", "decoder"}
    with undisturbed(model), undisturbed(pruned), torch.no_grad():
        wanted, prefix = _streams(model, task, batches), _Prefix(pruned, task, batches)
        for tuned, (site, branch) in enumerate(found.items()):
            layer, port = pruned.get_submodule(branch.output), branch.cut_at(site.unit)[-1]
            parameter = layer.get_parameter("weight")
            weight, moments, crossed = parameter.double(), [], []
            for k, batch in enumerate(batches):
                real = batch.real(target=branch.stack == "decoder" and has_encoder_below)
                if branch is last and isinstance(task, secateur.SequenceClassification):
                    real = torch.zeros_like(real).index_fill_(1, torch.tensor(0), True)
                inputs, residual = (seen[real] for seen in prefix.reached(k, branch))
                missing = wanted[branch.name][k][real] - residual - layer(inputs)  # b - A 1.
                moments.append((inputs.T @ inputs).double())
                crossed.append((missing.T @ inputs).double())
            # Column i of A is what unit i alone gives: <A_i, A_j> is the sum over both units' channels of W'W * H'H.
            normal = port.map.fold(port.map.fold(weight.T @ weight * torch.stack(moments).sum(0)).T)
            right = port.map.fold((weight * torch.stack(crossed).sum(0)).sum(0))
            masks = 1 + torch.linalg.solve(normal + DAMP**2 * torch.eye(len(normal), dtype=torch.float64), right)
            if not bool((masks.abs() <= RANGE).all()):
                return tuned
            parameter.mul_(port.map.expand(masks).to(parameter.dtype))
    return len(found)


class _Reached(Exception):
    """The forward pass has come to where it is needed."""


class _Prefix:
    """Forward passes of batches up to a branch's out-projection. Blocks whose branches are all tuned return what they returned,
    so that a pass runs one block or two."""

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._blocks: list[str] = []
        self._returned: dict[tuple[str, int], Any] = {}

    def reached(self, k: int, branch: Branch) -> tuple[Tensor, Tensor]:
        """In batch k what the branch's out-projection reads, and the stream that its output is added to [B, T, ...]."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Reached

        block = _block(branch)
        if block not in self._blocks:
            self._blocks.append(block)
        forwards, handles = {}, [self._model.get_submodule(branch.output).register_forward_pre_hook(reached)]
        for path in self._blocks[:-1]:
            if (path, k) in self._returned:
                forwards[path] = partial(self._recall, path, k)
            else:
                handles.append(self._model.get_submodule(path).register_forward_hook(partial(self._keep, path, k)))
        try:
            with suppress(_Reached), _residuals(self._model, [branch]) as residuals, replaced(self._model, forwards):
                self._task.logits(self._model, self._batches[k])
        finally:
            for handle in handles:
                handle.remove()
        return seen[0], residuals[branch.name][0]

    def _keep(self, path: str, k: int, module: nn.Module, arguments: Any, output: Any) -> None:
        self._returned[path, k] = output

    def _recall(self, path: str, k: int, *arguments: Any, **options: Any) -> Any:
        return self._returned[path, k]


def _block(branch: Branch) -> str:
    """The path of the layer that a branch is in: of BERT's encoder.layer.0, of T5's encoder.block.0."""
    found = re.match(r"(.*?\b(?:layer|block)\.\d+)\.", branch.output)
    if found is None:
        raise ValueError(f"{branch.output} is in no layer")
    return found[1]


def _streams(model: nn.Module, task: Task, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """By branch, for each batch: the stream with the branch's output added [B, T, d_model]."""
    found = list(branches(model).values())
    outputs: dict[str, list[Tensor]] = {branch.name: [] for branch in found}
    handles = [
        model.get_submodule(branch.output).register_forward_hook(
            lambda module, arguments, output, name=branch.name: outputs[name].append(output)
        )
        for branch in found
    ]
    try:
        with _residuals(model, found) as residuals:
            for batch in batches:
                task.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [r + u for r, u in zip(residuals[name], each, strict=True)] for name, each in outputs.items()}


@contextmanager
def _residuals(model: nn.Module, found: Sequence[Branch]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, what each branch's output is added to is written down, pass by pass.

    It is the second argument of the module that holds BERT's out-projection, and the first of the layer that holds T5's
    attention or FFN.
    """
    seen: dict[str, list[Tensor]] = {branch.name: [] for branch in found}
    levels, argument = {"bert": (1, 1), "t5": (2, 0)}[model.config.model_type]  # type: ignore[union-attr, index]
    handles = []
    for branch in found:
        layer = model.get_submodule(branch.output.rsplit(".", levels)[0])

        def keep(module: nn.Module, arguments: tuple[Any, ...], name: str = branch.name) -> None:
            seen[name].append(arguments[argument])

        handles.append(layer.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
