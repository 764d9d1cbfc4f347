"""Try every way on every folder, each in a process of its own with a time limit, and write the table.

python -m bench.run compatibility tries all ways. python -m bench.compatibility.runs WAY ... tries some ways again and keeps the
known outcomes of the others.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.compatibility.attempt import WAYS, attempt
from bench.compatibility.folder import FAMILIES, SHAPES
from bench.compatibility.outcome import installed
from bench.support.provenance import RESULTS, commit

RESULT = RESULTS / "compatibility.json"
PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torchao",
    "bitsandbytes",
    "peft",
    "lm-eval",
    "gguf",
    "xllamacpp",
    "openvino",
    "ctranslate2",
)


def compatibility(names: tuple[str, ...] = tuple(WAYS), logs: Path | None = None) -> dict[str, Any]:
    """Return the outcomes by way and folder, with versions. If `logs` is a folder, it receives the output of each attempt."""
    # Each process has one thread and downloads nothing from a hub. A new HF_HOME keeps remote code of earlier runs out.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    measured = commit()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = str(Path(scratch) / "hf")
        folders = _folders(Path(scratch))
        # Processes fork from a server that has already imported the slowest packages.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "transformers.modeling_utils"])
        for name in names:
            outcomes = {}
            for folder in folders:
                outcomes[folder.name] = outcome = _cell(context, name, folder, logs or Path(scratch))
                print(name, folder.name, outcome["verdict"], outcome["note"], f"({outcome['seconds']} s)", flush=True)
            document = _add(name, outcomes, measured)
    return document


def _add(name: str, outcomes: dict[str, Any], measured: str) -> dict[str, Any]:
    """Add a way's outcomes to the known outcomes, and write the file. A killed run loses at most one way."""
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"commits": {}, "outcomes": {}}
    outcomes, commits = {**known["outcomes"], name: outcomes}, {**known["commits"], name: measured}
    document = {
        "python": platform.python_version(), "machine": platform.machine(),
        "versions": {package: installed(package) for package in PACKAGES},
        "commits": {name: commits[name] for name in WAYS if name in commits},
        "outcomes": {name: outcomes[name] for name in WAYS if name in outcomes},
    }  # fmt: skip
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    return document


def _folders(scratch: Path) -> list[Path]:
    """Build the folders in a process of its own. This process and the ones that it forks never import secateur."""
    out = scratch / "folders"
    out.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(out,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"building the folders ended with exit code {process.exitcode}")
    return [out / f"{family}-{shape}" for family in FAMILIES for shape in SHAPES]


def _make(out: Path) -> None:
    """Build the folders."""
    import torch

    from bench.compatibility.folders import make_folders

    torch.set_num_threads(1)
    for folder in make_folders(out):
        print("saved", folder.name, flush=True)


def _cell(context: Any, name: str, folder: Path, logs: Path) -> dict[str, Any]:
    """Return the outcome of one attempt. A crash or a hang is also an outcome."""
    way, start = WAYS[name], time.perf_counter()
    if folder.name.partition("-")[0] not in way.families:
        return {"verdict": "not applicable", "note": way.elsewhere, "measured": {}, "seconds": 0}
    result, log = folder / f"{name}.json", logs / f"{name}-{folder.name}.log"
    process = context.Process(target=attempt, args=(name, folder, result, log))
    process.start()
    process.join(way.seconds)
    if process.is_alive():
        process.kill()
        process.join()
        outcome = {"verdict": "fails", "note": f"no result after {way.seconds} s", "measured": {}}
    elif not result.exists():
        outcome = {"verdict": "fails", "note": f"the process ended with exit code {process.exitcode}", "measured": {}}
    else:
        outcome = json.loads(result.read_text())
    return {**outcome, "seconds": round(time.perf_counter() - start)}


def main() -> None:
    """Try the ways that the command line names, or all."""
    logs = os.environ.get("COMPATIBILITY_LOGS")
    compatibility(tuple(sys.argv[1:]) or tuple(WAYS), Path(logs) if logs else None)


if __name__ == "__main__":
    main()
