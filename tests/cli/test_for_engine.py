"""`secateur prune --for`: the shape, the alignment and the files of an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from command import Run, assert_refused
from exported import byte_pairs, decoder, report

import secateur
from secateur.cli.commands import prune
from secateur.exporting.base import FORMATS
from secateur.flow.engines import ENGINES, needs_of
from secateur.support.errors import InputError, VerificationError

PRUNE = "prune dense --data train.jsonl --flops 0.6 --recover none --batch-sizes 1 --lengths 8 --out small"


@pytest.fixture
def dense(run: Run) -> Run:
    """The function that runs a command line, in a folder with a Llama in `dense`."""
    model: Any = decoder("llama", intermediate_size=768, num_hidden_layers=4)
    secateur.save(model, "dense", tokenizer=byte_pairs())
    return run


def bert() -> None:
    """Write a BERT classifier to `dense`, with examples for it."""
    case = CASES["bert-sequence"]
    secateur.save(case.model(), "dense", task=case.task)
    rows = [{"input": "the cat sat", "target": label} for label in ("negative", "neutral", "positive")] * 6
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def layers(path: Path) -> list[dict[str, Any]]:
    """Return what export.json says of each layer."""
    content: list[dict[str, Any]] = report(path)["layers"]
    return content


def test_llama_cpp_gets_a_file_with_the_widths_of_each_layer(dense: Run) -> None:
    result = dense(f"{PRUNE} --for llama.cpp")
    assert result.code == 0, result.errors
    assert Path("small/gguf/model.gguf").is_file()
    assert all(layer["neurons"] % 32 == 0 for layer in layers(Path("small/gguf")))
    assert "serve it: llama-server -m small/gguf/model.gguf" in result.out
    assert result.out.count("serve it: ") == 1
    assert "## For llama.cpp\n\nllama.cpp reads `small/gguf`.\n" in Path("small/README.md").read_text()
    assert "for: llama.cpp" in Path("small/run.yaml").read_text()


@pytest.mark.parametrize(("engine", "multiple"), [("vllm", 16), ("sglang", 256)])
def test_vllm_and_sglang_get_a_folder_of_decilm(dense: Run, engine: str, multiple: int) -> None:
    result = dense(f"{PRUNE} --for {engine} --json")
    assert result.code == 0, result.errors
    assert result.document["plan"]["shape"] == "per-layer"
    assert result.document["export"]["format"] == "decilm"
    assert engine in report(Path("small/decilm"))["read_by"]
    config = json.loads(Path("small/config.json").read_text())
    dense_width, of_layers = config["intermediate_size"], config.get("per_layer_config", {})
    widths = [of_layers.get(str(number), {}).get("intermediate_size", dense_width) for number in range(4)]
    assert all(width % multiple == 0 for width in widths)


def test_an_engine_without_a_format_of_its_own_gets_a_stock_folder(run: Run) -> None:
    bert()
    result = run(f"{PRUNE.replace('0.6', '0.8')} --for tei")
    assert result.code == 0, result.errors
    assert "auto_map" not in json.loads(Path("small/config.json").read_text())
    assert "serve it: text-embeddings-router --model-id small" in result.out


def test_a_failed_export_leaves_the_folder_and_the_result(dense: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise VerificationError("nothing was written: logits differ")

    monkeypatch.setattr(prune, "export", fails)
    result = dense(f"{PRUNE} --for llama.cpp --json")
    assert result.code == 1
    assert result.errors[-1] == "secateur: small is written, and its gguf is not: nothing was written: logits differ"
    assert result.document["parameters"]
    assert Path("small/model.safetensors").is_file()


def test_openvino_gets_float32_of_a_model_in_bfloat16(run: Run) -> None:
    pytest.importorskip("openvino")
    bert()
    model = secateur.load("dense").to(torch.bfloat16)
    secateur.save(model, "half", task=CASES["bert-sequence"].task)
    result = run(f"{PRUNE.replace('dense', 'half')} --for openvino --json")
    assert result.code == 0, result.errors
    assert result.document["export"]["dtype"] == "float32"
    assert result.document["export"]["verification"]["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--for tensorflow", "engine: expected one of vllm, sglang, llama.cpp, tei, ctranslate2, openvino, onnx, got"),
        ("--for tei", "engine: expected for tei one of BertForSequenceClassification, "),
        ("--for vllm --shape stock", "shape: expected none with --for"),
        ("--for vllm --unit channel", "unit: expected none with --for"),
        ("--for sglang --align 64", "align: expected a multiple of 256 with --for, got 64"),
        ("--for vllm --plan plan.json --flops 0.5", "plan: expected --plan or a budget, got both"),
    ],
)
def test_what_does_not_fit_an_engine_is_refused(dense: Run, options: str, message: str) -> None:
    assert_refused(dense(f"{PRUNE} {options}"), message, "small")


def test_a_tokenizer_that_an_engine_does_not_know_is_refused_before_the_scoring(run: Run) -> None:
    case = CASES["llama"]
    secateur.save(case.model(), "dense", task=case.task)
    assert_refused(run(f"{PRUNE} --for llama.cpp"), "tokenizer: expected a byte-level BPE", "small")


def test_engines_name_formats_and_shapes_that_exist() -> None:
    models = [CASES[name].model() for name in ("t5-gated", "bert-sequence", "llama", "qwen3", "gpt2", "vit")]
    taken = set()
    for engine in ENGINES:
        for model in models:
            try:
                needs = needs_of(engine, model)
            except InputError:
                continue
            taken.add(engine)
            assert needs.format is None or needs.format in FORMATS
    assert taken == set(ENGINES)
    wrong: Any = []
    with pytest.raises(InputError, match=r"^engine: expected one of vllm, .*, got \[\]"):
        needs_of(wrong, models[0])


def test_a_dry_run_has_the_shape_and_the_widths_of_the_engine(dense: Run) -> None:
    result = dense("prune dense --flops 0.6 --dry-run --for sglang --json")
    assert result.code == 0, result.errors
    assert "for sglang: shape per-layer, FFN widths in multiples of 256" in result.errors
    assert result.document["plan"]["shape"] == "per-layer"
    widths = [site["kept"] for site in result.document["sites"] if site["unit"] == "neuron"]
    assert len(widths) == 4
    assert all(width % 256 == 0 for width in widths)
    assert not Path("small").exists()
