"""LengthBatches: whole passes over the items in random order, with like lengths together, the same in every iteration."""

from __future__ import annotations

import torch

from secateur.healing.length_batches import LengthBatches


def test_batches_are_the_same_in_every_iteration_and_cover_the_items() -> None:
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthBatches(lengths, 4, 25, seed=3)
    batches = list(sampler)
    assert batches == list(sampler)
    assert batches != list(LengthBatches(lengths, 4, 25, seed=4))
    assert [len(batch) for batch in batches] == [4] * 25
    counts = [sum(batch.count(number) for batch in batches) for number in range(40)]
    assert min(counts) >= 2  # 100 draws are two and a half passes.
    assert max(counts) <= 3


def test_items_of_like_length_are_together() -> None:
    lengths = list(range(64))
    sorted_batches, drawn = list(LengthBatches(lengths, 8, 8, seed=0)), torch.randperm(64).tolist()
    spread = sum(max(batch) - min(batch) for batch in sorted_batches)
    assert spread == 7 * 8  # One pool holds all, so each batch has eight neighbours.
    assert spread < sum(max(drawn[k : k + 8]) - min(drawn[k : k + 8]) for k in range(0, 64, 8))


def test_fewer_items_than_a_batch_are_one_batch() -> None:
    batches = list(LengthBatches([5, 6], 16, 3, seed=0))
    assert [len(batch) for batch in batches] == [2] * 3
    assert sorted(number for batch in batches for number in batch) == [0, 0, 0, 1, 1, 1]
