"""Densely connected, gated LSTM layers, and the language models built from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.support.errors import InputError


class DenseLSTM(nn.Module):
    """Densely connected LSTM layers with a gate on each.

    Layer l reads the input and all earlier layers: h_l = z_l F_l([x, h_1 ... h_(l-1)]). The output is [x, h_1 ... h_L]. Every
    layer reaches the output directly, so any layer can be deleted.

    Args:
        input_size: The width of x.
        widths: The widths of the layers.
        layer_dropout: The probability in training that a layer is hidden from the later layers. It still reaches the output.
        dropout: The dropout probability in training of the elements that a layer reads.

    Attributes:
        gates: The gates z [layers], a parameter that starts at ones. Its requires_grad flag is False at first.

    Raises:
        InputError: A width is below 1, or a probability is outside [0, 1).

    References:
        Liu et al. 2018, arXiv 1804.07827, sections 3.1 (dense connectivity) and 3.2 (gates).
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
        """The widths of the layers."""
        return [int(layer.hidden_size) for layer in self.layers]  # type: ignore[arg-type]

    @property
    def output_size(self) -> int:
        """The width of [x, h_1 ... h_L]."""
        return self.input_size + sum(self.widths)

    def forward(self, x: Tensor) -> Tensor:
        """Run all layers.

        Args:
            x: Inputs, floating point [B, T, input_size]. Padding must come last, as layers read from left to right.

        Returns:
            [x, h_1 ... h_L], floating point [B, T, output_size].
        """
        # One draw for all layers from the CPU's generator: a checkpoint restores its state, so a resumed run draws the same.
        hidden = (torch.rand(len(self.layers)) < self.layer_dropout).tolist() if self.training else [False] * len(self.layers)
        output = visible = x  # `visible` is what the next layer reads: `output` with zeros for hidden layers.
        for layer, gate, is_hidden in zip(self.layers, self.gates, hidden, strict=True):
            state, _ = layer(functional.dropout(visible, self.dropout, self.training))
            state = gate * state  # [B, T, width]
            next_output = torch.cat([output, state], -1)
            if is_hidden:
                visible = torch.cat([visible, torch.zeros_like(state)], -1)
            else:
                # Until a layer is hidden, `visible` and `output` share one tensor.
                visible = next_output if visible is output else torch.cat([visible, state], -1)
            output = next_output
        return output


class DirectedLM(nn.Module):
    """A language model of one direction: word embeddings, dense layers, a ReLU projection, an adaptive softmax.

    The model reads words in the given order. For the backward direction the caller reverses them.

    Args:
        words: The number of words in the vocabulary.
        width: The width of the word embeddings.
        widths: The widths of the layers.
        cutoffs: The cutoffs of the adaptive softmax, rising word numbers below `words`.
        projection: The width of the projection that the softmax reads; 0 for none, then the softmax reads the layers' output.
        layer_dropout: As in `DenseLSTM`.
        dropout: As in `DenseLSTM`.

    Raises:
        InputError: There are too many cutoffs. The softmax divides its input width by four for each cutoff's words, and a
            width below 1 remains.

    References:
        Liu et al. 2018, arXiv 1804.07827.
        Grave et al. 2017, arXiv 1609.04309 (adaptive softmax).
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
        """Compute -log P of the targets.

        Args:
            words: Word numbers, int64 [B, T].
            targets: Word numbers to predict, int64 [B, T].
            mask: bool [B, T], True where a target counts.

        Returns:
            The losses of the targets that count, in row order, floating point [targets].
        """
        states = self.projection(self.dense(self.embedding(words)))  # [B, T, projection or output_size]
        losses: Tensor = -self.softmax(states[mask], targets[mask]).output
        return losses


class LanguageModels(nn.Module):
    """A forward and a backward language model over the same vocabulary. They share no weights.

    Args:
        words: The number of words in the vocabulary.
        width: The width of the word embeddings.
        widths: The widths of the layers.
        cutoffs: The cutoffs of the adaptive softmax.
        options: Further arguments of `DirectedLM`.

    Raises:
        InputError: As in `DirectedLM`.
    """

    def __init__(self, words: int, width: int, widths: Sequence[int], cutoffs: Sequence[int], **options: float) -> None:
        super().__init__()
        self.ahead, self.back = [DirectedLM(words, width, widths, cutoffs, **options) for _ in range(2)]  # type: ignore[arg-type]

    def losses(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute -log P of every token under the forward and under the backward model.

        The forward model reads w_0 ... w_(n-1) and predicts w_1 ... w_n. The backward model reads w_n ... w_1 and predicts
        w_(n-1) ... w_0.

        Args:
            words: Word numbers, int64 [B, T]. Each row is a sentence between two boundary marks, then padding.
            mask: Padding mask, bool [B, T], True at words and marks.

        Returns:
            The losses of the forward and of the backward model, floating point [predicted tokens] each.
        """
        reversed_words = reverse(words, mask)
        target_mask = mask[:, 1:]  # [B, T - 1]
        return (
            self.ahead.losses(words[:, :-1], words[:, 1:], target_mask),
            self.back.losses(reversed_words[:, :-1], reversed_words[:, 1:], target_mask),
        )

    def forward(self, words: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute the mean loss of both directions, in the form that a Trainer reads: {"loss": scalar}."""
        ahead, back = self.losses(words, mask)
        return {"loss": (ahead.mean() + back.mean()) / 2}


def reverse(rows: Tensor, mask: Tensor) -> Tensor:
    """Reverse the tokens of each row; padding stays at the end.

    Args:
        rows: Any dtype [B, T, ...].
        mask: Padding mask, bool [B, T], True at tokens, which come first in each row.

    Returns:
        A tensor of the shape of `rows`.
    """
    lengths = mask.sum(1, keepdim=True)  # [B, 1]
    position = torch.arange(rows.shape[1], device=rows.device)  # [T]
    index = (lengths - 1 - position).where(mask, position)  # [B, T]
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]


class ContextStates(nn.Module):
    """The language models' states that a tagger reads: [h ; h_rev] for each word.

    The forward states of word t come after reading the boundary mark and the words up to t from the left. The backward states
    come after reading the mark and the words down to t from the right.

    Args:
        words: The number of words in the language models' vocabulary.
        width: The width of their word embeddings.
        ahead: The widths of the forward model's layers.
        back: The widths of the backward model's layers.
        boundary: The number of the boundary mark.
        dropout: The dropout probability in training of the elements that a layer reads.

    References:
        Liu et al. 2018, arXiv 1804.07827, section 3.
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
        """The layers of the forward model, then those of the backward model."""
        return list(self.dense)  # type: ignore[arg-type]

    @property
    def output_size(self) -> int:
        """The width of both directions' states together."""
        return sum(dense.output_size for dense in self.directions)

    def take_from_(self, models: LanguageModels) -> None:
        """Copy the weights of both language models and freeze the copies. Tagger training may unfreeze the gates only."""
        for direction, model in enumerate((models.ahead, models.back)):
            self.embeddings[direction].load_state_dict(model.embedding.state_dict())
            self.dense[direction].load_state_dict(model.dense.state_dict())
        self.requires_grad_(False)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Compute the states of each word.

        Args:
            words: Word numbers without boundary marks, int64 [B, T].
            mask: Padding mask, bool [B, T], True at words.

        Returns:
            States, floating point [B, T, output_size].
        """
        ahead = self._states(0, words)
        back = reverse(self._states(1, reverse(words, mask)), mask)
        return torch.cat([ahead, back], -1)

    def _states(self, direction: int, words: Tensor) -> Tensor:
        """Compute one direction's states [B, T, width] of words in its reading order."""
        marked = functional.pad(words, (1, 0), value=self.boundary)  # [B, 1 + T]
        states: Tensor = self.dense[direction](self.embeddings[direction](marked))
        return states[:, 1:]
