"""The pruned folders for all ways to run. Each folder has inputs and the logits of the model that was saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import secateur
from bench.compatibility.folder import SHAPES, SIZES, Folder
from secateur.data import builtin
from secateur.tasks import Task

BUILTIN_TASK = "language"


def make_folders(out: Path) -> Iterator[Folder]:
    """Yield pruned folders of three families in three shapes.

    The shapes are: equal widths in all layers; heads and neurons that differ between layers, with one attention that has no
    heads left; and channels that differ between layers.
    """
    rows = builtin.examples(BUILTIN_TASK)[:64]
    for family, make in {"t5": _t5, "bert": _bert, "llama": _llama}.items():
        model, task = make(rows)
        for shape in SHAPES:
            yield _save(out / f"{family}-{shape}", family, shape, _pruned(family, shape, model, task, rows), task)
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            (out / f"{family}-{shape}" / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def labels(rows: list[dict[str, Any]]) -> list[str]:
    """Return the labels of the built-in task."""
    return sorted({row["target"] for row in rows})


def _pruned(family: str, shape: str, model: nn.Module, task: Task, rows: list[dict[str, Any]]) -> nn.Module:
    """Return the model pruned to one of the shapes."""
    if shape == "uniform":
        # A stock config can express narrower heads in T5, only the dense model's heads in BERT, and fewer heads in Llama.
        stock: dict[str, tuple[Literal["head", "channel"], str | None, bool]] = {
            "t5": ("channel", None, True),
            "bert": ("head", "ffn", False),
            "llama": ("head", None, False),
        }
        unit, select, per_head = stock[family]
        scores = secateur.attribute(model, task, rows, unit=unit, select=select)
        return secateur.prune(model, secateur.plan(scores, keep=0.5, per_head=per_head))
    units: dict[str, Literal["head", "channel"]] = {"heads": "head", "channels": "channel"}
    unit = units[shape]
    scores = secateur.attribute(model, task, rows, unit=unit)
    plan = secateur.plan(scores, flops=0.5, allocation="knapsack", floor=0.25)
    if shape == "heads":
        first = next(site for site in plan.sites if site.kind == "self_attention" and site.layer == 1)
        kept = {name: units[:0] if name == first.name else units for name, units in plan.items()}
        plan = secateur.Plan(kept, plan.sites, plan.fingerprint, plan.budget, plan.spread)
    return secateur.prune(model, plan)


def _save(path: Path, family: str, shape: str, model: nn.Module, task: Task) -> Folder:
    """Save the model with inputs and its logits for them."""
    path.mkdir()
    secateur.save(model, path / "model", tokenizer=task.reader)
    tensors: dict[str, Tensor] = {}
    for number, size in enumerate(SIZES):
        inputs = _inputs(model, size)
        with torch.inference_mode():
            logits = model(**inputs).logits
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in {**inputs, "logits": logits}.items()}
    save_file(tensors, path / "batches.safetensors")
    folder = Folder(path, family, shape, stock=not hasattr(model.config, "secateur"))
    about = {name: value for name, value in asdict(folder).items() if name != "path"}
    (path / "about.json").write_text(json.dumps(about))
    return folder


def _inputs(model: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return random token ids. The last tokens of each row are padding, except in the first row."""
    generator = torch.Generator().manual_seed(size[1])
    ids = torch.randint(5, model.config.vocab_size, size, generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, size[0]):
        mask[row, size[1] - 2 * row :] = 0
    inputs = {"input_ids": ids * mask + model.config.pad_token_id * (1 - mask), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, model.config.vocab_size, (size[0], 5), generator=generator)
        inputs["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    return inputs


def _t5(rows: list[dict[str, Any]]) -> tuple[nn.Module, Task]:
    model, tokenizer = builtin.load()
    return model, secateur.TextToText(tokenizer, labels=labels(rows))


def _bert(rows: list[dict[str, Any]]) -> tuple[nn.Module, Task]:
    names = labels(rows)
    tokenizer = _piece_tokenizer([row["input"] for row in rows])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
        max_position_embeddings=256, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval(), secateur.SequenceClassification(tokenizer)


def _llama(rows: list[dict[str, Any]]) -> tuple[nn.Module, Task]:
    tokenizer = _byte_fallback_tokenizer([row["input"] for row in rows])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=768, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), secateur.CausalLM(tokenizer, labels=labels(rows))


def _piece_tokenizer(texts: list[str]) -> BertTokenizer:
    """Train BERT's tokenizer with 1,000 pieces. Its class has a name that transformers 4 knows too, which Infinity needs."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=256)


def _byte_fallback_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer as in Llama 2 with 1,000 pieces. Text outside the pieces is encoded in bytes."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokens = [*special.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # No piece crosses a space, so a text and its continuation are tokenised the same together and alone.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Llama has no padding token. The end token replaces it.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, pad_token="</s>", **special)
