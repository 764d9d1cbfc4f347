"""Scores leave the device once for each batch, however many sites and layers a model has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import secateur
from secateur.attribution import attribute, layer_scores
from secateur.attribution.criteria import token_sums
from secateur.attribution.integrated import adaptive
from secateur.support.tensors import on_cpu

CASE = CASES["bert-sequence"]


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors in each call of `on_cpu`."""
    sizes: list[int] = []

    def count(tensors: Any) -> list[Tensor]:
        sizes.append(len(tensors))
        return on_cpu(tensors)

    for module in (attribute, layer_scores, token_sums, adaptive):
        monkeypatch.setattr(module, "on_cpu", count)
    return sizes


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the single numbers that are read from tensors: `item`, `float`, `bool`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def bert(layers: int) -> nn.Module:
    """Return a BERT of so many layers."""
    torch.manual_seed(0)
    vocabulary = len(CASE.task.tokenizer)
    sizes = {"vocab_size": vocabulary, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 37, "pad_token_id": 0}
    config = BertConfig(num_hidden_layers=layers, num_labels=3, max_position_embeddings=40, **sizes)
    classes: Any = CASE.model().config
    config.id2label, config.label2id = classes.id2label, classes.label2id
    model: nn.Module = BertForSequenceClassification(config).eval()
    return model


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("criterion", ["gradient", "fisher", "fpp", "wanda", "flap"])
def test_scores_are_transferred_once_a_batch(
    criterion: str, per_example: bool, transfers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    single: list[str] = []
    for name in ("cpu", "tolist", "numpy"):
        monkeypatch.setattr(Tensor, name, recorded(getattr(Tensor, name), single))
    sums = criterion in ("fpp", "wanda", "flap")  # These criteria keep sums of activations besides.
    reads = []
    for layers in (1, 5):
        transfers.clear()
        single.clear()
        done: list[tuple[int, int]] = []
        options: dict[str, Any] = {"max_tokens": 20, "progress": partial(progress, done), "per_example": per_example}
        with Reads() as counted:
            secateur.attribute(bert(layers), CASE.task, CASE.examples, criterion=criterion, **options)
        reads.append(counted.count)
        batches = len(done) - 1
        assert batches > 1
        assert len(transfers) == batches * (2 if sums else 1)
        assert len(single) == (2 * layers if sums else 0)  # The result, once for each site.
    assert reads[0] == reads[1]


def progress(done: list[tuple[int, int]], count: int, total: int) -> None:
    """Record a call of the progress function."""
    done.append((count, total))


def recorded(way: Any, single: list[str]) -> Any:
    """Return a method by which a tensor goes to the CPU by itself. It records each call."""

    def run(tensor: Tensor, *arguments: Any) -> Any:
        single.append(way.__name__)
        return way(tensor, *arguments)

    return run


@pytest.mark.parametrize("criterion", ["gradient", "influence", "ig-joint"])
def test_scores_of_layers_are_transferred_once_a_batch(criterion: Any, transfers: list[int]) -> None:
    reads = []
    for layers in (1, 5):
        transfers.clear()
        with Reads() as counted:
            scores = secateur.layer_scores(bert(layers), CASE.task, CASE.examples, criterion, max_tokens=10_000)
        assert len(scores) == layers
        reads.append(counted.count)
        assert transfers == [layers]
    assert reads[0] == reads[1]


def test_integrated_gradients_transfer_once_a_rule(transfers: list[int]) -> None:
    secateur.attribute(bert(2), CASE.task, CASE.examples, criterion="ig:nodes=3", max_tokens=10_000)
    rules = 2 * 4  # Each site's rule, and the rule of twice the nodes that checks it.
    assert len(transfers) == rules + 1


def test_on_cpu_makes_one_transfer_for_each_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device stand for those of an accelerator. They have no values."""
    moved: list[Tensor] = []

    def cpu(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return torch.arange(tensor.numel()).to(tensor.dtype)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    here = torch.tensor([7.0])
    there = [
        torch.empty(2, 3, device="meta"),
        torch.empty(4, dtype=torch.float64, device="meta"),
        torch.empty((), device="meta"),
    ]
    tensors = on_cpu([there[0], here, *there[1:]])
    assert [tuple(tensor.shape) for tensor in moved] == [(7,), (4,)]
    assert tensors[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors[1] is here
    assert tensors[2].tolist() == [0, 1, 2, 3]
    assert float(tensors[3]) == 6


def test_a_score_that_is_not_finite_is_still_refused() -> None:
    model = bert(2)
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.intermediate.dense").get_parameter("weight")[0, 0] = torch.inf
    with pytest.raises(secateur.InputError, match=r"activations of site 'encoder\.1\.ffn' are not finite"):
        secateur.attribute(model, CASE.task, CASE.examples)
