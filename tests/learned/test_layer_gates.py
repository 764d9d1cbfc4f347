"""LayerGates: LD-Net's regularisers, training of gates within [0, 1], and restoring of the model."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CORE, DTYPES, Case
from comparing import relative
from hand_layers import branch_names, by_hand
from torch import Tensor, nn
from transformers import TrainingArguments
from undisturbed import assert_undisturbed, lived_in

import secateur
from secateur.learned.layers.layer_gates import LayerGates
from secateur.learned.layers.layer_training import GatedAdamW, task_features, train
from secateur.learned.shared.gate_regularisers import r1, r2, r3
from secateur.model.blocks import layers
from secateur.pruning.verify import verify_layers

every_case = pytest.mark.parametrize("case", CORE, ids=str)


def set_(gates: LayerGates, values: Any) -> None:
    with torch.no_grad():
        gates.z.copy_(torch.as_tensor(values))


def slope(value: Tensor, z: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(value, z)
    return [round(x, 6) for x in gradient.tolist()]


def test_the_regularisers_by_hand() -> None:
    z = torch.tensor([0.0, 0.25, 0.5, 1.0], requires_grad=True)
    values = [float(value.detach()) for value in (r1(z), r2(z), r3(z, 2), r3(z, 3))]
    # Three gates are open. The first term counts if two are wanted, not if three are.
    assert values == [1.75, 1.75 + 0.1875 + 0.25, 1.75 + 0.1875 + 0.25, 0.1875 + 0.25]
    assert slope(r1(z), z) == [1, 1, 1, 1]  # At 0 the one-sided derivative from inside [0, 1].
    assert slope(r2(z), z) == [2, 1.5, 1, 0]
    assert slope(r3(z, 2), z) == [2, 1.5, 1, 0]
    assert slope(r3(z, 3), z) == [1, 0.5, 0, -1]


def test_the_projection_keeps_gates_between_zero_and_one() -> None:
    gates = LayerGates(CASES["t5-relu"].model(), keep_layers=1, regularisation="R1")
    set_(gates, [-0.5, 0.0, 0.3, 1.0, 1.7])
    gates.project_()
    assert gates.z.tolist() == pytest.approx([0, 0, 0.3, 1, 1])


def test_a_step_that_would_close_too_many_opens_the_largest_again() -> None:
    gates = LayerGates(CASES["t5-relu"].model(), keep_layers=2)
    set_(gates, [0.2, 0.1, 0.4, 0.3, 0.0])
    gates.project_()
    set_(gates, [-0.2, -0.1, 0.1, -0.3, -0.05])  # The last gate was closed before, and stays closed.
    gates.project_()
    assert gates.z.tolist() == pytest.approx([0, 1, 0.1, 0, 0])


@pytest.mark.parametrize("keep_layers", [1, 2, 3, 4])
def test_the_shrinking_stops_at_the_wanted_number(keep_layers: int) -> None:
    """The task needs every layer a little more than the one before, but no layer as much as lambda_0 costs."""
    gates = LayerGates(CASES["t5-relu"].model(), keep_layers=keep_layers, strength=1.0)
    worth = torch.tensor([0.02, 0.04, 0.06, 0.08, 0.1])
    set_(gates, torch.full((5,), 0.9))
    for _ in range(600):
        (gradient,) = torch.autograd.grad(gates.penalty() - (worth * gates.z).sum(), gates.z)
        set_(gates, gates.z - 0.02 * gradient)
        gates.project_()
        assert 0 <= float(gates.z.detach().min()) <= float(gates.z.detach().max()) <= 1
    assert gates.left == ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"][-keep_layers:]
    without = LayerGates(CASES["t5-relu"].model(), keep_layers=keep_layers, strength=1.0, regularisation="R2")
    set_(without, torch.full((5,), 0.9))
    for _ in range(600):
        (gradient,) = torch.autograd.grad(without.penalty() - (worth * without.z).sum(), without.z)
        set_(without, without.z - 0.02 * gradient)
        without.project_()
    assert without.left == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", ["block", "branch"])
@every_case
def test_open_gates_change_nothing_bit_for_bit(case: Case, unit: Any, dtype: str) -> None:
    model = case.model(DTYPES[dtype])
    before = case.logits(model)
    with LayerGates(model, keep_layers=1, unit=unit):
        assert torch.equal(case.logits(model), before)


@pytest.mark.parametrize("unit", ["block", "branch"])
@every_case
def test_gates_and_their_gradient_are_the_naive_ones(case: Case, unit: Any) -> None:
    model = case.model(torch.float64)
    batch = case.batches(model)[0]
    with LayerGates(model, keep_layers=1, unit=unit) as gates:
        assert gates.z.dtype == torch.float64
        set_(gates, torch.linspace(0.3, 1, len(gates.names)))
        value = case.task.target(model, batch, "log_probability").sum()
        (gradient,) = torch.autograd.grad(value, gates.z)
    leaves = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in gates.values.items()}
    with by_hand(case, model, leaves):
        naive = case.task.target(model, batch, "log_probability").sum()
    assert float(value.detach()) == pytest.approx(float(naive.detach()), rel=1e-12)
    expected = torch.stack(torch.autograd.grad(naive, list(leaves.values())))
    # Gemma's norms compute in float32, whatever the model's dtype.
    assert relative(gradient, expected) < (1e-5 if case.name == "gemma3" else 1e-9)


@pytest.mark.parametrize("unit", ["block", "branch"])
@every_case
def test_export_computes_what_the_gated_model_computes(case: Case, unit: Any) -> None:
    model = case.model(torch.float64)
    with LayerGates(model, keep_layers=1, unit=unit, drop=0.5) as gates:
        set_(gates, [0.0, 0.4, 1.0, 0.7, 0.6, 0.9, 0.0, 1.0, 0.8, 0.5, 0.2, 0.3][: len(gates.names)])
        gated = case.logits(model)
        exported = gates.export()
        assert torch.equal(case.logits(model), gated)
    assert relative(case.logits(exported), gated) < (1e-6 if case.name == "gemma3" else 1e-12)
    assert not [module for module in exported.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert len(layers(exported, unit)) == len(gates.left) < len(gates.names)
    assert torch.equal(case.logits(gates.export()), case.logits(exported))


def test_export_of_open_gates_is_the_model_itself() -> None:
    case = CASES["bert-token"]
    model = case.model()
    with LayerGates(model, keep_layers=2, frozen=True) as gates:
        exported = gates.export()
        assert all(parameter.requires_grad for parameter in exported.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(case.logits(exported), case.logits(model))


@pytest.mark.parametrize("frozen", [False, True])
@every_case
def test_nothing_is_left_behind(case: Case, frozen: bool) -> None:
    model = lived_in(case)

    def call() -> None:
        with LayerGates(model, keep_layers=1, unit="branch", drop=0.5, frozen=frozen) as gates:
            set_(gates, torch.full((len(gates.names),), 0.5))
            gates.train()
            case.logits(model)
            gates.export()

    assert_undisturbed(model, call)


@every_case
def test_nothing_is_left_behind_after_an_exception(case: Case) -> None:
    model = lived_in(case)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
    last.register_forward_hook(lambda *_: 1 / 0)

    def call() -> None:
        with LayerGates(model, keep_layers=1, frozen=True) as gates:
            gates.train()
            case.logits(model)

    def failing() -> None:
        with pytest.raises(ZeroDivisionError):
            call()

    assert_undisturbed(model, failing)


def test_detached_gates_let_everything_through() -> None:
    case = CASES["llama"]
    model = case.model()
    before = case.logits(model)
    gates = LayerGates(model, keep_layers=1)
    set_(gates, [0.0, 0.5])
    assert not torch.equal(case.logits(model), before)
    gates.detach()
    assert not gates.attached
    assert torch.equal(case.logits(model), before)
    assert gates.values == {"decoder.0": 0.0, "decoder.1": 0.5}


def test_layer_drop_drops_whole_blocks_in_training_alone() -> None:
    case = CASES["llama"]
    model = case.model(torch.float64)
    for module in model.modules():
        module.attention_dropout = 0.0  # type: ignore[assignment]
    batch = case.batches(model, 1000)[0]
    logits_of: dict[tuple[str, ...], Tensor] = {}
    for dropped in ((), ("decoder.0",), ("decoder.1",), ("decoder.0", "decoder.1")):
        with torch.inference_mode(), by_hand(case, model, dict.fromkeys(dropped, 0.0)):
            logits_of[dropped] = case.task.logits(model, batch)
    counts = dict.fromkeys(logits_of, 0)
    with LayerGates(model, keep_layers=1, unit="branch", drop=0.3) as gates, torch.inference_mode():
        assert all(torch.equal(case.task.logits(model, batch), logits_of[()]) for _ in range(5))
        gates.train()
        for _ in range(800):
            logits = case.task.logits(model, batch)
            (matching,) = [dropped for dropped, expected in logits_of.items() if torch.allclose(expected, logits)]
            counts[matching] += 1
    shares: dict[tuple[str, ...], float] = {
        (): 0.49,
        ("decoder.0",): 0.21,
        ("decoder.1",): 0.21,
        ("decoder.0", "decoder.1"): 0.09,
    }
    for matching, share in shares.items():
        assert abs(counts[matching] / 800 - share) < 0.06, counts


@every_case
def test_task_features_have_the_tasks_own_loss(case: Case) -> None:
    """The model's mean loss over the labelled pieces is the task's summed log-probability."""
    model = case.model(torch.float64)
    with LayerGates(model, keep_layers=1) as gates, torch.no_grad():
        items, collate = task_features(case.task, gates, case.examples)
        loss = float(gates(**collate(items)).loss)
        batch = case.task.collate(items, torch.device("cpu"))
        total = float(case.task.target(model, batch, "log_probability").sum())
    assert loss == pytest.approx(-total / int((batch.labels != -100).sum()), rel=1e-6)


def test_the_loss_has_the_regulariser_in_training_alone() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with LayerGates(model, keep_layers=1, strength=0.5, regularisation="R2") as gates, torch.no_grad():
        items, collate = task_features(case.task, gates, case.examples)
        set_(gates, [0.5, 1.0])
        task_loss = float(gates(**collate(items)).loss)
        gates.train()
        assert float(gates(**collate(items)).loss) == pytest.approx(task_loss + 0.5 * 1.75)
        gates.at_step_(0, 100)
        assert float(gates(**collate(items)).loss) == pytest.approx(task_loss)
        for step, active in ((0, 0), (24, 0), (25, 0.5), (99, 0.5)):
            gates.at_step_(step, 100)
            assert gates.active == active


def test_the_gates_go_by_plain_descent_and_the_weights_by_adamw() -> None:
    z, weight, bias = (nn.Parameter(torch.tensor(v)) for v in ([0.5, 0.5], [[1.0, 2.0]], [3.0]))
    groups = [
        {"params": [z], "lr": 0.1, "name": "gates", "weight_decay": 0.0},
        {"params": [weight], "lr": 0.01, "name": "weights", "weight_decay": 0.5},
        {"params": [bias], "lr": 0.01, "name": "weights", "weight_decay": 0.0},
    ]
    plain = [nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())]
    ours = GatedAdamW(groups)
    theirs = torch.optim.AdamW(
        [{"params": plain[:1], "weight_decay": 0.5}, {"params": plain[1:], "weight_decay": 0.0}], lr=0.01
    )
    for _ in range(3):
        ours.zero_grad()
        (z @ torch.tensor([1.0, -2.0]) + weight.square().sum() + bias.sum()).backward()  # type: ignore[no-untyped-call]
        theirs.zero_grad()
        (plain[0].square().sum() + plain[1].sum()).backward()  # type: ignore[no-untyped-call]
        ours.step()
        theirs.step()
    assert z.tolist() == pytest.approx([0.2, 1.1])
    assert torch.equal(weight, plain[0])
    assert torch.equal(bias, plain[1])


def arguments(folder: Path, steps: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, report_to="none", use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=5, **{"save_strategy": "no", **options},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["t5-relu", "bert-token", "bert-sequence", "llama"])
def test_training_selects_layers_of_a_frozen_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    steps: list[tuple[int, int]] = []
    gates = LayerGates(model, keep_layers=2, unit="branch", strength=3.0, frozen=True)
    with gates:
        features, collate = task_features(case.task, gates, case.examples)
        log = train(
            gates, features, arguments(tmp_path, 24, lr_scheduler_type="constant"), collate=collate,
            learning_rates={"gates": 0.05}, progress=lambda done, total: steps.append((done, total)),
        )  # fmt: skip
        exported = gates.export()
        gates.eval()
        gated = case.logits(model)
    # The task's gradient may open gates again for a step, but there are never fewer than wanted.
    assert 2 <= len(gates.left) < len(gates.names)
    assert all(0 <= value <= 1 for value in gates.values.values())
    assert relative(case.logits(exported), gated) < 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert capsys.readouterr().out == ""
    assert steps == [(done, 24) for done in range(25)]
    rows = [row for row in log if "loss" in row]
    assert rows[0]["layers_left"] == len(gates.names)
    assert {f"z/{branch}" for branch in branch_names(case, model)} <= set(rows[0])


class _Interrupted:
    """A progress callback that ends the run at its fifth step."""

    def __call__(self, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    case = CASES["t5-relu"]
    results = []
    for folder, stops in (("whole", [8]), ("broken", [4, 8])):
        for stop in stops:
            with LayerGates(case.model(), keep_layers=3, strength=0.5, drop=0.2, warmup=0.5) as gates:
                features, collate = task_features(case.task, gates, case.examples)
                options = arguments(tmp_path / folder, 8, save_strategy="steps", save_steps=4, lr_scheduler_type="constant")
                # The run is interrupted in the step after the checkpoint.
                stopping = _Interrupted() if stop == 4 else None
                with pytest.raises(KeyboardInterrupt) if stopping else nullcontext():
                    train(
                        gates, features, options, collate=collate, learning_rates={"gates": 0.1}, resume=True, progress=stopping
                    )
        results.append((gates.z.detach().clone(), {n: p.detach().clone() for n, p in gates.model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())
    assert not torch.equal(results[0][0], torch.ones(5))


def test_a_finished_run_that_goes_on_trains_no_further_step(tmp_path: Path) -> None:
    """The last step ends no epoch, so that the Trainer alone would train another one."""
    case = CASES["t5-relu"]
    results, steps, epochs = [], [], 0.0
    for _ in range(2):
        with LayerGates(case.model(), keep_layers=3, strength=0.5, drop=0.2, warmup=0.5) as gates:
            features, collate = task_features(case.task, gates, case.examples)
            options = arguments(tmp_path, 7, save_strategy="steps", save_steps=7, lr_scheduler_type="constant")
            log = train(
                gates, features, options, collate=collate, learning_rates={"gates": 0.1}, resume=True,
                progress=lambda done, total: steps.append(done),
            )  # fmt: skip
            results.append((gates.z.detach().clone(), {n: p.detach().clone() for n, p in gates.model.named_parameters()}))
            epochs = max(row["epoch"] for row in log)
    assert epochs % 1 != 0
    assert steps == [*range(8), 7]  # The second run begins at the end.
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_layers": 0}, "keep_layers: expected a number from 1 to the model's 5, got 0"),
        ({"keep_layers": 6}, "keep_layers: expected a number from 1 to the model's 5, got 6"),
        ({"keep_layers": 2.0}, "keep_layers: expected a number from 1 to the model's 5, got 2.0"),
        ({"keep_layers": 1, "unit": "head"}, "unit: expected 'block' or 'branch', got 'head'"),
        ({"keep_layers": 1, "regularisation": "L0"}, "regularisation: expected one of R1, R2, R3, got 'L0'"),
        ({"keep_layers": 1, "strength": -1.0}, "strength: expected a number of at least 0, got -1.0"),
        ({"keep_layers": 1, "warmup": 1.0}, r"warmup: expected a share in \[0, 1\), got 1.0"),
        ({"keep_layers": 1, "drop": float("nan")}, r"drop: expected a share in \[0, 1\), got nan"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = CASES["t5-relu"].model()
    with pytest.raises(secateur.InputError, match=message):
        LayerGates(model, **options)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_bad_training(tmp_path: Path) -> None:
    case = CASES["bert-sequence"]
    gates = LayerGates(case.model(), keep_layers=1)
    features, collate = task_features(case.task, gates, case.examples)
    for options, rates, message in (
        ({"steps": -1}, {}, "max_steps: expected at least 1, got -1"),
        ({"steps": 1, "optim": "adafactor"}, {}, "optim: expected adamw_torch or adamw_torch_fused"),
        ({"steps": 1}, {"z": 1.0}, "learning_rates: expected some of gates, weights, got z"),
    ):
        with pytest.raises(secateur.InputError, match=message):
            train(gates, features, arguments(tmp_path, **options), collate=collate, learning_rates=rates)
    gates.detach()
    with pytest.raises(secateur.InputError, match="gates: expected gates on their model, got detached ones"):
        train(gates, features, arguments(tmp_path, 1), collate=collate)


def test_a_model_whose_layers_are_gone_has_no_gates() -> None:
    case = CASES["bert-sequence"]
    with LayerGates(case.model(), keep_layers=1) as gates:
        set_(gates, [0.0, 1.0])
        once = gates.export()
        set_(gates, [0.0, 0.0])
        nothing = gates.export()
    with LayerGates(once, keep_layers=1) as again:
        assert again.names == ["encoder.1"]
    with pytest.raises(secateur.InputError, match="keep_layers: expected a number from 1 to the model's 1, got 2"):
        LayerGates(once, keep_layers=2)
    with pytest.raises(secateur.InputError, match="model: expected one with layers left to delete"):
        LayerGates(nothing, keep_layers=1)


def test_the_smallest_gates_close_until_the_wanted_number_is_open() -> None:
    gates = LayerGates(CASES["t5-relu"].model(), keep_layers=2)
    set_(gates, [0.5, 0.0, 1.0, 0.2, 0.2])
    assert gates.close_smallest_() == ["decoder.0", "decoder.1"]
    assert gates.z.tolist() == [0.5, 0, 1, 0, 0]
    assert gates.close_smallest_() == []
    set_(gates, [0.5, 0.0, 0.0, 0.0, 0.0])  # Fewer gates are open than wanted. No gate opens.
    assert gates.close_smallest_() == []
    assert gates.left == ["encoder.0"]


def test_off_is_the_model_without_gates() -> None:
    case = CASES["bert-token"]
    model = case.model()
    dense = case.logits(model)
    with LayerGates(model, keep_layers=1, frozen=True) as gates:
        set_(gates, [0.5, 0.0])
        gated = case.logits(model)
        with gates.off():
            assert torch.equal(case.logits(model), dense)
            assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(case.logits(model), gated)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_verification_sees_a_gate_that_was_not_folded_in() -> None:
    case = CASES["bert-token"]
    model = case.model()
    with LayerGates(model, keep_layers=1) as gates:
        set_(gates, [0.5, 0.0])
        exported = gates.export()
    for scales, holds in (({"encoder.0": 0.5}, True), ({"encoder.0": 0.51}, False), ({}, False)):
        verification = verify_layers(model, exported, ["encoder.1"], case.task, case.batches(model), scales=scales)
        assert verification.holds is holds
