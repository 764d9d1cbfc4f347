"""Contract 7: the models of a router are bit-identical to separately pruned ones, and hold no more memory than stated."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    CORE,
    DTYPES,
    GENERATING,
    LABELS,
    UNITS,
    Case,
    emptied_plan,
    sentences,
    uneven_plan,
    uniform_plan,
    word_tokenizer,
)
from torch import nn
from undisturbed import assert_undisturbed, lived_in

import secateur
from secateur import Plan, TaskPlans
from secateur.model.recipe import Cut
from secateur.pruning.task_plans import _Pruned

every_case = pytest.mark.parametrize("case", CORE, ids=str)
every_unit = pytest.mark.parametrize("unit", UNITS)
T5, BERT, LLAMA = CASES["t5-gated"], CASES["bert-sequence"], CASES["llama"]


def plans_of(case: Case, unit: str = "head") -> dict[str, Plan]:
    """Return the plans of three tasks: equal widths in all layers, different widths, and different widths of other units."""
    return {"even": uniform_plan(case, unit), "uneven": uneven_plan(case, unit), "other": uneven_plan(case, unit, seed=1)}


def saved(plans: dict[str, Plan], folder: Path) -> dict[str, Path]:
    """Save the plans in a folder. Returns their files by task."""
    for name, plan in plans.items():
        plan.save(folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in plans}


def one_at_a_time(case: Case, dense: nn.Module) -> TaskPlans:
    """Return a router of two tasks. Its cache has room for one of them at a time."""
    plans = {"even": uniform_plan(case, "head"), "uneven": uneven_plan(case, "head")}
    return TaskPlans(dense, plans, cache_bytes=max(TaskPlans(dense, plans).sizes.values()))


def own_parameters(model: nn.Module, dense: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that share no memory with the dense model."""
    shared = {p.untyped_storage().data_ptr() for p in dense.parameters()}
    return [p for p in model.parameters() if p.untyped_storage().data_ptr() not in shared]


@pytest.mark.parametrize("dtype", DTYPES)
@every_unit
@every_case
def test_a_routers_models_equal_separately_pruned_ones(case: Case, unit: str, dtype: str, tmp_path: Path) -> None:
    dense, plans = case.model(DTYPES[dtype]), {**plans_of(case, unit), "emptied": emptied_plan(case, unit)}
    router = TaskPlans(dense, saved(plans, tmp_path))
    for name, plan in plans.items():
        expected: Any = secateur.prune(dense, plan)
        routed: Any = router[name]
        assert torch.equal(case.logits(routed), case.logits(expected))
        ours, theirs = routed.state_dict(), expected.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(tensor, theirs[path]) for path, tensor in ours.items())
        assert routed.config.to_dict() == expected.config.to_dict()
        assert not routed.training
        assert not any(p.requires_grad for p in routed.parameters())


@every_unit
@every_case
def test_uncut_tensors_share_the_dense_models_memory(case: Case, unit: str) -> None:
    dense: Any = case.model()
    router = TaskPlans(dense, plans_of(case, unit))
    tensors = {**dict(dense.named_parameters(remove_duplicate=False)), **dict(dense.named_buffers())}
    for name in router:
        model = router[name]
        routed = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        uncut = [path for path, tensor in routed.items() if path in tensors and tensor.shape == tensors[path].shape]
        assert any("norm" in path.lower() for path in uncut)
        assert any("embed" in path or "shared" in path for path in uncut)
        for path in uncut:
            assert routed[path].data_ptr() == tensors[path].data_ptr(), path
        # The model owns only the cut weights. `sizes` counts their bytes.
        assert sum(p.nbytes for p in own_parameters(model, dense)) == router.sizes[name] > 0
        assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in dense.parameters())


def test_a_plan_that_keeps_everything_takes_no_memory() -> None:
    dense = T5.model()
    router = TaskPlans(dense, {"all": uniform_plan(T5, "head", keep=1.0)}, cache_bytes=0)
    assert router.sizes == {"all": 0}
    assert not own_parameters(router["all"], dense)


@every_case
def test_the_dense_model_is_undisturbed_by_changes_to_a_routed_model(case: Case) -> None:
    model = lived_in(case)

    def use() -> None:
        routed = TaskPlans(model, plans_of(case))["uneven"]
        routed.double().requires_grad_(True).train()
        routed.register_forward_hook(lambda *_: None)

    assert_undisturbed(model, use)


def test_changes_to_a_model_do_not_reach_the_model_that_replaces_it() -> None:
    router = one_at_a_time(T5, T5.model())
    expected = T5.logits(router["even"])
    changed = router["even"].double().train()
    changed.register_forward_hook(lambda *_: None)
    assert router["uneven"] is not changed
    again = router["even"]
    assert again is not changed
    assert not any(module._forward_hooks or module.training for module in again.modules())
    assert torch.equal(T5.logits(again), expected)


def test_a_router_is_a_mapping_of_tasks_to_models() -> None:
    router = TaskPlans(T5.model(), plans_of(T5))
    assert len(router) == 3
    assert list(router) == ["even", "uneven", "other"]
    assert "even" in router
    assert "odd" not in router
    assert router.cached == []  # The calls above gather no weights.
    assert router["even"] is router["even"]


def test_the_cache_is_bounded_and_drops_the_least_recently_used_model() -> None:
    dense, plans = T5.model(), plans_of(T5)
    sizes = TaskPlans(dense, plans).sizes
    router = TaskPlans(dense, plans, cache_bytes=sum(sizes.values()) - 1)
    assert router.bytes == 0
    for name, cached in [
        ("even", ["even"]), ("uneven", ["even", "uneven"]), ("even", ["uneven", "even"]), ("other", ["even", "other"]),
        ("uneven", ["other", "uneven"]),
    ]:  # fmt: skip
        model = router[name]
        assert router.cached == cached
        assert router.bytes == sum(sizes[task] for task in cached) < sum(sizes.values())
        assert sum(p.nbytes for p in own_parameters(model, dense)) == sizes[name]
    unbounded = TaskPlans(dense, plans)
    assert [unbounded[name] for name in plans] == [unbounded[name] for name in plans]
    assert unbounded.bytes == sum(sizes.values())


@pytest.mark.parametrize("case", [T5, BERT, LLAMA], ids=str)
def test_an_evicted_model_stays_valid_and_is_gathered_anew_on_request(case: Case) -> None:
    dense = case.model()
    router = one_at_a_time(case, dense)
    held = router["uneven"]
    expected = case.logits(held)
    assert router["even"] is not held
    assert router.cached == ["even"]
    assert torch.equal(case.logits(held), expected)
    again = router["uneven"]
    assert again is not held
    assert {p.data_ptr() for p in own_parameters(again, dense)}.isdisjoint(p.data_ptr() for p in own_parameters(held, dense))
    assert torch.equal(case.logits(again), expected)


def test_an_evicted_model_without_references_is_freed_at_once() -> None:
    router = one_at_a_time(T5, T5.model())
    gc.disable()
    try:
        T5.logits(router["even"])
        model = weakref.ref(router["even"])
        assert model() is not None
        _ = router["uneven"]
        assert model() is None
    finally:
        gc.enable()


def test_a_model_gathered_in_inference_mode_works_outside_it() -> None:
    router = TaskPlans(T5.model(), plans_of(T5))
    with torch.inference_mode():
        model = router["uneven"]
    assert not any(p.is_inference() for p in model.parameters())
    assert secateur.attribute(model, T5.task, T5.examples)


def recorded_gatherings(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> list[_Pruned]:
    """Return the list of the plans whose weights are gathered. `before` is called before every gathering."""
    calls: list[_Pruned] = []
    gathered = _Pruned.gathered

    def patch(self: _Pruned) -> nn.Module:
        calls.append(self)
        before()
        return gathered(self)

    monkeypatch.setattr(_Pruned, "gathered", patch)
    return calls


def test_threads_that_request_one_task_gather_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router, calls = TaskPlans(T5.model(), plans_of(T5)), recorded_gatherings(monkeypatch, lambda: time.sleep(0.1))
    start = threading.Barrier(4)

    def ask(_: int) -> nn.Module:
        start.wait()
        return router["uneven"]

    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(ask, range(4)))
    assert len(calls) == 1
    assert all(model is models[0] for model in models)


def test_threads_that_request_several_tasks_gather_them_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    router = TaskPlans(T5.model(), plans_of(T5))
    calls = recorded_gatherings(monkeypatch, lambda: together.wait())
    together = threading.Barrier(3, timeout=600)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(router.__getitem__, router))) == len(calls) == 3


@pytest.mark.parametrize("room", ["one", "two", "all"])
def test_threads_keep_the_cache_within_its_bound(room: str) -> None:
    dense, plans = T5.model(), plans_of(T5)
    sizes = TaskPlans(dense, plans).sizes
    expected = {name: T5.logits(secateur.prune(dense, plan)) for name, plan in plans.items()}
    bound = {"one": max(sizes.values()), "two": sum(sizes.values()) - 1, "all": sum(sizes.values())}[room]
    router = TaskPlans(dense, plans, cache_bytes=bound)

    def ask(number: int) -> int:
        name = [*plans][number % 3]
        model = router[name]
        assert torch.equal(T5.logits(model), expected[name])
        return router.bytes

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(ask, range(24))) <= bound


def router_for(case: Case, **options: Any) -> tuple[TaskPlans, dict[str, nn.Module]]:
    """Return a router whose tasks are all the case's task, and the separately pruned models."""
    dense, plans = case.model(), plans_of(case)
    tasks = dict.fromkeys(plans, case.task)
    return TaskPlans(dense, plans, tasks, **options), {name: secateur.prune(dense, plan) for name, plan in plans.items()}


@pytest.mark.parametrize("case", [T5, CASES["t5-relu"], BERT, LLAMA, CASES["gemma3"]], ids=str)
def test_a_routers_label_scores_equal_those_of_separately_pruned_models(case: Case) -> None:
    router, pruned = router_for(case)
    texts = sentences(8, seed=3)
    rows = [{"input": text} for text in texts]
    for name, model in pruned.items():
        model.requires_grad_(False)  # As in the router: with requires_grad, torch folds products in another way.
        with torch.inference_mode():
            assert router.score(name, texts, max_tokens=40) == case.task.probabilities(model, rows, 40)
    scores = router.score("uneven", texts)
    names = LABELS if case.generates else list(BERT.model().config.id2label.values())  # type: ignore[union-attr, operator]
    assert all(list(by_label) == names and sum(by_label.values()) == pytest.approx(1) for by_label in scores)


@pytest.mark.parametrize("case", [T5, BERT, LLAMA], ids=str)
def test_evaluate_counts_the_routers_most_likely_labels(case: Case) -> None:
    router, pruned = router_for(case)
    for name, model in pruned.items():
        texts = [example["input"] for example in case.examples]
        best = [max(by_label, key=by_label.__getitem__) for by_label in router.score(name, texts)]
        right = sum(a == example["target"] for a, example in zip(best, case.examples, strict=True))
        assert secateur.evaluate(model, case.task, case.examples).value == right / len(texts)


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_a_router_generates_the_text_of_separately_pruned_models(case: Case) -> None:
    router, pruned = router_for(case)
    texts = sentences(6, seed=4)
    for name, model in pruned.items():
        with torch.inference_mode():
            expected = case.task.generate(model, [{"input": text} for text in texts], 8192, 5)
        assert router.generate(name, texts, max_new_tokens=5) == expected
    assert len({*router.generate(["even"] * 6 + ["uneven"] * 6 + ["other"] * 6, texts * 3, max_new_tokens=5)}) > 1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prompts_padded_on_the_left_continue_as_they_do_alone(name: str) -> None:
    case, texts = CASES[name], sentences(6, seed=5)
    model: Any = case.model(torch.float64)
    rows = [{"input": text} for text in texts]
    together = case.task.generate(model, rows, 8192, 5)
    assert together == [case.task.generate(model, [row], 8192, 5)[0] for row in rows]
    for text, continuation in zip(texts, together, strict=True):
        ids = case.task.reader([text])["input_ids"][0]
        for _ in range(5):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        start = len(case.task.reader([text])["input_ids"][0])
        until = ids.index(1, start) if 1 in ids[start:] else len(ids)
        assert continuation == case.task.reader.decode(ids[start:until], skip_special_tokens=True)


@pytest.mark.parametrize("cache", [None, "smallest"])
@pytest.mark.parametrize("case", [T5, BERT, LLAMA], ids=str)
def test_inputs_of_several_tasks_keep_their_order(case: Case, cache: str | None) -> None:
    router, _ = router_for(case)
    router, pruned = router_for(case, cache_bytes=max(router.sizes.values()) if cache else None)
    texts = sentences(11, seed=6)
    names = [[*pruned][(i * i) % 3] for i in range(11)]
    assert len(set(names)) > 1
    for verb in ("score", "generate") if case.generates else ("score",):
        outputs = getattr(router, verb)(names, texts)
        for name in set(names):
            of_task = [i for i, other in enumerate(names) if other == name]
            assert [outputs[i] for i in of_task] == getattr(router, verb)(name, [texts[i] for i in of_task])
        assert getattr(router, verb)([], []) == getattr(router, verb)("even", []) == []


def test_a_router_scores_pairs_of_texts() -> None:
    router, pruned = router_for(BERT)
    texts = sentences(8, seed=3)
    pairs = [[one, two] for one, two in zip(texts[:4], texts[4:], strict=True)]
    pruned["even"].requires_grad_(False)
    with torch.inference_mode():
        expected = BERT.task.probabilities(pruned["even"], [{"input": pair} for pair in pairs], 8192)
    assert router.score("even", pairs) == expected
    for wrong in (["a"], ["a", 3], 3):
        with pytest.raises(secateur.InputError, match=r"^inputs, row 1: expected text, got"):
            router.score("even", [wrong])  # type: ignore[list-item]


def test_threads_share_a_router() -> None:
    router, _ = router_for(T5)
    texts = sentences(5, seed=7)
    expected = {name: router.score(name, texts) for name in router}
    router, _ = router_for(T5, cache_bytes=max(router.sizes.values()))
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda i: router.score([*expected][i % 3], texts), range(12)))
    assert scores == [expected[[*expected][i % 3]] for i in range(12)]


def build(plans: Any, tasks: Any = None, case: Case = T5, **options: Any) -> TaskPlans:
    """Return a router of the case's dense model."""
    return TaskPlans(case.model(), plans, tasks, **options)


def corrupted(folder: Path) -> TaskPlans:
    """Build a router with a corrupted plan file."""
    path = saved(plans_of(T5), folder)["even"]
    about = json.loads(path.read_text())
    about["sites"][1]["kept"] += 1
    path.write_text(json.dumps(about))
    return build({"good": plans_of(T5)["uneven"], "sst2": path})


def small_cache(folder: Path) -> TaskPlans:
    """Build a router whose cache lacks one byte."""
    plans = plans_of(T5)
    return build(plans, cache_bytes=max(build(plans).sizes.values()) - 1)


def even(task: Any = T5.task, case: Case = T5) -> TaskPlans:
    """Return a router of the single task "even"."""
    return build({"even": uniform_plan(case, "head")}, {} if task is None else {"even": task}, case)


OPEN = secateur.TextToText(word_tokenizer(start=False, end=True))
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-plans": (lambda f: build({}), r"plans: expected a plan for at least one task, got none"),
    "another-models-plan": (
        lambda f: build({"good": plans_of(T5)["even"], "sst2": plans_of(LLAMA)["even"]}),
        r"task 'sst2': plan: expected a plan of this model \(fingerprint \w+\), got one of another",
    ),
    "corrupted-plan": (corrupted, r"task 'sst2': plan: '.*even.json' is corrupted: \S+ says \d+ units and marks \d+"),
    "no-such-file": (lambda f: build({"sst2": f / "none.json"}), r"task 'sst2': plan: no such file: '.*none.json'"),
    "neither-plan-nor-path": (
        lambda f: build({"sst2": 3}),
        r"task 'sst2': plan: expected secateur.Plan or the path .*, got 3",
    ),
    "task-without-a-plan": (
        lambda f: build({"even": plans_of(T5)["even"]}, {"sst2": T5.task}),
        r"task: expected one of 'even', got 'sst2'",
    ),
    "unknown-task": (lambda f: even()["sst2"], r"task: expected one of 'even', got 'sst2'"),
    "unknown-task-among-many": (
        lambda f: even().score(["even", "sst2"], ["the cat", "a dog"]),
        r"task: expected one of 'even', got 'sst2'",
    ),
    "small-cache": (small_cache, r"cache_bytes: expected at least the \d+ bytes that task '\w+' needs, got \d+"),
    "score-without-task": (
        lambda f: even(None).score("even", ["the cat"]),
        r"task 'even': expected a Task of that name in `tasks`, .* got none",
    ),
    "score-open": (lambda f: even(OPEN).score("even", ["the cat"]), r"task 'even': labels: expected the candidate labels"),
    "score-tags": (
        lambda f: even(CASES["bert-token"].task, CASES["bert-token"]).score("even", ["the cat"]),
        r"task 'even': task: expected one with a label for each input, got TokenClassification",
    ),
    "generate-classes": (
        lambda f: even(BERT.task, BERT).generate("even", ["the cat"]),
        r"task 'even': task: expected one that generates text, got SequenceClassification",
    ),
    "one-text": (lambda f: even().score("even", "the cat"), r"inputs: expected a list of texts, got the text 'the cat'"),
    "not-text": (lambda f: even().score("even", ["the cat", 3]), r"inputs, row 2: expected text, got int 3"),  # type: ignore[list-item]
    "another-count": (
        lambda f: even().generate(["even"], ["the cat", "a dog"]),
        r"task: expected one name, or one for each of 2 inputs, got 1",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_in_one_line_that_names_it(bad: str, tmp_path: Path) -> None:
    call, line = BAD[bad]
    with pytest.raises(secateur.InputError, match=f"^{line}") as raised:
        call(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_cache_of_the_largest_models_size_is_enough() -> None:
    plans = plans_of(T5)
    largest = max(build(plans).sizes.values())
    assert build(plans, cache_bytes=largest)["even"] is not None


@pytest.mark.parametrize("index", [[0], [5], [1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5], [0, 2, 4], [2, 3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_equals_indexing(index: list[int], dtype: str) -> None:
    dense = torch.randn(6, 6).to(DTYPES[dtype])
    for source in (dense, dense.t()):
        for dim, expected in ((0, source[index]), (1, source[:, index])):
            cut = Cut.along(dim, torch.tensor(index), "weight", source)
            assert torch.equal(cut.of(source), expected)
            assert cut.of(source).is_contiguous()
            assert cut.shape(source) == list(expected.shape)
    bias = dense[0]
    assert torch.equal(Cut.along(0, torch.tensor(index), "bias", bias).of(bias), bias[index])
