"""How many positions a model has for the tokens of an input."""

from __future__ import annotations

from typing import Any

from torch import nn

# What the families of transformers call the embedding of a token's position.
_TABLES = {"position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe"}


def positions(model: nn.Module) -> int | None:
    """Return the number of positions that a model was made for, None where neither its config nor a table of them tells it.

    Models without a table (rotary or relative positions) compute longer inputs too, but were not trained on them.
    """
    table = table_positions(model)
    return _claimed(model) if table is None else table


def table_positions(model: nn.Module, part: nn.Module | None = None) -> int | None:
    """Return the most tokens that a model's table of position embeddings serves, None without a table.

    Args:
        model: The model.
        part: Look only into this part of the model, such as its encoder.
    """
    claimed, sizes = _claimed(model), []
    for name, module in (model if part is None else part).named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            rows = module.num_embeddings
            # The table of another input, such as an image's patches, has another size than the config says. BART's kin have
            # two rows more.
            if claimed is None or claimed <= rows <= claimed + 2:
                sizes.append(min(rows - _offset(module), rows if claimed is None else claimed))
    return min(sizes, default=None)


def hard_limit(model: nn.Module, part: nn.Module | None = None) -> int | None:
    """Return the smaller of `table_positions` and `steady_positions`, None where the model has neither."""
    return min((limit for limit in (table_positions(model, part), steady_positions(model)) if limit is not None), default=None)


def steady_positions(model: nn.Module) -> int | None:
    """Return the number of positions after which a model computes all tokens otherwise, None for a model without such a number.

    Rotary positions of the types "longrope" and "dynamic" change their frequencies once the longest input of a batch is longer.
    The outputs for a shorter input would depend on the inputs beside it.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rotary = getattr(config, "rope_parameters", None) or {}
    parts = [
        rotary,
        *(part for part in rotary.values() if isinstance(part, dict)),
    ]  # Some configs have one for each layer type.
    kinds = [part.get("rope_type") or "" for part in parts]
    long = [part["original_max_position_embeddings"] for part, kind in zip(parts, kinds, strict=True) if kind == "longrope"]
    dynamic = [config.max_position_embeddings for kind in kinds if "dynamic" in kind]
    return min([*long, *dynamic], default=None)


def sliding_window(model: nn.Module) -> int | None:
    """Return the number of tokens that a token sees in layers with a window, itself included; None without such layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    # Without kinds all layers slide (Mistral).
    return window if kinds is None or "sliding_attention" in kinds else None


def _claimed(model: nn.Module) -> int | None:
    """The config's `max_position_embeddings`. GPT-2's kin have it under this name too, as an alias of `n_positions`."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    claimed: int | None = getattr(config, "max_position_embeddings", None)
    return claimed if claimed is None or claimed > 0 else None


def _offset(table: nn.Embedding) -> int:
    """The row of the first token. RoBERTa's kin keep the rows up to the padding id free, BART's kin tell their own offset."""
    if type(table) is nn.Embedding and table.padding_idx is not None:
        return table.padding_idx + 1
    return getattr(table, "offset", 0)
