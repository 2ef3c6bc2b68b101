"""The plots of the page of results, as SVG in the colours of the page.

Light to import: matplotlib is, when a plot is made.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

INK, LINE = "#00f0fe", "#00f0ff"  # stand for colours of the page, as #00f000 and on for its series
SERIES = 10
NOTHING = "\u2013"
ROW = 0.22  # inches of a line of text
LONGEST = 40  # characters of a name


def number(value: float | None, digits: int = 3) -> str:
    """Digits that count: 12,345, 1,234, 123, 12.3, 1.23, 0.123, 1.2e-05."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(digits - whole, 0)}f}" if abs(value) >= 1 else f"{value:.{digits}g}"


def colour(index: int) -> str:
    return f"#00f0{index % SERIES:02x}"


def plain(name: str) -> str:
    """A name as matplotlib shows it: of one short line, no formula, never left out of a legend."""
    text = " ".join(name.split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def svg(figure: Any, name: str) -> str:
    """A figure as SVG for the page, in its colours and its font."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    settings = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})
    with settings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # which the browser's font may have
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    text = re.sub(r"#00f0(\d\d)", r"var(--series-\1)", text)
    text = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' class="plot" role="img"', text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def axes_of(height: float, *, xlabel: str, ylabel: str = "") -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, height), layout="constrained")
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.patch.set_alpha(0)
    return figure, axes


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    name: str,
    xlabel: str,
    spread: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
    stacked: bool = False,
) -> str:
    """Horizontal bars: for each name one of each series, beside or after one another."""
    rows = len(names) * (1 if stacked else len(series))
    figure, axes = axes_of(0.26 * rows + 0.16 * len(names) + 1.0, xlabel=xlabel)
    size = 0.7 if stacked else 0.8 / len(series)
    left = [0.0] * len(names)
    for index, (label, values) in enumerate(series.items()):
        axes.barh(0, 0, color=colour(index), label=plain(label))  # for the legend
        for place, value in enumerate(values):
            if value is None:
                continue
            at = place if stacked else place + (index - (len(series) - 1) / 2) * size
            axes.barh(at, value, size * 0.92, left=left[place], color=colour(index))
            if stacked:
                left[place] += value
            elif spread is not None and (ends := spread[label][place]) is not None:
                axes.plot(ends, (at, at), color=INK, linewidth=1.2)
            if not stacked:
                right = max(value, (spread[label][place] or (0, 0))[1]) if spread else value
                axes.annotate(number(value), (right, at), (4, 0), textcoords="offset points",
                              va="center", color=INK, fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(names)), map(plain, names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(series) > 1:
        legend(axes)
    if not stacked:
        axes.margins(x=0.12)
    return svg(figure, name)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    name: str,
    xlabel: str,
    ylabel: str,
    log: tuple[bool, bool] = (False, False),
    spread: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    diagonal: str | None = None,
) -> str:
    """A curve of each series, with an upright line at each point where it has a spread.

    With a name for the `diagonal`, a line from 0 to 1 is behind them.
    """
    figure, axes = axes_of(3.6, xlabel=xlabel, ylabel=ylabel)
    marks = "osD^v<>PX*"
    for index, (label, (x, y)) in enumerate(series.items()):
        mark = marks[index % len(marks)] if len(x) < 20 else None
        style = "-" if index < SERIES else "--"
        axes.plot(x, y, style, color=colour(index), marker=mark, markersize=4, linewidth=1.6,
                  label=plain(label))  # fmt: skip
        if spread is not None and label in spread:
            low, high = zip(*spread[label], strict=True)
            axes.vlines(x, low, high, color=colour(index), linewidth=1.0)
    if diagonal is not None:
        axes.plot((0, 1), (0, 1), ":", color=INK, linewidth=1.0, label=diagonal)
    if log[0]:
        axes.set_xscale("log")
        places = sorted({value for x, _ in series.values() for value in x})
        if len(places) >= 20:  # not some sizes that were chosen, but all kinds of values
            places = [step * 10**power for power in range(-3, 7) for step in (1, 2, 5)
                      if places[0] <= step * 10**power <= places[-1]]  # fmt: skip
        axes.set_xticks(places, [f"{place:,g}" for place in places])
        axes.minorticks_off()
    if log[1]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color=LINE, linewidth=0.6)
    legend(axes)
    return svg(figure, name)


def scatter(points: Sequence[Mapping[str, Any]], *, name: str, xlabel: str, ylabel: str) -> str:
    """Speeds over scores, a named point each, hollow where it is not valid.

    A dashed line goes through the valid ones of which none is beaten in both.

    Args:
      points: of each `name`, `valid`, `speed`, `score`, and the score's `interval` or None.
      name: of the figure.
      xlabel: what the score is.
      ylabel: what the speed is; it is on a logarithmic scale.
    """
    points = sorted(points, key=lambda one: float(one["speed"]))
    figure, axes = axes_of(max(3.6, ROW * len(points) + 1.2), xlabel=xlabel, ylabel=ylabel)
    best = [one for one in points if one["valid"] and not any(
        other["valid"] and other["speed"] >= one["speed"] and other["score"] >= one["score"]
        and (other["speed"], other["score"]) != (one["speed"], one["score"])
        for other in points)]  # fmt: skip
    edge = sorted((one["score"], one["speed"]) for one in best)
    axes.plot(*zip(*edge, strict=True) if edge else ((), ()), "--", color=INK, linewidth=1.0)
    axes.set_yscale("log")
    low, high = points[0]["speed"] / 1.25, points[-1]["speed"] * 1.25
    axes.set_ylim(low, high)
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    places = [place for power in range(-3, 7) for step in steps
              if low <= (place := step * 10**power) <= high]  # fmt: skip
    axes.set_yticks(places, [f"{place:,g}" for place in places])
    axes.minorticks_off()
    heights = [math.log(one["speed"] / low) / math.log(high / low) for one in points]
    beside = apart(heights, ROW / (figure.get_figheight() - 0.9))
    for index, (one, height) in enumerate(zip(points, beside, strict=True)):
        at = (one["score"], one["speed"])
        axes.plot(*at, "o", color=colour(index), markersize=7,
                  markerfacecolor=colour(index) if one["valid"] else "none")  # fmt: skip
        if one["interval"] is not None:
            axes.hlines(one["speed"], *one["interval"], color=colour(index), linewidth=1.4)
        said = plain(one["name"]) + ("" if one["valid"] else ", INVALID")
        line = {"arrowstyle": "-", "color": colour(index), "linewidth": 0.5, "relpos": (0, 0.5),
                "shrinkA": 1, "shrinkB": 5}  # fmt: skip
        axes.annotate(said, at, (1.03, height), textcoords="axes fraction", va="center",
                      color=INK, fontsize=9, arrowprops=line)  # fmt: skip
    axes.grid(color=LINE, linewidth=0.6)
    return svg(figure, name)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places in order, moved until each is a gap from the next, none above 1 if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    top = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], top)
        top = moved[index] - gap
    return moved


def speed_and_quality(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The highest throughput of each backend over its F1; None of less than two."""
    points = [
        {"name": row["name"], "valid": row["verdict"] == "VALID",
         "speed": max(one["questions_per_second"] for one in row["offline"].values()),
         "score": row["scores"]["f1"]["value"], "interval": row["scores"]["f1"].get("interval")}
        for row in rows if row["offline"]
    ]  # fmt: skip
    if len(points) < 2:
        return None
    return scatter(
        points, name="quality", ylabel="questions/s, in the fastest way of each",
        xlabel="F1, percent, with 95 % intervals\ndashed: none beats these in both",
    )  # fmt: skip


def legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # A legend that is wider than the axes would make them narrower.
    columns = max(min(3, 80 // (max(map(len, labels)) + 6)), 1)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns,
                frameon=False, labelcolor=INK, fontsize=9)  # fmt: skip


def plots(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The plots of the backends that were measured, by title; those with nothing are left out."""
    names = [row["name"] for row in rows]
    ways = list(dict.fromkeys(way for row in rows for way in row["offline"]))
    made: dict[str, str] = {}
    if (drawn := speed_and_quality(rows)) is not None:
        made["Speed and quality"] = drawn
    if ways:

        def offline(row: Mapping[str, Any], way: str, *keys: str) -> Any:
            one = row["offline"].get(way)
            return None if one is None else [one[key] for key in keys]

        speeds = {way: [(offline(row, way, "questions_per_second") or [None])[0] for row in rows]
                  for way in ways}  # fmt: skip
        spreads = {way: [offline(row, way, "lowest", "highest") for row in rows] for way in ways}
        made["Throughput, all questions at once"] = bars(
            names, speeds, name="speed", spread=spreads,
            xlabel="questions/s; the line is the spread over rounds",
        )  # fmt: skip
        way = next((way for way in reversed(ways) if way != "streamed"), ways[-1])
        timed = [row for row in rows if way in row["offline"]]
        spent = [row["offline"][way]["stages"] for row in timed]  # medians, each of its own
        made[f"Where the time goes, {way}"] = bars(
            [row["name"] for row in timed],
            {stage: [100 * one[stage] / sum(one.values()) for one in spent] for stage in spent[0]},
            name="stages", stacked=True, xlabel="percent of the time from raw text to answers",
        )  # fmt: skip
    quick = [row for row in rows if row["single"]]
    if quick:
        shares = [*range(1, 100)]
        made["Latency of one question"] = lines(
            {row["name"]: (quantiles(row["single"]["latencies"], shares), shares) for row in quick},
            name="latency", xlabel="milliseconds", ylabel="percent answered", log=(True, False),
        )  # fmt: skip
    served = [row for row in rows if row["server"]]
    if served:
        made["Latency under load"] = lines(
            {row["name"]: ([trial["rate"] for trial in row["server"]["trials"]],
                           [1_000 * trial["p99"] for trial in row["server"]["trials"]])
             for row in served},
            name="server", xlabel="questions/s that arrive at random",
            ylabel="99 of 100 within, milliseconds", log=(True, True),
        )  # fmt: skip
    made |= sweeps(rows)
    if any(row["peak_memory_bytes"] for row in rows):
        sizes = [row["peak_memory_bytes"] and row["peak_memory_bytes"] / 2**20 for row in rows]
        made["Memory"] = bars(names, {"peak": sizes}, name="memory", xlabel="MiB at the peak")
    return made


def sweeps(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The plots of throughput by batch size and by length."""
    made: dict[str, str] = {}
    swept = [row for row in rows if row["sweep"]]
    for title, key, other, fixed, label in (
        ("Throughput and batch size", "batch", "length", 128, "windows of 128 tokens in a batch"),
        ("Throughput and length", "length", "batch", 8, "tokens of each of 8 windows"),
    ):
        series = {}
        for row in swept:
            points = sorted((one[key], one["tokens_per_second"]) for one in row["sweep"]
                            if one[other] == fixed and "tokens_per_second" in one)  # fmt: skip
            if points:
                series[row["name"]] = ([x for x, _ in points], [y for _, y in points])
        if series:
            made[title] = lines(
                series, name=key, xlabel=label, ylabel="tokens/s", log=(True, False)
            )
    return made


def quantiles(seconds: Sequence[float], shares: Sequence[int]) -> list[float]:
    """Milliseconds."""
    import numpy as np

    return (1_000 * np.percentile(seconds, shares)).tolist()
