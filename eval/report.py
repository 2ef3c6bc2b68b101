"""One page of results: comparisons and evaluations as a self-contained HTML file, and as Markdown.

The page loads nothing, neither script nor font nor picture; plots are SVG inside it, in the colours
of the reader's light or dark scheme. All text from data is escaped.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import carbon, files
from flaxqa.errors import DataError, UsageError

from .squad import METRICS

SHOWN = 50  # disagreements
INK, LINE = "#00f0fe", "#00f0ff"  # stand for colours of the page, as #00f000 and on for its series
NOTHING, MINUS = "\u2013", "\u2212"
LONGEST = 1_000  # characters of a text
AROUND = 160  # characters on both sides of an answer
SERIES = 10


# --- reading ---


@dataclasses.dataclass(frozen=True)
class Run:
    """What a directory of results has.

    Attributes:
      name: of the directory.
      comparison: content of comparison.json, None if it is an evaluation.
      metrics: content of metrics.json, None if it is a comparison.
      run: content of run.json, with `metrics`.
    """

    name: str
    comparison: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None


def read(directory: str | Path) -> Run:
    """The results in a directory of `flaxqa eval`, `compare` or `bench`.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    directory = files.local(directory)

    def content(name: str) -> Any:
        try:
            return json.loads((directory / name).read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{directory / name} is not JSON: {error}") from error
        except OSError as error:
            raise DataError(f"{directory / name} cannot be read: {error.strerror}") from error

    if (directory / "comparison.json").is_file():
        return Run(directory.name, comparison=content("comparison.json"))
    if (directory / "metrics.json").is_file():
        return Run(directory.name, metrics=content("metrics.json"), run=content("run.json"))
    if not directory.is_dir():
        raise UsageError(f"{directory} is {'no directory' if directory.exists() else 'missing'}")
    raise UsageError(f"{directory} has neither comparison.json nor metrics.json")


# --- numbers as text ---


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


def took(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1_000 * seconds)} ms"


def mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**20:,.0f} MiB"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"


# --- what a comparison says in words ---


def there(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The backends that were measured."""
    return [row for row in content["backends"] if "absent" not in row]


def speed(row: Mapping[str, Any]) -> float:
    """Questions a second, offline, in the way that is the fastest for it; 0 without any."""
    return max((float(one["questions_per_second"]) for one in row["offline"].values()), default=0.0)


def summary(content: Mapping[str, Any]) -> list[str]:
    """What one would say of it, a sentence each."""
    rows = there(content)
    valid = [row for row in rows if row["verdict"] == "VALID"]
    exact = [row for row in rows if row["dtype"] == "float32"]
    said = [
        f"{len(rows)} of {len(content['backends'])} backends were measured on "
        f"{content['questions']:,} questions of {content['data']['name']} with "
        f"{content['model']['name']}, on {content['machine']['cpus']} CPUs of "
        f"{content['machine']['processor']}"
        f"{'' if content['device'] == 'cpu' else ' with ' + content['device_name']}."
    ]
    if differ := content["float32_logit_differences"]:
        largest = max(differ.values())
        same = min(row["parity"]["same_answers"] for row in exact)
        said.append(
            f"In float32 the logits of any two backends differ by at most {number(largest)}; "
            f"{same:.2%} of the answers or more are those of {content['reference']}."
        )
    fastest = sorted((row for row in valid if speed(row)), key=speed, reverse=True)
    for dtype, device in dict.fromkeys((row["dtype"], row["device"]) for row in fastest):
        ranked = [row for row in fastest if (row["dtype"], row["device"]) == (dtype, device)]
        on = "" if content["device"] == "cpu" else f" on {device}"
        text = f"Fastest in {dtype}{on} is {ranked[0]['backend']}"
        text += f" with {number(speed(ranked[0]))} questions/s"
        if len(ranked) > 1:
            ratio = speed(ranked[0]) / speed(ranked[1])
            text += f", {ratio:.2f} times {ranked[1]['backend']}"
        said.append(text + ".")
    quick = [row for row in valid if row["single"]]
    if quick:
        best = min(quick, key=lambda row: row["single"]["p99"])
        said.append(
            f"One question at a time, {best['name']} answers 99 of 100 within "
            f"{took(best['single']['p99'])}."
        )
    said += [f"{carbon.told(one)}." for one in [content.get("carbon")] if one]
    for row in rows:
        said += [f"{row['name']} is INVALID: {reason}." for reason in row.get("reasons", ())]
    for row in content["backends"]:
        if "absent" in row:
            said.append(f"{row['name']} was not measured: {row['absent']}.")
    return said


Cells = list[tuple[str, str]]  # the column and what stands there


def table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The main table: its head and its rows, as text; a column where any backend has something."""
    # Where each computes is said if not all do so on the processor.
    placed = any(row["device"] != "cpu" for row in there(content))
    measured = [(row, None if "absent" in row else dict(cells(row, placed)))
                for row in content["backends"]]  # fmt: skip
    longest = max((list(each) for _, each in measured if each), key=len, default=["backend"])
    head = list(dict.fromkeys([*longest, *(name for _, each in measured for name in each or ())]))
    order = {name: place for place, name in enumerate(COLUMNS)}
    head.sort(key=lambda name: order.get(name.partition(",")[0], len(order)))
    rows = []
    for row, each in measured:
        if each is None:
            each = {"backend": row["name"], "on": NOTHING, "verdict": "absent"}
            rows.append([each.get(name, "") for name in head])
        else:
            rows.append([each.get(name, NOTHING) for name in head])
    return head, rows


COLUMNS = (
    "backend", "on", "verdict", *(one.label for one in METRICS.values()), "questions/s",
    "useful TFLOP/s", "Wh/1,000", "host", "step TFLOP/s", "start cold", "start", "p50", "p99",
    "served/s", "same answers", "logits apart", f"F1 {MINUS} reference", "load", "first call",
    "memory", "device memory",
)  # fmt: skip


def cells(row: Mapping[str, Any], placed: bool) -> Cells:
    """What the table says of a backend that was measured."""
    f1 = row["scores"]["f1"]
    found: Cells = [("backend", row["name"]), *([("on", row["device"])] if placed else []),
                    ("verdict", row["verdict"])]  # fmt: skip
    found += [(METRICS[name].label, f"{one['value']:.2f}") for name, one in row["scores"].items()]
    for way, one in row["offline"].items():
        spread = f"{number(one['lowest'])} to {number(one['highest'])}"
        found.append((f"questions/s, {way}", f"{number(one['questions_per_second'])} ({spread})"))
        found.append((f"useful TFLOP/s, {way}", useful(one)))
        if "kwh_per_1000_questions" in one:
            found.append((f"Wh/1,000, {way}", number(1_000 * one["kwh_per_1000_questions"])))
        if one["host_share"] is not None:
            found.append((f"host, {way}", f"{one['host_share']:.1%}"))
    if row["step"] is not None:
        found.append(("step TFLOP/s", useful(row["step"])))
    for caches, name in (("empty", "start cold"), ("full", "start")):
        if caches in row["starts"]:
            found.append((name, took(row["starts"][caches]["seconds"])))
    if row["single"]:
        found += [(name, took(row["single"][name])) for name in ("p50", "p99")]
    if row["server"]:
        found.append(("served/s", number(row["server"]["rate"])))
    found += [
        ("same answers", f"{row['parity']['same_answers']:.2%}"),
        ("logits apart", number(row["parity"]["largest"])),
        (f"F1 {MINUS} reference",
         f"{signed(f1['difference'])} ({interval(*f1['difference_interval'])})"),
        ("load", took(row["load_seconds"])),
        ("first call", took(row["first_call_seconds"])),
        ("memory", mebibytes(row["peak_memory_bytes"])),
    ]  # fmt: skip
    if placed:
        found.append(("device memory", mebibytes(row["device_memory_bytes"])))
    return found


def useful(offline: Mapping[str, Any]) -> str:
    """The rate of multiplications and additions that answers need, and its share of a product's."""
    share = offline["share_of_products"]
    rate = number(offline["useful_flops_per_second"] / 1e12)
    return rate if share is None else f"{rate} ({share:.0%})"


def markdown(content: Mapping[str, Any]) -> str:
    """A summary for a README."""
    head, rows = table(content)

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    said = "\n".join(f"- {sentence}" for sentence in summary(content))
    lines = [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
    return said + "\n\n" + "\n".join(lines) + "\n"


# --- plots ---


def colour(index: int) -> str:
    return f"#00f0{index % SERIES:02x}"


def svg(figure: Any, name: str) -> str:
    """A figure as SVG for the page, in its colours and its font."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
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
        axes.barh(0, 0, color=colour(index), label=label)  # for the legend
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
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
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
) -> str:
    """A curve of each series."""
    figure, axes = axes_of(3.6, xlabel=xlabel, ylabel=ylabel)
    marks = "osD^v<>PX*"
    for index, (label, (x, y)) in enumerate(series.items()):
        mark = marks[index % len(marks)] if len(x) < 20 else None
        style = "-" if index < SERIES else "--"
        axes.plot(x, y, style, color=colour(index), marker=mark, markersize=4, linewidth=1.6,
                  label=label)  # fmt: skip
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


def legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False,
                labelcolor=INK, fontsize=9)  # fmt: skip


def plots(content: Mapping[str, Any]) -> dict[str, str]:
    """The plots of a comparison under their titles; those with nothing to show are left out."""
    rows = there(content)
    names = [row["name"] for row in rows]
    ways = list(dict.fromkeys(way for row in rows for way in row["offline"]))
    made: dict[str, str] = {}
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


# --- the page ---


def excerpt(context: str, answers: Sequence[str]) -> list[tuple[str, bool]]:
    """The part of a context around an answer, in pieces; of each whether it is an answer."""
    found = [(at, text) for text in answers if text and (at := context.find(text)) >= 0]
    if not found:
        return [(context[: 2 * AROUND] + (" …" if len(context) > 2 * AROUND else ""), False)]
    first, last = min(at for at, _ in found), max(at + len(text) for at, text in found)
    begin, end = max(first - AROUND, 0), min(last + AROUND, len(context))
    marked = [
        any(at <= place < at + len(text) for at, text in found) for place in range(begin, end)
    ]
    pieces = [("… ", False)] if begin else []
    place = begin
    while place < end:
        stop = place
        while stop < end and marked[stop - begin] == marked[place - begin]:
            stop += 1
        pieces.append((context[place:stop], marked[place - begin]))
        place = stop
    return [*pieces, *([(" …", False)] if end < len(context) else [])]


def shown(text: str) -> Any:
    """A text of the data as HTML: not endless, and no mark in it turns what stands around it."""
    import markupsafe

    return markupsafe.Markup("<bdi>{}</bdi>").format(cut(text))  # which escapes it


def cut(text: str) -> str:
    """The beginning of a text that is too long to be shown."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def disagreements(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What not all answer alike, as the page shows it."""
    shown = []
    for one in content["disagreements"][:SHOWN]:
        by_text: dict[str, list[str]] = {}
        for name, text in one["answers"].items():
            by_text.setdefault(text or "", []).append(name)
        shown.append({
            "question": one["question"],
            "right": one["right"],
            "pieces": excerpt(one["context"], [*by_text, one["reference"] or ""]),
            "answers": [
                {"text": text, "names": names, "reference": text == (one["reference"] or "")}
                for text, names in by_text.items()
            ],
        })  # fmt: skip
    return shown


def evaluations(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]] | None:
    """A table of the runs of `flaxqa eval`."""
    found = [(one.name, one.metrics, one.run) for one in runs if one.metrics and one.run]
    measured, rows = any("carbon" in metrics for _, metrics, _ in found), []
    for name, metrics, run in found:

        def score(name: str, metrics: Mapping[str, Any] = metrics) -> str:
            low, high = metrics[f"{name}_interval"]
            return f"{metrics[name]:.2f} ({low:.2f} to {high:.2f})"

        rows.append([
            name, run["started"][:16].replace("T", " "), run["config"]["model"],
            run["data"]["name"], run["platform"]["dtype"], f"{metrics['total']:,}",
            *map(score, METRICS), number(metrics["questions_per_second"]),
            *(carbon.cells(metrics.get("carbon")) if measured else ()),
        ])  # fmt: skip
    head = ("run", "started", "model", "data", "dtype", "questions",
            *(one.label for one in METRICS.values()), "questions/s")  # fmt: skip
    return ([*head, *(carbon.CELLS if measured else ())], rows) if rows else None


def evaluation_plots(runs: Sequence[Run]) -> dict[str, str]:
    """F1 and speed of the runs of `flaxqa eval`, one below the other; none of a single one."""
    found = [(one.name, one.metrics) for one in runs if one.metrics is not None]
    if len(found) < 2:
        return {}
    names = [name for name, _ in found]
    scores = {one.label: [metrics[key] for _, metrics in found] for key, one in METRICS.items()}
    spread = {one.label: [metrics[f"{key}_interval"] for _, metrics in found]
              for key, one in METRICS.items()}  # fmt: skip
    speeds = {"speed": [metrics["questions_per_second"] for _, metrics in found]}
    return {
        "Scores": bars(names, scores, name="scores", spread=spread,
                       xlabel="percent; the line is the 95 % interval"),
        "Speed": bars(names, speeds, name="eval-speed", xlabel="questions/s"),
    }  # fmt: skip


def page(runs: Sequence[Run]) -> str:
    """The page of some runs."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "cut": cut}
    compared = [
        {
            "name": run.name,
            "content": run.comparison,
            "summary": summary(run.comparison),
            "table": table(run.comparison),
            "plots": plots(run.comparison),
            "disagreements": disagreements(run.comparison),
            "differing": len(run.comparison["disagreements"]),
            "names": [row["name"] for row in there(run.comparison)],
        }
        for run in runs
        if run.comparison is not None
    ]
    template = environment.get_template("report.html")
    return template.render(
        compared=compared, evaluated=evaluations(runs), evaluation_plots=evaluation_plots(runs),
        number=number,
    )  # fmt: skip


def write(runs: Sequence[Run], path: str | Path) -> None:
    """Writes the page.

    Raises:
      UsageError: the path is a directory, a URL, or below a file.
      DataError: a run's results cannot be shown; says which.
      TryAgain: the place cannot be written.
    """
    try:
        content = page(runs)
    except ImportError:
        raise
    except Exception as error:  # damage shows in as many ways as there are columns
        raise DataError(
            f"the results in {culprit(runs)} are damaged, or of another version: "
            f"{type(error).__name__}: {error}"
        ) from error
    files.write_named(path, content.encode())


def culprit(runs: Sequence[Run]) -> str:
    """The name of the first run that cannot be shown by itself."""
    for run in runs:
        try:
            page([run])
        except Exception:
            return run.name
    return " and ".join(run.name for run in runs)
