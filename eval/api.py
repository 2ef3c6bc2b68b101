"""`flaxqa.evaluate` and `flaxqa.compare`: the commands from Python, and their results.

found = flaxqa.evaluate(model, "dev-v1.1.json")
found.metrics["f1"], found.to_pandas()
flaxqa.compare(model, rows, backends=("jax", "torch"), limit=100).to_pandas()
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxqa import show
from flaxqa.config import takes
from flaxqa.errors import UsageError
from flaxqa.progress import Silence, TerminalProgress
from flaxqa.records import Columns

from . import evaluated, questions, report, runs, summaries
from .config import CompareConfig, EvalConfig
from .squad import METRICS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to: what its files hold.

    Attributes:
      metrics: scores with intervals, counts, speeds: metrics.json.
      predictions: {id: text}: predictions.json.
      run: what redoes it: run.json.
      table: of pyarrow, a row a question: per_example.parquet.
    """

    metrics: Mapping[str, Any]
    predictions: Mapping[str, str]
    run: Mapping[str, Any]
    table: Any

    @classmethod
    def read(cls, directory: str | Path) -> Evaluation:
        """What `flaxqa eval` wrote into a directory."""
        import pyarrow.parquet as pq

        found, folder = runs.evaluation(directory), Path(directory)
        predictions = json.loads((folder / "predictions.json").read_bytes())
        table = pq.read_table(folder / "per_example.parquet")
        return cls(found.content, predictions, found.about, table)

    def to_pandas(self) -> Any:
        """A data frame with a row a question."""
        return self.table.to_pandas()

    def as_run(self) -> runs.Run:
        return runs.Run("eval", Path("evaluation"), self.metrics, self.run)

    def __repr__(self) -> str:
        scores = ", ".join(f"{one.label} {self.metrics[name]:.2f}" for name, one in METRICS.items())
        return f"<Evaluation: {scores}, {self.metrics['total']:,} questions>"

    def _repr_html_(self) -> str:
        head, rows = evaluated.table([self.as_run()])
        return show.html_table(head[1:], [row[1:] for row in rows])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
      content: everything measured: comparison.json.
    """

    content: Mapping[str, Any]

    def to_pandas(self) -> Any:
        """A data frame with a row a backend: numbers in questions/s, seconds, percent and bytes."""
        import pandas

        return pandas.DataFrame([numbers_of(row) for row in self.content["backends"]])

    def __repr__(self) -> str:
        return "<Comparison: " + " ".join(summaries.summary(self.content)) + ">"

    def _repr_html_(self) -> str:
        return show.html_table(*summaries.table(self.content))


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one backend, flat; without any if it was not measured."""
    found = {name: row[name] for name in ("name", "backend", "dtype")}
    if "absent" in row:
        return found | {"verdict": "absent", "reason": row["absent"]}
    found |= {"verdict": row["verdict"], "reason": "; ".join(row["reasons"]) or None}
    found |= {name: score["value"] for name, score in row["scores"].items()}
    for way, one in row["offline"].items():
        names = ("questions_per_second", "useful_flops_per_second", "slower_than_first",
                 *(name for name in one if name.endswith("_per_1000_questions")))  # fmt: skip
        found |= {f"{way}_{name}": one[name] for name in names}
    found |= {name: (row["single"] or {}).get(name) for name in ("p50", "p90", "p99")}
    found["server_rate"] = (row["server"] or {}).get("rate")
    costs = ("load_seconds", "first_call_seconds", "peak_memory_bytes", "device_memory_bytes")
    return found | {name: row[name] for name in costs}


@takes(EvalConfig)
def evaluate(
    model: str | Path, data: Any, *, output: str | Path | None = None, progress: bool = True,
    **options: Any,
) -> Evaluation:  # fmt: skip
    """Scores a checkpoint: exact match, F1 and throughput, as `flaxqa eval`.

    Args:
      model: a directory or a hub id.
      data: what `flaxqa eval` takes as --data; or rows with `id`, `question`, `context` and
        `answers`: a list of mappings, a `datasets.Dataset`, or a frame of pandas, polars or Arrow.
      output: a directory for the files; None to keep none.
      progress: whether to show how it goes on stderr.
      **options: the other fields of `flaxqa.eval.config.EvalConfig`.

    Raises:
      UsageError, DataError, ModelRejected, TryAgain: see `flaxqa.eval.run.evaluate`.
    """
    from . import run

    with prepared(data, output, options) as (name, folder, given):
        config = EvalConfig(model=str(model), data=name, output=folder, **options)
        with TerminalProgress() if progress else Silence() as shown:
            run.evaluate(config, shown, given)
        return Evaluation.read(folder)


@takes(CompareConfig)
def compare(
    model: str | Path, data: Any, backends: Sequence[str] = ("jax", "torch"), *,
    output: str | Path | None = None, progress: bool = True, **options: Any,
) -> Comparison:  # fmt: skip
    """Does the same work on several backends, as `flaxqa compare`.

    Args:
      model: a directory or a hub id.
      data: as in `evaluate`.
      backends: names of `flaxqa.eval.backends.BACKENDS`, perhaps with a dtype, or `module:Class`.
      output: a directory for comparison.json and the page; None to keep none.
      progress: whether to show how it goes on stderr.
      **options: the other fields of `flaxqa.eval.config.CompareConfig`.

    Raises:
      UsageError, DataError, ModelRejected, TryAgain: see `flaxqa.eval.compare.compare`.
    """
    from . import compare as measure

    with prepared(data, output, options) as (name, folder, given):
        config = CompareConfig(
            model=str(model), data=name, output=folder, backends=tuple(backends), **options
        )
        with TerminalProgress() if progress else Silence() as shown:
            content = measure.compare(config, shown, given)
        if output is not None:
            report.write([report.read(folder)], Path(folder) / "report.html")
        return Comparison(content)


@contextmanager
def prepared(
    data: Any, output: str | Path | None, options: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    """What `data` is called, where the files go, and the questions if they are there already."""
    if output is None and options.get("log"):
        raise UsageError("log keeps files beside the results: give an output")
    given, name = None, str(data)
    if not isinstance(data, (str, Path)):
        given = questions.from_rows(data, Columns.of(options.get("columns", {})))
        name = "rows"
    with tempfile.TemporaryDirectory() as folder:
        yield name, str(folder if output is None else output), given
