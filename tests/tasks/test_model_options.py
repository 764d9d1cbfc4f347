"""Options of a model's config that change its forward pass or its generation change no result, or are refused."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from cases import CASES, Case

import secateur
from secateur import InputError
from secateur.corpus import score
from secateur.tasks import CausalLM, TextToText

CHUNKED = ["bert-sequence", "roberta", "electra", "distilbert"]
GENERATION: dict[str, Any] = {
    "min_length": 9, "min_new_tokens": 7, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "forced_bos_token_id": 9,
    "forced_eos_token_id": 11, "suppress_tokens": list(range(8, 20)), "begin_suppress_tokens": list(range(8, 25)),
    "bad_words_ids": [[k] for k in range(8, 20)], "do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5,
    "num_beams": 3, "length_penalty": 3.0, "max_length": 3, "early_stopping": True, "num_return_sequences": 2,
    "sequence_bias": [[[12], 50.0]], "exponential_decay_length_penalty": [1, 9.0], "max_new_tokens": 2,
    "encoder_repetition_penalty": 4.0, "return_dict_in_generate": True, "output_scores": True,
}  # fmt: skip


def chunked(case: Case) -> Any:
    model: Any = case.model()
    model.config.chunk_size_feed_forward = 1
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    return model


@pytest.mark.parametrize("criterion", ["gradient", "wanda", "flap", "ig:nodes=2"])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_the_feed_forward_change_no_score(name: str, criterion: str) -> None:
    case, model = CASES[name], chunked(CASES[name])
    whole, parts = (secateur.attribute(m, case.task, case.examples, criterion=criterion) for m in (case.model(), model))
    for site in whole:
        assert torch.equal(whole[site], parts[site]), site
    assert {m.chunk_size_feed_forward for m in model.modules() if hasattr(m, "chunk_size_feed_forward")} == {1}


def test_chunks_that_do_not_divide_the_length_are_scored_in_bulk() -> None:
    case, model = CASES["bert-sequence"], chunked(CASES["bert-sequence"])
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 5
    texts = [row["input"] for row in case.examples]
    first, second = (
        [row for batch in score(m, case.task, texts, threads=1) for row in batch.to_pylist()] for m in (case.model(), model)
    )
    assert first == second
    assert model.bert.encoder.layer[0].chunk_size_feed_forward == 5


@pytest.mark.parametrize("name", ["bert-sequence", "bert-token", "t5-relu", "llama", "bart", "vit", "modernbert", "gpt2"])
def test_outputs_as_tuples_are_refused(name: str) -> None:
    case, model = CASES[name], CASES[name].model()
    model.config.return_dict = False  # type: ignore[union-attr]
    for use in (secateur.attribute, secateur.evaluate, secateur.layer_scores):
        with pytest.raises(InputError, match=r"^model: expected return_dict true in its config"):
            use(model, case.task, case.examples)
    plan = secateur.plan(secateur.attribute(case.model(), case.task, case.examples), keep=0.5)
    with pytest.raises(InputError, match="return_dict"):
        secateur.recover_(model, secateur.prune(model, plan), case.task, case.examples)


@pytest.mark.parametrize("name", ["bert-sequence", "t5-relu", "llama"])
def test_states_and_checkpoints_change_nothing(name: str) -> None:
    case, model = CASES[name], CASES[name].model()
    expected = secateur.attribute(case.model(), case.task, case.examples)
    config: Any = model.config
    config.output_hidden_states = config.use_cache = True
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = True
    scores = secateur.attribute(model, case.task, case.examples)
    assert all(torch.equal(scores[site], expected[site]) for site in expected)
    plain, other = (case.task.ranked(m, case.examples, 60) for m in (case.model(), model))
    assert torch.allclose(plain, other, atol=1e-5)


def naive(model: Any, ids: torch.Tensor, longest: int) -> list[int]:
    """Return the pieces with the highest logits, up to and with the end mark, for one input [1, T]."""
    two_stacks, pieces = model.config.is_encoder_decoder, list[int]()
    for _ in range(longest):
        new = torch.tensor([pieces], dtype=torch.int64)
        if two_stacks:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            logits = model(input_ids=ids, decoder_input_ids=torch.cat([start, new], 1)).logits
        else:
            logits = model(input_ids=torch.cat([ids, new], 1)).logits
        pieces.append(int(logits[0, -1].argmax()))
        if pieces[-1] == model.config.eos_token_id:
            break
    return pieces


@pytest.mark.parametrize("setting", GENERATION)
@pytest.mark.parametrize("name", ["t5-relu", "bart", "llama"])
def test_generate_is_greedy_whatever_the_settings(name: str, setting: str) -> None:
    case, model = CASES[name], CASES[name].model()
    plain: Any = copy.deepcopy(model)
    task: Any = (CausalLM if name == "llama" else TextToText)(case.task.tokenizer)
    settings: Any = model.generation_config
    setattr(settings, setting, GENERATION[setting])
    before = settings.to_dict()
    rows = case.examples[:4]
    with torch.inference_mode():
        answers = task.generate(model, rows, 4096, 6)
        for row, answer in zip(rows, answers, strict=True):
            ids = torch.tensor(task.encode([row["input"]]))
            assert answer == task.tokenizer.decode(naive(plain, ids, 6), skip_special_tokens=True)
    assert vars(model)["generation_config"] is settings
    assert settings.to_dict() == before


def test_open_targets_are_evaluated_greedily() -> None:
    case, model = CASES["t5-relu"], CASES["t5-relu"].model()
    task = TextToText(case.task.tokenizer)
    expected = secateur.evaluate(case.model(), task, case.examples)
    model.generation_config.min_new_tokens = 8  # type: ignore[union-attr]
    model.generation_config.do_sample = True  # type: ignore[union-attr]
    assert secateur.evaluate(model, task, case.examples) == expected


def test_generation_from_logits_that_are_not_finite_is_refused() -> None:
    case, model = CASES["bart"], cast(Any, CASES["bart"].model())
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"^examples, row 1: .* not finite"):
        secateur.evaluate(model, TextToText(case.task.tokenizer), case.examples)


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id"])
@pytest.mark.parametrize("name", ["t5-relu", "bart", "marian", "mt5"])
def test_a_decoder_without_a_start_is_refused(name: str, field: str) -> None:
    case, model = CASES[name], CASES[name].model()
    vars(model.config)[field] = None  # Marian's config refuses the assignment, but a file may say null.
    for use in (secateur.attribute, secateur.evaluate):
        with pytest.raises(InputError, match=f"^model: expected a {field} in its config"):
            use(model, case.task, case.examples)
    with pytest.raises(InputError, match=field):
        list(score(model, case.task, ["a cat"], threads=1))
