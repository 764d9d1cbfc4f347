"""Column files and span tags: schemes, repairs, F1 compared with seqeval, and error messages that name the line."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities

from secateur.data.conll import SCHEMES, Scheme, Sentence, SpanFile, convert, detect, read_columns, spans_of, tags_of
from secateur.learned.ldnet.tagging import span_f1
from secateur.support.errors import InputError

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
ALPHABET = ["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"]


def written(folder: Path, text: str) -> Path:
    path = folder / "tags.conll"
    path.write_bytes(text.encode())
    return path


def random_tags(alphabet: list[str], count: int, longest: int = 8) -> list[list[str]]:
    generator = random.Random(0)
    return [generator.choices(alphabet, k=generator.randint(1, longest)) for _ in range(count)]


def test_sentences_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, CONLL)
    assert list(read_columns(path, 4)) == [
        Sentence(["EU", "rejects"], ["B-ORG", "O"], 3),
        Sentence(["Peter", "Blackburn"], ["B-PER", "I-PER"], 6),
    ]
    assert [sentence.tags for sentence in read_columns(path, 2)] == [["NNP", "VBZ"], ["NNP", "NNP"]]
    assert [sentence.tokens for sentence in read_columns(path, 1, token=2)] == [["NNP", "VBZ"], ["NNP", "NNP"]]
    # Blank lines at the end, a missing last line end, and line ends of another system make no difference.
    for text in (CONLL + "\n\n", CONLL.rstrip("\n"), CONLL.replace("\n", "\r\n")):
        assert list(read_columns(written(tmp_path, text), 4)) == list(read_columns(written(tmp_path, CONLL), 4))


def test_columns_have_names(tmp_path: Path) -> None:
    path = written(tmp_path, "# global.columns = FORM POS NER\n# NN O\nEU NNP B-ORG\n")
    assert list(read_columns(path, "NER", token="FORM")) == [Sentence(["#", "EU"], ["O", "B-ORG"], 2)]


def test_fields_between_tabs_may_hold_spaces(tmp_path: Path) -> None:
    assert next(read_columns(written(tmp_path, "New York\tB-LOC\n.\tO\n"), 2)).tokens == ["New York", "."]


def test_other_whitespace_does_not_separate_fields(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff10\u00a0000 O\n\u00a0 O\n")
    assert next(read_columns(path, 2)).tokens == ["10\u00a0000", "\u00a0"]


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    """Earlier sentences are returned before an error further down is read."""
    sentences = read_columns(written(tmp_path, "a O\n\n" * 1000 + "a\n"), 2)
    assert len(list(itertools.islice(sentences, 1000))) == 1000
    with pytest.raises(InputError, match="line 2001: expected 2 columns, got 1"):
        next(sentences)


BAD = [
    ("EU NNP O\nrejects O\n", 3, "line 2: expected 3 columns, got 2"),
    ("a O\n\nb O x\n", 2, "line 3: expected 2 columns, got 3"),
    ("# global.columns = FORM NER\na O x\n", "NER", "line 2: expected 2 columns, got 3"),
    ("a O\n\n\nb O\n", 2, "line 3: expected a token, got an empty sentence"),
    ("\na O\n", 2, "line 1: expected a token, got an empty sentence"),
    ("-DOCSTART- O\n\n\na O\n", 2, "line 3: expected a token, got an empty sentence"),
    ("a\tO\n\tO\n", 2, "line 2: expected a value in column 1, got none"),
    ("a\tO\nb\t\n", 2, "line 2: expected a value in column 2, got none"),
    ("a O\n-DOCSTART- O\n", 2, "line 2: expected a blank line before -DOCSTART-, got none"),
    ("a O\nb X-PER\n", 2, "line 2: expected O, or B-, I-, E- or S- with a type, got 'X-PER'"),
    ("a O\n\nb O\nc B\n", 2, "line 4: expected O, or B-, I-, E- or S- with a type, got 'B'"),
    ("a B-\n", 2, "line 1: expected O, or B-, I-, E- or S- with a type, got 'B-'"),
    ("", 2, "expected at least one sentence in "),
    ("-DOCSTART- O\n\n", 2, "expected at least one sentence in "),
    ("a O\n", 3, "column: expected a number from 1 to 2, the columns of "),
    ("a O\n", 0, "column: expected a number from 1 to 2, the columns of "),
    ("a O\n", "NER", "column: expected a number, as "),
    ("# global.columns = FORM NER\na O\n", "POS", "column: expected one of FORM, NER, got 'POS'"),
]


@pytest.mark.parametrize(("text", "column", "message"), BAD, ids=range(len(BAD)))
def test_errors_name_the_line(tmp_path: Path, text: str, column: int | str, message: str) -> None:
    with pytest.raises(InputError) as error:
        list(SpanFile(written(tmp_path, text), column))
    assert message in str(error.value)
    assert "tags.conll" in str(error.value) or message.startswith("column: expected one of")


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "latin.conll"
    path.write_bytes("a O\nfenêtre O\n".encode("latin-1"))
    with pytest.raises(InputError, match="line 2: expected UTF-8, got b'"):
        list(read_columns(path, 2))
    with pytest.raises(InputError, match=r"data: cannot read .*: No such file"):
        list(read_columns(tmp_path / "none", 2))


def test_spans_are_those_of_seqeval() -> None:
    """Checked for all sequences of up to four tags, well-formed or not, and for longer random ones."""
    for length in range(1, 5):
        for tags in itertools.product(ALPHABET, repeat=length):
            assert spans_of(tags) == get_entities(list(tags))
    for row in random_tags(ALPHABET, 2000):
        assert spans_of(row) == get_entities(row)


def test_f1_is_that_of_seqeval() -> None:
    truth, guess = random_tags(ALPHABET, 400), random_tags(ALPHABET, 800)[400:]
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(truth, guess, strict=True)]
    rows = list(range(len(pairs)))
    wanted = f1_score([a for a, _ in pairs], [b for _, b in pairs], zero_division=0)
    assert span_f1(pairs)(rows) == pytest.approx(wanted, abs=1e-12)
    assert 0 < wanted < 1
    assert span_f1([(["O"], ["O"])])([0]) == 0.0


def test_schemes_by_hand() -> None:
    spans = [("a", 0, 1), ("a", 2, 2), ("b", 3, 5)]
    assert tags_of(spans, 7, "bio1") == ["I-a", "I-a", "B-a", "I-b", "I-b", "I-b", "O"]
    assert tags_of(spans, 7, "bio2") == ["B-a", "I-a", "B-a", "B-b", "I-b", "I-b", "O"]
    assert tags_of(spans, 7, "bioes") == ["B-a", "E-a", "S-a", "B-b", "I-b", "E-b", "O"]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SCHEMES, SCHEMES)))
def test_conversions_round_trip(source: Scheme, target: Scheme) -> None:
    for row in random_tags(ALPHABET, 500):
        tags = tags_of(spans_of(row), len(row), source)
        converted, repaired = convert(tags, source, target)
        assert repaired == 0
        assert convert(converted, target, source) == (tags, 0)
        assert spans_of(converted) == spans_of(row)


def test_ill_formed_tags_are_repaired_and_counted(tmp_path: Path) -> None:
    assert convert(["O", "I-a", "I-a", "I-b"], "bio2", "bio2") == (["O", "B-a", "I-a", "B-b"], 2)
    assert convert(["O", "I-a", "I-a", "I-b"], "bio1", "bio2") == (["O", "B-a", "I-a", "B-b"], 0)
    assert convert(["B-a", "I-a", "O", "I-b", "E-b"], "bioes", "bioes") == (["B-a", "E-a", "O", "B-b", "E-b"], 2)
    file = SpanFile(written(tmp_path, "a O\nb I-x\n\nc B-x\nd I-x\n"), 2, target="bioes")
    assert file.scheme == "bio2"
    assert [sentence.tags for sentence in file] == [["O", "S-x"], ["B-x", "E-x"]]
    assert (file.tags, file.repaired) == (4, 1)
    assert len(list(file)) == 2  # A second iteration counts from 0 again.
    assert file.repaired == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_is_detected(scheme: Scheme) -> None:
    spans = [("a", 0, 1), ("a", 2, 2), ("b", 4, 5)]
    assert detect([Sentence(list("abcdef"), tags_of(spans, 6, scheme), 1)]) == scheme
