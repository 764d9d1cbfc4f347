"""Export and folders: same outputs after saving and loading, sparse, in fresh processes; given models stay unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, DTYPES
from encoders import KINDS, NAMES, SETTINGS, TASKS, encoder, inputs, logits, same, state, tokenizer, trained
from new_process import BLOCK_SECATEUR, run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur import InputError
from secateur.learned.multitask.exporting import ENCODER, HEADS, SPARSE, export, load, save
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.multitask.sparse import load_sparse, save_sparse
from secateur.model.modeling import LowRankLinear

every_kind = pytest.mark.parametrize("kind", KINDS)
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
local = pytest.mark.parametrize("setting", SETTINGS[1::2], ids=NAMES[1::2])
ELEMENT, RANK = ({"method": "movement", "granularity": granularity} for granularity in ("element", "rank"))


def pruned(kind: str, setting: dict[str, Any], dtype: str = "float32", density: float = 0.2) -> MultitaskPruning:
    """Build a pruning with random parameters, and the masks that follow from them."""
    return trained(encoder(kind).to(DTYPES[dtype]), TASKS, density=density, **setting)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() == TASKS.keys() and all(torch.equal(first[name], second[name]) for name in TASKS)


@every_kind
@every_setting
def test_what_is_exported_computes_what_was_masked(kind: str, setting: dict[str, Any]) -> None:
    for dtype, bound in (("float32", 1e-5), ("float64", 1e-13)):
        pruning = pruned(kind, setting, dtype)
        masked = logits(pruning)
        exported = export(pruning)
        require_layers(pruning, exported)
        outputs = logits(exported)
        assert outputs.keys() == TASKS.keys()
        assert all(float((outputs[n] - masked[n]).abs().max() / masked[n].abs().max()) < bound for n in ("mood", "size"))
        inside = inputs()["attention_mask"].bool()
        assert float((outputs["where"] - masked["where"])[inside].abs().max()) < 10 * bound
        # The masks matter: without them the outputs differ.
        for mask in pruning.masks.values():
            mask.keep_(None)
        assert float((logits(pruning)["mood"] - masked["mood"]).abs().max()) > 1000 * bound
        assert not exported.training
        assert not any(parameter.requires_grad for parameter in exported.parameters())
        assert not any("parametrizations" in name for name, _ in exported.named_modules())


def require_layers(pruning: MultitaskPruning, exported: Any) -> None:
    """Check that layers are dense with zeros, or two factors if these hold fewer weights, and that the total is right."""
    stored = 0
    for path, mask in pruning.masks.items():
        layer = exported.encoder.get_submodule(path)
        if pruning.granularity == "element":
            assert type(layer) is nn.Linear
            masked: Any = pruning.encoder.get_submodule(path)
            assert torch.equal(layer.weight, masked.weight)
            stored += int((layer.weight != 0).sum())
        elif mask.kept * sum(mask.shape) < mask.weights:
            assert isinstance(layer, LowRankLinear)
            assert (layer.weight.shape, layer.basis.weight.shape) == ((mask.shape[0], mask.kept), (mask.kept, mask.shape[1]))
            stored += layer.weight.numel() + layer.basis.get_parameter("weight").numel()
        else:
            assert type(layer) is nn.Linear
            stored += layer.weight.numel()
    assert stored == pruning.stored


@every_kind
@every_setting
def test_saved_and_loaded_bit_for_bit(kind: str, setting: dict[str, Any], tmp_path: Path) -> None:
    exported = export(pruned(kind, setting))
    element = setting["granularity"] == "element"
    save(exported, tmp_path / "out", tokenizer=tokenizer(kind), sparse=True)
    for loaded in (load(tmp_path / "out"), load(tmp_path / "out", sparse=True)):
        assert loaded.tasks == exported.tasks
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert same(dict(loaded.state_dict()), dict(exported.state_dict()))
        assert equal(logits(loaded), logits(exported))
    # The sparse file alone is enough for elements. Low rank also needs the classes in the folder.
    (tmp_path / "out" / ENCODER / "model.safetensors").unlink()
    if element:
        assert equal(logits(load(tmp_path / "out", sparse=True)), logits(exported))
        with pytest.raises(InputError, match="model"):
            load(tmp_path / "out")


@every_kind
def test_a_matrix_may_lose_all_its_ranks(kind: str, tmp_path: Path) -> None:
    """The encoder's first and last linear layers lose all ranks. They keep their biases if they have some."""
    pruning = trained(encoder(kind), TASKS, **RANK, density=0.4)
    lost = (pruning.linears[0], pruning.linears[-1])
    for path in lost:
        torch.nn.init.constant_(pruning.masks[path].scores, -1.0)  # type: ignore[arg-type]
    pruning.update_masks_(10, 10)
    assert [pruning.masks[path].kept for path in lost] == [0, 0]
    exported = export(pruning)
    assert [exported.encoder.get_parameter(f"{path}.basis.weight").numel() for path in lost] == [0, 0]
    outputs, masked = logits(exported), logits(pruning)
    assert all(torch.allclose(outputs[name], masked[name], atol=1e-5) for name in ("mood", "size"))
    save(exported, tmp_path / "out", tokenizer=tokenizer(kind))
    assert equal(logits(load(tmp_path / "out")), outputs)


def test_a_sparse_file_is_smaller_than_the_dense_one_by_the_zeros(tmp_path: Path) -> None:
    pruning = pruned("t5-gated", ELEMENT, density=0.1)
    save(export(pruning), tmp_path / "out", tokenizer=tokenizer("t5-gated"), sparse=True)
    dense, sparse = ((tmp_path / "out" / name).stat().st_size for name in (f"{ENCODER}/model.safetensors", SPARSE))
    total = sum(mask.weights for mask in pruning.masks.values())
    saved = 4 * (total - pruning.stored) - total / 8
    headers = 8000  # Names of values and bits beside those of the dense file.
    assert saved - headers < dense - sparse < saved + headers


def test_a_sparse_file_of_another_model_is_refused(tmp_path: Path) -> None:
    for kind in ("t5-gated", "t5-relu"):
        save(export(pruned(kind, ELEMENT)), tmp_path / kind, tokenizer=tokenizer(kind), sparse=True)
    with pytest.raises(InputError, match=r"^model: .* does not fit the config beside it, for example at "):
        load_sparse(tmp_path / "t5-gated" / ENCODER, tmp_path / "t5-relu" / SPARSE)
    for content in (b"", b"no tensors", (tmp_path / "t5-gated" / ENCODER / "model.safetensors").read_bytes()):
        (tmp_path / "t5-gated" / SPARSE).write_bytes(content)
        with pytest.raises(InputError, match=r"^model: .*encoder.sparse.safetensors' is not a sparse checkpoint"):
            load(tmp_path / "t5-gated", sparse=True)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64])
def test_bits_of_any_number_of_elements(numel: int, tmp_path: Path) -> None:
    exported = export(pruned("bert-sequence", ELEMENT))
    layer: Any = exported.encoder.get_submodule("encoder.layer.0.output.dense")
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight.view(-1)[-numel:] = torch.arange(1.0, numel + 1)
    save(exported, tmp_path / "out", tokenizer=tokenizer("bert-sequence"), sparse=True)
    loaded = load(tmp_path / "out", sparse=True)
    assert torch.equal(loaded.encoder.get_parameter("encoder.layer.0.output.dense.weight"), layer.weight)


# One process reads the folders without secateur, then with it, because importing transformers takes most of the time.
SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
root, jobs, outputs = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
inputs = load_file(root / "inputs")

def moved(model):
    # How a product rounds may depend on where in memory its operands begin (MKL), which is not the folder's doing.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model

for folder, auto, trust in jobs:
    model = moved(getattr(transformers, auto).from_pretrained(root / folder / "encoder", trust_remote_code=trust))
    assert not model.training
    with torch.inference_mode():
        outputs[f"{folder} by {auto}"] = model(**inputs).last_hidden_state
assert "secateur" not in sys.modules
sys.meta_path.pop(0)
import secateur
from secateur.learned.multitask.exporting import load
for folder in dict.fromkeys(folder for folder, _, _ in jobs):
    with torch.inference_mode():
        outputs[f"{folder} by secateur"] = secateur.load(root / folder / "encoder")(**inputs).last_hidden_state
        outputs[f"{folder} mood"] = load(root / folder)("mood", **inputs).logits
save_file(outputs, root / "outputs")
"""


def test_folders_are_read_by_fresh_processes(tmp_path: Path) -> None:
    """An element-wise encoder is a stock model. A low-rank one brings its classes, which auto classes load if allowed to."""
    jobs: list[tuple[str, str, bool]] = []
    expected: dict[str, Any] = {}
    save_file(inputs(), tmp_path / "inputs")
    for kind in KINDS:
        for setting in (ELEMENT, RANK):
            low, folder = setting is RANK, f"{kind}-{setting['granularity']}"
            exported = export(pruned(kind, setting))
            save(exported, tmp_path / folder, tokenizer=tokenizer(kind))
            config = json.loads((tmp_path / folder / ENCODER / "config.json").read_text())
            assert ("auto_map" in config) == ("secateur" in config) == low
            # Stock T5's AutoModel is a whole T5, decoder and all.
            autos = ["AutoModelForTextEncoding", *(["AutoModel"] if low or kind == "bert-sequence" else [])]
            jobs += [(folder, auto, low) for auto in autos]
            with torch.inference_mode():
                states = exported.encoder(**inputs()).last_hidden_state
            expected |= {f"{folder} by {way}": states for way in (*autos, "secateur")}
            expected[f"{folder} mood"] = logits(exported)["mood"]
    run_script(BLOCK_SECATEUR + SCRIPT, tmp_path, str(tmp_path), json.dumps(jobs))
    outputs = load_file(tmp_path / "outputs")
    assert outputs.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(outputs[name], expected[name])] == []


@every_kind
@local
def test_a_pruning_leaves_the_given_model_alone(kind: str, setting: dict[str, Any]) -> None:
    """Weights, classes and modes stay, also for a model with a decoder or a head of its own."""
    for model in (encoder(kind), CASES[kind].model()):
        part = next(iter(model.children()))
        part.train()  # An odd mode, to be found again.
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        classes = {name: type(module) for name, module in model.named_modules()}
        modes = {name: module.training for name, module in model.named_modules()}
        pruning = trained(model, TASKS, density=0.3, **setting)
        pruning.train()
        pruning("mood", **inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        export(pruning)
        assert same(dict(model.state_dict()), before)
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not {id(p) for p in model.parameters()} & {id(p) for p in pruning.parameters()}


@every_kind
@local
def test_export_leaves_the_pruning_trainable(kind: str, setting: dict[str, Any], tmp_path: Path) -> None:
    pruning = pruned(kind, setting)
    pruning.train()
    before, modes = state(pruning), {name: module.training for name, module in pruning.named_modules()}
    made = export(pruning)
    save(made, tmp_path / "out", tokenizer=tokenizer(kind))
    assert same(state(pruning), before)
    assert {name: module.training for name, module in pruning.named_modules()} == modes
    exported_state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    optimizer = torch.optim.SGD(pruning.parameters(), lr=0.1)
    pruning("mood", **inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    pruning.update_masks_(5, 10)
    for path, mask in pruning.masks.items():
        held: Any = pruning.encoder.get_submodule(path)
        assert any(not torch.equal(p, before[f"encoder.{path}.{name}"]) for name, p in held.named_parameters())
        assert mask.kept > int(before[f"{path} (mask)"].sum())
    # The exported model shares nothing with the pruning.
    assert same(dict(made.state_dict()), exported_state)


def test_a_classifier_is_a_model_for_the_rest_of_secateur(tmp_path: Path) -> None:
    """The encoder with one task's head is a model that `secateur.evaluate` accepts."""
    model = export(trained(encoder("bert-sequence"), {**TASKS, "mood": type(TASKS["mood"])(tuple(CLASSES))}, density=0.5))  # type: ignore[call-arg]
    case = CASES["bert-sequence"]
    classifier = model.classifier("mood")
    with torch.no_grad():
        assert torch.equal(classifier(**inputs()).logits, model("mood", **inputs()).logits)
    result = secateur.evaluate(classifier, case.task, case.examples)
    assert (result.metric, result.examples) == ("accuracy", len(case.examples))
    for task in ("size", "nothing"):
        with pytest.raises(InputError, match=rf"^task: expected a classification task, of mood, got '{task}'$"):
            model.classifier(task)


def no_folder(folder: Path) -> None:
    load(folder / "nothing")


def without_heads(folder: Path) -> None:
    (folder / "out" / HEADS).unlink()
    load(folder / "out")


def heads_of_others(folder: Path) -> None:
    heads = load_file(folder / "out" / HEADS)
    save_file({name: tensor for name, tensor in heads.items() if "size" not in name}, folder / "out" / HEADS)
    load(folder / "out")


def tasks_of_no_kind(folder: Path) -> None:
    (folder / "out" / "tasks.json").write_text('{"pooling": "mean", "tasks": {"a": {"kind": "magic"}}}')
    load(folder / "out")


def tasks_no_json(folder: Path) -> None:
    (folder / "out" / "tasks.json").write_text("{")
    load(folder / "out")


def without_pooling(folder: Path) -> None:
    about = json.loads((folder / "out" / "tasks.json").read_text())
    del about["pooling"]
    (folder / "out" / "tasks.json").write_text(json.dumps(about))
    load(folder / "out")


def without_encoder(folder: Path) -> None:
    (folder / "out" / ENCODER / "config.json").unlink()
    load(folder / "out")


def over_another(folder: Path) -> None:
    save(load(folder / "out"), folder / "out", tokenizer=tokenizer("t5-relu"))


BAD: dict[str, tuple[Any, str]] = {
    "no folder": (no_folder, r"^model: .*nothing' is no folder of a multitask model \(FileNotFoundError"),
    "without heads": (without_heads, r"^model: .*out' is no folder of a multitask model \(FileNotFoundError"),
    "heads of other tasks": (heads_of_others, r"^model: the heads in .*out' are not those of its tasks$"),
    "tasks of no kind": (tasks_of_no_kind, r"tasks: expected one of the kinds classification, regression, span with its"),
    "tasks that are no JSON": (tasks_no_json, r"^model: .*out' is no folder of a multitask model \(JSONDecodeError"),
    "without pooling": (
        without_pooling,
        r"^model: .*out' is no folder of a multitask model \(tasks\.json: expected 'pooling', got 'tasks'\)$",
    ),
    "without encoder": (without_encoder, r"^model: expected a folder with a config.json, got "),
    "over another": (over_another, r"^out: expected a folder that does not exist yet, got "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    call, message = BAD[name]
    save(export(pruned("t5-relu", ELEMENT)), tmp_path / "out", tokenizer=tokenizer("t5-relu"))
    with pytest.raises(InputError, match=message):
        call(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_without_zeros_is_kept_as_it_is(tmp_path: Path) -> None:
    """A matrix stays dense if the bits would take more space than its zeros."""
    model = encoder("t5-relu")
    save_sparse(model, tmp_path / "sparse")
    secateur.save(model, tmp_path / "dense")
    ours, theirs = load_file(tmp_path / "sparse"), load_file(tmp_path / "dense" / "model.safetensors")
    assert {tuple(tensor.shape) for tensor in ours.values()} == {tuple(tensor.shape) for tensor in theirs.values()}
    assert not any(name.endswith((".bits", ".values")) for name in ours)
    assert same(dict(load_sparse(tmp_path / "dense", tmp_path / "sparse").state_dict()), dict(model.state_dict()))
