"""Batches of random tokens or images, for timing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.images import image_shape, reads_images
from secateur.model.ordinary import require_model
from secateur.model.positions import positions
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown
from secateur.tasks.model_config import end_mark

# The largest batch size and length: a typing error must not take all memory.
MOST = {"batch_sizes": 1 << 16, "lengths": 1 << 20}


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
        target_length: Decoder tokens of a model that has an encoder and a decoder and reads its target there.

    Returns:
        Keyword arguments of the model, on its device.

    Raises:
        InputError: A number is no whole number, below 1 or above that of `MOST`; or as in `require_lengths`.
    """
    for name, sizes in (("batch_sizes", batch_sizes), ("lengths", lengths)):
        if not isinstance(sizes, Sequence) or isinstance(sizes, (str, bytes)):
            raise InputError(f"{name}: expected a sequence of numbers, got {shown(sizes)}")
        for size in sizes:
            require_count(name, size, most=MOST[name])
    require_model(model)
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
            if (end := end_mark(model)) is not None:  # A classifier, whose decoder runs over the input.
                batch["input_ids"] = _ended_once(ids, end, config.pad_token_id)
            elif config.is_encoder_decoder:
                batch["decoder_input_ids"] = ids[:, :1].expand(-1, target_length).contiguous()
            elif "logits_to_keep" in inspect.signature(model.forward).parameters:
                batch["logits_to_keep"] = torch.tensor([-1], device=device)
            batches.append(batch)
    return batches


def _ended_once(ids: Tensor, end: int, other: int) -> Tensor:
    """Return the ids with the end mark at the end of each row, and nowhere else."""
    ended: Tensor = ids.masked_fill(ids == end, other)
    ended[:, -1] = end
    return ended


def require_lengths(model: nn.Module, lengths: Sequence[int], name: str = "lengths") -> None:
    """Check that a model has as many positions as the inputs to be timed have tokens.

    Args:
        model: The model. A model that reads images takes any lengths.
        lengths: Numbers of input tokens.
        name: The argument that the message begins with.

    Raises:
        InputError: A length exceeds the positions.
    """
    most = None if reads_images(model) else positions(model)
    if most is not None and max(lengths) > most:
        raise InputError(f"{name}: expected at most the model's {most} positions, got {max(lengths)}")


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments for timed passes that switch off the cache of keys and values, where a model would fill it."""
    caches = bool(getattr(model.config, "use_cache", False)) and hasattr(model, "generate")
    return {"use_cache": False} if caches else {}
