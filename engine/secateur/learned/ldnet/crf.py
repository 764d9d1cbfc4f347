"""A linear-chain conditional random field: likelihoods by the forward algorithm, the best path by the Viterbi algorithm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.support.errors import InputError


class ConditionalRandomField(nn.Module):
    """A linear-chain conditional random field over tag sequences.

    The score of a tag sequence y with emissions e is
    s(y) = start[y_1] + sum_t e[t, y_t] + sum_t transition[y_t, y_t+1] + end[y_T],
    and its probability is P(y) = exp s(y) / (sum over all y' of exp s(y')).

    All methods take emissions [B, T, tags] and a padding mask [B, T] (bool), True at tokens. In each row tokens come first, at
    least one.

    Args:
        tags: The number of tags.

    References:
        Lafferty et al. 2001 (conditional random fields).
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(tags))
        self.end = nn.Parameter(torch.empty(tags))
        self.transitions = nn.Parameter(torch.empty(tags, tags))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Compute log P(tags) of each row.

        Args:
            emissions: Tag scores of each token, floating point [B, T, tags].
            tags: Tag numbers, int64 [B, T]; any value at padding.
            mask: Padding mask, bool [B, T], True at tokens.

        Returns:
            Log-likelihoods, floating point [B].

        Raises:
            InputError: The mask has another shape or dtype, an empty row, or padding before a token.
        """
        _require_mask(emissions, mask)
        tags = tags.where(mask, 0)  # [B, T]
        score = emissions.gather(2, tags.unsqueeze(2)).squeeze(2).where(mask, 0).sum(1)  # [B]
        score = score + self.transitions[tags[:, :-1], tags[:, 1:]].where(mask[:, 1:], 0).sum(1)  # [B]
        last = tags.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)  # [B]
        return score + self.start[tags[:, 0]] + self.end[last] - self.log_partition(emissions, mask)

    def log_partition(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Compute the log of the sum of exp s(y) over all tag sequences y.

        Args:
            emissions: Tag scores of each token, floating point [B, T, tags].
            mask: Padding mask, bool [B, T], True at tokens.

        Returns:
            Log partition functions, floating point [B].
        """
        alpha = self.start + emissions[:, 0]  # [B, tags]
        for t in range(1, emissions.shape[1]):
            # The sum is [B, from, to], its logsumexp [B, to].
            next_alpha = (alpha.unsqueeze(2) + self.transitions).logsumexp(1) + emissions[:, t]
            alpha = next_alpha.where(mask[:, t, None], alpha)
        return (alpha + self.end).logsumexp(1)

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """Find the most likely tag sequence of each row by the Viterbi algorithm.

        Ties break from the last token backwards: the lower tag number wins.

        Args:
            emissions: Tag scores of each token, floating point [B, T, tags].
            mask: Padding mask, bool [B, T], True at tokens.

        Returns:
            The tag numbers of each row, without padding.

        Raises:
            InputError: The mask has another shape or dtype, an empty row, or padding before a token.
        """
        _require_mask(emissions, mask)
        best = self.start + emissions[:, 0]  # [B, tags]: the best score of a path that ends in each tag
        # One tensor [B, tags] for each token but the first: the previous tag on the best path to each tag. At padding a tag
        # points to itself.
        same_tag = torch.arange(best.shape[1], device=best.device)  # [tags]
        pointers = []
        for t in range(1, emissions.shape[1]):
            score, previous = (best.unsqueeze(2) + self.transitions).max(1)  # [B, from, to] to [B, to]
            best = (score + emissions[:, t]).where(mask[:, t, None], best)
            pointers.append(previous.where(mask[:, t, None], same_tag))
        path = [(best + self.end).argmax(1)]  # [B] for each token, last token first
        for previous in reversed(pointers):
            path.append(previous.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        rows = torch.stack(path[::-1], 1).tolist()  # [B, T]
        return [row[:length] for row, length in zip(rows, mask.sum(1).tolist(), strict=True)]


def _require_mask(emissions: Tensor, mask: Tensor) -> None:
    """Raise InputError unless the mask is bool [B, T] with the tokens of each row, at least one, before its padding."""
    if mask.shape != emissions.shape[:2] or mask.dtype != torch.bool:
        expected = list(emissions.shape[:2])
        raise InputError(f"mask: expected bool {expected}, got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}")
    if not bool(mask[:, :1].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise InputError("mask: expected at least one token in each row, then padding, got an empty row or another order")
