"""Models whose forward pass does more than their linear layers and their config say: right, or refused in one line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, uniform_plan
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import prune as masks

import secateur
from secateur.model.ordinary import require_ordinary

CASE = CASES["llama"]
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model  # type: ignore[no-any-return]


def masked(model: nn.Module) -> nn.Module:
    masks.l1_unstructured(model.get_submodule(UP), "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


def parametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.get_submodule(UP))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def normalised(model: nn.Module) -> nn.Module:
    weight_norm(model.get_submodule(UP))
    return model


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return, no-untyped-call]


class Quantised(Tensor):
    """A tensor subclass, as torchao makes them."""


class Scaled(nn.Linear):
    """A linear layer with a forward method of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_another_tensor(model: nn.Module) -> nn.Module:
    layer = model.get_submodule(UP)
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach().as_subclass(Quantised))
    return model


def of_another_class(model: nn.Module) -> nn.Module:
    model.get_submodule(UP).__class__ = Scaled
    return model


def made_in_inference_mode(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(model)


def with_adapter(model: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"]))
    return model  # type: ignore[no-any-return]


def wrapped_with_adapter(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"]))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::UserWarning")
def quantised_by_torchao(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


ODDITIES: list[tuple[Callable[[nn.Module], nn.Module], str]] = [
    (compiled, "the result of torch.compile at OptimizedModule: give the model itself (compiled._orig_mod)"),
    (compiled_in_place, "a compiled module at LlamaForCausalLM: give a model that is not compiled"),
    (compiled_forward, "a compiled module at LlamaForCausalLM: give a model that is not compiled"),
    (masked, f"a mask of torch.nn.utils.prune at {UP} (Linear): make it permanent first (torch.nn.utils.prune.remove)"),
    (parametrized, f"a parametrization at {UP} (ParametrizedLinear): make it permanent first"),
    (normalised, f"a normalised weight at {UP} (Linear): make it permanent first (torch.nn.utils.remove_weight_norm"),
    (quantised, "special weights (Linear) at model.layers.0.self_attn.q_proj (Linear): dequantise them first"),
    (of_another_tensor, f"special weights (Quantised) at {UP} (Linear): dequantise them first"),
    (of_another_class, f"a linear layer with a forward method of its own at {UP} (Scaled): replace it"),
    (made_in_inference_mode, "weights made inside torch.inference_mode() at model.embed_tokens (Embedding): load the model"),
    (with_adapter, "an adapter at model.layers.0.mlp.up_proj (Linear): merge it into the weights first (merge_and_unload()"),
    (wrapped_with_adapter, "an adapter at PeftModelForCausalLM: merge it into the weights first (merge_and_unload()"),
    (quantised_by_torchao, "special weights (Int8Tensor) at model.layers.0.self_attn.q_proj (Linear): dequantise them first"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("change", "message"), ODDITIES, ids=[change.__name__ for change, _ in ODDITIES])
def test_a_model_that_is_not_ordinary_is_refused_in_one_line_that_says_what_to_do(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    plan, pruned = uniform_plan(CASE, "head"), CASE.model()
    model = change(CASE.model())
    calls: list[Callable[[], Any]] = [
        lambda: secateur.attribute(model, CASE.task, CASE.examples),
        lambda: secateur.layer_scores(model, CASE.task, CASE.examples),
        lambda: secateur.prune(model, plan),
        lambda: secateur.prune_(model, plan),
        lambda: secateur.TaskPlans(model, {"task": plan}),
        lambda: secateur.delete_layers(model, ["decoder.0"]),
        lambda: secateur.factorise(model, 0.5),
        lambda: secateur.recover_(model, pruned, CASE.task, CASE.examples),
        lambda: secateur.compress(model, CASE.examples, CASE.task, keep=0.5),
    ]
    for call in calls:
        with pytest.raises(secateur.InputError, match=rf"^(task 'task': )?model: expected an .*{re.escape(message)}[^\n]*$"):
            call()


@pytest.mark.parametrize("change", [masked, parametrized, with_adapter])
def test_a_model_whose_weights_change_in_each_pass_is_not_written(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(secateur.InputError, match=r"^model: expected an ordinary model, got an? (mask|adapter|param)"):
        secateur.save(change(CASE.model()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_encoder_with_masks_is_not_pruned_for_several_tasks() -> None:
    model = CASES["bert-sequence"].model()
    masks.l1_unstructured(model.get_submodule("bert.encoder.layer.0.output.dense"), "weight", 0.5)  # type: ignore[no-untyped-call]
    with pytest.raises(secateur.InputError, match=r"^model: expected an ordinary model, got a mask of torch\.nn\.utils\.prune"):
        secateur.learned.MultitaskPruning(model, {"topic": secateur.learned.Classification(("a", "b"))})


def test_a_compiled_model_is_not_masked() -> None:
    """Compiled code does not call hooks that are added later."""
    with (
        pytest.raises(secateur.InputError, match=r"^model: expected an ordinary model, got a compiled module"),
        secateur.masked(compiled_in_place(CASE.model()), uniform_plan(CASE, "head")),
    ):
        pass


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_is_ordinary_dense_and_pruned(name: str) -> None:
    model = CASES[name].model()
    require_ordinary(model)
    require_ordinary(secateur.prune(model, uniform_plan(CASES[name], "head")))


def tripled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return 3 * output


def halved(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0] / 2,)


def hooked() -> tuple[nn.Module, list[Any]]:
    model = CASE.model()
    handles = [model.get_submodule(DOWN).register_forward_hook(tripled)]
    handles.append(model.get_submodule(UP).register_forward_pre_hook(halved))
    handles.append(model.get_submodule("model.norm").register_forward_hook(tripled))
    return model, handles


@pytest.mark.parametrize("way", ["prune", "prune_", "router"])
def test_a_users_hooks_act_on_the_pruned_model_as_on_the_masked_one(way: str) -> None:
    plan, (model, _) = uniform_plan(CASE, "head"), hooked()
    with secateur.masked(model, plan):
        expected = CASE.logits(model)
    plain = CASE.model()
    with secateur.masked(plain, plan):
        assert not torch.allclose(expected, CASE.logits(plain), rtol=1e-2)
    ways: dict[str, Callable[..., nn.Module]] = {
        "prune": secateur.prune,
        "prune_": secateur.prune_,
        "router": lambda model, plan: secateur.TaskPlans(model, {"task": plan})["task"],
    }
    pruned = ways[way](model, plan)
    torch.testing.assert_close(CASE.logits(pruned), expected, rtol=1e-4, atol=1e-4)


def test_the_handle_of_a_hook_removes_it_from_the_model_that_was_pruned_in_place() -> None:
    model, handles = hooked()
    pruned = secateur.prune_(model, uniform_plan(CASE, "head"))
    for handle in handles:
        handle.remove()
    assert torch.equal(CASE.logits(pruned), CASE.logits(secateur.prune(CASE.model(), uniform_plan(CASE, "head"))))


def test_a_mask_of_secateur_does_not_stay_on_the_pruned_model() -> None:
    model, plan = CASE.model(), uniform_plan(CASE, "head")
    expected = CASE.logits(secateur.prune(model, plan))
    with secateur.masked(model, plan):
        pruned = secateur.prune(model, plan)
    assert torch.equal(CASE.logits(pruned), expected)


def test_hooks_that_a_folder_does_not_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, handles = hooked()
    pruned = secateur.prune(model, uniform_plan(CASE, "head"))
    line = r"^model: expected an ordinary model, got the hook 'halved' at model.layers.1.mlp.up_proj \(Linear\): remove it"
    handles[0].remove()
    with pytest.raises(secateur.InputError, match=r"got the hook 'tripled' at model.layers.0.mlp.down_proj \(Linear\)"):
        secateur.save(pruned, tmp_path / "out")
    with pytest.raises(secateur.InputError, match=line):
        secateur.compress(model, CASE.examples, CASE.task, keep=0.5, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_forward_method_that_calls_the_dense_model_is_refused(tmp_path: Path) -> None:
    """The copy of the module would call the dense module: the pruned model would compute what the dense one computes."""
    model: Any = CASE.model()
    dense = model.forward
    model.forward = lambda *arguments, **options: dense(*arguments, **options)
    secateur.attribute(model, CASE.task, CASE.examples)
    line = r"^model: expected an ordinary model, got a replaced forward method at LlamaForCausalLM: remove it first"
    for call in (
        lambda: secateur.prune(model, uniform_plan(CASE, "head")),
        lambda: secateur.delete_layers(model, ["decoder.0"]),
        lambda: secateur.factorise(model, 0.5),
        lambda: secateur.compress(model, CASE.examples, CASE.task, keep=0.5),
        lambda: secateur.save(model, tmp_path / "out"),
    ):
        with pytest.raises(secateur.InputError, match=line):
            call()
    assert not list(tmp_path.iterdir())


def test_a_model_that_accelerate_has_prepared_for_bfloat16_is_pruned() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(CASE.model())
    assert "forward" in vars(model)
    plan = uniform_plan(CASE, "head")
    with secateur.masked(model, plan):
        expected = CASE.logits(model)
    torch.testing.assert_close(CASE.logits(secateur.prune(model, plan)), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("criterion", [None, "ig:nodes=2", "ig-joint:nodes=2"])
def test_scores_inside_inference_mode_are_those_outside_it(criterion: str | None) -> None:
    model = CASE.model()
    expected = secateur.attribute(model, CASE.task, CASE.examples, criterion=criterion)
    with torch.inference_mode():
        assert secateur.attribute(model, CASE.task, CASE.examples, criterion=criterion).equal(expected)


def test_layer_scores_inside_inference_mode_are_those_outside_it() -> None:
    model = CASE.model()
    expected = secateur.layer_scores(model, CASE.task, CASE.examples, "gradient")
    with torch.inference_mode():
        assert secateur.layer_scores(model, CASE.task, CASE.examples, "gradient") == expected


def test_a_model_made_inside_inference_mode_can_be_scored_outside_it(tmp_path: Path) -> None:
    model, other, plan = CASE.model(), CASE.model(), uniform_plan(CASE, "head")
    with torch.inference_mode():
        pruned = secateur.prune(model, plan)
        secateur.recover_(model, pruned, CASE.task, CASE.examples, add_biases=True)
        secateur.save(pruned, tmp_path / "out")
        made = [
            pruned,
            secateur.load(tmp_path / "out"),
            secateur.prune_(other, plan),
            secateur.delete_layers(model, ["decoder.0.ffn"], scales={"decoder.1": 0.5}),
            secateur.factorise(model, 0.5),
        ]
    for smaller in made:
        assert not any(tensor.is_inference() for tensor in (*smaller.parameters(), *smaller.buffers()))
    secateur.attribute(pruned, CASE.task, CASE.examples)


def test_a_model_made_inside_inference_mode_is_evaluated_and_keeps_its_flags() -> None:
    model = made_in_inference_mode(CASE.model())
    assert str(secateur.evaluate(model, CASE.task, CASE.examples)) == str(
        secateur.evaluate(CASE.model(), CASE.task, CASE.examples)
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_does_not_change_scores() -> None:
    model: Any = CASE.model()
    expected = secateur.attribute(model, CASE.task, CASE.examples)
    model.train().gradient_checkpointing_enable()
    assert secateur.attribute(model, CASE.task, CASE.examples).equal(expected)


def share_a_block(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def share_a_weight(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize("share", [share_a_block, share_a_weight])
def test_a_block_that_stands_at_two_places_is_refused(share: Callable[[Any], None]) -> None:
    model = CASE.model()
    share(model)
    line = r"^model: expected weights of its own in each branch, got 'model\.layers\.1\.\S+' shared by decoder\.0\.\w+ and de"
    with pytest.raises(secateur.InputError, match=line):
        secateur.attribute(model, CASE.task, CASE.examples)
    with pytest.raises(secateur.InputError, match=line):
        secateur.sites(model)


@pytest.mark.parametrize("name", ["bert-sequence", "t5-relu"])  # T5's attentions get another class, as each has its own bias.
def test_a_dispatched_model_is_pruned_and_verified_without_a_trace(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    case = CASES[name]
    plan = uniform_plan(case, "head")
    expected = case.logits(secateur.prune(case.model(), plan))
    model = case.model()
    places = {child: "cpu" for child, _ in model.named_children()}
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    pruned = secateur.prune(model, plan)
    torch.testing.assert_close(case.logits(pruned), expected)
    verification = secateur.verify(model, pruned, plan, case.task, case.batches(model))
    assert verification.holds
    assert verification.rounding > 0
    pruned.to(torch.bfloat16)  # Accelerate has put this method on the dense model.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["bert-sequence", "llama"])
def test_offloaded_weights_are_not_pruned(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    case = CASES[name]
    model = accelerate.cpu_offload(case.model(), execution_device=torch.device("cpu"))
    for use in (
        lambda: secateur.prune(model, uniform_plan(case, "head")),
        lambda: secateur.delete_layers(model, []),
        lambda: secateur.save(model, tmp_path / "out"),
    ):
        with pytest.raises(secateur.InputError, match=r"^model: expected an ordinary model, got offloaded weights at .*: load"):
            use()


def test_plans_of_tasks_refuse_a_dispatched_model() -> None:
    """Their models share the modules' attributes with the dense model, also the forward methods that Accelerate has wrapped."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(CASE.model(), {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(secateur.InputError, match=r"^model: expected an ordinary model, got a forward method that Accelerate"):
        secateur.TaskPlans(model, {"mood": uniform_plan(CASE, "head")})["mood"]
