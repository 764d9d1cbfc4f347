"""LabelTree: candidate labels as a tree of their pieces, so that a common beginning of labels is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.support.errors import InputError

# The most logits held at once, where labels are many: 256 MiB in float32.
_LOGITS = 1 << 26


class LabelTree:
    """The tree of all prefixes of the labels' pieces that are followed by one more piece.

    The empty prefix is the root, node 0. Parents come before children. All nodes fit into one sequence: each node sees its
    ancestors and itself, and its position is its depth.

    Attributes:
        labels: The number of labels.
        prefixes: The prefixes, one for each node.
        depths: The number of pieces of each prefix [nodes], int64.
        sees: Which nodes each node sees [nodes, nodes], bool, with a row for each node.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        numbers: dict[tuple[int, ...], int] = {(): 0}
        edges: list[tuple[int, int, int]] = []
        for number, label in enumerate(labels):
            for length, piece in enumerate(label):
                node = numbers.setdefault(tuple(label[:length]), len(numbers))
                edges.append((number, node, piece))
        self.labels = len(labels)
        self.prefixes = list(numbers)
        self._edges = edges
        with torch.inference_mode(False):  # The tensors are kept, and a later pass may need gradients.
            self.depths = torch.tensor([len(prefix) for prefix in self.prefixes])
            self.sees = torch.eye(len(self), dtype=torch.bool)
            for node, prefix in enumerate(self.prefixes[1:], start=1):
                self.sees[node] |= self.sees[numbers[prefix[:-1]]]

    @property
    def longest(self) -> int:
        """The number of pieces of the longest label."""
        return int(self.depths.max()) + 1

    def rows(self, vocabulary: int) -> int:
        """Return how many inputs to score at once, so that the logits of all nodes take 256 MiB at most, but 1 at least."""
        return max(1, _LOGITS // (len(self) * vocabulary))

    def __len__(self) -> int:
        return len(self.prefixes)

    def pieces(self, root: int) -> Tensor:
        """Return the last piece of each node's prefix [nodes], int64; `root` for the root."""
        return torch.tensor([prefix[-1] if prefix else root for prefix in self.prefixes])

    def log_probabilities(self, *logits: Tensor) -> Tensor:
        """Return log P(label) [B, labels], summed over the pieces.

        Args:
            logits: The logits after each node [B, nodes, vocabulary], in one tensor or in several, in the order of the nodes.
        """
        steps, numbers, first = [], [], 0
        for part in logits:
            # Chosen in Python: a choice by a tensor's values would break a compiled graph.
            chosen = [edge for edge in self._edges if first <= edge[1] < first + part.shape[1]]
            number, node, piece = torch.tensor(chosen, dtype=torch.int64, device=part.device).view(-1, 3).T
            node = node - first
            steps.append(_wide(part[:, node, piece]) - _log_totals(part)[:, node])  # [B, edges of the part]
            numbers.append(number)
            first += part.shape[1]
        of_edges, labels = torch.cat(steps, 1), torch.cat(numbers)
        return of_edges.new_zeros(len(of_edges), self.labels).index_add_(1, labels, of_edges)


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_totals(logits: Tensor) -> Tensor:
    """The logarithm of the summed exponentials [B, nodes] of logits [B, nodes, vocabulary].

    Few rows at a time, because logsumexp and the conversion to float32 copy what they are given.
    """
    rows = max(1, _LOGITS // 8 // (logits.shape[1] * logits.shape[2]))
    return torch.cat([_wide(part).logsumexp(-1) for part in torch.split(logits, rows)])


def require_pieces(labels: Sequence[str], pieces: Sequence[Sequence[int]], nothing: Sequence[int]) -> None:
    """Refuse labels that cannot be ranked by their pieces.

    Args:
        labels: The labels.
        pieces: The ids of each label.
        nothing: The ids of an empty text.

    Raises:
        InputError: The tokenizer encodes a label to nothing, or two labels alike.
    """
    label_of: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, pieces, strict=True):
        if tuple(ids) == tuple(nothing):
            raise InputError(
                f"labels: expected labels of one piece at least, got {label!r}, which the tokenizer encodes to nothing"
            )
        other = label_of.setdefault(tuple(ids), label)
        if other != label:
            raise InputError(
                f"labels: expected labels that the tokenizer tells apart, got {other!r} and {label!r}, which it encodes alike"
            )
