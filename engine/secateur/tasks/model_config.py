"""Fields of a model's config that decide what its outputs mean and where a text ends, read in one place."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from secateur.support.errors import InputError

OutputKind = Literal["label", "labels", "value", "text", "spans"]

# Architectures of transformers that compute with padding on the right: convolutions, averages or Fourier transforms over all
# tokens (CANINE, ConvBERT, FNet, Nyströmformer, YOSO), positions from the end (CPM-Ant), embeddings of the next token
# (MobileBERT), or a head at the last place (XLNet).
_READING_PADDING = ("canine", "convbert", "cpmant", "fnet", "mobilebert", "nystromformer", "xlnet", "yoso")


def output_kind(model: nn.Module) -> OutputKind:
    """Return the meaning of a classifier's outputs [B, outputs], from its config.

    Returns:
        "label" for the logits of a softmax, of which one label is right; "labels" for the logits of sigmoids, of which any
            number is right (`problem_type` "multi_label_classification"); "value" for one output that is a number itself, as
            in regression, cross-encoders and reward models.

    Raises:
        InputError: A model for several labels has one output, or a model for regression has several.
    """
    config: Any = getattr(model, "config", None)
    problem, outputs = getattr(config, "problem_type", None), len(getattr(config, "id2label", None) or (0, 1))
    if problem == "multi_label_classification":
        if outputs == 1:
            raise InputError("model: expected two outputs or more for several labels (config.problem_type), got one")
        return "labels"
    if problem == "regression" and outputs > 1:
        raise InputError(f"model: expected one output for regression (config.problem_type), got {outputs}")
    return "value" if outputs == 1 else "label"


def padding_id(model: nn.Module) -> int | None:
    """Return the id that the model takes for padding, None where its config names none or one outside its embedding."""
    config: Any = getattr(model, "config", None)
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    padding = getattr(text_config, "pad_token_id", None)
    return padding if padding is not None and 0 <= padding < _embedding_rows(model) else None


def end_mark(model: nn.Module) -> int | None:
    """Return the id at which a classifier with an encoder and a decoder reads a text, None for other models.

    The decoder of these classifiers (BART, T5) runs over the input, shifted by one token.
    """
    config: Any = getattr(model, "config", None)
    reads = getattr(config, "is_encoder_decoder", False) and _forward_reads(model, "eos_token_id")
    end: int | None = config.eos_token_id if reads else None
    return end


def require_dictionaries(model: nn.Module) -> None:
    """Refuse a model whose outputs are tuples: parts of transformers' own forward passes fail on them.

    Raises:
        InputError: `config.return_dict` is false.
    """
    if getattr(getattr(model, "config", None), "return_dict", True) is False:
        raise InputError("model: expected return_dict true in its config, got false: set model.config.return_dict = True")


def require_blind_to_padding(model: nn.Module) -> None:
    """Refuse a model whose outputs for one input change with the padding, and so with the other inputs of its batch.

    Raises:
        InputError: The model is of an architecture of transformers that is known to read padding.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _READING_PADDING:
        raise InputError(f"model: expected one whose outputs do not depend on padding, got a {type(model).__name__} ({kind})")


def require_causal(model: nn.Module) -> None:
    """Refuse a language model in which a token sees the tokens after it: it would read the target that it is asked for.

    Raises:
        InputError: The config switches causal attention off (`is_causal`, `use_bidirectional_attention`, `causal`, `attn_type`
            of XLNet), or the model is an encoder whose config lacks `is_decoder`.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = {"is_causal": (False,), "causal": (False,), "use_bidirectional_attention": (True, "all"), "attn_type": ("bi",)}
    for field, wrong in settings.items():
        if getattr(config, field, None) in wrong:
            raise InputError(
                f"model: expected one whose tokens see only the tokens before them, got a {type(model).__name__} with "
                f"{field} {getattr(config, field)!r} in its config"
            )
    # Encoders such as BERT pass the config's field on to their layers. The fields of other models say nothing (GPT-NeoX).
    if any(getattr(module, "is_decoder", None) is False for module in model.modules()):
        raise InputError(
            f"model: expected one whose tokens see only the tokens before them, got a {type(model).__name__} without "
            "is_decoder in its config"
        )


def require_end_by_padding(model: nn.Module) -> None:
    """Refuse a classifier that finds a text's last token by the padding, and whose config names no padding.

    Classifiers with a decoder alone (Llama, GPT-2, OPT) read the last token that is not `config.pad_token_id`.

    Raises:
        InputError: `config.pad_token_id` is None, or is outside the embedding.
    """
    if not _forward_reads(model, "pad_token_id") or padding_id(model) is not None:
        return
    given = model.config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
    raise InputError(
        f"model: expected a pad_token_id in its config, by which {type(model).__name__} finds the last token of a text, "
        f"got {given}: set model.config.pad_token_id, or pad_token_id in config.json"
    )


def require_decoder_start(model: nn.Module) -> None:
    """Refuse a model with an encoder and a decoder whose config does not say how the decoder's input begins.

    Raises:
        InputError: `config.decoder_start_token_id` or `config.pad_token_id` is None, or padding is the mark at which a
            classifier reads a text.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return
    for field in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, field, None) is None:
            raise InputError(f"model: expected a {field} in its config, which the decoder's input needs, got None")
    end = end_mark(model)
    if end is not None and end == config.pad_token_id:
        raise InputError(f"model: expected an eos_token_id in its config that is not the pad_token_id, got {end} for both")


def _forward_reads(model: nn.Module, field: str) -> bool:
    """Return whether the code of the model's forward pass names a field of the config."""
    # The pruned classes inherit the forward pass, and decorators keep it as `__wrapped__`.
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and field in code.co_names


def _embedding_rows(model: nn.Module) -> float:
    """Return the number of ids that the embedding has, infinite for a model that does not say where its embedding is."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return float("inf")
