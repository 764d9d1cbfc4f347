"""Training of LD-Net's language models and taggers: learning, frozen weights, penalties, and errors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ldnet_toys import LM_CONFIG, sentences, vocabulary, write_text

from secateur.data.conll import Sentence
from secateur.learned.ldnet.arguments import ldnet_arguments
from secateur.learned.ldnet.dense_lm import LanguageModels
from secateur.learned.ldnet.lm_training import Lines, collate, perplexity, train
from secateur.learned.ldnet.run import Stage, deletion_report, new_tagger, train_stage
from secateur.learned.ldnet.tagger import Tagger
from secateur.learned.ldnet.tagger_training import GatePenalty
from secateur.learned.ldnet.tagging import evaluate, tag
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.support.errors import InputError

SIZES: dict[str, Any] = {"features": 8, "word_width": 8, "character_filters": 6, "character_width": 6, "hidden": 8}
NO_DROPOUT = {"dropout": 0.0, "lm_dropout": 0.0}


def lm_arguments(folder: Path, **options: Any) -> Any:
    given = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 10, **options}
    return ldnet_arguments(folder, "cpu", **given)


def built(words: Vocabulary, seed: int = 0) -> LanguageModels:
    torch.manual_seed(seed)
    return LM_CONFIG.build(len(words))


def new(train: list[Sentence], **sizes: Any) -> Tagger:
    words = Vocabulary.count(token for sentence in train for token in sentence.tokens)
    return new_tagger(built(words), words, train, "bioes", **{**SIZES, **sizes})


def frozen_weights(tagger: Tagger) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tagger.context.state_dict().items() if not name.endswith("gates")}


def test_perplexity_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text")
    words = vocabulary(text)
    models = built(words)
    held_out = list(Lines([write_text(tmp_path / "more", seed=1)], words, 20, once=True))
    before = perplexity(models, held_out)
    log = train(models, Lines([text], words, 20), lm_arguments(tmp_path / "c"))
    after = perplexity(models, held_out)
    assert all(value > 0.8 * len(words) for value in before)
    assert all(value < 0.4 * len(words) for value in after)
    logged = [row["perplexity"] for row in log if "perplexity" in row]
    assert len(logged) == 6
    assert logged[-1] < 0.6 * logged[0]
    assert [math.log(value) for value in logged] == pytest.approx([row["loss"] for row in log if "loss" in row])
    assert capsys.readouterr().out == ""  # Stdout is for results.


def test_lines_come_again_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x y z\n\n  \nx\n")
    (tmp_path / "b").write_text("unknown <s> y")
    words = Vocabulary(["<unk>", "<s>", "x", "y", "z"])
    lines = Lines([tmp_path / "a", tmp_path / "b"], words, 2)
    once = [[1, 2, 3, 1], [1, 4, 1], [1, 2, 1], [1, 0, 0, 1], [1, 3, 1]]
    assert list(itertools.islice(lines, 10)) == once + once
    assert list(Lines(lines.paths, words, 2, once=True)) == once
    batch = collate(once[:2])
    assert batch["words"].tolist() == [[1, 2, 3, 1], [1, 4, 1, 0]]
    assert batch["mask"].tolist() == [[True] * 4, [True] * 3 + [False]]


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    words = Vocabulary(["<unk>", "<s>", "x"])
    language_models = built(vocabulary(write_text(tmp_path / "text")))
    (tmp_path / "empty").write_text(" \n\n")
    (tmp_path / "latin").write_bytes("a b\nfenêtre\n".encode("latin-1"))
    for name, message in (
        ("empty", "text: expected at least one word in "),
        ("latin", "line 2: expected UTF-8"),
        ("no", "cannot"),
    ):
        with pytest.raises(InputError, match=message):
            list(Lines([tmp_path / name], words, 5, once=True))
    with pytest.raises(InputError, match="steps: expected at least 1"):
        train(language_models, Lines([tmp_path / "empty"], words, 5), lm_arguments(tmp_path / "c", max_steps=-1))


def test_vocabularies() -> None:
    words = Vocabulary.count(["b", "a", "b", "<s>", "c", "<unk>", "c", "b"], at_least=2)
    assert words.entries == ["<unk>", "<s>", "b", "c"]
    assert words.numbers(["c", "a", "<s>", "<unk>"]) == [3, 0, 0, 0]
    assert len(Vocabulary.count(["b", "a", "b", "c"], largest=3)) == 3
    for entries in (["a", "b"], ["<unk>", "<s>", "a", "a"]):
        with pytest.raises(InputError, match="vocabulary: expected"):
            Vocabulary(entries)


def test_a_tagger_learns_and_its_language_models_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_rows, dev = sentences(60), sentences(30, seed=1)
    tagger = new(train_rows, **NO_DROPOUT)
    before = frozen_weights(tagger)
    assert evaluate(tagger, dev).value < 0.6
    log, _ = train_stage(tagger, train_rows, dev, Stage(8, 4, 0.1), tmp_path / "c", "cpu")
    evaluation = evaluate(tagger, dev)
    assert evaluation.metric == "F1"
    assert evaluation.value > 0.95
    assert evaluation.low <= evaluation.value <= evaluation.high
    assert [row["eval_f1"] for row in log if "eval_f1" in row][-1] == evaluation.value
    assert all(torch.equal(value, before[name]) for name, value in frozen_weights(tagger).items())
    assert tagger.all_gates.tolist() == [1.0] * 4  # Without a penalty they are not trained.
    assert not (tmp_path / "c").exists()
    assert capsys.readouterr().out == ""
    # Spans in another scheme, and a sentence without tokens.
    tokens = ["Mr", "Ada", "Cy", "sees", "Eastville", "."]
    assert list(tag(tagger, [tokens, [], tokens[:1]], batch_size=2)) == [
        (tokens, ["O", "B-PER", "I-PER", "O", "B-LOC", "O"]), ([], []), (["Mr"], ["O"]),
    ]  # fmt: skip
    assert next(tag(tagger, [tokens], scheme="bioes"))[1] == ["O", "B-PER", "E-PER", "O", "S-LOC", "O"]


def test_plain_tags_are_scored_by_word(tmp_path: Path) -> None:
    rows = [Sentence(row.tokens, ["NN" if tag == "O" else "NP" for tag in row.tags], row.line) for row in sentences(20)]
    words = Vocabulary.count(token for row in rows for token in row.tokens)
    tagger = new_tagger(built(words), words, rows, "plain", **SIZES, **NO_DROPOUT)
    log, _ = train_stage(tagger, rows, rows, Stage(6, 4, 0.1), tmp_path / "c", "cpu")
    evaluation = evaluate(tagger, rows)
    assert evaluation.metric == "word accuracy"
    assert [row["eval_accuracy"] for row in log if "eval_accuracy" in row][-1] == evaluation.value
    assert evaluation.value > 0.9
    assert evaluation.examples == sum(len(row.tokens) for row in rows)
    assert set(next(tag(tagger, [rows[0].tokens]))[1]) <= {"NN", "NP"}


@pytest.mark.parametrize("wanted", [1, 3])
def test_gates_close_until_the_wanted_number_is_left(tmp_path: Path, wanted: int) -> None:
    """A trained tagger can do without its language models' layers. Gates below 0.5 close too once the number is reached."""
    rows = sentences(40)
    tagger = new(rows, **NO_DROPOUT)
    train_stage(tagger, rows, rows[:5], Stage(6, 4, 0.1), tmp_path / "c", "cpu")
    whole = {name: value.clone() for name, value in tagger.state_dict().items()}
    before = frozen_weights(tagger)
    with torch.no_grad():  # Different start values, as noise would make them.
        for gates, start in zip(tagger.gates, (torch.tensor([0.2, 1.0]), torch.tensor([0.9, 0.8])), strict=True):
            gates.copy_(start)
    penalty = GatePenalty(2.0, wanted, learning_rate=0.02)
    log, _ = train_stage(tagger, rows, rows[:5], Stage(10, 4, 0.01), tmp_path / "c", "cpu", penalty=penalty)
    assert tagger.layers_left == wanted
    assert tagger.all_gates.tolist() == ([0.0, 1.0, 0.0, 0.0] if wanted == 1 else [0.0, 1.0, 1.0, 1.0])
    counts = [row["layers"] for row in log if "eval_f1" in row]
    assert counts == sorted(counts, reverse=True)
    assert log[-1]["penalty"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in frozen_weights(tagger).items())
    original = new(rows, **NO_DROPOUT)
    original.load_state_dict(whole)
    pruned, report = deletion_report(original, tagger, rows, wanted)
    assert report["layers"] == {"before": 4, "after": wanted, "wanted": wanted}
    assert report["evaluation"]["after"] == evaluate(tagger, rows).to_json()
    assert report["flops per word"]["after"]["all"] < report["flops per word"]["before"]["all"]
    assert sum(len(gates) for gates in pruned.gates) == wanted


def test_gates_stay_in_their_range_in_training(tmp_path: Path) -> None:
    rows = sentences(8)
    tagger = new(rows)
    penalty = GatePenalty(5.0, 0, "R1", learning_rate=0.5)
    train_stage(tagger, rows, rows, Stage(1, 4), tmp_path / "c", "cpu", penalty=penalty)
    assert tagger.all_gates.tolist() == [0.0] * 4  # Two steps of about -2.5.


@pytest.mark.parametrize("reopen", [False, True])
def test_closed_gates_stay_closed_unless_they_may_open(tmp_path: Path, reopen: bool) -> None:
    """With a penalty of weight 0, only the loss moves the gates."""
    rows = sentences(20)
    tagger = new(rows, **NO_DROPOUT)
    with torch.no_grad():
        for gates in tagger.gates:
            gates.copy_(torch.tensor([0.0, 0.5]))
    penalty = GatePenalty(0.0, 0, learning_rate=1.0, reopen=reopen)
    train_stage(tagger, rows, rows, Stage(2, 4, 0.1), tmp_path / "c", "cpu", penalty=penalty)
    assert all((float(gates[0]) > 0) == reopen for gates in tagger.gates)
    assert all(float(gates[1]) != 0.5 for gates in tagger.gates)


def test_a_tag_that_is_not_known_is_named(tmp_path: Path) -> None:
    tagger = new(sentences(4))
    with pytest.raises(InputError, match=r"data: sentence at line 7: tags: expected some of .*, got 'S-ORG'"):
        train_stage(tagger, [Sentence(["x"], ["S-ORG"], 7)], [], Stage(1), tmp_path / "c", "cpu")
