"""The models that are timed: the built-in T5, and larger shapes with random weights."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

import secateur
from secateur import builtin
from secateur.tasks import Batch, Item, Task


@dataclass(frozen=True)
class Case:
    """A model with a task and one batch of 32 x 64 tokens."""

    model: nn.Module
    task: Task
    batch: Batch


class _NoTokenizer:
    """The timed batches are made of ids, so nothing is tokenised."""

    pad_token_id = 0
    model_max_length = 512


def cases() -> dict[str, Any]:
    """Name to a function that builds the case."""
    return {"builtin-t5": _builtin, "t5-small-shape": _t5_small, "minilm-shape": _minilm, "llama-shape": _llama}


def _builtin() -> Case:
    model, tokenizer = builtin.load()
    return _case(model, secateur.TextToText(tokenizer), target=[5, 6, 1])


def _t5_small() -> Case:
    shape = {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": 6}
    config = T5Config(vocab_size=8000, feed_forward_proj="relu", decoder_start_token_id=0, dropout_rate=0.0, **shape)
    return _case(T5(config), secateur.TextToText(_NoTokenizer()), target=[5, 6, 1])


def _minilm() -> Case:
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(num_labels=4, **shape))
    return _case(model, secateur.SequenceClassification(_NoTokenizer()), target=[1])


def _llama() -> Case:
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, intermediate_size=1536, **shape))
    return _case(model, secateur.CausalLM(_NoTokenizer()), target=[5, 6, 1])


def _case(model: nn.Module, task: Task, target: list[int]) -> Case:
    torch.manual_seed(0)
    generator = random.Random(0)
    items = []
    for row in range(32):
        ids = [generator.randrange(10, 5000) for _ in range(64)]
        items.append(Item(row, ids[:-3] + target if isinstance(task, secateur.CausalLM) else ids, target))
    return Case(model.eval(), task, task.collate(items, torch.device("cpu")))
