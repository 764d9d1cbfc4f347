"""A toy language with tags for LD-Net's tests: names follow titles, and all places end in "ville"."""

from __future__ import annotations

import random
from pathlib import Path

from secateur.data.conll import Sentence
from secateur.learned.ldnet.folders import LMConfig
from secateur.learned.ldnet.lm_training import read_sentences
from secateur.learned.ldnet.vocabulary import Vocabulary

PLACES = ("Northville", "Southville", "Eastville", "Westville")
NAMES = ("Ada", "Bob", "Cy", "Dot")
VERBS = ("sees", "likes", "leaves", "paints")
LM_CONFIG = LMConfig(width=8, widths=(8, 8), cutoffs=(6,), layer_dropout=0.5)


def sentences(count: int, seed: int = 0) -> list[Sentence]:
    """Draw sentences like "Mr Ada Cy sees Eastville ." with spans in BIOES."""
    generator, drawn, line = random.Random(seed), [], 1
    for _ in range(count):
        names = generator.choices(NAMES, k=generator.randint(1, 2))
        tokens = [generator.choice(("Mr", "Ms")), *names, generator.choice(VERBS), generator.choice(PLACES), "."]
        person = ["S-PER"] if len(names) == 1 else ["B-PER", "E-PER"]
        drawn.append(Sentence(tokens, ["O", *person, "O", "S-LOC", "O"], line))
        line += len(tokens) + 1
    return drawn


def write_text(path: Path, count: int = 200, seed: int = 0) -> Path:
    path.write_text("".join(" ".join(sentence.tokens) + "\n" for sentence in sentences(count, seed)))
    return path


def write_columns(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Write sentences in three columns; the third has the tags in BIO2."""
    lines = []
    for sentence in sentences(count, seed):
        for token, tag in zip(sentence.tokens, sentence.tags, strict=True):
            lines.append(f"{token} x {tag.replace('S-', 'B-').replace('E-', 'I-')}")
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def vocabulary(path: Path) -> Vocabulary:
    return Vocabulary.count(word for line in read_sentences([path]) for word in line)
