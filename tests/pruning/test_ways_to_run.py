"""Pruned models in PyTorch and transformers: torch.export with dynamic batch and length, pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, emptied_plan, sentences, uneven_plan, uniform_plan
from torch import Tensor, nn
from torch.export import Dim
from transformers import pipeline

import secateur

PLANS: dict[str, Any] = {
    "uniform": lambda case: uniform_plan(case, "head"),
    "heads": lambda case: emptied_plan(case, "head"),
    "channels": lambda case: uneven_plan(case, "channel"),
}
every_shape = pytest.mark.parametrize("shape", PLANS)


def pruned(name: str, shape: str) -> nn.Module:
    """Return the case's model, pruned to one of the shapes of PLANS."""
    case = CASES[name]
    return secateur.prune(case.model(), PLANS[shape](case)).eval()


class Logits(nn.Module):
    """A model in the form that torch.export takes: tensors in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        decoder = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **decoder).logits  # type: ignore[no-any-return]


def inputs_of(case: Case, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return a batch of random ids. Its last row ends in padding."""
    mask = torch.ones(size, dtype=torch.int64)
    mask[-1, size[1] // 2 :] = 0
    inputs = {"input_ids": torch.randint(4, 30, size) * mask, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": torch.randint(4, 30, (size[0], 4))} if case.kind == "encoder-decoder" else {})


EXPORTED = [
    ("bert-sequence", "uniform"),
    ("t5-gated", "heads"),
    ("bert-sequence", "heads"),
    ("llama", "heads"),
    ("llama", "channels"),
]


@pytest.mark.parametrize(("name", "shape"), EXPORTED)
def test_a_pruned_model_is_exported_for_any_batch_and_length(name: str, shape: str) -> None:
    model = pruned(name, shape)
    example, other = inputs_of(CASES[name], (3, 11)), inputs_of(CASES[name], (2, 17))
    dynamic = {key: dict.fromkeys(range(tensor.dim()), Dim.DYNAMIC) for key, tensor in example.items()}
    program = torch.export.export(Logits(model), (), example, dynamic_shapes=dynamic, strict=False).module()
    with torch.inference_mode():
        for inputs in (example, other):
            torch.testing.assert_close(program(**inputs), model(**inputs).logits, rtol=1e-5, atol=1e-5)


@every_shape
def test_a_classifier_runs_in_a_pipeline(shape: str, tmp_path: Path) -> None:
    model, task = pruned("bert-sequence", shape), CASES["bert-sequence"].task
    secateur.save(model, tmp_path / "out", tokenizer=task.reader)
    texts = sentences(5)
    answers = pipeline("text-classification", model=secateur.load(tmp_path / "out"), tokenizer=task.reader)(texts)
    expected = task.probabilities(model, [{"input": text, "target": ""} for text in texts], 1000)
    for answer, chances in zip(answers, expected, strict=True):
        assert answer["label"] == max(chances, key=chances.__getitem__)
        assert answer["score"] == pytest.approx(chances[answer["label"]], abs=1e-5)


@every_shape
def test_a_decoder_generates_in_a_pipeline(shape: str, tmp_path: Path) -> None:
    model, tokenizer = pruned("llama", shape), CASES["llama"].task.reader
    secateur.save(model, tmp_path / "out", tokenizer=tokenizer)
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0]  # type: ignore[operator]
    run = pipeline("text-generation", model=secateur.load(tmp_path / "out"), tokenizer=tokenizer)
    (answer,) = run("the cat sat", max_new_tokens=6, do_sample=False, return_tensors=True)
    assert answer["generated_token_ids"] == expected.tolist()
