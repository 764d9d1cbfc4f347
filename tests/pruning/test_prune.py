"""Contract 3: the pruned model computes the same outputs as the masked model, for every family, unit and dtype."""

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
from comparing import relative
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur import Plan
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.branches import Attention, Branch
from secateur.model.discovery import branches_of, fingerprint
from secateur.model.linear_layers import flat_names, weight_of
from secateur.pruning.masked import masked

PLANS = {"uniform": uniform_plan, "uneven": uneven_plan, "emptied": emptied_plan, "empty": empty_plan}
every_case = pytest.mark.parametrize("case", ALL, ids=str)
every_core = pytest.mark.parametrize("case", CORE, ids=str)
every_unit = pytest.mark.parametrize("unit", UNITS)
every_plan = pytest.mark.parametrize("kind", PLANS)


def masked_logits(case: Case, model: nn.Module, plan: Plan) -> Tensor:
    """Return the logits of the model with the removed units at zero."""
    with masked(model, plan):
        return case.logits(model)


def empty_attentions(model: nn.Module, plan: Plan) -> set[Branch]:
    """Return the attentions that the plan empties: the last head or V channel takes the Q and K channels with it."""
    return {
        branch
        for site, branch in branches_of(model, plan.sites).items()
        if isinstance(branch, Attention) and site.unit != "qk_channel" and not len(plan[site.name])
    }


@contextmanager
def by_hand(case: Case, model: nn.Module, unit: str, plan: Plan) -> Iterator[None]:
    """Mask the model with the naive gates: 0 for removed units, 1 for kept ones."""
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
def test_the_masked_model_equals_one_with_gates_at_zero(case: Case, unit: str, kind: str) -> None:
    """`masked` is the specification of pruning. It is compared with gates at hand-written paths."""
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
    expected, actual = masked_logits(case, model, plan), case.logits(pruned)
    assert relative(actual, expected) < 1e-10
    assert relative(actual, case.logits(model)) > 1e-3
    assert next(pruned.parameters()).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@every_plan
@every_unit
@every_core
def test_verify_holds(case: Case, unit: str, kind: str, dtype: str) -> None:
    model, plan = case.model(DTYPES[dtype]), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    assert {parameter.dtype for parameter in pruned.parameters()} == {DTYPES[dtype]}
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
    """All other sites are whole, so the layers above the empty site must still get all their inputs."""
    model, whole = case.model(), uniform_plan(case, unit, keep=1.0)
    for name in whole:
        plan = replace(whole, kept={**whole.kept, name: whole[name][:0]})
        result = secateur.verify(model, secateur.prune(model, plan), plan, case.task, case.batches(model))
        assert result.holds, f"{name}: {result}"


@every_unit
@every_case
def test_empty_sites_cost_no_flops(case: Case, unit: str) -> None:
    """Only layers outside the branches, for example the output head, cost FLOPs. Projections and attention cost none."""
    model = case.model()
    pruned = secateur.prune(model, empty_plan(case, unit))
    products: list[int] = []
    for module in pruned.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)):
            module.register_forward_hook(
                lambda layer, _, output: products.append(2 * output.numel() * weight_of(layer)[:1].numel())
            )
    (batch,) = synthetic_batches(model, [2], [6])
    flops = secateur.cost.flops(pruned, batch)
    assert flops == sum(products) > 0
    report = secateur.benchmark(model, pruned, [batch], pairs=3)
    assert report.timings[0].pruned_flops == flops < report.timings[0].dense_flops / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_core
def test_the_pruned_models_rounding_is_bounded_by_the_masked_models(case: Case, dtype: str) -> None:
    """This repeats verify's check without verify: the pruned model's error is at most four times the masked model's."""
    model, plan = case.model(DTYPES[dtype]), uneven_plan(case, "channel")
    exact = copy.deepcopy(model).double()
    with by_hand(case, exact, "channel", plan):
        expected = case.logits(exact)
    rounding = float((masked_logits(case, model, plan) - expected).abs().max())
    assert 0 < float((case.logits(secateur.prune(model, plan)) - expected).abs().max()) <= 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", ["head", "channel"])
@every_core
def test_verify_refuses_a_model_pruned_by_another_plan(case: Case, unit: str, dtype: str) -> None:
    model, plan, other = case.model(DTYPES[dtype]), uneven_plan(case, unit), uneven_plan(case, unit, seed=1)
    wrong = secateur.prune(model, other)
    assert not secateur.verify(model, wrong, plan, case.task, case.batches(model)).holds


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_verify_holds_where_padding_is_beyond_a_sliding_window(name: str) -> None:
    """transformers' eager attention makes such padding, and then all tokens, NaN in the float64 copy that verify makes."""
    case = CASES[name]

    def windowed(dtype: torch.dtype) -> Any:
        model: Any = case.model(dtype)
        model.set_attn_implementation("eager")
        model.config.sliding_window = 3
        return model

    model, plan = windowed(torch.float32), uniform_plan(case, "head")
    pruned = secateur.prune(model, plan)
    result = secateur.verify(model, pruned, plan, case.task, case.batches(model))
    assert result.holds
    assert 0 < result.rounding < 1e-4
    with torch.no_grad():
        pruned.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] += 1e-2
    assert not secateur.verify(model, pruned, plan, case.task, case.batches(model)).holds
    wide = windowed(torch.float64)
    with pytest.raises(
        secateur.InputError, match=r"not finite \(NaN or inf\); transformers' eager attention gives NaN in float64 f"
    ):
        secateur.verify(wide, secateur.prune(wide, plan), plan, case.task, case.batches(wide))


def test_verify_refuses_a_model_with_one_wrong_weight(t5_case: Case) -> None:
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
def test_the_removed_parameters_are_those_of_the_removed_units(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)

    def counted(part: nn.Module) -> int:
        # T5's position bias is cut with the heads, and a pruned model may need one per layer. No unit counts it.
        return sum(p.numel() for name, p in part.named_parameters() if "relative_attention_bias" not in name)

    empty, by_site = empty_attentions(model, plan), branches_of(model, plan.sites)
    removed = sum(
        site.parameters * (site.units - len(plan[site.name])) for site, branch in by_site.items() if branch not in empty
    )
    for branch in empty:
        weights = [p for path in branch.linears for p in model.get_submodule(path).parameters()]
        bias = getattr(model.get_submodule(branch.output), "bias", None)
        removed += sum(p.numel() for p in weights) - (0 if bias is None else len(bias))
    assert counted(model) - counted(pruned) == removed > 0


@every_plan
@every_unit
@every_case
def test_every_cut_layer_has_smaller_weights(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    checked, exact = 0, 0
    for site, branch in branches_of(model, plan.sites).items():
        kept_units = 0 if branch in empty_attentions(model, plan) else len(plan[site.name])
        for port in branch.cut_at(site.unit):
            dense, ours = (weight_of(part.get_submodule(port.path)).shape for part in (model, pruned))
            side = 0 if port.side == "output" else 1
            if port.map.size == dense[side]:  # Otherwise the layer also belongs to another site.
                assert ours[side] * site.units == dense[side] * kept_units, port
                exact += 1
            checked += ours[side] < dense[side]
            bias = pruned.get_submodule(port.path)._parameters.get("bias")
            assert bias is None or len(bias) == ours[0]
    assert checked > 0
    assert exact > 0


@every_plan
@every_unit
@every_core
def test_eager_attention_and_sdpa_give_the_same_logits(case: Case, unit: str, kind: str) -> None:
    # Eager attention of decoders and ViT computes in float32, whatever the model's dtype. In float64, decoders' eager attention
    # gives NaN at padding outside the window.
    dtype, limit = (torch.float32, 1e-4) if (case.kind == "decoder" or case.name == "vit") else (torch.float64, 1e-10)
    model, plan, logits = cast(Any, case.model(dtype)), PLANS[kind](case, unit), {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        pruned: Any = secateur.prune(model, plan)
        assert pruned.config._attn_implementation == implementation
        logits[implementation] = case.logits(pruned)
        assert relative(logits[implementation], masked_logits(case, model, plan)) < limit
    assert relative(logits["eager"], logits["sdpa"]) < limit


@every_unit
@every_case
def test_padding_does_not_change_the_pruned_model(case: Case, unit: str) -> None:
    """Logits of padded batches equal those of every example alone, without padding and attention mask."""
    plan = uneven_plan(case, unit)
    pruned = secateur.prune(case.model(torch.float64), plan)
    by_row: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch in case.batches(pruned):
            logits = case.task.logits(pruned, batch)
            by_row.update({row: logits[i][batch.labels[i] != -100] for i, row in enumerate(batch.rows)})
        for row, example in enumerate(case.examples):
            assert relative(by_row[row], naive.alone(case, pruned, example)[0]) < 1e-6


def prompt(case: Case) -> dict[str, Tensor]:
    """Return prompts for generation. A decoder's prompts have equal lengths, because their padding would be on the left."""
    if case.kind == "encoder-decoder":
        batch = case.batches(case.model(), 1000)[0]
        assert batch.inputs["attention_mask"].min() == 0
        return batch.inputs
    ids = torch.tensor([[2, 7, 9, 12, 5], [2, 11, 4, 8, 30], [2, 20, 20, 21, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@every_plan
@every_unit
@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_generation_equals_the_masked_models_with_and_without_a_cache(case: Case, unit: str, kind: str) -> None:
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
def test_a_text_continued_from_the_cache_has_the_same_logits(case: Case, unit: str, kind: str) -> None:
    """Several tokens are given at once, without positions. Only the cache tells the model how long the text is already."""
    pruned: Any = secateur.prune(case.model(torch.float64), PLANS[kind](case, unit))
    ids = torch.tensor([[2, 7, 9, 12, 5, 8], [2, 11, 4, 8, 30, 9]])
    name, given = ("decoder_input_ids", {"input_ids": ids}) if case.kind == "encoder-decoder" else ("input_ids", {})
    with torch.inference_mode():
        expected = pruned(**given, **{name: ids}).logits
        start = pruned(**given, **{name: ids[:, :4]}, use_cache=True)
        end = pruned(**given, **{name: ids[:, 4:]}, past_key_values=start.past_key_values)
    assert relative(torch.cat([start.logits, end.logits], 1), expected) < 1e-6  # Decoders compute rotary positions in float32.


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
def test_pruning_heads_and_ffn_one_after_the_other_equals_pruning_both_at_once(case: Case) -> None:
    """Two plans, in either order, give the same model as one plan."""
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
def test_pruning_attention_that_has_lost_channels_is_refused(case: Case, select: str, again: Any) -> None:
    if select == "qk" and not case.qk_channels:
        pytest.skip("the family normalises its queries and keys: it has no Q/K sites")
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
def test_prune_does_not_change_the_dense_model_and_shares_no_memory(case: Case, unit: str) -> None:
    model, plan = cast(Any, case.model()), uneven_plan(case, unit)
    before, tensors = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = case.logits(model)
    pruned: Any = secateur.prune(model, plan)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    pruned.config.num_labels = 99
    assert model.config.to_dict() == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(case.logits(model), expected)


@every_plan
@every_unit
@every_core
def test_prune_in_place_gives_the_same_model_as_prune(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    pruned = secateur.prune(model, plan)
    assert secateur.prune_(model, plan) is model
    assert torch.equal(case.logits(model), case.logits(pruned))
    ours, theirs = model.state_dict(), pruned.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_plan_that_names_a_site_of_another_model_is_refused() -> None:
    """A plan edited by hand may have the model's fingerprint and a wrong site."""
    case = CASES["t5-gated"]
    plan = uniform_plan(case, "head")
    (first, *others) = plan.sites
    foreign = replace(first, name="encoder.99.ffn")
    kept = {foreign.name: plan[first.name], **{site.name: plan[site.name] for site in others}}
    with pytest.raises(
        secateur.InputError, match=r"^sites: expected sites of this model, such as 'encoder.0.*, got 'encoder.99.ffn'"
    ):
        secateur.prune(case.model(), Plan(kept, (foreign, *others), plan.fingerprint, plan.budget, plan.spread))


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
def test_the_pruned_model_has_the_requires_grad_flags_and_modes_of_the_dense_one(case: Case, unit: str, kind: str) -> None:
    model, plan = case.model(), PLANS[kind](case, unit)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    # Linear layers do not depend on the mode.
    mode_dependent = {name for name, m in model.named_modules() if not isinstance(m, (nn.Linear, Conv1D))}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules() if name in mode_dependent}
    pruned = secateur.prune(model, plan)
    flat = flat_names(pruned)
    ours = {flat.get(name, name): p.requires_grad for name, p in pruned.named_parameters() if flat.get(name, name) in flags}
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
    without = [n for n, p in pruned.named_parameters() if p.grad is None and p.numel() and "lm_head" not in n]
    missing = [flat_names(pruned).get(name, name) for name in without]
    # Layers may have no gradient at an empty site, but every rebuilt layer reaches the output.
    by_site = branches_of(case.model(), PLANS[kind](case, unit).sites)
    rebuilt = {port.path for site, branch in by_site.items() for port in branch.cut_at(site.unit)}
    assert not [name for name in missing if name.rpartition(".")[0] in rebuilt]


# The fields of a config that state an FFN's width, by model type. Other types have intermediate_size.
WIDTHS = {
    **{name: {"d_ff"} for name in ("t5", "mt5")},
    **{name: {"encoder_ffn_dim", "decoder_ffn_dim"} for name in ("bart", "marian")},
    "distilbert": {"hidden_dim"},
    "gpt2": {"n_inner"},
    "opt": {"ffn_dim"},
}


@every_case
def test_the_class_of_transformers_takes_a_uniformly_pruned_ffn(case: Case) -> None:
    """The architecture's config can state uniform FFN widths, so the class built from the config takes the weights."""
    model = cast(Any, case.model())
    scores = secateur.attribute(model, case.task, case.examples, select="ffn")
    pruned: Any = secateur.prune(model, secateur.plan(scores, keep=0.5))
    assert not hasattr(pruned.config, "secateur")
    # The stacks hold copies of the config. The copies must state the same widths.
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
def test_a_removed_group_takes_all_its_query_heads_with_it(name: str) -> None:
    case = CASES[name]
    model: Any = case.model()
    sites = tuple(secateur.sites(model, select="attention"))
    pruned: Any = secateur.prune(model, Plan({s.name: torch.tensor([2]) for s in sites}, sites, fingerprint(model)))
    for ours, dense in zip(pruned.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, dense.self_attn.q_proj.weight[24:])
        assert torch.equal(ours.self_attn.k_proj.weight, dense.self_attn.k_proj.weight[12:])
        assert torch.equal(ours.self_attn.o_proj.weight, dense.self_attn.o_proj.weight[:, 24:])
