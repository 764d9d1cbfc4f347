"""One run on a GPU: ceilings, kernels, whole models, tests, and torch.compile's columns last.

python -m bench.measurements.gpu_report [--minutes 9] [--out FILE]
    writes bench/results/<device>-<commit>.json, or the same name in the folder $OUT, again after each row
python -m bench.measurements.gpu_report --rehearse
    runs every step at tiny sizes, on a CPU too; its file is named rehearsal-..., and no page shows it

It needs torch, triton and transformers; git and matplotlib only if they are there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
import transformers

from bench.measurements import gpu_kernels, gpu_models
from bench.measurements.gpu_kernels import BACKEND, BERT_BASE, DEVICE, FLAN_T5, LLAMA_8B, OTHERS, T5_BASE, Work, works
from bench.report.gpu import kernel_line, plot, tables
from bench.subjects.shapes import Case
from bench.support.provenance import RESULTS, ROOT, commit

PRODUCTS = ((8192, 8192, 8192), (16384, 8192, 4096), (65536, 14336, 4096))
FAMILIES = "t5-gated or bert-sequence or (llama and not llama-mqa)"
TESTS = {
    "kernels": ["tests/kernels", "--ignore=tests/kernels/test_gpu.py"],
    "flows": ["tests/kernels/test_gpu.py", "-k", FAMILIES],
}
SPARE = 15.0  # Seconds of the limit for the imports before the measuring, and for the tables and the plot after it.


class TimeUpError(BaseException):
    """The time limit. It is no `Exception`, so that no row takes it for its own error."""


class Report:
    """A result file that is written again after each row.

    Args:
        path: The file.
        about: What is measured, and with which versions.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.result: dict[str, Any] = {"report": "gpu", **about, "finished": False, "not_measured": []}
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.result, indent=1) + "\n")
        new.replace(self.path)

    def add(self, part: str, about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a row, add it to a part of the file, and print it. An error takes the place of its figures.

        Args:
            part: The name of the list that the row belongs to.
            about: The first values of the row.
            measure: Returns the others.

        Returns:
            The row.
        """
        row, start = dict(about), time.monotonic()
        try:
            row |= measure()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        except TimeUpError:
            self.result["not_measured"].append({"part": part, **about})
            raise
        row["seconds"] = round(time.monotonic() - start, 2)
        self.result.setdefault(part, []).append(row)
        self.write()
        print(part, kernel_line(row) if part == "kernels" else json.dumps(row), flush=True)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        return row


def steps(report: Report, *, rehearse: bool, deadline: float) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the names and functions of the steps, in their order.

    Args:
        report: The file.
        rehearse: Whether all sizes are tiny.
        deadline: The end of the run by `time.monotonic`.
    """
    first = gpu_kernels.REHEARSED if rehearse else (LLAMA_8B, T5_BASE, FLAN_T5, BERT_BASE)
    products = [work for shape in first for work in list(works(shape))[:2]]
    streams = [work for shape in first[:2] for work in list(works(shape))[2:]]
    others = [] if rehearse else [work for shape in OTHERS for work in works(shape)]
    options: dict[str, Any] = {"backend": "eager"} if rehearse else {}

    def measure_ceilings() -> None:
        sizes = (((64, 64, 64),), 2**12) if rehearse else (PRODUCTS, 2**29)
        report.add("ceilings", {}, partial(gpu_kernels.ceilings, *sizes))

    def measure_kernels(chosen: list[Work]) -> None:
        (rates,) = report.result["ceilings"]
        for work in chosen:
            about = {"operation": work.operation, **vars(work.shape)}
            report.add("kernels", about, partial(gpu_kernels.measure, work, rates))

    yield "ceilings", measure_ceilings
    yield "kernels", lambda: measure_kernels(products + streams)
    yield "models", lambda: measure_models(report, rehearse=rehearse)
    yield "tests", lambda: run_tests(report, deadline)
    yield "torch.compile of kernels", lambda: compile_kernels(report, products + streams, options)
    yield "torch.compile of models", lambda: compile_models(report, options, rehearse=rehearse)
    yield "kernels at other shapes", lambda: measure_kernels(others)


def built(builder: gpu_models.Builder) -> Case:
    """Return the model and the batch on the device, with the same random weights in each run."""
    torch.manual_seed(0)
    with torch.device(DEVICE):  # Random weights of a large model take long on a CPU.
        case = builder()
    return gpu_models.on_device(case)


def sizes(*, rehearse: bool) -> tuple[dict[str, gpu_models.Builder], tuple[int, ...], int, int]:
    """Return the models, the batches and the length of latency rows, and the rounds."""
    return (gpu_models.REHEARSED, (1, 2), 8, 3) if rehearse else (gpu_models.MODELS, (1, 32, 256), 128, 9)


def measure_models(report: Report, *, rehearse: bool) -> None:
    """Measure gradient x activation of all models, then integrated gradients, then the latency of pruned models."""
    models, batches, length, rounds = sizes(rehearse=rehearse)
    for part, measure in (("attribution", gpu_models.attribution), ("integrated", gpu_models.integrated)):
        for name, builder in models.items():
            report.add(part, {"model": name}, partial(measure, built(builder), rounds))
    for name, builder in models.items():
        dense = built(builder).model
        pruned = gpu_models.halved(dense)
        for batch in batches:
            about = {"model": name, "batch": batch, "length": length}
            report.add("latency", about, partial(gpu_models.latency, dense, pruned, batch, length, 2 * rounds))


def compile_models(report: Report, options: dict[str, Any], *, rehearse: bool) -> None:
    """Measure the latency of dense and pruned models by torch.compile. The largest batch counts most, so it comes first."""
    models, batches, length, rounds = sizes(rehearse=rehearse)
    for batch in reversed(batches):
        for name, builder in models.items():
            dense = built(builder).model
            pruned, about = gpu_models.halved(dense), {"model": name, "batch": batch, "length": length}
            measure = partial(gpu_models.compiled_latency, dense, pruned, batch, length, rounds, **options)
            report.add("compiled_latency", about, measure)


def compile_kernels(report: Report, chosen: list[Work], options: dict[str, Any]) -> None:
    """Measure torch.compile's columns of rows that were measured."""
    functorch.donated_buffer = False  # A backward pass is timed many times on one graph.
    for work in chosen:
        about = {"operation": work.operation, **vars(work.shape)}
        report.add("compiled_kernels", about, partial(gpu_kernels.compiled_columns, work, **options))


def run_tests(report: Report, deadline: float) -> None:
    """Run the kernels' tests, and the flow's tests of three families, without tuning."""
    paths = ["engine", "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "SECATEUR_AUTOTUNE": "0", "PYTHONPATH": os.pathsep.join(paths)}
    for name, arguments in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=line", *arguments]

        def measure(command: list[str] = command) -> dict[str, Any]:
            limit = max(1.0, 0.6 * (deadline - time.monotonic()))  # The rest is for torch.compile's columns.
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "E "))]
            return {"returncode": done.returncode, "summary": lines[-1] if lines else "", "failed": failed[:40]}

        report.add("tests", {"tests": name, "command": " ".join(command[1:])}, measure)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUpError` in the context after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds), 2.0)  # Again, where code swallowed it.
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(report: Report, minutes: float, *, rehearse: bool) -> None:
    """Run the steps until they are done or the time is up. Write the tables and the plot beside the file."""
    start = time.monotonic()
    limit = max(0.0, 60 * minutes - SPARE)
    remaining = list(steps(report, rehearse=rehearse, deadline=start + limit))
    torch.manual_seed(0)
    try:
        with time_limit(limit):
            while remaining:
                remaining[0][1]()
                remaining.pop(0)
    except TimeUpError:
        report.result["not_measured"] += [{"part": name} for name, _ in remaining]
    report.result |= {"finished": not remaining, "seconds": round(time.monotonic() - start, 1)}
    report.write()
    report.path.with_suffix(".md").write_text(tables(report.result) + "\n")
    if (drawn := plot(report.result)) is not None:
        report.path.with_suffix(".png").write_bytes(drawn)


def about_run(minutes: float, *, rehearse: bool) -> dict[str, Any]:
    """Return the device, the versions and the commit."""
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = None
    return {
        "rehearsal": rehearse,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "backend": BACKEND,
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "minutes": minutes,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="limit of the whole run")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--rehearse", action="store_true", help="every step at tiny sizes, on a CPU too")
    arguments = parser.parse_args()
    if not arguments.rehearse and DEVICE != "cuda":
        parser.exit(2, "gpu_report: expected a CUDA device, found none (--rehearse needs none)\n")
    about = about_run(arguments.minutes, rehearse=arguments.rehearse)
    folder = Path(os.environ.get("OUT") or RESULTS)
    name = "rehearsal" if arguments.rehearse else about["device"].replace(" ", "-").replace("/", "-")
    report = Report(arguments.out or folder / f"{name}-{about['commit']}.json", about)
    run(report, arguments.minutes, rehearse=arguments.rehearse)
    print(tables(report.result))
    print(f"written: {report.path}")


if __name__ == "__main__":
    main()
