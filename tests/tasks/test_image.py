"""Image classification: inputs of every kind, batches, evaluation, the commands on a folder, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cases import CASES, CLASSES
from command import Run
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.image_utils import load_image

import secateur

CASE = CASES["vit"]
PIXELS = [example["image"] for example in CASE.examples]


def pixels(image: Any) -> torch.Tensor:
    """Return the pixel values that the model reads for one image."""
    (item,) = CASE.task.items(CASE.model(), [{"image": image, "target": "neutral"}])
    read: torch.Tensor = CASE.task.collate([item], torch.device("cpu")).inputs["pixel_values"]
    return read


def test_images_of_every_kind_give_the_same_pixels(tmp_path: Path) -> None:
    array = PIXELS[0]
    picture = Image.fromarray(array)
    picture.save(tmp_path / "image.png")
    expected = CASE.task.reader(images=[array], return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 8, 8)
    transparent = picture.copy()
    transparent.putalpha(255)
    path = tmp_path / "image.png"
    stored = [path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    for image in (array, torch.from_numpy(array), picture, transparent, path, str(path), *stored):
        assert torch.equal(pixels(image), expected), type(image)


def test_photographs_are_turned_as_transformers_and_datasets_turn_them(tmp_path: Path) -> None:
    """A camera writes the pixels as it was held, and the orientation into EXIF."""
    exif, path = Image.Exif(), tmp_path / "image.png"
    exif[274] = 6  # Turned by a quarter.
    Image.fromarray(PIXELS[0]).save(path, exif=exif)
    loaded = load_image(str(path))
    assert loaded.size == Image.fromarray(PIXELS[0]).size[::-1]
    expected = CASE.task.reader(images=[loaded], return_tensors="pt")["pixel_values"]
    assert not torch.equal(expected, pixels(PIXELS[0]))
    decoded = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())[0]["image"]
    for image in (path, path.read_bytes(), Image.open(path), decoded):
        assert torch.equal(pixels(image), expected), type(image)


def test_a_grey_image_equals_its_rgb_copy_for_a_model_with_three_channels() -> None:
    grey = Image.fromarray(PIXELS[0]).convert("L")
    assert torch.equal(pixels(grey), pixels(grey.convert("RGB")))


def test_an_image_has_one_token_per_patch_and_a_class_token() -> None:
    model = CASE.model()
    items = CASE.task.items(model, CASE.examples)
    assert {item.tokens for item in items} == {17}
    batches = list(CASE.task.batches(items, torch.device("cpu"), max_tokens=34))
    assert [len(batch.rows) for batch in batches] == [2, 2, 2, 1]
    assert batches[0].real(target=False).shape == (2, 17)
    assert secateur.attribute(model, CASE.task, CASE.examples).tokens["encoder"] == 17


def test_accuracy_and_ranking_equal_those_of_the_models_logits() -> None:
    model, task = CASE.model(), CASE.task
    with torch.inference_mode():
        logits = torch.cat([model(pixels(image)).logits for image in PIXELS])
    assert torch.allclose(task.ranked(model, CASE.examples, 40), logits, atol=1e-5)
    predicted = [CLASSES[k] for k in logits.argmax(1).tolist()]
    right = sum(name == example["target"] for name, example in zip(predicted, CASE.examples, strict=True))
    assert secateur.evaluate(model, task, CASE.examples).value == right / len(PIXELS)
    best = [max(by_label, key=by_label.__getitem__) for by_label in task.probabilities(model, CASE.examples, 40)]
    assert best == predicted


def test_a_checkpoints_digest_differs_for_different_images(tmp_path: Path) -> None:
    from secateur.attribution.checkpoint import digest

    model, task = CASE.model(), CASE.task
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    images = [PIXELS[0], PIXELS[1], Image.fromarray(PIXELS[2]), tmp_path / "0.png"]
    digests = {digest(model, task.items(model, [{"image": image, "target": 0}]))["examples"] for image in images}
    assert len(digests) == len(images)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """Return a folder with a model folder "m", image files, and data.jsonl that names the images."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    rows = []
    for number, example in enumerate(CASE.examples):
        Image.fromarray(example["image"]).save(f"{number}.png")
        rows.append({"image": f"{number}.png", "target": example["target"]})
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_commands_prune_and_evaluate_a_folder_of_images(folder: Path, run: Run) -> None:
    line = "prune m --data data.jsonl --eval data.jsonl --flops 0.6 --out d --batch-sizes 2 --json"
    result = run(line)
    assert result.code == 0, result.errors
    report = result.document
    assert report["verification"]["holds"] is True
    (timing,) = report["benchmark"]["timings"]
    assert (timing["batch_size"], timing["length"]) == (2, 17)
    result = run("evaluate d --data data.jsonl --json")
    assert result.code == 0
    assert result.document["value"] == report["evaluation"]["pruned"]["value"]


def test_a_dry_run_counts_an_images_tokens(folder: Path, run: Run) -> None:
    for path in Path("m").glob("*"):
        if path.name != "config.json":
            path.unlink()
    result = run("prune m --dry-run --keep 0.5 --json")
    assert result.code == 0
    report = result.document
    assert report["shape"] == [32, 17]
    assert report["dense"]["parameters"] == sum(parameter.numel() for parameter in CASE.model().parameters())
    assert report["stock"] is True


WRONG: dict[str, tuple[Any, str]] = {
    "no file": ("nowhere.png", r"examples, row 2: expected an image file, got 'nowhere.png' \(.*No such file"),
    "text": (__file__, r"examples, row 2: expected an image file, got '.*test_image.py' \(cannot identify image file"),
    "number": (5, "examples, row 2: expected a PIL image, an array of 3 dimensions, a path or the bytes of a file, got int"),
    "flat": (np.zeros((8, 8)), "examples, row 2: expected .*, got ndarray of 2 dimensions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_input_that_is_no_image_is_refused(name: str) -> None:
    image, expected = WRONG[name]
    with pytest.raises(secateur.InputError, match=f"^{expected}"):
        secateur.evaluate(CASE.model(), CASE.task, [CASE.examples[0], {"image": image, "target": "neutral"}])


def test_a_processor_of_another_image_size_is_refused() -> None:
    task = secateur.ImageClassification(ViTImageProcessorPil(size={"height": 16, "width": 8}))
    with pytest.raises(secateur.InputError, match=r"^processor: expected images of 3 x 8 x 8, .*, got 3 x 16 x 8$"):
        secateur.evaluate(CASE.model(), task, CASE.examples)


def test_a_max_length_is_refused_for_images() -> None:
    with pytest.raises(secateur.InputError, match=r"^max_length: expected none for images, which are never cut, got 8$"):
        secateur.ImageClassification(CASE.task.reader, max_length=8)
