"""Results into experiment trackers, by their own packages and, unless told otherwise, offline.

Each is told the config, every number of the results, and the curves of a training; the small files
of results go along where the tracker keeps files. A tracker that fails costs no result: they are
written first, and what went wrong is said.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxqa import stores
from flaxqa.errors import UsageError

from .config import LogOptions

PROJECT = "flaxqa"
AT_ONCE = 1_000  # numbers that MLflow takes in one call
LARGEST = 50_000_000  # bytes of a file that goes along


@dataclasses.dataclass(frozen=True)
class Results:
    """What is told of a run.

    Attributes:
      output: the directory of the run.
      config: what was asked for.
      metrics: every number by its name, parts of it with slashes.
      curves: numbers at a step each.
      files: names of files of results, in the output.
    """

    output: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Sequence[tuple[int, Mapping[str, float]]] = ()
    files: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.output.absolute().name

    @property
    def kept(self) -> list[Path]:
        """The files that are there and not too large."""
        paths = [self.output / name for name in self.files]
        return [path for path in paths if path.is_file() and path.stat().st_size <= LARGEST]


def numbers(content: Any, before: str = "") -> dict[str, float]:
    """Every number of nested objects by its name; those in lists are left out."""
    found: dict[str, float] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[before + name] = float(value)
    return found


def of_backends(content: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a comparison, by backend."""
    found: dict[str, float] = {}
    for row in content["backends"]:
        found |= numbers(row, f"{row['name']}/")
    return found


def of_training(content: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a training tells: its last epoch, and its curves."""

    def told(one: Mapping[str, Any], before: str = "") -> dict[str, float]:
        return numbers({name: value for name, value in one.items() if name != "step"}, before)

    curves = [(int(one["step"]), told(one, "train/")) for one in log]
    curves += [(int(one["step"]), told(one, "epoch/")) for one in content["epochs"]]
    last = content["epochs"][-1] if content["epochs"] else {}
    return {"metrics": told(last), "curves": sorted(curves, key=lambda each: each[0])}


# ------------------------------------------------------------------------------------ each of them


def tensorboard(results: Results) -> str:
    from tensorboardX import SummaryWriter

    folder, suffix = results.output / "tensorboard", f".{PROJECT}"
    for before in folder.glob(f"events.out.tfevents.*{suffix}"):  # they would be shown as one run
        before.unlink()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        rows = "".join(f"| {name} | {value} |\n" for name, value in results.config.items())
        writer.add_text("config", f"| option | value |\n|---|---|\n{rows}")
        for step, values in results.curves or [(0, results.metrics)]:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
    return f"tensorboard --logdir {folder}"


def mlflow(results: Results) -> str:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # which begins with the import
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    given = os.environ.get("MLFLOW_TRACKING_URI")
    output = results.output.absolute()
    where = given or f"sqlite:///{output / 'mlflow.db'}"
    # A client of its own: `mlflow.set_tracking_uri` would hold for all that the process does next.
    client = MlflowClient(where)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if (experiment := client.get_experiment_by_name(name)) is not None:
        number = experiment.experiment_id
    else:
        place = None if given else (output / "mlartifacts").as_uri()
        number = client.create_experiment(name, artifact_location=place)
    run = client.create_run(number, run_name=results.name).info.run_id
    params = [Param(key, str(value)) for key, value in results.config.items()]
    client.log_batch(run, params=params)
    now = int(1_000 * time.time())
    every = [*results.curves, (0, results.metrics)]
    metrics = [Metric(key, value, now, step) for step, values in every
               for key, value in values.items()]  # fmt: skip
    for begin in range(0, len(metrics), AT_ONCE):
        client.log_batch(run, metrics=metrics[begin : begin + AT_ONCE])
    for path in results.kept:
        client.log_artifact(run, str(path))
    client.set_terminated(run)
    return "mlflow has the run" if given else f"mlflow ui --backend-store-uri {where}"


def wandb(results: Results) -> str:
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would go out all the same
    import wandb as tracker

    run = tracker.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=results.name,
                       config=dict(results.config), dir=str(results.output), mode=mode,
                       reinit="create_new")  # beside a run of the caller's  # fmt: skip
    for step, values in results.curves:
        run.log(dict(values), step=step)
    run.summary.update(dict(results.metrics))
    if results.kept:
        kept = tracker.Artifact("results", type="results")
        for path in results.kept:
            kept.add_file(str(path))
        run.log_artifact(kept)
    run.finish()
    return f"wandb sync {Path(run.dir).parent}" if mode == "offline" else f"wandb, mode {mode}"


def trackio(results: Results) -> str:
    import trackio as tracker

    def told() -> None:
        tracker.init(project=PROJECT, name=results.name, config=dict(results.config))
        for step, values in [*results.curves, (None, results.metrics)]:
            tracker.log(dict(values), step=step)
        tracker.finish()

    contextvars.Context().run(told)  # trackio's current run, which may be the caller's, is in it
    return f"trackio show --project {PROJECT}"


class Tracker(NamedTuple):
    """One of them.

    Attributes:
      package: that has to be installed.
      log: tells it of a run; gives how to look at it.
    """

    package: str
    log: Callable[[Results], str]


TRACKERS = {
    "tensorboard": Tracker("tensorboardX", tensorboard),
    "mlflow": Tracker("mlflow", mlflow),
    "wandb": Tracker("wandb", wandb),
    "trackio": Tracker("trackio", trackio),
}


def check(options: LogOptions, output: str) -> None:
    """Raises: UsageError: a tracker is unknown or not installed, or the output is in an object
    store.
    """
    if not set(options.log) <= set(TRACKERS):
        raise UsageError(f"log is {options.log!r}, it must be any of {', '.join(TRACKERS)}, as "
                         "('wandb',)")  # fmt: skip
    if options.log and stores.is_url(output):
        raise UsageError("--log keeps files of its own beside the results, so the output must be "
                         f"a directory here, not {output}")  # fmt: skip
    for name in options.log:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--log {name} needs {package}, which this Python does not have: "
                f"pip install 'flaxqa[{name}]'"
            )


def log(options: LogOptions, results: Callable[[], Results]) -> None:
    """Tells all trackers that were asked for, each by itself."""
    for name in dict.fromkeys(options.log):
        try:
            with output_on_stderr():
                told = TRACKERS[name].log(results())
        except Exception as error:
            print(f"flaxqa: {name} could not log the run, whose results are written: "
                  f"{type(error).__name__}: {error}", file=sys.stderr)  # fmt: skip
        else:
            print(f"flaxqa: logged; {told}", file=sys.stderr)


@contextlib.contextmanager
def output_on_stderr() -> Iterator[None]:
    """What trackers print does not get between results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
