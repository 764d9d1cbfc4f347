"""ONNX and OpenVINO: the graph's logits beside PyTorch's, for other sizes and with padding; wrong graphs are not kept."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, piece_tokenizer
from command import Run, assert_refused
from exported import byte_pairs, decoder, report
from exported_tasks import padded_texts, task_folder
from torch import Tensor

import secateur
from secateur.exporting import comparing, onnx_file
from secateur.support.errors import InputError, VerificationError
from secateur.tasks import logits

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
MODULES = {"onnx": "onnx_file", "openvino": "openvino_file"}
SHAPED = [("bert-sequence", "stock"), ("bert-sequence", "any"), ("t5-relu", "any"), ("llama", "any")]


def needs(engine: str) -> None:
    """Skip a test whose packages are missing."""
    for package in PACKAGES[engine]:
        pytest.importorskip(package, reason=f"needs {package}: pip install 'secateur[{engine}]'")


def outputs(path: Path, batch: dict[str, Tensor]) -> Any:
    """Run the engine on an exported folder as docs/usage/serving.md does."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    if (path / "model.onnx").is_file():
        ort: Any = import_module("onnxruntime")
        return ort.InferenceSession(path / "model.onnx").run(["logits"], arrays)[0]
    openvino: Any = import_module("openvino")
    return openvino.compile_model(path / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)["logits"]


@pytest.mark.parametrize("engine", PACKAGES)
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_the_graph_computes_the_models_logits(engine: str, name: str, shape: str, tmp_path: Path) -> None:
    needs(engine)
    source = task_folder(tmp_path / "m", name, shape)
    exported = secateur.export(source, tmp_path / "out", format=engine)
    proof = exported.document["verification"]
    assert 0 < proof["largest_difference"] <= proof["bound"] < 1e-3
    assert exported.lines()[-1].startswith(f"verified: logits of {'onnxruntime' if engine == 'onnx' else engine} ")
    batch = padded_texts(name, exported.document["inputs"])
    assert set(batch) == set(exported.document["inputs"])
    model: Any = secateur.load(source)
    with torch.inference_mode():
        expected = model(**batch).logits
    seen = batch["attention_mask"].bool() if name == "llama" else ...
    assert np.allclose(outputs(tmp_path / "out", batch)[seen], expected[seen], atol=1e-4)
    assert any("without a cache" in note for note in exported.document["notes"]) == (name != "bert-sequence")


@pytest.mark.parametrize(("engine", "dtype"), [("onnx", "bfloat16"), ("openvino", "float16")])
def test_half_precision_is_storage_alone(engine: str, dtype: str, tmp_path: Path) -> None:
    """Weights are stored in half the bytes. Rotary frequencies stay as they are, or logits of long texts would move."""
    needs(engine)
    source = task_folder(tmp_path / "m", "llama", "stock")
    exported = secateur.export(source, tmp_path / "out", format=engine, dtype=dtype)
    rounded: Any = secateur.load(source, dtype=getattr(torch, dtype)).float()
    batch = padded_texts("llama", exported.document["inputs"])
    with torch.inference_mode():
        expected = rounded(**batch).logits
    seen = batch["attention_mask"].bool()
    assert np.allclose(outputs(tmp_path / "out", batch)[seen], expected[seen], atol=1e-4)
    whole = sum(parameter.numel() for parameter in rounded.parameters())
    assert exported.document["dtype"] == dtype
    if engine == "openvino":
        # The trace adds rotary frequencies and the masks' numbers, a few hundred at most.
        assert 2 * whole <= (tmp_path / "out" / "openvino_model.bin").stat().st_size < 2 * whole + 2000
    else:
        onnx: Any = import_module("onnx")
        stored = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
        numbers = sum(int(np.prod(tensor.dims)) for tensor in stored if tensor.data_type == onnx.TensorProto.BFLOAT16)
        assert whole <= numbers < whole + 100
        assert [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) == 3]  # The frequencies.


def test_the_folder_has_what_a_caller_needs(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    needs("openvino")
    source = task_folder(tmp_path / "m", "bert-sequence", "any")
    secateur.export(source, tmp_path / "out", format="openvino")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert not hasattr(config, "auto_map")
    assert config.architectures == ["BertForSequenceClassification"]
    reread = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reread("a big cat")["input_ids"] == CASES["bert-sequence"].task.reader("a big cat")["input_ids"]
    assert (tmp_path / "out" / "secateur.json").read_bytes() == (source / "secateur.json").read_bytes()


def test_segments_are_an_input_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    needs("openvino")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    model, tokenizer = CASES["bert-sequence"].model(), piece_tokenizer(model_input_names=names)
    secateur.save(model, tmp_path / "m", tokenizer=tokenizer)
    exported = secateur.export(tmp_path / "m", tmp_path / "out", format="openvino")
    assert sorted(exported.document["inputs"]) == sorted(names)
    batch = dict(tokenizer(["a big cat", "the dog"], ["so", "not"], padding=True, return_tensors="pt"))
    assert batch["token_type_ids"].any()
    with torch.inference_mode():
        expected = model(**batch).logits
    assert np.allclose(outputs(tmp_path / "out", batch), expected, atol=1e-4)


def test_images_are_taken_too(tmp_path: Path) -> None:
    needs("openvino")
    exported = secateur.export(task_folder(tmp_path / "m", "vit", "any"), tmp_path / "out", format="openvino")
    assert exported.document["inputs"] == ["pixel_values"]


@pytest.mark.parametrize("engine", PACKAGES)
def test_a_wrong_graph_leaves_nothing(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(engine)
    source = task_folder(tmp_path / "m", "bert-sequence", "stock")

    def then_changed(model: Any, run: Any) -> comparing.Expected:
        reference = comparing.expected(model, run)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0, 0] += 0.01
        return reference

    monkeypatch.setattr(import_module(f"secateur.exporting.{MODULES[engine]}"), "expected", then_changed)
    with pytest.raises(VerificationError, match=r"^nothing was written: logits of .* differ from PyTorch's by "):
        secateur.export(source, tmp_path / "out", format=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_outputs_of_another_shape_or_nan_are_refused() -> None:
    reference = comparing.Expected([torch.zeros(2, 3)], 1e-6)
    with pytest.raises(VerificationError, match=r"outputs of the shape \[1, 3\], and PyTorch \[2, 3\]"):
        comparing.compared("an engine", "logits", reference, [torch.zeros(1, 3)])
    with pytest.raises(VerificationError, match="differ from PyTorch's by nan"):
        comparing.compared("an engine", "logits", reference, [torch.full((2, 3), torch.nan)])
    with pytest.raises(VerificationError, match=r"by 1.1e-05, and rounding explains 1e-05$"):
        comparing.compared("an engine", "logits", reference, [torch.full((2, 3), 1.1e-5)])
    assert comparing.compared("an engine", "logits", reference, [torch.full((2, 3), 0.9e-5)])["run"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("onnx", "onnx"), ("openvino", "openvino"), ("ct2", "ctranslate2")):
        with pytest.raises(
            InputError, match=rf"^format: {name} needs the package {package}: pip install 'secateur\[{name}\]'$"
        ):
            secateur.export(tmp_path, tmp_path / "out", format=name)


def test_without_onnxruntime_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnx")
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(onnx_file, "export_onnx", lambda *_: None)
    exported = secateur.export(task_folder(tmp_path / "m", "bert-sequence", "stock"), tmp_path / "out", format="onnx")
    assert exported.lines()[-1] == "not run: needs onnxruntime, pip install 'secateur[onnx]'"
    assert report(tmp_path / "out")["verification"]["run"] is False


def test_bad_input_is_refused_in_one_line(tmp_path: Path, run: Run) -> None:
    needs("openvino")
    task_folder(tmp_path / "m", "bert-sequence", "any")
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    line = "dtype: expected auto, float32, float16 for openvino, got 'bfloat16'"
    assert_refused(run("export m --format openvino --dtype bfloat16 --out bad"), line, "bad")
    assert_refused(run("export empty --format openvino --out bad"), "model: ", "bad")
    assert_refused(run("export m --format gguf --out bad"), "task: ", "bad")
    there = run("export m --format openvino --out there")
    assert there.code == 2
    assert there.errors[-1].startswith("secateur: out: ")
    case = CASES["llama"]
    secateur.save(case.model(torch.bfloat16), tmp_path / "b", task=case.task)
    line = "dtype: expected float32 or float16 for openvino, got auto for a model of bfloat16"
    assert_refused(run("export b --format openvino --out bad"), line, "bad")


def test_what_torch_does_not_export_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnx")
    task_folder(tmp_path / "m", "bert-sequence", "stock")

    def data_dependent(self: Any, input_ids: Tensor, **_: Any) -> Any:
        return self.model(input_ids=input_ids[: int(input_ids.sum())]).logits

    monkeypatch.setattr(logits.Logits, "forward", data_dependent)
    monkeypatch.setattr(onnx_file, "expected", lambda *_: None)
    line = "model: expected one that torch.onnx exports, got BertForSequenceClassification: "
    assert_refused(run("export m --format onnx --out bad"), line, "bad")


def test_rotary_positions_that_depend_on_the_length_are_refused(tmp_path: Path, run: Run) -> None:
    """A trace would hold the frequencies of short texts."""
    needs("openvino")
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    secateur.save(decoder("llama", rope_parameters=rope), tmp_path / "m", tokenizer=byte_pairs())
    assert_refused(run("export m --format openvino --out bad"), "model: expected rotary positions that do not depend", "bad")
