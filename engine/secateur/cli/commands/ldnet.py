"""`secateur ldnet`: train recurrent language models, train taggers on them, prune their layers, and tag text."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import MOST_LAYERS, MOST_SEED, Device, Json, RunFolder, Threads
from secateur.cli.shared.tagged import tagged_sentences
from secateur.data.conll import SCHEMES, Sentence, decoded_lines, numbered_lines
from secateur.flow.loaded import device_named
from secateur.model.cost import parameters
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError, reading
from secateur.support.fields import MOST_STEPS, require_fields
from secateur.support.files import require_run_folder, write_atomically
from secateur.support.ledger import CELLS, SETTINGS, Ledger, content_hash, file_state

# The results of the stage that prunes, with their types.
PRUNED = {
    "penalty": dict[str, Any], "layers": dict[str, int], "gates": dict[str, list[float]], "flops per word": dict[str, Any],
    "evaluation": dict[str, Any],
}  # fmt: skip

Seed = Annotated[int, typer.Option(help="Seed of weights, dropout and the order of examples.", min=0, max=MOST_SEED)]
Scheme = Annotated[
    str, typer.Option(help="Scheme of the tags in the files: auto, bio1, bio2, bioes; plain: tags that mark no spans.")
]

TrainFile = Annotated[Path, typer.Option("--data", help="Column file to train on: a token and its tags on each line.")]
EvalFile = Annotated[Path, typer.Option("--eval", help="Column file to evaluate on.")]
Lambda0 = Annotated[float, typer.Option(help="Weight of the penalty; the paper has 0.05 for entities and 0.5 for chunks.")]
GateRate = Annotated[float, typer.Option("--gate-learning-rate", help="Learning rate of the gates' projected SGD.")]


@output.resumes
def train_lm(
    texts: Annotated[list[Path], typer.Argument(help="UTF-8 text files: one sentence on a line, words separated by spaces.")],
    out: RunFolder,
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1, max=MOST_STEPS)] = 10_000,
    layers: Annotated[int, typer.Option(help="Number of layers in each direction.", min=1, max=MOST_LAYERS)] = 10,
    width: Annotated[int, typer.Option(help="Width of a layer.", min=1)] = 300,
    embedding: Annotated[int, typer.Option(help="Width of the word embeddings.", min=1)] = 300,
    projection: Annotated[
        int, typer.Option(help="Width of the projection that the softmax reads; 0: all layers without projection.", min=0)
    ] = 0,
    layer_dropout: Annotated[float, typer.Option(help="Probability that a layer is hidden from the layers after it.")] = 0.5,
    dropout: Annotated[float, typer.Option(help="Dropout probability of the elements that a layer reads.")] = 0.01,
    cutoffs: Annotated[
        str, typer.Option(help="Cutoffs of the adaptive softmax, separated by commas; auto: from the vocabulary.")
    ] = "auto",
    min_count: Annotated[int, typer.Option(help="Rarer words are treated as unknown.", min=1)] = 3,
    vocabulary: Annotated[int | None, typer.Option(help="Largest number of known words; by default, no limit.", min=4)] = None,
    max_length: Annotated[int, typer.Option(help="Longer sentences are split into pieces of this many words.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Sentences in a training step.", min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; by default, a quarter of all steps.", min=1)
    ] = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Text file to measure the perplexity on.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a forward and a backward language model of densely connected layers."""
    from secateur.learned.ldnet import lm_training
    from secateur.learned.ldnet.folders import LMConfig
    from secateur.learned.ldnet.vocabulary import Vocabulary

    inputs.use_threads(threads)
    require_run_folder(out)
    place = device_named(device)
    require_positive(learning_rate=learning_rate)
    settings = {
        "texts": [[str(path), *file_state(path)] for path in texts], "steps": steps,
        "eval": evaluation and [str(evaluation), *file_state(evaluation)],
        "layers": layers, "width": width, "embedding": embedding, "projection": projection, "layer_dropout": layer_dropout,
        "dropout": dropout, "cutoffs": cutoffs, "min_count": min_count, "vocabulary": vocabulary, "max_length": max_length,
        "batch_size": batch_size, "learning_rate": learning_rate, "save_steps": save_steps, "seed": seed,
    }  # fmt: skip
    known = out / "vocabulary.json"
    if known.exists() and (out / SETTINGS).exists():
        with reading("out", known, "is damaged; delete its folder to begin the run anew"):
            words = Vocabulary(json.loads(known.read_text(encoding="utf-8")))
    else:
        every = (word for line in lm_training.read_sentences(texts) for word in line)
        words = Vocabulary.count(every, at_least=min_count, largest=vocabulary)
    if len(words) < 3:
        raise InputError(f"min_count: expected one that some word reaches, got {min_count}")
    chosen = lm_training.default_cutoffs(len(words)) if cutoffs == "auto" else inputs.numbers(cutoffs, "cutoffs")
    if chosen != sorted(set(chosen)) or not 0 < chosen[0] <= chosen[-1] < len(words):
        raise InputError(f"cutoffs: expected rising numbers below {len(words)}, the known words, got {cutoffs}")
    config = LMConfig(embedding, (width,) * layers, tuple(chosen), projection, layer_dropout, dropout)
    held_out = [] if evaluation is None else list(lm_training.Lines([evaluation], words, max_length, once=True))
    arguments: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "save_steps": save_steps or max(1, steps // 4), "logging_steps": max(1, steps // 50),
    }  # fmt: skip
    torch.manual_seed(seed)
    models = config.build(len(words))
    results = {
        "words": int, "parameters": int, "training perplexity": float, "perplexity": dict[str, float] | None, "seconds": float,
    }  # fmt: skip
    with Ledger(out, settings, results) as ledger:
        if not known.exists():
            write_atomically(known, json.dumps(words.entries, ensure_ascii=False) + "\n")
        document = _language_models(
            ledger, models, (config, words), lm_training.Lines(texts, words, max_length), held_out, place.type, arguments
        )
    tested = document["perplexity"]
    heard = "" if tested is None else "; held out {forward:.1f} forward, {backward:.1f} backward".format(**tested)
    line = f"perplexity {document['training perplexity']:.1f} at the end of training{heard}; models in {out / 'model'}"
    output.emit({"out": str(out), **document}, as_json, line)


@output.resumes
def train_tagger(
    lm: Annotated[Path, typer.Argument(metavar="LM_DIR", help="Folder that train-lm wrote.")],
    data: TrainFile,
    evaluation: EvalFile,
    column: Annotated[
        str,
        typer.Option(
            "--target-column", help="Column of the tags: a number from 1, or a name of the files' global.columns line."
        ),
    ],
    out: RunFolder,
    wanted: Annotated[int, typer.Option(help="Number of layers to keep, in both directions together.", min=0)] = 2,
    lambda0: Lambda0 = 0.05,
    regulariser: Annotated[str, typer.Option(help="Penalty: R1, R2 or R3. R3 stops at the wanted number of layers.")] = "R3",
    reopen: Annotated[bool, typer.Option(help="Let closed gates open again, as in the paper.")] = True,
    scheme: Scheme = "auto",
    token_column: Annotated[
        str, typer.Option("--input-column", help="Column of the tokens, in the same form as --target-column.")
    ] = "1",
    epochs: Annotated[float, typer.Option(help="Epochs of the whole tagger's training.")] = 30.0,
    prune_epochs: Annotated[float, typer.Option(help="Epochs of the training with the penalty.")] = 30.0,
    batch_size: Annotated[int, typer.Option(help="Sentences in a training step.", min=1)] = 10,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of SGD.")] = 0.015,
    gate_learning_rate: GateRate = 0.15,
    features: Annotated[
        int, typer.Option(help="Width of the features that are computed from the language models' states.", min=1)
    ] = 300,
    word_width: Annotated[int, typer.Option(help="Width of the word embeddings.", min=1)] = 100,
    hidden: Annotated[int, typer.Option(help="Width of the tagger's LSTM in each direction.", min=1)] = 150,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a tagger on frozen language models, close gates of their layers with a penalty, and delete these layers."""
    from secateur.learned.ldnet.folders import load_lm
    from secateur.learned.ldnet.run import Stage
    from secateur.learned.ldnet.tagger_training import GatePenalty

    inputs.use_threads(threads)
    require_run_folder(out)
    place = device_named(device)
    penalty = GatePenalty(lambda0, wanted, regulariser, gate_learning_rate, reopen)  # type: ignore[arg-type]
    require_positive(epochs=epochs, prune_epochs=prune_epochs, learning_rate=learning_rate)
    models, _, vocabulary = load_lm(lm)
    train, about = tagged_sentences(data, column, token_column, scheme)
    dev, about_dev = tagged_sentences(evaluation, column, token_column, scheme if scheme == "plain" else about["scheme"])
    sizes = {"features": features, "word_width": word_width, "hidden": hidden}
    stages = [Stage(number, batch_size, learning_rate, seed) for number in (epochs, prune_epochs)]
    settings = {
        "lm": str(lm), "data": [str(data), *file_state(data)], "eval": [str(evaluation), *file_state(evaluation)],
        "column": column, "token_column": token_column, "scheme": scheme, "penalty": asdict(penalty),
        "stages": [asdict(stage) for stage in stages], "sizes": sizes, "weights": weights_digest(models),
        "words": content_hash(vocabulary.entries),
    }  # fmt: skip
    with Ledger(out, settings, {"seconds": float}) as ledger:
        document = _two_stages(ledger, (models, vocabulary), (train, dev), scheme, sizes, stages, penalty, place.type)
        document |= {"data": about, "eval": about_dev}
        write_atomically(out / "report.json", json.dumps(document, indent=1) + "\n")
    if document["layers"]["after"] != wanted:
        left = document["layers"]["after"]
        output.say(
            f"{left} layers stay, {wanted} were wanted: more epochs or a larger lambda0 close more gates, "
            "fewer epochs or a smaller lambda0 close fewer"
        )
    output.emit({"out": str(out), **document}, as_json, _comparison(document), f"the pruned tagger is in {out / 'model'}")


def tag(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that train-tagger wrote.")],
    text: Annotated[
        Path, typer.Argument(help="Text file: one sentence on a line, tokens separated by spaces; - is standard input.")
    ] = Path("-"),
    scheme: Annotated[str, typer.Option(help="Scheme of span tags in the output: bio1, bio2 or bioes.")] = "bio2",
    batch_size: Annotated[int, typer.Option(help="Sentences in a batch.", min=1)] = 80,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Tag text. Each line has a token, a tab and its tag; a blank line ends a sentence. --json prints everything at the end."""
    from secateur.learned.ldnet.folders import load_tagger
    from secateur.learned.ldnet.tagging import tag as tags_of

    inputs.use_threads(threads)
    place = device_named(device)
    if scheme not in SCHEMES:
        raise InputError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    tagger = load_tagger(model).to(place)
    sentences = (line.split() for line in _lines(text))
    tagged = tags_of(tagger, sentences, batch_size=batch_size, scheme=scheme)
    if as_json:
        output.emit({"sentences": [{"tokens": tokens, "tags": tags} for tokens, tags in tagged]}, True)
        return
    for tokens, tags in tagged:
        sys.stdout.write("".join(f"{token}\t{label}\n" for token, label in zip(tokens, tags, strict=True)) + "\n")
        sys.stdout.flush()


def _language_models(
    ledger: Ledger,
    models: Any,
    about: tuple[Any, Any],
    lines: Any,
    held_out: list[list[int]],
    device: str,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The report. Models that the ledger has are not trained again. `about` is their config and vocabulary."""
    from secateur.learned.ldnet.folders import save_lm
    from secateur.learned.ldnet.lm_training import perplexity, run

    cell, out = {"stage": "language models"}, ledger.folder
    if cell not in ledger:
        log, seconds = run(models, lines, out / "checkpoints", device, progress=bars(), **arguments)
        _write_log(out / "training.jsonl", log)
        perplexities = perplexity(models, held_out) if held_out else None
        if not (out / "model").exists():
            save_lm(models, *about, out / "model")
        result = {
            "words": len(about[1]),
            "parameters": parameters(models),
            "training perplexity": [row["perplexity"] for row in log if "perplexity" in row][-1],
            "perplexity": perplexities and dict(zip(("forward", "backward"), perplexities, strict=True)),
            "seconds": round(seconds, 1),
        }
        ledger.add(cell, result)
    (document,) = ledger.rows()
    write_atomically(out / "report.json", json.dumps(document, indent=1) + "\n")
    return document


def _two_stages(
    ledger: Ledger,
    lm: tuple[Any, Any],
    data: tuple[list[Sentence], list[Sentence]],
    scheme: str,
    sizes: dict[str, Any],
    stages: list[Any],
    penalty: Any,
    device: str,
) -> dict[str, Any]:
    """The report. A stage that the ledger has is not trained again."""
    from secateur.learned.ldnet.folders import load_tagger, save_tagger
    from secateur.learned.ldnet.run import deletion_report, new_tagger, train_stage

    out, (train, dev) = ledger.folder, data
    cells: list[dict[str, Any]] = [{"stage": "whole"}, {"stage": "pruned"}]
    if cells[0] not in ledger:
        torch.manual_seed(stages[0].seed)
        tagger = new_tagger(*lm, train, "plain" if scheme == "plain" else "bioes", **sizes)
        output.say("training the whole tagger")
        log, seconds = train_stage(tagger, train, dev, stages[0], out / "checkpoints-whole", device, progress=bars())
        _write_log(out / "training-whole.jsonl", log)
        if not (out / "whole").exists():
            save_tagger(tagger, out / "whole")
        ledger.add(cells[0], {"seconds": round(seconds, 1)})
    if cells[1] not in ledger:
        whole, tagger = load_tagger(out / "whole").to(device), load_tagger(out / "whole")
        output.say("training with the penalty")
        log, seconds = train_stage(
            tagger, train, dev, stages[1], out / "checkpoints-pruned", device, penalty=penalty, progress=bars()
        )
        _write_log(out / "training-pruned.jsonl", log)
        pruned, deletion = deletion_report(whole, tagger, dev, penalty.wanted)
        if not (out / "model").exists():
            save_tagger(pruned, out / "model")
        ledger.add(cells[1], {"seconds": round(seconds, 1), "penalty": asdict(penalty), **deletion})
    before, after = ledger.rows()
    with reading("out", out / CELLS, "is damaged in line 2; delete this line, and its stage is run again"):
        require_fields("results", after, PRUNED)
        require_fields("results.layers", after["layers"], dict.fromkeys(("before", "after", "wanted"), int))
        for name in ("flops per word", "evaluation"):
            require_fields(f"results.{name}", after[name], dict.fromkeys(("before", "after"), dict[str, Any]))
    document = {name: value for name, value in after.items() if name not in ("stage", "seconds")}
    return {**document, "seconds": {"whole": before["seconds"], "pruned": after["seconds"]}}


def _lines(text: Path) -> Iterator[str]:
    """The lines of a file, or of standard input."""
    numbered = decoded_lines(sys.stdin.buffer, "text: standard input") if str(text) == "-" else numbered_lines(text)
    return (line for _, line in numbered)


def require_positive(**numbers: float) -> None:
    """Check numbers.

    Raises:
        InputError: A number is not above 0, or not finite. The message has its name.
    """
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name}: expected a number above 0, got {value}")


def _write_log(path: Path, log: list[dict[str, Any]]) -> None:
    """Write a training log as JSONL."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in log))


def _comparison(document: dict[str, Any]) -> Table:
    """A table of the tagger before and after pruning."""
    evaluations, layers, flops = (document[name] for name in ("evaluation", "layers", "flops per word"))
    values = [f"{e['value']:.4f} [{e['low']:.4f}, {e['high']:.4f}]" for e in evaluations.values()]
    millions = [f"{count['all'] / 1e6:.2f} ({count['language models'] / 1e6:.2f} in the models)" for count in flops.values()]
    return output.side_by_side(
        (
            (evaluations["before"]["metric"], values[0], values[1]),
            ("layers", str(layers["before"]), str(layers["after"])),
            ("MFLOPs a word", millions[0], millions[1]),
        )
    )
