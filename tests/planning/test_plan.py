"""Contract 2: a plan meets its budget exactly or says why it cannot. Files keep plans and scores unchanged."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CORE, Case, emptied_plan, empty_plan, random_scores, scores_of, uniform_plan
from safetensors.torch import save_file

import secateur
from secateur import Plan, Scores, Site


def one_site(values: list[float]) -> Scores:
    """Return scores of a single FFN."""
    site = Site("encoder.0.ffn", "ffn", "encoder", 0, "neuron", len(values), 1, 10.0, 20.0, 0.0, 0.0)
    units = {site.name: torch.tensor(values, dtype=torch.float64)}
    return Scores(units, (site,), (site,), "0" * 16, {}, 1, {"encoder": 3.0, "decoder": 3.0}, 100)


def share(scores: Scores, counts: Mapping[str, int], kind: str) -> float:
    """Return the share of the layers' cost that remains, from the cost formulas, unit by unit."""

    def unit_cost(site: Site) -> float:
        if kind == "params":
            return site.parameters
        own, source = scores.tokens[site.stack], scores.tokens["encoder"]
        pairs = own * (source if site.kind == "cross_attention" else own)
        return site.flops * own + site.source_flops * source + site.core_flops * pairs

    total = sum(unit_cost(site) * site.units for site in scores.all_sites)
    return (total - sum(unit_cost(site) * (site.units - counts[site.name]) for site in scores.sites)) / total


@pytest.mark.parametrize("keep", ["0.01", "0.07", "0.3", "0.5", "0.6", "0.9", "1"])
@pytest.mark.parametrize("units", [1, 2, 7, 37, 100, 1000])
def test_keep_counts_are_rounded_up(keep: str, units: int) -> None:
    scores = one_site([float(i) for i in range(units)])
    kept = secateur.plan(scores, keep=float(keep))["encoder.0.ffn"]
    count = math.ceil(Fraction(keep) * units)
    assert kept.tolist() == list(range(units - count, units))
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("case", CORE, ids=str)
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_a_plan_keeps_the_highest_scores_of_every_site(case: Case, unit: Any) -> None:
    scores = random_scores(case.name, unit)
    plan = secateur.plan(scores, keep=0.4)
    assert list(plan) == list(scores)
    for name, kept in plan.items():
        assert kept.tolist() == sorted(kept.tolist())
        removed = sorted(set(range(len(scores[name]))) - set(kept.tolist()))
        assert scores[name][kept].min() > scores[name][removed].max()


def test_ties_go_to_the_lower_index() -> None:
    scores = one_site([1, 3, 2, 2, 3, 2, 0, 2])
    assert secateur.plan(scores, keep=0.5)["encoder.0.ffn"].tolist() == [1, 2, 3, 4]
    equal_scores = one_site([0.0] * 100)
    assert secateur.plan(equal_scores, keep=0.3)["encoder.0.ffn"].tolist() == list(range(30))


def test_negative_scores_rank_lowest() -> None:
    assert secateur.plan(one_site([-1, -3, 0, -2]), keep=0.5)["encoder.0.ffn"].tolist() == [0, 2]


@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"flops": 0.5}, {"params": 0.5}], ids=["keep", "flops", "params"])
@pytest.mark.parametrize("per_head", [False, True])
def test_planning_does_not_change_the_scores(budget: dict[str, float], per_head: bool) -> None:
    scores = random_scores("t5-gated", "channel")
    before = {name: values.clone() for name, values in scores.items()}
    sites = scores.sites
    first = secateur.plan(scores, per_head=per_head, **budget)  # type: ignore[arg-type]
    for kept in first.values():
        kept.fill_(-1)  # Scores and plans share no memory.
    second = secateur.plan(scores, per_head=per_head, **budget)  # type: ignore[arg-type]
    assert all(torch.equal(scores[name], before[name]) for name in before)
    assert scores.sites == sites
    assert min(int(kept.min()) for kept in second.values()) >= 0


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("value", [0.4, 0.5, 0.777, 0.95, 1.0])
@pytest.mark.parametrize(
    ("unit", "per_head", "align"),
    [("head", False, 1), ("head", False, 8), ("channel", False, 1), ("channel", True, 1)],
    ids=["head", "head-align8", "channel", "channel-per-head"],
)
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama", "qwen3"])
def test_cost_budgets_are_met_and_no_further_step_fits(
    name: str, unit: Any, per_head: bool, align: int, value: float, kind: str
) -> None:
    scores = random_scores(name, unit)
    plan = secateur.plan(scores, per_head=per_head, align=align, **{kind: value})  # type: ignore[arg-type]
    counts = {site: len(kept) for site, kept in plan.items()}
    assert min(counts.values()) >= 1
    assert share(scores, counts, kind) <= value + 1e-12
    for site in scores.sites:
        step = align if site.unit == "neuron" else site.groups if per_head and "channel" in site.unit else 1
        more = counts | {site.name: min(site.units, counts[site.name] + step)}
        assert more == counts or share(scores, more, kind) > value, site.name
    for other in ("flops", "params"):
        assert plan.budget_json()["remaining"][other] == pytest.approx(share(scores, counts, other), rel=1e-12)
    assert plan.budget == secateur.Budget(kind, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["t5-gated", "llama", "bert-sequence"])
def test_a_params_budget_is_the_share_of_the_models_parameters(name: str) -> None:
    case, scores = CASES[name], random_scores(name)
    plan = secateur.plan(scores, params=0.6)
    dense = case.model()
    removed = secateur.cost.parameters(dense) - secateur.cost.parameters(secateur.prune(dense, plan))
    layers = sum(site.parameters * site.units for site in scores.all_sites)
    # T5's position bias has an entry per head, which no unit counts.
    assert 1 - removed / layers == pytest.approx(
        plan.budget_json()["remaining"]["params"], rel=0.02 if name == "t5-gated" else 1e-12
    )


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("select", [None, "ffn", "attention"])
def test_an_unreachable_budget_names_the_smallest_reachable_one(kind: str, select: str | None) -> None:
    scores = random_scores("t5-gated", select=select)
    smallest = share(scores, {site.name: 1 for site in scores.sites}, kind)
    with pytest.raises(secateur.InputError, match=rf"^{kind}: expected at least {smallest:.4f}, .* got 0.01$"):
        secateur.plan(scores, **{kind: 0.01})  # type: ignore[arg-type]
    reached = secateur.plan(scores, **{kind: smallest + 1e-9})  # type: ignore[arg-type]
    assert {len(kept) for kept in reached.values()} == {1}


@pytest.mark.parametrize("align", [1, 2, 4, 8, 16, 32, 64])
def test_align_rounds_ffn_widths_up_and_does_not_change_heads(align: int) -> None:
    scores = random_scores("t5-gated")
    plan = secateur.plan(scores, keep=0.3, align=align)
    for site in scores.sites:
        unaligned = math.ceil(0.3 * site.units)
        expected = min(site.units, math.ceil(unaligned / align) * align) if site.kind == "ffn" else unaligned
        assert len(plan[site.name]) == expected


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_per_head_keeps_the_best_channels_of_every_head(case: Case, keep: float) -> None:
    scores = random_scores(case.name, "channel")
    plan = secateur.plan(scores, keep=keep, per_head=True)
    for site in scores.sites:
        if site.kind == "ffn":
            assert torch.equal(plan[site.name], secateur.plan(scores, keep=keep)[site.name])
            continue
        width = site.units // site.groups
        expected: list[int] = []
        for head in range(site.groups):
            head_scores = scores[site.name][head * width : (head + 1) * width]
            best = head_scores.argsort(descending=True)[: math.ceil(Fraction(str(keep)) * width)]
            expected += sorted((best + head * width).tolist())
        assert plan[site.name].tolist() == expected


@pytest.mark.parametrize("align", [1, 2, 3, 7, 8, 9, 16, 64])
def test_channels_of_a_head_align_to_at_most_eight(align: int) -> None:
    site = Site("encoder.0.self_attention.vo", "self_attention", "encoder", 0, "vo_channel", 4 * 32, 4, 10.0, 20.0, 0.0, 0.0)
    values = torch.rand(site.units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = replace(one_site([0.0]), by_site={site.name: values}, sites=(site,), all_sites=(site,))
    step = min(align, 8)
    for keep, unaligned in ((0.6, 0.6 * 32), (0.3, 0.3 * 32)):
        kept = secateur.plan(scores, keep=keep, align=align, per_head=True)[site.name]
        expected = min(32, math.ceil(unaligned / step) * step)
        assert (kept // 32).bincount().tolist() == [expected] * 4
    kept = secateur.plan(scores, params=0.6, align=align, per_head=True)[site.name]
    assert (kept // 32).bincount().tolist() == [math.floor(0.6 * 32 / step) * step] * 4


def test_channels_of_heads_are_not_ranked_where_scores_are_of_whole_heads() -> None:
    with pytest.raises(
        secateur.InputError, match=r"^per_head: expected scores of the channels of heads .* got scores of other"
    ):
        secateur.plan(scores_of("t5-relu", "head"), keep=0.5, per_head=True)


@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_a_plan_is_unchanged_after_saving_and_loading(case: Case, unit: str, tmp_path: Path) -> None:
    plan = uniform_plan(case, unit)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert list(loaded) == list(plan)
    assert all(torch.equal(loaded[name], kept) and loaded[name].dtype == torch.int64 for name, kept in plan.items())
    assert (loaded.sites, loaded.fingerprint) == (plan.sites, plan.fingerprint)
    assert (loaded.budget, loaded.spread) == (plan.budget, plan.spread)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_scores_are_bit_identical_after_saving_and_loading(case: Case, per_example: bool, tmp_path: Path) -> None:
    scores = secateur.attribute(case.model(), case.task, case.examples, unit="channel", per_example=per_example)
    scores.save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert loaded.equal(scores)
    assert list(loaded) == list(scores)
    assert all(loaded[name].dtype == torch.float64 for name in scores)
    assert (loaded.per_example is not None) == per_example
    for name, rows in (scores.per_example or {}).items():
        assert loaded.per_example is not None
        assert torch.equal(loaded.per_example[name], rows)
    for field in ("sites", "all_sites", "fingerprint", "criterion", "examples", "tokens", "weights"):
        assert getattr(loaded, field) == getattr(scores, field), field
    again = secateur.plan(loaded, flops=0.6)
    assert all(torch.equal(again[name], kept) for name, kept in secateur.plan(scores, flops=0.6).items())


def test_saving_replaces_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("x" * 10_000_000)
    uniform_plan(CASES["llama"], "head").save(path)
    assert len(Plan.load(path)) == 4
    assert path.stat().st_size < 5000


def _edited(change: Any) -> str:
    """Return the text of a plan file, written by hand and then changed by `change`."""
    plan = uniform_plan(CASES["t5-gated"], "head")
    sites = []
    for site in plan.sites:
        bits = sum(1 << int(i) for i in plan[site.name])
        mask = base64.b64encode(bits.to_bytes(-(-site.units // 8), "little")).decode()
        sites.append({**site.to_json(), "kept": len(plan[site.name]), "mask": mask})
    about = {"format": "secateur-plan/1", "fingerprint": plan.fingerprint, "budget": plan.budget_json(), "sites": sites}
    change(about)
    return json.dumps(about)


def test_the_file_format_is_the_documented_one(tmp_path: Path) -> None:
    """A plan file written by hand is read: bit masks in base64, the lowest unit first."""
    (tmp_path / "plan.json").write_text(_edited(lambda about: None))
    expected = uniform_plan(CASES["t5-gated"], "head")
    assert all(torch.equal(kept, expected[name]) for name, kept in Plan.load(tmp_path / "plan.json").items())


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    """A file of version 0.1 says "stay" where files say "kept" now. The rest is the same."""
    plan = secateur.plan(scores_of("t5-gated"), flops=0.6, allocation="knapsack", floor=0.1, align=8)
    about = json.loads(plan.dumps())
    assert list(about["budget"]) == ["flops", "allocation", "floor", "gap", "align", "shape", "criterion", "remaining"]
    for entry in about["sites"]:
        entry["stay"] = entry.pop("kept")
    (tmp_path / "plan.json").write_text(json.dumps(about))
    assert Plan.load(tmp_path / "plan.json").dumps() == plan.dumps()


def test_a_plan_built_by_hand_has_no_budget(tmp_path: Path) -> None:
    plan = uniform_plan(CASES["llama"], "head")
    bare = Plan(plan.kept, plan.sites, plan.fingerprint)
    assert bare.budget_json() == {}
    bare.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded.budget, loaded.spread) == (None, None)


def _without(plan: Plan, *removed: str) -> Plan:
    """Return the plan without some blocks."""
    kept = {site.name: plan[site.name][:0] if site.block in removed else plan[site.name] for site in plan.sites}
    return replace(plan, kept=kept, removed_blocks=removed)


def test_removed_blocks_are_part_of_a_plan_and_of_its_file(tmp_path: Path) -> None:
    plan = uniform_plan(CASES["t5-gated"], "head")
    removed = _without(plan, "encoder.2", "decoder.0")
    removed.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == removed
    assert json.loads(removed.dumps())["removed_blocks"] == ["encoder.2", "decoder.0"]
    assert "removed blocks: encoder.2, decoder.0" in removed.summary().splitlines()
    assert repr(removed).endswith("; 2 blocks removed)")
    emptied = replace(removed, removed_blocks=())  # The same units, but the blocks stay.
    assert emptied != removed
    assert hash(emptied) != hash(removed)
    turned = replace(removed, removed_blocks=removed.removed_blocks[::-1])
    assert (turned, hash(turned)) == (removed, hash(removed))
    assert "removed" not in emptied.dumps()
    assert "removed" not in emptied.summary()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["encoder.0"], r"expected a tuple of names of blocks, got \['encoder.0'\]"),
        ((3,), r"expected a tuple of names of blocks, got \(3,\)"),
        (("encoder",), "expected some of encoder.0, encoder.1, encoder.2, decoder.0, decoder.1, got 'encoder'"),
        (("encoder.0", "encoder.0"), "expected each block once, got 'encoder.0' twice"),
        (("encoder.0",), "expected blocks whose sites keep no unit, got one with 2 heads at encoder.0.self_attention"),
    ],
)
def test_bad_removed_blocks_are_refused(removed: Any, message: str) -> None:
    plan = uniform_plan(CASES["t5-gated"], "head")
    with pytest.raises(secateur.InputError, match=f"^removed_blocks: {message}$"):
        replace(plan, removed_blocks=removed)


@pytest.mark.parametrize("make_plan", [emptied_plan, empty_plan])
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_a_plan_may_keep_no_unit_of_a_site(unit: str, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan(CASES["t5-gated"], unit)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.dumps() == plan.dumps()
    assert all(torch.equal(loaded[name], kept) and loaded[name].dtype == torch.int64 for name, kept in plan.items())
    assert not all(len(kept) for kept in loaded.values())


# Damaged plan files: the change to the file's content, and the error message.
PLAN_DAMAGE: dict[str, tuple[Any, str]] = {
    "another-format": (lambda about: about.update(format="secateur-plan/99"), "expected the format .*, got 'secateur-plan/99'"),
    "no-format": (lambda about: about.pop("format"), "is not a plan file .*'format'"),
    "no-sites": (lambda about: about.pop("sites"), "is not a plan file .*'sites'"),
    "no-fingerprint": (lambda about: about.pop("fingerprint"), "is not a plan file .*'fingerprint'"),
    "count-does-not-fit": (lambda about: about["sites"][1].update(kept=3), "is corrupted: .* says 3 units and marks 19"),
    "mask-not-base64": (lambda about: about["sites"][0].update(mask="?!"), "is not a plan file .*base64"),
    "mask-too-short": (lambda about: about["sites"][1].update(mask="AQ==", kept=1), "expected a mask of 37 units, got 1 bytes"),
    "mask-beyond-the-units": (
        lambda about: about["sites"][0].update(mask="EA==", kept=1),
        "expected a mask of 4 units, got 1 bytes whose last mark is 4",
    ),
    "mask-empty": (lambda about: about["sites"][0].update(mask="", kept=0), "expected a mask of 4 units, got 0 bytes"),
    "mask-a-number": (lambda about: about["sites"][0].update(mask=3), "is not a plan file .*int"),
    "mask-missing": (lambda about: about["sites"][0].pop("mask"), "is not a plan file .*'mask'"),
    "unknown-field": (lambda about: about["sites"][0].update(colour="red"), "is not a plan file .*'colour'"),
    "two-budgets": (lambda about: about["budget"].update(flops=0.5), "is not a plan file .*exactly one of"),
    "budget-out-of-range": (lambda about: about["budget"].update(keep=2.0), "is not a plan file .*keep: expected a number in"),
    "unknown-field-of-the-budget": (lambda about: about["budget"].update(colour="red"), "is not a plan file .*'colour'"),
    "count-under-both-names": (lambda about: about["sites"][0].update(stay=3), "is not a plan file .*'stay'"),
    "removed-block-unknown": (lambda about: about.update(removed_blocks=["encoder.9"]), "expected some of .*, got 'encoder.9'"),
    "removed-block-keeps-units": (
        lambda about: about.update(removed_blocks=["encoder.0"]),
        "removed_blocks: expected blocks whose sites keep no unit, got one with . heads at encoder.0.self_attention",
    ),
    "removed-blocks-no-list": (lambda about: about.update(removed_blocks=3), r"removed_blocks: expected list\[str\], got 3"),
    "site-not-an-object": (lambda about: about.update(sites=["encoder.0.ffn"]), "is not a plan file .*'str'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", PLAN_DAMAGE)
def test_a_damaged_plan_is_refused(damage: str, tmp_path: Path) -> None:
    change, reason = PLAN_DAMAGE[damage]
    path = tmp_path / "plan.json"
    path.write_text(_edited(change))
    with pytest.raises(secateur.InputError, match=f"^plan: .*{reason}"):
        Plan.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b"null", b"3", b'{"format"', b"\xff\xfe\x00", b"{}"],
    ids=["empty", "text", "list", "null", "number", "cut", "binary", "no-fields"],
)
def test_a_file_that_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(secateur.InputError, match=r"^plan: .*plan\.json.* is not a plan file"):
        Plan.load(tmp_path / "plan.json")


def _scores_about(tmp_path: Path) -> dict[str, Any]:
    """Return the description in a scores file."""
    from safetensors import safe_open

    scores_of("llama").save(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["secateur"])
    return about


# Damaged scores files: the change to the file's description, and the error message.
SCORES_DAMAGE: dict[str, tuple[Any, str]] = {
    "another-format": (
        lambda about: {**about, "format": "secateur-scores/99"}, "expected the format .*, got 'secateur-scores/99'"
    ),
    "no-sites": (lambda about: {k: v for k, v in about.items() if k != "sites"}, "'sites'"),
    "no-tokens": (lambda about: {k: v for k, v in about.items() if k != "tokens"}, "'tokens'"),
    "site-without-tensor": (
        lambda about: {**about, "sites": [{**about["sites"][0], "name": "encoder.9.ffn"}]}, "'encoder.9.ffn'"
    ),
    "unknown-field": (lambda about: {**about, "sites": [{**about["sites"][0], "colour": "red"}]}, "'colour'"),
    "another-count": (lambda about: {**about, "sites": [{**about["sites"][0], "units": 99}]}, r"expected float64 \[99\], got"),
    "not-an-object": (lambda about: [], "'list'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", SCORES_DAMAGE)
def test_damaged_scores_are_refused(damage: str, tmp_path: Path) -> None:
    change, reason = SCORES_DAMAGE[damage]
    about = change(_scores_about(tmp_path))
    path = tmp_path / "bad.safetensors"
    save_file({name: values.contiguous() for name, values in scores_of("llama").items()}, path, {"secateur": json.dumps(about)})
    with pytest.raises(secateur.InputError, match=f"^scores: .*{reason}"):
        Scores.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, -7])
def test_a_truncated_scores_file_is_refused(length: int, tmp_path: Path) -> None:
    scores_of("llama").save(tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(whole[:length])
    with pytest.raises(secateur.InputError, match=r"^scores: .* is not a scores file"):
        Scores.load(tmp_path / "s.safetensors")


def test_a_safetensors_file_without_scores_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(secateur.InputError, match=r"^scores: expected the format 'secateur-scores/1'"):
        Scores.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("other", ["t5-relu", "llama"])
@pytest.mark.parametrize("verb", ["prune", "prune_"])
def test_a_plan_of_another_model_is_refused(other: str, verb: str) -> None:
    model = CASES["t5-gated"].model()
    with pytest.raises(
        secateur.InputError, match=r"^plan: expected a plan of this model \(fingerprint \w+\), got one of another"
    ):
        getattr(secateur, verb)(model, uniform_plan(CASES[other], "head"))


def test_a_plan_fits_another_checkpoint_of_the_same_shape() -> None:
    """A plan fits checkpoints that differ only in their weights."""
    case = CASES["t5-gated"]
    pruned = secateur.prune(case.model(seed=1), uniform_plan(case, "head"))
    assert secateur.cost.parameters(pruned) < secateur.cost.parameters(case.model())


def test_the_summary_tells_the_budget_and_what_is_kept_and_saved() -> None:
    scores = one_site([float(i) for i in range(10)])
    plan = secateur.plan(scores, params=0.6, align=2)
    assert plan.summary().splitlines() == [
        "plan of 1 site",
        "budget: at most 60.0% of the layers' parameters",
        "allocation: uniform, floor 0, FFN widths in multiples of 2",
        "  encoder ffn  6 of 10 neurons (60%) in 1 site",
        "remaining: 60.0% of the layers' FLOPs, 60.0% of the layers' parameters",
        "saved: 40 of the 100 parameters of these sites",
    ]
    by_hand = Plan(plan.kept, plan.sites, plan.fingerprint)
    assert by_hand.summary().splitlines() == [
        "plan of 1 site",
        *plan.summary().splitlines()[3:4],
        plan.summary().splitlines()[5],
    ]
    assert repr(by_hand) == "Plan(encoder ffn: 6 of 10 neurons)"


def test_plans_and_scores_compare_by_value(tmp_path: Path) -> None:
    scores = random_scores("t5-gated", "channel")
    plan = secateur.plan(scores, keep=0.5)
    plan.save(tmp_path / "plan.json")
    scores.save(tmp_path / "scores.safetensors")
    loaded_plan, loaded_scores = Plan.load(tmp_path / "plan.json"), Scores.load(tmp_path / "scores.safetensors")
    assert (plan == loaded_plan, hash(plan) == hash(loaded_plan)) == (True, True)
    assert (scores == loaded_scores, hash(scores) == hash(loaded_scores)) == (True, True)
    assert len({plan, loaded_plan, secateur.plan(scores, keep=0.4)}) == 2
    site = plan.sites[0].name
    other_units = (torch.arange(plan.sites[0].units)[-len(plan[site]) :]).clone()
    assert plan != replace(plan, kept={**plan.kept, site: other_units})
    assert plan != replace(plan, budget=None)
    assert scores != replace(scores, by_site={**scores.by_site, site: scores[site] + 1})
    assert scores != replace(scores, per_example={name: torch.zeros(1, len(values)) for name, values in scores.items()})
    assert scores != replace(scores, examples=scores.examples + 1)
    assert (plan == 3, scores == plan, plan == scores) == (False, False, False)
