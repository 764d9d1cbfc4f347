"""A folder's card and the lines that say how to use it: they are run, and their figures are the measured ones."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import CASES
from command import Run
from huggingface_hub import ModelCard

import secateur
from secateur.flow.compress import _call
from secateur.flow.loaded import load_model
from secateur.flow.model_card import name_of_data
from secateur.flow.usage import usage_of
from secateur.support.files import new_folder
from secateur.support.hub import Base, base_of

QUICK: dict[str, Any] = {"batch_sizes": [1], "lengths": [4], "recoveries": [None], "align": 1}
STOCK: dict[str, Any] = {"select": "ffn", "keep": 0.5, "allocation": "uniform"}
OWN_SHAPE: dict[str, Any] = {"keep": 0.6, "unit": "channel"}
FRONT = "---\nlicense: mit\nlanguage:\n- en\nbase_model: owner/first\ntags:\n- old\n---\n# dense\n"


def folder_of(name: str, out: Path, **options: Any) -> secateur.Compressed:
    case = CASES[name]
    return secateur.compress(case.model(), case.examples, case.task, out=out, **QUICK, **options)


@pytest.mark.parametrize("options", [STOCK, OWN_SHAPE], ids=["stock", "own-shape"])
@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bert-token", "llama", "vit"])
def test_the_lines_load_the_folder(name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    compressed = folder_of(name, Path("it's small"), **options)
    usage = compressed.usage("it's small")
    own = hasattr(compressed.pruned.config, "secateur")
    assert ("trust_remote_code=True" in usage.python()[-1]) == own
    assert len(usage.python()) == 3
    text = Path("it's small", "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\nfrom transformers.*?```", text, flags=re.DOTALL)
    assert block == "```python\n" + "\n".join(usage.python()) + "\n```"
    names: dict[str, Any] = {}
    exec("\n".join(usage.python()), names)
    state = compressed.pruned.state_dict()
    assert names["model"].state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in names["model"].state_dict().items())
    assert "tokenizer" in names or "processor" in names
    assert ("vllm serve" in usage.serving()) == (not own and name in ("bert-sequence", "bert-token", "llama"))


def test_the_lines_need_no_secateur(tmp_path: Path) -> None:
    compressed = folder_of("bert-sequence", tmp_path / "smaller", **OWN_SHAPE)
    code = "import sys; sys.modules['secateur'] = None\n" + "\n".join(compressed.usage(tmp_path / "smaller").python())
    code += "\nprint(type(model).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split()[-1] == "PrunedBertForSequenceClassification"


def test_without_an_auto_class_secateur_loads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    secateur.save(model, tmp_path / "f", task=case.task)
    monkeypatch.setattr("secateur.flow.usage.auto_model_classes", lambda *_: ())
    usage = usage_of(model, case.task, tmp_path / "f")
    names: dict[str, Any] = {}
    exec("\n".join(usage.python()), names)
    assert type(names["model"]) is type(model)
    assert usage.serving().startswith("it runs in secateur.load.")


def test_the_end_of_prune_shows_lines_that_work(run: Run) -> None:
    options = "--labels bad,good --examples 8 --keep 0.5 --allocation uniform --recover none --batch-sizes 1 --lengths 8"
    result = run(f"prune builtin --data train.jsonl --eval test.jsonl {options} --out smaller")
    assert result.code == 0
    shown = result.out.splitlines()
    python = shown[shown.index("load it:") + 1 :][:3]
    exec("\n".join(line.strip() for line in python), {})
    command = shown[shown.index("score with it:") + 1].strip()
    texts = [json.loads(line)["input"] for line in Path("test.jsonl").read_text().splitlines()[:4]]
    Path("documents").mkdir()
    pq.write_table(pa.table({"text": texts}), "documents/a.parquet")
    assert run(command.removeprefix("secateur ").replace("'", "") + " --compile off --threads 1 --max-tokens 256").code == 0
    assert any(Path("scored").rglob("*.parquet"))
    card = ModelCard.load("smaller/README.md")
    assert "```sh\nsecateur prune builtin --data train.jsonl --out smaller --eval test.jsonl --keep 0.5" in card.text
    assert "On `test.jsonl`, n = 48." in card.text
    (metric,) = card.data.eval_results or []
    assert metric.dataset_name == "test.jsonl"
    assert "`run.yaml` holds all options" in card.text
    again = re.findall(r"```sh\nsecateur (prune .*)\n", card.text)[0].replace("--out smaller", "--out again")
    assert run(again).code == 0
    assert Path("again", "plan.json").read_bytes() == Path("smaller", "plan.json").read_bytes()


def test_the_card_has_the_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES["bert-sequence"]
    secateur.save(case.model(), "dense", task=case.task, extra={"README.md": FRONT})
    compressed = secateur.compress("dense", case.examples, evaluation=case.examples, out="small", **QUICK, **STOCK)
    card = ModelCard.load("small/README.md")
    data = card.data
    assert (data.base_model, data.license, data.language) == ("owner/first", "mit", ["en"])
    assert (data.library_name, data.pipeline_tag, data.tags) == (
        "transformers", "text-classification", ["secateur", "pruned"],
    )  # fmt: skip
    (result,) = data.eval_results or []
    pruned = compressed.comparison.evaluation["pruned"]
    assert (result.metric_type, result.metric_value) == (pruned.metric, pruned.value)
    assert f"{pruned.value:.4f} ({pruned.low:.4f} to {pruned.high:.4f})" in card.text
    assert f"n = {pruned.examples}." in card.text
    sizes = compressed.comparison.parameters
    assert (
        f"| parameters | {sizes['dense']:,} | {sizes['pruned']:,} | {1 - sizes['pruned'] / sizes['dense']:.1%} |" in card.text
    )
    kept, units = sum(map(len, compressed.plan.values())), sum(site.units for site in compressed.plan.sites)
    assert f"| neurons | {units:,} | {kept:,} | {1 - kept / units:.1%} |" in card.text
    assert f"Budget: {compressed.plan.budget}." in card.text
    environment = compressed.comparison.benchmark.environment
    assert environment["processor"] in card.text
    assert f"{compressed.comparison.benchmark.timings[0].speedup:.2f}x" in card.text
    images = re.findall(r"!\[\w+\]\((.+?)\)", card.text)
    assert sorted(images) == sorted(path.name for path in Path("small").glob("*.png"))
    call = (
        "secateur.compress('dense', examples, keep=0.5, evaluation=evaluation, out='small', select='ffn', allocation='uniform',"
    )
    assert call in card.text
    assert "`dense`" in card.text


def test_a_folder_inside_a_new_folder_is_called_by_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder("demo") as folder:
        folder_of("bert-sequence", folder / "model", **STOCK)
    card = Path("demo/model/README.md").read_text()
    assert "`demo/model` stands for the path of this folder." in card
    assert "from_pretrained('demo/model')" in card
    assert "partial" not in card.partition("## How to use it")[2]


def test_labels_and_prompts_are_in_the_card(tmp_path: Path) -> None:
    case = CASES["t5-gated"]
    task = secateur.TextToText(case.task.reader, labels=case.task.labels, prompt="the mood: {input}")
    model = case.model()
    plan = secateur.plan(secateur.attribute(model, task, case.examples), keep=0.5)
    compressed = secateur.compress(model, case.examples, task, plan=plan, **{**QUICK, "align": None})
    compressed.save(tmp_path / "small")
    text = (tmp_path / "small/README.md").read_text()
    assert "Labels (3): `yes`, `no way`, `maybe so then`." in text
    assert "the mood: {input}" in text
    assert "secateur.compress(model, examples, task, plan=plan, " in text
    assert "so neither model was evaluated" in text


def test_a_call_is_written_without_passwords() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(secateur.compress).parameters.items()}
    given |= {"model": Path("m"), "examples": "s3://me:word@bucket/a.jsonl", "labels": ["a", "b"], "flops": 0.5}
    assert _call(given) == "secateur.compress('m', 's3://***@bucket/a.jsonl', flops=0.5, labels=['a', 'b'])"
    assert name_of_data("s3://me:word@bucket/a.jsonl") == "s3://***@bucket/a.jsonl"


def test_layers_writes_a_card(run: Run) -> None:
    result = run("layers builtin --data train.jsonl --examples 16 --keep-layers 6 --out d --batch-sizes 1 --lengths 8")
    assert result.code == 0
    card = ModelCard.load("d/README.md")
    assert "| blocks | 7 | 6 | 14.3% |" in card.text
    assert "secateur layers builtin --data train.jsonl --out d --keep-layers 6" in card.text
    assert "load it:" in result.out


def test_save_with_a_task_leaves_what_later_commands_need(tmp_path: Path) -> None:
    case = CASES["t5-gated"]
    task = secateur.TextToText(case.task.reader, labels=["yes", "no way"], prompt="mood: {input}")
    secateur.save(case.model(), tmp_path / "f", task=task)
    loaded = load_model(str(tmp_path / "f"), task=None, device="cpu", dtype="auto")
    assert (loaded.task, loaded.labels, loaded.prompt) == ("text-to-text", ["yes", "no way"], task.prompt)

    class Own(secateur.TextToText):
        pass

    for wrong, message in (
        (Own(case.task.reader), "task: expected one of TextToText, "),
        ("text-to-text", "task: expected a Task"),
        (CASES["llama"].task, "model: expected one of AutoModelForCausalLM"),
    ):
        with pytest.raises(secateur.InputError) as caught:
            secateur.save(case.model(), tmp_path / "g", task=wrong)  # type: ignore[arg-type]
        assert str(caught.value).startswith(message)
    with pytest.raises(secateur.InputError, match=r"^tokenizer: expected one with save_pretrained"):
        secateur.save(case.model(), tmp_path / "g", tokenizer=object())
    assert not (tmp_path / "g").exists()


def test_a_base_is_named_by_its_folder_the_cache_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    known = {"license": "mit", "language": ["en"]}
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert base_of("owner/name") == Base(None, {})
    (snapshot / "config.json").write_text("{}")
    assert base_of("owner/name") == Base("owner/name", {})
    (snapshot / "README.md").write_text(FRONT)
    assert base_of("owner/name") == Base("owner/name", known)
    assert base_of(str(snapshot)) == Base("owner/name", known)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert base_of(str(plain)) == Base(None, {})
    (plain / "README.md").write_text(FRONT)
    assert base_of(str(plain)) == Base("owner/first", known)
    (plain / "README.md").write_text("---\n: [\n---\n")
    assert base_of(str(plain)) == Base(None, {})
    for name in ("", "/gone/from/here", "owner/other", "a/b/c"):
        assert base_of(name) == Base(None, {})
