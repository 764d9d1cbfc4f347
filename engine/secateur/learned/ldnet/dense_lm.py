"""Densely connected recurrent layers with a gate on each, and the language models that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.support.errors import InputError


class DenseLSTM(nn.Module):
    """Layers of which each reads the input and all layers before it: h_l = z_l F_l([x, h_1 ... h_(l-1)]); the output is
    [x, h_1 ... h_L] (Liu et al. 2018, arXiv 1804.07827, sections 3.1 and 3.2).

    As no layer's output passes through another, any layer can be taken out. input_size: width of x. widths: of the layers.
    gates: the z, one for each layer, a parameter that starts at ones and is not trained unless it is asked to be.
    layer_dropout: in training, the probability that a layer is hidden from the later ones; it still reaches the output.
    dropout: in training, of the elements that a layer reads.
    Raises InputError: a width below 1, a probability outside [0, 1).
    """

    def __init__(self, input_size: int, widths: Sequence[int], *, layer_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        if input_size < 1 or any(width < 1 for width in widths):
            raise InputError(f"width: expected at least 1, got {min(input_size, *widths, input_size)}")
        for name, value in (("layer_dropout", layer_dropout), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise InputError(f"{name}: expected a probability in [0, 1), got {value}")
        self.input_size, self.layer_dropout, self.dropout = input_size, layer_dropout, dropout
        self.layers = nn.ModuleList()
        for width in widths:
            self.layers.append(nn.LSTM(self.output_size, width, batch_first=True))
        self.gates = nn.Parameter(torch.ones(len(self.layers)), requires_grad=False)

    @property
    def widths(self) -> list[int]:
        return [int(layer.hidden_size) for layer in self.layers]  # type: ignore[arg-type]

    @property
    def output_size(self) -> int:
        return self.input_size + sum(self.widths)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, input_size] to [B, T, output_size]. Padding must come last: layers read from left to right."""
        # One draw of the generator of all, on the CPU, so that a checkpoint's state of it brings the same draws again.
        hidden = (torch.rand(len(self.layers)) < self.layer_dropout).tolist() if self.training else [False] * len(self.layers)
        output = visible = x
        for layer, gate, is_hidden in zip(self.layers, self.gates, hidden, strict=True):
            state, _ = layer(functional.dropout(visible, self.dropout, self.training))
            state = gate * state
            longer = torch.cat([output, state], -1)
            if is_hidden:
                visible = torch.cat([visible, torch.zeros_like(state)], -1)
            else:
                # As long as none was hidden, one copy serves both.
                visible = longer if visible is output else torch.cat([visible, state], -1)
            output = longer
        return output


class DirectedLM(nn.Module):
    """One direction's language model: word embeddings, dense layers, a ReLU projection, adaptive softmax (Grave et al. 2017).

    It reads words in the order that it is given; for the backward direction that is the reversed one. projection: the width of
    what the softmax reads; 0 for none, so that it reads the layers. cutoffs: of the softmax, rising numbers below `words`.
    Raises InputError: more cutoffs than what the softmax reads has width for, a quarter for each one's words.
    """

    def __init__(
        self,
        words: int,
        width: int,
        widths: Sequence[int],
        cutoffs: Sequence[int],
        *,
        projection: int = 0,
        layer_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.dense = DenseLSTM(width, widths, layer_dropout=layer_dropout, dropout=dropout)
        size = self.dense.output_size
        if (projection or size) // 4 ** len(cutoffs) < 1:
            raise InputError(
                f"cutoffs: expected fewer for a softmax that reads {projection or size} values, got {len(cutoffs)}"
            )
        self.projection = nn.Sequential(nn.Linear(size, projection), nn.ReLU()) if projection else nn.Identity()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(projection or size, words, list(cutoffs))

    def losses(self, words: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """-log P of each target that the mask [B, T] (bool) has, in a row. words, targets: int64 [B, T]."""
        read = self.projection(self.dense(self.embedding(words)))
        negative: Tensor = -self.softmax(read[mask], targets[mask]).output
        return negative


class LanguageModels(nn.Module):
    """A forward and a backward language model over the same words; they share no weights. Arguments: of `DirectedLM`."""

    def __init__(self, words: int, width: int, widths: Sequence[int], cutoffs: Sequence[int], **options: float) -> None:
        super().__init__()
        made = [DirectedLM(words, width, widths, cutoffs, **options) for _ in range(2)]  # type: ignore[arg-type]
        self.ahead, self.back = made

    def losses(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-log P of the forward and of the backward model for each token that there is.

        words: int64 [B, T], each row a sentence between two boundary marks, then padding; mask [B, T] (bool) has all but the
        padding. The forward model reads w_0 ... w_(n-1) and predicts w_1 ... w_n; the backward one reads w_n ... w_1 and
        predicts w_(n-1) ... w_0.
        """
        turned = reverse(words, mask)
        there = mask[:, 1:]
        return (
            self.ahead.losses(words[:, :-1], words[:, 1:], there),
            self.back.losses(turned[:, :-1], turned[:, 1:], there),
        )

    def forward(self, words: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The mean loss of both directions, as a Trainer wants it."""
        ahead, back = self.losses(words, mask)
        return {"loss": (ahead.mean() + back.mean()) / 2}


def reverse(rows: Tensor, mask: Tensor) -> Tensor:
    """Each row's first tokens, those in the mask [B, T], in reversed order; padding stays where it is. rows: [B, T, ...]."""
    lengths = mask.sum(1, keepdim=True)
    position = torch.arange(rows.shape[1], device=rows.device)
    index = (lengths - 1 - position).where(mask, position)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]


class ContextStates(nn.Module):
    """What a tagger reads of the language models: [h ; h_rev] for each word, aligned.

    words, ahead, back: of the models. The states of word t are those after reading the mark and the words up to t from the
    left, and the mark and the words down to t from the right. boundary: the mark's id.
    """

    def __init__(
        self, words: int, width: int, ahead: Sequence[int], back: Sequence[int], *, boundary: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.boundary = boundary
        self.embeddings = nn.ModuleList(nn.Embedding(words, width) for _ in range(2))
        self.dense = nn.ModuleList(DenseLSTM(width, widths, dropout=dropout) for widths in (ahead, back))

    @property
    def directions(self) -> list[DenseLSTM]:
        """Forward, then backward."""
        return list(self.dense)  # type: ignore[arg-type]

    @property
    def output_size(self) -> int:
        return sum(dense.output_size for dense in self.directions)

    def take_from_(self, models: LanguageModels) -> None:
        """Copies the weights of both language models, and freezes them; only gates may still be trained."""
        for number, model in enumerate((models.ahead, models.back)):
            self.embeddings[number].load_state_dict(model.embedding.state_dict())
            self.dense[number].load_state_dict(model.dense.state_dict())
        self.requires_grad_(False)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """words (int64 [B, T]) without marks, mask [B, T] (bool) to [B, T, output_size]."""
        ahead = self._states(0, words)
        back = reverse(self._states(1, reverse(words, mask)), mask)
        return torch.cat([ahead, back], -1)

    def _states(self, number: int, words: Tensor) -> Tensor:
        marked = functional.pad(words, (1, 0), value=self.boundary)
        states: Tensor = self.dense[number](self.embeddings[number](marked))
        return states[:, 1:]
