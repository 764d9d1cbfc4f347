"""A model as one function from its inputs to its logits, and that function as a graph of OpenVINO."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.errors import InputError
from secateur.tasks.model_config import end_mark

OUTPUT = "logits"


class Logits(nn.Module):
    """A model that returns only its logits, without a cache of keys and values.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [batch, classes] or [batch, length, classes]. Only the inputs that the model takes are given."""
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids, "pixel_values": pixel_values,
            "decoder_attention_mask": decoder_attention_mask,
        }  # fmt: skip
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        logits: Tensor = self.model(**given, **self._options).logits
        return logits


def openvino_graph(model: Any, example: Mapping[str, Tensor]) -> Any:
    """Return a model's logits as a graph of OpenVINO, for any batch size and length. Its attention becomes `eager`.

    Args:
        model: The model in float32, on the CPU, in eval mode.
        example: Inputs with at least two examples and two tokens, and padding if the model reads texts.

    Returns:
        The openvino.Model, with the names of the example's inputs and the output `OUTPUT`.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    model.set_attn_implementation("eager")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # Of the trace, on sizes that it might fix. Who asks for the graph compares it.
        options = {"check_trace": False}  # The check runs the model twice more.
        traced = TorchScriptPythonDecoder(Logits(model).eval(), example_input=dict(example), trace_kwargs=options)
        # openvino.convert_model does the same, and reports its use to OpenVINO's makers.
        frontend = FrontEndManager().load_by_framework("pytorch")
        graph = frontend.convert(frontend.load(traced))
    graph.outputs[0].get_tensor().set_names({OUTPUT})
    return graph


def takes_segments(model: Any) -> bool:
    """Tell whether a model knows several segments, which `token_type_ids` number. RoBERTa's kin know one alone."""
    several: bool = getattr(model.config, "type_vocab_size", 1) > 1
    return several and "token_type_ids" in inspect.signature(model.forward).parameters


def require_fixed(model: Any) -> None:
    """Refuse a model that no graph of fixed operations follows.

    Args:
        model: The model.

    Raises:
        InputError: The outputs for a text depend on where its end mark is, or rotary positions on the length of the text.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    for of_kind in (rope, *(entry for entry in rope.values() if isinstance(entry, dict))):  # Gemma 3 has some for each kind.
        if of_kind.get("rope_type") in ("dynamic", "longrope"):
            raise InputError(
                f"model: expected rotary positions that do not depend on the length of a text, got {of_kind['rope_type']}"
            )
    if end_mark(model) is not None:
        raise InputError(
            f"model: expected one whose logits do not depend on the place of an end mark, got {type(model).__name__}"
        )
