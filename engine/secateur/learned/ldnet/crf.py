"""A linear-chain conditional random field: likelihood by the forward algorithm, the best path by Viterbi's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.support.errors import InputError


class ConditionalRandomField(nn.Module):
    """Scores of tag sequences (Lafferty et al. 2001): s(y) = start[y_1] + sum_t e[t, y_t] + sum_t transition[y_t, y_t+1]
    + end[y_T]; P(y) = exp s(y) / sum over all y' of exp s(y').

    Emissions are [B, T, tags]; a mask [B, T] (bool) tells tokens from padding: each row's tokens come first, one at least.
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(tags))
        self.end = nn.Parameter(torch.empty(tags))
        self.transitions = nn.Parameter(torch.empty(tags, tags))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """log P of the tags (int64 [B, T], any at padding) for each row [B]. Raises InputError for a mask of another form."""
        _require_mask(emissions, mask)
        tags = tags.where(mask, 0)
        score = emissions.gather(2, tags.unsqueeze(2)).squeeze(2).where(mask, 0).sum(1)
        score = score + self.transitions[tags[:, :-1], tags[:, 1:]].where(mask[:, 1:], 0).sum(1)
        last = tags.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        return score + self.start[tags[:, 0]] + self.end[last] - self.log_partition(emissions, mask)

    def log_partition(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """log of the sum over all tag sequences of exp s(y) [B]."""
        alpha = self.start + emissions[:, 0]
        for t in range(1, emissions.shape[1]):
            # [B, from, to]
            after = (alpha.unsqueeze(2) + self.transitions).logsumexp(1) + emissions[:, t]
            alpha = after.where(mask[:, t, None], alpha)
        return (alpha + self.end).logsumexp(1)

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """The most likely tags of each row, without padding; of equally likely ones those with the lower numbers last.
        Raises InputError for a mask of another form."""
        _require_mask(emissions, mask)
        best = self.start + emissions[:, 0]
        # For each token but the first, which tag comes before each tag on the best path to it [B, tags]; itself at padding.
        same = torch.arange(best.shape[1], device=best.device)
        pointers = []
        for t in range(1, emissions.shape[1]):
            score, before = (best.unsqueeze(2) + self.transitions).max(1)
            best = (score + emissions[:, t]).where(mask[:, t, None], best)
            pointers.append(before.where(mask[:, t, None], same))
        path = [(best + self.end).argmax(1)]
        for before in reversed(pointers):
            path.append(before.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        rows = torch.stack(path[::-1], 1).tolist()
        return [row[:length] for row, length in zip(rows, mask.sum(1).tolist(), strict=True)]


def _require_mask(emissions: Tensor, mask: Tensor) -> None:
    if mask.shape != emissions.shape[:2] or mask.dtype != torch.bool:
        wanted = list(emissions.shape[:2])
        raise InputError(f"mask: expected bool {wanted}, got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}")
    if not bool(mask[:, :1].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise InputError("mask: expected each row's tokens first, one at least, and padding after them, got another order")
