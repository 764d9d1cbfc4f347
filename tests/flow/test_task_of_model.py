"""The task that a model's config tells: all architectures of transformers' five auto mappings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.models.auto import modeling_auto

import secateur
from secateur.flow.loaded import _task_of
from secateur.tasks.task_file import TASKS

MAPPINGS = {
    "text-to-text": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def architectures(task: str) -> set[str]:
    return {name for entry in MAPPINGS[task].values() for name in ((entry,) if isinstance(entry, str) else entry)}


@pytest.mark.parametrize("task", MAPPINGS)
def test_every_architecture_tells_its_task(task: str) -> None:
    others = {name for other in MAPPINGS if other != task for name in architectures(other)}
    names = architectures(task)
    assert len(names) > 20
    for name in names:
        told = _task_of(SimpleNamespace(architectures=[name]))
        assert told == task or (name in others and told in MAPPINGS)


@pytest.mark.parametrize(
    ("name", "task"), [("MarianMTModel", "text-to-text"), ("GPT2LMHeadModel", "causal-lm"), ("BertLMHeadModel", "causal-lm")]
)
def test_names_with_other_endings_tell_their_task(name: str, task: str) -> None:
    assert _task_of(SimpleNamespace(architectures=[name])) == task


@pytest.mark.parametrize("names", [["BertModel"], [], None, ["NoSuchForCausalLM"]])
def test_other_architectures_tell_no_task(names: list[str] | None) -> None:
    assert set(TASKS) == set(MAPPINGS)
    with pytest.raises(secateur.InputError, match=r"task: expected one of .*, got none, and the model .* does not tell"):
        _task_of(SimpleNamespace(architectures=names))
