"""The models that are timed: the built-in T5, and larger models with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

import secateur
from secateur.data import builtin
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Batch, Item, Task


@dataclass(frozen=True)
class Case:
    """A model with a task and one batch."""

    model: nn.Module
    task: Task
    batch: Batch


class _NoTokenizer:
    """A placeholder. The timed batches consist of token ids, so nothing is tokenised."""

    pad_token_id = 0
    model_max_length = 512


def cases() -> dict[str, Callable[[], Case]]:
    """Return functions by name. Each function builds a case with a batch of 32 x 64 tokens."""
    return {
        "builtin-t5": _builtin,
        "t5-small-shape": lambda: t5(512, 2048, 8, 6),
        "minilm-shape": lambda: bert(384, 1536, 12, 6),
        "llama-shape": lambda: llama(512, 1536, 8, 2, 6),
    }


def t5(width: int, neurons: int, heads: int, layers: int, size: tuple[int, int] = (32, 64)) -> Case:
    """Build a T5 with random weights."""
    shape = {"d_model": width, "d_kv": width // heads, "num_heads": heads, "d_ff": neurons, "num_layers": layers}
    config = T5Config(vocab_size=8000, feed_forward_proj="relu", decoder_start_token_id=0, dropout_rate=0.0, **shape)
    return _case(T5(config), secateur.TextToText(_NoTokenizer()), [5, 6, 1], size)


def llama(width: int, neurons: int, heads: int, groups: int, layers: int, size: tuple[int, int] = (32, 64)) -> Case:
    """Build a Llama with random weights."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, intermediate_size=neurons, **shape))
    return _case(model, secateur.CausalLM(_NoTokenizer()), [5, 6, 1], size)


def _builtin() -> Case:
    model, tokenizer = builtin.load()
    return _case(model, secateur.TextToText(tokenizer), [5, 6, 1])


def bert(width: int, neurons: int, heads: int, layers: int, size: tuple[int, int] = (32, 64)) -> Case:
    """Build a BERT with random weights that classifies texts."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": neurons}
    model = BertForSequenceClassification(BertConfig(num_labels=4, **shape))
    return _case(model, secateur.SequenceClassification(_NoTokenizer()), [1], size)


def _case(model: nn.Module, task: Task, target: list[int], size: tuple[int, int] = (32, 64)) -> Case:
    generator = random.Random(0)
    items = []
    for row in range(size[0]):
        ids = [generator.randrange(10, 5000) for _ in range(size[1])]
        items.append(Item(row, ids[:-3] + target if isinstance(task, secateur.CausalLM) else ids, target))
    return Case(model.eval(), task, task.collate(items, torch.device("cpu")))


def bare(case: Case) -> None:
    """Run `bare_passes` with frozen parameters."""
    with undisturbed(case.model):
        bare_passes(case)


def bare_passes(case: Case) -> None:
    """Run the forward pass, and the backward pass to the embeddings. The parameters must be frozen (`undisturbed`)."""
    vocabulary = case.model.config.vocab_size  # type: ignore[union-attr]
    # get_input_embeddings is not enough: each stack of an encoder-decoder has its own embedding module with the tied weight.
    tables = [m for m in case.model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == vocabulary]
    handles = [table.register_forward_hook(lambda m, a, output: output.detach().requires_grad_(True)) for table in tables]
    try:
        case.task.target(case.model, case.batch, "log_probability").sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
