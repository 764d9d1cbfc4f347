"""The case matrix: each family as a tiny random model with its task, its examples, its units and a tokenizer made in code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel, WordPiece
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import secateur
from secateur.tasks import Batch, Task

WORDS = [
    *["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "tree", "big", "small", "red", "blue"],
    *["good", "bad", "very", "not", "and", "yes", "no", "maybe", "so", "then", "way"],
]
CLASSES = ["negative", "neutral", "positive"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LABELS = ["yes", "no way", "maybe so then"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
UNITS = ("head", "channel", "channel-per-head")
Unit = Literal["head", "channel"]


def word_tokenizer(*, start: bool, end: bool, **options: Any) -> PreTrainedTokenizerFast:
    """One piece a word, with the marks that a decoder (start) or an encoder-decoder (end) wants."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "<s> " * start + "$A" + " </s>" * end
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def piece_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """BERT's kind: words of several pieces between [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = [*special, *WORDS, "##s", "##ish", "##er", "play", "sing"]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to 9 words, so that a batch of them has padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def labelled(targets: Sequence[str], count: int = 7) -> list[dict[str, Any]]:
    return [{"input": text, "target": targets[i % len(targets)]} for i, text in enumerate(sentences(count))]


def tagged(count: int = 7) -> list[dict[str, Any]]:
    """Words of one, two and three pieces with tags."""
    suffixes = ["", "s", "ishs", "er"]
    rows = [[word + suffixes[(i + len(word)) % 4] for i, word in enumerate(text.split())] for text in sentences(count)]
    return [{"tokens": row, "tags": [TAGS[(i * i + k) % len(TAGS)] for i in range(len(row))]} for k, row in enumerate(rows)]


def _t5(**options: Any) -> nn.Module:
    config = T5Config(
        vocab_size=len(word_tokenizer(start=False, end=True)), d_model=24, d_kv=5, d_ff=37, num_heads=4,
        # Not more decoder than encoder layers: transformers' cache cannot serve such a T5.
        num_layers=3, num_decoder_layers=2, relative_attention_num_buckets=8, relative_attention_max_distance=6,
        dropout_rate=0.2, decoder_start_token_id=0, **options,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bert(cls: type[nn.Module], names: Sequence[str]) -> nn.Module:
    config = BertConfig(
        vocab_size=len(piece_tokenizer()), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    return cls(config)


def _decoder(cls: type[nn.Module], kind: type[Any], **options: Any) -> nn.Module:
    config = kind(
        vocab_size=len(word_tokenizer(start=True, end=False)), hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=6, intermediate_size=37, max_position_embeddings=64, attention_dropout=0.2,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=2, **options,
    )  # fmt: skip
    return cls(config)


@dataclass(frozen=True)
class Case:
    """One family: how its model is built, with which task and examples it is tested."""

    name: str
    build: Callable[[], nn.Module]
    make_task: Callable[[], Task]
    examples: list[dict[str, Any]]
    qk_channels: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> Literal["t5", "bert", "decoder"]:
        return "t5" if self.name.startswith("t5") else "bert" if self.name.startswith("bert") else "decoder"

    @property
    def generates(self) -> bool:
        return self.kind != "bert"

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model, always with the same weights; no weight is at a value (0 or 1) that could hide a mistake."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                # As from_pretrained does it: weights in the dtype, buffers such as rotary frequencies as they were made.
                parameter.data = parameter.data.to(dtype)
        return model.eval()

    @functools.cached_property
    def task(self) -> Task:
        return self.make_task()

    def batches(self, model: nn.Module, max_tokens: int = 60) -> list[Batch]:
        """The examples in padded batches, several of them."""
        return list(self.task.batches(self.task.items(model, self.examples), torch.device("cpu"), max_tokens=max_tokens))

    def logits(self, model: nn.Module) -> Tensor:
        """All logits of the examples at positions that count, [positions, classes], in float64."""
        with torch.inference_mode():
            parts = [self.task.logits(model, batch)[batch.labels != -100] for batch in self.batches(model)]
        return torch.cat(parts).double()


CASES = {
    case.name: case
    for case in [
        Case(
            "t5-gated",
            lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
            lambda: secateur.TextToText(word_tokenizer(start=False, end=True), labels=LABELS),
            labelled(LABELS),
        ),
        Case(
            "t5-relu",
            lambda: _t5(feed_forward_proj="relu"),
            lambda: secateur.TextToText(word_tokenizer(start=False, end=True), labels=LABELS),
            labelled(LABELS),
        ),
        Case(
            "bert-sequence",
            lambda: _bert(BertForSequenceClassification, CLASSES),
            lambda: secateur.SequenceClassification(piece_tokenizer()),
            labelled(CLASSES),
        ),
        Case(
            "bert-token",
            lambda: _bert(BertForTokenClassification, TAGS),
            lambda: secateur.TokenClassification(piece_tokenizer()),
            tagged(),
        ),
        Case(
            "llama",
            lambda: _decoder(LlamaForCausalLM, LlamaConfig),
            lambda: secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS),
            labelled(LABELS),
        ),
        Case(
            "qwen3",
            lambda: _decoder(Qwen3ForCausalLM, Qwen3Config),
            lambda: secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS),
            labelled(LABELS),
            qk_channels=False,
        ),
        Case(
            "gemma3",
            # A window shorter than the texts, so that sliding attention differs from full.
            lambda: _decoder(
                Gemma3ForCausalLM, Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=4
            ),
            lambda: secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS),
            labelled(LABELS),
            qk_channels=False,
        ),
    ]
}
ALL = list(CASES.values())
GENERATING = [case for case in ALL if case.generates]


@functools.cache
def scores_of(name: str, unit: Unit = "head") -> secateur.Scores:
    """Scores of a case's float32 model, made once: they are pure data."""
    case = CASES[name]
    return secateur.attribute(case.model(), case.task, case.examples, unit=unit)


def uniform_plan(case: Case, unit: str, keep: float = 0.5) -> secateur.Plan:
    """The same rate at every site; unit is one of UNITS."""
    return secateur.plan(scores_of(case.name, unit_argument(unit)), keep=keep, per_head=unit == "channel-per-head")


def uneven_plan(case: Case, unit: str, seed: int = 0) -> secateur.Plan:
    """Random units, of another number at every layer: all at one site, a single one at another."""
    scores, generator = scores_of(case.name, unit_argument(unit)), torch.Generator().manual_seed(seed)
    kept: dict[str, Tensor] = {}
    for number, site in enumerate(scores.sites):
        step = site.groups if unit == "channel-per-head" and site.unit.endswith("channel") else 1
        size = site.units // step
        count = int(torch.randint(1, size + 1, (1,), generator=generator))
        count = {1: 1, 2: size}.get(number, count)
        drawn = torch.stack([torch.randperm(size, generator=generator)[:count] + size * k for k in range(step)])
        kept[site.name] = drawn.flatten().sort().values
    return secateur.Plan(kept, scores.sites, scores.fingerprint, {})


def emptied_plan(case: Case, unit: str, seed: int = 266) -> secateur.Plan:
    """The uneven plan without any unit at some of its sites: at random ones, and at each stack's first self-attention, where T5
    has its position bias and a cache its length. The default seed leaves each family something to prune in a second go."""
    plan, generator = uneven_plan(case, unit, seed), torch.Generator().manual_seed(seed)
    kept = {
        site.name: plan[site.name][:0] if drawn < 0.5 or _first(site) else plan[site.name]
        for site, drawn in zip(plan.sites, torch.rand(len(plan), generator=generator).tolist(), strict=True)
    }
    return secateur.Plan(kept, plan.sites, plan.fingerprint, {})


def empty_plan(case: Case, unit: str) -> secateur.Plan:
    """No unit stays at any site."""
    plan = uneven_plan(case, unit)
    return secateur.Plan({name: kept[:0] for name, kept in plan.items()}, plan.sites, plan.fingerprint, {})


def _first(site: secateur.Site) -> bool:
    return site.layer == 0 and site.kind == "self_attention" and site.unit != "qk_channel"


def unit_argument(unit: str) -> Unit:
    return "head" if unit == "head" else "channel"
