"""export: write the folder of a model as the file or folder that another engine loads."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.exporting.base import FORMATS, Format, Source
from secateur.flow.loaded import described, load_model
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.files import new_folder, require_absent

REPORT = "export.json"


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
                f"verified: {proof['what']} of {proof['engine']} and PyTorch differ by up to "
                f"{proof['largest_difference']:.1e} on {proof['on']} (bound {proof['bound']:.1e})"
            )
        filled = self.document.get("zeros")
        zeros = [f"filled with zeros, which add nothing: {', '.join(filled)}"] if filled else []
        what = f"written to {self.out}: {self.document['format']}, {self.document['architecture']}, {self.document['dtype']}"
        return [what, *zeros, *self.document["notes"], said]


def export(folder: str | Path, out: str | Path, *, format: str, dtype: str = "auto") -> Exported:
    """Write the folder of a model in the format of another engine.

    The new folder appears when it is complete. Its export.json says what was written and how it was verified. A file that an
    engine computes otherwise than PyTorch is not kept.

    Args:
        folder: The folder of a model, pruned or not. "gguf" and "decilm" take a Llama, Mistral, Qwen 2 or Qwen 3; "ct2" takes
            the architectures of `secateur.flow.engines.CTRANSLATE2` in stock shapes.
        out: The new folder.
        format: "gguf" (a file for llama.cpp), "decilm" (a folder for vLLM and SGLang), "onnx", "openvino", or "ct2"
            (CTranslate2).
        dtype: The dtype of matrices: "float32", "float16" or "bfloat16"; "auto" for the one that the folder stores. Vectors are
            float32 in GGUF. OpenVINO holds no bfloat16.

    Returns:
        What was written.

    Raises:
        InputError: An argument is wrong, a package is missing, or the format has no such model, shape or tokenizer.
        VerificationError: An engine computes something else from what was written. Nothing is left.

    Example:
        `secateur.export("smaller", "smaller-gguf", format="gguf")`
    """
    kind = require_format(format)
    if dtype not in ("auto", *kind.dtypes):
        raise InputError(f"dtype: expected auto, {', '.join(kind.dtypes)} for {kind.name}, got {shown(dtype)}")
    require_absent(out)
    # Every stored number is exact in float32.
    loaded = load_model(str(folder), task=kind.task, device="cpu", dtype="float32")
    stored = loaded.stored if dtype == "auto" else getattr(torch, dtype)
    if _name(stored) not in kind.dtypes:
        raise InputError(f"dtype: expected {' or '.join(kind.dtypes)} for {kind.name}, got auto for a model of {_name(stored)}")
    place, _ = described(str(folder))
    source = Source(Path(folder).resolve().name, Path(place), loaded.model, loaded.tokenizer, stored)
    require_exportable(kind, loaded.model, loaded.tokenizer)
    with new_folder(out) as partial:
        written = import_module(f"secateur.exporting.{kind.module}").write(source, partial)
        document = {"format": kind.name, "model": str(folder), "dtype": _name(stored), **written}
        (partial / REPORT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Exported(Path(out), document)


def require_exportable(kind: Format, model: nn.Module, tokenizer: Any) -> None:
    """Refuse an architecture or a tokenizer that a format does not hold. Shapes are not looked at.

    Args:
        kind: The format.
        model: The model, dense or pruned.
        tokenizer: Its tokenizer.

    Raises:
        InputError: The format does not hold the model or the tokenizer.
    """
    import_module(f"secateur.exporting.{kind.module}").require(model, tokenizer)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
