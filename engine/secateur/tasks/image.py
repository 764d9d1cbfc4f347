"""Image classification: one class for each image. An image's tokens are its patches; all are real, so nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.model.images import image_shape, image_tokens
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import Batch, Item
from secateur.tasks.classification import Classification


@dataclass(frozen=True)
class ImageItem(Item):
    """One example.

    Attributes:
        image: The image as it was given.
        patches: The number of tokens that the model makes of any image.
    """

    image: Any = field(default=None, repr=False)
    patches: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that the model makes of the image."""
        return self.patches

    @property
    def content(self) -> bytes:
        """All that tells one item from another: the pixels, or the bytes of the file, among it."""
        image = self.image
        pixels = Path(image).read_bytes() if isinstance(image, (str, Path)) else np.asarray(image).tobytes()
        return super().content + pixels


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images [B, channels, height, width] as `inputs["pixel_values"]`.

    Attributes:
        tokens: The number of tokens of each image.
    """

    tokens: int = 0

    @property
    def length(self) -> int:
        """The number of tokens of each image."""
        return self.tokens

    def real(self, *, target: bool) -> Tensor:
        """Return which tokens [B, T] are no padding: all."""
        return torch.ones(len(self.rows), self.tokens, dtype=torch.bool, device=self.inputs["pixel_values"].device)


class ImageClassification(Classification):
    """One class for each image.

    An example's image is a PIL image, an array or tensor of numbers 0 to 255, [height, width, channels] or [channels, height,
    width], or the path of a file. Its target is a class name or number. Images are read and processed batch by batch. The
    metric is accuracy.

    Args:
        processor: The model's image processor (`AutoImageProcessor`).
        labels: The class names: the model's own (config.id2label, the default) in any order, or others in the order of the
            model's outputs.
        max_length: Not for images, which are never cut.
        columns: The columns of the data by the task's columns, such as {"image": "img", "target": "label"}.

    Raises:
        InputError: A max_length, or fewer than two different labels.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "target")
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    name: ClassVar[str] = "image-classification"
    reader_class: ClassVar[str] = "AutoImageProcessor"

    def __init__(
        self,
        processor: Any,
        *,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        if max_length is not None:
            raise InputError(f"max_length: expected none for images, which are never cut, got {max_length}")
        super().__init__(processor, labels=labels, columns=columns)

    @property
    def processor(self) -> Any:
        """The model's image processor."""
        return self.reader

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' images as items without targets.

        Raises:
            InputError: An example without an image, or a processor that makes images of another shape than the model takes.
        """
        for number, example in enumerate(examples, start=1):
            _require_image(example["image"], number)
        shape = tuple(self._pixels([examples[0]["image"]]).shape[1:])  # (channels, height, width)
        if shape != image_shape(model):
            expected, got = (" x ".join(map(str, sizes)) for sizes in (image_shape(model), shape))
            raise InputError(f"processor: expected images of {expected}, as the model takes them, got {got}")
        patches = image_tokens(model)
        return [ImageItem(row, [], [], example["image"], patches) for row, example in enumerate(examples)]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return the items' images as one batch. All have the same number of tokens, so `length` changes nothing."""
        pixels = self._pixels([item.image for item in items if isinstance(item, ImageItem)]).to(device)
        rows = [item.row for item in items]
        return ImageBatch({"pixel_values": pixels}, torch.empty(len(items), 0), rows, tokens=items[0].tokens)

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        """Return what the model reads [B, channels, height, width]."""
        from PIL import Image

        mode, opened = "L" if len(self.processor.image_mean) == 1 else "RGB", []
        for image in images:
            if isinstance(image, (str, Path)):
                with Image.open(image) as file:
                    opened.append(file.convert(mode))
            else:
                opened.append(image.convert(mode) if isinstance(image, Image.Image) else image)
        pixels: Tensor = self.processor(images=opened, return_tensors="pt")["pixel_values"]
        return pixels


def _require_image(image: Any, number: int) -> None:
    """Raise InputError for a value that is no image. Only the head of a file is read."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image):
                return
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(
                f"examples, row {number}: expected an image file, got {str(image)!r} ({first_line(error)})"
            ) from error
    shaped = isinstance(image, (np.ndarray, Tensor)) and image.ndim == 3
    if not shaped and not isinstance(image, Image.Image):
        got = f"{type(image).__name__} of {image.ndim} dimensions" if hasattr(image, "ndim") else type(image).__name__
        raise InputError(f"examples, row {number}: expected a PIL image, an array of 3 dimensions or a path, got {got}")
