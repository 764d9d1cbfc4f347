"""Batches of drawn tokens, for timing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.images import image_shape, reads_images


def synthetic_batches(
    model: nn.Module, batch_sizes: Sequence[int], lengths: Sequence[int], *, target_length: int = 8
) -> list[dict[str, Tensor]]:
    """Unpadded batches of seeded random ids for each batch size and length, of seeded noise for each batch size where a model
    reads images; targets of `target_length` for a decoder that
    has an encoder. A decoder alone gives the last position's logits only, as in scoring and in the first step of
    generating."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found = []
    if reads_images(model):
        return [
            {"pixel_values": torch.randn(size, *image_shape(model), generator=generator).to(device)} for size in batch_sizes
        ]
    for size in batch_sizes:
        for length in lengths:
            ids = torch.randint(config.vocab_size, (size, length), generator=generator).to(device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if config.is_encoder_decoder:
                batch["decoder_input_ids"] = ids[:, :1].expand(-1, target_length).contiguous()
            elif "logits_to_keep" in inspect.signature(model.forward).parameters:
                batch["logits_to_keep"] = torch.tensor([-1], device=device)
            found.append(batch)
    return found


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of a timed forward pass: without a cache of keys and values, where the model would fill one."""
    caches = bool(getattr(model.config, "use_cache", False)) and hasattr(model, "generate")
    return {"use_cache": False} if caches else {}
