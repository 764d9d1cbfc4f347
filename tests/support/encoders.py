"""Tiny encoders with tokenizers, tasks and examples, for the tests of `secateur.learned`."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import CASES, WORDS, piece_tokenizer, sentences
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainingArguments

from secateur.learned.multitask.encoder_tasks import Classification, EncoderTask, Regression, Span
from secateur.learned.multitask.model import encoder_of
from secateur.learned.multitask.pruning import MultitaskPruning, originals

METHODS, GRANULARITIES, SCOPES = ("magnitude", "movement"), ("element", "rank"), ("global", "local")
SETTINGS: list[dict[str, Any]] = [
    {"method": method, "granularity": granularity, "scope": scope}
    for method, granularity, scope in product(METHODS, GRANULARITIES, SCOPES)
]
NAMES = ["-".join(setting.values()) for setting in SETTINGS]
# Cases whose models have an encoder: BERT, T5 with a gated FFN, and T5 with a plain FFN.
KINDS = ("bert-sequence", "t5-gated", "t5-relu")
TASKS: dict[str, EncoderTask] = {"mood": Classification(("bad", "good", "so")), "size": Regression(), "where": Span(stride=4)}


def encoder(kind: str) -> nn.Module:
    """Build the encoder of a case, always with the same weights."""
    return encoder_of(CASES[kind].model())


def tokenizer(kind: str) -> Any:
    return CASES[kind].task.reader


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like BERT's, also for pairs of texts, with token type ids."""
    fast_tokenizer = piece_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    fast_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return fast_tokenizer


def examples(count: int = 12, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Build examples of TASKS. Their targets are functions of their texts."""
    texts = sentences(count, seed)
    contexts = [" ".join(pair) for pair in zip(texts, sentences(count, seed + 1), strict=True)]
    rows = {
        "mood": [{"input": text, "target": TASKS["mood"].names[len(text) % 3]} for text in texts],  # type: ignore[attr-defined]
        "size": [{"input": text, "target": len(text) / 20} for text in texts],
        "where": [{"question": text.split()[0], "context": c} for text, c in zip(texts, contexts, strict=True)],
    }
    for number, row in enumerate(rows["where"]):
        words = row["context"].split()
        first = number % len(words)
        start = len(" ".join([*words[:first], ""]))
        row["answers"] = {"text": [" ".join(words[first : first + 2])], "answer_start": [start]}
    return rows


def still_encoder() -> nn.Module:
    """Build a BERT encoder without dropout, whose forward pass is the same in training and evaluation."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).eval()  # type: ignore[no-any-return]


def trained(model: nn.Module, tasks: dict[str, EncoderTask], **options: Any) -> MultitaskPruning:
    """Build a pruning in eval mode with random changes of all parameters, as after training, and its final masks.

    Every other singular value is negative, as training can make them.
    """
    pruning = MultitaskPruning(model, tasks, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.05)
        if pruning.granularity == "rank":
            for _, values, _ in weights(pruning).values():
                values[::2].neg_()
    pruning.update_masks_(10, 10)
    return pruning.eval()


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Draw a padded batch whose ids every tokenizer has."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[0, 3:] = mask[2, 7:] = 0
    return {"input_ids": torch.randint(3, 30, (4, 9), generator=generator), "attention_mask": mask}


def logits(model: Any) -> dict[str, Tensor]:
    """Compute the logits of each task for the batch of `inputs`."""
    with torch.no_grad():
        return {name: model(name, **inputs()).logits for name in model.tasks}


def state(pruning: MultitaskPruning) -> dict[str, Tensor]:
    """Copy all results of a training: parameters and masks."""
    copied = {name: tensor.clone() for name, tensor in pruning.state_dict().items()}
    for path, mask in pruning.masks.items():
        everything = torch.ones(mask.entries, dtype=torch.bool)
        copied[f"{path} (mask)"] = everything if mask.mask is None else mask.mask.clone()
    return copied


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def weights(pruning: MultitaskPruning) -> dict[str, list[Tensor]]:
    """Return the parameters that the weight of each linear layer is made of."""
    return {path: originals(pruning.encoder, path) for path in pruning.linears}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Return arguments of a short training on the CPU in which only the seed decides what is random."""
    defaults: dict[str, Any] = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
        "warmup_steps": 2, "save_strategy": "no", "logging_steps": 4, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(str(folder / "checkpoints"), **{**defaults, **options})
