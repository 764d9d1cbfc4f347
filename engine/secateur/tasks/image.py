"""Image classification: one class for each image, whose tokens are its patches; all are real, so nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.model.images import image_shape, image_tokens
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import Batch, Item, in_order, model_device
from secateur.tasks.sequence import SequenceClassification, class_names, class_number


@dataclass(frozen=True)
class ImageItem(Item):
    """One example: its image as it was given, and the tokens that the model makes of any."""

    image: Any = field(default=None, repr=False)
    patches: int = 0

    @property
    def tokens(self) -> int:
        return self.patches

    @property
    def content(self) -> bytes:
        image = self.image
        pixels = Path(image).read_bytes() if isinstance(image, (str, Path)) else np.asarray(image).tobytes()
        return super().content + pixels


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images [B, channels, height, width] as `inputs["pixel_values"]`; tokens: those of each."""

    tokens: int = 0

    @property
    def length(self) -> int:
        return self.tokens

    def real(self, *, target: bool) -> Tensor:
        return torch.ones(len(self.rows), self.tokens, dtype=torch.bool, device=self.inputs["pixel_values"].device)


class ImageClassification(SequenceClassification):
    """processor: the model's image processor (`AutoImageProcessor`). labels: the class names in the order of the model's
    outputs; by default the model's own (config.id2label).

    An example's image is a PIL image, an array or tensor of numbers 0 to 255, [height, width, channels] or [channels, height,
    width], or the path of a file; its target a class name or number. Images are read and processed batch by batch. Metric:
    accuracy.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "target")
    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    def __init__(self, processor: Any, *, labels: Sequence[str] | None = None, max_length: int | None = None) -> None:
        if max_length is not None:
            raise InputError(f"max_length: expected none for images, which are never cut, got {max_length}")
        super().__init__(processor, labels=labels)

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        names = class_names(model, self.labels)
        if all_labels:
            return self._items(model, examples, [list(range(len(names)))] * len(examples))
        targets = [class_number(names, e["target"], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return self._items(model, examples, [[target] for target in targets])

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        return replace(self.collate_inputs(items, device), labels=torch.tensor([item.target for item in items], device=device))

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        pixels = self._pixels([item.image for item in items if isinstance(item, ImageItem)]).to(device)
        rows = [item.row for item in items]
        return ImageBatch({"pixel_values": pixels}, torch.empty(len(items), 0), rows, tokens=items[0].tokens)

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        items = self._items(model, examples, [[-1]] * len(examples))
        batches = self.batches(items, model_device(model), max_tokens)
        found = [(self.label_scores(model, batch), batch.rows) for batch in batches]
        return in_order([scores for scores, _ in found], [row for _, rows in found for row in rows])

    def encode(self, inputs: list[str]) -> list[list[int]]:
        raise InputError("task: expected one of texts, got ImageClassification")

    def _items(self, model: nn.Module, examples: Sequence[Example], targets: Sequence[list[int]]) -> list[Item]:
        """An item for each example and target."""
        for number, example in enumerate(examples, start=1):
            _require_image(example["image"], number)
        given = tuple(self._pixels([examples[0]["image"]]).shape[1:])
        if given != image_shape(model):
            wanted, made = (" x ".join(map(str, shape)) for shape in (image_shape(model), given))
            raise InputError(f"processor: expected images of {wanted}, as the model takes them, got {made}")
        patches = image_tokens(model)
        return [
            ImageItem(row, [], [target], example["image"], patches)
            for row, (example, of_row) in enumerate(zip(examples, targets, strict=True))
            for target in of_row
        ]

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        """What the model reads [B, channels, height, width]."""
        from PIL import Image

        mode, opened = "L" if len(self.tokenizer.image_mean) == 1 else "RGB", []
        for image in images:
            if isinstance(image, (str, Path)):
                with Image.open(image) as file:
                    opened.append(file.convert(mode))
            else:
                opened.append(image.convert(mode) if isinstance(image, Image.Image) else image)
        pixels: Tensor = self.tokenizer(images=opened, return_tensors="pt")["pixel_values"]
        return pixels


def _require_image(image: Any, number: int) -> None:
    """Raises InputError for what is no image. Of a file only the head is read."""
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
        came = f"{type(image).__name__} of {image.ndim} dimensions" if hasattr(image, "ndim") else type(image).__name__
        raise InputError(f"examples, row {number}: expected a PIL image, an array of 3 dimensions or a path, got {came}")
