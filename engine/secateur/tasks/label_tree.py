"""Candidate labels as a tree of their pieces, so that what labels begin with alike is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LabelTree:
    """The prefixes of the labels' pieces that are followed by one more piece; the empty one is the root, node 0.

    All nodes can stand side by side in one sequence: each sees its ancestors and itself, at the position that its depth gives
    it. Parents come before children.

    depths: the number of pieces of each prefix [nodes], int64. sees: which nodes are ancestors of a node, or the node itself
    [nodes, nodes], bool; a row for each node.
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
        with torch.inference_mode(False):  # They stay, and a later pass may want gradients.
            self._edges = torch.tensor(edges, dtype=torch.int64).T
            self.depths = torch.tensor([len(prefix) for prefix in self.prefixes])
            self.sees = torch.eye(len(self), dtype=torch.bool)
            for node, prefix in enumerate(self.prefixes[1:], start=1):
                self.sees[node] |= self.sees[numbers[prefix[:-1]]]

    @property
    def longest(self) -> int:
        """The most pieces of a label."""
        return int(self.depths.max()) + 1

    def __len__(self) -> int:
        return len(self.prefixes)

    def pieces(self, root: int) -> Tensor:
        """The piece [nodes] that leads to each node, int64; `root` leads to the first."""
        return torch.tensor([prefix[-1] if prefix else root for prefix in self.prefixes])

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """log P(label) [B, labels], the sum over its pieces, from the logits [B, nodes, vocabulary] after each node."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        number, node, piece = self._edges.to(logits.device)
        steps = logits[:, node, piece] - logits.logsumexp(-1)[:, node]
        return steps.new_zeros(len(logits), self.labels).index_add_(1, number, steps)
