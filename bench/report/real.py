"""The tables of docs/results/real-models.md: the whole flow on real weights, from bench/results/real-models.json."""

from __future__ import annotations

from typing import Any

from bench.support.tables import markdown, result

TITLES = {
    "bert-topics": "BERT, 6 layers: topics of reviews",
    "gemma-topics": "Gemma 3 270M: topics of reviews, by prompt",
    "gemma-news": "Gemma 3 270M: news",
}


def real_models() -> str:
    """Dense against pruned: the metric, with what is given back, size, and speed."""
    rows = []
    run = result("real-models")
    for name, subject in run["subjects"].items():
        dense = subject["dense"]
        size = f"{dense['parameters'] / 1e6:.1f} M", f"{dense['megabytes']:.0f}"
        metric = dense["evaluation"]["metric"]
        rows.append((TITLES[name], metric, "dense", _interval(dense["evaluation"]), "", *size, "1x", ""))
        for budget in subject["budgets"]:
            timing, size = budget["timing"], (f"{budget['parameters'] / 1e6:.1f} M", f"{budget['megabytes']:.0f}")
            speed = f"{timing['speedup']:.2f}x ({timing['speedup_low']:.2f} to {timing['speedup_high']:.2f})"
            values = _interval(budget["plain"]), _interval(budget["recovered"])
            rows.append(("", "", f"{budget['flops']}", *values, *size, speed, f"{budget['flops_speedup']:.2f}x"))
    head = (
        "model and task", "metric", "layers' FLOPs", "pruned", "and recovered", "parameters", "MB on disk", "speed-up",
        "FLOPs allow",
    )  # fmt: skip
    about = next(iter(run["subjects"].values()))["environment"]
    return (
        "Real weights, nothing trained after pruning: values with their 95% intervals, speed-ups with their quartiles; "
        f"float32, {about['threads']} thread of {about['device']}, torch {about['torch']}, transformers "
        f"{about['transformers']}.\n\n"
        f"{markdown(head, rows)}"
    )


def real_steps() -> str:
    """Memory of attribution, and the seconds of each step."""
    rows = []
    for name, subject in result("real-models")["subjects"].items():
        attribution = subject["attribution"]
        memory = f"{attribution['loaded_bytes'] / 1e9:.1f}", f"{attribution['peak_bytes'] / 1e9:.1f}"
        scored = _seconds(attribution["seconds"]), _seconds(subject["dense"]["seconds"])
        for k, budget in enumerate(subject["budgets"]):
            steps = (_seconds(budget["seconds"][step]) for step in ("choose", "prune", "verify", "recover"))
            first = (f"{TITLES[name]} ({subject['examples']})", subject["unit"], *memory, *scored) if k == 0 else ("",) * 6
            rows.append((*first, f"{budget['flops']}", *steps))
    head = (
        "subject (examples)", "unit", "GB loaded", "GB at most", "attribute, s", "evaluate, s", "FLOPs", "choose, s",
        "prune, s", "verify, s", "recover, s",
    )  # fmt: skip
    about = "Seconds of the process itself, on one thread, and in brackets on the clock, while other processes ran beside it."
    return f"{about}\n\n{markdown(head, rows)}"


def real_proofs() -> str:
    """Exactness: pruned against masked, and the saved folder against the model in memory."""
    rows = []
    for name, subject in result("real-models")["subjects"].items():
        for budget in subject["budgets"]:
            proof, loaded = budget["verification"], budget["loaded"]
            rows.append(
                (
                    TITLES[name], f"{budget['flops']}", f"{proof['error']:.1e}", f"{proof['rounding']:.1e}",
                    f"{proof['largest']:.1f}", f"{loaded['load_error']:.1e}", _yes(loaded["alone_equals_load"]),
                    _yes(budget["stock"]), f"{budget['before']:.1%}", f"{budget['after']:.1%}",
                )
            )  # fmt: skip
    head = (
        "subject", "FLOPs", "pruned, error", "rounding alone", "largest logit", "loaded, error", "without secateur the same",
        "stock config", "branches off", "and recovered",
    )  # fmt: skip
    return markdown(head, rows)


def _interval(value: dict[str, Any]) -> str:
    digits = 3 if value["metric"] == "accuracy" else 1
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _seconds(value: dict[str, float]) -> str:
    return f"{value['own']:.1f} ({value['wall']:.1f})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
