"""Candidate labels: how they are written, what the tokenizer makes of them, and how many are ranked at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, sentences, word_tokenizer
from torch import Tensor

import secateur
from secateur.flow.loaded import Loaded, make_task, task_labels
from secateur.support.compat import TorchDispatchMode
from secateur.tasks import label_tree

CAUSAL, SEQUENCE, TEXT = "causal-lm", "sequence-classification", "text-to-text"


def labels_of(text: Any, kind: str) -> list[str] | None:
    return task_labels(Loaded(torch.nn.Identity(), None, torch.float32, kind, None), text, [{}])


@pytest.mark.parametrize(
    ("kind", "text", "labels"),
    [
        (SEQUENCE, "yes, no", ["yes", "no"]),
        (TEXT, " yes ,no", ["yes", "no"]),
        (CAUSAL, "yes,no", ["yes", "no"]),
        (CAUSAL, " yes, no", [" yes", " no"]),
        (CAUSAL, " yes, not at all", [" yes", " not at all"]),
        (SEQUENCE, '["a, b", " c"]', ["a, b", " c"]),
        (CAUSAL, ' ["yes", " no"] ', ["yes", " no"]),
        (SEQUENCE, "a.txt,b.txt", ["a.txt", "b.txt"]),
        (CAUSAL, ["yes", " no"], ["yes", " no"]),
        (TEXT, "open", None),
    ],
)
def test_labels_between_commas_and_in_json(kind: str, text: Any, labels: list[str] | None) -> None:
    assert labels_of(text, kind) == labels


@pytest.mark.parametrize("kind", [CAUSAL, SEQUENCE])
def test_labels_of_a_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff yes, sir\r\n no\n".encode())
    (tmp_path / "a.json").write_text(json.dumps([" yes, sir", " no"]))
    exact = [" yes, sir", " no"]
    assert labels_of(str(tmp_path / "a.json"), kind) == exact
    assert labels_of(str(tmp_path / "a.txt"), kind) == (exact if kind == CAUSAL else ["yes, sir", "no"])


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (CAUSAL, "yes, no", "labels: expected a space before each label or before none"),
        (SEQUENCE, "yes,,no", "labels: expected no empty label"),
        (SEQUENCE, "yes,no,", "labels: expected no empty label"),
        (SEQUENCE, '["yes", no]', "labels: expected a JSON list of texts"),
        (SEQUENCE, "[1, 2]", "labels: expected a JSON list of texts"),
        (SEQUENCE, '["yes", ""]', "labels: expected a JSON list of texts"),
        (SEQUENCE, "none.txt", "labels: cannot read 'none.txt'"),
        (SEQUENCE, "none.json", "labels: cannot read 'none.json'"),
        (SEQUENCE, ["a", 1], "labels: expected texts"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(kind: str, text: Any, message: str) -> None:
    with pytest.raises(secateur.InputError) as caught:
        labels_of(text, kind)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "t5-relu"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", ""], "expected labels of one piece at least, got ''"),
        (["yes", "  "], "expected labels of one piece at least, got '  '"),
        (["yes", "no", "yes "], "tells apart, got 'yes' and 'yes ', which it encodes alike"),
        (["frob", "no", "gnarl"], "tells apart, got 'frob' and 'gnarl'"),
        (["yes", "no", "yes"], "got one of them twice"),
    ],
)
def test_labels_that_the_tokenizer_does_not_tell_apart_are_refused(name: str, labels: list[str], message: str) -> None:
    case = CASES[name]
    loaded = Loaded(case.model(), case.task.reader, torch.float32, case.task.name, None)
    with pytest.raises(secateur.InputError, match=f"^labels: .*{message}"):
        make_task(loaded, labels, [], None)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_logits_of_many_labels_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model: Any = case.model(torch.float64)
    task = secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)
    inputs: list[dict[str, Any]] = [{"input": text} for text in sentences(24, seed=3)]
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, arguments, output: sizes.append(output.logits.numel()))
    with torch.inference_mode():
        whole = task.ranked(model, inputs, 8192)
        largest = max(sizes)
        monkeypatch.setattr(label_tree, "_LOGITS", largest // 5)
        sizes.clear()
        parts = task.ranked(model, inputs, 8192)
    handle.remove()
    assert max(sizes) <= largest // 5
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_the_tree_copies_a_small_share_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = label_tree.LabelTree([[1, 2], [1, 3], [4]])
    assert tree.prefixes == [(), (1,)]
    logits = torch.randn(32, 2, 50, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(label_tree, "_LOGITS", logits.numel())
    with _LargestCopy(logits) as largest:
        scores = tree.log_probabilities(logits[:, :1], logits[:, 1:])
    parts = logits.double().log_softmax(-1)
    wanted = torch.stack([parts[:, 0, 1] + parts[:, 1, 2], parts[:, 0, 1] + parts[:, 1, 3], parts[:, 0, 4]], 1)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tree.log_probabilities(logits), scores, rtol=0, atol=0)
    assert largest.numbers <= logits.numel() // 8


class _LargestCopy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that an operation makes, in `numbers`. Views of `source` do not count."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.source, self.numbers = source.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() != self.source:
            self.numbers = max(self.numbers, output.numel())
        return output
