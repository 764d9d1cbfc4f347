"""Taking out the layers whose gates are closed, and what a word then costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.learned.ldnet.dense_lm import DenseLSTM
from secateur.learned.ldnet.tagger import Tagger


def delete_closed(tagger: Tagger) -> Tagger:
    """A tagger without the layers whose gate is 0, and without the columns that read them, in later layers' input weights and
    in W_cr; it has the same logits in eval mode, up to the order in which sums are added. The given one stays as it is."""
    slim, columns = zip(*(_open_layers(dense) for dense in tagger.context.directions), strict=True)
    widths = [tuple(dense.widths) for dense in slim]
    # Made without values, which come from the given one.
    with torch.device("meta"):
        pruned = Tagger(replace(tagger.settings, ahead=widths[0], back=widths[1]), tagger.vocabularies)
    ahead_size = tagger.context.directions[0].output_size
    state = {name: value for name, value in tagger.state_dict().items() if not name.startswith("context.dense.")}
    state["w_cr.weight"] = state["w_cr.weight"][:, torch.cat([columns[0], ahead_size + columns[1]])]
    for number, dense in enumerate(slim):
        state.update({f"context.dense.{number}.{name}": value for name, value in dense.state_dict().items()})
    pruned.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    pruned.requires_grad_(True)
    pruned.context.requires_grad_(False)
    return pruned.train(tagger.training)


def flops_per_word(tagger: Tagger, characters: int = 8) -> dict[str, int]:
    """Operations (a multiplication and an addition are two) of a word in tagging: of the language models' layers, and of all. A
    word has that many characters, between two marks; look-ups, activations and padding are not counted."""
    settings = tagger.settings
    models = sum(_lstm(layer) for dense in tagger.context.directions for layer in dense.layers)
    rest = 2 * tagger.w_cr.weight.numel() + _lstm(tagger.ahead) + _lstm(tagger.back) + 2 * tagger.emission.weight.numel()
    spelled = 2 * (characters + 2) * tagger.characters.convolution.weight.numel()
    # Viterbi's: an addition and a comparison for each pair of tags.
    return {"language models": models, "all": models + rest + spelled + 2 * len(settings.tags) ** 2}


def _lstm(layer: nn.Module) -> int:
    return 2 * sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))


def _open_layers(dense: DenseLSTM) -> tuple[DenseLSTM, Tensor]:
    """The layers whose gate is not 0, and which columns of the output [x, h_1 ... h_L] stay (int64)."""
    kept = [number for number, gate in enumerate(dense.gates.tolist()) if gate != 0]
    widths = dense.widths
    slim = DenseLSTM(dense.input_size, [widths[number] for number in kept], dropout=dense.dropout)
    slim.to(dense.gates.device, dense.gates.dtype)
    starts = [dense.input_size + sum(widths[:number]) for number in range(len(widths))]
    columns = torch.arange(dense.input_size, device=dense.gates.device)
    with torch.no_grad():
        slim.gates.copy_(dense.gates[kept])
        for number, layer in zip(kept, slim.layers, strict=True):
            state = dense.layers[number].state_dict()
            layer.load_state_dict({**state, "weight_ih_l0": state["weight_ih_l0"][:, columns]})
            own = torch.arange(starts[number], starts[number] + widths[number], device=columns.device)
            columns = torch.cat([columns, own])
    return slim, columns
