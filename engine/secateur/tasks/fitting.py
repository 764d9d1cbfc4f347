"""Load a tokenizer or an image processor, and tell one from another."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from secateur.support.compat import own_code_error, without_own_code
from secateur.support.errors import InputError
from secateur.support.fields import shown

_SENTENCEPIECE_FILES = ("*.model", "*.spm", "vocab*")
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
            and so do mT5 and T5 folders without a tokenizer.json. Or the files of the tokenizer's vocabulary are missing, or
            the folder brings a tokenizer's code.
    """
    import transformers

    try:
        reader = without_own_code(getattr(transformers, auto_class).from_pretrained, folder)
    except InputError:
        raise
    except (ImportError, ValueError) as error:
        # ImportError for Marian and ValueError for T5; T5's names tiktoken where sentencepiece and protobuf are enough.
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        missing = [package for package, module in needed.items() if not _installed(module)]
        asked = missing and any(package in str(error).lower() for package in (*needed, "tiktoken"))
        if asked and Path(folder).is_dir() and not any(any(Path(folder).glob(name)) for name in _SENTENCEPIECE_FILES):
            raise InputError(
                f"tokenizer: expected {folder!r} to hold the files of a tokenizer (tokenizer.json, or a sentencepiece model), "
                "got neither: save the model's own tokenizer there (save_pretrained)"
            ) from error
        if asked:
            raise InputError(
                f"tokenizer: expected {' and '.join(missing)} to be installed, which the tokenizer of {folder!r} needs, "
                "got none; pip install 'secateur[sentencepiece]'"
            ) from error
        raise
    longest = getattr(reader, "model_max_length", 1)
    if not isinstance(longest, (int, float)) or isinstance(longest, bool) or not longest >= 1:
        raise InputError(f"tokenizer: expected a model_max_length of at least 1 in {folder!r}, got {shown(longest)}")
    # transformers reads a tokenizer.json with its general class where it lacks the class that the folder names.
    if type(reader) is transformers.PreTrainedTokenizerFast and reader.init_kwargs.get("auto_map"):
        raise own_code_error(folder)
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


def reader_digest(reader: Any) -> str:
    """Return a short hash of a tokenizer or an image processor: of the files that its `save_pretrained` writes.

    The padding and the truncation of the last call are not part of it, nor is the folder that it was loaded from.

    Args:
        reader: The tokenizer or the image processor.
    """
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        reader.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name in ("tokenizer.json", "tokenizer_config.json"):
                document = json.loads(content)
                for name in ("padding", "truncation", "name_or_path", "is_local", "local_files_only", "transformers_version"):
                    document.pop(name, None)
                content = json.dumps(document, sort_keys=True).encode()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _installed(package: str) -> bool:
    """Return True if the package can be imported. The import does not run."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # The parent of a dotted name is missing.
