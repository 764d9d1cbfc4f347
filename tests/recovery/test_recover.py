"""recover_: exact where an exact fit exists, never worse on the examples, and without any other change."""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, CASES, CLASSES, CORE, WORDS, Case, Unit, emptied_plan, empty_plan, scores_of, sentences, uniform_plan
from torch import Tensor, nn

import secateur
from secateur import InputError
from secateur.model.blocks import blocks
from secateur.model.branches import FeedForward
from secateur.model.discovery import branches_of, fingerprint
from secateur.model.families import branches
from secateur.model.undisturbed import undisturbed
from secateur.planning.plan import Plan
from secateur.recovery import recover as recovering
from secateur.recovery import targets as targets_module
from secateur.recovery.least_squares import Moments, in_their_span
from secateur.recovery.targets import targets_of
from secateur.recovery.walk import Walk
from secateur.tasks import Batch

ONE_PER_TASK = [CASES[name] for name in ("t5-relu", "t5-gated", "bert-sequence", "bert-token", "llama")]


def halves(model: nn.Module) -> Plan:
    """Return a plan that removes the last half of the neurons of every FFN."""
    sites = tuple(secateur.sites(model, select="ffn"))
    kept = {site.name: torch.arange(site.units - site.units // 2) for site in sites}
    return Plan(kept, sites, fingerprint(model))


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    in_sites = branches_of(model, secateur.sites(model, select="ffn")).values()
    return [branch for branch in in_sites if isinstance(branch, FeedForward)]


def logits(case: Case, model: nn.Module) -> Tensor:
    """Return the logits at the labelled positions of all examples, in one batch and in eval mode."""
    (batch,) = case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 10_000)
    with torch.no_grad():
        all_logits = case.task.logits(model.eval(), batch)
    return torch.as_tensor(all_logits[batch.labels != -100])


def plan_of_half(model: nn.Module, case: Case, unit: str) -> Plan:
    """Return a plan that keeps the best half of every site's units."""
    scores = secateur.attribute(model, case.task, case.examples, unit=unit)  # type: ignore[arg-type]
    return secateur.plan(scores, keep=0.5)


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_recovery_is_exact_where_removed_neurons_duplicate_kept_ones(case: Case) -> None:
    """The last half of every FFN's neurons duplicates the first half, so the fit adds the weights of the duplicates."""
    model = case.model(torch.float64)
    with torch.no_grad():
        for branch in feed_forwards(model):
            for path in branch.inputs:
                for parameter in model.get_submodule(path).parameters():
                    parameter[-(branch.width // 2) :] = parameter[: branch.width // 2]
    pruned = secateur.prune(model, halves(model))
    expected, before = logits(case, model), logits(case, pruned)
    refits = secateur.recover_(model, pruned, case.task, case.examples)
    after = logits(case, pruned)
    assert float((before - expected).norm() / expected.norm()) > 1e-3
    # A decoder sees fewer tokens here than it has neurons, so the ridge holds its fit near the old weights.
    assert float((after - expected).norm() / expected.norm()) < 1e-3
    assert all(refit.after <= (1e-5 if refit.branch.startswith("decoder") else 1e-12) for refit in refits)


def test_an_added_bias_lowers_the_error_of_layers_without_biases() -> None:
    """The added bias restores the mean output of the removed neurons."""
    case = CASES["t5-relu"]
    model = case.model(torch.float64)
    pruned = secateur.prune(model, halves(model))
    before = sum(
        refit.before for refit in secateur.recover_(model, copy.deepcopy(pruned), case.task, case.examples, method="scale")
    )
    refits = secateur.recover_(model, pruned, case.task, case.examples, method="bias", add_biases=True)
    assert sum(refit.after for refit in refits) < before


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_recovery_is_exact_where_removed_neurons_are_constant(method: str) -> None:
    case = CASES["bert-sequence"]
    model = case.model(torch.float64)
    with torch.no_grad():
        for branch in feed_forwards(model):
            layer = model.get_submodule(branch.inputs[0])
            layer.get_parameter("weight")[-(branch.width // 2) :] = 0
            layer.get_parameter("bias")[-(branch.width // 2) :] = 1
    pruned = secateur.prune(model, halves(model))
    expected, before = logits(case, model), logits(case, pruned)
    secateur.recover_(model, pruned, case.task, case.examples, method=method)  # type: ignore[arg-type]
    limit = 1e-10 if method == "bias" else 1e-4
    assert float((before - expected).norm() / expected.norm()) > 1e-3
    assert float((logits(case, pruned) - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_scale_is_exact_where_removed_units_duplicate_kept_ones(kind: str) -> None:
    """The last half of the neurons or heads duplicates the first half, so a scale of two restores the output."""
    case = CASES["bert-sequence"]
    model = case.model(torch.float64)
    sites = tuple(secateur.sites(model, select=kind))
    with torch.no_grad():
        for site, branch in branches_of(model, sites).items():
            for port in branch.cut_at(site.unit):
                weight = model.get_parameter(f"{port.path}.weight")
                half = weight.shape[0 if port.side == "output" else 1] // 2
                if port.side == "output":
                    weight[-half:] = weight[:half]
                    model.get_parameter(f"{port.path}.bias")[-half:] = model.get_parameter(f"{port.path}.bias")[:half]
                else:
                    weight[:, -half:] = weight[:, :half]
    plan = Plan({s.name: torch.arange(s.units - s.units // 2) for s in sites}, sites, fingerprint(model))
    pruned = secateur.prune(model, plan)
    expected, before = logits(case, model), logits(case, pruned)
    refits = secateur.recover_(model, pruned, case.task, case.examples, method="scale")
    assert float((before - expected).norm() / expected.norm()) > 1e-3
    assert float((logits(case, pruned) - expected).norm() / expected.norm()) < 1e-4
    assert all(refit.after < 1e-6 for refit in refits)


@pytest.mark.parametrize("method", ["least_squares", "scale"])
@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_recovery_makes_no_branch_worse_and_is_repeatable(case: Case, unit: str, method: Any) -> None:
    model = case.model()
    plan = plan_of_half(model, case, unit)
    pruned = secateur.prune(model, plan)
    refits = secateur.recover_(model, pruned, case.task, case.examples, method=method)
    assert [refit.branch for refit in refits] == [
        branch.name for branch in dict.fromkeys(branches_of(model, secateur.sites(model)).values())
    ]
    assert all(refit.after <= refit.before for refit in refits)
    if method == "least_squares":
        assert sum(refit.after for refit in refits) < 0.9 * sum(refit.before for refit in refits)
    again = secateur.prune(model, plan)
    assert secateur.recover_(model, again, case.task, case.examples, method=method) == refits
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name))


@pytest.mark.parametrize("make_plan", [emptied_plan, empty_plan])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_recovery_fits_only_the_bias_of_an_empty_branch(case: Case, make_plan: Callable[..., Plan]) -> None:
    model = case.model()
    pruned = secateur.prune(model, make_plan(case, "channel"))
    refits = secateur.recover_(model, pruned, case.task, case.examples)
    left = {
        branch.name: pruned.get_submodule(branch.output).get_parameter("weight").numel() for branch in branches(pruned).values()
    }
    assert all(refit.after <= refit.before for refit in refits)
    empty = [refit for refit in refits if not left[refit.branch]]
    biased = {name.removesuffix(".bias") for name, _ in pruned.named_parameters() if name.endswith(".bias")}
    assert all(
        refit.ridge is None and (refit.after < refit.before) == (branches(pruned)[refit.branch].output in biased)
        for refit in empty
    )
    assert empty


def end(case: Case, model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the last sums [tokens, channels] of the stream and the outputs of a branch."""
    sums = []
    with undisturbed(model), torch.no_grad():
        walk = Walk(model, case.task, batches)
        for branch in branches(model).values():
            reached = [walk.reach(k, branch) for k in range(len(batches))]
    for batch, at in zip(batches, reached, strict=True):
        assert at.stream is not None
        sums.append((at.stream + at.outputs)[batch.real(target=case.name in ("t5-gated", "bart"))])
    return torch.cat(sums)


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bart", "llama", "gpt2", "opt", "opt-post-norm", "distilbert"])
def test_later_branches_give_back_what_earlier_ones_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block alone is pruned. Towards their own outputs, the other branches would give nothing back."""
    case = CASES[name]
    model, targets = case.model(torch.float64), [example["target"] for example in case.examples]
    examples = [{"input": text, "target": targets[k % len(targets)]} for k, text in enumerate(sentences(150))]
    batches = list(case.task.batches(case.task.items(model, examples), torch.device("cpu"), 4096))
    sites = tuple(secateur.sites(model))
    first = {block.name for block in blocks(model).values() if block.layer == 0}
    kept = {site.name: torch.arange(site.units // 2 if site.block in first else site.units) for site in sites}
    distances, reach = {}, Walk.reach
    for towards in ("stream", "branch"):
        pruned = secateur.prune(model, Plan(kept, sites, fingerprint(model)))
        with monkeypatch.context() as patch:
            if towards == "branch":
                patch.setattr(Walk, "reach", lambda *given: replace(reach(*given), stream=None))
            secateur.recover_(model, pruned, case.task, examples)
        distances[towards] = float((end(case, pruned, batches) - end(case, model, batches)).norm())
    assert distances["stream"] < distances["branch"]


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bart", "llama", "gemma3", "opt"])
def test_targets_in_files_give_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model()
    plan = plan_of_half(model, case, "head")
    shared = targets_of(model, case.task, case.examples, max_tokens=24)
    refitted = []
    for held in (targets_module.HELD, 0):
        monkeypatch.setattr(targets_module, "HELD", held)
        pruned = secateur.prune(model, plan)
        secateur.recover_(model, pruned, case.task, case.examples, max_tokens=24)
        refitted.append(pruned.state_dict())
        again = secateur.prune(model, plan)
        recovering.refit_(shared, again, "least_squares")
        refitted.append(again.state_dict())
    for state in refitted[1:]:
        assert all(torch.equal(state[key], tensor) for key, tensor in refitted[0].items())


def test_files_of_targets_are_deleted_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["llama"]
    model = case.model()
    monkeypatch.setattr(targets_module, "HELD", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = targets_of(model, case.task, case.examples, max_tokens=24)
    recovering.refit_(shared, secateur.prune(model, plan_of_half(model, case, "head")), "least_squares")
    assert len(list(tmp_path.glob("secateur-*/*.pt"))) == len(shared.batches) > 1
    del shared
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_for_the_targets_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["llama"]
    model = case.model()
    pruned = secateur.prune(model, plan_of_half(model, case, "head"))
    monkeypatch.setattr(targets_module, "HELD", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"^examples: expected fewer, or more space in .* states take .* GiB are free$"):
        secateur.recover_(model, pruned, case.task, case.examples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize(("count", "inputs", "outputs"), [(60, 8, 5), (60, 8, 1), (60, 1, 5), (10, 24, 5)])
def test_a_refit_is_that_of_the_tokens_themselves(
    dtype: torch.dtype, biased: bool, spanned: bool, count: int, inputs: int, outputs: int
) -> None:
    """NumPy solves the same problem by a singular value decomposition of the tokens, with rows that stand for the ridge."""
    if spanned and count > inputs:
        pytest.skip("the tokens span all inputs")
    generator = torch.Generator().manual_seed(inputs + outputs)
    h = torch.randn(count, inputs, generator=generator).to(dtype).double() + 1
    y = h @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) + 3
    layer = nn.Linear(inputs, outputs, bias=biased, dtype=dtype).requires_grad_(False)
    weight, bias = layer.weight.double().clone(), layer.bias.double().clone() if biased else None
    basis, coordinates = in_their_span(h) if spanned else (None, h)
    parts = [Moments() for _ in range(5)]
    for number, moments in enumerate(parts):
        moments.add(coordinates[number::5], y[number::5])
    refit = recovering._refit("it", layer, torch.arange(inputs), parts, "least_squares", basis)
    assert refit.ridge is not None
    missing = y - h @ weight.T - (0 if bias is None else bias)
    of_h, of_y = (h.mean(0), missing.mean(0)) if biased else (torch.zeros(inputs).double(), torch.zeros(outputs).double())
    added = (refit.ridge * float((h - of_h).square().sum()) / inputs) ** 0.5
    rows = np.concatenate([(h - of_h).numpy(), added * np.eye(inputs)])
    moved = np.linalg.lstsq(rows, np.concatenate([(missing - of_y).numpy(), np.zeros((inputs, outputs))]), rcond=None)[0].T
    expected = weight + torch.from_numpy(moved)
    narrow = torch.finfo(dtype).eps
    # Rounding of the sums is divided by the ridge in directions that no token has.
    torch.testing.assert_close(layer.weight.double(), expected, rtol=max(narrow, 1e-6), atol=1e-5)
    error = y - h @ layer.weight.double().T
    if bias is not None:
        # The bias goes with the weight as it is stored.
        best = bias + of_y - (layer.weight.double() - weight) @ of_h
        torch.testing.assert_close(layer.bias.double(), best, rtol=max(narrow, 1e-9), atol=1e-9)
        error = error - layer.bias.double()
    size = float(y.square().sum())
    assert refit.before == pytest.approx(float(missing.square().sum()) / size, rel=1e-9)
    assert refit.after == pytest.approx(float(error.square().sum()) / size, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("case", [CASES["t5-relu"], CASES["bert-sequence"], CASES["llama"]], ids=str)
def test_few_tokens_give_the_weights_that_the_moments_of_all_inputs_give(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model(torch.float64)
    plan = plan_of_half(model, case, "head")
    refitted, spans = [], list[int]()

    def all_inputs(h: Tensor) -> tuple[Tensor, Tensor]:
        spans.append(len(h))
        return torch.eye(h.shape[1], dtype=torch.float64), h

    for monkeyed in (False, True):
        if monkeyed:
            monkeypatch.setattr(recovering, "in_their_span", all_inputs)
        pruned = secateur.prune(model, plan)
        secateur.recover_(model, pruned, case.task, case.examples[:1])
        refitted.append(pruned.state_dict())
    assert spans
    for key, tensor in refitted[0].items():
        torch.testing.assert_close(refitted[1][key], tensor, rtol=1e-5, atol=1e-6)


def test_shared_targets_run_the_dense_model_once() -> None:
    case = CASES["llama"]
    model = case.model()
    runs: list[int] = []
    several = [secateur.prune(model, secateur.plan(scores_of("llama"), keep=keep)) for keep in (0.5, 0.7)]
    model.get_submodule(branches(model)["decoder.0.ffn"].output).register_forward_hook(lambda *_: runs.append(1))
    shared = targets_of(model, case.task, case.examples, max_tokens=24)
    for pruned in several:
        recovering.refit_(shared, pruned, "least_squares")
    assert len(runs) == len(shared.batches) > 1


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_recovery_takes_half_precision_a_single_example_and_repeated_examples(case: Case) -> None:
    """There are fewer tokens than channels, so the second moments are singular."""
    model = case.model(torch.bfloat16)
    plan = plan_of_half(model, case, "head")
    for examples in (case.examples[:1], [case.examples[0]] * 6):
        pruned = secateur.prune(model, plan)
        refits = secateur.recover_(model, pruned, case.task, examples)
        assert len(refits) == len(branches(model))
        assert all(0 <= refit.after <= refit.before for refit in refits)
        assert all(bool(parameter.isfinite().all()) for parameter in pruned.parameters())
        assert all(parameter.dtype == torch.bfloat16 for parameter in pruned.parameters())


def test_recovery_of_an_unpruned_copy_keeps_its_logits() -> None:
    case = CASES["t5-gated"]
    model = case.model()
    same = copy.deepcopy(model)
    refits = secateur.recover_(model, same, case.task, case.examples)
    assert len(refits) == len(branches(model))
    assert all(refit.before < 1e-10 for refit in refits)
    torch.testing.assert_close(logits(case, same), logits(case, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_recovery_changes_only_out_projections_and_what_feed_forwards_read_by(case: Case) -> None:
    model = case.model().train()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pruned = secateur.prune(model, plan_of_half(model, case, "head"))
    refitted = {branch.output for branch in branches(model).values()}
    refitted |= {path for branch in feed_forwards(model) for path in branch.inputs}
    others = {
        name: parameter.clone() for name, parameter in pruned.named_parameters() if name.rpartition(".")[0] not in refitted
    }
    secateur.recover_(model, pruned, case.task, case.examples)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    for name, weight in others.items():
        assert torch.equal(pruned.get_parameter(name), weight)
    for checked in (model, pruned):
        assert all(module.training for module in checked.modules())
        assert all(parameter.requires_grad for parameter in checked.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in checked.modules())
        assert not any("forward" in vars(module) for module in checked.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama"])
def test_in_projections_give_what_they_give_in_the_dense_model(name: str, dtype: torch.dtype) -> None:
    """All of a branch are multiplied by one matrix, and come nearer to the dense model's pre-activations by that."""
    case = CASES[name]
    model = case.model(dtype)
    pruned = secateur.prune(model, plan_of_half(model, case, "head"))
    kept = {name: parameter.clone() for name, parameter in pruned.named_parameters()}
    rows = [{"input": text, "target": case.examples[k % 3]["target"]} for k, text in enumerate(sentences(80, seed=1))]
    refits = secateur.recover_(model, pruned, case.task, rows)
    targets = targets_of(model, case.task, rows)
    walk, over_target = Walk(pruned, case.task, targets.batches), name == "t5-gated"
    corrected = 0
    with torch.no_grad():
        targets.start()
        for refit, branch in zip(refits, branches(pruned).values(), strict=True):
            assert refit.ridge_of_inputs is None or branch.kind == "ffn"
            if isinstance(branch, FeedForward) and refit.ridge_of_inputs is not None:
                corrected += 1
                reals = [batch.real(target=branch.stack == "decoder" and over_target) for batch in targets.batches]
                reads = torch.cat([walk.enter(k, branch)[real] for k, real in enumerate(reals)])
                wanted = torch.cat([targets.entering(k, branch)[real] for k, real in enumerate(reals)])
                for path in branch.inputs:
                    given, layer = pruned.get_submodule(path)(reads), copy.deepcopy(pruned.get_submodule(path))
                    for part, parameter in layer.named_parameters():
                        parameter.data = kept[f"{path}.{part}"]
                    before, after = ((of - layer(wanted)).float().square().sum() for of in (layer(reads), given))
                    assert after < 0.99 * before
            for k in range(len(targets.batches)):
                walk.reach(k, branch)
    assert corrected


@pytest.mark.parametrize("add_biases", [False, True])
@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", [CASES["llama"], CASES["t5-gated"]], ids=str)
def test_a_recovered_model_is_saved_and_loaded(case: Case, unit: str, add_biases: bool, tmp_path: Path) -> None:
    model = case.model()
    pruned = secateur.prune(model, plan_of_half(model, case, unit))
    secateur.recover_(model, pruned, case.task, case.examples, add_biases=add_biases)
    sites = secateur.sites(model)
    biases: list[Any] = [pruned.get_submodule(branch.output).bias for branch in branches_of(model, sites).values()]
    assert all((bias is not None) == add_biases for bias in biases)
    assert not add_biases or any(bool(bias.any()) for bias in biases)
    secateur.save(pruned, tmp_path / "out")
    assert torch.equal(logits(case, secateur.load(tmp_path / "out")), logits(case, pruned))


def test_bad_input_is_refused() -> None:
    case, other = CASES["t5-gated"], CASES["llama"]
    model = case.model()
    with pytest.raises(InputError, match=r"^method: expected one of least_squares, scale, bias, got 'lasso'"):
        secateur.recover_(model, model, case.task, case.examples, method="lasso")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^method: expected least_squares for T5ForConditional.*, which has no biases"):
        secateur.recover_(model, model, case.task, case.examples, method="bias")
    with pytest.raises(InputError, match=r"^pruned: expected a model pruned from the dense one, got one with other branches"):
        secateur.recover_(model, other.model(), case.task, case.examples)
    with pytest.raises(InputError, match=r"^pruned: expected a plain linear layer at .*, got LowRankLinear"):
        secateur.recover_(model, secateur.factorise(model, 0.9), case.task, case.examples)


@pytest.mark.parametrize("case", CORE, ids=str)
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_the_pruned_model_before_the_dense_one_is_refused_and_changes_nothing(case: Case, unit: Unit) -> None:
    """The models differ at one site. Q/K channels that are gone leave the out-projection as wide as it was."""
    model = case.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = scores_of(case.name, unit)
    whole = {site.name: torch.arange(site.units) for site in scores.sites}
    for site in scores.sites:
        for gone in (1, site.units):
            plan = secateur.Plan({**whole, site.name: whole[site.name][gone:]}, scores.sites, scores.fingerprint)
            pruned = secateur.prune(model, plan)
            with pytest.raises(InputError, match=r"^pruned: expected the dense model first and the pruned one second, got "):
                secateur.recover_(pruned, model, case.task, case.examples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("count", "parts"), [(60, 2), (12, 5), (4, 5)], ids=["last-fifth", "of-examples", "of-tokens"])
def test_every_fifth_is_held_out(count: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts share no token, and together they have each real token once. The last part is the last fifth."""
    recorded: list[Moments] = []

    class Recorded(Moments):
        def __init__(self) -> None:
            super().__init__()
            recorded.append(self)

    monkeypatch.setattr(recovering, "Moments", Recorded)
    case = CASES["bert-sequence"]
    model = case.model()
    words = [" ".join(WORDS[: 1 + (3 * k) % 11]) for k in range(count)]
    examples = [{"input": text, "target": CLASSES[k % len(CLASSES)]} for k, text in enumerate(words)]
    secateur.recover_(model, secateur.prune(model, uniform_plan(case, "head")), case.task, examples)
    lengths = [len(ids) for ids in case.task.reader(words)["input_ids"]]
    fifths = [sum(lengths[k::5]) if count >= 5 else sum(len(range(k, length, 5)) for length in lengths) for k in range(5)]
    # Feed-forwards have moments of what they read, too.
    assert len(recorded) == parts * (len(branches(model)) + len(feed_forwards(model)))
    for first in range(0, len(recorded), parts):
        expected = fifths if parts == 5 else [sum(fifths[:4]), fifths[4]]
        assert [moments.tokens for moments in recorded[first : first + parts]] == expected


@pytest.mark.parametrize(("name", "count", "seed"), [("llama", 5, 3), ("llama", 7, 0), ("qwen2", 5, 3)])
def test_few_examples_do_not_make_the_model_worse(name: str, count: int, seed: int) -> None:
    """A ridge that is chosen on one of these few examples makes the logits of other examples worse."""
    case = CASES[name]
    model, targets = case.model(seed=seed), [example["target"] for example in case.examples]
    texts = sentences(count + 60, seed)
    examples = [{"input": text, "target": targets[k % len(targets)]} for k, text in enumerate(texts)]

    def logits_of_others(of: nn.Module) -> Tensor:
        batches = case.task.batches(case.task.items(of, examples[count:]), torch.device("cpu"), 4096)
        with torch.no_grad():
            return torch.cat([case.task.logits(of, batch)[batch.labels != -100].flatten() for batch in batches])

    pruned = secateur.prune(model, uniform_plan(case, "head"))
    expected, before = logits_of_others(model), logits_of_others(pruned)
    secateur.recover_(model, pruned, case.task, examples[:count])
    assert float((logits_of_others(pruned) - expected).norm()) < float((before - expected).norm())


@pytest.mark.parametrize("count", [2, 5])
def test_parts_are_held_out_in_turn_or_the_last_of_two(count: int) -> None:
    parts = [Moments() for _ in range(count)]
    for number, moments in enumerate(parts):
        moments.add(torch.ones(number + 1, 3), torch.ones(number + 1, 2))
    tokens = [(fitted.tokens, held_out.tokens) for fitted, held_out in recovering._folds(parts)]
    total = sum(range(1, count + 1))
    assert tokens == [(1, 2)] if count == 2 else [(total - k, k) for k in range(1, count + 1)]


def test_the_dense_model_in_place_of_the_pruned_one_is_refused() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    with pytest.raises(InputError, match=r"^pruned: expected a model pruned from the dense one, got the dense model itself"):
        secateur.recover_(model, model, case.task, case.examples)
