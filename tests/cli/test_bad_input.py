"""Contract 6: bad input ends in one clear line, and nothing half-written stays."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, Case, piece_tokenizer, scores_of, uniform_plan, word_tokenizer
from torch import nn

import secateur
from secateur.attribution.criteria import (
    Criterion,
    GradientActivation,
    IntegratedGradients,
    RandomScores,
    RandomTargets,
    criterion_named,
)

T5 = CASES["t5-gated"]
BERT = CASES["bert-sequence"]
TOKENS = CASES["bert-token"]
LLAMA = CASES["llama"]
GOOD = {"input": "the cat sat", "target": "yes"}
OTHER = {"input": "a bird flew", "target": "no way"}


def attribute(case: Case, examples: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: secateur.attribute(case.model(), case.task, examples, **options)


def evaluate(case: Case, examples: Any) -> Callable[[Path], Any]:
    return lambda folder: secateur.evaluate(case.model(), case.task, examples)


def plan(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: secateur.plan(scores_of("t5-gated"), **options)


def save_over(folder: Path) -> None:
    (folder / "out").mkdir()
    secateur.save(T5.model(), folder / "out")


def save_over_file(folder: Path) -> None:
    (folder / "out").write_text("precious")
    secateur.save(T5.model(), folder / "out")


def nan_model(folder: Path, criterion: Criterion | None = None) -> None:
    model = T5.model()
    with torch.no_grad():
        model.get_parameter("encoder.block.0.layer.0.SelfAttention.v.weight")[0, 0] = float("nan")
    secateur.attribute(model, T5.task, T5.examples, criterion=criterion)


def unknown_family(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=20))
    model.config.model_type = "gpt-unheard-of"
    secateur.attribute(model, LLAMA.task, LLAMA.examples)


def load_broken(content: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(content)
        secateur.load(folder / "model")

    return call


def tokens(**columns: Any) -> Callable[[Path], Any]:
    return attribute(TOKENS, [TOKENS.examples[0], {**TOKENS.examples[1], **columns}])


# A user's call, and what its one line must contain: the argument, the expected value and the actual one.
TABLE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no-such-file": (attribute(T5, "nowhere/data.jsonl"), ["data: no such file", "nowhere/data.jsonl"]),
    "no-such-absolute-path": (attribute(T5, "/nowhere/data"), ["data: no such file", "/nowhere/data"]),
    "a-folder": (lambda folder: secateur.evaluate(T5.model(), T5.task, folder), ["data: expected a file, got the folder"]),
    "no-such-builtin": (attribute(T5, "builtin:nothing"), ["expected builtin:TASK", "'nothing'"]),
    "no-examples": (attribute(T5, []), ["examples: expected at least one example, got none"]),
    "no-examples-to-evaluate": (evaluate(T5, []), ["examples: expected at least one example, got none"]),
    "not-iterable": (attribute(T5, 7), ["examples: expected an iterable", "got int"]),
    "not-a-mapping": (attribute(T5, ["text"]), ["row 1", "expected an object with 'input', 'target'", "got str"]),
    "missing-column": (attribute(T5, [GOOD, {"input": "x"}]), ["row 2", "expected the column 'target'", "got 'input'"]),
    "null": (attribute(T5, [GOOD, OTHER, {**GOOD, "input": None}]), ["row 3", "'input'", "got null"]),
    "input-not-text": (attribute(T5, [GOOD, {**OTHER, "input": 5}]), ["row 2", "expected text", "'input'", "int 5"]),
    "target-not-text": (attribute(T5, [GOOD, {**OTHER, "target": 1.5}]), ["row 2", "expected text", "'target'", "float 1.5"]),
    "input-a-list": (attribute(LLAMA, [GOOD, {**OTHER, "input": ["x"]}]), ["row 2", "expected text", "list ['x']"]),
    "target-outside-labels": (attribute(T5, [GOOD, {**GOOD, "target": "perhaps"}]), ["row 2", *LABELS, "'perhaps'"]),
    "target-outside-labels-causal": (evaluate(LLAMA, [GOOD, {**GOOD, "target": "si"}]), ["row 2", *LABELS, "'si'"]),
    "target-outside-labels-t5": (evaluate(T5, [GOOD, {**GOOD, "target": "si"}]), ["row 2", *LABELS, "'si'"]),
    "class-outside-the-models": (attribute(BERT, [{**GOOD, "target": "great"}]), ["row 1", "'negative'", "'great'"]),
    "class-number-too-high": (attribute(BERT, [{**GOOD, "target": 3}]), ["row 1", "'positive'", "got 3"]),
    "class-number-negative": (evaluate(BERT, [{**GOOD, "target": -1}]), ["row 1", "got -1"]),
    "class-a-bool": (evaluate(BERT, [{**GOOD, "target": True}]), ["row 1", "got True"]),
    "all-of-one-label": (attribute(T5, [GOOD, GOOD]), ["examples: expected at least two different targets", "'yes'", "2 rows"]),
    "all-of-one-class": (
        attribute(BERT, [{**GOOD, "target": "neutral"}] * 3),
        ["examples: expected at least two different targets", "'neutral'", "3 rows"],
    ),
    "tags-too-few": (tokens(tokens=["a", "b"], tags=["O"]), ["row 2", "expected 2 tags", "got 1"]),
    "tags-not-a-list": (tokens(tags="O"), ["row 2", "tags", "got str"]),
    "tokens-not-words": (tokens(tokens=["a", 5], tags=["O", "O"]), ["row 2", "expected a list of words", "5"]),
    "tokens-empty": (tokens(tokens=[], tags=[]), ["row 2", "expected a list of words", "[]"]),
    "tag-unknown": (tokens(tokens=["a"], tags=["B-ORG"]), ["row 2", "'B-PER'", "'B-ORG'"]),
    "all-labels-of-open-targets": (
        lambda folder: secateur.attribute(
            T5.model(), secateur.TextToText(T5.task.reader), [GOOD], criterion=GradientActivation.paper_unsupervised()
        ),
        ["labels: expected the candidate labels", "got None"],
    ),
    "all-labels-of-tags": (
        attribute(TOKENS, TOKENS.examples, criterion=GradientActivation(labels="all")),
        ["criterion: all candidate labels are for tasks with one target"],
    ),
    "target-of-no-piece": (attribute(LLAMA, [GOOD, {**OTHER, "target": ""}]), ["row 2"]),
    "one-label": (
        lambda folder: secateur.TextToText(T5.task.reader, labels=["yes"]),
        ["labels", "two different", "['yes']"],
    ),
    "one-label-twice": (lambda folder: secateur.CausalLM(LLAMA.task.reader, labels=["a", "a"]), ["labels", "two different"]),
    "another-number-of-classes": (
        lambda folder: secateur.evaluate(
            BERT.model(), secateur.SequenceClassification(piece_tokenizer(), labels=["a", "b"]), [GOOD]
        ),
        ["labels: expected the model's 3 classes, got 2"],
    ),
    "target-longer-than-the-model": (
        lambda folder: secateur.evaluate(
            LLAMA.model(), secateur.CausalLM(word_tokenizer(start=True, end=False), max_length=2), [GOOD, OTHER]
        ),
        ["row 2", "under 2 pieces", "got 2"],
    ),
    "nan-activation": (nan_model, ["model: activations of site 'encoder.0.self_attention' are not finite"]),
    "unknown-unit": (attribute(T5, T5.examples, unit="layer"), ["unit: expected 'head' or 'channel', got 'layer'"]),
    "unknown-site": (attribute(T5, T5.examples, select="mlp"), ["sites: expected words of", "'mlp'"]),
    "refused-channels": (
        attribute(CASES["qwen3"], CASES["qwen3"].examples, unit="channel", select="qk"),
        ["sites: 'qk' selects none", "Q/K channels are: queries and keys are normalised over the head"],
    ),
    "empty-selection": (attribute(BERT, BERT.examples, select="decoder"), ["sites: 'decoder' selects none", "encoder.0"]),
    "unknown-criterion": (lambda folder: criterion_named("magic"), ["criterion: expected one of gradient", "'magic'"]),
    "settings-of-a-criterion-without": (
        lambda folder: criterion_named("wanda:seed=1"),
        ["criterion: expected no settings after 'wanda', got 'seed=1'"],
    ),
    "unknown-setting": (
        lambda folder: criterion_named("rap:seeds=1"),
        ["criterion: expected NAME=VALUE after 'rap', with a name of target, over_examples, labels, seed, got 'seeds=1'"],
    ),
    "seed-negative": (lambda folder: RandomTargets(seed=-1), ["seed: expected a number of at least 0, got -1"]),
    "seed-a-word": (lambda folder: criterion_named("random:seed=x"), ["seed: expected a number of at least 0, got 'x'"]),
    "seed-a-bool": (lambda folder: RandomScores(seed=True), ["seed: expected a number of at least 0, got True"]),
    "rap-target": (lambda folder: criterion_named("rap:target=loss"), ["target: expected one of probability", "'loss'"]),
    **{
        f"{name}-of-a-model-that-is-not-finite": (
            partial(nan_model, criterion=criterion_named(name)),
            ["model: activations of site 'encoder.0.self_attention' are not finite"],
        )
        for name in ("fpp", "rap", "wanda", "flap")
    },
    "unknown-target": (lambda folder: GradientActivation(target="loss"), ["target: expected one of probability", "'loss'"]),  # type: ignore[arg-type]
    "unknown-sum": (
        lambda folder: GradientActivation(over_examples="mean"),  # type: ignore[arg-type]
        ["over_examples: expected one of signed, absolute, squared, got 'mean'"],
    ),
    "ig-path": (lambda folder: IntegratedGradients(path="x"), ["path: expected 'layer' or 'joint', got 'x'"]),  # type: ignore[arg-type]
    "ig-nodes-0": (lambda folder: IntegratedGradients(nodes=0), ["nodes: expected 'auto' or a positive number, got 0"]),
    "ig-nodes-negative": (lambda folder: IntegratedGradients(nodes=-3), ["nodes: expected 'auto'", "got -3"]),
    "ig-nodes-a-word": (lambda folder: IntegratedGradients(nodes="many"), ["nodes: expected 'auto'", "got 'many'"]),  # type: ignore[arg-type]
    "ig-nodes-a-bool": (lambda folder: IntegratedGradients(nodes=True), ["nodes: expected 'auto'", "got True"]),
    "ig-nodes-a-fraction": (lambda folder: IntegratedGradients(nodes=2.5), ["nodes: expected 'auto'", "got 2.5"]),  # type: ignore[arg-type]
    "ig-tolerance-0": (lambda folder: IntegratedGradients(tolerance=0), ["tolerance: expected", "between 0 and 1, got 0"]),
    "ig-tolerance-2": (lambda folder: IntegratedGradients(tolerance=2), ["tolerance: expected", "between 0 and 1, got 2"]),
    "ig-tolerance-nan": (lambda folder: IntegratedGradients(tolerance=float("nan")), ["tolerance: expected", "got nan"]),
    "ig-max-nodes-3": (lambda folder: IntegratedGradients(max_nodes=3), ["max_nodes: expected", "at least 12, got 3"]),
    "ig-max-nodes-a-bool": (lambda folder: IntegratedGradients(max_nodes=True), ["max_nodes: expected", "got True"]),
    "ig-of-a-model-that-is-not-finite": (
        lambda folder: nan_model(folder, IntegratedGradients()),
        ["model: activations of site 'encoder.0.self_attention' are not finite"],
    ),
    "ig-target": (lambda folder: IntegratedGradients(target="loss"), ["target: expected one of probability", "'loss'"]),  # type: ignore[arg-type]
    "keep-0": (plan(keep=0), ["keep: expected a number in (0, 1], got 0"]),
    "keep-negative": (plan(keep=-1), ["keep: expected a number in (0, 1], got -1"]),
    "keep-too-high": (plan(keep=1.5), ["keep: expected a number in (0, 1], got 1.5"]),
    "keep-nan": (plan(keep=float("nan")), ["keep: expected a number in (0, 1], got nan"]),
    "keep-inf": (plan(keep=float("inf")), ["keep: expected a number in (0, 1], got inf"]),
    "flops-too-high": (plan(flops=2.0), ["flops: expected a number in (0, 1], got 2.0"]),
    "params-0": (plan(params=0.0), ["params: expected a number in (0, 1], got 0.0"]),
    "no-budget": (plan(), ["budget: expected exactly one of keep, flops, params, memory, speedup, latency, got none"]),
    "speedup-below-1": (plan(speedup=0.9), ["speedup: expected a number of at least 1, got 0.9"]),
    "speedup-infinite": (plan(speedup=float("nan")), ["speedup: expected a number of at least 1, got nan"]),
    "latency-0": (plan(latency=0.0), ["latency: expected a positive number of milliseconds, got 0.0"]),
    "no-table": (plan(speedup=2.0), ["table: expected a LatencyTable with the budget speedup, got none"]),
    "memory-out-of-reach": (plan(memory=0.01), ["memory: expected at least 0.", "got 0.01"]),
    "allocation": (
        plan(flops=0.5, allocation="greedy"),
        ["allocation: expected one of uniform, global, knapsack, got 'greedy'"],
    ),
    "allocation-of-keep": (plan(keep=0.5, allocation="global"), ["allocation: expected uniform with keep", "got 'global'"]),
    "floor-too-high": (plan(flops=0.5, floor=1.5), ["floor: expected a number in [0, 1], got 1.5"]),
    "floor-over-budget": (plan(flops=0.5, floor=0.8), ["flops: expected at least 0.", "got 0.5"]),
    "floor-over-keep": (plan(keep=0.5, floor=0.9), ["floor: expected at most the share to keep, 0.5, got 0.9"]),
    "two-budgets": (plan(keep=0.5, flops=0.5), ["budget: expected exactly one", "got keep, flops"]),
    "unreachable": (plan(flops=0.001), ["flops: expected at least 0.", "what is left with the least", "got 0.001"]),
    "align-0": (plan(keep=0.5, align=0), ["align: expected a positive number, got 0"]),
    "scores-of-another-model": (
        lambda folder: secateur.prune(T5.model(), uniform_plan(BERT, "head")),
        ["plan: expected a plan of this model (fingerprint ", "got one of another ("],
    ),
    "no-such-scores": (lambda folder: secateur.Scores.load(folder / "s"), ["scores: no such file"]),
    "no-such-plan": (lambda folder: secateur.Plan.load(folder / "p"), ["plan: no such file"]),
    "out-exists": (save_over, ["out: expected a folder that does not exist yet", "out', which exists"]),
    "out-is-a-file": (save_over_file, ["out: expected a folder that does not exist yet"]),
    "out-without-parent": (
        lambda folder: secateur.save(T5.model(), folder / "no" / "out"),
        ["out: expected an existing parent folder"],
    ),
    "plan-without-parent": (
        lambda folder: uniform_plan(T5, "head").save(folder / "no" / "plan.json"),
        ["out: expected an existing parent folder"],
    ),
    "unknown-family": (
        unknown_family,
        ["model: expected one of the families", "llama", "t5", "'gpt-unheard-of'", "add-a-family"],
    ),
    "no-family-at-all": (
        lambda folder: secateur.sites(nn.Linear(2, 2)),
        ["model: expected one of the families", "model_type None"],
    ),
    "load-nothing": (lambda folder: secateur.load(folder / "none"), ["model: expected a folder with a config.json"]),
    "load-not-json": (load_broken("{"), ["model: ", "config.json' is not a model's config"]),
    "load-no-architecture": (load_broken("{}"), ["model: ", "config.json' is not a model's config", "architectures"]),
    "load-empty-architecture": (load_broken('{"architectures": []}'), ["model: ", "is not a model's config"]),
    "load-unknown-architecture": (
        load_broken('{"architectures": ["NoSuchModel"]}'),
        ["model: expected a class of transformers", "'NoSuchModel'"],
    ),
    "load-not-a-name": (load_broken('{"architectures": [3]}'), ["model: "]),
    "load-not-an-object": (load_broken("[]"), ["model: ", "is not a model's config"]),
    "load-a-function": (load_broken('{"architectures": ["pipeline"]}'), ["model: expected a class of transformers"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_one_clear_line(name: str, tmp_path: Path) -> None:
    call, fragments = TABLE[name]
    with pytest.raises(secateur.InputError) as caught:
        call(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_a_refused_save_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    with pytest.raises(secateur.InputError, match=r"^out: "):
        secateur.save(T5.model(), tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]


def test_one_example_is_enough() -> None:
    """The rule about a single label applies to data sets, not to a single example."""
    assert secateur.attribute(T5.model(), T5.task, [GOOD]).examples == 1


def test_open_targets_may_be_equal() -> None:
    task = secateur.TextToText(T5.task.reader)
    assert secateur.attribute(T5.model(), task, [GOOD, GOOD]).examples == 2


def test_a_refused_call_does_not_change_its_arguments() -> None:
    examples: list[dict[str, Any]] = [GOOD, {**GOOD, "target": "perhaps"}]
    before = copy.deepcopy(examples)
    with pytest.raises(secateur.InputError, match="perhaps"):
        secateur.attribute(T5.model(), T5.task, examples)
    assert examples == before


def test_a_save_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").exists()
            raise OSError("the network share went away")

    with pytest.raises(OSError, match="the network share went away"):
        secateur.save(T5.model(), tmp_path / "out", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cases import CASES, scores_of, uneven_plan
import secateur

case, root, outcomes = CASES["t5-gated"], Path(sys.argv[1]), {}
scores, plan = scores_of(case.name), uneven_plan(case, "head")
model = secateur.prune(case.model(), plan)
(root / "old.json").write_text("the file that was there before")

def attempt(name, call, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        call()
        outcomes[name] = "written"
    except Exception as error:
        outcomes[name] = type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

attempt("plan", lambda: plan.save(root / "plan.json"), 1000)
attempt("over an old plan", lambda: plan.save(root / "old.json"), 1000)
attempt("scores", lambda: scores.save(root / "scores.safetensors"), 1000)
attempt("config", lambda: secateur.save(model, root / "first"), 100)
attempt("weights", lambda: secateur.save(model, root / "second"), 20_000)
print("REPORT" + json.dumps(outcomes))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file size limit to fill the disk with")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit on file sizes makes the operating system refuse the write, at different places."""
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, "-c", FULL_DISK, str(root), str(Path(__file__).parents[1] / "support")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout.partition("REPORT")[2])
    assert len(outcomes) == 5
    assert "written" not in outcomes.values(), outcomes
    assert [path.name for path in root.iterdir()] == ["old.json"]
    assert (root / "old.json").read_text() == "the file that was there before"
