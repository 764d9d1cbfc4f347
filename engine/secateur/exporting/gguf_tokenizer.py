"""A tokenizer in GGUF: tokens, merges, special tokens, and the name under which llama.cpp knows its way to split words.

Source: `get_vocab_base_pre` in llama.cpp's conversion/base.py, and `llm_tokenizer_bpe` in its src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from secateur.support.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(*, own_words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own_words}


def _split(digits: str) -> dict[str, Any]:
    """Words as Llama 3 and Qwen 2 split them, with so many digits in a number."""
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes(own_words=False)]}


@dataclass(frozen=True)
class _Words:
    """How a tokenizer splits words, by llama.cpp's name.

    Attributes:
        name: The value of tokenizer.ggml.pre.
        pre_tokenizer: The pre-tokenizer in tokenizer.json.
        ignore_merges: Whether a word that is a token is taken whole.
        normalizers: The normalizers in tokenizer.json that go with it.
    """

    name: str
    pre_tokenizer: dict[str, Any]
    ignore_merges: bool = False
    normalizers: tuple[str | None, ...] = (None,)


_DIGITS = {"type": "Digits", "individual_digits": True}
_KNOWN = (
    _Words("gpt-2", _bytes(own_words=True)),
    _Words("smollm", {"type": "Sequence", "pretokenizers": [_DIGITS, _bytes(own_words=True)]}),
    _Words("llama-bpe", _split(r"\p{N}{1,3}"), ignore_merges=True),
    _Words("qwen2", _split(r"\p{N}"), normalizers=(None, "NFC")),
)


def words_of(tokenizer: Any) -> tuple[str, list[str]]:
    """Return llama.cpp's name of how a tokenizer splits words, and notes on where llama.cpp differs.

    Args:
        tokenizer: The tokenizer.

    Raises:
        InputError: It is no byte-level BPE, or splits words in another way.
    """
    names = ", ".join(words.name for words in _KNOWN)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"tokenizer: expected a byte-level BPE of tokenizer.json, got {type(tokenizer).__name__}")
    content = json.loads(backend.to_str())
    model, normalizer = content["model"], (content.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or any(model.get(name) for name in _OTHER_BPE):
        raise InputError(f"tokenizer: expected a byte-level BPE ({names}), got {_named(model)}")
    split = _essential(content.get("pre_tokenizer"))
    for words in _KNOWN:
        same = split == words.pre_tokenizer and bool(model.get("ignore_merges")) == words.ignore_merges
        if same and normalizer in words.normalizers:
            return words.name, [_NFC] if normalizer == "NFC" else []
    raise InputError(
        f"tokenizer: expected words split as in {names}, whose names llama.cpp knows, got the pre-tokenizer {json.dumps(split)}"
        f"{f' and the normalizer {normalizer}' if normalizer else ''}"
    )


_OTHER_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_NFC = "llama.cpp does not bring texts to Unicode's form NFC, as the tokenizer does: bring them to it before"


def _named(model: dict[str, Any]) -> str:
    return ", ".join([str(model["type"]), *(f"{name}={model[name]!r}" for name in _OTHER_BPE if model.get(name))])


def _essential(spec: Any) -> Any:
    """A pre-tokenizer without `trim_offsets`, which changes no token."""
    if isinstance(spec, dict):
        return {name: _essential(value) for name, value in spec.items() if name != "trim_offsets"}
    return [_essential(value) for value in spec] if isinstance(spec, list) else spec


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> list[str]:
    """Write a tokenizer.

    Args:
        writer: The `gguf.GGUFWriter`.
        tokenizer: The tokenizer.
        size: The rows of the embedding. Those without a token become unused tokens.

    Returns:
        Notes on where llama.cpp differs.

    Raises:
        InputError: llama.cpp does not know such a tokenizer.
    """
    name, notes = words_of(tokenizer)
    tokens, types = _tokens(tokenizer, size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    starts, ends = _added(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind, number in (
        ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
    ):  # fmt: skip
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """The token and its type for each row of the embedding."""
    from gguf import TokenType

    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= size:
        raise InputError(f"tokenizer: expected token numbers below {size}, the rows of the embedding, got {max(by_number)}")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        extra = added.get(number)
        if extra is not None and (extra.lstrip or extra.rstrip or extra.single_word):
            raise InputError(f"tokenizer: expected added tokens that take no spaces beside them, got {extra.content!r}")
        tokens.append(by_number.get(number, f"[PAD{number}]"))
        kind = TokenType.UNUSED if number not in by_number else TokenType.NORMAL
        if extra is not None:
            kind = TokenType.CONTROL if extra.special else TokenType.USER_DEFINED
        types.append(int(kind))
    return tokens, types


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last token behind it. It may add nothing else."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for starts in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * starts + plain + [tokenizer.eos_token_id] * ends:
                return starts, ends
    raise InputError(f"tokenizer: expected the first token before a text, the last one behind it or neither, got {whole}")
