"""One page of results: of compare, eval, probe and finetune as a self-contained HTML file.

The page loads nothing, neither script nor font nor picture; plots are SVG inside it, in the colours
of the reader's light or dark scheme. All text from data is escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import carbon, files
from flaxqa.errors import DataError

from . import copies, evaluated, examples, explorer, runs
from .evaluated import with_interval
from .groups import GROUPINGS, Grouping
from .plots import lines, number, plots
from .probed import MOST_ASSOCIATIONS, probed
from .runs import Kind
from .squad import METRICS
from .summaries import (
    by_theme,
    cell,
    cut,
    disagreements,
    groups,
    head_of,
    price,
    shown,
    summary,
    table,
    there,
    title,
)

HERE = Path(__file__).parent
POINTS = 100  # of a curve of losses: each the mean of a stretch of steps


# --- reading ---

FIELDS: dict[Kind, str] = {
    "compare": "comparison", "probe": "probe", "finetune": "training",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What a directory of results has.

    Attributes:
      name: of the directory.
      comparison: content of comparison.json, None if it is no comparison.
      evaluation: metrics.json, run.json and where they are; None if it is no evaluation.
      probe: content of probe.json, None if there is none.
      training: content of finetune.json, with the lines of log.jsonl as `log`; None without them.
    """

    name: str
    comparison: Mapping[str, Any] | None = None
    evaluation: runs.Run | None = None
    probe: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None


def read(directory: str | Path) -> Run:
    """The results in a directory of `flaxqa eval`, `compare`, `bench`, `probe` or `finetune`.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    there = {one.kind: one for one in runs.read(directory)}
    found: dict[str, Any] = {
        field: there[kind].content for kind, field in FIELDS.items() if kind in there
    }
    if "eval" in there and "comparison" not in found:
        found["evaluation"] = there["eval"]
    if "training" in found:
        log = runs.read_json(there["finetune"].directory / "log.jsonl", lines=True)
        found["training"] = {**found["training"], "log": log}
    return Run(files.local(directory).name, **found)


# --- the page ---


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


def evaluated_of(
    given: Sequence[Run], groupings: Sequence[Grouping], precision: float | None
) -> dict[str, Any] | None:
    """The evaluations as the page shows them; None without any."""
    found = [one.evaluation for one in given if one.evaluation is not None]
    if not found:
        return None
    same, grid = evaluated.parted(*evaluated.table(found))
    shown: dict[str, Any] = {
        "title": evaluated.title(found), "same": same, "table": grid,
        "plots": evaluated.plots(found), "differ": evaluated.questions_differ(found),
        "made_of": {name: run.about for name, run in zip(runs.names(found), found, strict=True)},
    }  # fmt: skip
    read, problems = [], []
    for run in found:
        try:
            read.append((run, runs.checked(run, examples.of_run)))
        except DataError as error:
            problems.append(str(error))
    labels = runs.names([run for run, _ in read])
    read = [(run, dataclasses.replace(each, name=name))
            for (run, each), name in zip(read, labels, strict=True)]  # fmt: skip
    own = [each for _, each in read]
    shown["problems"] = problems
    if not own:
        return shown
    payload = explorer.payload(own, groupings)
    return shown | {
        "common": evaluated.common(own) if shown["differ"] else None,
        "differences": evaluated.differences(read, groupings),
        "mistakes": evaluated.mistakes_of(own), "trust": evaluated.trust(read, precision),
        "no_answer": evaluated.no_answer(read), "groups": evaluated.groups(own, groupings),
        "names": [each.name for each in own], "payload": payload,
        "data": as_html(explorer.as_script(payload)), "rows": list(explorer.rows(payload)),
    }  # fmt: skip


def as_html(text: str) -> Any:
    """A text that is HTML already."""
    import markupsafe

    return markupsafe.Markup(text)  # noqa: S704 (of explorer.as_script)


def page(
    given: Sequence[Run],
    groupings: Sequence[Grouping] = GROUPINGS,
    precision: float | None = None,
    dollars: float | None = None,
) -> str:
    """The page of some runs.

    Args:
      given: what is shown.
      groupings: into which groups questions are put.
      precision: see `eval.config.TrustOptions`.
      dollars: see `eval.config.CostOptions`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "cut": cut, "as_cell": cell}
    environment.globals |= {"as_markdown": copies.plain_markdown, "as_latex": copies.latex}
    compared = [
        {
            "name": run.name,
            "content": run.comparison,
            "title": title(run.comparison),
            "head": head_of(run.comparison),
            "summary": summary(run.comparison),
            "dollars": price(run.comparison, dollars),
            "themes": by_theme(*table(run.comparison, dollars)),
            "plots": plots(there(run.comparison)),
            "disagreements": disagreements(run.comparison),
            "differing": len(run.comparison["disagreements"]),
            "groups": groups(run.comparison),
        }
        for run in given
        if run.comparison is not None
    ]
    script = (HERE / "explorer.js").read_text(encoding="utf-8")
    template = environment.get_template("report.html")
    return template.render(
        compared=compared,
        evaluated=evaluated_of(given, groupings, precision),
        probed=[probed(run.name, run.probe) for run in given if run.probe is not None],
        trained=[trained(run.name, run.training) for run in given if run.training is not None],
        most=MOST_ASSOCIATIONS, number=number, script=as_html(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def write(given: Sequence[Run], path: str | Path, **options: Any) -> None:
    """Writes the page.

    Args:
      given: what is shown.
      path: of the page.
      **options: see `page`.

    Raises:
      UsageError: the path is a directory, a URL, or below a file.
      DataError: a run's results cannot be shown; says which.
      TryAgain: the place cannot be written.
    """
    try:
        content = page(given, **options)
    except ImportError:
        raise
    except Exception as error:  # damage shows in as many ways as there are columns
        raise DataError(
            f"the results in {culprit(given)} are damaged, or of another version: "
            f"{type(error).__name__}: {error}"
        ) from error
    files.write_named(path, examples.valid(content).encode())


def culprit(given: Sequence[Run]) -> str:
    """The name of the first run that cannot be shown by itself."""
    for run in given:
        try:
            page([run])
        except Exception:
            return run.name
    return " and ".join(run.name for run in given)
