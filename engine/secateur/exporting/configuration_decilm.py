"""The config of a DeciLM (Nemotron-NAS), whose layers differ in heads and neurons.

vLLM and SGLang have the model's code, and read its config by this file (--trust-remote-code). It needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Fields(dict):  # type: ignore[type-arg]
    """An object of config.json whose fields are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(PretrainedConfig):  # type: ignore[misc]
    """A config whose `block_configs` describe each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **options: Any) -> None:
        super().__init__(**options)
        blocks = block_configs or []
        self.block_configs = [Fields({name: Fields(part) for name, part in block.items()}) for block in blocks]
