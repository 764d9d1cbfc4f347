"""Contexts that restore a model's modes, flags, parameters and settings at their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.model.families import split_token_rows
from secateur.model.ordinary import require_model
from secateur.support.compat import own_parameters


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode, its parameters are frozen, and its linear layers see [B, T, channels].

    Feed-forward layers see all tokens at once, as in `whole_feed_forward`.

    At the end each module has its mode and each parameter its flag again. The modules also have their own parameters again:
    Accelerate makes new parameters at each forward pass of an offloaded module, and these are no longer tied.
    """
    require_model(model)
    modes = {module: module.training for module in model.modules()}
    own = {module: dict(own_parameters(module)) for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = split_token_rows(model)
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        with whole_feed_forward(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
            own_parameters(module).update(own[module])
        for parameter, flag in flags.items():
            with torch.inference_mode(parameter.is_inference()):  # Only there may an inference tensor get a flag.
                parameter.requires_grad_(flag)


@contextmanager
def whole_feed_forward(model: nn.Module) -> Iterator[None]:
    """A context in which feed-forward layers run once for all tokens, also where `config.chunk_size_feed_forward` is set.

    In chunks, a hook would see the last chunk alone, and lengths that are no multiple of the chunk fail.
    """
    chunked: list[Any] = [module for module in model.modules() if getattr(module, "chunk_size_feed_forward", 0)]
    sizes = [module.chunk_size_feed_forward for module in chunked]
    try:
        for module in chunked:
            module.chunk_size_feed_forward = 0
        yield
    finally:
        for module, size in zip(chunked, sizes, strict=True):
            module.chunk_size_feed_forward = size
