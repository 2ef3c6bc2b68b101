"""One page of results: of compare, eval, probe and finetune as a self-contained HTML file.

The page loads nothing, neither script nor font nor picture; plots are SVG inside it, in the colours
of the reader's light or dark scheme. All text from data is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import carbon, files
from flaxqa.errors import DataError

from .plots import NOTHING, bars, lines, number, plots
from .probed import MOST_ASSOCIATIONS, probed
from .runs import Kind, read_json
from .runs import read as read_runs
from .squad import METRICS
from .summaries import cut, disagreements, shown, summary, table, there

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


# --- the page ---


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
