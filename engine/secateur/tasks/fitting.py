"""Load a tokenizer or an image processor."""

from __future__ import annotations

import importlib.util
from typing import Any

from secateur.support.errors import InputError
from secateur.support.fields import shown

_FEW_TOKENS = 1000  # A tokenizer without words has some 100 at most: the sentinels of T5.


def read_tokenizer(folder: str, auto_class: str = "AutoTokenizer") -> Any:
    """Load a tokenizer or an image processor.

    Args:
        folder: A folder or a name on the Hub.
        auto_class: The class of transformers that loads it, e.g. "AutoTokenizer" or "AutoImageProcessor".

    Returns:
        The tokenizer or the image processor.

    Raises:
        InputError: The tokenizer needs sentencepiece or protobuf, and the package is not installed. Marian folders need it,
            and so do mT5 and T5 folders without a tokenizer.json. Or the files of the tokenizer's vocabulary are missing.
    """
    import transformers

    try:
        reader = getattr(transformers, auto_class).from_pretrained(folder)
    except (ImportError, ValueError) as error:
        # ImportError for Marian and ValueError for T5; T5's names tiktoken where sentencepiece and protobuf are enough.
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        missing = [package for package, module in needed.items() if not _installed(module)]
        if missing and any(package in str(error).lower() for package in (*needed, "tiktoken")):
            raise InputError(
                f"tokenizer: expected {' and '.join(missing)} to be installed, which the tokenizer of {folder!r} needs, "
                "got none; pip install 'secateur[sentencepiece]'"
            ) from error
        raise
    longest = getattr(reader, "model_max_length", 1)
    if not isinstance(longest, (int, float)) or isinstance(longest, bool) or not longest >= 1:
        raise InputError(f"tokenizer: expected a model_max_length of at least 1 in {folder!r}, got {shown(longest)}")
    if _has_no_words(reader):
        raise InputError(
            f"tokenizer: expected {folder!r} to hold the files of a tokenizer ({', '.join(reader.vocab_files_names.values())}),"
            f" got a {type(reader).__name__} without words: save the model's own tokenizer there (save_pretrained)"
        )
    return reader


def _has_no_words(reader: Any) -> bool:
    """Return whether a tokenizer knows its special tokens only, as transformers makes it where the files are missing."""
    if not hasattr(reader, "get_vocab") or len(reader) > _FEW_TOKENS:
        return False
    return not set(reader.get_vocab()) - set(reader.all_special_tokens) - set(reader.added_tokens_encoder) - {"▁"}


def _installed(package: str) -> bool:
    """Return True if the package can be imported. The import does not run."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # The parent of a dotted name is missing.
