"""delete_layers gives a smaller model that equals gates at zero. It is saved and loaded, generates, and loses more layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL, CASES, GENERATING, PRE_NORM, Case, emptied_plan, uneven_plan
from comparing import relative
from hand_layers import branch_names, by_hand
from new_process import BLOCK_SECATEUR, run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur.model.blocks import blocks, gated, layers
from secateur.pruning.delete_layers import delete_layers
from secateur.pruning.verify import verify_layers

every_case = pytest.mark.parametrize("case", ALL, ids=str)


def logits_without(case: Case, model: nn.Module, deleted: list[str]) -> Tensor:
    """Return the logits of the model with the given layers gated to zero."""
    with by_hand(case, model, dict.fromkeys(deleted, 0.0)):
        return case.logits(model)


def subsets(names: list[str], count: int) -> list[list[str]]:
    """Return every name alone, and random subsets."""
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.rand(len(names), generator=generator) < 0.5 for _ in range(count)]
    drawn = [[name for name, keep in zip(names, keeps, strict=True) if keep] for keeps in chosen]
    return [[name] for name in names] + [subset for subset in drawn if 0 < len(subset) < len(names)]


@pytest.mark.parametrize("unit", ["block", "branch"])
@every_case
def test_deletion_gives_the_logits_of_gates_at_zero(case: Case, unit: Any) -> None:
    model = case.model(torch.float64)
    dense = case.logits(model)
    for deleted in subsets(list(layers(model, unit)), 6):
        expected = logits_without(case, model, deleted)
        smaller = delete_layers(model, deleted)
        assert relative(case.logits(smaller), expected) < 1e-12, deleted
        assert relative(expected, dense) > 1e-3
        assert secateur.cost.parameters(smaller) < secateur.cost.parameters(model)
        assert len(layers(smaller, "branch")) < len(layers(model, "branch"))


@every_case
def test_all_layers_may_be_deleted(case: Case) -> None:
    model = case.model(torch.float64)
    smaller = delete_layers(model, layers(model))
    assert relative(case.logits(smaller), logits_without(case, model, list(layers(model)))) < 1e-12
    with pytest.raises(secateur.InputError, match="model: expected one with layers left to delete"):
        layers(smaller)


@every_case
def test_gated_equals_hand_written_gates(case: Case) -> None:
    """verify_layers compares with `blocks.gated`, so it is checked here, also with gates between 0 and 1."""
    model = case.model(torch.float64)
    values = {name: 0.2 + 0.07 * k for k, name in enumerate(branch_names(case, model))}
    branch_of = layers(model, "branch")
    with gated(model, {branch_of[name][0]: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}):
        actual = case.logits(model)
    with by_hand(case, model, values):
        expected = case.logits(model)
    assert relative(actual, expected) < 1e-12
    assert relative(expected, case.logits(model)) > 1e-3


@every_case
def test_scales_are_folded_into_the_weights(case: Case) -> None:
    model = case.model(torch.float64)
    names = branch_names(case, model)
    values = {name: 0.3 + 0.1 * k for k, name in enumerate(names[:-1])}
    smaller = delete_layers(model, names[-1:], scales={name: min(value, 1.0) for name, value in values.items()})
    with by_hand(case, model, {**{name: min(value, 1.0) for name, value in values.items()}, names[-1]: 0.0}):
        expected = case.logits(model)
    # Gemma's norms compute in float32, whatever the dtype of the model.
    assert relative(case.logits(smaller), expected) < (1e-6 if case.name in ("gemma2", "gemma3") else 1e-12)


@every_case
def test_the_callers_model_is_unchanged_and_shares_no_memory(case: Case) -> None:
    model = case.model()
    weights, config = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()  # type: ignore[operator, union-attr]
    modules = {n: (type(m), id(m), len(m._forward_hooks)) for n, m in model.named_modules()}
    indices = {n: getattr(m, "layer_idx", None) for n, m in model.named_modules()}
    first, last = next(iter(layers(model))), list(layers(model, "branch"))[-1]
    smaller = delete_layers(model, [first], scales={last: 0.5})
    assert {n: (type(m), id(m), len(m._forward_hooks)) for n, m in model.named_modules()} == modules
    assert {n: getattr(m, "layer_idx", None) for n, m in model.named_modules()} == indices
    assert model.config.to_dict() == config  # type: ignore[operator, union-attr]
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters() if p.numel()} & {p.data_ptr() for p in smaller.parameters() if p.numel()}
    assert not shared


@pytest.mark.parametrize("case", PRE_NORM, ids=str)
def test_a_model_without_a_whole_block_fits_the_class_of_transformers(case: Case) -> None:
    """For every single block, the class built from the new config takes the weights of the smaller model."""
    model: Any = case.model()
    for name in layers(model):
        smaller: Any = delete_layers(model, [name])
        if case.name == "modernbert" and name == "encoder.0":  # Its other blocks have a norm that a first block lacks.
            assert len(blocks(smaller)) == len(blocks(model))
            continue
        assert not hasattr(smaller.config, "secateur")
        stock = type(model)(smaller.config)
        stock.load_state_dict(smaller.state_dict())
        assert torch.equal(case.logits(stock.eval()), case.logits(smaller)), name
        count = (
            ("num_layers" if name.startswith("encoder") else "num_decoder_layers")
            if case.kind == "encoder-decoder"
            else "num_hidden_layers"
        )
        assert getattr(smaller.config, count) == getattr(model.config, count) - 1
        assert len(blocks(smaller)) == len(blocks(model)) - 1
        if case.kind == "encoder-decoder":
            assert smaller.decoder.config.num_layers == smaller.config.num_decoder_layers
            assert smaller.encoder.config.num_layers == smaller.config.num_layers


def test_a_block_stays_as_an_empty_one_where_block_numbers_scale_the_attention() -> None:
    """GPT-2 may scale attention by the number of its block, so the first block stays in place without branches."""
    case = CASES["gpt2"]
    model: Any = case.model()
    model.config.scale_attn_by_inverse_layer_idx = True
    model = type(model)(model.config).eval()
    smaller: Any = delete_layers(model, ["decoder.0"])
    assert smaller.config.n_layer == 2
    with by_hand(case, model, {"decoder.0": 0.0}):
        assert relative(case.logits(smaller), case.logits(model)) < 1e-5


def test_the_config_loses_the_layer_types_of_deleted_layers() -> None:
    model: Any = CASES["gemma3"].model()
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    for name, left in (("decoder.0", ["full_attention"]), ("decoder.1", ["sliding_attention"])):
        assert delete_layers(model, [name]).config.layer_types == left  # type: ignore[union-attr]


def test_t5_keeps_at_least_as_many_encoder_blocks_as_decoder_blocks() -> None:
    """A shell of norms replaces a deleted block: transformers sizes the decoder's cache by the number of encoder blocks."""
    model: Any = CASES["t5-relu"].model()
    smaller: Any = delete_layers(model, ["encoder.0", "encoder.2"])
    assert (smaller.config.num_layers, smaller.config.num_decoder_layers) == (2, 2)
    assert hasattr(smaller.config, "secateur")
    assert [name for name in layers(smaller) if name.startswith("encoder")] == ["encoder.1"]
    shell = {name for name, parameter in smaller.encoder.block[0].named_parameters() if parameter.numel()}
    assert shell == {"layer.0.layer_norm.weight", "layer.1.layer_norm.weight"}
    # Once the decoder needs the shell no longer, it is deleted too.
    fewer: Any = delete_layers(smaller, ["decoder.0"])
    assert (fewer.config.num_layers, fewer.config.num_decoder_layers) == (1, 1)
    assert not hasattr(fewer.config, "secateur")


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_generation_with_and_without_a_cache_equals_that_of_gates_at_zero(case: Case) -> None:
    model: Any = case.model(torch.float64)
    options: dict[str, Any] = {"input_ids": torch.tensor([[2, 7, 9, 12, 20, 11]]), "max_new_tokens": 8, "do_sample": False}
    options["eos_token_id"] = None
    for deleted in [
        *([name] for name in layers(model)),
        *([name] for name in layers(model, "branch")),
        list(layers(model))[:2],
    ]:
        smaller: Any = delete_layers(model, deleted)
        cached, plain = (smaller.generate(**options, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain), deleted
        with by_hand(case, model, dict.fromkeys(deleted, 0.0)):
            assert torch.equal(plain, model.generate(**options, use_cache=False)), deleted


@pytest.mark.parametrize("case", [c for c in PRE_NORM if c.name != "vit"], ids=str)  # ViT's layers have no number.
def test_the_remaining_layers_are_renumbered(case: Case) -> None:
    smaller = delete_layers(case.model(), [next(iter(layers(case.model())))])
    for block in blocks(smaller).values():
        indices = {m.layer_idx for m in smaller.get_submodule(block.path).modules() if hasattr(m, "layer_idx")}
        assert indices == {block.layer}


@every_case
def test_layers_of_pruned_models_are_deleted(case: Case) -> None:
    """The recipe in the config of the pruned model follows the new layer numbers."""
    for make_plan in (uneven_plan, emptied_plan):
        model = secateur.prune(case.model(torch.float64), make_plan(case, "head"))
        branches = layers(model)
        for name in (next(iter(branches)), list(branches)[-1]):
            with gated(model, {branch: torch.zeros(1).double() for branch in branches[name]}):
                expected = case.logits(model)
            assert relative(case.logits(delete_layers(model, [name])), expected) < 1e-12


def test_layers_of_a_factorised_model_are_deleted() -> None:
    case = CASES["t5-relu"]
    model = secateur.factorise(case.model(torch.float64), 0.5)
    for name in ("encoder.0", "decoder.1.ffn", "encoder.1.self_attention"):
        branches = {**layers(model), **layers(model, "branch")}[name]
        with gated(model, {branch: torch.zeros(1).double() for branch in branches}):
            expected = case.logits(model)
        assert relative(case.logits(delete_layers(model, [name])), expected) < 1e-12


@every_case
def test_verify_layers_tells_equal_from_different(case: Case) -> None:
    model = case.model()
    first, second, *_ = layers(model)
    batches = case.batches(model)
    assert verify_layers(model, delete_layers(model, [first]), [first], case.task, batches).holds
    assert not verify_layers(model, delete_layers(model, [second]), [first], case.task, batches).holds


# By name: the case, the deleted layers, the scales of other layers, and whether a class of transformers loads the folder.
KINDS = {
    "t5-block": ("t5-gated", ["encoder.0", "decoder.0"], {}, True),
    "t5-shell": ("t5-relu", ["encoder.0", "encoder.1"], {"encoder.2": 0.5}, False),
    "t5-branch": ("t5-relu", ["encoder.0.self_attention", "decoder.0.self_attention", "decoder.1.ffn"], {}, False),
    "bert-block": ("bert-sequence", ["encoder.0"], {"encoder.1.ffn": 0.25}, False),
    "bert-branch": ("bert-token", ["encoder.0.ffn", "encoder.1.self_attention"], {}, False),
    "llama-block": ("llama", ["decoder.0"], {"decoder.1": 0.5}, True),
    "llama-branch": ("llama", ["decoder.0.self_attention"], {}, False),
    "qwen3-block": ("qwen3", ["decoder.1"], {}, True),
    "gemma3-block": ("gemma3", ["decoder.0"], {"decoder.1": 0.75}, True),
    "gpt2-block": ("gpt2", ["decoder.0"], {"decoder.1.ffn": 0.5}, True),
    "gpt2-branch": ("gpt2", ["decoder.0.self_attention", "decoder.1.ffn"], {}, False),
    "opt-block": ("opt", ["decoder.1"], {"decoder.0": 0.5}, True),
    "modernbert-block": ("modernbert", ["encoder.1"], {}, True),
    "bart-branch": ("bart", ["encoder.0.ffn", "decoder.1.cross_attention", "decoder.0.self_attention"], {}, False),
    "gemma3-branch": ("gemma3", ["decoder.1.self_attention", "decoder.0.ffn"], {}, False),
}

# One process loads all folders without secateur, by a class of transformers or by the folder's own modelling file.
SCRIPT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for load in json.load(open(sys.argv[1])):
    auto = getattr(transformers, load["auto"])
    model = auto.from_pretrained(load["folder"], dtype="auto", trust_remote_code=load["trust"])
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        save_file({"output": model(**load_file(load["inputs"])).logits.contiguous()}, load["output"])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Save a model of every kind. Returns the kinds' folders and the logits of their models."""
    root = tmp_path_factory.mktemp("deleted")
    folders, loads = {}, []
    for name, (case_name, deleted, scales, stock) in KINDS.items():
        case = CASES[case_name]
        smaller: Any = delete_layers(case.model(), deleted, scales=scales)
        secateur.save(smaller, root / name, tokenizer=case.task.reader)
        batch = case.batches(smaller, 1000)[0]
        inputs = dict(batch.inputs)
        if case.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = smaller.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, root / f"{name}.inputs")
        with torch.inference_mode():
            folders[name] = (root / name, smaller(**inputs).logits)
        loads.append(
            {"folder": str(root / name), "auto": case.auto_class, "trust": not stock,
             "inputs": str(root / f"{name}.inputs"), "output": str(root / f"{name}.output")}
        )  # fmt: skip
    (root / "loads.json").write_text(json.dumps(loads))
    run_script(BLOCK_SECATEUR + SCRIPT, root, str(root / "loads.json"))
    return folders


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_gives_the_same_logits_in_a_new_process(saved: dict[str, tuple[Path, Tensor]], name: str) -> None:
    folder, logits = saved[name]
    assert torch.equal(load_file(f"{folder}.output")["output"], logits)
    config = json.loads((folder / "config.json").read_text())
    assert ("secateur" in config) == (folder / "modeling_secateur.py").exists() == (not KINDS[name][3])


@pytest.mark.parametrize("name", KINDS)
def test_a_loaded_model_gives_the_same_logits_and_can_lose_more_layers(
    saved: dict[str, tuple[Path, Tensor]], name: str
) -> None:
    folder, logits = saved[name]
    model: Any = secateur.load(folder)
    with torch.inference_mode():
        assert torch.equal(model(**load_file(f"{folder}.inputs")).logits, logits)
    case, last = CASES[KINDS[name][0]], list(layers(model))[-1]
    with gated(model, {branch: torch.zeros(1) for branch in layers(model)[last]}):
        expected = case.logits(model)
    assert relative(case.logits(delete_layers(model, [last])), expected) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gone": ["encoder.7"]}, "layers: expected some of encoder.0, .*, got 'encoder.7'"),
        ({"gone": "encoder.0"}, "layers: expected a collection of names, got the text 'encoder.0'"),
        (
            {"gone": ["encoder.0"], "scales": {"encoder.0.ffn": 0.5}},
            "scales: expected names of what stays, got 'encoder.0.ffn'",
        ),
        ({"gone": [], "scales": {"encoder.0": 1.5}}, r"scales: expected factors in \(0, 1\], got 1.5 for 'encoder.0'"),
        ({"gone": [], "scales": {"encoder.0": float("nan")}}, r"scales: expected factors in \(0, 1\], got nan"),
        ({"gone": [], "scales": {"encoder.0": 0.5, "encoder.0.ffn": 0.5}}, "scales: expected one factor for each branch"),
    ],
)
def test_bad_input_is_refused(t5: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(secateur.InputError, match=message):
        delete_layers(t5, **arguments)


def test_a_deleted_layer_cannot_be_deleted_again() -> None:
    bert = delete_layers(CASES["bert-token"].model(), ["encoder.0"])
    with pytest.raises(secateur.InputError, match=r"layers: expected some of encoder.1, .*, got 'encoder.0'"):
        delete_layers(bert, ["encoder.0"])
    llama = delete_layers(CASES["llama"].model(), ["decoder.0.ffn"])
    with pytest.raises(secateur.InputError, match=r"got 'decoder.0.ffn'"):
        delete_layers(llama, ["decoder.0.ffn"])


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(secateur.InputError, match="model: expected one of the families"):
        delete_layers(nn.Linear(2, 2), [])
