"""Contract 4: a saved model gives bit-identical logits in a new process, without pickle or unrequested remote code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, emptied_plan, empty_plan, uneven_plan, uniform_plan
from new_process import BLOCK_SECATEUR, run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import secateur
from secateur.model.discovery import fingerprint
from secateur.model.modeling import rebuild_
from secateur.pruning.prune import prune


@dataclass(frozen=True)
class Kind:
    """A kind of pruned model: its case, the function that prunes it, and whether a class of transformers loads it."""

    case: str
    cut: Callable[[nn.Module], nn.Module]
    stock: bool
    dtype: str = "float32"


def by_selection(name: str, select: str, *, unit: Any = "head", per_head: bool = False) -> Callable[[nn.Module], nn.Module]:
    """Return a function that keeps the best half of the selected sites' units."""

    def cut(model: nn.Module) -> nn.Module:
        scores = secateur.attribute(model, CASES[name].task, CASES[name].examples, unit=unit, select=select)
        return prune(model, secateur.plan(scores, keep=0.5, per_head=per_head))

    return cut


def by_plan(name: str, unit: str, make_plan: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a function that prunes a model by a plan of the case."""
    return lambda model: prune(model, make_plan(CASES[name], unit))


def twice(name: str) -> Callable[[nn.Module], nn.Module]:
    """Return a function that prunes a model by one plan and then by another."""

    def cut(model: nn.Module) -> nn.Module:
        once = prune(model, uneven_plan(CASES[name], "head"))
        scores = secateur.attribute(once, CASES[name].task, CASES[name].examples)
        return prune(once, secateur.plan(scores, keep=0.5))

    return cut


KINDS: dict[str, Kind] = {
    "t5-ffn": Kind("t5-gated", by_selection("t5-gated", "ffn"), stock=True),
    "t5-relu-tied-ffn": Kind("t5-relu", by_selection("t5-relu", "ffn"), stock=True),
    "t5-channel-per-head": Kind("t5-relu", by_plan("t5-relu", "channel-per-head", uniform_plan), stock=True),
    "llama-heads-and-ffn": Kind("llama", by_plan("llama", "head", uniform_plan), stock=True),
    "llama-bfloat16": Kind("llama", by_plan("llama", "head", uniform_plan), stock=True, dtype="bfloat16"),
    "qwen3-heads-and-ffn": Kind("qwen3", by_plan("qwen3", "head", uniform_plan), stock=True),
    "gemma3-heads-and-ffn": Kind("gemma3", by_plan("gemma3", "head", uniform_plan), stock=True),
    "bert-sequence-ffn": Kind("bert-sequence", by_selection("bert-sequence", "ffn"), stock=True),
    "bert-token-ffn": Kind("bert-token", by_selection("bert-token", "ffn"), stock=True),
    "t5-gated-heads": Kind("t5-gated", by_plan("t5-gated", "head", uneven_plan), stock=False),
    "t5-relu-heads": Kind("t5-relu", by_plan("t5-relu", "head", uneven_plan), stock=False),
    "t5-relu-channels": Kind("t5-relu", by_plan("t5-relu", "channel", uneven_plan), stock=False),
    "t5-bfloat16": Kind("t5-gated", by_plan("t5-gated", "channel", uneven_plan), stock=False, dtype="bfloat16"),
    "t5-twice": Kind("t5-gated", twice("t5-gated"), stock=False),
    "bert-float64": Kind("bert-sequence", by_plan("bert-sequence", "head", uniform_plan), stock=False, dtype="float64"),
    "bert-channels": Kind("bert-token", by_plan("bert-token", "channel", uneven_plan), stock=False),
    "bart-ffn": Kind("bart", by_selection("bart", "ffn"), stock=True),
    "bart-uneven": Kind("bart", by_plan("bart", "channel", uneven_plan), stock=False),
    "marian-emptied": Kind("marian", by_plan("marian", "head", emptied_plan), stock=False),
    "mt5-uneven": Kind("mt5", by_plan("mt5", "head", uneven_plan), stock=False),
    "distilbert-uneven": Kind("distilbert", by_plan("distilbert", "channel", uneven_plan), stock=False),
    "electra-uneven": Kind("electra", by_plan("electra", "channel", uneven_plan), stock=False),
    "modernbert-ffn": Kind("modernbert", by_selection("modernbert", "ffn"), stock=True),
    "modernbert-uneven": Kind("modernbert", by_plan("modernbert", "channel", uneven_plan), stock=False),
    "modernbert-emptied": Kind("modernbert", by_plan("modernbert", "head", emptied_plan), stock=False),
    "mqa-uniform": Kind("llama-mqa", by_plan("llama-mqa", "head", uniform_plan), stock=True),
    "mistral-uniform": Kind("mistral", by_plan("mistral", "head", uniform_plan), stock=True),
    "gemma2-uneven": Kind("gemma2", by_plan("gemma2", "channel", uneven_plan), stock=False),
    "gpt2-ffn": Kind("gpt2", by_selection("gpt2", "ffn"), stock=True),
    "gpt2-heads": Kind("gpt2", by_plan("gpt2", "head", uniform_plan), stock=False),
    "gpt2-uneven": Kind("gpt2", by_plan("gpt2", "channel", uneven_plan), stock=False),
    "gpt2-emptied": Kind("gpt2", by_plan("gpt2", "head", emptied_plan), stock=False),
    "opt-uneven": Kind("opt", by_plan("opt", "channel", uneven_plan), stock=False),
    "llama-heads": Kind("llama", by_plan("llama", "head", uneven_plan), stock=False),
    "llama-channels": Kind("llama", by_plan("llama", "channel", uneven_plan), stock=False),
    "qwen3-channels": Kind("qwen3", by_plan("qwen3", "channel", uneven_plan), stock=False),
    "t5-emptied": Kind("t5-gated", by_plan("t5-gated", "head", emptied_plan), stock=False),
    "t5-emptied-channels": Kind("t5-relu", by_plan("t5-relu", "channel", emptied_plan), stock=False, dtype="bfloat16"),
    "t5-empty": Kind("t5-relu", by_plan("t5-relu", "head", empty_plan), stock=False),
    "bert-emptied": Kind("bert-sequence", by_plan("bert-sequence", "channel", emptied_plan), stock=False),
    "llama-emptied": Kind("llama", by_plan("llama", "channel", emptied_plan), stock=False),
    "qwen3-empty": Kind("qwen3", by_plan("qwen3", "head", empty_plan), stock=False),
    "gemma3-emptied": Kind("gemma3", by_plan("gemma3", "head", emptied_plan), stock=False, dtype="bfloat16"),
    "gemma3-heads": Kind("gemma3", by_plan("gemma3", "head", uneven_plan), stock=False),
}

# One process loads all folders, because the import of transformers takes longer than everything else. A load has a folder, a
# class that loads it, and a file for its output.
SCRIPT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
report = {}
for load in json.load(open(sys.argv[1])):
    try:
        if load["auto"] == "secateur":
            import secateur
            model = secateur.load(load["folder"])
        else:
            auto = getattr(transformers, load["auto"])
            model = auto.from_pretrained(load["folder"], dtype="auto", trust_remote_code=load["trust"])
        # In MKL a product's rounding may depend on the memory address of its operands, which the folder does not determine.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        with torch.inference_mode():
            output = model(**load_file(load["inputs"]))
        save_file({"output": (output.logits if "logits" in output else output[0]).contiguous()}, load["output"])
        report[load["name"]] = f"{type(model).__name__} {model.training} {next(model.parameters()).dtype}"
    except Exception as error:
        report[load["name"]] = f"{type(error).__name__}: {error}"
print("REPORT" + json.dumps(report))
"""


def run(loads: list[dict[str, Any]], folder: Path, *, blocked: bool) -> dict[str, str]:
    """Load folders in a new process, with secateur blocked or not. Returns the process's report on every load, by name."""
    path = folder / f"loads-{blocked}.json"
    path.write_text(json.dumps(loads))
    output = run_script(BLOCK_SECATEUR + SCRIPT if blocked else SCRIPT, folder, str(path))
    report: dict[str, str] = json.loads(output.partition("REPORT")[2])
    return report


def base_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the output of AutoModel's model: the first output of the base model."""
    body = model if model.config.is_encoder_decoder else model.base_model
    if not model.config.is_encoder_decoder:
        return body(**inputs)[0]  # type: ignore[no-any-return]
    return model(**inputs, output_hidden_states=True).decoder_hidden_states[-1]  # type: ignore[no-any-return]


@dataclass
class SavedModels:
    """The saved folders, the expected outputs, and the reports of the new processes that loaded the folders."""

    root: Path
    expected: dict[str, Tensor]
    base: dict[str, Tensor]
    reports: dict[str, str]

    def output(self, name: str) -> Tensor:
        assert (self.root / f"{name}.output").exists(), self.reports[name]
        output: Tensor = load_file(self.root / f"{name}.output")["output"]
        return output


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> SavedModels:
    root = tmp_path_factory.mktemp("export")
    torch.set_num_threads(1)
    expected: dict[str, Tensor] = {}
    base: dict[str, Any] = {}
    alone: list[Any] = []
    with_secateur: list[Any] = []
    for name, kind in KINDS.items():
        case = CASES[kind.case]
        model = kind.cut(case.model(DTYPES[kind.dtype]))
        secateur.save(model, root / name, tokenizer=case.task.reader)
        # The loaded model is saved again: nothing may be lost the second time.
        secateur.save(secateur.load(root / name), root / f"{name}-again", tokenizer=case.task.reader)
        batch = case.batches(model, 1000)[0]
        inputs = dict(batch.inputs)
        if case.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)  # type: ignore[operator]
        save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, root / f"{name}.inputs")
        with torch.inference_mode():
            expected[name] = model(**inputs).logits
            base[name] = base_output(model, inputs)
        for load, folder, auto in (
            (name, name, case.auto_class),
            (f"{name}-again", f"{name}-again", case.auto_class),
            (f"{name}-base", name, "AutoModel"),
            (f"{name}-untrusted", name, case.auto_class),
            (f"{name}-secateur", name, "secateur"),
        ):
            trust = not kind.stock and not load.endswith("untrusted")
            about = {"name": load, "folder": str(root / folder), "auto": auto, "trust": trust}
            about |= {"inputs": str(root / f"{name}.inputs"), "output": str(root / f"{load}.output")}
            (with_secateur if auto == "secateur" else alone).append(about)
    reports = run(alone, root, blocked=True) | run(with_secateur, root, blocked=False)
    return SavedModels(root, expected, base, reports)


every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_auto_classes_load_a_pruned_model_without_secateur(saved_models: SavedModels, name: str) -> None:
    assert torch.equal(saved_models.output(name), saved_models.expected[name]), saved_models.reports[name]
    assert saved_models.expected[name].dtype == DTYPES[KINDS[name].dtype]
    assert " False " in saved_models.reports[name]  # The model is in eval mode, as from_pretrained returns it.


@every_kind
def test_auto_model_loads_its_base_model(saved_models: SavedModels, name: str) -> None:
    assert torch.equal(saved_models.output(f"{name}-base"), saved_models.base[name])


@every_kind
def test_secateur_load_gives_the_same_logits(saved_models: SavedModels, name: str) -> None:
    assert torch.equal(saved_models.output(f"{name}-secateur"), saved_models.expected[name])


@every_kind
def test_a_loaded_model_saved_again_is_the_same(saved_models: SavedModels, name: str) -> None:
    assert torch.equal(saved_models.output(f"{name}-again"), saved_models.expected[name])
    first, second = ({path.name: path for path in (saved_models.root / n).iterdir()} for n in (name, f"{name}-again"))
    assert set(first) == set(second)
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        assert json.loads(first[file].read_text()) == json.loads(second[file].read_text()), file
    weights = [load_file(files["model.safetensors"]) for files in (first, second)]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@every_kind
def test_remote_code_runs_only_with_trust_remote_code(saved_models: SavedModels, name: str) -> None:
    if KINDS[name].stock:
        assert torch.equal(saved_models.output(f"{name}-untrusted"), saved_models.expected[name])
    else:
        # transformers' own class is tried. It refuses the shapes of the weights, or a config with fields of layers.
        report = saved_models.reports[f"{name}-untrusted"]
        assert "ignore_mismatched_sizes" in report or "is a per-layer attribute" in report
        assert not (saved_models.root / f"{name}-untrusted.output").exists()


@every_kind
def test_a_folder_has_no_pickle_and_has_code_only_where_transformers_needs_it(saved_models: SavedModels, name: str) -> None:
    files = {path.name for path in (saved_models.root / name).iterdir()}
    assert {path.rpartition(".")[2] for path in files} <= {"safetensors", "json", "py"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert ("modeling_secateur.py" in files) == (not KINDS[name].stock)
    config = json.loads((saved_models.root / name / "config.json").read_text())
    assert ("secateur" in config) == ("auto_map" in config) == (not KINDS[name].stock)
    assert not any(architecture.startswith("Pruned") for architecture in config["architectures"])


def test_an_auto_class_loads_a_head_that_no_task_of_secateur_uses(tmp_path: Path) -> None:
    model = BertForMultipleChoice(CASES["bert-sequence"].model().config).eval()
    plan = uneven_plan(CASES["bert-sequence"], "head")
    pruned = prune(model, secateur.Plan(dict(plan), plan.sites, fingerprint(model)))
    secateur.save(pruned, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForMultipleChoice"] == "modeling_secateur.PrunedBertForMultipleChoice"
    loaded = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(12).view(1, 2, 6)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, secateur.load(tmp_path / "out")(input_ids=ids).logits)


@every_kind
def test_a_pruned_folder_is_smaller_than_the_dense_one(saved_models: SavedModels, name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    secateur.save(CASES[kind.case].model(DTYPES[kind.dtype]), tmp_path / "dense")
    pruned, dense = ((folder / "model.safetensors").stat().st_size for folder in (saved_models.root / name, tmp_path / "dense"))
    saved = sum(p.numel() * p.element_size() for p in CASES[kind.case].model(DTYPES[kind.dtype]).parameters()) / 20
    assert pruned < dense - saved


def test_saving_leaves_no_temporary_files(saved_models: SavedModels) -> None:
    assert not [path.name for path in saved_models.root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama"])
def test_a_dense_model_is_saved_unchanged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    secateur.save(model, tmp_path / "dense")
    loaded = secateur.load(tmp_path / "dense")
    assert type(loaded) is type(model)
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert {path.rpartition(".")[2] for path in map(str, (tmp_path / "dense").iterdir())} == {"safetensors", "json"}


def test_extra_files_are_written_into_the_folder(tmp_path: Path) -> None:
    secateur.save(CASES["llama"].model(), tmp_path / "out", extra={"report.json": '{"a": 1}\n'})
    assert (tmp_path / "out" / "report.json").read_text() == '{"a": 1}\n'


def test_load_passes_its_options_to_transformers(saved_models: SavedModels) -> None:
    model = secateur.load(saved_models.root / "t5-relu-heads", dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["t5-relu-heads", "llama-channels", "t5-twice", "t5-emptied", "llama-emptied"])
def test_a_loaded_model_evaluates_and_generates_as_the_saved_one(saved_models: SavedModels, name: str) -> None:
    """The loaded model has the same accuracy and generates the same tokens as the saved one."""
    case, model = CASES[KINDS[name].case], secateur.load(saved_models.root / name)
    saved = KINDS[name].cut(case.model())
    result, expected = (secateur.evaluate(m, case.task, case.examples) for m in (model, saved))
    assert result.value == pytest.approx(expected.value, rel=1e-5)
    options: dict[str, Any] = {"input_ids": torch.tensor([[2, 7, 9, 12]]), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), saved.generate(**options))  # type: ignore[operator]


def test_a_loaded_model_can_be_pruned_again(saved_models: SavedModels) -> None:
    case, model = CASES["t5-relu"], secateur.load(saved_models.root / "t5-relu-heads")
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    pruned = secateur.prune(model, plan)
    assert secateur.verify(model, pruned, plan, case.task, case.batches(model)).holds


def mean_pooled(self: Any, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> SequenceClassifierOutput:
    """A forward method of a user's class: it classifies the mean of the states."""
    states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(states)
    return SequenceClassifierOutput(logits=self.classifier((states * mask).sum(1) / mask.sum(1)))


class MeanPooled(BertForSequenceClassification):  # type: ignore[misc]
    """A subclass with a forward method of its own."""

    forward = mean_pooled


class OwnClassifier(BertPreTrainedModel):  # type: ignore[misc]
    """A class outside transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert, self.classifier = BertModel(config, add_pooling_layer=False), nn.Linear(config.hidden_size, 3)
        self.post_init()

    forward = mean_pooled


class Renamed(BertForSequenceClassification):  # type: ignore[misc]
    """A subclass that changes nothing."""


def pruned_bert(kind: type[Any], make_plan: Any) -> nn.Module:
    """Return a pruned model of this class."""
    case = CASES["bert-sequence"]
    model = kind(case.model().config).eval()
    plan = make_plan(case, "head")
    return prune(model, secateur.Plan(dict(plan), plan.sites, fingerprint(model)))


@pytest.mark.parametrize("kind", [MeanPooled, OwnClassifier])
def test_a_class_that_a_folder_cannot_name_is_refused_before_anything_is_written(kind: type[Any], tmp_path: Path) -> None:
    with pytest.raises(secateur.InputError, match=rf"^model: expected a class of transformers, .* got {kind.__name__}; save a"):
        secateur.save(pruned_bert(kind, uneven_plan), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [MeanPooled, OwnClassifier])
def test_a_class_of_ones_own_loads_the_folder_of_a_uniform_plan(kind: type[Any], tmp_path: Path) -> None:
    case = CASES["bert-sequence"]
    model = kind(case.model().config).eval()
    pruned = prune(model, secateur.plan(secateur.attribute(model, case.task, case.examples, select="ffn"), keep=0.5))
    secateur.save(pruned, tmp_path / "out")
    assert torch.equal(case.logits(kind.from_pretrained(tmp_path / "out").eval()), case.logits(pruned))
    with pytest.raises(secateur.InputError, match=rf"^model: expected a class of transformers in .*, got '{kind.__name__}'$"):
        secateur.load(tmp_path / "out")


def test_a_subclass_that_changes_nothing_is_saved_as_its_base(tmp_path: Path) -> None:
    pruned = pruned_bert(Renamed, uneven_plan)
    secateur.save(pruned, tmp_path / "out")
    case = CASES["bert-sequence"]
    assert torch.equal(case.logits(secateur.load(tmp_path / "out").eval()), case.logits(pruned))


def test_a_head_of_ones_own_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """transformers' class would build a classifier with other weights, drawn at random."""
    pruned: Any = pruned_bert(BertForSequenceClassification, uneven_plan)
    pruned.classifier = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    with pytest.raises(secateur.InputError, match=r"BertForSequenceClassification, got other weights: classifier\.0\.bias, cl"):
        secateur.save(pruned, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_folders_own_code_can_be_saved_again(tmp_path: Path) -> None:
    pruned = pruned_bert(BertForSequenceClassification, uneven_plan)
    secateur.save(pruned, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    secateur.save(loaded, tmp_path / "again")
    case = CASES["bert-sequence"]
    assert torch.equal(case.logits(secateur.load(tmp_path / "again").eval()), case.logits(pruned))


@pytest.mark.parametrize(("kept", "stock"), [(0.75, False), (0.5, True)])
def test_heads_that_do_not_divide_the_hidden_size_are_no_stock_shape(kept: float, stock: bool, tmp_path: Path) -> None:
    """Six heads and a hidden size of 32: LlamaConfig refuses them when it is saved or loaded."""
    case = CASES["llama"]
    config = LlamaConfig(
        vocab_size=len(case.task.reader), hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=36, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples, select="attention"), keep=kept)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config)
    assert secateur.dry_run(shapes, given=plan).stock == stock
    pruned = prune(model, plan)
    secateur.save(pruned, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_secateur.py").exists() != stock
    assert torch.equal(case.logits(secateur.load(tmp_path / "out").eval()), case.logits(pruned))


def test_an_attention_that_computes_its_scale_from_the_size_of_its_heads_is_refused() -> None:
    """BERT of transformers 4 does. There, narrower heads would change the scale in silence."""
    model: Any = CASES["bert-token"].model()
    path, attention = next((path, module) for path, module in model.named_modules() if hasattr(module, "attention_head_size"))
    recipe = {"modules": {}, "attributes": {path: {"attention_head_size": attention.attention_head_size - 1}}}
    rebuild_(copy.deepcopy(model), recipe)
    del attention.scaling
    with pytest.raises(RuntimeError, match="expected an attention that holds its scale, as in transformers 5"):
        rebuild_(model, recipe)
