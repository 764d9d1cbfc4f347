"""Image classification: one class for each image. An image's tokens are its patches; all are real, so nothing is padded."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
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
from secateur.tasks.batches import Batch, Encoded, Item, UnreadableError
from secateur.tasks.classification import Classification


@dataclass(frozen=True)
class ImageItem(Item):
    """One example.

    Attributes:
        image: The image as it was given.
        patches: The number of tokens that the model makes of any image.
        shape: The channels, the height and the width of the images that the model takes.
    """

    image: Any = field(default=None, repr=False)
    patches: int = 0
    shape: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of tokens that the model makes of the image."""
        return self.patches

    @property
    def content(self) -> bytes:
        """All that tells one item from another: the pixels, or the bytes of the file, among it."""
        source = _source(self.image)
        if source is None:
            return super().content + np.asarray(self.image).tobytes()
        return super().content + (source.read() if isinstance(source, io.BytesIO) else Path(source).read_bytes())


@dataclass(frozen=True)
class EncodedImage(Encoded):
    """An image of a corpus.

    Attributes:
        image: The image as it was given.
        shape: As in `ImageItem`.
    """

    image: Any = field(default=None, kw_only=True, repr=False)
    shape: tuple[int, ...] = field(default=(), kw_only=True)

    def item(self, row: int) -> ImageItem:
        """Return the image as the item of a row, without a target."""
        return ImageItem(row, [], [], self.image, self.tokens, self.shape)


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
    width], the path of a file, its bytes, or a mapping with `bytes` or `path`, as `datasets` stores images. Its target is a
    class name or number. Images are read and processed batch by batch. The metric is accuracy.

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

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every classification; or the processor makes images of another shape than the model takes.
        """
        super().require_fit(model)
        shape = tuple(self._pixels([_blank(model)], [0]).shape[1:])  # (channels, height, width)
        if shape != image_shape(model):
            expected = _sizes(image_shape(model))
            raise InputError(f"processor: expected images of {expected}, as the model takes them, got {_sizes(shape)}")

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' images as items without targets.

        Raises:
            InputError: An example without an image, or a model that does not fit the task.
        """
        self.require_fit(model)
        for number, example in enumerate(examples, start=1):
            if (reason := self.why_no_input(example["image"])) is not None:
                raise InputError(f"examples, row {number}: {reason}")
        patches, shape = image_tokens(model), image_shape(model)
        return [ImageItem(row, [], [], example["image"], patches, shape) for row, example in enumerate(examples)]

    def why_no_input(self, value: Any) -> str | None:
        """Return why a value cannot be an input, as in `Task`. Only the head of a file is read."""
        return _why_no_image(value)

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return images as they are: they are read batch by batch."""
        patches, shape = image_tokens(model), image_shape(model)
        return [EncodedImage([], patches, image=image, shape=shape) for image in inputs]

    def blank(self, model: nn.Module, length: int) -> Item:
        """Return a black image as an item."""
        return ImageItem(0, [], [], _blank(model), image_tokens(model), image_shape(model))

    def room(self, model: nn.Module) -> int | None:
        """Return the number of tokens of any image."""
        return image_tokens(model)

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return the items' images as one batch. All have the same number of tokens, so `length` changes nothing."""
        of_images, rows = [item for item in items if isinstance(item, ImageItem)], [item.row for item in items]
        pixels = self._pixels([item.image for item in of_images], rows, of_images[0].shape).to(device)
        return ImageBatch({"pixel_values": pixels}, torch.empty(len(items), 0), rows, tokens=items[0].tokens)

    def _pixels(self, images: Sequence[Any], rows: Sequence[int], shape: tuple[int, ...] = ()) -> Tensor:
        """Return what the model reads of the images of some rows: [B, channels, height, width].

        Args:
            images: The images.
            rows: Their rows.
            shape: The shape that the model takes; none to accept what the processor makes.

        Raises:
            UnreadableError: An image cannot be read, or the processor cannot take it, or makes another shape of it.
        """
        mode = "L" if np.shape(self.processor.image_mean) == (1,) else "RGB"
        opened = [_read(image, mode, row) for image, row in zip(images, rows, strict=True)]
        reason = None
        try:
            pixels: Tensor = self.processor(images=opened, return_tensors="pt")["pixel_values"]
            if shape and tuple(pixels.shape[1:]) != shape:
                reason = f"the processor makes {_sizes(pixels.shape[1:])} of it, and the model takes {_sizes(shape)}"
        except MemoryError:
            raise
        except Exception as error:  # An image has four channels or NaN, for example, or the images are not of one shape.
            reason = f"the processor cannot take it: {first_line(error)}"
        if reason is None:
            return pixels
        if len(images) == 1:
            raise UnreadableError(rows[0], f"image: {reason}")
        return torch.cat([self._pixels([image], [row], shape) for image, row in zip(images, rows, strict=True)])


def _sizes(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))


def _blank(model: nn.Module) -> Any:
    """A black image of the size that the model takes."""
    channels, height, width = image_shape(model)
    return np.zeros((height, width, channels), dtype=np.uint8)


def _source(image: Any) -> Any:
    """What Pillow opens: the path of a file, or its bytes as a stream; None for an image in memory and for anything else.

    A mapping has the bytes of a file or its path, as the `Image` columns of `datasets` store them.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return io.BytesIO(image)
    return image if isinstance(image, (str, Path)) else None


def _opened(image: Any, mode: str) -> Any:
    """The image that the processor takes, in a mode of Pillow, and turned as its EXIF orientation says.

    Raises whatever Pillow raises if its file cannot be read.
    """
    from PIL import Image, ImageOps

    source = _source(image)
    if source is None:
        return ImageOps.exif_transpose(image).convert(mode) if isinstance(image, Image.Image) else image
    with Image.open(source) as file:
        return ImageOps.exif_transpose(file).convert(mode)


def _read(image: Any, mode: str, row: int) -> Any:
    """Return `_opened` of the image of a row. Raises UnreadableError if its file cannot be read."""
    try:
        return _opened(image, mode)
    except MemoryError:  # Fewer images may fit.
        raise
    except Exception as error:  # Each of Pillow's formats raises errors of its own.
        raise UnreadableError(row, _no_image_file(image, error)) from error


def _why_no_image(image: Any) -> str | None:
    """Return why a value is no image; None if it may be one. Only the head of a file is read."""
    from PIL import Image

    if image is None:
        return "null"
    source = _source(image)
    if source is not None:
        try:
            with Image.open(source):
                return None
        except MemoryError:
            raise
        except Exception as error:  # Each of Pillow's formats raises errors of its own.
            return _no_image_file(image, error)
    shaped = isinstance(image, (np.ndarray, Tensor)) and image.ndim == 3
    if shaped or isinstance(image, Image.Image):
        return None if 0 not in (image.size if isinstance(image, Image.Image) else image.shape) else "an image without pixels"
    got = f"{type(image).__name__} of {image.ndim} dimensions" if hasattr(image, "ndim") else type(image).__name__
    return f"expected a PIL image, an array of 3 dimensions, a path or the bytes of a file, got {got}"


def _no_image_file(image: Any, error: Exception) -> str:
    """The message about a file that Pillow does not read."""
    path = image.get("path") if isinstance(image, Mapping) else image
    got = repr(str(path)) if isinstance(path, (str, Path)) else "bytes"
    return f"expected an image file, got {got} ({first_line(error)})"
