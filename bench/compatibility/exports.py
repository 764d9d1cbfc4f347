"""`secateur export`: each format on each folder. The export runs the engine beside PyTorch, and refuses a wrong file."""

from __future__ import annotations

import secateur
from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome


def gguf(folder: Folder) -> Outcome:
    """Export for llama.cpp."""
    return _exported(folder, "gguf")


def decilm(folder: Folder) -> Outcome:
    """Export for vLLM and SGLang, which are not run."""
    return _exported(folder, "decilm")


def onnx(folder: Folder) -> Outcome:
    """Export for ONNX Runtime."""
    return _exported(folder, "onnx")


def openvino(folder: Folder) -> Outcome:
    """Export for OpenVINO."""
    return _exported(folder, "openvino")


def ct2(folder: Folder) -> Outcome:
    """Export for CTranslate2."""
    return _exported(folder, "ct2")


def _exported(folder: Folder, format: str) -> Outcome:
    """Export a folder. A refusal is the outcome "fails", with its line."""
    try:
        document = secateur.export(folder.model, folder.path / format, format=format).document
    except secateur.InputError as error:
        return Outcome("fails", str(error).replace("|", "/"))
    proof = document["verification"]
    if not proof["run"]:
        return Outcome("not run", f"written as {document['architecture']}; {proof['why'].removeprefix('not run: ')}")
    measured = {"difference": proof["largest_difference"], "bound": proof["bound"]}
    what = f"{proof.get('what', 'log-probabilities')} of {proof['engine']}"
    return Outcome("works", f"{what} within {proof['largest_difference']:.1e} of PyTorch's", measured)
