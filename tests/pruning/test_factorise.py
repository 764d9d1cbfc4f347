"""factorise: the rank of the formula, the nearest matrix of that rank, and a model that runs, is saved and is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import ALL, CASES, DTYPES, Case
from torch import nn

import secateur
from secateur.model.linear_layers import shape_of, weight_of
from secateur.model.modeling import LowRankLinear
from secateur.pruning.factorise import factors


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the factorised layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.mark.parametrize("keep", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_rank_and_parameters_follow_the_formula(case: Case, keep: float) -> None:
    model = case.model()
    factorised = secateur.factorise(model, keep)
    layers = low_rank(factorised)
    # An attention has four projections (fused: two). A feed-forward branch has two (gated: three).
    gated = any(part in path for path in layers for part in ("gate_proj", "wi_0"))
    projections = 2 if any(part in path for path in layers for part in ("Wqkv", "c_attn")) else 4
    assert len(layers) == sum(2 + gated if site.kind == "ffn" else projections for site in secateur.sites(model))
    saved = 0
    for path, layer in layers.items():
        rows, columns = shape_of(model.get_submodule(path))
        rank = math.floor(rows * columns * keep / (rows + columns + 1))
        assert (layer.weight.shape, layer.basis.weight.shape) == ((rows, rank), (rank, columns))
        assert rank * (rows + columns + 1) <= keep * rows * columns
        saved += rows * columns - rank * (rows + columns)
    assert secateur.cost.parameters(factorised) == secateur.cost.parameters(model) - saved


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_give_the_nearest_matrix_of_their_rank(dtype: str) -> None:
    weight = torch.randn(23, 17).to(DTYPES[dtype])
    left, basis = factors(weight, 5)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    limit = 4 * torch.finfo(DTYPES[dtype]).eps * float(s[0])
    assert left.dtype == basis.dtype == weight.dtype
    assert float((left.double() @ basis.double() - (u[:, :5] * s[:5]) @ v[:5]).abs().max()) < max(limit, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(23, 17), (17, 23)])
def test_full_rank_reproduces_the_layer(shape: tuple[int, int], bias: bool) -> None:
    layer = nn.Linear(*shape, bias=bias)
    low_rank_layer = LowRankLinear(*shape, rank=17, bias=bias)
    left, basis = factors(layer.weight.detach(), 17)
    low_rank_layer.load_state_dict(
        {"linear.weight": left, "basis.weight": basis, **({"linear.bias": layer.bias} if bias else {})}
    )
    x = torch.randn(3, 5, shape[0])
    assert torch.allclose(low_rank_layer(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_factorised_model_equals_the_model_with_the_products_as_weights(case: Case, dtype: str) -> None:
    model = case.model(DTYPES[dtype])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factorised = secateur.factorise(model, 0.6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not low_rank(model)
    with torch.no_grad():
        for path, layer in low_rank(factorised).items():
            assert layer.weight.dtype == DTYPES[dtype]
            weight_of(model.get_submodule(path)).copy_(layer.weight.float() @ layer.basis.weight.float())
    logits = case.logits(model)
    assert float((case.logits(factorised) - logits).abs().max() / logits.abs().max()) < (1e-4 if dtype == "float32" else 0.1)
    assert secateur.evaluate(factorised, case.task, case.examples).examples == len(case.examples)


def test_only_the_selected_layers_are_factorised(t5_case: Case) -> None:
    model = t5_case.model()
    model.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").requires_grad_(False)
    factorised = secateur.factorise(model, 0.5, "encoder.ffn")
    assert {path.split(".layer.")[0] for path in low_rank(factorised)} == {f"encoder.block.{i}" for i in range(3)}
    assert all("DenseReluDense" in path for path in low_rank(factorised))
    flags = {name: parameter.requires_grad for name, parameter in factorised.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {
        "encoder.block.0.layer.1.DenseReluDense.wo.linear.weight",
        "encoder.block.0.layer.1.DenseReluDense.wo.basis.weight",
    }


@pytest.mark.parametrize("case", [CASES["t5-gated"], CASES["bert-sequence"], CASES["llama"]], ids=str)
def test_a_factorised_model_is_the_same_after_saving_and_loading(case: Case, tmp_path: Path) -> None:
    factorised = secateur.factorise(case.model(), 0.5)
    secateur.save(factorised, tmp_path / "out")
    loaded = secateur.load(tmp_path / "out")
    assert low_rank(loaded).keys() == low_rank(factorised).keys()
    assert torch.equal(case.logits(loaded.eval()), case.logits(factorised))


def test_a_pruned_model_can_be_factorised(t5_case: Case) -> None:
    model = t5_case.model()
    plan = secateur.plan(secateur.attribute(model, t5_case.task, t5_case.examples), keep=0.5)
    factorised = secateur.factorise(secateur.prune(model, plan), 0.5)
    assert torch.isfinite(t5_case.logits(factorised)).all()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, r"^keep: expected a number in \(0, 1\], got 0.0$"),
        (1.5, r"^keep: expected a number in \(0, 1\], got 1.5$"),
        (0.01, r"^keep: expected at least 0.0938, with which encoder.block.0.layer.0.SelfAttention.q keeps one .*, got 0.01$"),
    ],
)
def test_a_bad_share_is_refused(keep: float, message: str, t5_case: Case) -> None:
    with pytest.raises(secateur.InputError, match=message):
        secateur.factorise(t5_case.model(), keep)


def test_a_factorised_model_has_no_units(t5_case: Case) -> None:
    factorised = secateur.factorise(t5_case.model(), 0.5)
    for call in (lambda: secateur.sites(factorised), lambda: secateur.factorise(factorised, 0.5)):
        with pytest.raises(secateur.InputError, match=r"^model: encoder.block.0.layer.0.SelfAttention.q has been factorised"):
            call()
