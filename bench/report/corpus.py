"""The table of bulk scoring, from bench/results/corpus.json, and how far other runs were from it."""

from __future__ import annotations

from bench.support.tables import markdown, result

OWN = ("secateur", "secateur, compiled", "secateur, half of the FLOPs", "secateur, half of the FLOPs, compiled")


def corpus() -> str:
    """Documents a second by model and way, beside transformers and the bare model, and peak memory."""
    run = result("corpus")
    rows = []
    for subject in run["models"]:
        speeds, over, bare = subject["documents/s"], subject["over_pipeline"], subject["over_bare"]
        rows.append((subject["model"], "transformers", f"{speeds['pipeline']:.1f}", "1.0x", "", ""))
        for way in OWN:
            ratio = f"{over[way]['median']:.1f}x ({over[way]['least']:.1f} to {over[way]['most']:.1f})"
            ceiling = f"{bare[way]['median']:.0%}" if way in bare else ""
            name = f"{way} ({subject['settings'][way]['dtype'].removeprefix('torch.')})"
            rows.append((subject["model"], name, f"{speeds[way]:.1f}", ratio, ceiling, f"{subject['busy'][way]:.0%}"))
    head = ("model", "scored by", "documents/s", "over transformers", "of the bare model, same batches", "model busy")
    padding = " and ".join(f"{subject['padding']:.1%}" for subject in run["models"])
    seconds = " and ".join(f"{subject['compile_seconds']['secateur, compiled']:.0f} s" for subject in run["models"])
    memory = run["memory"]
    few, many = (f"{name.partition('_')[0]} documents {value:.0f} MiB" for name, value in list(memory.items())[:2])
    environment = run["environment"]
    processor = environment.get("processor", environment["device"])  # Not in results of before it was told.
    sizes = ", ".join(run["models"][0]["pipeline_batch_sizes"])
    lines = [
        f"{run['documents']:,} documents of 5 to 400 words in {run['rounds']} Parquet shards, {run['cores']} cores of "
        f"{processor}, torch {environment['torch']}; medians over the shards (and range), each scored in every "
        f"way in turn. Transformers has its best batch size of {sizes}. Padding: {padding}. Compilation took {seconds}.",
        markdown(head, rows),
        f"Another run, over transformers and in the order of the table: {_ratios('corpus-again')}.",
        f"On another CPU ({result('corpus-other-cpu')['environment']['processor']}): {_ratios('corpus-other-cpu')}.",
        f"Peak memory of the command: {few}, {many}: {memory['ratio']:.3f} times.",
    ]
    return "\n\n".join(lines)


def prompts() -> str:
    """Documents a second with whole prompts and with shared prefixes."""
    run = result("prompts")
    rows = []
    for name, words in (("labels", "labels"), ("texts", f"{run['new_tokens']} new tokens")):
        speeds, speedup = run[name]["documents/s"], run[name]["speedup"]
        low, high = speedup["range"]
        rows.append(
            (words, f"{speeds['whole']:.2f}", f"{speeds['shared']:.2f}", f"{speedup['median']:.1f}x ({low:.1f} to {high:.1f})")
        )
    environment = run["environment"]
    return "\n\n".join(
        [
            f"{run['model']} in {run['dtype']}, {run['documents']} short movie reviews ({run['document_tokens']:g} tokens each "
            f"with what follows them in the prompt) after a shared prefix of {run['prefix_tokens']} tokens, batches of "
            f"{run['max_tokens']:,} tokens that run. One thread of {environment['processor']}, torch {environment['torch']}; "
            f"processor time, medians of {run['rounds']} rounds in turn (and range).",
            markdown(("result", "whole prompts, documents/s", "shared prefix, documents/s", "speed-up"), rows),
            f"The log-probabilities of the labels differ by {run['largest_difference']:.0e} at most, and "
            f"{run['same_texts']} of {run['documents']} texts are the same.",
        ]
    )


def _ratios(name: str) -> str:
    """A run's ratios over transformers, in the order of the table."""
    ratios = []
    for subject in result(name)["models"]:
        medians = ", ".join(f"{subject['over_pipeline'][way]['median']:.1f}x" for way in OWN)
        ratios.append(f"{subject['model']} {medians}")
    return "; ".join(ratios)


def runners() -> str:
    """Documents a second of a classifier by runtime, dense and pruned."""
    run = result("runners")
    rows = []
    for way, speed in run["documents/s"].items():
        over, settings = run["over_torch"][way], run["settings"].get(way)
        dtype = "float32" if settings is None else settings["dtype"].removeprefix("torch.")
        ratio = f"{over['median']:.2f}x ({over['least']:.2f} to {over['most']:.2f})"
        rows.append((way.replace(", ", " (", 1).replace("half", "half of the FLOPs") + ")", dtype, f"{speed:.1f}", ratio))
    halves = ", ".join(f"{of['median']:.2f}x on {name}" for name, of in run["half_over_dense"].items())
    environment = run["environment"]
    lines = [
        f"The 6-layer BERT, {run['documents']:,} documents of 5 to 400 words in {run['rounds']} shards, one thread of "
        f"{environment['processor']}, torch {environment['torch']}; medians over the shards (and range). Each shard is "
        f"scored in every way in turn, and timed from its rows to its scores. "
        f"The machine did other work at the same time (load {run['load'][0]:.1f} on {run['cores']} cores).",
        markdown(("scored by", "dtype", "documents/s", "over torch, dense"), rows),
        f"Half of the FLOPs over dense, in the same runtime: {halves}.",
    ]
    return "\n\n".join(lines)
