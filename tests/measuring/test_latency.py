"""Latency tables: arithmetic, measurement with a simulated clock, the cache, and latency targets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CORE, Case, scores_of
from torch import nn

import secateur
from secateur import LatencyTable, Plan
from secateur.data import builtin
from secateur.flow import meet_latency as meeting
from secateur.measuring import latency, stopwatch
from secateur.measuring.benchmark import Report, Timing
from secateur.measuring.stopwatch import Times
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.branches import Attention
from secateur.model.discovery import fingerprint
from secateur.model.families import branches
from secateur.support.environment import environment

SMALL: dict[str, Any] = {"batch_size": 2, "length": 6, "target_length": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "latency"


def branch_ms(model: nn.Module) -> dict[str, float]:
    """The simulated milliseconds of each branch: a constant, and terms for its linear weights and its attention's width."""
    milliseconds = {}
    for name, branch in branches(model).items():
        weights = sum(model.get_submodule(path).get_parameter("weight").numel() for path in branch.linears)
        core = branch.heads * branch.head_dim if isinstance(branch, Attention) else 0
        milliseconds[name] = 1.0 + weights / 100 + core / 10
    return milliseconds


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Replaces the stopwatch by one that returns `branch_ms`, on a machine whose speed changes from pass to pass. The fixture's
    value is the list of the models of all passes."""
    passes: list[nn.Module] = []

    @contextmanager
    def watch(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Iterator[Callable[[], Times]]:
        def run() -> Times:
            # The two passes of a pair have the same speed. Four warm-up passes come first.
            speed = [1.0, 1.5, 0.7][len(passes) // 2 % 3]
            passes.append(model)
            times = {name: speed * value for name, value in branch_ms(model).items()}
            return Times(speed * 20 + sum(times.values()), times)

        yield run

    monkeypatch.setattr(latency, "stopwatch", watch)
    return passes


def table_of(
    rows: dict[str, dict[int, float]], both: dict[str, dict[int, float]] | None = None, rest: dict[float, float] | None = None
) -> LatencyTable:
    return LatencyTable({}, "0" * 16, "head", 1, 1, 1, 100.0, rows, both or {}, rest or {1.0: 20.0})


def counts_of(plan: Plan) -> dict[str, int]:
    return {site: len(kept) for site, kept in plan.items()}


def uniform(scores: secateur.Scores, table: LatencyTable) -> Callable[[float], Plan]:
    """Plans with the highest uniform rate whose predicted latency is at most the argument, found by bisection."""

    def make(milliseconds: float) -> Plan:
        low, high = 0, 256
        while low < high:
            middle = (low + high + 1) // 2
            fits = table.milliseconds(counts_of(secateur.plan(scores, keep=middle / 256))) <= milliseconds
            low, high = (middle, high) if fits else (low, middle - 1)
        if not low:
            raise secateur.InputError(f"latency: no plan of {milliseconds} ms")
        return secateur.plan(scores, keep=low / 256)

    return make


# Arithmetic


def test_linear_between_measured_widths() -> None:
    table = table_of({"encoder.0.ffn": {8: 3.0, 16: 4.0, 40: 10.0}})
    milliseconds = {count: table.of("encoder.0.ffn", count) for count in (0, 1, 8, 12, 16, 22, 40)}
    assert milliseconds == {0: 0.0, 1: 3.0, 8: 3.0, 12: 3.5, 16: 4.0, 22: 5.5, 40: 10.0}


def test_a_plans_milliseconds_are_the_total_less_what_its_sites_save() -> None:
    table = table_of({"encoder.0.ffn": {8: 3.0, 40: 10.0}, "encoder.0.self_attention": {1: 5.0, 4: 20.0}})
    assert table.milliseconds({}) == 100
    assert table.milliseconds({"encoder.0.ffn": 40, "encoder.0.self_attention": 4}) == 100
    assert table.milliseconds({"encoder.0.ffn": 8}) == 93
    assert table.milliseconds({"encoder.0.ffn": 8, "encoder.0.self_attention": 2}) == 83
    assert table.milliseconds({"encoder.0.ffn": 0, "encoder.0.self_attention": 0}) == 70


def test_the_time_between_branches_shrinks_with_them() -> None:
    rows = {"encoder.0.ffn": {8: 20.0, 40: 60.0}, "encoder.1.ffn": {8: 10.0, 40: 20.0}}
    table = table_of(rows, rest={0.25: 14.0, 0.5: 18.0, 1.0: 20.0})
    assert table.milliseconds({"encoder.0.ffn": 40}) == 100
    assert table.milliseconds({"encoder.0.ffn": 8}) == 60 - 2
    assert table.milliseconds({"encoder.0.ffn": 8, "encoder.1.ffn": 8}) == 50 - 4
    assert table.milliseconds({"encoder.0.ffn": 0, "encoder.1.ffn": 0}) == 20 - 6


def test_channels_of_both_kinds_save_the_time_measured_together() -> None:
    attention = "encoder.0.self_attention"
    rows = {f"{attention}.qk": {2: 19.0, 4: 20.0}, f"{attention}.vo": {4: 18.0, 8: 20.0}}
    table = table_of(rows, {attention: {4: 11.0, 8: 20.0}})

    def saved(qk: int, vo: int) -> float:
        return 100 - table.milliseconds({f"{attention}.qk": qk, f"{attention}.vo": vo})

    assert saved(4, 8) == 0
    assert saved(2, 8) == 1
    assert saved(4, 4) == 2
    assert saved(2, 4) == 9
    assert saved(2, 6) == 1 + 1 + (4.5 - 0.5 - 1)  # The attention's core is as wide as V's heads.
    assert saved(0, 8) == saved(0, 0) == saved(4, 0) == 20


def test_a_branch_saves_no_more_than_it_costs() -> None:
    """The channels of Q and K save 12 ms and those of V and O 11 ms, measured apart, of a branch of 20 ms."""
    attention = "encoder.0.self_attention"
    table = table_of({f"{attention}.qk": {1: 8.0, 4: 20.0}, f"{attention}.vo": {1: 9.0, 8: 20.0}})
    assert table.milliseconds({f"{attention}.qk": 1, f"{attention}.vo": 8}) == 100 - 12
    assert table.milliseconds({f"{attention}.qk": 4, f"{attention}.vo": 1}) == 100 - 11
    assert table.milliseconds({f"{attention}.qk": 1, f"{attention}.vo": 1}) == 100 - 20


@pytest.mark.parametrize(("site", "count"), [("encoder.1.ffn", 8), ("encoder.0.ffn", 41), ("encoder.0.ffn", -1)])
def test_unmeasured_sites_and_counts_are_refused(site: str, count: int) -> None:
    table = table_of({"encoder.0.ffn": {8: 3.0, 40: 10.0}})
    with pytest.raises(secateur.InputError, match="expected"):
        table.milliseconds({site: count})


# Measurement


@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_the_table_has_the_clocks_times(case: Case, unit: Any, counted: list[nn.Module]) -> None:
    """Each width has the milliseconds that the clock gives, whatever the machine's speed."""
    model = case.model()
    table = secateur.latency_table(model, unit=unit, widths=[0.75, 0.4], **SMALL)
    sites = secateur.sites(model, unit=unit)
    assert list(table.sites) == [site.name for site in sites]
    dense = branch_ms(model)
    scale = table.total / (20 + sum(dense.values()))
    for site in sites:
        row = table.sites[site.name]
        assert list(row) == sorted(row)
        assert max(row) == site.units
        branch = site.name.removesuffix(".qk").removesuffix(".vo")
        assert row[site.units] == pytest.approx(scale * dense[branch], rel=0.2)
        for count, value in row.items():
            pruned = secateur.prune(model, some_plan(model, [site], {site.name: count}))
            expected = branch_ms(pruned)[branch] / dense[branch]
            assert value == pytest.approx(row[site.units] * expected, rel=1e-9), (site.name, count)
    ffn_rows = {tuple(row.items()) for name, row in table.sites.items() if name.startswith("encoder") and name.endswith("ffn")}
    assert len(ffn_rows) == any(name.startswith("encoder") for name in table.sites)


@pytest.mark.parametrize("unit", ["head", "channel"])
def test_a_plan_cut_everywhere_is_predicted_as_measured(unit: Any, counted: list[nn.Module]) -> None:
    model = CASES["bert-sequence"].model()
    table = secateur.latency_table(model, unit=unit, widths=[0.5], **SMALL)
    sites = secateur.sites(model, unit=unit)
    counts = {site.name: 24 if site.unit == "neuron" else site.units // 2 for site in sites}
    dense, pruned = branch_ms(model), branch_ms(secateur.prune(model, some_plan(model, sites, counts)))
    whole = {name: next(r[max(r)] for site, r in table.sites.items() if site.startswith(name)) for name in dense}
    saved = sum(whole[name] * (1 - pruned[name] / dense[name]) for name in dense)
    assert table.milliseconds(counts) == pytest.approx(table.total - saved, rel=1e-9)
    assert table.milliseconds({site.name: site.units for site in sites}) == table.total
    gone = table.milliseconds({site.name: 0 for site in sites})
    assert gone == pytest.approx(table.total - sum(whole.values()))
    assert gone > 0


def some_plan(model: nn.Module, sites: Any, counts: Mapping[str, int]) -> Plan:
    kept = {}
    for site in sites:
        heads = site.groups if site.unit.endswith("channel") else 1
        first = torch.arange(counts[site.name] // heads)
        kept[site.name] = (first + torch.arange(heads).unsqueeze(1) * (site.units // heads)).flatten()
    return Plan(kept, tuple(sites), fingerprint(model))


def test_progress_gets_each_width(counted: list[nn.Module]) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"widths": [1, 0.5], "progress": lambda done, total: told.append((done, total))}
    secateur.latency_table(CASES["llama"].model(), **options, **SMALL)
    assert told == [(0, 2), (1, 2), (2, 2)]  # Half of the units, and the fewest that can stay.


@pytest.mark.parametrize("case", [CASES["t5-gated"], CASES["bert-token"], CASES["llama"]], ids=str)
def test_branches_times_lie_apart_within_the_pass(case: Case) -> None:
    """With the real clock, each branch has its own part of the pass, also in a model whose attention computes its own bias."""
    model = case.model()
    plan = secateur.Plan(
        {s.name: torch.arange(s.units)[s.layer % 2 :] for s in secateur.sites(model)},
        tuple(secateur.sites(model)), fingerprint(model),
    )  # fmt: skip
    (batch,) = synthetic_batches(model, [2], [6])
    for timed in (model, secateur.prune(model, plan)):
        with torch.inference_mode(), stopwatch.stopwatch(timed, batch) as run:
            times = [run() for _ in range(2)]
        for one_pass in times:
            assert list(one_pass.branches) == list(branches(model))
            assert min(one_pass.branches.values()) > 0
            assert sum(one_pass.branches.values()) < one_pass.total
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in timed.modules())


def test_the_clock_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of this clock takes a millisecond: two readings for each branch and two for the pass."""
    ticks = itertools.count()
    ticking = stopwatch.Clock(lambda: next(ticks), lambda start, end: float(end - start), lambda: None)
    monkeypatch.setattr(stopwatch, "clock", lambda device: ticking)
    model = CASES["llama"].model()
    table = secateur.latency_table(model, widths=[0.5], **SMALL)
    assert table.total == 2 * len(branches(model)) + 1
    assert {value for row in table.sites.values() for value in row.values()} == {1.0}
    assert table.environment == environment(model)


def test_the_built_in_model_is_measured() -> None:
    model, _ = builtin.load()
    table = secateur.latency_table(model, widths=[0.5], pairs=1, **SMALL)
    assert list(table.sites) == [site.name for site in secateur.sites(model)]
    assert all(value > 0 for row in table.sites.values() for value in row.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["t5-gated"].model().train()

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        secateur.latency_table(model, **SMALL)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Files


def test_a_table_survives_its_file(tmp_path: Path, counted: list[nn.Module]) -> None:
    table = secateur.latency_table(CASES["bert-sequence"].model(), unit="channel", **SMALL)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_a_cached_table_is_not_measured_again(cache: Path, counted: list[nn.Module]) -> None:
    first = secateur.latency_table(CASES["llama"].model(), **SMALL)
    passes = len(counted)
    assert passes > 0
    # A fine-tuned copy has the same shapes and other weights.
    assert secateur.latency_table(CASES["llama"].model(seed=1), **SMALL) == first
    assert len(counted) == passes
    assert len(list(cache.iterdir())) == 1
    secateur.latency_table(CASES["llama"].model(), cache=False, **SMALL)
    assert len(counted) == 2 * passes


def test_settings_that_change_time_have_their_own_cache_file(cache: Path, counted: list[nn.Module]) -> None:
    def measure(
        case: str = "bert-sequence", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any
    ) -> None:
        model = CASES[case].model(dtype)
        model.set_attn_implementation(attention)  # type: ignore[operator]
        secateur.latency_table(model, **{**SMALL, "widths": [0.5], **options})

    measure()
    changes: list[dict[str, Any]] = [
        {"case": "bert-token"}, {"dtype": torch.float64}, {"attention": "eager"}, {"batch_size": 3}, {"length": 5},
        {"unit": "channel"}, {"widths": [0.25]},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        measure(**change)
        assert len(list(cache.iterdir())) == number, change
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        measure()
    finally:
        torch.set_num_threads(threads)
    assert len(list(cache.iterdir())) == len(changes) + 2
    measure()
    assert len(list(cache.iterdir())) == len(changes) + 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": "secateur-latency/0"}', "cut", "no sites", "nan"],
    ids=["empty", "object", "list", "null", "binary", "other-format", "cut", "no-sites", "nan"],
)
def test_a_corrupted_cache_is_one_line(content: bytes | str, cache: Path, counted: list[nn.Module]) -> None:
    model = CASES["llama"].model()
    secateur.latency_table(model, **SMALL)
    (file,) = cache.iterdir()
    if isinstance(content, str):
        text = file.read_text()
        about = json.loads(text)
        about["sites"]["decoder.0.ffn"]["8"] = float("nan")
        changed = {"cut": text[: len(text) // 2], "no sites": text.replace('"sites"', '"site"'), "nan": json.dumps(about)}
        content = changed[content].encode()
    file.write_bytes(content)
    with pytest.raises(secateur.InputError) as caught:
        secateur.latency_table(model, **SMALL)
    message = str(caught.value)
    assert str(file) in message
    assert message.endswith("delete this file, and the table is measured again")
    assert "\n" not in message
    file.unlink()
    secateur.latency_table(model, **SMALL)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"widths": [0.5, 1.5]}, "widths: expected shares in (0, 1], got 1.5"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"length": 41}, "length: expected at most the model's 40 positions, got 41"),
        ({"unit": "layer"}, "unit: expected 'head' or 'channel', got 'layer'"),
    ],
)
def test_unusable_arguments(options: dict[str, Any], expected: str, cache: Path) -> None:
    with pytest.raises(secateur.InputError) as caught:
        secateur.latency_table(CASES["bert-sequence"].model(), **{**SMALL, **options})
    assert str(caught.value) == expected
    assert not cache.exists()


# Targets


class Machine:
    """Replaces `benchmark` without a clock: `delivered` maps the speed-up that the model's units give to the one measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delivered: Callable[[float], float], scatter: float = 0.02) -> None:
        self.delivered, self.scatter, self.measured = delivered, scatter, 0
        monkeypatch.setattr(meeting, "benchmark", self.benchmark)

    def benchmark(self, dense: nn.Module, pruned: nn.Module, batches: Any, **options: Any) -> Report:
        self.measured += 1
        whole, rest = (20 + sum(branch_ms(model).values()) for model in (dense, pruned))
        speedup = self.delivered(whole / rest)
        low, high = (1 - self.scatter) * speedup, (1 + self.scatter) * speedup
        timing = Timing(2, 6, whole, whole / speedup, speedup, low, high, 2, 1, 20)
        return Report([timing], 2, 1, {}, [])


@pytest.fixture
def setting(counted: list[nn.Module]) -> tuple[nn.Module, LatencyTable, Callable[[float], Plan]]:
    model = CASES["bert-sequence"].model()
    table = secateur.latency_table(model, **SMALL)
    # Only neurons are cut: there are enough of them for fine steps.
    return model, table, uniform(scores_of("bert-sequence").of("ffn"), table)


@pytest.mark.parametrize("requested", [1.05, 1.15, 1.2])
@pytest.mark.parametrize(
    "delivered", [lambda x: x, lambda x: 1 + 0.7 * (x - 1), lambda x: x**1.3], ids=["as-predicted", "slower", "faster"]
)
def test_the_requested_speed_up_is_delivered(
    requested: float, delivered: Callable[[float], float], setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, table, make = setting
    machine = Machine(monkeypatch, delivered)
    met = secateur.meet_latency(model, make, table, speedup=requested, tolerance=0.04, rounds=5)
    assert requested / 1.04 <= met.timing.speedup <= requested * 1.04
    assert met.history[-1].timing == met.timing
    assert met.history[-1].predicted == table.milliseconds(counts_of(met.plan))
    assert machine.measured == len(met.history) <= 5
    json.dumps(met.to_json())


def test_milliseconds_are_met(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, table, make = setting
    Machine(monkeypatch, lambda x: x)
    dense = 20 + sum(branch_ms(model).values())
    met = secateur.meet_latency(model, make, table, latency=dense / 1.15, tolerance=0.04, rounds=5)
    assert dense / 1.15 / 1.04 <= met.timing.pruned_ms <= dense / 1.15 * 1.04


def test_an_unreachable_target_says_what_is_reachable(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, table, make = setting
    Machine(monkeypatch, lambda x: x)
    smallest = secateur.prune(model, secateur.plan(scores_of("bert-sequence").of("ffn"), keep=8 / 37))
    best = (20 + sum(branch_ms(model).values())) / (20 + sum(branch_ms(smallest).values()))
    with pytest.raises(secateur.InputError) as caught:
        secateur.meet_latency(model, make, table, speedup=50)
    assert str(caught.value) == f"speedup: expected at most {best:.2f}, the highest that was measured, got 50"
    with pytest.raises(secateur.InputError, match=r"latency: expected at least \d+\.\d\d, the lowest that was measured, got 1"):
        secateur.meet_latency(model, make, table, latency=1)


def test_a_target_between_two_plans_names_them(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where units are coarse, no plan may be close enough to the target."""
    model, table, make = setting
    Machine(monkeypatch, lambda x: 1.0 if x < 1.15 else 2.0)
    with pytest.raises(secateur.InputError, match=r"to within 3%, got 1.5; measured were 1.00, 2.00$"):
        secateur.meet_latency(model, make, table, speedup=1.5)


@pytest.mark.parametrize("speedup", [1.5, 50])
def test_a_refusal_on_a_busy_machine_says_that_the_runs_scatter(
    speedup: float, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, table, make = setting
    Machine(monkeypatch, lambda x: 1.0 if x < 1.15 else 2.0, scatter=0.5)
    with pytest.raises(secateur.InputError) as caught:
        secateur.meet_latency(model, make, table, speedup=speedup)
    assert str(caught.value).endswith("; the runs scatter (quartiles 1.00 to 3.00): was the machine busy?")


def test_the_real_clock_ends_in_a_plan() -> None:
    model = CASES["llama"].model()
    table = secateur.latency_table(model, widths=[0.5], pairs=1, **SMALL)
    half = secateur.plan(scores_of("llama"), keep=0.5)  # The plan ignores the table, whose real times scatter.
    met = secateur.meet_latency(model, lambda milliseconds: half, table, speedup=1.0, tolerance=100.0, pairs=3)
    assert len(met.history) == 1
    assert met.timing.pairs == 3


def test_targets_are_checked(setting: Any) -> None:
    model, table, make = setting
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "target: expected exactly one of speedup, latency, got none"),
        ({"speedup": 2, "latency": 3}, "got speedup, latency"),
        ({"speedup": 0.5}, "speedup: expected a number of at least 1, got 0.5"),
        ({"latency": -1}, "latency: expected a positive number of milliseconds, got -1"),
        ({"speedup": 2, "rounds": 0}, "rounds: expected positive"),
    ]
    for options, expected in refused:
        with pytest.raises(secateur.InputError, match=expected):
            secateur.meet_latency(model, make, table, **options)
    with pytest.raises(secateur.InputError, match="table: expected one of this model"):
        secateur.meet_latency(model, make, replace(table, fingerprint="0" * 16), speedup=2)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(50.0, 1.25)], 40.0),
        ([(50.0, 0.8)], 62.5),
        ([(50.0, 1.25), (40.0, 0.75)], 45.0),
        ([(50.0, 1.25), (40.0, 0.5), (45.0, 0.75)], 47.5),
        ([(50.0, 0.8), (40.0, 1.25)], 32.0),
    ],
    ids=["slow", "fast", "between", "between-the-nearest", "contradictory"],
)
def test_the_next_request(measured: list[tuple[float, float]], expected: float) -> None:
    assert meeting.corrected(measured) == pytest.approx(expected)
