"""Score shards with Ray Data: actors, each with its own model, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secateur.corpus.output import Counts, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.shapes import keep_kernels
from secateur.corpus.shards import About, Finished, Progress, Reading, score_shards
from secateur.corpus.sources import Source
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import model_device


class WorkerError(Exception):
    """An error of a worker or of Ray itself. It is not caused by one shard, so the other shards would fail too."""


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray inside this context.

    Args:
        address: The address of a cluster, or "auto"; with None, `ray.init` finds a cluster, or starts one on this machine.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("engine: expected Ray to be installed (pip install 'secateur[ray]'), got no Ray") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Ray reports workers that died on stdout, which is reserved for the result.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"ray-address: no cluster can be used at {address!r}: {first_line(error)}") from error
        try:
            yield
        finally:
            ray.shutdown()


def threads_for(workers: int) -> int:
    """Return the CPU threads of each worker, at least 1, if `workers` workers share the cluster."""
    import ray

    return max(int(ray.cluster_resources().get("CPU", 0)) // workers, 1)


def room_for(runner: Runner) -> int:
    """Return how many workers with this model the cluster has room for.

    A worker takes a GPU if the model is on one, else a CPU for each of its threads.

    Raises:
        InputError: There is no room for a single worker.
    """
    import ray

    kind, needed = ("GPU", 1) if _on_cuda(runner) else ("CPU", _threads(runner))
    nodes = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(available // needed for available in nodes)
    if not room:
        raise InputError(f"ray-address: a worker needs {needed} {kind}s, of which the cluster's machines have {nodes}")
    return room


def score_on_ray(
    load: Callable[[], Runner],
    workers: int,
    runner: Runner,
    sources: Sequence[Source],
    folder: Folder,
    reading: Reading,
    about: About,
    progress: Progress | None = None,
) -> Iterator[Finished]:
    """Score shards like `score_shards`, with workers that are Ray actors. Shards are yielded in the order in which they finish.

    Ray restarts a worker that dies, and its shard is scored from the beginning.

    Args:
        load: Loads a worker's own model, on any machine of the cluster.
        workers: The number of workers.
        runner: How the model is run. Its own model is moved to the CPU, because a worker may need the GPU. Its `busy` becomes
            the workers' mean.
        sources: The shards. Their places must be valid on all machines of the cluster.
        folder: The output folder, which must be the same on all machines.
        reading: How the shards are read.
        about: Metadata of a finished shard.
        progress: Called for each finished shard.

    Raises:
        InputError: A worker raised an InputError.
        WorkerError: A worker, or Ray itself, failed in another way.
    """
    import ray
    import ray.data

    if not sources:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # A shard may take hours.
    # The largest shard comes first: if it came last, the other workers would wait for it.
    order = sorted(range(len(sources)), key=lambda shard: -sources[shard].size)
    resources = {"num_gpus": 1} if _on_cuda(runner) else {"num_cpus": _threads(runner)}
    runner.model.to("cpu")
    rows = ray.data.from_items(order, override_num_blocks=len(order)).map_batches(
        _Worker,
        fn_constructor_args=(load, _threads(runner), sources, folder, reading, about),
        batch_size=1,
        # Workers do not queue a second shard, because another worker may be idle.
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **resources,
    )
    try:
        for row in rows.iter_rows():
            if row["raised"]:
                raise (InputError if row["input_error"] else WorkerError)(row["raised"])
            runner.busy += row["busy"] / workers
            finished = Finished(sources[row["shard"]], _counts(row), row["error"] or None)
            if progress is not None:
                progress(finished.source, 1.0, finished.counts)
            yield finished
    except ray.exceptions.RayError as error:
        raise WorkerError(f"Ray: {_first_and_last_line(error)}") from error
    folder.sweep()  # Removes half-written files of workers that died.


class _Worker:
    """Scores the shards whose numbers it gets.

    Errors are returned in a row of the result. Ray would wrap a raised exception, and print it in full.
    """

    def __init__(
        self,
        load: Callable[[], Runner],
        threads: int,
        sources: Sequence[Source],
        folder: Folder,
        reading: Reading,
        about: About,
    ) -> None:
        keep_kernels()
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # The tokenizer's threads; by default it takes all cores.
        self._load, self._sources, self._reading, self._about = load, sources, reading, about
        self._folder = folder.written_by(f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
        self._runner: Runner | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Score one shard, and return a row of its counts and errors."""
        (shard,) = batch["item"]
        row = {"shard": shard, "error": "", "raised": "", "input_error": False, "busy": 0.0, **_columns(Counts())}
        try:
            row |= self._score(self._sources[shard])
        except Exception as error:
            traceback.print_exc()  # This goes into the worker's log, which Ray keeps.
            is_input = isinstance(error, InputError)
            row |= {
                "raised": str(error) if is_input else f"{type(error).__name__}: {first_line(error)}",
                "input_error": is_input,
            }
        return {name: [value] for name, value in row.items()}

    def _score(self, source: Source) -> dict[str, Any]:
        """Score one shard, and return the fields of its row."""
        self._runner = runner = self._runner or self._load()
        before = runner.busy
        (finished,) = score_shards(runner, [source], self._folder, self._reading, self._about)
        return {**_columns(finished.counts), "error": finished.error or "", "busy": runner.busy - before}


def _columns(counts: Counts) -> dict[str, Any]:
    """Counts as columns of a row of Ray. Labels are JSON: they are not the same in all rows."""
    return {**asdict(counts), "labels": json.dumps(counts.labels)}


def _counts(row: Mapping[str, Any]) -> Counts:
    """The counts in a row of Ray."""
    return Counts.from_json({**row, "labels": json.loads(row["labels"])})


def _first_and_last_line(error: BaseException) -> str:
    """The first and the last line of Ray's error, without colours: it ends with the worker's own error."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return ": ".join(dict.fromkeys((*lines[:1], *lines[-1:]))) or type(error).__name__


def _on_cuda(runner: Runner) -> bool:
    """Whether the model is on a GPU."""
    return model_device(runner.model).type == "cuda"


def _threads(runner: Runner) -> int:
    """CPU threads of all workers of a runner."""
    return runner.workers * (runner.threads or 1)
