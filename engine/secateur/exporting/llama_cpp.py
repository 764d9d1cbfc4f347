"""The proof of a GGUF file: llama.cpp's log-probabilities beside PyTorch's."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.exporting import run_llama_cpp
from secateur.exporting.base import Source
from secateur.exporting.decoder import rounded
from secateur.support.errors import VerificationError

# Texts on which tokenizers differ: contractions, numbers, spaces, lines, other scripts, code.
TEXTS = (
    "The film wasn't good, and they'll say so: I'M sure we've seen 3 better ones in 2024, or 12345 of 1,000,000.",
    "Zwei  Leerzeichen,\tein Tabulator\n\n  und neue Zeilen;\r\nnaïve cafés; über 50 % (§ 3.2)...",
    "東京では雨が降っています。 Привет, мир! ٣٤٥ 🦙🚀",
    "def f(x):\n    return x**2 != 4  # <tag attr='v'> {a: [1, 2]} && ||\n",
)
LENGTHS = (1, 2, 9, 33, 200)
# What differs between two float32 computations of a deep model; seen: 2e-4 with 30 layers.
FLOAT32_BOUND = 2e-3
# Half precision rounds the inputs of products too. Two such computations differ by no more than this times the effect of the
# rounding itself.
_OF_ROUNDING = 4.0
_SECONDS = 3600


def installed() -> bool:
    """Return whether llama.cpp can be run here."""
    return importlib.util.find_spec("xllamacpp") is not None


def compared(source: Source, path: Path, precise: Path) -> dict[str, Any]:
    """Compare llama.cpp with PyTorch on a file. Afterwards the weights of the source have the values of the file.

    The prompts are texts and random tokens. For each, the log-probabilities of the likeliest next tokens are compared, and for
    texts the number of tokens.

    Args:
        source: The model that the file was written from.
        path: The file.
        precise: The same values in float32, which no rounding hides: the file itself where it is in float32.

    Returns:
        For export.json: the largest difference and its bound; or that nothing was run, and why.

    Raises:
        VerificationError: llama.cpp refuses the file, splits a text into other tokens, or computes something else.
    """
    if not installed():
        return {"run": False, "why": "not run by llama.cpp: needs xllamacpp, pip install 'secateur[compat]'"}
    prompts, tokens = _prompts(source)
    content = {"prompts": prompts, "next": _whole_character(source.tokenizer), "threads": torch.get_num_threads()}
    answers = _answers(precise, content)
    for prompt, numbers, answer in zip(prompts, tokens, answers, strict=True):
        if answer["tokens"] != len(numbers):
            raise VerificationError(
                f"nothing was written: llama.cpp splits {prompt!r} into {answer['tokens']} tokens, and not into {len(numbers)}"
            )
    for parameter in source.model.parameters():
        parameter.data = in_gguf(parameter.data, source.dtype).float()
    exact = [_log_probabilities(source.model, numbers) for numbers in tokens]
    found = {"run": True, "engine": _version(), "what": "log-probabilities", "on": f"{len(prompts)} prompts"}
    difference = _within(exact, answers, FLOAT32_BOUND)
    if source.dtype == torch.float32:
        return found | {"largest_difference": difference, "bound": FLOAT32_BOUND}
    with _rounding_inputs(source.model, source.dtype):
        coarse = [_log_probabilities(source.model, numbers) for numbers in tokens]
    answers = _answers(path, content)
    rounding = max(_difference(e, c, answer) for e, c, answer in zip(exact, coarse, answers, strict=True))
    bound = FLOAT32_BOUND + _OF_ROUNDING * rounding
    largest = _within(exact, answers, bound)
    return found | {"largest_difference": largest, "bound": bound, "largest_difference_in_float32": difference}


def _within(exact: list[Tensor], answers: list[dict[str, Any]], bound: float) -> float:
    """The largest difference of llama.cpp's answers. Raises VerificationError above the bound."""
    pairs = zip(exact, answers, strict=True)
    worst = max(abs(float(expected[token]) - value) for expected, answer in pairs for token, value in _likeliest(answer))
    if not worst <= bound:
        raise VerificationError(
            f"nothing was written: llama.cpp's log-probabilities differ from PyTorch's by {worst:.2g}, and rounding explains "
            f"{bound:.2g}"
        )
    return worst


def in_gguf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype in which GGUF holds it: matrices in a given one, vectors (norms, biases) in float32."""
    return tensor.float() if tensor.dim() < 2 else rounded(tensor, dtype)


def _version() -> str:
    from importlib.metadata import version

    return f"xllamacpp {version('xllamacpp')}"


def _prompts(source: Source) -> tuple[list[str | list[int]], list[list[int]]]:
    """Prompts as llama.cpp gets them, and their tokens."""
    model: Any = source.model
    tokenizer, most = source.tokenizer, min(model.config.max_position_embeddings, run_llama_cpp.CONTEXT) - 1
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [plain[k] for k in torch.randint(len(plain), (min(length, most),), generator=generator).tolist()] for length in LENGTHS
    ]
    texts = [(text, tokenizer(text)["input_ids"]) for text in TEXTS]
    texts = [(text, numbers) for text, numbers in texts if len(numbers) <= most]
    return [*(text for text, _ in texts), *drawn], [*(numbers for _, numbers in texts), *drawn]


def _whole_character(tokenizer: Any) -> Any:
    """A token that is a word or a letter."""
    tokens = tokenizer.get_vocab().items()
    return min(number for token, number in tokens if token.isalnum() and token.isascii() and len(token) < 5)


def _answers(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """llama.cpp's answers, of a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "asked.json", Path(scratch) / "answered.json"
        asked.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-P", str(run_llama_cpp.__file__), str(path), str(asked), str(answered)]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS)
        if process.returncode or not answered.is_file():
            lines = [line for line in process.stderr.splitlines() if "rror" in line or "ASSERT" in line] or ["no message"]
            raise VerificationError(f"nothing was written: llama.cpp does not run the file: {lines[0].strip()[:300]}")
        answers: list[dict[str, Any]] = json.loads(answered.read_text(encoding="utf-8"))
        return answers


def _log_probabilities(model: Any, tokens: list[int]) -> Tensor:
    """PyTorch's log-probabilities of the next token [vocabulary]."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)  # type: ignore[no-any-return]


def _likeliest(answer: dict[str, Any]) -> list[tuple[int, float]]:
    """llama.cpp's likeliest next tokens, with their log-probabilities."""
    return [(token, value) for token, value in answer["likeliest"] if math.isfinite(value)]


def _difference(one: Tensor, other: Tensor, answer: dict[str, Any]) -> float:
    """The largest difference of two computations at the tokens of an answer."""
    return max(abs(float(one[token]) - float(other[token])) for token, _ in _likeliest(answer))


@contextmanager
def _rounding_inputs(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round the inputs of all linear layers to a dtype, as llama.cpp does for weights of that dtype."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype).float(),)) for module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
