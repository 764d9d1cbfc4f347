"""Images: the task, its inputs of every kind, the commands on a folder, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, CLASSES
from PIL import Image
from transformers import ViTImageProcessorPil

import secateur
from secateur.cli import main

CASE = CASES["vit"]
PIXELS = [example["image"] for example in CASE.examples]


def pixels(image: Any) -> torch.Tensor:
    """What the model reads of one image."""
    (item,) = CASE.task.items(CASE.model(), [{"image": image, "target": "neutral"}])
    read: torch.Tensor = CASE.task.collate([item], torch.device("cpu")).inputs["pixel_values"]
    return read


def test_images_of_every_kind_are_read_alike(tmp_path: Path) -> None:
    array = PIXELS[0]
    picture = Image.fromarray(array)
    picture.save(tmp_path / "image.png")
    wanted = CASE.task.reader(images=[array], return_tensors="pt")["pixel_values"]
    assert wanted.shape == (1, 3, 8, 8)
    transparent = picture.copy()
    transparent.putalpha(255)
    for image in (array, torch.from_numpy(array), picture, transparent, tmp_path / "image.png", str(tmp_path / "image.png")):
        assert torch.equal(pixels(image), wanted), type(image)


def test_grey_images_of_a_model_with_three_channels() -> None:
    grey = Image.fromarray(PIXELS[0]).convert("L")
    assert torch.equal(pixels(grey), pixels(grey.convert("RGB")))


def test_every_image_has_a_token_for_each_patch_and_one_more() -> None:
    model = CASE.model()
    items = CASE.task.items(model, CASE.examples)
    assert {item.tokens for item in items} == {17}
    batches = list(CASE.task.batches(items, torch.device("cpu"), max_tokens=34))
    assert [len(batch.rows) for batch in batches] == [2, 2, 2, 1]
    assert batches[0].real(target=False).shape == (2, 17)
    assert secateur.attribute(model, CASE.task, CASE.examples).tokens["encoder"] == 17


def test_accuracy_and_ranks_by_hand() -> None:
    model, task = CASE.model(), CASE.task
    with torch.inference_mode():
        logits = torch.cat([model(pixels(image)).logits for image in PIXELS])
    assert torch.allclose(task.ranked(model, CASE.examples, 40), logits, atol=1e-5)
    found = [CLASSES[k] for k in logits.argmax(1).tolist()]
    right = sum(name == example["target"] for name, example in zip(found, CASE.examples, strict=True))
    assert secateur.evaluate(model, task, CASE.examples).value == right / len(PIXELS)
    best = [max(each, key=each.__getitem__) for each in task.probabilities(model, CASE.examples, 40)]
    assert best == found


def test_a_checkpoint_tells_images_apart(tmp_path: Path) -> None:
    from secateur.attribution.checkpoint import digest

    model, task = CASE.model(), CASE.task
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    given = [PIXELS[0], PIXELS[1], Image.fromarray(PIXELS[2]), tmp_path / "0.png"]
    found = {digest(model, task.items(model, [{"image": image, "target": 0}]))["examples"] for image in given}
    assert len(found) == len(given)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder "m", images and data.jsonl that names them."""
    monkeypatch.chdir(tmp_path)
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    rows = []
    for number, example in enumerate(CASE.examples):
        Image.fromarray(example["image"]).save(f"{number}.png")
        rows.append({"image": f"{number}.png", "target": example["target"]})
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["secateur", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_prune_and_evaluate_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "prune m --data data.jsonl --eval data.jsonl --flops 0.6 --out d --batch-sizes 2 --json"
    code, out, errors = run(monkeypatch, capsys, line)
    assert code == 0, errors
    report = json.loads(out)
    assert report["verification"]["holds"] is True
    (timing,) = report["benchmark"]["timings"]
    assert (timing["batch_size"], timing["length"]) == (2, 17)
    code, out, _ = run(monkeypatch, capsys, "evaluate d --data data.jsonl --json")
    assert code == 0
    assert json.loads(out)["value"] == report["evaluation"]["pruned"]["value"]


def test_a_dry_run_counts_an_images_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in Path("m").glob("*"):
        if path.name != "config.json":
            path.unlink()
    code, out, _ = run(monkeypatch, capsys, "prune m --dry-run --keep 0.5 --json")
    assert code == 0
    found = json.loads(out)
    assert found["shape"] == [32, 17]
    assert found["dense"]["parameters"] == sum(parameter.numel() for parameter in CASE.model().parameters())
    assert found["stock"] is True


def test_texts_cannot_be_scored(folder: Path) -> None:
    with pytest.raises(secateur.InputError, match=r"^task: expected one of texts, got ImageClassification"):
        next(secateur.corpus.score(CASE.model(), CASE.task, ["a text"]))


WRONG: dict[str, tuple[Any, str]] = {
    "no file": ("nowhere.png", r"examples, row 2: expected an image file, got 'nowhere.png' \(.*No such file"),
    "text": (__file__, r"examples, row 2: expected an image file, got '.*test_image.py' \(cannot identify image file"),
    "number": (5, "examples, row 2: expected a PIL image, an array of 3 dimensions or a path, got int"),
    "flat": (np.zeros((8, 8)), "examples, row 2: expected .*, got ndarray of 2 dimensions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(name: str) -> None:
    image, expected = WRONG[name]
    with pytest.raises(secateur.InputError, match=f"^{expected}"):
        secateur.evaluate(CASE.model(), CASE.task, [CASE.examples[0], {"image": image, "target": "neutral"}])


def test_a_processor_of_another_size() -> None:
    task = secateur.ImageClassification(ViTImageProcessorPil(size={"height": 16, "width": 8}))
    with pytest.raises(secateur.InputError, match=r"^processor: expected images of 3 x 8 x 8, .*, got 3 x 16 x 8$"):
        secateur.evaluate(CASE.model(), task, CASE.examples)


def test_images_are_never_cut() -> None:
    with pytest.raises(secateur.InputError, match=r"^max_length: expected none for images, which are never cut, got 8$"):
        secateur.ImageClassification(CASE.task.reader, max_length=8)
