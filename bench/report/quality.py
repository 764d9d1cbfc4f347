"""The tables of the demo, of criteria and units, of what scores are worth, of recovery, of speed and of start-up."""

from __future__ import annotations

import statistics

from bench.support.tables import markdown, result


def demo() -> str:
    """The sweep of `make demo`."""
    run = result("demo")
    points, about = run["sweep"], run["pruned"]["benchmark"]["environment"]
    rows = [
        (
            f"{p['keep']:.1f}" if p["keep"] < 1 else "dense", f"{p['value']:.3f}", f"{p['low']:.3f} to {p['high']:.3f}",
            f"{p['parameters'] / 1e6:.2f} M", f"{p['flops'] / 1e9:.2f} G", f"{p['latency_ms']:.0f} ms", f"{p['speedup']:.2f}x",
            f"{p['examples_per_second']:.0f}",
        )
        for p in points
    ]  # fmt: skip
    head = ("units kept", points[0]["metric"], "95% interval", "parameters", "FLOPs", "latency", "speed-up", "examples/s")
    batch, proof = run["batch"], run["pruned"]["verification"]
    return (
        f"`make demo`: the built-in T5, scored on 1,000 examples of the task *{run['task']}*; neurons and attention channels "
        "(the same number in each head) pruned at every layer, at several rates, and the out-projections refitted on "
        f"{run['refitted']} of the examples; "
        f"accuracy on 1,000 test examples; FLOPs, latency and throughput of a batch of {batch['size']} x {batch['tokens']} "
        f"tokens on {about['device']}, {about['threads']} threads, torch {about['torch']}.\n\n{markdown(head, rows)}\n\n"
        f"The rebuilt model against the masked one: largest logit error {proof['error']:.1e}, where float32 rounding alone is "
        f"{proof['rounding']:.1e}."
    )


def quality() -> str:
    """Mean accuracy over the closed tasks for each setting, and each task at the default."""
    run = result("quality")
    closed = [row for row in run["rows"] if row["metric"] == "accuracy"]
    keeps = [str(keep) for keep in run["keeps"]]
    tasks = list(dict.fromkeys(row["task"] for row in closed))
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in closed):
        cells = [setting]
        for units in dict.fromkeys(row["units"] for row in closed):
            same = [row["accuracy"] for row in closed if row["setting"] == setting and row["units"] == units]
            cells += [f"{sum(a[keep] for a in same) / len(same):.3f}" for keep in keeps]
        rows.append(cells)
    units = list(dict.fromkeys(row["units"] for row in closed))
    head = ["gradient x activation"] + [f"{unit}, {keep}" for unit in units for keep in keeps]
    dense = {row["task"]: (row["dense"], row["majority"]) for row in run["rows"]}
    by_task = [
        (name, f"{dense[name][1]:.2f}", f"{dense[name][0]:.3f}", *(f"{row['accuracy'][keep]:.3f}" for keep in keeps))
        for name in dense
        for row in run["rows"]
        if row["task"] == name and row["units"] == units[0] and row["setting"] == "log-probability, absolute"
    ]
    mean = sum(dense[name][0] for name in tasks) / len(tasks)
    return (
        f"Mean accuracy of the {len(tasks)} closed tasks ({', '.join(tasks)}; dense {mean:.3f}) with the share of units kept; "
        f"{run['examples']} examples to score on, {run['tested']} to test on. The default is log-probability, absolute.\n\n"
        f"{markdown(head, rows)}\n\nEach task at the default, heads and neurons pruned (open tasks: exact match):\n\n"
        f"{markdown(('task', 'majority', 'dense', *(f'keep {keep}' for keep in keeps)), by_task)}"
    )


def worth() -> str:
    """Accuracy with each criterion: mean over the calibration draws, and over tasks with the spread over draws."""
    run = result("worth")
    keeps = [str(keep) for keep in run["keeps"]]
    tasks = list(dict.fromkeys(row["task"] for row in run["rows"]))
    criteria = list(dict.fromkeys(row["criterion"] for row in run["rows"]))
    stacks = list(dict.fromkeys(row["stack"] for row in run["rows"]))

    def mean(task: str | None, criterion: str, stack: str, keep: str) -> tuple[float, float]:
        """The mean over tasks (or of one) and draws, and the standard deviation over draws of the mean over tasks."""
        draws = [
            statistics.mean(
                row["accuracy"][keep]
                for row in run["rows"]
                if row["draw"] == draw
                and row["criterion"] == criterion
                and row["stack"] == stack
                and task in (None, row["task"])
            )
            for draw in range(run["draws"])
        ]
        return statistics.mean(draws), statistics.stdev(draws)

    rows = [
        (stack, criterion, *(_spread(mean(None, criterion, stack, keep)) for keep in keeps))
        for stack in stacks
        for criterion in criteria
    ]
    by_task = [
        (task, stack, *(" / ".join(f"{mean(task, criterion, stack, keep)[0]:.3f}" for criterion in criteria) for keep in keeps))
        for task in tasks
        for stack in stacks
    ]
    dense = statistics.mean({row["task"]: row["dense"] for row in run["rows"]}.values())
    seconds = {c: statistics.mean(row["seconds"] for row in run["rows"] if row["criterion"] == c) for c in criteria}
    return (
        f"Mean over the {len(tasks)} built-in tasks (dense {dense:.3f}) of accuracy, or exact match for open targets, with the "
        f"share of heads and neurons kept; {run['examples']} examples to score on, {run['tested']} to test on; mean and "
        f"standard deviation over {run['draws']} draws of the examples.\n\n"
        f"{markdown(('pruned', 'criterion', *(f'keep {keep}' for keep in keeps)), rows)}\n\n"
        f"Each task, means of the draws ({' / '.join(criteria)}):\n\n"
        f"{markdown(('task', 'pruned', *(f'keep {keep}' for keep in keeps)), by_task)}\n\n"
        f"Scoring took {' / '.join(f'{seconds[c]:.1f}' for c in criteria)} s a draw on one thread, beside another such run."
    )


def recovery() -> str:
    """Mean over all tasks with and without recovery, and each task at half of the units."""
    run = result("recovery")
    keeps, tasks = run["keeps"], list(dict.fromkeys(row["task"] for row in run["rows"]))
    units = {"head": "neurons and heads", "channel": "neurons and channels (as many in each head)"}

    def mean(unit: str, keep: float, name: str) -> float:
        return float(statistics.mean(row[name] for row in run["rows"] if row["unit"] == unit and row["keep"] == keep))

    rows = [
        (units[unit], how, *(f"{mean(unit, keep, how):.3f}" for keep in keeps))
        for unit in units
        for how in ("plain", "recovered")
    ]
    by_task = []
    for task in tasks:
        of_task = {(row["unit"], row["keep"]): row for row in run["rows"] if row["task"] == task}
        cells = [f"{row['plain']:.3f} / {row['recovered']:.3f}" for (_, keep), row in of_task.items() if keep != max(keeps)]
        by_task.append((task, f"{of_task['head', max(keeps)]['dense']:.3f}", *cells))
    dense = statistics.mean({row["task"]: row["dense"] for row in run["rows"]}.values())
    seconds = statistics.mean(row["seconds"] for row in run["rows"])
    head = ("removed from", "out-projections", *(f"keep {keep}" for keep in keeps))
    low = [f"{unit}s, keep {keep}" for unit in units for keep in keeps if keep != max(keeps)]
    return (
        f"Mean over the {len(tasks)} built-in tasks (dense {dense:.3f}) with the share of units kept; {run['examples']} "
        f"examples to score and to refit on, {run['tested']} to test on; a recovery took {seconds:.1f} s on one thread, "
        f"beside another process.\n\n{markdown(head, rows)}\n\n"
        f"Each task, plain / recovered:\n\n{markdown(('task', 'dense', *low), by_task)}"
    )


def speed() -> str:
    """Attribution against bare passes and Taylor passes; pruned models against their FLOPs."""
    run = result("speed")
    rows = []
    for row in run["rows"]:
        if row["group"] != "attribution":
            continue
        (other,) = [r for r in run["rows"] if r["group"] == "pruned" and r["model"] == row["model"]]
        (timing,) = other["timings"]
        bare, taylor = (row[f"{other}_over_attribution"]["median"] for other in ("bare", "taylor"))
        rows.append(
            (
                row["model"], f"{1 / bare:.2f}x", f"{taylor:.2f}x",
                f"{timing['speedup']:.2f}x", f"{timing['flops_speedup']:.2f}x", f"{other['of_flops_allowed']:.0%}",
            )
        )  # fmt: skip
    head = (
        "model", "attribution / bare pass", "Taylor pass / attribution", "pruned at keep 0.5", "FLOPs allow", "of that"
    )  # fmt: skip
    return (
        f"Batch 32 x 64 tokens, one thread of {run['machine']['brand_raw']}, medians of interleaved ratios. A bare pass is "
        "forward and backward to the embeddings with frozen parameters; a Taylor pass computes weight gradients and |w dw|, as "
        f"weight-based importance does.\n\n{markdown(head, rows)}"
    )


def startup() -> str:
    """New processes that import or print help, against the import of torch."""
    run = result("startup")
    times, about = run["times"], run["environment"]
    names = {
        "torch": 'python -c "import torch"', "transformers": 'python -c "import transformers"',
        "secateur": 'python -c "import secateur"', "compress": 'python -c "from secateur import compress"',
        "help": "secateur --help", "prune_help": "secateur prune --help", "score_help": "secateur score --help",
    }  # fmt: skip
    rows = []
    for name, command in names.items():
        ratio = times.get(f"{name}_over_torch", {"median": 1.0, "range": [1.0, 1.0]})
        low, high = ratio["range"]
        rows.append((f"`{command}`", f"{times[f'{name}_ms'] / 1e3:.2f}", f"{ratio['median']:.2f}x", f"{low:.2f} to {high:.2f}"))
    return (
        f"New processes in turn, {run['rounds']} rounds on {about['processor']} (torch {about['torch']}, transformers "
        f"{about['transformers']}), files cached: median seconds of the processor, and the time over that of "
        f"`{names['torch']}` in the same round.\n\n{markdown(('process', 'seconds', 'over torch', 'lowest to highest'), rows)}"
    )


def _spread(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"
