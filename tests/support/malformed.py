"""Run commands and library calls on malformed inputs, each in a forked process, and tell how each of them ended.

`python malformed.py FIRST COUNT` runs COUNT inputs, the first of seed FIRST, and prints one JSON line for each. An input is
determined by its seed. It damages one valid file, or gives one option or argument a wrong value.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 40  # An input that takes longer hangs.
MEMORY = 6 << 30  # Bytes of address space that an input may add.


@dataclass(frozen=True)
class Input:
    """A malformed input.

    Attributes:
        kind: The kind of the input, such as "plan".
        about: The damage, for a reader.
        line: The arguments of the command; empty for a call of the library.
        call: The call of the library.
        out: Whether the command may leave `out` behind if it succeeds.
    """

    kind: str
    about: str
    line: tuple[str, ...] = ()
    call: Callable[[], Any] | None = None


def write_valid_files(root: Path) -> None:
    """Write one valid file or folder of each kind that secateur reads."""
    import torch
    from cases import CASES, random_scores, uneven_plan
    from ldnet_toys import LM_CONFIG, sentences, vocabulary, write_columns, write_text
    from transformers import AutoTokenizer

    import secateur
    from secateur.learned.ldnet.folders import save_lm, save_tagger
    from secateur.learned.ldnet.run import new_tagger
    from secateur.learned.multitask.encoder_tasks import Classification, Regression
    from secateur.learned.multitask.exporting import save as save_multitask
    from secateur.learned.multitask.model import MultitaskModel, encoder_of
    from secateur.planning.latency_table import LatencyTable

    torch.manual_seed(0)
    for name, case in (("bert", "bert-sequence"), ("token", "bert-token"), ("t5", "t5-gated"), ("llama", "llama")):
        secateur.save(CASES[case].model(), root / name, tokenizer=CASES[case].task.reader)
    bert = CASES["bert-sequence"]
    pruned = secateur.prune(bert.model(), uneven_plan(bert, "head"))
    remembered = json.dumps({"task": "sequence-classification", "labels": None})
    secateur.save(pruned, root / "pruned", tokenizer=bert.task.reader, extra={"secateur.json": remembered})
    t5 = CASES["t5-gated"]
    remembered = json.dumps({"task": "text-to-text", "labels": ["yes", "no way", "maybe so then"]})
    pruned = secateur.prune(t5.model(), uneven_plan(t5, "channel"))
    secateur.save(pruned, root / "pruned-t5", tokenizer=t5.task.reader, extra={"secateur.json": remembered})
    sharded: Any = bert.model()
    sharded.save_pretrained(root / "sharded", max_shard_size="8KB")
    bert.task.reader.save_pretrained(root / "sharded")
    scores = secateur.attribute(bert.model(), bert.task, bert.examples)
    scores.save(root / "scores.safetensors")
    ig = secateur.attribute(bert.model(), bert.task, bert.examples, criterion=secateur.IntegratedGradients(), per_example=True)
    ig.save(root / "ig.safetensors")
    random_scores("t5-gated", "channel").of("ffn").save(root / "other.safetensors")
    secateur.plan(scores, flops=0.6, allocation="global").save(root / "plan.json")
    branches = {site.name: {1: 0.1, site.units: 0.5} for site in scores.sites}
    LatencyTable({"torch": "2"}, scores.fingerprint, "head", 1, 8, 8, 4.0, branches, {}, {0.5: 1.0, 1.0: 1.5}).save(
        root / "latency.json"
    )
    rows = [{"input": row["input"], "target": row["target"]} for row in bert.examples]
    write_rows(root, "rows", rows)
    write_rows(root, "texts", [{"id": number, "text": row["input"]} for number, row in enumerate(rows)])
    write_rows(root, "t5rows", [{"input": row["input"], "target": row["target"]} for row in t5.examples])
    (root / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CASES["bert-token"].examples))
    tagged = [("the", "O"), ("cat", "B-PER"), ("sat", "I-PER")]
    (root / "tokens.conll").write_text("\n\n".join("\n".join(f"{w} {t}" for w, t in tagged) for _ in range(4)) + "\n")
    tagged_rows = [{"input": row["input"], "target": str(index % 2)} for index, row in enumerate(rows)]
    write_rows(root, "two", tagged_rows)
    write_text(root / "text", 30)
    write_columns(root / "columns.conll", 12)
    words = vocabulary(root / "text")
    models = LM_CONFIG.build(len(words))
    save_lm(models, LM_CONFIG, words, root / "lm")
    tagger = new_tagger(models, words, sentences(12), "bioes", features=8, word_width=8, hidden=8)
    save_tagger(tagger, root / "tagger")
    encoder = encoder_of(CASES["t5-gated"].model())
    tasks = {"one": Classification(("a", "b")), "two": Regression()}
    save_multitask(MultitaskModel(encoder, tasks), root / "multitask", tokenizer=t5.task.reader, sparse=True)
    AutoTokenizer.from_pretrained(root / "bert")
    settings = {
        "model": "multitask/encoder",
        "max_length": 16,
        "tasks": {"one": {"data": "two.jsonl", "eval": "two.jsonl", "labels": ["0", "1"]}},
        "pruning": {"method": "magnitude", "granularity": "element", "scope": "global", "density": 0.3},
        "learning_rates": {"weights": 1e-3},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 1},
        "pooling": "mean",
    }
    (root / "multitask.yaml").write_text(json.dumps(settings))


def write_rows(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL, CSV, TSV and Parquet."""
    import csv

    import pyarrow
    import pyarrow.parquet

    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(root / f"{name}.{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{name}.parquet")


FAST = ("--threads", "1")
SMALL = ("--batch-sizes", "1", "--lengths", "4")
LINES: dict[str, tuple[str, ...]] = {
    "sites": ("sites", "bert"),
    "attribute": ("attribute", "bert", "--data", "rows.jsonl", "--out", "out", *FAST),
    "plan": ("plan", "scores.safetensors", "--keep", "0.5", "--out", "out"),
    "plan-global": ("plan", "scores.safetensors", "--flops", "0.5", "--allocation", "global", "--out", "out"),
    "prune": ("prune", "bert", "--data", "rows.jsonl", "--keep", "0.5", "--recover", "bias", "--out", "out", *SMALL, *FAST),
    "prune-plan": ("prune", "bert", "--data", "rows.jsonl", "--plan", "plan.json", "--recover", "none", "--out", "out", *SMALL),
    "dry-run": ("prune", "bert", "--dry-run", "--flops", "0.5", *SMALL),
    "dry-run-plan": ("prune", "bert", "--dry-run", "--plan", "plan.json", *SMALL),
    "dry-run-scores": (
        *("prune", "bert", "--dry-run", "--flops", "0.5", "--allocation", "global", "--scores", "scores.safetensors"),
        *SMALL,
    ),
    "evaluate": ("evaluate", "bert", "--data", "rows.jsonl", *FAST),
    "benchmark": ("benchmark", "bert", "pruned", "--pairs", "3", *SMALL, *FAST),
    "sweep": (
        *("sweep", "bert", "--data", "rows.jsonl", "--eval", "rows.jsonl", "--keeps", "0.5", "--recover", "none"),
        *("--batch-size", "1", "--length", "4", "--out", "out", *FAST),
    ),
    "score": (
        *("score", "bert", "--data", "texts.jsonl", "--threads", "1", "--max-tokens", "256", "--compile", "off"),
        *("--out", "out", "--id-column", "id"),
    ),
    "layers": ("layers", "bert", "--data", "rows.jsonl", "--keep-layers", "1", "--out", "out", *SMALL, *FAST),
    "layer-gates": (
        *("layer-gates", "bert", "--data", "rows.jsonl", "--keep-layers", "1", "--steps", "1", "--batch-size", "2"),
        *("--out", "out", *SMALL, *FAST),
    ),
    "multitask": ("multitask", "multitask.yaml", "--out", "out", *FAST),
    "ldnet train-lm": (
        *("ldnet", "train-lm", "text", "--steps", "1", "--layers", "1", "--width", "4", "--embedding", "4"),
        *("--batch-size", "4", "--min-count", "1", "--out", "out", *FAST),
    ),
    "ldnet train-tagger": (
        *("ldnet", "train-tagger", "lm", "--data", "columns.conll", "--eval", "columns.conll", "--target-column", "3"),
        *(
            "--features",
            "4",
            "--word-width",
            "4",
            "--hidden",
            "4",
            "--epochs",
            "1",
            "--prune-epochs",
            "1",
            "--out",
            "out",
            *FAST,
        ),
    ),
    "ldnet tag": ("ldnet", "tag", "tagger", "text", *FAST),
}
TEXTS = [
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e400",
        "-0.0",
        "1e-320",
        "99999999999999999999",
        "100000000000000",
        "1e14",
        "0.3",
        "2",
    ),
    *("x", "", " ", "1,2,x", "0,0", "-1,5", "1,", ",", "0x10", "\u00b2", "\uff11", "1_0", "../x", "/", ".", "a" * 5000, "None"),
    *(
        "nan,0.5",
        "inf,1",
        "auto",
        "true",
        "-",
        "plan.json",
        "scores.safetensors",
        "rows.jsonl",
        "bert",
        "builtin",
        "cuda",
        "meta",
    ),
]


def options_of(name: str) -> list[str]:
    """Return the options of a command that take a value."""
    from secateur.cli.app import VERBS, load

    names = {" ".join(LINES[name][:words]) for words in (1, 2)}
    command = load(next(verb for verbs in VERBS.values() for verb in verbs if verb.name in names))
    return [p.opts[-1] for p in command.params if p.opts[0].startswith("-") and not getattr(p, "is_flag", False)]


# For each kind of input: the file that is damaged, how, and the commands that read it.
MODEL = ("sites", "dry-run", "evaluate", "attribute", "score", "prune", "layers", "benchmark")
Damage = Callable[[Random, bytes], bytes]


def file_kinds() -> dict[str, tuple[list[str], Damage, tuple[str, ...], dict[str, str]]]:
    """For each kind: the files, how they are damaged, the commands, and words of the command to replace."""
    from mutations import damaged_bytes, damaged_json, damaged_tensors

    return {
        "config": (["bert/config.json"], damaged_json, MODEL, {}),
        "config-t5": (
            ["t5/config.json"],
            damaged_json,
            ("sites", "evaluate", "dry-run"),
            {"bert": "t5", "rows.jsonl": "t5rows.jsonl"},
        ),
        "config-llama": (
            ["llama/config.json"],
            damaged_json,
            ("sites", "evaluate", "dry-run"),
            {"bert": "llama", "rows.jsonl": "t5rows.jsonl"},
        ),
        "weights": (["bert/model.safetensors"], damaged_tensors, ("evaluate", "attribute", "score", "prune"), {}),
        "weights-pruned": (["pruned/model.safetensors"], damaged_tensors, ("evaluate",), {"bert": "pruned"}),
        "index": (
            ["sharded/model.safetensors.index.json"],
            damaged_json,
            ("evaluate", "score", "attribute"),
            {"bert": "sharded"},
        ),
        "shard": (["sharded/model-00001-of-*.safetensors"], damaged_tensors, ("evaluate",), {"bert": "sharded"}),
        "tokenizer": (
            ["bert/tokenizer.json", "bert/tokenizer.json", "bert/tokenizer_config.json"],
            damaged_json,
            ("evaluate", "attribute", "score", "prune"),
            {},
        ),
        "tokenizer-t5": (
            ["t5/tokenizer.json", "t5/tokenizer_config.json", "t5/generation_config.json"],
            damaged_json,
            ("evaluate", "attribute"),
            {"bert": "t5", "rows.jsonl": "t5rows.jsonl"},
        ),
        "remembered": (["pruned/secateur.json"], damaged_json, ("evaluate", "sites", "score"), {"bert": "pruned"}),
        "remembered-t5": (
            ["pruned-t5/secateur.json"],
            damaged_json,
            ("evaluate", "dry-run"),
            {"bert": "pruned-t5", "rows.jsonl": "t5rows.jsonl"},
        ),
        "recipe": (["pruned/config.json"], damaged_json, ("sites", "evaluate", "score", "benchmark"), {"bert": "pruned"}),
        "recipe-t5": (
            ["pruned-t5/config.json"],
            damaged_json,
            ("sites", "evaluate"),
            {"bert": "pruned-t5", "rows.jsonl": "t5rows.jsonl"},
        ),
        "plan": (["plan.json"], damaged_json, ("dry-run-plan", "prune-plan"), {}),
        "scores": (["scores.safetensors"], damaged_tensors, ("plan", "plan-global", "dry-run-scores"), {}),
        "scores-ig": (["ig.safetensors"], damaged_tensors, ("plan", "plan-global"), {"scores.safetensors": "ig.safetensors"}),
        "yaml": (["multitask.yaml"], damaged_json, ("multitask",), {}),
        "jsonl": (["rows.jsonl"], damaged_bytes, ("evaluate", "attribute"), {}),
        "jsonl-score": (["texts.jsonl"], damaged_bytes, ("score",), {}),
        "csv": (["rows.csv", "rows.tsv"], damaged_bytes, ("evaluate", "attribute"), {}),
        "csv-score": (["texts.csv", "texts.tsv"], damaged_bytes, ("score",), {}),
        "parquet": (["rows.parquet"], damaged_bytes, ("evaluate",), {}),
        "parquet-score": (["texts.parquet"], damaged_bytes, ("score",), {}),
        "conll": (["columns.conll"], damaged_bytes, ("ldnet train-tagger",), {}),
        "text": (["text"], damaged_bytes, ("ldnet train-lm", "ldnet tag"), {}),
        "lm": (["lm/config.json", "lm/vocabulary.json"], damaged_json, ("ldnet train-tagger",), {}),
        "lm-weights": (["lm/model.safetensors"], damaged_tensors, ("ldnet train-tagger",), {}),
        "tagger": (["tagger/config.json", "tagger/vocabulary.json"], damaged_json, ("ldnet tag",), {}),
        "tagger-weights": (["tagger/model.safetensors"], damaged_tensors, ("ldnet tag",), {}),
    }


ROW_KINDS = ("rows-jsonl", "rows-parquet", "texts-jsonl", "texts-parquet", "tokens-jsonl")


def make_input(seed: int, only: str = "") -> Input:
    """Make an input in the current folder, which holds the valid files."""
    generator = Random(seed)
    files = file_kinds()
    kinds = [*files, *ROW_KINDS, *["options"] * 14, *["library"] * 10, *["yaml-text"] * 2, "latency", "multitask-folder"]
    kind = generator.choice([k for k in kinds if k.startswith(only)])
    if kind in files:
        return damaged_file(kind, generator, files[kind])
    if kind in ROW_KINDS:
        return damaged_rows(kind, generator)
    if kind == "options":
        name = generator.choice(list(LINES))
        option, value = generator.choice(options_of(name)), generator.choice(TEXTS)
        return Input(f"options {name} {option}", f"{option} {value[:40]!r}", (*LINES[name], option, value))
    if kind == "yaml-text":
        return yaml_text(generator)
    return library_call(kind, generator)


def damaged_file(kind: str, generator: Random, about: tuple[list[str], Damage, tuple[str, ...], dict[str, str]]) -> Input:
    """Damage one file, and read it with a command."""
    patterns, damage, commands, words = about
    (path,) = list(Path().glob(generator.choice(patterns)))[:1]
    before = path.read_bytes()
    path.write_bytes(damage(generator, before))
    name = generator.choice(commands)
    line = tuple(words.get(word, word) for word in LINES[name])
    if path.suffix in (".csv", ".tsv", ".parquet"):
        line = tuple(str(path) if word in (f"{path.stem}.jsonl",) else word for word in line)
    return Input(f"{kind} {name}", str(path), line)


def damaged_rows(kind: str, generator: Random) -> Input:
    """Damage values of rows, and write them as JSONL or Parquet."""
    import pyarrow
    import pyarrow.parquet
    from mutations import damaged_value

    name, _, form = kind.partition("-")
    rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
    rows = damaged_value(generator, rows)
    path = Path(f"{name}.{form}")
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        except (pyarrow.ArrowException, AttributeError, TypeError, UnicodeError, OverflowError, ValueError):
            path.write_bytes(b"PAR1")
    command = "score" if name == "texts" else generator.choice(("evaluate", "attribute"))
    words = {"bert": "token"} if name == "tokens" else {}
    words |= {f"{name}.jsonl": str(path), "rows.jsonl": str(path)}
    return Input(f"{kind} {command}", kind, tuple(words.get(word, word) for word in LINES[command]))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def yaml_text(generator: Random) -> Input:
    """Write a YAML file with a value or a structure that JSON does not have, or with a wrong number."""
    settings = json.loads(Path("multitask.yaml").read_text())
    text = generator.choice(
        [
            BOMB,
            BOMB + Path("multitask.yaml").read_text()[1:],
            BOMB + f"model: bert\ntasks: {{one: {{data: two.jsonl, labels: *{generator.choice('cfi')}}}}}\n",
            BOMB + f"model: bert\ntasks: {{one: two.jsonl}}\ntraining: {{max_steps: *{generator.choice('cfi')}}}\n",
            "a: &a {b: *a}\n",
            "&a [*a]",
            "!!python/object/apply:os.system [ls]",
            "? [1, 2]\n: 3\n",
            "a: 1\na: 2\n",
            "- 1\n- 2\n",
            "model: bert\ntasks: {one: {data: two.jsonl, labels: [a, a]}}\n",
            "model: bert\ntasks: {1: two.jsonl, '1': two.jsonl}\n",
            "model: bert\ntasks: {? {a: b} : two.jsonl}\n",
            "%YAML 9.9\n---\n",
            "--- \n---\n",
            "model: 0b" + "1" * 5000,
            "max_length: " + "9" * 5000,
            "max_length: 1:2:3:" + "9" * 500,
            "training: {max_steps: !!int 'x'}",
            "training: {learning_rate: !!float 'x'}",
            "training: {learning_rate: !!timestamp 'x'}",
            "training: !!binary 'x'",
            "training: !!set {a, b}",
            "training: !!omap [a]",
        ]
        + [None] * 24
    )
    about = "text"
    if text is None:
        section, name, value = generator.choice(
            [
                *(
                    ("learning_rates", group, rate)
                    for group in ("weights", "scores", "sigma", "x")
                    for rate in (".nan", ".inf", "-1", "'1e-3'", "1e400", "0", "true", "1e30")
                ),
                *(("training", "learning_rate", rate) for rate in (".nan", ".inf", "-1", "'1e-3'", "1e400", "[1]", "null")),
                *(
                    ("training", "max_steps", steps)
                    for steps in ("100000000000000", "-5", "0", "1.5", "x", ".nan", "true", "1e14", "9" * 400)
                ),
                *(("training", "num_train_epochs", steps) for steps in ("1e14", "-5", "0", ".nan", ".inf", "1e400")),
                *(
                    ("training", name, value)
                    for name in (
                        "weight_decay",
                        "max_grad_norm",
                        "warmup_steps",
                        "seed",
                        "save_steps",
                        "logging_steps",
                        "adam_beta1",
                        "adam_epsilon",
                        "per_device_train_batch_size",
                        "gradient_accumulation_steps",
                        "dataloader_num_workers",
                        "save_total_limit",
                        "label_smoothing_factor",
                        "bf16",
                        "optim",
                        "lr_scheduler_type",
                        "foo",
                        "output_dir",
                        "eval_strategy",
                        "report_to",
                        "deepspeed",
                        "fsdp",
                        "dataloader_prefetch_factor",
                        "warmup_ratio",
                    )
                    for value in ("-1", ".nan", ".inf", "10000000000000000000000", "x", "null", "[1]", "{a: 1}", "0", "1.5")
                ),
                *(("schedule", name, value) for name in ("warmup", "cooldown") for value in (".nan", "-1", "2", "x", ".inf")),
                *(("pruning", "density", value) for value in (".nan", "-1", "0", "2", ".inf", "x", "1e-320", "true")),
                *(
                    ("pruning", name, value)
                    for name in ("method", "granularity", "scope", "initial_scores")
                    for value in ("x", "1", "[a]", "bert", "multitask")
                ),
                *(
                    ("", "max_length", value)
                    for value in ("-1", "0", "1", "1.5", "9999999999999999999999", "x", ".nan", "true")
                ),
                *(("", "pooling", value) for value in ("x", "1", "null", "first")),
                *(("", "model", value) for value in ("x", "1", "null", "[a]", "''", "bert", "/", "pruned")),
            ]
        )
        about = f"{section}.{name}: {value[:30]}"
        holder = settings.setdefault(section, {}) if section else settings
        holder[name] = "@@"
        if section == "training" and name == "num_train_epochs":
            del holder["max_steps"]
        text = json.dumps(settings).replace('"@@"', value)
    Path("multitask.yaml").write_text(text)
    return Input(f"yaml-text {about.partition(':')[0]}", about if about != "text" else text[:60], LINES["multitask"])


def library_call(kind: str, generator: Random) -> Input:
    """Call a function of the library with one wrong argument or a damaged file."""
    import torch
    from cases import CASES, scores_of, uneven_plan
    from mutations import WRONG, damaged_json, damaged_tensors

    import secateur
    from secateur.learned.multitask.exporting import load as load_multitask

    if kind == "latency":
        path = Path("latency.json")
        path.write_bytes(damaged_json(generator, path.read_bytes()))
        return Input(
            "latency",
            "latency.json",
            call=lambda: secateur.plan(
                secateur.Scores.load("scores.safetensors"),
                speedup=1.5,
                table=secateur.LatencyTable.load(path),
                allocation="knapsack",
            ),
        )
    if kind == "multitask-folder":
        name, damage = generator.choice(
            (
                ("tasks.json", damaged_json),
                ("heads.safetensors", damaged_tensors),
                ("encoder.sparse.safetensors", damaged_tensors),
                ("encoder/config.json", damaged_json),
            )
        )
        path = Path("multitask", name)
        path.write_bytes(damage(generator, path.read_bytes()))
        sparse = generator.random() < 0.5 or "sparse" in name
        return Input(f"multitask-folder {name}", name, call=lambda: load_multitask("multitask", sparse=sparse))
    case = CASES[generator.choice(("bert-sequence", "t5-gated", "llama"))]
    value = generator.choice([*WRONG, torch.tensor(0.5), torch.tensor([1, 2]), b"x", object(), "0.5", 10**400])
    model, task, rows = case.model(), case.task, case.examples
    plan, scores = uneven_plan(case, "head"), scores_of(case.name)
    place = generator.choice(["", ".", "/", "x" * 5000, "nowhere/x", "bert/config.json", "bert", "plan.json", "rows.parquet"])

    def each(function: str, names: tuple[str, ...], call: Callable[[dict[str, Any]], Any]) -> dict[str, Callable[[], Any]]:
        """Calls of a function, each with one argument replaced by the wrong value."""
        return {f"{function} {name}": partial(call, {name: value}) for name in names}

    whole: dict[str, Any] = {"keep": 0.5, "batch_sizes": [1], "lengths": [4], "recoveries": [None]}
    timed: dict[str, Any] = {"batches": secateur.synthetic_batches(model, [1], [4]), "pairs": 3}
    t5 = CASES["t5-gated"]
    two = {"labels": ["yes", "no way"]}
    calls: dict[str, Callable[[], Any]] = {
        **each(
            "plan",
            ("keep", "flops", "params", "memory", "speedup", "latency"),
            lambda wrong: secateur.plan(scores, **wrong),
        ),
        **each(
            "plan", ("floor", "align", "allocation", "table"), lambda wrong: secateur.plan(scores, **{"flops": 0.5, **wrong})
        ),
        **each(
            "attribute",
            ("unit", "select", "max_tokens", "criterion", "backend"),
            lambda wrong: secateur.attribute(model, task, rows, **wrong),
        ),
        "evaluate max_tokens": lambda: secateur.evaluate(model, task, rows, max_tokens=value),
        "evaluate examples": lambda: secateur.evaluate(model, task, value),
        "attribute examples": lambda: secateur.attribute(model, task, [*rows[:2], value]),
        **each(
            "compress",
            (
                *("keep", "rounds", "floor", "align", "allocation", "unit", "select", "max_tokens", "batch_sizes", "lengths"),
                *("evaluation", "recoveries", "plan", "criterion"),
            ),
            lambda wrong: secateur.compress(model, rows, task, **{**whole, **wrong}),
        ),
        **each(
            "dry_run",
            ("flops", "floor", "align", "batch_size", "length", "max_tokens", "unit", "select", "given"),
            lambda wrong: secateur.dry_run(model, **{"flops": 0.5, **wrong}),
        ),
        **each("benchmark", ("batches", "pairs"), lambda wrong: secateur.benchmark(model, model, **{**timed, **wrong})),
        "Plan.load": lambda: secateur.Plan.load(place),
        "Scores.load": lambda: secateur.Scores.load(place),
        "load": lambda: secateur.load(place),
        "save": lambda: secateur.save(model, place),
        "prune": lambda: secateur.prune(model, value),
        "masked": lambda: secateur.masked(model, value).__enter__(),
        "sites": lambda: secateur.sites(model, select=value),
        "layer_scores": lambda: secateur.layer_scores(model, task, rows, value),
        "choose_layers": lambda: secateur.choose_layers(dict.fromkeys("abc", 0.0), value),
        "synthetic_batches": lambda: secateur.synthetic_batches(model, value, [4]),
        "synthetic lengths": lambda: secateur.synthetic_batches(model, [1], value),
        "sweep": lambda: secateur.sweep(model, task, scores, rows, value, timed["batches"][0]),
        "recover_ max_tokens": lambda: secateur.recover_(model, secateur.prune(model, plan), task, rows, max_tokens=value),
        "recover_ method": lambda: secateur.recover_(model, secateur.prune(model, plan), task, rows, method=value),
        "TextToText labels": lambda: secateur.TextToText(t5.task.reader, labels=value),
        "TextToText max_length": lambda: secateur.TextToText(t5.task.reader, **{**two, "max_length": value}),
        "Budget": lambda: secateur.Budget("flops", value),
        **each(
            "IntegratedGradients",
            ("nodes", "tolerance", "max_nodes", "path", "target"),
            lambda wrong: secateur.IntegratedGradients(**wrong),
        ),
        "attribute_in_rounds": lambda: secateur.attribute_in_rounds(model, task, rows, rounds=value, budget={"keep": 0.5}),
    }
    name = generator.choice(list(calls))
    return Input(f"library {name}", f"{name} of {case.name}: {type(value)!s} {str(value)[:40]!r}", call=calls[name])


def ended(input_: Input) -> dict[str, Any]:
    """Run an input in this process, and tell how it ended: "right", "refused", or the fault."""
    import secateur
    from secateur.cli import main
    from secateur.cli.shared import output

    said: list[str] = []
    output.say = lambda text: said.append(text)
    before = listing()
    sys.argv = ["secateur", *input_.line, *(["--json"] if input_.line else [])]
    code: Any = None
    try:
        if input_.call is not None:
            input_.call()
            return {"end": "right"}
        main()
    except SystemExit as stop:
        code = stop.code
    except secateur.InputError as error:
        if input_.call is None:
            return fault(error)
        if "\n" in str(error) or "\r" in str(error):
            return {"end": "fault", "fault": f"several lines: {str(error)[:200]!r}"}
        left = sorted(listing() - before)
        return {"end": "refused", "message": str(error)[:300]} if not left else {"end": "fault", "fault": f"left {left[:4]}"}
    except BaseException as error:
        return fault(error)
    sys.stdout.flush()
    sys.stderr.flush()
    out, errors = Path("../stdout").read_text(errors="replace"), Path("../stderr").read_text(errors="replace")
    lines = errors.splitlines()
    if code == 0:
        try:
            json.loads(out, parse_constant=lambda name: fail(name))
        except ValueError as error:
            return {"end": "fault", "fault": f"stdout is no JSON: {error}"}
        return {"end": "right"} if not lines else {"end": "right", "noise": lines[:3]}
    left = sorted(listing() - before)
    if code == 1 and input_.line[0] == "score" and json.loads(out or "{}").get("failed"):
        return {"end": "refused", "code": code, "message": said[0]}  # The summary of a run names the shards that failed.
    if code not in (1, 2):
        return {"end": "fault", "fault": f"exit code {code}"}
    if left:
        return {"end": "fault", "fault": f"left {left[:4]}: {errors[-200:]}"}
    if out:
        return {"end": "fault", "fault": f"stdout: {out[:100]}"}
    if len(lines) != 1 or not lines[0].startswith("secateur: "):
        return {"end": "fault", "fault": f"{len(lines)} lines on stderr: {errors[:300]!r}"}
    return {"end": "refused", "code": code, "message": lines[0][:300]}


def fail(name: str) -> None:
    raise ValueError(f"{name} in JSON")


def fault(error: BaseException) -> dict[str, Any]:
    """An exception that is no refusal, with the innermost line of secateur."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "/secateur/" in f.filename]
    deepest = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return {"end": "fault", "fault": f"{type(error).__name__}: {str(error)[:160]!r} at {' < '.join(ours[:-5:-1])} in {deepest}"}


def listing() -> set[str]:
    """The paths in the current folder."""
    return {str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts}


def run_forked(seed: int, template: Path, only: str = "") -> dict[str, Any]:
    """Make and run an input in a forked process, in a copy of the valid files."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(template, Path(folder, "work"))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _child(seed, folder, write, only)
        os.close(write)
        began, answer = time.monotonic(), b""
        while True:
            left = SECONDS - (time.monotonic() - began)
            ready, _, _ = select.select([read], [], [], max(left, 0))
            part = os.read(read, 1 << 16) if ready else b""
            answer += part
            if not part:
                break
        os.close(read)
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        parts = [json.loads(line) for line in answer.splitlines()]
        result: dict[str, Any] = {"seed": seed, **{name: value for part in parts for name, value in part.items()}}
        if "end" not in result:
            tail = Path(folder, "stderr").read_text(errors="replace")[-300:] if Path(folder, "stderr").exists() else ""
            died = (
                "hangs"
                if not ready
                else f"dies of signal {os.WTERMSIG(status)}"
                if os.WIFSIGNALED(status)
                else f"dies {status}"
            )
            result |= {"end": "fault", "fault": f"{died} {tail!r}"}
        return {**result, "seconds": round(time.monotonic() - began, 2)}


def _child(seed: int, folder: str, write: int, only: str) -> None:
    """The forked process: it writes the input and its end as JSON lines, and leaves."""
    try:
        os.chdir(f"{folder}/work")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        try:
            made = make_input(seed, only)
            said = {"kind": made.kind, "about": made.about, "line": " ".join(made.line)[:300]}
            os.write(write, json.dumps(said).encode() + b"\n")
            result = ended(made)
        except BaseException as error:
            result = {"end": "fault", "fault": "generator: " + fault(error)["fault"]}
        os.write(write, json.dumps(result).encode() + b"\n")
    finally:
        os._exit(0)


def run_inputs(first: int, count: int, only: str = "") -> None:
    """Run inputs and print one JSON line for each."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
    }
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"HOME": root, "XDG_CACHE_HOME": root}
        template = Path(root, "template")
        template.mkdir()
        # A process of its own, so that this one has no threads when it forks.
        child = os.fork()
        if child == 0:
            try:
                write_valid_files(template)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("the valid files cannot be written")
        _import_everything()
        for seed in range(first, first + count):
            print(json.dumps(run_forked(seed, template, only)), flush=True)


def _import_everything() -> None:
    """Import what the commands use, once for all forked processes."""
    import cases  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from transformers import BertForSequenceClassification, Trainer  # noqa: F401

    import secateur.learned.ldnet.run
    import secateur.learned.multitask.run  # noqa: F401
    from secateur.cli.app import VERBS, load

    for verbs in VERBS.values():
        for verb in verbs:
            load(verb)


if __name__ == "__main__":
    run_inputs(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4])
