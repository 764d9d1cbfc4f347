"""Batches of random tokens or images, for timing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.images import image_shape, reads_images
from secateur.support.errors import InputError


def synthetic_batches(
    model: nn.Module, batch_sizes: Sequence[int], lengths: Sequence[int], *, target_length: int = 8
) -> list[dict[str, Tensor]]:
    """Make unpadded batches of random inputs, from a fixed seed.

    There is one batch of random token ids for each batch size and length. A model that reads images gets one batch of noise for
    each batch size. A decoder without an encoder computes the logits of the last position only, as in scoring and in the first
    step of generation.

    Args:
        model: The model that the batches are for.
        batch_sizes: Numbers of examples.
        lengths: Numbers of input tokens.
        target_length: Decoder tokens of a model that has an encoder and a decoder.

    Returns:
        Keyword arguments of the model, on its device.

    Raises:
        InputError: As in `require_lengths`.
    """
    require_lengths(model, lengths)
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batches = []
    if reads_images(model):
        return [
            {"pixel_values": torch.randn(size, *image_shape(model), generator=generator).to(device)} for size in batch_sizes
        ]
    for size in batch_sizes:
        for length in lengths:
            ids = torch.randint(config.vocab_size, (size, length), generator=generator).to(device)  # [size, length]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if config.is_encoder_decoder:
                batch["decoder_input_ids"] = ids[:, :1].expand(-1, target_length).contiguous()
            elif "logits_to_keep" in inspect.signature(model.forward).parameters:
                batch["logits_to_keep"] = torch.tensor([-1], device=device)
            batches.append(batch)
    return batches


def require_lengths(model: nn.Module, lengths: Sequence[int], name: str = "lengths") -> None:
    """Check that a model has as many positions as the inputs to be timed have tokens.

    RoBERTa and its kin number positions from behind the padding id, so they have fewer than their table has rows.

    Args:
        model: The model. A model that reads images takes any lengths.
        lengths: Numbers of input tokens.
        name: The argument that the message begins with.

    Raises:
        InputError: A length exceeds the positions.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int) or reads_images(model):
        return
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, int(module.num_embeddings) - int(module.padding_idx) - 1)
    if max(lengths) > positions:
        raise InputError(f"{name}: expected at most the model's {positions} positions, got {max(lengths)}")


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments for timed passes that switch off the cache of keys and values, where a model would fill it."""
    caches = bool(getattr(model.config, "use_cache", False)) and hasattr(model, "generate")
    return {"use_cache": False} if caches else {}
