"""Run the timings and the comparisons, and write bench/results/*.json.

python -m bench.run [speed] [quality] [integrated] [worth] [routing] [recovery] [healing] [latency] [pruning] [multitask]
    [ldnet] [layers] [prompts] [corpus] [corpus-again] [real-models] [startup] [engines] [runners] [compatibility]
python -m bench.run corpus-other-cpu
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.support.provenance import RESULTS, ROOT, commit


def speed() -> dict[str, Any]:
    """Measure the ratios of bench_*.py."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        bench = ROOT / "bench"
        command = [sys.executable, "-m", "pytest", "-c", str(bench / "pytest.ini"), "--rootdir", str(bench), str(bench)]
        subprocess.run([*command, f"--benchmark-json={raw}"], check=True)
        measured = json.loads(raw.read_text())
    machine = {key: measured["machine_info"]["cpu"].get(key) for key in ("brand_raw", "count")}
    rows = [{"group": row["group"], "seconds": row["stats"]["median"], **row["extra_info"]} for row in measured["benchmarks"]]
    return {"machine": machine, "rows": rows}


def quality() -> dict[str, Any]:
    """Measure accuracy after pruning for the settings of gradient x activation."""
    from bench.measurements.quality import compare_criteria

    return compare_criteria()


def integrated_gradients() -> dict[str, Any]:
    """Measure the error and the time of integrated gradients."""
    from bench.measurements.integrated import integrated

    return integrated()


def worth() -> dict[str, Any]:
    """Measure accuracy after pruning with integrated gradients and with gradient x activation."""
    from bench.measurements.worth import compare_worth

    return compare_worth()


def task_plans() -> dict[str, Any]:
    """Measure one dense model that serves a plan for each task."""
    from bench.measurements.routing import routing

    return routing()


def recovery() -> dict[str, Any]:
    """Measure accuracy after pruning with and without recovery."""
    from bench.measurements.recovery import compare_recovery

    return compare_recovery()


def healing() -> dict[str, Any]:
    """Measure accuracy after pruning before and after healing."""
    from bench.measurements.healing import compare_healing

    return compare_healing()


def latency_budgets() -> dict[str, Any]:
    """Measure the predictions of latency tables and the delivered speed-ups."""
    from bench.measurements.latency import latency

    return latency()


def steps_of_pruning() -> dict[str, Any]:
    """Measure the time of the steps of pruning."""
    from bench.measurements.pruning import pruning

    return pruning()


def multitask_pruning() -> dict[str, Any]:
    """Measure the cost of masks in training and the speed of exported encoders."""
    from bench.measurements.multitask import multitask

    return multitask()


def layers_of_taggers() -> dict[str, Any]:
    """Measure LD-Net taggers with deleted layers."""
    from bench.measurements.ldnet import ldnet

    return ldnet()


def bulk_scoring(memory: bool = True) -> dict[str, Any]:
    """Measure bulk scoring. Peak memory is optional."""
    from bench.measurements.corpus import corpus

    return corpus(memory=memory)


def shared_prompts() -> dict[str, Any]:
    """Measure prompts whose shared tokens are run once."""
    from bench.measurements.prompts import prompts

    return prompts()


def deleted_layers() -> dict[str, Any]:
    """Measure models with deleted layers."""
    from bench.measurements.layers import layers

    return layers()


def whole_flow_on_real_weights() -> dict[str, Any]:
    """Run the whole flow on real weights."""
    from bench.measurements.real_models import real_models

    return real_models()


def new_processes() -> dict[str, Any]:
    """Measure the time of imports and of help in new processes."""
    from bench.measurements.startup import startup

    return startup()


def speed_of_engines() -> dict[str, Any]:
    """Measure the speed of engines on this CPU."""
    from bench.measurements.engines import engines

    return engines()


def ways_to_run() -> dict[str, Any]:
    """Try the ways to run a pruned folder."""
    from bench.compatibility.runs import compatibility

    return compatibility()


def runtimes_of_bulk_scoring() -> dict[str, Any]:
    """Measure bulk scoring by torch and by OpenVINO."""
    from bench.measurements.runners import runners

    return runners()


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "speed": speed,
    "quality": quality,
    "integrated": integrated_gradients,
    "worth": worth,
    "routing": task_plans,
    "recovery": recovery,
    "healing": healing,
    "latency": latency_budgets,
    "pruning": steps_of_pruning,
    "multitask": multitask_pruning,
    "ldnet": layers_of_taggers,
    "layers": deleted_layers,
    "prompts": shared_prompts,
    "corpus": bulk_scoring,
    "corpus-again": partial(bulk_scoring, memory=False),
    "real-models": whole_flow_on_real_weights,
    "startup": new_processes,
    "engines": speed_of_engines,
    "runners": runtimes_of_bulk_scoring,
    "compatibility": ways_to_run,
}
# These run only by name, because a run of all measurements belongs to one machine.
ELSEWHERE = {"corpus-other-cpu": RUNS["corpus-again"]}


def main() -> None:
    """Run the named measurements, or all, and write a result file for each."""
    RESULTS.mkdir(exist_ok=True)
    measured = commit()
    for name in sys.argv[1:] or RUNS:
        text = json.dumps({"commit": measured, **(RUNS | ELSEWHERE)[name]()}, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text)
        print(f"written: {RESULTS / f'{name}.json'}")


if __name__ == "__main__":
    main()
