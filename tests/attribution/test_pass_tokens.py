"""Passes without a given number of tokens: 4,096 on a CPU, and by the free memory on a GPU, which is a fake one here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES

import secateur
from secateur.attribution.criteria import IntegratedGradients
from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.attribution.pass_tokens import LEAST, MOST, fitting, pass_tokens
from secateur.tasks import Batch

CASE = CASES["t5-gated"]
GIB = 2**30


@pytest.mark.parametrize(
    ("used", "tokens", "free", "expected"),
    [
        (4096 * 1000, 4096, 2 * 1000 * 16384, 16384),
        (4096 * 1000, 4096, 2 * 1000 * 16384 - 1, 8192),
        (4096 * 1000, 512, 2 * 1000 * 16384, LEAST),  # The same bytes of fewer tokens: eight times as many bytes a token.
        (GIB, 4096, GIB // 2, LEAST),
        (0, 4096, GIB, MOST),
        (GIB, 4096, 0, LEAST),
        (4096, 4096, 10**15, MOST),
    ],
)
def test_half_of_the_free_memory_is_filled_with_a_power_of_two(used: int, tokens: int, free: int, expected: int) -> None:
    assert fitting(used, tokens, free) == expected


class FakeGPU:
    """A GPU whose passes take some bytes a token. The first pass takes ten times as much, as libraries allocate then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, bytes_of_token: int) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._free, self._bytes, self._peak = free, bytes_of_token, 0
        fakes = {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device: setattr(self, "_peak", 0),
            "mem_get_info": lambda device: (self._free, 2 * self._free),
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: self._peak,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self, batch: Batch) -> None:
        """A pass."""
        self.shapes.append((len(batch.rows), batch.length))
        first = 10 if len(self.shapes) == 1 else 1
        self._peak = max(self._peak, first * self._bytes * len(batch.rows) * batch.length)

    def tokens(self, lengths: list[int], devices: tuple[str, ...] = ("cuda:0",), **options: Any) -> int:
        """What `pass_tokens` says of items of these lengths."""
        model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(name)) for name in devices]))
        task: Any = SimpleNamespace(
            collate=lambda items, device: SimpleNamespace(rows=[item.row for item in items], length=items[0].length)
        )
        items: Any = [SimpleNamespace(row=row, length=length, shared=0) for row, length in enumerate(lengths)]
        return pass_tokens(model, task, items, self.run, **options)


def test_a_gpu_is_measured_on_its_second_pass_of_the_longest_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch, free=2 * 1000 * 16384, bytes_of_token=1000)
    assert gpu.tokens([100] * 10_000 + [512] * 9) == 16384
    assert gpu.shapes == [(8, 512)] * 2


def test_no_more_tokens_than_leave_each_process_eight_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch, free=2**50, bytes_of_token=1)
    assert gpu.tokens([64] * 2048) == 16384
    assert gpu.tokens([64] * 2047) == 8192
    assert gpu.tokens([64] * 2048, processes=2) == 8192
    assert gpu.tokens([64] * 2048, batch_tokens=IntegratedGradients().batch_tokens) == MOST
    runs = len(gpu.shapes)
    assert gpu.tokens([64] * 1000) == LEAST  # Nothing is to be chosen, so nothing runs.
    assert len(gpu.shapes) == runs


@pytest.mark.parametrize("devices", [("cpu",), ("cuda:0", "cuda:1"), ("cuda:0", "meta")])
def test_other_models_than_those_on_one_gpu_are_not_measured(monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...]) -> None:
    gpu = FakeGPU(monkeypatch, free=2**50, bytes_of_token=1)
    assert gpu.tokens([64] * 10_000, devices) == LEAST
    assert gpu.shapes == []


def test_the_number_is_recorded_and_on_a_cpu_it_is_4096(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    scores = secateur.attribute(CASE.model(), CASE.task, CASE.examples)
    assert scores.max_tokens == LEAST
    assert scores == secateur.attribute(CASE.model(), CASE.task, CASE.examples, max_tokens=LEAST)
    ran: list[Any] = []

    def measured(model: Any, task: Any, items: Any, run: Any, **options: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(OnePass, "scores", lambda self, batch: ran.append(set(one_pass(self, batch))))
            run(case_batch)
        return 20

    one_pass = OnePass.scores

    case_batch = CASE.batches(CASE.model(), 1)[0]
    monkeypatch.setattr("secateur.attribution.attribute.pass_tokens", measured)
    scores = secateur.attribute(CASE.model(), CASE.task, CASE.examples)
    assert ran == [set(scores.sites)]  # The measured pass scores all sites.
    assert scores == secateur.attribute(CASE.model(), CASE.task, CASE.examples, max_tokens=20)
    scores.save(file)
    assert secateur.Scores.load(file).max_tokens == 20


@pytest.mark.parametrize("criterion", ["influence", "gradient"])
def test_scores_of_layers_take_the_number_too(monkeypatch: pytest.MonkeyPatch, criterion: str) -> None:
    ran: list[Any] = []
    batch = CASE.batches(CASE.model(), 1)[0]

    def measured(model: Any, task: Any, items: Any, run: Any) -> int:
        ran.append(run(batch))
        return 1

    monkeypatch.setattr("secateur.attribution.layer_scores.pass_tokens", measured)
    done: list[int] = []
    secateur.layer_scores(CASE.model(), CASE.task, CASE.examples, criterion, progress=lambda number, total: done.append(number))
    assert len(ran[0]) == len(secateur.layer_scores(CASE.model(), CASE.task, CASE.examples, criterion, max_tokens=1))
    assert done == list(range(len(CASE.examples) + 1))  # Batches of one example.
