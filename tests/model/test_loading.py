"""Checkpoints and tokenizers that lack something: one line, and nothing is drawn at random."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import CASES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertModel

import secateur
from secateur.cli.commands.multitask import load_encoder
from secateur.flow.loaded import load_model
from secateur.model.loading import load_complete
from secateur.tasks.fitting import read_tokenizer


def folder_of(name: str, folder: Path) -> Path:
    """Save the case's model with its tokenizer, and return the folder."""
    secateur.save(CASES[name].model(), folder, tokenizer=CASES[name].task.reader)
    return folder


def drop(folder: Path, *names: str) -> None:
    """Drop weights from a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in names}, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, message: str) -> None:
    """Check that no way to load the folder draws weights at random."""
    for load in (lambda: load_model(str(folder), task=None, device="cpu", dtype="auto"), lambda: secateur.load(folder)):
        with pytest.raises(secateur.InputError, match=rf"^model: expected [^\n]*{re.escape(message)}[^\n]*$"):
            load()


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("bert-sequence", "classifier.weight"),
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("t5-gated", "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
    ],
)
def test_a_checkpoint_without_a_weight(name: str, dropped: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path / "m")
    drop(folder, dropped)
    refused(folder, f"got {str(folder)!r} without {dropped}: they would be drawn at random")


def add(folder: Path, name: str) -> None:
    """Add a weight to a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),  # As Qwen2 has it.
        (
            "bert-sequence",
            "bert.encoder.layer.0.attention.self.distance_embedding.weight",
        ),  # Relative positions.
        ("bert-sequence", "bert.encoder.layer.1.output.dense.weight_scale"),  # As in quantised checkpoints.
        ("bert-sequence", "encoder.layer.2.output.dense.weight"),  # A third layer, by its name in the base model.
    ],
)
def test_a_weight_of_the_layers_that_the_model_does_not_have(name: str, added: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path / "m")
    add(folder, added)
    refused(folder, f"with {added}, which the model would leave out")


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("bert-sequence", "cls.predictions.bias"),
        ("bert-sequence", "bert.embeddings.position_ids"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "score.weight"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_other_heads_and_computed_constants_are_left_out(name: str, added: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path / "m")
    add(folder, added)
    load_model(str(folder), task=None, device="cpu", dtype="auto")


def store(folder: Path, form: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a folder's weights as one file of safetensors, as two, or as PyTorch's file."""
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    files = {"model.safetensors": names}
    if form == "shards":
        files = {f"model-0000{k}-of-00002.safetensors": names[k - 1 :: 2] for k in (1, 2)}
        index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, inside in files.items():
        save_file({name: tensors[name].contiguous() for name in inside}, folder / file, {"format": "pt"})


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", torch.int8),
        ("bert-sequence", "bert.encoder.layer.0.output.dense.weight", torch.bool),
        ("t5-gated", "decoder.block.1.layer.2.DenseReluDense.wo.weight", torch.uint8),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", torch.int64),
    ],
)
def test_a_weight_in_integers_is_not_taken_for_floats(
    name: str, stored: str, dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    store(folder, form, {**tensors, stored: (127 * tensors[stored]).to(dtype)})
    refused(
        folder, f"got {str(folder)!r} with {stored} in {str(dtype).removeprefix('torch.')} and without a quantization_config"
    )


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_buffers_and_left_out_tensors_may_be_integers(form: str, tmp_path: Path) -> None:
    added = {
        "bert-sequence": {"bert.embeddings.position_ids": torch.arange(40)[None], "cls.seen": torch.tensor([True])},
        "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
    }
    for name, tensors in added.items():
        folder = folder_of(name, tmp_path / name)
        store(folder, form, {**load_file(folder / "model.safetensors"), **tensors})
        assert isinstance(load_model(str(folder), task=None, device="cpu", dtype="auto").model, type(CASES[name].model()))


def test_a_checkpoint_of_a_base_model_may_have_integer_buffers(tmp_path: Path) -> None:
    model: Any = CASES["bert-sequence"].model()
    folder = folder_of("bert-sequence", tmp_path / "m")
    bare = {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    store(folder, "safetensors", {**bare, "embeddings.position_ids": torch.arange(40)[None]})
    assert isinstance(load_model(str(folder), task=None, device="cpu", dtype="auto").model, type(model))


@pytest.mark.parametrize(
    ("name", "task", "own"),
    [
        ("bert-sequence", "token-classification", "sequence-classification for .*, a BertForSequenceClassification"),
        ("bert-token", "sequence-classification", "token-classification for .*, a BertForTokenClassification"),
    ],
)
def test_a_head_that_was_trained_for_another_task(name: str, task: str, own: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path / "m")
    with pytest.raises(secateur.InputError, match=f"^task: expected {own}, got '{task}'$"):
        load_model(str(folder), task=task, device="cpu", dtype="auto")


def test_a_checkpoint_of_a_model_without_the_head(tmp_path: Path) -> None:
    model: Any = CASES["bert-sequence"].model()
    folder = folder_of("bert-sequence", tmp_path / "m")
    model.bert.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [type(model).__name__]}))
    refused(folder, "without classifier.bias, classifier.weight: they would be drawn at random")


def test_a_pruned_folder_without_a_weight(tmp_path: Path) -> None:
    case = CASES["t5-gated"]
    model = case.model()
    pruned = secateur.prune(model, secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5))
    assert hasattr(pruned.config, "secateur")
    secateur.save(pruned, tmp_path / "m", tokenizer=case.task.reader)
    drop(tmp_path / "m", "encoder.block.0.layer.0.SelfAttention.o.weight", "encoder.final_layer_norm.weight")
    with pytest.raises(
        secateur.InputError, match=r"without encoder\.block\.0\.layer\.0\.SelfAttention\.o\.weight, encoder\.fin"
    ):
        secateur.load(tmp_path / "m")


def test_a_config_with_more_classes_than_the_checkpoint(tmp_path: Path) -> None:
    folder = folder_of("bert-sequence", tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(k): f"c{k}" for k in range(5)}
    config["label2id"] = {f"c{k}": k for k in range(5)}
    path.write_text(json.dumps(config))
    refused(folder, "got classifier.bias of shape [3] and not [5]")


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_loads(name: str, tmp_path: Path) -> None:
    model = secateur.load(folder_of(name, tmp_path / "m"))
    for parameter, (key, loaded) in zip(CASES[name].model().parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter, loaded), key


def test_a_tied_head_need_not_be_in_the_checkpoint(tmp_path: Path) -> None:
    case = CASES["llama"]
    model: Any = case.model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(case.logits(secateur.load(tmp_path / "m")), case.logits(model))


def test_an_encoder_loads_without_the_pooler_that_no_task_reads(tmp_path: Path) -> None:
    folder = folder_of("bert-sequence", tmp_path / "m")
    drop(folder, "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    load_encoder(str(folder))
    assert isinstance(load_complete(BertModel, str(folder)), BertModel)
    refused(folder, "without bert.pooler.dense.bias, bert.pooler.dense.weight")
    drop(folder, "bert.encoder.layer.0.output.dense.weight")
    with pytest.raises(secateur.InputError, match=r"^model: expected .* without encoder\.layer\.0\.output\.dense\.weight: "):
        load_encoder(str(folder))


def test_an_adapter_beside_the_weights_is_not_ignored(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "with adapter_config.json: merge the adapter into the weights first (merge_and_unload()")


@pytest.mark.parametrize(
    "model_type",
    [
        *("bert", "roberta", "electra", "distilbert", "xlm-roberta", "camembert", "gpt2", "opt", "qwen2", "qwen3"),
        *("gemma2", "gemma3_text", "t5", "mt5", "bart"),
    ],
)
def test_a_tokenizer_whose_files_are_missing(model_type: str, tmp_path: Path) -> None:
    """transformers makes a tokenizer that knows its special tokens alone."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    message = rf"^tokenizer: expected {re.escape(repr(str(tmp_path)))} to hold the files of a tokenizer \(.*\), got a \w+ w"
    with pytest.raises(secateur.InputError, match=message):
        read_tokenizer(str(tmp_path))


def test_a_model_folder_without_its_tokenizer(tmp_path: Path) -> None:
    folder = folder_of("bert-sequence", tmp_path / "m")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(secateur.InputError, match=r"^tokenizer: expected .* got a BertTokenizer without words"):
        load_model(str(folder), task=None, device="cpu", dtype="auto")


def test_a_tokenizer_of_single_letters_or_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\nC\nG\nT\n")
    transformers.BertTokenizer(str(tmp_path / "letters" / "vocab.txt")).save_pretrained(tmp_path / "letters")
    assert read_tokenizer(str(tmp_path / "letters")).tokenize("a") != []
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    assert len(read_tokenizer(str(tmp_path / "bytes"))("ab")["input_ids"]) == 3
