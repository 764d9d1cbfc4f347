"""Contract 3: the pruned model computes what the masked model computes, for every family, unit and dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import naive
import pytest
import torch
from cases import (
    ALL,
    CASES,
    CORE,
    DTYPES,
    GENERATING,
    UNITS,
    Case,
    emptied_plan,
    empty_plan,
    uneven_plan,
    uniform_plan,
    unit_argument,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur import Plan
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.branches import Attention, Branch
from secateur.model.discovery import branches_of, fingerprint
from secateur.model.linear_layers import weight_of
from secateur.pruning.masked import masked

PLANS = {"uniform": uniform_plan, "uneven": uneven_plan, "emptied": emptied_plan, "empty": empty_plan}
every_case = pytest.mark.parametrize("case", ALL, ids=str)
every_core = pytest.mark.parametrize("case", CORE, ids=str)
every_unit = pytest.mark.parametrize("unit", UNITS)
every_plan = pytest.mark.parametrize("kind", PLANS)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def masked_logits(case: Case, model: nn.Module, plan: Plan) -> Tensor:
    with masked(model, plan):
        return case.logits(model)


def gone(model: nn.Module, plan: Plan) -> set[Branch]:
    """The attentions of which nothing is left: with the last head, or V channel, the Q and K channels go too."""
    found = branches_of(model, plan.sites).items()
    return {b for site, b in found if isinstance(b, Attention) and site.unit != "qk_channel" and not len(plan[site.name])}


@contextmanager
def by_hand(case: Case, model: nn.Module, unit: str, plan: Plan) -> Iterator[None]:
    """The masked model from the naive gates: removed units at zero."""
    places = naive.gates(case, model, unit_argument(unit))
    values = {}
    for site in plan.sites:
        values[site.name] = torch.zeros(site.units)
        values[site.name][plan[site.name]] = 1
    with naive.gated(model, {name: places[name] for name in values}, values):
        yield


@every_plan
@every_unit
@every_case
def test_masked_is_gates_at_zero(case: Case, unit: str, kind: str) -> None:
    """The specification itself, against gates at hand-written paths."""
    model, plan = case.model(torch.float64), PLANS[kind](case, unit)
    with by_hand(case, model, unit, plan):
        expected = case.logits(model)
    assert relative(masked_logits(case, model, plan), expected) < 1e-10
    assert relative(case.logits(model), expected) > 1e-3


@every_plan
@every_unit
@every_case
def test_pruned_equals_masked_in_float64(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(torch.float64), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    expected, found = masked_logits(case, model, plan), case.logits(pruned)
    assert relative(found, expected) < 1e-10
    assert relative(found, case.logits(model)) > 1e-3
    assert next(pruned.parameters()).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@every_plan
@every_unit
@every_core
def test_verify_holds(case: Case, unit: str, kind: str, dtype: str) -> None:
    model, plan = case.model(DTYPES[dtype]), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    assert {p.dtype for p in pruned.parameters()} == {DTYPES[dtype]}
    result = secateur.verify(model, pruned, plan, case.task, case.batches(model))
    assert result.holds, str(result)
    assert result.dtype == dtype
    assert result.largest > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unit", ["head", "channel"])
@every_case
def test_verify_holds_whichever_sites_are_empty(case: Case, unit: str, dtype: str) -> None:
    model = case.model(DTYPES[dtype])
    for seed in (1, 4, 8):
        plan = emptied_plan(case, unit, seed)
        result = secateur.verify(model, secateur.prune(model, plan), plan, case.task, case.batches(model))
        assert result.holds, str(result)


@pytest.mark.parametrize("unit", ["head", "channel"])
@every_case
def test_verify_holds_where_a_single_site_is_empty(case: Case, unit: str) -> None:
    """All else is whole, so that what lies above must get all that it got."""
    model, whole = case.model(), uniform_plan(case, unit, keep=1.0)
    for name in whole:
        plan = replace(whole, kept={**whole.kept, name: whole[name][:0]})
        result = secateur.verify(model, secateur.prune(model, plan), plan, case.task, case.batches(model))
        assert result.holds, f"{name}: {result}"


@every_unit
@every_case
def test_of_empty_sites_no_product_is_left(case: Case, unit: str) -> None:
    """FLOPs are those of the layers beside the branches, such as the output head: no projection's, no attention's."""
    model = case.model()
    pruned = secateur.prune(model, empty_plan(case, unit))
    found: list[int] = []
    for module in pruned.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)):
            module.register_forward_hook(lambda m, _, output: found.append(2 * output.numel() * weight_of(m)[:1].numel()))
    (batch,) = synthetic_batches(model, [2], [6])
    flops = secateur.cost.flops(pruned, batch)
    assert flops == sum(found) > 0
    report = secateur.benchmark(model, pruned, [batch], pairs=3)
    assert report.timings[0].pruned_flops == flops < report.timings[0].dense_flops / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_core
def test_rounding_is_bounded_by_the_masked_models_own(case: Case, dtype: str) -> None:
    """What verify says, once more without it: error of the pruned model at most four times the masked model's own."""
    model, plan = case.model(DTYPES[dtype]), uneven_plan(case, "channel")
    exact = copy.deepcopy(model).double()
    with by_hand(case, exact, "channel", plan):
        expected = case.logits(exact)
    rounding = float((masked_logits(case, model, plan) - expected).abs().max())
    assert 0 < float((case.logits(secateur.prune(model, plan)) - expected).abs().max()) <= 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", ["head", "channel"])
@every_core
def test_verify_finds_a_wrong_model(case: Case, unit: str, dtype: str) -> None:
    model, plan, other = case.model(DTYPES[dtype]), uneven_plan(case, unit), uneven_plan(case, unit, seed=1)
    wrong = secateur.prune(model, other)
    assert not secateur.verify(model, wrong, plan, case.task, case.batches(model)).holds


def test_verify_finds_one_wrong_weight(t5_case: Case) -> None:
    model, plan = t5_case.model(), uneven_plan(t5_case, "head")
    pruned = secateur.prune(model, plan)
    with torch.no_grad():
        pruned.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight")[0, 0] += 0.01
    result = secateur.verify(model, pruned, plan, t5_case.task, t5_case.batches(model))
    assert not result.holds
    assert "DIFFERS" in str(result)


@every_plan
@every_unit
@every_case
def test_parameters_are_those_of_the_kept_units(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)

    def counted(m: nn.Module) -> int:
        # T5's position bias follows the heads, and may have to be there once a layer; no unit counts it.
        return sum(p.numel() for n, p in m.named_parameters() if "relative_attention_bias" not in n)

    empty, found = gone(model, plan), branches_of(model, plan.sites)
    removed = sum(s.parameters * (s.units - len(plan[s.name])) for s, branch in found.items() if branch not in empty)
    for branch in empty:
        weights = [p for path in branch.linears for p in model.get_submodule(path).parameters()]
        bias = getattr(model.get_submodule(branch.output), "bias", None)
        removed += sum(p.numel() for p in weights) - (0 if bias is None else len(bias))
    assert counted(model) - counted(pruned) == removed > 0


@every_plan
@every_unit
@every_case
def test_every_cut_layer_is_really_smaller(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    checked = 0
    for site, branch in branches_of(model, plan.sites).items():
        left = 0 if branch in gone(model, plan) else len(plan[site.name])
        for port in branch.cut_at(site.unit):
            dense, ours = (weight_of(m.get_submodule(port.path)).shape for m in (model, pruned))
            side = 0 if port.side == "output" else 1
            if port.map.size == dense[side]:  # What else such a layer makes may be another site's.
                assert ours[side] * site.units == dense[side] * left, port
            checked += ours[side] < dense[side]
            bias = pruned.get_submodule(port.path)._parameters.get("bias")
            assert bias is None or len(bias) == ours[0]
    assert checked > 0


@every_plan
@every_unit
@every_core
def test_attention_implementations_agree(case: Case, unit: str, kind: str) -> None:
    # Decoders' and ViT's eager attention is float32 whatever the model's dtype; decoders' is NaN for float64 at padding outside
    # the window.
    dtype, limit = (torch.float32, 1e-4) if (case.kind == "decoder" or case.name == "vit") else (torch.float64, 1e-10)
    model, plan, found = cast(Any, case.model(dtype)), PLANS[kind](case, unit), {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        pruned: Any = secateur.prune(model, plan)
        assert pruned.config._attn_implementation == implementation
        found[implementation] = case.logits(pruned)
        assert relative(found[implementation], masked_logits(case, model, plan)) < limit
    assert relative(found["eager"], found["sdpa"]) < limit


@every_unit
@every_case
def test_padding_does_not_change_the_pruned_model(case: Case, unit: str) -> None:
    """Each example alone, without padding and attention mask, against the padded batches."""
    plan = uneven_plan(case, unit)
    pruned = secateur.prune(case.model(torch.float64), plan)
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch in case.batches(pruned):
            logits = case.task.logits(pruned, batch)
            found.update({row: logits[i][batch.labels[i] != -100] for i, row in enumerate(batch.rows)})
        for row, example in enumerate(case.examples):
            assert relative(found[row], naive.alone(case, pruned, example)[0]) < 1e-6


def prompt(case: Case) -> dict[str, Tensor]:
    """Prompts for generation; decoders get them at one length, since padding would belong on their left."""
    if case.kind == "encoder-decoder":
        batch = case.batches(case.model(), 1000)[0]
        assert batch.inputs["attention_mask"].min() == 0
        return batch.inputs
    ids = torch.tensor([[2, 7, 9, 12, 5], [2, 11, 4, 8, 30], [2, 20, 20, 21, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@every_plan
@every_unit
@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_generation_with_and_without_cache(case: Case, unit: str, kind: str) -> None:
    model, plan = cast(Any, case.model(torch.float64)), PLANS[kind](case, unit)
    pruned: Any = secateur.prune(model, plan)
    options = {**prompt(case), "max_new_tokens": 6, "do_sample": False}
    with_cache = pruned.generate(**options, use_cache=True)
    assert torch.equal(with_cache, pruned.generate(**options, use_cache=False))
    with masked(model, plan):
        assert torch.equal(with_cache, model.generate(**options))


@every_plan
@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_a_text_continued_from_the_cache(case: Case, unit: str, kind: str) -> None:
    """Several tokens at once and no positions given: how long the text is already, the model knows from the cache alone."""
    pruned: Any = secateur.prune(case.model(torch.float64), PLANS[kind](case, unit))
    ids = torch.tensor([[2, 7, 9, 12, 5, 8], [2, 11, 4, 8, 30, 9]])
    name, given = ("decoder_input_ids", {"input_ids": ids}) if case.kind == "encoder-decoder" else ("input_ids", {})
    with torch.inference_mode():
        expected = pruned(**given, **{name: ids}).logits
        start = pruned(**given, **{name: ids[:, :4]}, use_cache=True)
        end = pruned(**given, **{name: ids[:, 4:]}, past_key_values=start.past_key_values)
    assert relative(torch.cat([start.logits, end.logits], 1), expected) < 1e-6  # Decoders' rotary positions are float32.


@every_plan
@every_unit
@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_beam_search_equals_the_masked_models(case: Case, unit: str, kind: str) -> None:
    model, plan = cast(Any, case.model(torch.float64)), PLANS[kind](case, unit)
    pruned: Any = secateur.prune(model, plan)
    options = {**prompt(case), "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with masked(model, plan):
        expected = model.generate(**options)
    assert torch.equal(pruned.generate(**options), expected)


@pytest.mark.parametrize("first", ["uniform", "uneven", "emptied"])
@pytest.mark.parametrize("second", ["attention", "ffn"])
@every_case
def test_a_pruned_model_can_be_pruned_again(case: Case, first: str, second: str) -> None:
    once = secateur.prune(case.model(torch.float64), PLANS[first](case, "head"))
    scores = secateur.attribute(once, case.task, case.examples, select=second)
    plan = secateur.plan(scores, keep=0.5)
    twice = secateur.prune(once, plan)
    assert relative(case.logits(twice), masked_logits(case, once, plan)) < 1e-10
    assert secateur.cost.parameters(twice) < secateur.cost.parameters(once)
    assert fingerprint(twice) != fingerprint(once)


@every_core
def test_ffn_of_a_model_with_cut_heads_then_heads_of_a_model_with_cut_ffn(case: Case) -> None:
    """Two plans one after the other come to the same as one."""
    model, plan = case.model(torch.float64), uneven_plan(case, "head")
    ffn = [site.name for site in plan.sites if site.kind == "ffn"]
    expected = case.logits(secateur.prune(model, plan))
    for order in (True, False):
        ours = model
        for with_ffn in (order, not order):
            names = [site.name for site in plan.sites if (site.name in ffn) == with_ffn]
            sites = tuple(site for site in secateur.sites(ours) if site.name in names)
            ours = secateur.prune(ours, Plan({name: plan[name] for name in names}, sites, fingerprint(ours)))
        assert relative(case.logits(ours), expected) < 1e-10


@pytest.mark.parametrize("again", ["head", "channel"])
@pytest.mark.parametrize("select", ["qk", "vo", "qk,vo"])
@every_core
def test_attention_that_has_lost_channels_is_refused_clearly(case: Case, select: str, again: Any) -> None:
    if select == "qk" and not case.qk_channels:
        pytest.skip("the family normalises its queries and keys: it has no such site")
    model = case.model()
    pruned = secateur.prune(
        model, secateur.plan(secateur.attribute(model, case.task, case.examples, unit="channel", select=select), keep=0.5)
    )

    def prune_again() -> None:
        scores = secateur.attribute(pruned, case.task, case.examples, unit=again, select="attention")
        secateur.prune(pruned, secateur.plan(scores, keep=0.5))

    with pytest.raises(secateur.InputError, match=r"^model: .* has lost attention channels already"):
        prune_again()


@every_unit
@every_core
def test_prune_leaves_the_dense_model_and_shares_no_memory(case: Case, unit: str) -> None:
    model, plan = cast(Any, case.model()), uneven_plan(case, unit)
    before, tensors = model.config.to_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    expected = case.logits(model)
    pruned: Any = secateur.prune(model, plan)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    pruned.config.num_labels = 99
    assert model.config.to_dict() == before
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
    assert torch.equal(case.logits(model), expected)


@every_plan
@every_unit
@every_core
def test_prune_in_place_is_prune(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    assert secateur.prune_(model, plan) is model
    assert torch.equal(case.logits(model), case.logits(pruned))
    ours, theirs = model.state_dict(), pruned.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_plan_that_names_a_site_of_another_model() -> None:
    """As one edited by hand may."""
    case = CASES["t5-gated"]
    plan = uniform_plan(case, "head")
    (first, *others) = plan.sites
    stranger = replace(first, name="encoder.99.ffn")
    kept = {stranger.name: plan[first.name], **{site.name: plan[site.name] for site in others}}
    with pytest.raises(
        secateur.InputError, match=r"^sites: expected sites of this model, such as 'encoder.0.*, got 'encoder.99.ffn'"
    ):
        secateur.prune(case.model(), Plan(kept, (stranger, *others), plan.fingerprint, plan.budget, plan.spread))


@every_core
def test_a_plan_that_keeps_everything_changes_nothing(case: Case) -> None:
    model = cast(Any, case.model())
    pruned: Any = secateur.prune(model, uniform_plan(case, "head", keep=1.0))
    assert torch.equal(case.logits(pruned), case.logits(model))
    assert pruned.config.to_dict() == model.config.to_dict()
    assert [p.shape for p in pruned.parameters()] == [p.shape for p in model.parameters()]


@every_plan
@every_unit
@pytest.mark.parametrize("case", [c for c in ALL if c.name in ("t5-relu", "gemma3")], ids=str)
def test_tied_embeddings_stay_tied(case: Case, unit: str, kind: str) -> None:
    model: Any = case.model()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for pruned in (secateur.prune(model, PLANS[kind](case, unit)), secateur.prune_(model, PLANS[kind](case, unit))):
        tied: Any = pruned
        assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
        if case.name == "t5-relu":
            assert tied.encoder.embed_tokens.weight is tied.decoder.embed_tokens.weight is tied.shared.weight


@every_plan
@every_unit
@every_core
def test_flags_and_modes_are_carried_over(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    # A linear layer does the same in either mode.
    acting = {name for name, m in model.named_modules() if not isinstance(m, (nn.Linear, Conv1D))}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules() if name in acting}
    pruned = secateur.prune(model, plan)
    ours = {name: p.requires_grad for name, p in pruned.named_parameters() if name in flags}
    assert ours == {name: flags[name] for name in ours}
    assert len(ours) == len(flags)
    assert {name: m.training for name, m in pruned.named_modules() if name in modes} == modes
    assert all(p.is_leaf and not p.is_meta and p.grad is None for p in pruned.parameters())


@every_plan
@every_unit
@every_core
def test_the_pruned_model_can_be_trained_and_copied(case: Case, unit: str, kind: str) -> None:
    pruned = secateur.prune(case.model(), PLANS[kind](case, unit))
    copied = copy.deepcopy(pruned)
    assert torch.equal(case.logits(copied), case.logits(pruned))
    value = case.task.target(pruned.train(), case.batches(pruned)[0], "log_probability").sum()
    value.backward()
    missing = [n for n, p in pruned.named_parameters() if p.grad is None and p.numel() and "lm_head" not in n]
    # A unit may be all that a site has left; but no rebuilt layer is cut off from the output.
    found = branches_of(case.model(), PLANS[kind](case, unit).sites)
    rebuilt = {port.path for site, branch in found.items() for port in branch.cut_at(site.unit)}
    assert not [name for name in missing if name.rpartition(".")[0] in rebuilt]


WIDTHS = {
    **{name: {"d_ff"} for name in ("t5", "mt5")},
    **{name: {"encoder_ffn_dim", "decoder_ffn_dim"} for name in ("bart", "marian")},
    "distilbert": {"hidden_dim"},
    "gpt2": {"n_inner"},
    "opt": {"ffn_dim"},
}


@every_case
def test_a_stock_shape_has_a_stock_config(case: Case) -> None:
    """A uniform FFN plan is what the architecture's config can say: the class built from it takes the weights."""
    model = cast(Any, case.model())
    scores = secateur.attribute(model, case.task, case.examples, select="ffn")
    pruned: Any = secateur.prune(model, secateur.plan(scores, keep=0.5))
    assert not hasattr(pruned.config, "secateur")
    # The stacks hold copies of the config, which have to say the same.
    configs = [vars(module.config) for module in pruned.modules() if hasattr(module, "config")]
    dense = vars(model.config)
    changed = {name for name, value in vars(pruned.config).items() if dense.get(name) != value and not name.startswith("_")}
    assert changed == WIDTHS.get(model.config.model_type, {"intermediate_size"})
    assert all(config[name] == vars(pruned.config)[name] for config in configs for name in changed)
    stock = type(model)(pruned.config)
    stock.load_state_dict(pruned.state_dict())
    assert torch.equal(case.logits(stock.eval()), case.logits(pruned))


@every_unit
@every_core
def test_an_uneven_shape_has_its_recipe_in_the_config(case: Case, unit: str) -> None:
    pruned: Any = secateur.prune(case.model(), uneven_plan(case, unit))
    assert set(pruned.config.secateur) == {"modules", "attributes", "own_position_bias", "no_attention"}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_group_goes_with_all_its_query_heads(name: str) -> None:
    case = CASES[name]
    model: Any = case.model()
    sites = tuple(secateur.sites(model, select="attention"))
    pruned: Any = secateur.prune(model, Plan({s.name: torch.tensor([2]) for s in sites}, sites, fingerprint(model)))
    for ours, dense in zip(pruned.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, dense.self_attn.q_proj.weight[24:])
        assert torch.equal(ours.self_attn.k_proj.weight, dense.self_attn.k_proj.weight[12:])
        assert torch.equal(ours.self_attn.o_proj.weight, dense.self_attn.o_proj.weight[:, 24:])
