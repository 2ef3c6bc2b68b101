"""One page of results: of compare, eval, probe and finetune as a self-contained HTML file.

The page loads nothing, neither script nor font nor picture; plots are SVG inside it, in the colours
of the reader's light or dark scheme. All text from data is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import carbon, files
from flaxqa.errors import DataError

from .plots import NOTHING, bars, lines, number, plots
from .runs import Kind, read_json
from .runs import read as read_runs
from .squad import METRICS

SHOWN = 50  # disagreements
MOST_ASSOCIATIONS = 12  # of a section, before the others are folded in
MINUS = "\u2212"
LONGEST = 1_000  # characters of a text
AROUND = 160  # characters on both sides of an answer
POINTS = 100  # of a curve of losses: each the mean of a stretch of steps


# --- reading ---

FIELDS: dict[Kind, str] = {
    "compare": "comparison", "eval": "metrics", "probe": "probe", "finetune": "training",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What a directory of results has.

    Attributes:
      name: of the directory.
      comparison: content of comparison.json, None if it is no comparison.
      metrics: content of metrics.json, None if it is no evaluation.
      run: content of run.json, with `metrics`.
      probe: content of probe.json, None if there is none.
      training: content of finetune.json, with the lines of log.jsonl as `log`; None without them.
    """

    name: str
    comparison: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    probe: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None


def read(directory: str | Path) -> Run:
    """The results in a directory of `flaxqa eval`, `compare`, `bench`, `probe` or `finetune`.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    there = {one.kind: one for one in read_runs(directory)}
    found: dict[str, Any] = {
        field: there[kind].content for kind, field in FIELDS.items() if kind in there
    }
    if "comparison" in found:
        found.pop("metrics", None)
    if "metrics" in found:
        found["run"] = there["eval"].about
    if "training" in found:
        log = read_json(there["finetune"].directory / "log.jsonl", lines=True)
        found["training"] = {**found["training"], "log": log}
    return Run(files.local(directory).name, **found)


# --- numbers as text ---


def took(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1_000 * seconds)} ms"


def mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**20:,.0f} MiB"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


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


# --- what a probe says ---

MEASURES = {  # with their digits
    "mu": ("\u03bc, how strong", 4), "eta": ("\u03b7, how steady", 2),
    "positional_error": ("positional error", 4), "attribute_error": ("attribute error", 4),
}  # fmt: skip


def measures(content: Mapping[str, Any]) -> list[list[str]]:
    """Of each section and of all together its name, its questions and its measures."""
    every = [*content["sections"], {"name": "overall", "questions": content["questions"],
                                    **content["overall"]}]  # fmt: skip
    return [
        [one["name"], f"{one['questions']:,}",
         *(f"{one[name]['value']:.{digits}f} ({one[name]['interval'][0]:.{digits}f}{NOTHING}"
           f"{one[name]['interval'][1]:.{digits}f})" for name, (_, digits) in MEASURES.items())]
        for one in every
    ]  # fmt: skip


def probe_summary(content: Mapping[str, Any]) -> list[str]:
    """The example and the measures for a terminal, a line each."""
    head = ["", "questions", *(label for label, _ in MEASURES.values())]
    rows = [head, *measures(content)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    one = content["example"]
    first = f"{one['context']} {one['question']} {one['answer']} (score {number(one['score'])})"
    return [first, *lines, "in brackets 95 % bootstrap intervals", *content["notes"]]


def probed(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A probe as the page shows it."""
    example, platform = content["example"], content["platform"]
    described = {one["name"]: one for one in content["templates"]["sections"]}
    sections = []
    for one in content["sections"]:
        rows = [*one["associations"], *one["groups"]]
        scale = max((abs(end) for row in rows for end in (row["gamma"], *row["gamma_interval"])),
                    default=0) or 1  # fmt: skip
        sections.append({
            "name": one["name"], "mean_score": number(one["mean_score"]),
            "examples": [(each["context"], " / ".join(each["questions"]))
                         for each in described[one["name"]]["examples"]],
            "groups": [association(row, scale) for row in one["groups"]],
            "associations": [association(row, scale) for row in one["associations"]],
        })  # fmt: skip
    return {
        "name": name,
        "about": f"{content['started'][:16].replace('T', ' ')} \u00b7 {content['config']['model']} "
                 f"\u00b7 {platform['dtype']} \u00b7 {Path(content['templates']['path']).name}",
        "made_of": {"config": content["config"], "model": content["model"],
                    "templates": content["templates"], "platform": platform,
                    "versions": content["versions"]},
        "question": example["question"], "answer": example["answer"],
        "score": number(example["score"]),
        "pieces": excerpt(example["context"], [example["answer"]]),
        "note": content["templates"]["note"], "notes": list(content["notes"]),
        "head": ["section", "questions", *(label for label, _ in MEASURES.values())],
        "rows": measures(content), "sections": sections,
    }  # fmt: skip


def association(row: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A line of the ranked associations; what is drawn goes from -100 to 100."""
    low, high = row["gamma_interval"]
    at, begin, end = (100 * value / scale for value in (row["gamma"], low, high))
    return {
        "subject": row.get("subject"), "group": row["group"], "attribute": row["attribute"],
        "gamma": f"{signed(row['gamma'], 4)} ({signed(low, 4)} to {signed(high, 4)})",
        "eta": signed(row["eta"]), "n": f"{row['n']:,}", "left": f"{min(at, 0):.1f}",
        "width": f"{abs(at):.1f}", "begin": f"{begin:.1f}", "end": f"{end:.1f}", "less": at < 0,
    }  # fmt: skip


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


def with_interval(metrics: Mapping[str, Any], name: str) -> str:
    """A score and its interval, where there is one."""
    if name not in metrics:
        return NOTHING
    low, high = metrics[f"{name}_interval"]
    return f"{metrics[name]:.2f} ({low:.2f} to {high:.2f})"


def trained(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A training run as the page shows it."""
    config, data, log = content["config"], content["data"], content["log"]
    taught = f", taught by {config['teacher']}" if config["teacher"] else ""
    about = (
        f"{content['started'][:16].replace('T', ' ')} \u00b7 {config['model']} on "
        f"{data['questions']:,} questions of {data['name']}{taught} \u00b7 "
        f"{content['steps_done']:,} of {content['steps']:,} steps of {config['batch_size']} windows"
    )
    energy = carbon.told(content["carbon"]) if content["carbon"] else ""
    size = -(-len(log) // POINTS) or 1
    stretches = [log[at : at + size] for at in range(0, len(log), size)]
    kinds = {"loss": "loss"}
    if config["teacher"]:
        kinds |= {"answers": "of answers", "distillation": "of distillation"}
    curves = {
        label: ([each[-1]["step"] for each in stretches],
                [sum(one[kind] for one in each) / len(each) for each in stretches])
        for kind, label in kinds.items()
    }  # fmt: skip
    return {
        "name": name,
        "about": about,
        "head": ["epoch", "steps", "loss", *(one.label for one in METRICS.values()), "questions/s"],
        "rows": [
            [f"{one['epoch']:g}", f"{one['step']:,}", number(one["loss"]),
             *(with_interval(one, metric) for metric in METRICS),
             number(one["questions_per_second"])]
            for one in content["epochs"]
        ],
        "carbon": f"{energy[:1].upper()}{energy[1:]}",
        "plot": lines(curves, name="loss", xlabel="step", ylabel="loss") if log else "",
        "made_of": {key: content[key] for key in
                    ("config", "model", "teacher", "data", "windows", "platform", "versions")},
    }  # fmt: skip


def evaluations(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]] | None:
    """A table of the runs of `flaxqa eval`."""
    found = [(one.name, one.metrics, one.run) for one in runs if one.metrics and one.run]
    measured, rows = any("carbon" in metrics for _, metrics, _ in found), []
    for name, metrics, run in found:
        rows.append([
            name, run["started"][:16].replace("T", " "), run["config"]["model"],
            run["data"]["name"], run["platform"]["dtype"], f"{metrics['total']:,}",
            *(with_interval(metrics, one) for one in METRICS),
            number(metrics["questions_per_second"]),
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
            "plots": plots(there(run.comparison)),
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
        probed=[probed(run.name, run.probe) for run in runs if run.probe is not None],
        trained=[trained(run.name, run.training) for run in runs if run.training is not None],
        most=MOST_ASSOCIATIONS, number=number,
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
