"""The tables and the plot of integrated gradients, from bench/results/integrated.json."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from bench.support.tables import markdown, result
from secateur.support.figures import MARKERS, colors, figure, legend, png

_MODELS = {"t5": "the built-in T5", "bert": "a BERT classifier"}


def integrated_speed() -> str:
    """Time at a given error against Captum and a loop of full passes."""
    run = result("integrated")
    bert, t5, about = run["bert"], run["t5"], run["environment"]
    fastest = bert["rows"][0]["seconds"]
    rows = [
        (
            row["method"], f"{row['nodes']:.1f}", f"{row['error']:.2%}", f"{row['worst']:.2%}",
            f"{row['seconds']:.2f} s", f"{row['seconds'] / fastest:.1f}x",
        )
        for row in bert["rows"]
    ]  # fmt: skip
    return (
        f"All {bert['sites']} sites of a 6-layer BERT classifier (all-MiniLM-L6-v2 with a head trained on *domain*), one "
        f"thread, {about['device']}, torch {about['torch']}. Passes are those of a site and example; time is for an example "
        "and all sites; error: mean over sites (and the worst site) of sum |IG - exact| / sum |exact| over units and "
        f"{bert['few']} examples, exact being 64 nodes. Secateur scored {bert['examples']} examples, pilot and check "
        f"included.\n\n{markdown(('method', 'passes', 'error', 'worst site', 'time', 'ratio'), rows)}\n\n"
        f"The built-in T5 ({t5['examples']} examples of four tasks, errors of {t5['few']}), each method with its fewest steps, "
        "secateur with its loosest setting, that bring the mean error below the goal, where any does; "
        "exact being 256 nodes, and 1,024 at "
        "the sites at which 128 and 256 differ by more than 1%, which the goal of 1% leaves out:\n\n"
        f"{markdown(('error below', 'method', 'passes', 'error', 'time', 'ratio'), _equal_error(t5))}\n\n"
        f"Those sites, {run['rough']['examples']} examples, with nodes spread evenly and with nodes where F moves, against "
        f"1,024 nodes:\n\n{markdown(('site', 'nodes', 'spread evenly', 'where F moves'), _placed(run['rough']))}\n\n"
        "FLOPs of a replayed pass against those of the layers above its site: "
        f"{run['passes']['bert']['ratio']:.2f} (BERT) and {run['passes']['t5']['ratio']:.2f} (T5)."
    )


def _named(method: str, setting: Any) -> str:
    return method if isinstance(setting, int) else f"{method}, tolerance {setting[0]}, at most {setting[1]} nodes"


def _equal_error(t5: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for goal, of_goal in t5["goals"].items():
        first = of_goal["methods"]["secateur"]["seconds"]
        rows += [
            (
                f"{float(goal):.0%}, {len(of_goal['sites'])} sites", _named(method, m["setting"]), f"{m['nodes']:.1f}",
                f"{m['error']:.2%}", f"{m['seconds']:.2f} s", f"{m['seconds'] / first:.1f}x",
            )
            for method, m in of_goal["methods"].items()
        ]  # fmt: skip
    return rows


def _placed(rough: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (site, str(row["nodes"]), f"{row['plain']:.1%}", f"{row['placed']:.1%}")
        for site, of_site in rough["sites"].items()
        for row in of_site
    ]


def integrated_nodes() -> str:
    """Error, rank correlation, kept units and time against nodes and tolerances."""
    run = result("integrated")["nodes"]
    tables = []
    for name, label in (("t5", "The built-in T5"), ("bert", "The BERT classifier")):
        of_model = run[name]
        rows = [
            (
                row["setting"], f"{row['nodes']:.1f}" if "nodes" in row else "", f"{row['error']:.2%}",
                f"{row['spearman']:.3f}", f"{row['kept 0.5']:.1%}", f"{row['kept 0.2']:.1%}", f"{row['time']:.0f}x",
            )
            for row in of_model["rows"]
        ]  # fmt: skip
        half = of_model["other half"]
        rows.append(
            ("one half of the examples, exactly", "", "", f"{half['spearman']:.3f}", f"{half['kept 0.5']:.1%}",
             f"{half['kept 0.2']:.1%}", "")
        )  # fmt: skip
        head = ("setting", "passes", "error", "Spearman", "kept 0.5 alike", "kept 0.2 alike", "time")
        tables.append(
            f"{label}, {of_model['examples']} examples, log-probability, against {of_model['reference']} nodes; the last row "
            "compares the scores of one half of the examples with the other half's; time in gradient x activation "
            f"runs.\n\n{markdown(head, rows)}"
        )
    return "\n\n".join(tables)


def integrated_plot() -> dict[str, bytes]:
    """Draw integrated.png: error against time, and kept units against error, for the two models."""
    whole = result("integrated")
    run, counts = whole["nodes"], ", ".join(f"{whole['nodes'][name]['examples']} ({name})" for name in _MODELS)
    drawing, ((left, right),) = figure(
        1, 2, (4.8, 3.6),
        title=f"Integrated gradients of {' and '.join(_MODELS.values())}, log-probability (n = {counts} examples, "
        f"{whole['environment']['device']})",
        caption="Error against the reference of many nodes; each point is one run, no error bars. Dotted: the units that the "
        "scores of one half of the examples share with those of the other half.",
    )  # fmt: skip
    series = [(name, word) for name in _MODELS for word in ("nodes", "tolerance")]
    for number, ((name, word), color) in enumerate(zip(series, colors(len(series)), strict=True)):
        rows = [row for row in run[name]["rows"] if row["setting"].endswith(word) or row["setting"].startswith(word)]
        style: dict[str, Any] = {
            "linestyle": "--" if word == "nodes" else "-", "marker": MARKERS[number], "color": color, "markersize": 4,
            "label": f"{name}, given {word}",
        }  # fmt: skip
        left.plot([row["time"] for row in rows], [row["error"] for row in rows], **style)
        right.plot([row["error"] for row in rows], [row["kept 0.5"] for row in rows], **style)
    for number, name in enumerate(_MODELS, start=len(series)):
        halves = run[name]["other half"]["kept 0.5"]
        right.axhline(halves, color=colors(number + 1)[-1], linestyle=":", linewidth=1.2, label=f"{name}, other half")
    left.set(xscale="log", yscale="log", xlabel="time, in gradient x activation runs", ylabel="relative error of the scores")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_formatter(NullFormatter())
    right.set(xscale="log", xlabel="relative error of the scores", ylabel="share of kept units alike, keep 0.5")
    legend(drawing)
    return {"integrated.png": png(drawing)}
