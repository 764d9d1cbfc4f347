"""The rebuilt modules hold plain linear layers, so that adapters and quantisers find all of them and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, emptied_plan, uneven_plan
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.model import modeling
from secateur.model.linear_layers import shape_of, weight_of
from secateur.model.modeling import AroundLinear, EmptyLinear, GatherLinear, ScatterLinear

CUTS: dict[str, Callable[[Case, nn.Module], nn.Module]] = {
    "heads": lambda case, model: secateur.prune(model, uneven_plan(case, "head")),
    "channels": lambda case, model: secateur.prune(model, uneven_plan(case, "channel")),
    "channels-per-head": lambda case, model: secateur.prune(model, uneven_plan(case, "channel-per-head")),
    "emptied": lambda case, model: secateur.prune(model, emptied_plan(case, "head")),
    "emptied-channels": lambda case, model: secateur.prune(model, emptied_plan(case, "channel")),
    "low-rank": lambda case, model: secateur.factorise(model, 0.6),
}
FAMILIES = ("t5-gated", "bert-sequence", "llama", "gpt2")
every_cut = pytest.mark.parametrize("cut", CUTS)
every_family = pytest.mark.parametrize("name", FAMILIES)


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as LoRA makes it: layer(x) + x A^T B^T."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        outputs, inputs = shape_of(layer)
        self.a = nn.Parameter(torch.randn(2, inputs).to(layer.weight) / 5)
        self.b = nn.Parameter(layer.weight.new_zeros(outputs, 2))

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def bias(self) -> Any:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


def adapt_(model: nn.Module) -> dict[str, Adapted]:
    """Replace each linear layer of a model, but the output head, by an adapted one, as tools do, and return those by path."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    adapted = {path: Adapted(module) for path, module in linears.items() if path != "lm_head"}
    for path, module in adapted.items():
        model.set_submodule(path, module)
    return adapted


def own_products(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that own the matrix of a product."""
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            yield module


@every_cut
@every_family
def test_every_product_is_that_of_a_plain_layer(name: str, cut: str) -> None:
    model = CUTS[cut](CASES[name], CASES[name].model())
    kinds = {type(module) for module in own_products(model)}
    assert kinds <= {nn.Linear, Conv1D, EmptyLinear}
    for module in model.modules():
        if isinstance(module, EmptyLinear):
            assert not module.weight.numel()
        elif isinstance(module, nn.Linear):
            assert module.weight.numel()
        elif type(module).__module__ == modeling.__name__ and not list(module.children()):
            raise AssertionError(f"expected a plain layer inside {type(module).__name__}")


@every_cut
@every_family
def test_an_adapter_on_every_layer_changes_nothing_at_first_trains_and_merges(name: str, cut: str) -> None:
    case = CASES[name]
    model = CUTS[cut](case, case.model(torch.float64)).eval()
    expected = case.logits(model)
    adapted = adapt_(model.requires_grad_(False))
    assert torch.equal(case.logits(model), expected)
    batch = case.batches(model, 1000)[0]
    optimizer = torch.optim.Adam([layer.b for layer in adapted.values()], lr=1e-3)
    losses = []
    for _ in range(4):
        losses.append(case.task.logits(model, batch).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    # Behind an emptied branch nothing has a gradient.
    assert cut.startswith("emptied") or all(layer.b.any() for layer in adapted.values())
    tuned = case.logits(model)
    with torch.no_grad():
        for path, layer in adapted.items():
            weight_of(layer.layer).add_(layer.b @ layer.a)
            model.set_submodule(path, layer.layer)
    torch.testing.assert_close(case.logits(model), tuned, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(tuned, expected, rtol=1e-6)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:fan_in_fan_out:UserWarning", "ignore:Initializing zero-element:UserWarning"
)
@every_cut
@every_family
def test_peft_trains_and_merges_all_linear_layers(name: str, cut: str) -> None:
    peft = pytest.importorskip("peft")
    case = CASES[name]
    model = CUTS[cut](case, case.model()).eval()
    expected = case.logits(model)
    linears = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = {path for path in linears if model.get_submodule(path) is model.get_output_embeddings()}  # type: ignore[operator]
    torch.manual_seed(0)
    kind = {"encoder-decoder": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS", "decoder": "CAUSAL_LM"}[case.kind]
    config = peft.LoraConfig(task_type=kind, r=2, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=True)
    tuned = peft.get_peft_model(model, config)
    assert torch.equal(case.logits(model), expected)
    layers = {n.removeprefix("base_model.model.") for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    assert layers == linears - head - {path for path in linears if path.split(".")[0] in ("classifier", "score")}
    batch, losses = case.batches(model, 1000)[0], []
    optimizer = torch.optim.Adam([parameter for n, parameter in tuned.named_parameters() if "lora_" in n], lr=1e-3)
    for _ in range(4):
        losses.append(case.task.logits(model, batch).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted = case.logits(model)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(case.logits(merged), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@every_cut
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_dynamic_quantisation_takes_every_layer_and_leaves_what_is_around_it(name: str, cut: str) -> None:
    case = CASES[name]
    model = CUTS[cut](case, case.model()).eval()
    around = {path: type(module) for path, module in model.named_modules() if isinstance(module, AroundLinear | EmptyLinear)}
    assert around or cut == "heads"
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    assert not [path for path, module in quantised.named_modules() if type(module) is nn.Linear]
    assert {path: type(quantised.get_submodule(path)) for path in around} == around
    expected, output = case.logits(model), case.logits(quantised)
    # A lost scatter or gather would be an error, or change the logits by their own size.
    assert (output - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("name", ["bert-sequence", "llama", "t5-gated"])
def test_autocast_takes_layers_without_inputs_or_outputs(name: str) -> None:
    """The stock layer's product would have autocast's dtype; queries without channels are zeros of any dtype."""
    case = CASES[name]
    plan = uneven_plan(case, "channel")
    first = next(site for site in plan.sites if site.unit == "qk_channel")
    kept = {site: units[:0] if site == first.name else units for site, units in plan.items()}
    model = secateur.prune(case.model(), secateur.Plan(kept, plan.sites, plan.fingerprint)).eval()
    assert any(isinstance(module.linear, EmptyLinear) for module in model.modules() if isinstance(module, AroundLinear))
    expected = case.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.logits(model)
    assert (output - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_stays_frozen_inside_the_layer(frozen: str) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(True)
    for name in ("query", "value"):
        model.get_parameter(f"bert.encoder.layer.0.attention.self.{name}.{frozen}").requires_grad_(False)
    for pruned, layer in ((CUTS["channels"](case, model), ScatterLinear), (CUTS["low-rank"](case, model), AroundLinear)):
        query: Any = pruned.get_submodule("bert.encoder.layer.0.attention.self.query")
        assert isinstance(query, layer)
        other = {"weight": "bias", "bias": "weight"}[frozen]
        assert not query.linear.get_parameter(frozen).requires_grad
        assert query.linear.get_parameter(other).requires_grad


def test_hooks_inside_a_layer_stay_when_it_gets_a_bias() -> None:
    case = CASES["llama"]
    model = case.model()
    pruned = CUTS["channels"](case, model)
    outputs = [path for path, module in pruned.named_modules() if isinstance(module, GatherLinear)]
    seen = []
    handle = pruned.get_submodule(f"{outputs[0]}.linear").register_forward_hook(lambda *_: seen.append(1))
    secateur.recover_(model, pruned, case.task, case.examples, add_biases=True)
    layer: Any = pruned.get_submodule(outputs[0])
    assert layer.bias is layer.linear.bias is not None
    seen.clear()
    case.logits(pruned)
    assert seen
    handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_a_folders_own_code_are_known(name: str, tmp_path: Any) -> None:
    """They are other classes than secateur's, with the same names."""
    import transformers

    case = CASES[name]
    model = case.model()
    pruned = CUTS["channels"](case, model)
    secateur.save(pruned, tmp_path / "out")
    loaded = getattr(transformers, case.auto_class).from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert not [module for module in loaded.modules() if isinstance(module, AroundLinear)]
    with pytest.raises(secateur.InputError, match="has lost attention channels already"):
        secateur.sites(loaded)
    for each in (pruned, loaded):
        secateur.recover_(model, each, case.task, case.examples, add_biases=True)
    torch.testing.assert_close(case.logits(loaded), case.logits(pruned), rtol=1e-4, atol=1e-5)
