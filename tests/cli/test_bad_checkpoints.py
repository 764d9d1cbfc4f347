"""Models, tokenizers and families that do not fit: one line names the argument, and nothing is written."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import transformers
from cases import CASES, CLASSES, LABELS, piece_tokenizer, word_tokenizer
from torch import nn

import secateur
from secateur.cli import main
from secateur.cli.commands.multitask import load_encoder
from secateur.flow.loaded import load_model
from secateur.model import families
from secateur.model.branches import Attention, Branch, FeedForward
from secateur.model.families import registry
from secateur.model.families.bert import BERT
from secateur.model.families.llama import LLAMA
from secateur.support.errors import InputError
from secateur.tasks import fitting

Run = Callable[[str], str]
BERT_CASE, T5_CASE = CASES["bert-sequence"], CASES["t5-gated"]
GOOD = [{"input": "the cat sat", "target": "yes"}, {"input": "a bird flew", "target": "no way"}]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command that must end with exit code 2, one line and no new file; returns the line."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> str:
        before = sorted(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", ["secateur", *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 2, captured.err
        assert captured.out == ""
        (message,) = captured.err.splitlines()
        assert sorted(Path().rglob("*")) == before
        return message.removeprefix("secateur: ")

    return command


def saved(case: Any, name: str, tokenizer: Any = None, **changes: Any) -> None:
    """Save the case's model as a folder, with changes to its config."""
    secateur.save(case.model(), name, tokenizer=tokenizer or case.task.reader)
    path = Path(name) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    rows = [{"input": row["input"], "target": row["target"]} for row in case.examples]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_encoder_for_text_to_text(run: Run) -> None:
    saved(BERT_CASE, "m")
    message = run("prune m --task text-to-text --data data.jsonl --keep 0.5 --out d")
    assert message.startswith("task: expected sequence-classification or token-classification or causal-lm for 'm'")
    assert message.endswith("for the architecture 'bert', got 'text-to-text'")


def test_an_encoder_decoder_as_a_decoder(run: Run) -> None:
    saved(T5_CASE, "m")
    message = run("attribute m --task causal-lm --data data.jsonl --out s")
    assert message.startswith("task: expected text-to-text or ")
    assert message.endswith("for the architecture 't5', got 'causal-lm'")


def test_a_task_of_another_kind_of_model() -> None:
    text = secateur.TextToText(word_tokenizer(start=False, end=True), labels=LABELS)
    classes = secateur.SequenceClassification(piece_tokenizer(), labels=CLASSES)
    for model, task, expected in (
        (BERT_CASE.model(), text, "one of AutoModelForSeq2SeqLM for TextToText, got a BertForSequenceClassification"),
        (T5_CASE.model(), classes, "one of AutoModelForSequenceClassification for .*, got a T5ForConditionalGeneration"),
    ):
        for call in (secateur.evaluate, secateur.attribute):
            with pytest.raises(secateur.InputError, match=f"^model: expected {expected}"):
                call(model, task, GOOD)


@pytest.mark.parametrize(
    ("about", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_quantised_checkpoints(run: Run, about: dict[str, Any], method: str) -> None:
    saved(BERT_CASE, "m", quantization_config=about)
    for line in ("attribute m --data data.jsonl --out s", "sites m", "prune m --dry-run --keep 0.5"):
        message = run(line)
        assert message.startswith("model: expected ordinary weights (float32, float16 or bfloat16), got 'm', quantised by")
        assert f"quantised by {method}: load it dequantised" in message


def sentencepiece_folder(case: str, tokenizer_class: str, *files: str) -> None:
    """A folder whose tokenizer is read with sentencepiece: no tokenizer.json, only files of the kind that it reads."""
    secateur.save(CASES[case].model(), "m")
    Path("m/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    Path("m/vocab.json").write_text(json.dumps({"<pad>": 0, "</s>": 1, "<unk>": 2}))
    for file in files:
        Path("m", file).write_bytes(b"pieces")
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))


MISSING_PACKAGE = "to be installed, which the tokenizer of 'm' needs, got none; pip install 'secateur[sentencepiece]'"


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize(
    "line",
    ["prune m --task text-to-text --data data.jsonl --keep 0.5 --out d", "evaluate m --task text-to-text --data data.jsonl"],
)
@pytest.mark.parametrize(
    "folder", [("marian", "MarianTokenizer", "source.spm", "target.spm"), ("t5-gated", "T5Tokenizer", "spiece.model")]
)
def test_a_tokenizer_that_needs_sentencepiece(run: Run, line: str, folder: tuple[str, ...]) -> None:
    sentencepiece_folder(*folder)
    message = run(line)
    assert message.startswith("tokenizer: expected sentencepiece")
    assert message.endswith(MISSING_PACKAGE)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("\nMarianTokenizer requires the SentencePiece library but it was not found in your environment.\n"),
        ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."),
        ImportError("requires the protobuf library but it was not found in your environment."),
    ],
    ids=["sentencepiece", "tiktoken", "protobuf"],
)
def test_what_transformers_says_without_sentencepiece(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    sentencepiece_folder("marian", "MarianTokenizer")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(fitting, "_installed", lambda module: False)
    message = run("prune m --task text-to-text --data data.jsonl --keep 0.5 --out d")
    assert message == f"tokenizer: expected sentencepiece and protobuf {MISSING_PACKAGE}"
    # With both packages the error is another one, and it is not reworded.
    monkeypatch.setattr(fitting, "_installed", lambda module: True)
    with pytest.raises(type(error), match=re.escape(str(error).strip())):
        fitting.read_tokenizer("m")


@pytest.mark.parametrize("name", ["m/weights-q4.gguf", "m"])
def test_gguf_files(run: Run, name: str) -> None:
    Path("m").mkdir()
    Path("m/weights-q4.gguf").write_bytes(b"GGUF")
    message = run(f"sites {name}")
    assert message.startswith(
        "model: expected a folder of safetensors, got the GGUF file 'm/weights-q4.gguf': load it dequantised"
    )
    assert "gguf_file='weights-q4.gguf'" in message


def hub_error(kind: str) -> Exception:
    """An error of huggingface_hub, built without its constructor, which needs a response of the Hub."""
    error_type: Any = getattr(huggingface_hub.errors, kind)
    error: Exception = error_type.__new__(error_type)
    error.args = ("403 Client Error.\nCannot access gated repo",)
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "model: 'owner/name' is gated on the Hub: ask for access on its page, then run `hf auth login`"),
        (
            "RepositoryNotFoundError",
            "model: no such model folder or Hub model: 'owner/name' (if it is private: run `hf auth login`)",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_models_that_the_hub_refuses(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str, wrapped: bool
) -> None:
    """The Hub's own exception, alone or as the cause of the OSError that transformers raises."""

    def refuse(*_: Any, **__: Any) -> None:
        if not wrapped:
            raise hub_error(kind)
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it") from hub_error(kind)

    monkeypatch.setattr("secateur.flow.loaded.model_place", lambda name: name)  # The Hub has the name.
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    assert run("sites owner/name").startswith(expected)


OWN_CODE = """
from pathlib import Path
Path({file!r}).write_text("ran")
from transformers import BertConfig, BertTokenizerFast
class Own(BertConfig):
    model_type = "own"
class OwnTokenizer(BertTokenizerFast):
    pass
"""


def own_code_folder(part: str) -> None:
    """Write the folder "m", of which a part names code of the folder's own. The code writes the file "ran"."""
    saved(BERT_CASE, "m")
    Path("m/own.py").write_text(OWN_CODE.format(file=str(Path("ran").absolute())))
    name, changes = {
        "config": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        "model": ("config.json", {"architectures": ["Own"], "auto_map": {"AutoModelForSequenceClassification": "own.Own"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    }[part]
    path = Path("m", name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
@pytest.mark.parametrize(
    "line",
    [
        "prune m --task sequence-classification --data data.jsonl --keep 0.5 --lengths 8 --out d",
        "score m --task sequence-classification --data data.jsonl --column input --out d",
    ],
)
def test_a_folders_own_code_does_not_run(run: Run, monkeypatch: pytest.MonkeyPatch, line: str, part: str) -> None:
    own_code_folder(part)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    message = run(line)
    assert message.startswith(
        "model: expected a model and a tokenizer of classes in transformers, got 'm', which brings its own"
    )
    assert sys.stdin.read() == "y\ny\n"  # Nothing was asked.
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_folders_own_code_does_not_run_in_library_calls(run: Run, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    own_code_folder(part)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    with pytest.raises(InputError, match="own code"):
        load_model("m", task="sequence-classification", device="cpu", dtype="auto")
    with pytest.raises(InputError, match="own code"):
        load_encoder("m")
    assert not Path("ran").exists()


def test_secateurs_own_folders_load_without_their_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = T5_CASE.model()
    scores = secateur.attribute(model, T5_CASE.task, T5_CASE.examples)
    secateur.save(
        secateur.prune(model, secateur.plan(scores, flops=0.5, allocation="global")), "m", tokenizer=T5_CASE.task.reader
    )
    assert "auto_map" in json.loads(Path("m/config.json").read_text())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert load_model("m", task=None, device="cpu", dtype="auto").task == "text-to-text"


def test_a_tokenizer_of_another_model(run: Run) -> None:
    longer = piece_tokenizer()
    longer.add_tokens(["one", "two", "three"])
    pieces = len(longer)
    saved(BERT_CASE, "m", tokenizer=longer)
    expected = (
        f"tokenizer: expected at most {pieces - 3} pieces, the rows of the model's embedding, got a tokenizer with {pieces}"
    )
    assert run("evaluate m --data data.jsonl").startswith(expected)
    task = secateur.SequenceClassification(longer)
    for call in (secateur.evaluate, secateur.attribute):
        with pytest.raises(secateur.InputError, match=f"^{expected}"):
            call(BERT_CASE.model(), task, BERT_CASE.examples)


def test_an_embedding_padded_to_more_rows_is_accepted() -> None:
    model: Any = BERT_CASE.model()
    wanted = secateur.evaluate(model, BERT_CASE.task, BERT_CASE.examples)
    model.resize_token_embeddings(64)
    assert secateur.evaluate(model, BERT_CASE.task, BERT_CASE.examples) == wanted


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """A model of a changed family: one of secateur's families with other branches."""

    def make(change: Callable[[Branch], Branch], family: families.Family = BERT, case: str = "bert-sequence") -> nn.Module:
        def branches(model: nn.Module) -> Iterator[Branch]:
            yield from map(change, family.branches(model))

        changed = replace(family, model_types=("outsider",), branches=branches)
        monkeypatch.setattr(registry, "_FAMILIES", [changed, *registry._FAMILIES])
        model = CASES[case].model()
        config: Any = model.config
        config.model_type = "outsider"
        return model

    return make


def of_attention(**changes: Any) -> Callable[[Branch], Branch]:
    return lambda branch: replace(branch, **changes) if isinstance(branch, Attention) else branch


def of_ffn(**changes: Any) -> Callable[[Branch], Branch]:
    return lambda branch: replace(branch, **changes) if isinstance(branch, FeedForward) else branch


def forgetful(branch: Branch) -> Branch:
    return Attention(branch.name, "self_attention", "encoder", branch.layer)  # type: ignore[call-arg]


WRONG: dict[str, tuple[Callable[[Branch], Branch], str]] = {
    "a path that the model lacks": (
        of_attention(query="bert.encoder.layer.0.attention.self.q"),
        r"family: 'outsider', encoder.0.self_attention, query: expected the path of a module of the model, got '.*self.q' \(",
    ),
    "a path of no linear layer": (
        of_ffn(output="bert.encoder.layer.0"),
        "family: 'outsider', encoder.0.ffn, output: expected the path of a linear layer, got 'bert.*layer.0', a BertLayer",
    ),
    "forgotten fields": (forgetful, "family: expected .*, got from 'outsider': .*missing .* 'path', 'query', 'key', 'value'"),
    "another number of heads": (
        of_attention(heads=5, groups=5),
        "family: 'outsider', encoder.0.self_attention, query: expected 30 outputs of 'bert.*query', got 24",
    ),
    "another number of groups": (
        of_attention(groups=2),
        "family: 'outsider', encoder.0.self_attention, key: expected 12 outputs of 'bert.*key', got 24",
    ),
    "another width": (
        of_ffn(width=36),
        r"family: 'outsider', encoder.0.ffn, inputs\[0\]: expected 36 outputs of 'bert.*intermediate.dense', got 37",
    ),
    "projections in the wrong order": (
        lambda branch: (
            replace(branch, inputs=(branch.output,), output=branch.inputs[0]) if isinstance(branch, FeedForward) else branch
        ),
        r"family: 'outsider', encoder.0.ffn, inputs\[0\]: expected 37 outputs of 'bert.*output.dense', got 24",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_family_that_does_not_fit(outside: Callable[..., nn.Module], name: str) -> None:
    change, expected = WRONG[name]
    model = outside(change)
    with pytest.raises(secateur.InputError, match=f"^{expected}") as caught:
        secateur.sites(model)
    assert "\n" not in str(caught.value)


def test_a_family_that_reads_an_attribute_which_the_model_lacks(outside: Callable[..., nn.Module]) -> None:
    model: Any = outside(lambda branch: branch)
    del model.bert.encoder.layer[0].attention.self.attention_head_size
    with pytest.raises(secateur.InputError, match=r"^family: expected .*, got from 'outsider': .*'attention_head_size'"):
        secateur.sites(model)


def test_grouped_heads_are_checked_as_groups(outside: Callable[..., nn.Module]) -> None:
    assert secateur.sites(outside(lambda branch: branch, LLAMA, "llama"))
    with pytest.raises(secateur.InputError, match=r"key: expected 36 outputs of 'model.layers.0.self_attn.k_proj', got 18"):
        secateur.sites(outside(of_attention(groups=6), LLAMA, "llama"))


def test_only_families_can_be_registered() -> None:
    with pytest.raises(secateur.InputError, match=r"^family: expected a secateur.families.Family, got dict"):
        families.register({"model_types": ("bert",)})  # type: ignore[arg-type]
