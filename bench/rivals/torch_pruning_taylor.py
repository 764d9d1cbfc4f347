"""Torch-Pruning (Fang et al. 2023) with its Taylor importance on a BERT classifier, under a budget of its layers' FLOPs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import secateur
from bench.support.budgeted import layer_flops
from secateur.tasks import Task
from secateur.tasks.batches import model_device

PROBES = 7  # Steps of the bisection of the pruning ratio.
# The reason why T5 has no numbers (torch-pruning 1.6.1, transformers 5.23).
T5 = (
    "self-attention stays whole: a group that removes its heads would have to cut the shared table of relative positions, "
    "which has a column for each head, and is left out, or ends in an IndexError in prune_out_channels where that table is "
    "not ignored; under the global ranking the model no longer runs, as layers of cross-attention then differ in heads"
)


def torch_pruning(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    flops: float,
    tokens: Mapping[str, float],
    *,
    ranking: str = "local",
    hidden: bool = False,
    max_tokens: int = 4096,
) -> nn.Module:
    """Return the model pruned by torch_pruning.BasePruner with its GroupTaylorImportance.

    The pruning ratios are the smallest that leave at most the budget. Heads are removed whole (num_heads, prune_num_heads). The
    setup is that of the package's own example for BERT.

    Args:
        model: The dense BERT classifier.
        task: The task.
        rows: The calibration examples.
        flops: The budget, as a share of the layers' FLOPs.
        tokens: The mean lengths, as in `Scores`.
        ranking: "local": the same ratio everywhere. "global": one ranking for all layers.
        hidden: Prune d_model at the same ratio too, as the package does by default. Otherwise only neurons and heads are
            pruned.
        max_tokens: The largest number of tokens in a batch.

    Raises:
        InputError: No ratio meets the budget and leaves every layer.
    """
    # Frozen parameters would have no gradient, and the importance needs one.
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in task.batches(task.items(model, [dict(row) for row in rows]), model_device(model), max_tokens):
        (-task.target(model, batch, "log_probability").sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
    example = dict(batch.inputs)
    budget, best, head_ratio, high = flops * layer_flops(model, tokens), None, None, 1.0
    # The first search uses one ratio for all dimensions. A model has few heads, so part of the budget stays unused. The second
    # search keeps the heads' ratio and lowers the other ratio until the budget is used.
    for _ in range(2):
        low = 0.0
        for _ in range(PROBES):
            ratio = (low + high) / 2
            candidate = _pruned(model, example, ratio, ratio if head_ratio is None else head_ratio, ranking, hidden)
            if candidate is not None and layer_flops(candidate, tokens) > budget:
                low = ratio
            else:
                high = ratio
                best = best if candidate is None else candidate
        head_ratio = high
    if best is None:
        raise secateur.InputError(f"flops: torch-pruning finds no {ranking} ratio that leaves {flops} and every layer")
    return best.requires_grad_(False)


def _pruned(
    model: nn.Module, example: dict[str, Any], ratio: float, head_ratio: float, ranking: str, hidden: bool
) -> nn.Module | None:
    """Return the pruned copy, or None if a layer would be removed whole, because the model then does not run."""
    import torch_pruning as tp
    from transformers.models.bert.modeling_bert import BertSelfAttention

    copied: Any = copy.deepcopy(model)
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.grad = original.grad  # copy.deepcopy does not copy gradients.
    attentions = [module for module in copied.modules() if isinstance(module, BertSelfAttention)]
    ignored = [copied.bert.pooler, copied.classifier]
    if not hidden:
        layers = list(copied.bert.encoder.layer)
        ignored += [copied.bert.embeddings, *(layer.attention.output for layer in layers), *(layer.output for layer in layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            copied,
            example,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=ranking == "global",
            pruning_ratio=ratio,
            num_heads={
                layer: attention.num_attention_heads
                for attention in attentions
                for layer in (attention.query, attention.key, attention.value)
            },
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=head_ratio,
            ignored_layers=ignored,
            output_transform=lambda output: output.logits.sum(),
        )
        pruner.step()
    for attention in attentions:
        heads = pruner.num_heads[attention.query]
        if heads < 1 or attention.query.out_features < heads:
            return None
        attention.num_attention_heads, attention.all_head_size = heads, attention.query.out_features
        attention.attention_head_size = attention.all_head_size // heads
    try:
        with torch.no_grad():
            copied(**example)
    except (RuntimeError, ValueError):
        return None
    pruned: nn.Module = copied
    return pruned
