"""Inputs that an exported model is tried with, and its weights in a narrower dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.exporting.base import Source
from secateur.exporting.decoder import rounded
from secateur.model.images import image_shape, reads_images
from secateur.model.positions import positions
from secateur.tasks.logits import require_fixed, takes_segments

# Batch sizes and lengths. The first is the example that an exporter sees: other ones prove that the sizes stayed free.
SIZES = ((3, 10), (1, 1), (2, 7), (5, 33), (1, 160))


def dynamic_shapes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Return shapes for torch.export: a free batch size, and for token ids a free length."""
    from torch.export import Dim

    free = {name: 1 if name == "pixel_values" else 2 for name in inputs}
    return {name: dict.fromkeys(range(dimensions), Dim.DYNAMIC) for name, dimensions in free.items()}


def require(model: Any, tokenizer: Any) -> None:
    """Refuse a model that no graph of fixed operations follows, as `require_fixed` does, with any tokenizer."""
    require_fixed(model)


def inputs_of(source: Source) -> list[dict[str, Tensor]]:
    """Return random inputs of the sizes `SIZES`, with padding where the tokenizer puts it.

    Args:
        source: The model.

    Returns:
        Keyword arguments of `Logits`.
    """
    model: Any = source.model
    generator = torch.Generator().manual_seed(0)
    if reads_images(model):
        return [{"pixel_values": torch.randn(size, *image_shape(model), generator=generator)} for size, _ in SIZES]
    most = positions(model) or max(length for _, length in SIZES)
    return [_texts(source, size, min(length, most), generator) for size, length in SIZES]


def _texts(source: Source, size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of random tokens: the first text fills it, the others are padded."""
    model: Any = source.model
    config = model.config
    known = set(source.tokenizer.get_vocab().values()) - set(source.tokenizer.all_special_ids)
    plain = torch.tensor(sorted(number for number in known if number < config.vocab_size))
    ids = plain[torch.randint(len(plain), (size, length), generator=generator)]  # [size, length]
    lengths = torch.tensor([max(1, length - 3 * row) for row in range(size)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    if getattr(source.tokenizer, "padding_side", "right") == "left":
        mask = mask.flip(1)
    ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    # A graph that asks for segments needs a tokenizer that gives them.
    if takes_segments(model) and "token_type_ids" in source.tokenizer.model_input_names:
        inputs["token_type_ids"] = (torch.arange(length) > length // 2).long().repeat(size, 1)
    if config.is_encoder_decoder:
        target = plain[torch.randint(len(plain), (size, length // 2 + 1), generator=generator)]
        target[:, 0] = config.decoder_start_token_id
        inputs["decoder_input_ids"] = target
    return inputs


def exactly(numbers: Any, dtype: Any) -> Any:
    """Return an array in a narrower dtype of NumPy, None where that does not hold all its numbers.

    Rounded weights are such numbers. Rotary frequencies are not: rounding them moved logits by 1e-4 at 160 tokens.
    """
    with np.errstate(over="ignore"):
        narrow = numbers.astype(dtype)
    return narrow if (narrow.astype(numbers.dtype) == numbers).all() else None


def round_(source: Source) -> None:
    """Round the weights of a source in place to the values that its dtype holds.

    Raises:
        InputError: A finite value becomes infinite.
    """
    for parameter in source.model.parameters():
        parameter.data = rounded(parameter.data, source.dtype).float()
