"""Tries every way on every folder, each in a process of its own with a time limit, and writes the table.

python -m bench.run compatibility runs them all. python -m bench.compatibility.runs WAY ... runs some of them again
and leaves what is known of the others.
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
)


def compatibility(names: tuple[str, ...] = tuple(WAYS), logs: Path | None = None) -> dict[str, Any]:
    """The outcomes by way and folder, with versions. logs: keep what each attempt prints in this folder."""
    # One thread each; nothing from a hub; remote code of an earlier run must not serve.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    measured = commit()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = str(Path(scratch) / "hf")
        folders = _folders(Path(scratch))
        # Processes fork from a server that has imported what takes longest.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "transformers.modeling_utils"])
        for name in names:
            outcomes = {}
            for folder in folders:
                outcomes[folder.name] = outcome = _cell(context, name, folder, logs or Path(scratch))
                print(name, folder.name, outcome["verdict"], outcome["note"], f"({outcome['seconds']} s)", flush=True)
            found = _add(name, outcomes, measured)
    return found


def _add(name: str, outcomes: dict[str, Any], measured: str) -> dict[str, Any]:
    """Puts a way's outcomes beside the known ones, in the file too: a run that is killed has lost one way at most."""
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"commits": {}, "outcomes": {}}
    outcomes, commits = {**known["outcomes"], name: outcomes}, {**known["commits"], name: measured}
    found = {
        "python": platform.python_version(), "machine": platform.machine(),
        "versions": {package: installed(package) for package in PACKAGES},
        "commits": {name: commits[name] for name in WAYS if name in commits},
        "outcomes": {name: outcomes[name] for name in WAYS if name in outcomes},
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _folders(scratch: Path) -> list[Path]:
    """Made in a process of its own too: this one, and so those that it forks, never import secateur."""
    out = scratch / "folders"
    out.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(out,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"making the folders ended with exit code {process.exitcode}")
    return [out / f"{family}-{shape}" for family in FAMILIES for shape in SHAPES]


def _make(out: Path) -> None:
    import torch

    from bench.compatibility.folders import make_folders

    torch.set_num_threads(1)
    for folder in make_folders(out):
        print("made", folder.name, flush=True)


def _cell(context: Any, name: str, folder: Path, logs: Path) -> dict[str, Any]:
    """One attempt's outcome; a crash or a hang is one too."""
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
    logs = os.environ.get("COMPATIBILITY_LOGS")
    compatibility(tuple(sys.argv[1:]) or tuple(WAYS), Path(logs) if logs else None)


if __name__ == "__main__":
    main()
