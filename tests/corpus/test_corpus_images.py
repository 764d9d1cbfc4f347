"""Images are scored in bulk: from files, bytes and data sets' own form, as single passes score them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import corpora
import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from cases import CASES, CLASSES, pictures
from command import Run
from PIL import Image
from transformers import ViTImageProcessorPil

import secateur
from secateur.corpus import mapper, score

CASE = CASES["vit"]
PIXELS = [example["image"] for example in pictures(CLASSES, 30)]
LINE = "score m --threads 2 --max-tokens 96 --dtype float32 --compile off --engine-runtime torch --json"


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Return an image as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def passes() -> torch.Tensor:
    """Return the probabilities [images, classes] of single passes."""
    model, processor = CASE.model().eval(), CASE.task.reader
    with torch.inference_mode():
        return torch.cat([model(**processor(images=[image], return_tensors="pt")).logits.softmax(1) for image in PIXELS])


def assert_probabilities(rows: list[dict[str, Any]]) -> None:
    got = torch.tensor([[row[f"p_{name}"] for name in CLASSES] for row in rows])
    assert torch.allclose(got, passes(), atol=1e-5)
    assert float(got.std(0).min()) > 1e-3  # The images differ.
    assert [row["label"] for row in rows] == [CLASSES[k] for k in passes().argmax(1).tolist()]


@pytest.fixture
def model(run: Run, tmp_path: Path) -> Path:
    """Return a working folder with the model folder "m"."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    return tmp_path


def write(kind: str) -> str:
    """Write the images in one form, and return what `--data` names."""
    if kind == "paths":
        for k, pixels in enumerate(PIXELS):
            Image.fromarray(pixels).save(f"{k}.png")
        lines = (json.dumps({"image": f"{k}.png"}) + "\n" for k in range(len(PIXELS)))
        Path("a.jsonl").write_text("".join(lines))
        return "a.jsonl"
    if kind == "bytes":
        pyarrow.parquet.write_table(pyarrow.table({"image": [png(pixels) for pixels in PIXELS]}), "a.parquet")
        return "a.parquet"
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels) for pixels in PIXELS]})
    if kind == "parquet of datasets":
        data.to_parquet("a.parquet")
        return "a.parquet"
    data.save_to_disk("saved")
    return "saved"


@pytest.mark.parametrize("kind", ["paths", "bytes", "parquet of datasets", "save_to_disk"])
def test_the_command_scores_images_of_every_form(run: Run, model: Path, kind: str) -> None:
    result = run(f"{LINE} --data {write(kind)} --out out")
    assert (result.code, result.document["scored"], result.document["rejected"]) == (0, 30, 0), result.errors
    assert result.document["tokens"] == result.document["padded"] == 30 * 17
    (rows,) = corpora.read(Path("out")).values()
    assert_probabilities(rows)


def test_the_library_and_map_score_images() -> None:
    data = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels) for pixels in PIXELS]})
    (batch,) = score(CASE.model().eval(), CASE.task, data, column="img", threads=1)
    assert_probabilities(batch.to_pylist())
    (arrays,) = score(CASE.model().eval(), CASE.task, PIXELS, threads=1)
    assert_probabilities(arrays.to_pylist())
    mapped = data.map(mapper(CASE.model().eval(), CASE.task, column="img"), batched=True, batch_size=7, remove_columns=["img"])
    assert_probabilities(mapped.to_list())


def test_images_that_cannot_be_read_are_rejected(run: Run, model: Path) -> None:
    """A file that is cut off is found only when its pixels are read, with the others of its batch, which are scored."""
    whole = png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    values = [png(PIXELS[0]), whole[: len(whole) // 2], b"no image", None, b"", png(PIXELS[1])]
    pyarrow.parquet.write_table(pyarrow.table({"image": values}), "a.parquet")
    result = run(f"{LINE} --data a.parquet --out out")
    assert (result.code, result.document["scored"], result.document["rejected"]) == (0, 2, 4), result.errors
    (rows,) = corpora.read(Path("out")).values()
    assert [row["row"] for row in rows] == [0, 5]
    got = torch.tensor([[row[f"p_{name}"] for name in CLASSES] for row in rows])
    assert torch.allclose(got, passes()[:2], atol=1e-5)
    (rejects,) = corpora.rejects(Path("out")).values()
    reasons = [row["reason"] for row in rejects]
    assert reasons[0].startswith("expected an image file, got bytes (image file is truncated")
    assert all(reason.startswith("expected an image file, got bytes (cannot identify") for reason in (reasons[1], reasons[3]))
    assert reasons[2] == "null"


def test_images_that_the_processor_cannot_take_are_rejected_alone() -> None:
    model, good = CASE.model().eval(), PIXELS[0]
    values: list[Any] = [
        good, np.dstack([good, good[..., :1]]), np.full((9, 9, 3), np.nan), good[:0], Image.new("RGB", (0, 5)),
        torch.zeros(3, 8, 8, device="meta"), PIXELS[1],
    ]  # fmt: skip
    (batch,) = score(model, CASE.task, values, threads=1)
    rows = batch.to_pylist()
    got = torch.tensor([[row[f"p_{name}"] for name in CLASSES] for row in (rows[0], rows[-1])])
    assert torch.allclose(got, passes()[:2], atol=1e-5)
    reasons = [row["reason"] for row in rows]
    assert [reasons[3], reasons[4]] == ["an image without pixels"] * 2
    assert all(reasons[k].startswith("image: the processor cannot take it: ") for k in (1, 2, 5))
    with pytest.raises(secateur.InputError, match=r"^examples, row 2: image: the processor cannot take it: "):
        secateur.evaluate(model, CASE.task, [{"image": value, "target": CLASSES[0]} for value in values[:2]])


def test_images_that_a_processor_leaves_at_another_size_are_rejected() -> None:
    task = secateur.ImageClassification(ViTImageProcessorPil(do_resize=False))
    right, wrong = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (9, 8), "red")
    values: list[Any] = [right, wrong, right]
    (batch,) = score(CASE.model().eval(), task, values, threads=1)
    expected = "image: the processor makes 3 x 8 x 9 of it, and the model takes 3 x 8 x 8"
    assert batch.column("reason").to_pylist() == [None, expected, None]


def test_damaged_files_of_any_format_are_rejected() -> None:
    """Pillow raises errors of many types for them, such as RuntimeError and NotImplementedError."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, "dds")
    dds = bytearray(file.getvalue())
    dds[80:84] = bytes(4)  # The flags of the pixels' format.
    values: list[Any] = [bytes(dds), png(PIXELS[0])]
    (batch,) = score(CASE.model().eval(), CASE.task, values, threads=1)
    first, second = batch.column("reason").to_pylist()
    assert first.startswith("expected an image file, got bytes (")
    assert second is None


def test_texts_are_rejected_and_texts_column_is_not_taken_for_images(run: Run, model: Path) -> None:
    Path("a.jsonl").write_text('{"text": "a cat", "image": "nowhere.png"}\n')
    result = run(f"{LINE} --data a.jsonl --out out")
    assert (result.code, result.document["rejected"]) == (0, 1), result.errors
    (rejects,) = corpora.rejects(Path("out")).values()
    assert rejects[0]["reason"].startswith("expected an image file, got 'nowhere.png' (")


def test_a_processor_of_another_size_is_refused() -> None:
    task = secateur.ImageClassification(ViTImageProcessorPil(size={"height": 16, "width": 8}))
    with pytest.raises(secateur.InputError, match=r"^processor: expected images of 3 x 8 x 8"):
        next(score(CASE.model().eval(), task, PIXELS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Modules that torch.compile imports raise warnings.
def test_compiled_scoring_of_images(run: Run, model: Path) -> None:
    result = run(f"{LINE.replace('--compile off', '--compile on')} --data {write('bytes')} --out out")
    assert result.code == 0, result.errors
    (rows,) = corpora.read(Path("out")).values()
    assert_probabilities(rows)
