"""Generation by the logits alone, greedy or with beams, whatever the model's generation settings say."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.errors import InputError
from secateur.tasks.batches import Batch
from secateur.tasks.shared_prefix import SharedPrefix

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class NotFiniteError(InputError):
    """The model's outputs for a row are NaN or inf."""


def generated(model: nn.Module, batch: Batch, longest: int, beams: int = 1, prefix: SharedPrefix | None = None) -> Tensor:
    """Return the ids that a model generates.

    Of the model's `generation_config` only the ids of special pieces count: where an output begins, ends and is padded. Its
    beams, sampling, penalties, least lengths, and forced or forbidden pieces are left out: the output is that of the logits
    alone.

    Args:
        model: The model.
        batch: The inputs.
        longest: The most new pieces.
        beams: The number of beams. 1 is greedy: at each step the piece with the highest logit. Of more beams the output with
            the highest mean log-probability of a piece is returned.
        prefix: What the model has run of the first tokens of every row, which then have no padding among them.

    Returns:
        Ids [B, pieces] as `generate` returns them.

    Raises:
        NotFiniteError: A logit is NaN or inf.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    def require_finite(ids: Tensor, logits: Tensor) -> Tensor:
        wrong = (~torch.isfinite(logits)).any(1)  # [B * beams]
        if bool(wrong.any()):
            row = min(batch.rows[k // beams] for k in wrong.nonzero().flatten().tolist())
            raise NotFiniteError(
                f"examples, row {row + 1}: the model's outputs are not finite (NaN or inf); is the dtype too narrow?"
            )
        return logits

    # `generate` fills the settings that it is given from the model's own, so a copy of the model has others. It shares the
    # modules and weights, and other threads may generate with the model meanwhile.
    plain: Any = copy.copy(model)
    kept = {name: getattr(plain.generation_config, name, None) for name in _KEPT}
    plain.generation_config = GenerationConfig(**kept, max_new_tokens=longest, num_beams=beams)
    checks = LogitsProcessorList([require_finite])
    known = {} if prefix is None else {"past_key_values": prefix.for_rows(len(batch.rows) * beams, grows=True)}
    ids: Tensor = plain.generate(**batch.inputs, **known, generation_config=plain.generation_config, logits_processor=checks)
    return ids
