"""Files of learned models and ledgers with one damaged field: one line names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import still_encoder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from secateur import InputError
from secateur.learned.ldnet.folders import LMConfig, load_lm, load_tagger, save_lm, save_tagger
from secateur.learned.ldnet.tagger import Tagger, TaggerSettings, Vocabularies
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.learned.multitask.encoder_tasks import Classification, Regression, Span
from secateur.learned.multitask.exporting import SPARSE, load, save
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.sparse import save_sparse
from secateur.support.ledger import CELLS, Ledger

GONE = object()
HUGE = 10**6  # The weights of this width would take terabytes.
WORDS = Vocabulary(["<unk>", "<s>", *"abcdefgh"])
# By the type of a field: values of other types, and values out of range.
WRONG: dict[type, list[Any]] = {
    int: [GONE, None, "3", 2.5, True, [3], -1, HUGE, 10**30],
    float: [GONE, None, "0.5", True, [0.5], -0.5, 1.5, float("nan"), float("inf")],
    str: [GONE, None, 3, ["x"], "x"],
    list: [GONE, None, 3, "x", ["x", 3], [[1]]],
    dict: [GONE, None, 3, "x", ["x"]],
}


def damaged(content: dict[str, Any], fields: list[str], skip: Callable[[str, Any], bool]) -> Iterator[tuple[str, Any, str]]:
    """Yield the field, its damaged value, and the text of the damaged file."""
    for field in fields:
        for value in WRONG[type(content[field])]:
            if not skip(field, value):
                rest = {name: old for name, old in content.items() if name != field}
                yield field, value, json.dumps(rest if value is GONE else {**content, field: value})


def refused(load: Callable[[], Any], where: str, field: str, what: Any) -> None:
    with pytest.raises(InputError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message, what
    assert len(message) < 600, what
    assert message.startswith(where), (what, message)
    assert field in message, (what, message)


def tagger_folder(folder: Path) -> Callable[[], Any]:
    settings = TaggerSettings(
        tags=("O", "B-x"), scheme="bioes", lm_width=4, ahead=(3, 5), back=(4,), features=6, word_width=3, character_width=3,
        character_filters=4, hidden=5,
    )  # fmt: skip
    save_tagger(Tagger(settings, Vocabularies(WORDS, WORDS, WORDS)), folder)
    return lambda: load_tagger(folder)


def lm_folder(folder: Path) -> Callable[[], Any]:
    config = LMConfig(4, (3, 5), (4, 7), projection=16)
    save_lm(config.build(len(WORDS)), config, WORDS, folder)
    return lambda: load_lm(folder)


@pytest.mark.parametrize("make", [tagger_folder, lm_folder])
def test_fields_of_ldnet_folders(make: Callable[[Path], Callable[[], Any]], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    load, where = make(folder), f"model: '{folder}' cannot be loaded"
    load()
    path = folder / "config.json"
    content, text = json.loads(path.read_text()), path.read_text()
    for field, value, changed in damaged(content, [name for name in content if name != "kind"], lambda field, value: False):
        path.write_text(changed)
        # A width of another model is found by the shapes of the weights.
        shown = "model.safetensors: expected " if type(value) is int and value in (-1, HUGE) else field
        shown = "" if type(value) is int and value == -1 else shown
        refused(load, where, shown, (field, value))
    path.write_text(json.dumps({**content, "depth": 3}))
    refused(load, where, "'depth'", "an unknown field")
    path.write_text(text)
    path = folder / "vocabulary.json"
    content = json.loads(path.read_text())
    for field, value, changed in damaged(content, list(content), lambda field, value: False):
        path.write_text(changed)
        refused(load, where, "vocabulary", (field, value))
    path.write_text(json.dumps({name: words[:-1] for name, words in content.items()}))
    refused(load, where, "model.safetensors: expected ", "a word less")


def test_fields_of_the_tasks_of_a_multitask_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tasks: Any = {"mood": Classification(("x", "y")), "size": Regression(), "where": Span(stride=3, longest=5)}
    save(MultitaskModel(still_encoder(), tasks), folder, tokenizer=tokenizer())
    path, where = folder / "tasks.json", f"model: '{folder}' is no folder of a multitask model (tasks"
    content = json.loads(path.read_text())

    def load_it() -> Any:
        return load(folder)

    load_it()
    for field, value, changed in damaged(content, list(content), lambda field, value: False):
        path.write_text(changed)
        refused(load_it, where, field, value)
    for task, settings in content["tasks"].items():
        optional = [name for name in settings if name not in ("kind", "names")]

        # Another stride than the saved one is a setting, and one without a value has the default.
        def is_right(field: str, value: Any, known: list[str] = optional) -> bool:
            return (value is GONE and field in known) or value == HUGE

        for field, value, changed in damaged(settings, list(settings), is_right):
            path.write_text(json.dumps({**content, "tasks": {**content["tasks"], task: json.loads(changed)}}))
            refused(load_it, where, "", (task, field, value))
    for empty in ({}, {"mood": content["tasks"]["mood"]}):
        path.write_text(json.dumps({**content, "tasks": empty}))
        with pytest.raises(InputError, match=r"^model: .*(at least one task|are not those of its tasks)"):
            load_it()


def tokenizer() -> Any:
    from encoders import pair_tokenizer

    return pair_tokenizer()


def test_fields_of_sparse_checkpoints(tmp_path: Path) -> None:
    encoder, folder = still_encoder(), tmp_path / "m"
    layer = next(module for module in encoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    save(MultitaskModel(encoder, {"size": Regression()}), folder, tokenizer=tokenizer())
    path, where = folder / SPARSE, f"model: '{folder / SPARSE}' is not a sparse checkpoint"
    save_sparse(encoder, path)
    load(folder, sparse=True)
    with safe_open(path, framework="pt") as file:
        shapes, tensors = json.loads(file.metadata()["shapes"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (name,) = shapes
    rows, columns = shapes[name]

    def write(tensors: dict[str, Any], shapes: Any) -> None:
        save_file(tensors, path, metadata=None if shapes is GONE else {"shapes": json.dumps(shapes)})

    sizes: list[Any] = [
        None, "x", [rows], [rows, columns, 1], [-rows, -columns], [rows, 10**12], [0, columns], [rows, 2.5], [rows, 10**30],
    ]  # fmt: skip
    for value in (*WRONG[dict], *({name: size} for size in sizes), {"x": [2, 3]}):
        write(tensors, value)
        refused(lambda: load(folder, sparse=True), where, "", value)
    values, bits = tensors[f"{name}.values"], tensors[f"{name}.bits"]
    wrong: list[tuple[str, Any]] = [
        ("values", GONE), ("bits", GONE), ("values", values[1:]), ("values", values.view(1, -1)), ("bits", bits[1:]),
        ("bits", bits.int()), ("bits", 255 - bits[:0]), ("values", values * float("nan")),
    ]  # fmt: skip
    for part, tensor in wrong:
        rest = {key: old for key, old in tensors.items() if key != f"{name}.{part}"}
        write(rest if tensor is GONE else {**rest, f"{name}.{part}": tensor}, shapes)
        refused(lambda: load(folder, sparse=True), where, name, (part, tensor))
    dense = next(key for key in tensors if not key.endswith((".values", ".bits")))
    write({**tensors, dense: tensors[dense] * float("inf")}, shapes)
    refused(lambda: load(folder, sparse=True), where, dense, dense)


def test_fields_of_ledgers(tmp_path: Path) -> None:
    folder, kinds = tmp_path / "r", {"metric": str, "value": float, "steps": int}
    cell, results = {"task": "a", "rate": 0.5}, {"metric": "accuracy", "value": 0.75, "steps": 3}
    with Ledger(folder, {"seed": 0}, kinds) as ledger:
        ledger.add({"task": "b"}, results)
        ledger.add(cell, results)
    path, where = folder / CELLS, f"out: '{folder / CELLS}' is damaged in line 2; delete this line, and its cell is run again"
    first, second = path.read_text().splitlines()
    key, row = json.loads(second)

    def open_it() -> None:
        with Ledger(folder, {"seed": 0}, kinds):
            pass

    open_it()
    for field, value, changed in damaged(
        row, list(row), lambda field, value: field != "rate" and value in (-1, -0.5, 1.5, HUGE)
    ):
        if field != "metric" or value != "x":
            path.write_text(f"{first}\n{json.dumps([key, json.loads(changed)])}\n")
            refused(open_it, where, field, value)
    for line in ([key], [key, row, 1], [3, row], [key, [1]], [key, None], {"a": 1}, ["[1]", row], ["{", row], None, 3):
        path.write_text(f"{first}\n{json.dumps(line)}\n")
        refused(open_it, where, "", line)
    path.write_text(f"{first}\n{second}\n")
    for content in ("[]", "null", "{", '"x"', "3"):
        (folder / "settings.json").write_text(content)
        refused(open_it, f"out: '{folder / 'settings.json'}' is damaged; delete its folder to begin the run anew", "", content)
