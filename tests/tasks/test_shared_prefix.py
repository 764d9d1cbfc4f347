"""Prompts with a shared prefix: the plain path's results, from passes that leave the prefix out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, _grouped, emptied_plan, sentences, uniform_plan, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur.corpus import score
from secateur.measuring.divergence import divergence, held_logits
from secateur.tasks import shared_prefix
from secateur.tasks.batches import buckets
from secateur.tasks.prompt import Prompt
from secateur.tasks.shared_prefix import held, prefix_of

HEAD = "the cat sat on the mat and the dog ran under the big red tree so the bird flew away"
WORDS = f"{HEAD} {{input}} is"
PREFIX = len(HEAD.split()) + 1  # With the start mark.
TEXTS = sentences(12, seed=3)
ROWS: list[dict[str, Any]] = [{"input": text, "target": LABELS[k % len(LABELS)]} for k, text in enumerate(TEXTS)]
PROMPTED = [{**row, "input": WORDS.format(input=row["input"])} for row in ROWS]
DECODERS = ["llama", "llama-mqa", "gpt2", "qwen2", "qwen3", "gemma3", "mistral", "opt", "opt-post-norm"]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


def asking(name: str, prompt: str | Prompt | None = WORDS, labels: Sequence[str] | None = LABELS, **options: Any) -> Any:
    return secateur.CausalLM(CASES[name].task.reader, labels=labels, prompt=prompt, **options)


@contextmanager
def columns(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """A context that collects the rows and columns of each forward pass's ids."""
    shapes: list[tuple[int, int]] = []

    def see(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    handle = model.register_forward_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def require_shared(shapes: list[tuple[int, int]], prefix: int = PREFIX) -> None:
    """The prefix ran once, alone, and the other passes are shorter than it."""
    assert shapes[0] == (1, prefix)
    assert len(shapes) > 1
    assert max(length for _, length in shapes[1:]) < prefix


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_labels_are_those_of_whole_prompts(name: str, dtype: torch.dtype) -> None:
    model = CASES[name].model(dtype)
    with torch.inference_mode():
        expected = asking(name, None).ranked(model, PROMPTED, 64)
        for max_tokens in (1, 64, 4096):
            with columns(model) as shapes:
                scores = asking(name).ranked(model, ROWS, max_tokens)
            require_shared(shapes)
            torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCES[dtype])
    assert not shared_prefix._HELD
    assert not shared_prefix._HOLDERS


@pytest.mark.parametrize("labels", [["yes", "no"], ["yes so then", "yes so", "no"]], ids=["one-piece", "deep-tree"])
def test_label_trees_of_any_depth_follow_the_prefix(labels: list[str]) -> None:
    model = CASES["gemma3"].model(torch.float64)
    with torch.inference_mode():
        expected = asking("gemma3", None, labels).ranked(model, PROMPTED, 64)
        torch.testing.assert_close(asking("gemma3", labels=labels).ranked(model, ROWS, 64), expected, rtol=0, atol=1e-10)


def written(task: Any, model: nn.Module, rows: list[dict[str, Any]], beams: int) -> list[str]:
    task, texts = task.generating(model, 5, beams), [""] * len(rows)
    with task.scoring(model):
        for batch in task.input_batches(model, rows, 64):
            for row, text in zip(batch.rows, task.written(model, batch), strict=True):
                texts[row] = text
    return texts


@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_of_whole_prompts(name: str) -> None:
    model, wide = CASES[name].model(torch.float64), name not in ("qwen2", "gemma3", "mistral")
    for beams in (1, 3):
        expected = written(asking(name, None, None), model, PROMPTED, beams)
        assert len(set(expected)) > 1
        with columns(model) as shapes:
            assert written(asking(name, labels=None), model, ROWS, beams) == expected
        if wide:
            require_shared(shapes)
    with columns(model) as shapes:
        assert asking(name, labels=None).generate(model, ROWS, 64, 5) == written(asking(name, None, None), model, PROMPTED, 1)
    assert (shapes[0] == (1, PREFIX)) == wide


@pytest.mark.parametrize("window", [PREFIX + 10 + 5, PREFIX])
def test_texts_of_a_model_with_a_window_share_where_all_tokens_are_in_it(window: int) -> None:
    options = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    model = replace(CASES["gemma3"], build=lambda: _grouped(Gemma3ForCausalLM, Gemma3TextConfig, **options)).model(
        torch.float64
    )
    expected = asking("gemma3", None, None).generate(model, PROMPTED, 64, 5)
    with columns(model) as shapes:
        assert asking("gemma3", labels=None).generate(model, ROWS, 64, 5) == expected
    assert (max(length for _, length in shapes) == PREFIX) == (window > PREFIX)


def test_a_corpus_is_scored_by_several_threads_that_share_the_prefix() -> None:
    model, texts = CASES["llama"].model(torch.float64), sentences(300, seed=5)
    whole = [WORDS.format(input=text) for text in texts]
    expected = [row for part in score(model, asking("llama", None), whole, threads=1) for row in part.to_pylist()]
    task = asking("llama")
    with columns(model) as shapes, torch.no_grad(), task.sharing(model):
        prefix = prefix_of(model, task._head)
        assert prefix is not None
        before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.states.layers]
        found = [row for part in score(model, task, texts, threads=3, max_tokens=64) for row in part.to_pylist()]
        assert prefix_of(model, task._head) is prefix
        for layer, (keys, values) in zip(prefix.states.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    require_shared(shapes)
    for row, wanted in zip(found, expected, strict=True):
        assert row["label"] == wanted["label"]
        assert [row[f"p_{label}"] for label in LABELS] == pytest.approx([wanted[f"p_{label}"] for label in LABELS], abs=1e-6)
    plain = [
        row["text"] for part in score(model, asking("llama", None, None), whole, max_new_tokens=4) for row in part.to_pylist()
    ]
    shared = score(model, asking("llama", labels=None), texts, max_new_tokens=4, threads=2)
    assert [row["text"] for part in shared for row in part.to_pylist()] == plain


def test_threads_that_ask_at_once_run_the_prefix_once() -> None:
    model, task, together = CASES["llama"].model(), asking("llama"), threading.Barrier(6)
    found: list[Any] = []

    def ask() -> None:
        with torch.no_grad(), held(model, task._head):
            together.wait()
            found.append(prefix_of(model, task._head))
            together.wait()

    with columns(model) as shapes:
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert shapes == [(1, PREFIX)]
    assert len(set(map(id, found))) == 1
    assert not shared_prefix._HELD


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_pruned_models_share_also_without_attention_or_blocks(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    emptied = secateur.prune(model, emptied_plan(case, "head"))
    kept = {name: ids[:0] if name.startswith("decoder.0.") else ids for name, ids in uniform_plan(case, "head").items()}
    fewer = secateur.prune(model, replace(uniform_plan(case, "head"), kept=kept, removed_blocks=("decoder.0",)))
    for pruned in (emptied, fewer):
        with torch.inference_mode():
            expected = asking(name, None).ranked(pruned, PROMPTED, 64)
            with columns(pruned) as shapes:
                torch.testing.assert_close(asking(name).ranked(pruned, ROWS, 64), expected, rtol=0, atol=1e-10)
            require_shared(shapes)
        assert asking(name, labels=None).generate(pruned, ROWS, 64, 5) == asking(name, None, None).generate(
            pruned, PROMPTED, 64, 5
        )


CHAT = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"


def test_a_chat_template_and_a_system_message_are_shared() -> None:
    tokenizer = word_tokenizer(start=True, end=False)
    tokenizer.chat_template = CHAT
    task = secateur.CausalLM(tokenizer, labels=LABELS, prompt=Prompt("a {input}", chat=True, system=HEAD))
    plain, model = secateur.CausalLM(tokenizer, labels=LABELS), CASES["llama"].model(torch.float64)
    with torch.inference_mode():
        expected = plain.ranked(model, [{"input": task.prompted(row["input"])} for row in ROWS], 64)
        with columns(model) as shapes:
            torch.testing.assert_close(task.ranked(model, ROWS, 64), expected, rtol=0, atol=1e-10)
    require_shared(shapes, len(["<s>", "system", *HEAD.split(), "<s>", "user", "a"]))


def merging() -> tuple[Any, nn.Module]:
    """A tokenizer that joins "x" and "y" across the border of a prompt, and a model of its pieces."""
    letters = {letter: i for i, letter in enumerate(["<pad>", *"abcdexyz "])}
    tokenizer = Tokenizer(BPE({**letters, "xy": len(letters)}, [("x", "y")]))
    reader = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="a", eos_token="z")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(reader), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        initializer_range=0.3,
    )  # fmt: skip
    return reader, LlamaForCausalLM(config).double().eval()


def test_a_piece_across_the_border_is_computed_with_its_whole_prompt() -> None:
    reader, model = merging()
    head = "abcde" * 6 + "x"
    rows = [{"input": text} for text in ("yabc", "abcy", "d", "yy", "ey a", "x", "ab cde")]
    task = secateur.CausalLM(reader, labels=["a", "bc"], prompt=head + "{input} e")
    items = task.input_items(model, rows)
    assert [item.shared for item in items] == [0, 31, 31, 0, 31, 31, 31]
    plain = secateur.CausalLM(reader, labels=["a", "bc"])
    with torch.inference_mode():
        expected = plain.ranked(model, [{"input": task.prompted(row["input"])} for row in rows], 4096)
        torch.testing.assert_close(task.ranked(model, rows, 4096), expected, rtol=0, atol=1e-10)
        # A batch of both kinds is a batch of whole prompts.
        with task.scoring(model):
            mixed = task.label_scores(model, task.collate_inputs(items, torch.device("cpu")))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prompt", ["{input} " + HEAD, "the cat {input}", None])
def test_prompts_without_a_long_beginning_run_as_wholes(prompt: str | None) -> None:
    model, task = CASES["llama"].model(), asking("llama", prompt)
    assert all(item.shared == 0 for item in task.input_items(model, ROWS))
    with columns(model) as shapes, torch.inference_mode():
        task.ranked(model, ROWS, 4096)
    assert shapes[0][0] == len(ROWS)


def test_one_document_runs_in_one_pass_and_models_that_cannot_share_run_whole_prompts() -> None:
    model, task = CASES["llama"].model(), asking("llama", labels=["yes", "no"])
    with columns(model) as shapes, torch.inference_mode():
        task.ranked(model, ROWS[:1], 64)
    assert [rows for rows, _ in shapes] == [1]
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    assert all(item.shared == 0 for item in task.input_items(model, ROWS))


def test_gradients_flow_through_whole_prompts() -> None:
    model, task = CASES["llama"].model(torch.float64), asking("llama")
    plain = asking("llama", None)
    of_path: list[Tensor] = []
    for own, rows in ((task, ROWS), (plain, PROMPTED)):
        model.zero_grad()
        with own.scoring(model):
            for batch in own.input_batches(model, rows, 4096):
                own.label_scores(model, batch).square().sum().backward()
        gradient = model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad
        assert gradient is not None
        of_path.append(gradient.clone())
    torch.testing.assert_close(*of_path, rtol=0, atol=1e-8)
    assert of_path[0].abs().max() > 1


def test_the_prefix_is_run_anew_after_the_weights_have_changed() -> None:
    model, task = CASES["llama"].model(torch.float64), asking("llama")
    with torch.inference_mode():
        before = task.ranked(model, ROWS, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with torch.inference_mode():
        after = task.ranked(model, ROWS, 64)
        torch.testing.assert_close(after, asking("llama", None).ranked(model, PROMPTED, 64), rtol=0, atol=1e-10)
    assert not torch.allclose(before, after)
    other = CASES["llama"].model()
    with torch.no_grad(), task.scoring(model), task.scoring(other):  # Each model has its own.
        prefixes: list[Any] = [prefix_of(one, task._head) for one in (model, other)]
        assert [one.states.layers[0].keys.dtype for one in prefixes] == [torch.float64, torch.float32]
    with pytest.raises(TypeError), torch.no_grad(), task.scoring(model):
        len(prefix_of(model, task._head))  # type: ignore[arg-type]
    assert not shared_prefix._HELD
    assert not shared_prefix._HOLDERS


@pytest.mark.parametrize("name", DECODERS)
def test_divergences_and_perplexities_are_those_of_whole_prompts(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    pruned = secateur.prune(model, uniform_plan(case, "head"))
    for labels in (LABELS, None):
        of_path = []
        for task, rows in ((asking(name, labels=labels), ROWS), (asking(name, None, labels), PROMPTED)):
            batches = list(task.batches(task.items(model, rows), torch.device("cpu"), 256))
            with columns(pruned) as shapes:
                found = divergence(model, pruned, task, batches)
            if task.prompt is not None:
                require_shared(shapes)
            of_path.append(found)
            assert divergence(model, pruned, task, batches, held_logits(model, task, batches, 1 << 30)) == pytest.approx(found)
            if labels is None:
                of_path.append(secateur.evaluate(model, task, rows).value)
        assert of_path[: len(of_path) // 2] == pytest.approx(of_path[len(of_path) // 2 :], rel=1e-9)


def test_batches_count_the_tokens_that_run_and_bound_those_that_are_read() -> None:
    model = CASES["llama"].model()
    items = asking("llama").input_items(model, ROWS * 20)
    assert all(item.shared == PREFIX and item.tokens == len(item.input_ids) - PREFIX for item in items)
    for bucket in buckets(items, 48):
        length = max(item.tokens for item in bucket)
        assert len(bucket) * length <= 48
    # A prefix of 21 tokens is at most eight batches' worth: 48 * 8 / (21 + 3) rows of 3 tokens.
    assert max(map(len, buckets(items, 48))) == 16
    short = [replace(item, input_ids=item.input_ids[: PREFIX + 1]) for item in items]
    assert max(map(len, buckets(short, 48))) == 48 * 8 // (PREFIX + 1)


def test_long_inputs_are_cut_behind_the_prefix(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = CASES["llama"].model(torch.float64), [*ROWS, {"input": " ".join(TEXTS)}]
    task = asking("llama", max_length=PREFIX + 12)
    items = task.input_items(model, rows)
    assert {item.shared for item in items} == {PREFIX}
    whole = [{"input": task.tokenizer.decode(item.input_ids[1:])} for item in items]
    with torch.inference_mode():
        expected = asking("llama", None).ranked(model, whole, 64)
        torch.testing.assert_close(task.ranked(model, rows, 64), expected, rtol=0, atol=1e-10)
    assert "1 of 13 inputs are longer" in caplog.text
