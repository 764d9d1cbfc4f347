"""Models that read images: the shape of an image and the number of its tokens."""

from __future__ import annotations

from typing import Any

from torch import nn


def reads_images(model: nn.Module) -> bool:
    """Return whether a model's input is an image and not text."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return the channels, the height and the width of the images that a model takes."""
    config: Any = model.config
    return (config.num_channels, *_pair(config.image_size))


def image_tokens(model: nn.Module) -> int:
    """Return the number of tokens of an image: its patches, and one token that stands for the whole image."""
    config: Any = model.config
    (height, width), (down, across) = _pair(config.image_size), _pair(config.patch_size)
    return (height // down) * (width // across) + 1


def fixed_length(model: nn.Module) -> int | None:
    """Return the number of tokens of every example, where the model makes them: of an image; None where texts have them."""
    return image_tokens(model) if reads_images(model) else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
