"""The README's table of bulk scoring, from bench/results/corpus.json."""

from __future__ import annotations

from tables import markdown, result

WAYS = ("pipeline", "bare model, same batches", "secateur", "secateur, half of the FLOPs")


def corpus() -> str:
    """Documents a second by model, how busy the model is, and peak memory."""
    found = result("corpus")
    rows = []
    for each in found["models"]:
        over = each["over_pipeline"]
        speeds = [f"{each['documents/s'][way]:.1f}" for way in WAYS]
        ratios = [f"{over[way]['median']:.1f}x" for way in WAYS[2:]]
        bare, busy = each["over_bare"]["secateur"]["median"], each["busy"]["secateur"]
        rows.append((each["model"], *speeds, *ratios, f"{bare:.0%}", f"{busy:.0%}", f"{each['padding']:.1%}"))
    head = (
        "documents/s", "transformers", "bare model", "secateur", "pruned to half", "secateur / transformers",
        "pruned / transformers", "secateur / bare", "model busy", "padding",
    )  # fmt: skip
    memory = found["memory"]
    few, many = (f"{name.partition('_')[0]} documents {value:.0f} MiB" for name, value in list(memory.items())[:2])
    environment = found["environment"]
    lines = [
        f"{found['documents']:,} documents of 5 to 400 words in {found['rounds']} Parquet shards, {found['cores']} cores of "
        f"{environment['device']}, torch {environment['torch']}; medians over the shards, each scored in every way in turn.",
        markdown(head, rows),
        f"Peak memory of the command: {few}, {many}: {memory['ratio']:.3f} times.",
    ]
    return "\n\n".join(lines)
