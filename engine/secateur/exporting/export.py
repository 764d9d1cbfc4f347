"""export: write the folder of a model as the file or folder that another engine loads."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from secateur.exporting.base import FORMATS, Format, Source
from secateur.flow.loaded import load_model
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.files import new_folder, require_absent

REPORT = "export.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        out: The folder.
        document: The content of its export.json.
    """

    out: Path
    document: dict[str, Any]

    def lines(self) -> list[str]:
        """Return lines for a terminal: what was written, and how it was verified."""
        proof = self.document["verification"]
        said = proof.get("why", "")
        if proof["run"]:
            said = (
                f"verified: log-probabilities of {proof['engine']} and PyTorch differ by up to "
                f"{proof['largest_difference']:.1e} on {proof['prompts']} prompts (bound {proof['bound']:.1e})"
            )
        zeros = [f"filled with zeros, which add nothing: {', '.join(self.document['zeros'])}"] if self.document["zeros"] else []
        what = f"written to {self.out}: {self.document['format']}, {self.document['architecture']}, {self.document['dtype']}"
        return [what, *zeros, *self.document["notes"], said]


def export(folder: str | Path, out: str | Path, *, format: str, dtype: str = "auto") -> Exported:
    """Write the folder of a model in the format of another engine.

    The new folder appears when it is complete. Its export.json says what was written and how it was verified. A file that an
    engine computes otherwise than PyTorch is not kept.

    Args:
        folder: The folder of a causal language model, pruned or not: a Llama, Mistral, Qwen 2 or Qwen 3.
        out: The new folder.
        format: "gguf" (a file for llama.cpp) or "decilm" (a folder for vLLM and SGLang).
        dtype: The dtype of matrices: "float32", "float16" or "bfloat16"; "auto" for the one that the folder stores. Vectors are
            float32 in GGUF.

    Returns:
        What was written.

    Raises:
        InputError: An argument is wrong, a package is missing, or the format has no such model, shape or tokenizer.
        VerificationError: An engine computes something else from what was written. Nothing is left.

    Example:
        `secateur.export("smaller", "smaller-gguf", format="gguf")`
    """
    kind = require_format(format)
    if dtype != "auto" and dtype not in _DTYPES:
        raise InputError(f"dtype: expected auto, {', '.join(_DTYPES)}, got {shown(dtype)}")
    require_absent(out)
    # Every stored number is exact in float32.
    loaded = load_model(str(folder), task="causal-lm", device="cpu", dtype="float32")
    stored = _DTYPES.get(dtype, loaded.stored)
    if stored not in _DTYPES.values():
        raise InputError(f"dtype: expected one of {', '.join(_DTYPES)} for a model of {shown(stored)}, got auto")
    source = Source(Path(folder).resolve().name, loaded.model, loaded.tokenizer, stored)
    with new_folder(out) as partial:
        written = import_module(f"secateur.exporting.{kind.module}").write(source, partial)
        document = {"format": kind.name, "model": str(folder), "dtype": str(stored).removeprefix("torch."), **written}
        (partial / REPORT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Exported(Path(out), document)


def require_format(name: Any) -> Format:
    """Return the format of a name.

    Raises:
        InputError: There is no such format, or a package that it needs is missing.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {shown(name)}")
    for package, extra in FORMATS[name].packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"format: {name} needs the package {package}: pip install 'secateur[{extra}]'")
    return FORMATS[name]
