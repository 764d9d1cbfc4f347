"""The case matrix: every family as a tiny random model, with a task, examples, units and a tokenizer built in code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
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
Kind = Literal["encoder-decoder", "encoder", "decoder"]


def word_tokenizer(*, start: bool, end: bool, **options: Any) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one piece for each word.

    Args:
        start: Whether texts begin with the first token of a decoder.
        end: Whether texts end with the last token of an encoder-decoder.
        options: Further arguments of the tokenizer.
    """
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "<s> " * start + "$A" + " </s>" * end
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def piece_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Build a tokenizer like BERT's: it splits words into pieces and puts them between [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = [*special, *WORDS, "##s", "##ish", "##er", "play", "sing"]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def byte_level_tokenizer(*, add_prefix_space: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Build a tokenizer like RoBERTa's and GPT-2's, with one piece for each byte. A space belongs to the word after it."""
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return texts of 2 to 9 words, so that a batch of them has padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def labelled(targets: Sequence[str], count: int = 7) -> list[dict[str, Any]]:
    """Return texts with targets. The targets come in turn."""
    return [{"input": text, "target": targets[i % len(targets)]} for i, text in enumerate(sentences(count))]


def tagged(count: int = 7) -> list[dict[str, Any]]:
    """Return words of one, two and three pieces, with tags."""
    suffixes = ["", "s", "ishs", "er"]
    rows = [[word + suffixes[(i + len(word)) % 4] for i, word in enumerate(text.split())] for text in sentences(count)]
    return [{"tokens": row, "tags": [TAGS[(i * i + k) % len(TAGS)] for i in range(len(row))]} for k, row in enumerate(rows)]


def _t5(cls: type[nn.Module] = T5ForConditionalGeneration, kind: type[Any] = T5Config, **options: Any) -> nn.Module:
    config = kind(
        vocab_size=len(word_tokenizer(start=False, end=True)), d_model=24, d_kv=5, d_ff=37, num_heads=4,
        # No more decoder than encoder layers: the cache of transformers cannot serve a T5 with more.
        num_layers=3, num_decoder_layers=2, relative_attention_num_buckets=8, relative_attention_max_distance=6,
        dropout_rate=0.2, decoder_start_token_id=0, **options,
    )  # fmt: skip
    return cls(config)


def _bart(cls: type[nn.Module], kind: type[Any], **options: Any) -> nn.Module:
    """Build a BART whose encoder and decoder have different shapes, which its config allows."""
    config = kind(
        vocab_size=len(word_tokenizer(start=False, end=True)), d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=6, encoder_ffn_dim=37, decoder_ffn_dim=29,
        max_position_embeddings=40, dropout=0.2, attention_dropout=0.2, init_std=0.3,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, forced_eos_token_id=None, **options,
    )  # fmt: skip
    return cls(config)


def _encoder(cls: type[nn.Module], kind: type[Any], names: Sequence[str], **options: Any) -> nn.Module:
    config = kind(
        **{
            "vocab_size": len(piece_tokenizer()), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 37, "max_position_embeddings": 40, "hidden_dropout_prob": 0.2,
            "attention_probs_dropout_prob": 0.2, "initializer_range": 0.3, "pad_token_id": 0,
            "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, **options,
        }
    )  # fmt: skip
    return cls(config)


def _vit() -> nn.Module:
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=3, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config)
    return model


def pictures(targets: Sequence[str], count: int = 7) -> list[dict[str, Any]]:
    """Return images of noise with targets. They are taller than wide, so that the processor resizes them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (count, 12, 10, 3), generator=generator, dtype=torch.uint8).numpy()
    return [{"image": image, "target": targets[i % len(targets)]} for i, image in enumerate(drawn)]


def _decoder(cls: type[nn.Module], kind: type[Any], **options: Any) -> nn.Module:
    config = kind(
        vocab_size=len(word_tokenizer(start=True, end=False)), hidden_size=24, num_hidden_layers=2,
        max_position_embeddings=64, attention_dropout=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=2, **options,
    )  # fmt: skip
    return cls(config)


def _grouped(cls: type[nn.Module], kind: type[Any], **options: Any) -> nn.Module:
    """Build a decoder with two query heads for each key-value head."""
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "intermediate_size": 37}
    return _decoder(cls, kind, **{**shape, "initializer_range": 0.3, **options})


@dataclass(frozen=True)
class Case:
    """One family: a function that builds its model, and the task and examples that test it.

    Attributes:
        name: The name of the case, which is its test id.
        kind: The kind of model.
        build: Builds the model with random weights.
        make_task: Builds the task.
        examples: The examples.
        qk_channels: Whether the family's Q/K channels can be pruned.
    """

    name: str
    kind: Kind
    build: Callable[[], nn.Module]
    make_task: Callable[[], Task]
    examples: list[dict[str, Any]]
    qk_channels: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def exact(self) -> bool:
        """Whether a float64 model computes in float64 everywhere. RMSNorms compute in float32 in models of any dtype."""
        return not any("RMSNorm" in type(m).__name__ or "T5LayerNorm" in type(m).__name__ for m in self.build().modules())

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads the model."""
        return str(self.task.auto_class)

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self.kind != "encoder"

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Build a model. The seed determines the weights. No weight is 0 or 1, because such weights could hide a mistake."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                # As in from_pretrained, weights get the dtype, and buffers such as rotary frequencies keep theirs.
                parameter.data = parameter.data.to(dtype)
        return model.eval()

    @functools.cached_property
    def task(self) -> Any:
        """The task, which is built once."""
        return self.make_task()

    def batches(self, model: nn.Module, max_tokens: int = 60) -> list[Batch]:
        """Return the examples in several padded batches."""
        return list(self.task.batches(self.task.items(model, self.examples), torch.device("cpu"), max_tokens=max_tokens))

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of the examples at all target positions, float64 [positions, classes]."""
        with torch.inference_mode():
            parts = [self.task.logits(model, batch)[batch.labels != -100] for batch in self.batches(model)]
        return torch.cat(parts).double()


def text_to_text(name: str, build: Callable[[], nn.Module]) -> Case:
    """Return a case of an encoder-decoder."""
    task = lambda: secateur.TextToText(word_tokenizer(start=False, end=True), labels=LABELS)  # noqa: E731
    return Case(name, "encoder-decoder", build, task, labelled(LABELS))


def sequence(name: str, build: Callable[[], nn.Module]) -> Case:
    """Return a case of an encoder that classifies texts."""
    return Case(name, "encoder", build, lambda: secateur.SequenceClassification(piece_tokenizer()), labelled(CLASSES))


def token(name: str, build: Callable[[], nn.Module]) -> Case:
    """Return a case of an encoder that classifies words."""
    return Case(name, "encoder", build, lambda: secateur.TokenClassification(piece_tokenizer()), tagged())


def causal(name: str, build: Callable[[], nn.Module], **options: Any) -> Case:
    """Return a case of a decoder."""
    task = lambda: secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)  # noqa: E731
    return Case(name, "decoder", build, task, labelled(LABELS), **options)


# The window is shorter than the texts, so that sliding attention differs from full attention.
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

# One model of each architecture. Tests of code that does not depend on the family use these.
CORE = [
    text_to_text("t5-gated", lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    text_to_text("t5-relu", lambda: _t5(feed_forward_proj="relu")),
    sequence("bert-sequence", lambda: _encoder(BertForSequenceClassification, BertConfig, CLASSES)),
    token("bert-token", lambda: _encoder(BertForTokenClassification, BertConfig, TAGS)),
    causal("llama", lambda: _grouped(LlamaForCausalLM, LlamaConfig)),
    causal("qwen3", lambda: _grouped(Qwen3ForCausalLM, Qwen3Config), qk_channels=False),
    causal("gemma3", lambda: _grouped(Gemma3ForCausalLM, Gemma3TextConfig, **_SLIDING), qk_channels=False),
]
ALL = [
    *CORE,
    text_to_text("mt5", lambda: _t5(MT5ForConditionalGeneration, MT5Config, feed_forward_proj="gated-gelu")),
    text_to_text("bart", lambda: _bart(BartForConditionalGeneration, BartConfig, decoder_start_token_id=1)),
    text_to_text("marian", lambda: _bart(MarianMTModel, MarianConfig, decoder_start_token_id=0, scale_embedding=True)),
    sequence("roberta", lambda: _encoder(RobertaForSequenceClassification, RobertaConfig, CLASSES)),
    token("electra", lambda: _encoder(ElectraForTokenClassification, ElectraConfig, TAGS, embedding_size=16)),
    sequence(
        "distilbert",
        lambda: _encoder(
            DistilBertForSequenceClassification, DistilBertConfig, CLASSES, dim=24, n_layers=2, n_heads=4, hidden_dim=37
        ),
    ),
    sequence(
        "modernbert",
        lambda: _encoder(
            ModernBertForSequenceClassification, ModernBertConfig, CLASSES, global_attn_every_n_layers=2, local_attention=6,
            cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
        ),
    ),
    causal("mistral", lambda: _grouped(MistralForCausalLM, MistralConfig, sliding_window=4)),
    causal(
        "qwen2",
        lambda: _grouped(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, max_window_layers=1, sliding_window=4),
    ),
    # In float64, attention is NaN for a padded token that attends to no token. This window is longer than the padding.
    causal("gemma2", lambda: _grouped(Gemma2ForCausalLM, Gemma2Config, **_SLIDING | {"sliding_window": 12})),
    causal("llama-mqa", lambda: _grouped(LlamaForCausalLM, LlamaConfig, num_key_value_heads=1)),
    causal("gpt2", lambda: _decoder(GPT2LMHeadModel, GPT2Config, n_head=4, n_inner=37, initializer_range=0.3)),
    causal("opt", lambda: _decoder(OPTForCausalLM, OPTConfig, num_attention_heads=4, ffn_dim=37, init_std=0.3)),
    causal(
        "opt-post-norm",
        lambda: _decoder(
            OPTForCausalLM, OPTConfig, num_attention_heads=4, ffn_dim=37, init_std=0.3, do_layer_norm_before=False
        ),
    ),
    Case(
        "vit",
        "encoder",
        _vit,
        lambda: secateur.ImageClassification(ViTImageProcessorPil(size={"height": 8, "width": 8})),
        pictures(CLASSES),
    ),
]  # fmt: skip
CASES = {case.name: case for case in ALL}
GENERATING = [case for case in ALL if case.generates]
POST_NORM = ("bert-sequence", "bert-token", "roberta", "electra", "distilbert", "bart", "marian", "opt-post-norm")
PRE_NORM = [case for case in ALL if case.name not in POST_NORM]


@functools.cache
def scores_of(name: str, unit: Unit = "head") -> secateur.Scores:
    """Return scores of a case's float32 model. They are computed once and shared, because they are pure data."""
    case = CASES[name]
    return secateur.attribute(case.model(), case.task, case.examples, unit=unit)


def random_scores(name: str, unit: Unit = "head", select: str | None = None, seed: int = 0) -> secateur.Scores:
    """Return random scores for the sites of a case's model. A plan needs no more than scores."""
    whole, generator = scores_of(name, unit), torch.Generator().manual_seed(seed)
    names = {site.name for site in secateur.sites(CASES[name].model(), unit=unit, select=select)}
    sites = tuple(site for site in whole.sites if site.name in names)
    by_site = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
    return replace(whole, by_site=by_site, sites=sites)


def uniform_plan(case: Case, unit: str, keep: float = 0.5) -> secateur.Plan:
    """Return a plan that keeps the same share of the units at every site. `unit` is one of UNITS."""
    return secateur.plan(scores_of(case.name, unit_argument(unit)), keep=keep, per_head=unit == "channel-per-head")


def uneven_plan(case: Case, unit: str, seed: int = 0) -> secateur.Plan:
    """Return a plan that keeps random units, a different number at every site: all at one site, and one at another site."""
    scores, generator = scores_of(case.name, unit_argument(unit)), torch.Generator().manual_seed(seed)
    kept: dict[str, Tensor] = {}
    for number, site in enumerate(scores.sites):
        step = site.groups if unit == "channel-per-head" and site.unit.endswith("channel") else 1
        size = site.units // step
        count = int(torch.randint(1, size + 1, (1,), generator=generator))
        count = {1: 1, 2: size}.get(number, count)
        drawn = torch.stack([torch.randperm(size, generator=generator)[:count] + size * k for k in range(step)])
        kept[site.name] = drawn.flatten().sort().values
    return secateur.Plan(kept, scores.sites, scores.fingerprint)


def emptied_plan(case: Case, unit: str, seed: int = 266) -> secateur.Plan:
    """Return the uneven plan with some sites emptied: random sites, and the first self-attention of every stack.

    T5 has its position bias in that self-attention, and a cache reads its length there. With the default seed, every family has
    units left that can be pruned a second time.
    """
    plan, generator = uneven_plan(case, unit, seed), torch.Generator().manual_seed(seed)
    kept = {
        site.name: plan[site.name][:0] if drawn < 0.5 or _is_first(site) else plan[site.name]
        for site, drawn in zip(plan.sites, torch.rand(len(plan), generator=generator).tolist(), strict=True)
    }
    return secateur.Plan(kept, plan.sites, plan.fingerprint)


def empty_plan(case: Case, unit: str) -> secateur.Plan:
    """Return a plan that keeps no unit at any site."""
    plan = uneven_plan(case, unit)
    return secateur.Plan({name: kept[:0] for name, kept in plan.items()}, plan.sites, plan.fingerprint)


def _is_first(site: secateur.Site) -> bool:
    """Tell whether a site is the first self-attention of its stack (its V/O channels or heads)."""
    return site.layer == 0 and site.kind == "self_attention" and site.unit != "qk_channel"


def unit_argument(unit: str) -> Unit:
    """Return the argument `unit` of `attribute` for one of UNITS."""
    return "head" if unit == "head" else "channel"
