"""Torch-Pruning (Fang et al. 2023) with its Taylor importance on a BERT classifier, at a budget of its layers' FLOPs."""

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

PROBES = 7  # Bisections of the pruning ratio.
# Why there are no numbers for T5 (torch-pruning 1.6.1, transformers 5.23).
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
    """The model pruned by torch_pruning.BasePruner with GroupTaylorImportance as it comes, at the smallest ratios that leave no
    more than this share of the layers' FLOPs; heads go whole (num_heads, prune_num_heads), set up as the package's own example
    for BERT is.

    ranking: "local", the same ratio everywhere, or "global". hidden: d_model is cut at the same ratio too, as the package does
    by itself; otherwise neurons and heads alone. tokens: as in `Scores`.
    """
    # Frozen parameters would have no gradient to weigh.
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in task.batches(task.items(model, [dict(row) for row in rows]), model_device(model), max_tokens):
        (-task.target(model, batch, "log_probability").sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
    example = dict(batch.inputs)
    budget, best, head_ratio, high = flops * layer_flops(model, tokens), None, None, 1.0
    # One ratio for all first. Heads are few, so that leaves room: the other ratio alone then fills it.
    for _ in range(2):
        low = 0.0
        for _ in range(PROBES):
            ratio = (low + high) / 2
            found = _pruned(model, example, ratio, ratio if head_ratio is None else head_ratio, ranking, hidden)
            if found is not None and layer_flops(found, tokens) > budget:
                low = ratio
            else:
                high = ratio
                best = best if found is None else found
        head_ratio = high
    if best is None:
        raise secateur.InputError(f"flops: torch-pruning finds no {ranking} ratio that leaves {flops} and every layer")
    return best.requires_grad_(False)


def _pruned(
    model: nn.Module, example: dict[str, Any], ratio: float, head_ratio: float, ranking: str, hidden: bool
) -> nn.Module | None:
    """None where a layer would go whole, which leaves a model that doesn't run."""
    import torch_pruning as tp
    from transformers.models.bert.modeling_bert import BertSelfAttention

    made: Any = copy.deepcopy(model)
    for parameter, original in zip(made.parameters(), model.parameters(), strict=True):
        parameter.grad = original.grad  # A copied parameter is without.
    attentions = [module for module in made.modules() if isinstance(module, BertSelfAttention)]
    ignored = [made.bert.pooler, made.classifier]
    if not hidden:
        layers = list(made.bert.encoder.layer)
        ignored += [made.bert.embeddings, *(layer.attention.output for layer in layers), *(layer.output for layer in layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            made,
            example,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=ranking == "global",
            pruning_ratio=ratio,
            num_heads={layer: each.num_attention_heads for each in attentions for layer in (each.query, each.key, each.value)},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=head_ratio,
            ignored_layers=ignored,
            output_transform=lambda output: output.logits.sum(),
        )
        pruner.step()
    for each in attentions:
        heads = pruner.num_heads[each.query]
        if heads < 1 or each.query.out_features < heads:
            return None
        each.num_attention_heads, each.all_head_size = heads, each.query.out_features
        each.attention_head_size = each.all_head_size // heads
    try:
        with torch.no_grad():
            made(**example)
    except (RuntimeError, ValueError):
        return None
    pruned: nn.Module = made
    return pruned
