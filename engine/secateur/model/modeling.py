"""Modules of a rebuilt model whose widths differ from layer to layer.

This file needs torch alone. `secateur.save` copies it into the folder of a rebuilt model, so that the folder loads where
secateur is not installed. `secateur.prune` and `secateur.load` use it too. Its one input is the recipe in the model's config
(`config.secateur`), which holds the sizes of each module that differs from the stock architecture.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Attributes of attentions that scale scores by the size of a head. T5, which does not scale, has another.
HEAD_SIZES = ("head_dim", "attention_head_size")


class AroundLinear(nn.Module):
    """A module around a plain linear layer, `linear`: it changes what goes in, or what comes out.

    Tools that adapt or quantise a model replace its nn.Linear modules. They find `linear`, and what is around it stays.

    Attributes:
        linear: An nn.Linear, or an EmptyLinear where it has no inputs or no outputs.
        in_features: The columns of its weight, or all inputs of a LowRankLinear.
        out_features: The rows of its weight.
    """

    linear: nn.Module

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    # The architectures' own code reads weights, as T5 does to learn the dtype.
    @property
    def weight(self) -> Any:
        """The weight of `linear`."""
        return self.linear.weight

    @property
    def bias(self) -> Any:
        """The bias of `linear`, or None."""
        return self.linear.bias


class ScatterLinear(AroundLinear):
    """A linear layer whose outputs are scattered among zeros: heads of unequal width, padded to one width.

    `slots` [width] (int64) holds for each output the row of `linear.weight` that fills it. `out_features` stands for a zero.
    """

    slots: Tensor

    def __init__(self, in_features: int, out_features: int, *, width: int, **options: Any) -> None:
        super().__init__(in_features, out_features)
        self.linear = _linear(in_features, out_features, **options)
        self.register_buffer("slots", torch.full((width,), out_features, device=options.get("device")))

    def forward(self, input: Tensor) -> Tensor:
        return functional.pad(self.linear(input), (0, 1)).index_select(-1, self.slots)


class GatherLinear(AroundLinear):
    """A linear layer that reads only some of its inputs: the counterpart of ScatterLinear.

    `slots` [in_features] (int64) holds for each column of `linear.weight` the input that it reads.
    """

    slots: Tensor

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features)
        self.linear = _linear(in_features, out_features, **options)
        self.register_buffer("slots", torch.zeros(in_features, dtype=torch.int64, device=options.get("device")))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.linear(input.index_select(-1, self.slots))
        return output


class LowRankLinear(AroundLinear):
    """A linear layer of low rank: `linear` [out_features, rank] after `basis` [rank, in_features], which has no bias."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features)
        self.linear = _linear(rank, out_features, bias=bias, **options)
        self.basis = _linear(in_features, rank, bias=False, **options)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.linear(self.basis(input))
        return output


class EmptyLinear(nn.Module):
    """A linear layer without inputs, which returns its bias alone, or without outputs.

    It is no nn.Linear, because quantisers replace nn.Linear and fail on an empty weight.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        # Without functional.linear: compilers would look for a kernel, and some have none for an empty matrix.
        nothing = input.new_zeros(*input.shape[:-1], self.out_features)
        return nothing if self.bias is None else nothing + self.bias


def with_own_position_bias(attention: type[nn.Module]) -> type[nn.Module]:
    """Return the attention class, changed to compute its position bias itself.

    The stock class takes the bias that the stack's first layer has computed for its own heads.
    """

    class OwnPositionBias(attention):  # type: ignore[misc, valid-type]
        has_own_position_bias = True

        def forward(self, *args: Any, position_bias: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    OwnPositionBias.__name__ = f"{attention.__name__}WithOwnPositionBias"
    return OwnPositionBias


def without_attention(attention: type[nn.Module], output: str | None) -> type[nn.Module]:
    """Return the attention class, changed to work without heads.

    Nothing is attended to, and the out-projection returns its bias alone. A position bias is handed on unchanged.

    Args:
        attention: The attention class.
        output: The name of the child that is the out-projection, or None where another module holds it.
    """
    hands_on = "position_bias" in inspect.signature(attention.forward).parameters

    class WithoutAttention(attention):  # type: ignore[misc, valid-type]
        def forward(
            self,
            hidden_states: Tensor,
            *args: Any,
            position_bias: Any = None,
            past_key_values: Any = None,
            key_value_states: Any = None,
            **kwargs: Any,
        ) -> Any:
            if past_key_values is not None and key_value_states is None:
                # A cache reads the length of the texts from the keys of its first layer: here, a channel of zeros.
                # shape[0] and not len: torch.export takes len as a constant and then accepts no other batch size.
                keys = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
                getattr(past_key_values, "self_attention_cache", past_key_values).update(keys, keys, self.layer_idx)
            nothing = hidden_states[..., :0]
            added = nothing if output is None else self.get_submodule(output)(nothing)
            return (added, position_bias, None) if hands_on else (added, None)

    WithoutAttention.__name__ = f"{attention.__name__}WithoutAttention"
    return WithoutAttention


def rebuild_(model: nn.Module, recipe: dict[str, Any], device: Any = None) -> None:
    """Give the modules named in the recipe their sizes, in place. The values of their parameters are then undefined.

    recipe: {"modules": {path: {"linear": [in, out], "bias": bool, "scatter": width, "gather": true, "rank": rank,
    "transposed": true (Conv1D)} or {"embedding": [rows, columns]}}, "attributes": {path: {name: value}},
    "own_position_bias": [path], "no_attention": {path: name of the out-projection, or null where another module holds it}}.
    A path may begin with the base model's prefix where the model is the base model itself.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = {name for name, _ in model.named_modules()}

    def find(path: str) -> str:
        short = path.removeprefix(prefix)
        return path if path in names or path.rpartition(".")[0] in names or short == path else short

    for path, spec in recipe["modules"].items():
        parent_path, _, name = find(path).rpartition(".")
        parent = model.get_submodule(parent_path)
        template = next(parent.parameters())
        options = {"device": device or template.device, "dtype": template.dtype}
        setattr(parent, name, _new_module(spec, options).train(parent.training))
    for path, values in recipe.get("attributes", {}).items():
        module = model.get_submodule(find(path))
        for name, value in values.items():
            # The scale of other classes is their own matter; `verify` shows whether it stays.
            own = type(module).__module__.startswith("transformers.")
            if own and name in HEAD_SIZES and getattr(module, name, value) != value and not hasattr(module, "scaling"):
                raise RuntimeError(
                    f"{path}: expected an attention that holds its scale, as in transformers 5, got one that computes it from "
                    "the size of its heads, which pruning has changed"
                )
            setattr(module, name, value)
    for path in recipe.get("own_position_bias", []):
        module = model.get_submodule(find(path))
        if not getattr(module, "has_own_position_bias", False):
            module.__class__ = with_own_position_bias(type(module))
    for path, output in recipe.get("no_attention", {}).items():
        module = model.get_submodule(find(path))
        module.__class__ = without_attention(type(module), output)


def _new_module(spec: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    if "embedding" in spec:
        return _undrawn(nn.Embedding, *spec["embedding"], **options)
    if "transposed" in spec:
        return _conv1d(*spec["linear"], **options)
    options = {**options, "bias": spec["bias"]}
    if "scatter" in spec:
        return ScatterLinear(*spec["linear"], width=spec["scatter"], **options)
    if "rank" in spec:
        return LowRankLinear(*spec["linear"], rank=spec["rank"], **options)
    return (GatherLinear if "gather" in spec else _linear)(*spec["linear"], **options)


def _linear(in_features: int, out_features: int, **options: Any) -> nn.Module:
    if 0 in (in_features, out_features):
        return EmptyLinear(in_features, out_features, **options)
    return _undrawn(nn.Linear, in_features, out_features, **options)


def _conv1d(inputs: int, outputs: int, *, device: Any, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device(device):
        layer: nn.Module = Conv1D(outputs, inputs).to(dtype)
    return layer


def _undrawn(kind: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
    """Return a new module without random initial weights: drawing them takes longer than all the rest."""
    module: nn.Module = type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})(*sizes, **options)
    module.__class__ = kind
    return module


def pruned_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Return the stock model class with a constructor that gives the model the shape in config.secateur."""

    class Pruned(stock):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            if getattr(config, "is_heterogeneous", False):
                # Of a config with fields of layers, stock classes cannot read the whole. The recipe says the same.
                config.per_layer_config = None
            super().__init__(config, *arguments, **options)
            rebuild_(self, config.secateur)

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{stock.__name__}"
    return Pruned
