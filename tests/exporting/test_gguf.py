"""GGUF: the weights bit for bit, the fields, the tokenizer; and llama.cpp beside PyTorch where xllamacpp is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Run, assert_refused
from exported import FAMILIES, HEADS, LAYERS, SHAPES, SIZE, VOCABULARY, WORDS, byte_pairs, decoder, folder, pruned, report
from torch import Tensor

import secateur
from secateur.exporting import gguf_file, gguf_tokenizer, llama_cpp
from secateur.exporting.decoder import read_decoder
from secateur.support.errors import InputError, VerificationError

gguf: Any = pytest.importorskip("gguf", reason="needs gguf: pip install 'secateur[gguf]'")
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
needs_engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp: secateur[compat]")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields and the tensors of an exported file."""
    reader = gguf.GGUFReader(path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name]
        tensors[tensor.name] = torch.frombuffer(bytearray(np.ascontiguousarray(tensor.data).tobytes()), dtype=dtype).reshape(
            shape
        )
    return fields, tensors


def apart(rows: Tensor) -> Tensor:
    """Undo, channel by channel, that the two channels of a rotation are neighbours."""
    back = torch.empty_like(rows)
    for head in range(len(rows) // SIZE):
        for channel in range(SIZE // 2):
            back[head * SIZE + channel] = rows[head * SIZE + 2 * channel]
            back[head * SIZE + SIZE // 2 + channel] = rows[head * SIZE + 2 * channel + 1]
    return back


def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let xllamacpp be missing, so that a test of the file alone is the same with and without it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "xllamacpp" else find(name, *rest))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "shape"),
    [(name, "stock") for name in FAMILIES]
    + [("llama", "uniform"), ("llama", "uneven"), ("qwen2", "uneven"), ("qwen3", "uniform"), ("llama-tied", "per-layer")],
)
def test_weights_come_back_bit_for_bit(
    family: str, shape: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_engine(monkeypatch)
    stored: torch.dtype = getattr(torch, dtype)
    source = folder(tmp_path / "m", family, shape, dtype=stored)
    exported = secateur.export(source, tmp_path / "out", format="gguf")
    fields, tensors = read(tmp_path / "out")
    weights, config = secateur.load(source).state_dict(), decoder(family).config
    heads, widths = SHAPES.get(shape, ([HEADS // 2] * LAYERS, [config.intermediate_size] * LAYERS))
    staying = [number for number in range(LAYERS) if heads[number] or widths[number]]
    assert exported.document["left_out"] == [number for number in range(LAYERS) if number not in staying]
    seen = set()
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else stored)
        first, *rest = name.split(".")
        if first in OUTER:
            expected = weights[f"{OUTER[first]}.weight"]
        else:
            number, module, part = staying[int(rest[0])], NAMES[rest[1]], rest[2]
            if (module.startswith("self_attn") or module == "input_layernorm") and not heads[number]:
                assert number == staying[0]
                assert module == "input_layernorm" or not tensor.any()
                continue
            if module.startswith("mlp") and not widths[number]:
                assert not tensor.any()
                continue
            seen.add((number, module, part))
            expected = weights[f"model.layers.{number}.{module}.{part}"]
            if rest[1] in ("attn_q", "attn_k") and family != "qwen3":
                tensor = apart(tensor)
        assert torch.equal(tensor.float(), expected.float()), name
    needed = {
        (number, *name.split(f"layers.{number}.")[1].rsplit(".", 1))
        for number in staying
        for name, tensor in weights.items()
        if f"layers.{number}." in name and tensor.numel()
        if heads[number] or not ("self_attn" in name or "input_layernorm" in name)
        if widths[number] or "mlp" not in name
    }
    assert {one for one in needed if one[2] in ("weight", "bias")} == seen
    assert ("output.weight" in tensors) == (family != "llama-tied")
    assert fields["general.architecture"] == exported.document["architecture"]


def test_fields_of_a_model_whose_layers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engine(monkeypatch)
    exported = secateur.export(folder(tmp_path / "m", "llama3-rope", "uneven"), tmp_path / "out", format="gguf")
    fields, tensors = read(tmp_path / "out")
    assert fields["general.architecture"] == "deci"
    # Layer 3 has no unit and is left out. The first layer has one head of zeros, and layer 2 has neurons of zeros.
    assert exported.document["zeros"] == ["layer 0: one head", "layer 2: 32 neurons"]
    assert fields["deci.block_count"] == LAYERS - 1
    assert fields["deci.attention.head_count"] == [1, 2, 6, 4]
    assert fields["deci.attention.head_count_kv"] == [1, 1, 3, 2]
    assert fields["deci.feed_forward_length"] == [37, 300, 32, 5]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == SIZE
    assert fields["deci.rope.freq_base"] == 50.0
    assert fields["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["deci.context_length"] == 256
    assert len(tensors["rope_freqs.weight"]) == SIZE // 2


def test_fields_of_a_model_whose_layers_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engine(monkeypatch)
    secateur.export(folder(tmp_path / "m", "llama-linear-rope", "uniform"), tmp_path / "out", format="gguf", dtype="float16")
    fields, _ = read(tmp_path / "out")
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.feed_forward_length"] == 70
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert fields["general.file_type"] == 1


def test_factors_of_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = decoder("llama3-rope").config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 50.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    factors = gguf_file.rope_factors(config.rope_parameters, SIZE)
    assert factors[0] == 1
    assert len(set(factors.tolist())) > 2
    assert torch.allclose(plain / factors, scaled, rtol=1e-5)


@pytest.mark.parametrize("words", WORDS)
def test_the_tokenizer_is_written(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engine(monkeypatch)
    tokenizer = byte_pairs(words, start=words == "llama-bpe")
    tokenizer.add_tokens(["<extra>"])
    exported = secateur.export(folder(tmp_path / "m", tokenizer=tokenizer), tmp_path / "out", format="gguf")
    fields, _ = read(tmp_path / "out")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", words)
    assert fields["tokenizer.ggml.add_bos_token"] == (words == "llama-bpe")
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCABULARY
    assert all(tokens[number] == token for token, number in tokenizer.get_vocab().items())
    kinds = gguf.TokenType
    extra = tokenizer.get_vocab()["<extra>"]
    assert (types[0], types[5], types[extra], types[-1]) == (kinds.CONTROL, kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    first, second = fields["tokenizer.ggml.merges"][0].split(" ")
    assert first + second in tokens
    assert bool(exported.document["notes"]) == (words == "qwen2")


def test_words_that_llama_cpp_does_not_know_are_refused() -> None:
    from cases import byte_level_tokenizer, word_tokenizer

    with pytest.raises(InputError, match=r"^tokenizer: expected a byte-level BPE \(gpt-2, .*\), got WordLevel$"):
        gguf_tokenizer.words_of(word_tokenizer(start=False, end=False))
    with pytest.raises(InputError, match=r"^tokenizer: expected words split as in .*add_prefix_space.: true"):
        gguf_tokenizer.words_of(byte_level_tokenizer(add_prefix_space=True))
    with pytest.raises(InputError, match=r"^tokenizer: expected a byte-level BPE of tokenizer.json, got object"):
        gguf_tokenizer.words_of(object())


def test_models_that_gguf_does_not_hold_are_refused(tmp_path: Path, run: Run) -> None:
    def refused(name: str, message: str, **options: Any) -> None:
        folder(tmp_path / name, **options)
        assert_refused(run(f"export {name} --format gguf --out bad"), message, "bad")

    refused("a", "model: expected the activation silu", hidden_act="gelu")
    refused("b", "model: expected rotary positions", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    refused("c", "model: expected attention to all earlier tokens", family="mistral", sliding_window=16)
    refused("d", "model: expected no bias where all units are gone", family="llama-biases", shape="uneven")
    # Layer 4 of "per-layer" has no attention, and the first that differs from layer 0 is layer 1.
    refused("e", "model: expected layers that are alike", family="qwen3", shape="per-layer")
    errors = run("export e --format gguf --out bad").errors[-1]
    assert "layer 0 and 0 heads, 0 key-value heads and 37 neurons in layer 1; --shape uniform gives" in errors
    assert_refused(run("export builtin --format gguf --out bad"), "task: ", "bad")
    assert_refused(
        run("export a --format onyx --out bad"), "format: expected one of gguf, decilm, onnx, openvino, ct2, got 'onyx'", "bad"
    )
    assert_refused(run("export a --format gguf --dtype int8 --out bad"), "dtype: expected auto, float32", "bad")
    assert_refused(run("export nowhere/at/all --format gguf --out bad"), "model: ", "bad")
    from cases import word_tokenizer

    refused("f", "tokenizer: expected a byte-level BPE", tokenizer=word_tokenizer(start=False, end=False))
    refused("g", "tokenizer: expected at most 300 pieces", vocab_size=300)


def test_parts_of_heads_are_refused() -> None:
    model = decoder()
    scores = {site.name: torch.rand(site.units, dtype=torch.float64) for site in secateur.sites(model, unit="channel")}
    kept = {name: values.argsort()[: len(values) - 8].sort().values for name, values in scores.items()}
    from secateur.model.discovery import fingerprint

    plan = secateur.Plan(kept, tuple(secateur.sites(model, unit="channel")), fingerprint(model))
    with pytest.raises(InputError, match=r"model: expected whole heads of one size .* in layer 0; .*--shape per-layer gives"):
        read_decoder(secateur.prune(model, plan))


def test_weights_that_overflow_are_refused(tmp_path: Path, run: Run) -> None:
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    secateur.save(model, tmp_path / "m", tokenizer=byte_pairs())
    assert_refused(run("export m --format gguf --dtype float16 --out bad"), "dtype: expected one that holds the weights", "bad")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^format: gguf needs the package gguf: pip install 'secateur\[gguf\]'$"):
        secateur.export(tmp_path, tmp_path / "out", format="gguf")


def test_without_llama_cpp_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engine(monkeypatch)
    exported = secateur.export(folder(tmp_path / "m"), tmp_path / "out", format="gguf")
    assert report(tmp_path / "out")["verification"]["run"] is False
    assert exported.lines()[-1] == "not run by llama.cpp: needs xllamacpp, pip install 'secateur[compat]'"


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (0.01, 1)])
def test_another_result_leaves_nothing(
    error: float, code: int, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI has no llama.cpp. PyTorch stands for it here, with an error at one token of one prompt."""
    folder(tmp_path / "m")
    find, model = importlib.util.find_spec, secateur.load(tmp_path / "m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find("json" if name == "xllamacpp" else name, *rest))
    monkeypatch.setattr(llama_cpp, "_version", lambda: "a stand-in")

    def answers(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = []
        for prompt in content["prompts"]:
            numbers = byte_pairs()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            values, tokens = llama_cpp._log_probabilities(model, numbers).topk(20)
            given.append({"tokens": len(numbers), "likeliest": list(zip(tokens.tolist(), values.tolist(), strict=True))})
        token, value = given[-1]["likeliest"][3]
        given[-1]["likeliest"][3] = (token, value + error)
        return given

    monkeypatch.setattr(llama_cpp, "_answers", answers)
    result = run("export m --format gguf --out out")
    assert result.code == code
    assert Path("out").exists() == (not code)
    if code:
        assert result.errors[-1].startswith("secateur: nothing was written: llama.cpp's log-probabilities differ")
    else:
        assert report(Path("out"))["verification"]["largest_difference"] < 1e-5


@needs_engine
@pytest.mark.parametrize(
    ("family", "shape"),
    [(name, "stock") for name in FAMILIES]
    + [(name, "uneven") for name in ("llama", "llama-tied", "llama3-rope", "mistral", "qwen2")]
    + [("llama", "uniform"), ("qwen3", "uniform"), ("llama-biases", "uniform")],
)
def test_llama_cpp_computes_the_same(family: str, shape: str, tmp_path: Path) -> None:
    exported = secateur.export(folder(tmp_path / "m", family, shape), tmp_path / "out", format="gguf")
    assert exported.document["verification"]["run"]
    assert exported.document["verification"]["largest_difference"] < 1e-4


@needs_engine
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_cpp_computes_the_same_in_half_precision(dtype: str, tmp_path: Path) -> None:
    exported = secateur.export(folder(tmp_path / "m", "llama", "uneven"), tmp_path / "out", format="gguf", dtype=dtype)
    verification = exported.document["verification"]
    assert 0 < verification["largest_difference"] <= verification["bound"] < 0.5
    assert verification["largest_difference_in_float32"] < 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.gguf"]


@needs_engine
def test_a_wrong_file_in_half_precision_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of bfloat16 would hide wrong frequencies. The same weights in float32 show them."""
    source = folder(tmp_path / "m", "llama3-rope")
    monkeypatch.setattr(gguf_file, "rope_factors", lambda rope, size: torch.ones(size // 2) * 1.02)
    with pytest.raises(VerificationError, match=r"differ from PyTorch's by .* and rounding explains 0\.002$"):
        secateur.export(source, tmp_path / "out", format="gguf", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@needs_engine
@pytest.mark.parametrize("words", WORDS)
def test_llama_cpp_splits_texts_alike(words: str, tmp_path: Path) -> None:
    tokenizer = byte_pairs(words, start=words == "llama-bpe")
    exported = secateur.export(folder(tmp_path / "m", tokenizer=tokenizer), tmp_path / "out", format="gguf")
    assert exported.document["verification"]["on"] == f"{len(llama_cpp.TEXTS) + len(llama_cpp.LENGTHS)} prompts"


@needs_engine
@pytest.mark.parametrize(
    ("place", "name", "wrong", "message"),
    [
        (gguf_file, "interleave", lambda rows, heads: rows, "log-probabilities differ"),
        (gguf_file, "rope_factors", lambda rope, size: torch.ones(size // 2), "log-probabilities differ"),
        (gguf_file, "ZERO_NEURONS", 0, "does not run the file|log-probabilities differ"),
        (gguf_tokenizer, "words_of", lambda tokenizer: ("smollm", []), "tokens, and not into"),
    ],
    ids=["rotation", "frequencies", "skipped layer", "words"],
)
def test_a_wrong_file_leaves_nothing(
    place: Any, name: str, wrong: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "m", "llama3-rope", "uneven", tokenizer=byte_pairs("gpt-2"))
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(VerificationError, match=f"^nothing was written: .*({message})"):
        secateur.export(source, tmp_path / "out", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_pruned_shapes_of_the_tests_are_as_named() -> None:
    layers = read_decoder(pruned(decoder(), *SHAPES["uneven"])).layers
    assert [(layer.number, layer.heads, layer.groups, layer.width) for layer in layers] == [
        (0, 0, 0, 37), (1, 2, 1, 300), (2, 6, 3, 0), (4, 4, 2, 5)
    ]  # fmt: skip
