"""Deletion of the layers whose gates are closed, and the FLOPs of a word."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.learned.ldnet.dense_lm import DenseLSTM
from secateur.learned.ldnet.tagger import Tagger


def delete_closed(tagger: Tagger) -> Tagger:
    """Build a tagger without the layers whose gate is 0.

    The columns that read these layers also go, from the later layers' input weights and from W_cr.

    Args:
        tagger: The tagger, which stays unchanged.

    Returns:
        A new tagger in the same mode. In eval mode it has the same logits, up to the rounding of sums in another order.

    References:
        Liu et al. 2018, arXiv 1804.07827.
    """
    open_layers, columns = zip(*(_open_layers(dense) for dense in tagger.context.directions), strict=True)
    widths = [tuple(dense.widths) for dense in open_layers]
    # The meta device allocates no weights; all of them are assigned below.
    with torch.device("meta"):
        pruned = Tagger(replace(tagger.settings, ahead=widths[0], back=widths[1]), tagger.vocabularies)
    ahead_size = tagger.context.directions[0].output_size
    state = {name: value for name, value in tagger.state_dict().items() if not name.startswith("context.dense.")}
    # [features, width of both directions' outputs] to [features, width of what stays]
    state["w_cr.weight"] = state["w_cr.weight"][:, torch.cat([columns[0], ahead_size + columns[1]])]
    for direction, dense in enumerate(open_layers):
        state.update({f"context.dense.{direction}.{name}": value for name, value in dense.state_dict().items()})
    pruned.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    pruned.requires_grad_(True)
    pruned.context.requires_grad_(False)
    return pruned.train(tagger.training)


def flops_per_word(tagger: Tagger, characters: int = 8) -> dict[str, int]:
    """Count the floating-point operations of tagging one word.

    A multiplication and an addition count as two. Look-ups, activations and padding are not counted.

    Args:
        tagger: The tagger.
        characters: The length of the word in characters, without the two marks around it.

    Returns:
        FLOPs of the language models' layers ("language models"), and of the whole tagger ("all").
    """
    settings = tagger.settings
    lm_flops = sum(_lstm_flops(layer) for dense in tagger.context.directions for layer in dense.layers)
    bilstm_flops = _lstm_flops(tagger.ahead) + _lstm_flops(tagger.back)
    linear_flops = 2 * tagger.w_cr.weight.numel() + 2 * tagger.emission.weight.numel()
    character_flops = 2 * (characters + 2) * tagger.characters.convolution.weight.numel()
    # The Viterbi algorithm does an addition and a comparison for each pair of tags.
    viterbi_flops = 2 * len(settings.tags) ** 2
    rest = bilstm_flops + linear_flops + character_flops + viterbi_flops
    return {"language models": lm_flops, "all": lm_flops + rest}


def _lstm_flops(layer: nn.Module) -> int:
    """Count the FLOPs of an LSTM layer for one word: two for each element of its weight matrices."""
    return 2 * sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))


def _open_layers(dense: DenseLSTM) -> tuple[DenseLSTM, Tensor]:
    """Copy the layers whose gate is not 0; also return the columns of the output [x, h_1 ... h_L] that stay (int64)."""
    kept = [number for number, gate in enumerate(dense.gates.tolist()) if gate != 0]
    widths = dense.widths
    pruned = DenseLSTM(dense.input_size, [widths[number] for number in kept], dropout=dense.dropout)
    pruned.to(dense.gates.device, dense.gates.dtype)
    starts = [dense.input_size + sum(widths[:number]) for number in range(len(widths))]
    # The columns of [x, h_1 ... h_(l-1)] that layer l still reads; they grow by the width of each kept layer.
    columns = torch.arange(dense.input_size, device=dense.gates.device)
    with torch.no_grad():
        pruned.gates.copy_(dense.gates[kept])
        for number, layer in zip(kept, pruned.layers, strict=True):
            state = dense.layers[number].state_dict()
            # weight_ih_l0 is [4 * width, columns read], with the four LSTM gates' rows one after another.
            layer.load_state_dict({**state, "weight_ih_l0": state["weight_ih_l0"][:, columns]})
            layer_columns = torch.arange(starts[number], starts[number] + widths[number], device=columns.device)
            columns = torch.cat([columns, layer_columns])
    return pruned, columns
