"""Any number of records answered, each exactly once or set aside with its reason.

The input is cut into shards (`flaxqa.records`), each of which becomes one part of the output
(`flaxqa.parts`). A worker (`flaxqa.work`) answers shards one after the other; engines
(`flaxqa.engines`) only say who works:

- `local`: this process, on its devices.
- `ray`: actors of Ray, a shard for each that is free.
- one process for each host, by `share`: process i of n takes every n-th shard.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxqa import buckets, carbon, engines, inputs, records, stores
from flaxqa.config import PredictConfig
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.parts import SUFFIXES, Entry, Output
from flaxqa.progress import Progress, Silence
from flaxqa.records import Columns, Plan
from flaxqa.rows import Input
from flaxqa.work import Worker, columns_of, describe, load_reader

if TYPE_CHECKING:
    from flaxqa.reader import Reader

ALWAYS_ALLOWED = 100  # records set aside, however few there are in all


@dataclasses.dataclass
class Summary:
    """What a run came to.

    Attributes:
      complete: whether all parts are there, also those of other processes.
      records: of the whole input.
      answered: of them, in the parts that are there.
      set_aside: of them.
      parts: that are there.
      computed: records that this run computed; the others were there before.
      windows: of those.
      seconds: of computing them.
      padding_share: of the computed tokens.
      batch_tokens: of the largest batch on each device, at the end.
      carbon: the energy of the whole run, see `flaxqa.carbon`; of this process while the run is not
        complete; None if it was not measured.
    """

    complete: bool
    records: int
    answered: int
    set_aside: int
    parts: int
    computed: int = 0
    windows: int = 0
    seconds: float = 0.0
    padding_share: float = 0.0
    batch_tokens: int | None = None
    carbon: carbon.Record | None = None


def inputs_of(config: PredictConfig) -> list[Input]:
    found = inputs.find(config.input, options=config)
    inputs.refuse_inside(config.input, found, config.output)
    return found


def plan_of(
    config: PredictConfig, found: Sequence[Input], columns: Columns, progress: Progress
) -> Plan:
    progress.stage("counting records")
    return records.plan(
        found,
        config.shard_size,
        columns=columns,
        unique_ids=config.unique_ids,
        progress=progress.count,
    )


# --- running ---


def predict(
    config: PredictConfig,
    *,
    share: tuple[int, int] | None = None,
    restart: bool = False,
    reader: Reader | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Answers all records of the input, or goes on where an earlier run was stopped.

    Args:
      config: what to do.
      share: (i, n) when this is process i of n that share the work; the last of them to end, or
        `finalize`, declares the run complete.
      restart: whether to remove what another run left in the output.
      reader: one that was loaded as the config says; None to load it.
      progress: is told how it goes.

    Raises:
      UsageError: an option or an input cannot be used, or the output has another run.
      ModelRejected: see `flaxqa.load`.
      DataError: too many records were set aside, or an input changed meanwhile.
      TryAgain: the output cannot be written, or somebody else is writing there; the same call goes
        on from there.
    """
    progress = progress or Silence()
    columns = columns_of(config)
    check(config, share)
    found = inputs_of(config)
    if config.engine == "ray":
        config = engines.for_ray(config)
    loaded = [] if reader is None else [reader]

    def make_plan(before: Plan | None) -> Plan:
        if before is not None and before.is_of(found, config.shard_size, config.unique_ids):
            return before
        return plan_of(config, found, columns, progress)

    def describe_run(plan: Plan) -> dict[str, Any]:
        if not loaded:
            progress.stage("loading the checkpoint")
            loaded.append(load_reader(config))
        return describe(config, plan, loaded[0])

    with carbon.Meter(config) as meter, output_in(config.output, share) as output:
        output.begin(make_plan, describe_run, suffix=SUFFIXES[config.format], restart=restart)
        meter.covers(loaded[0].predictor.devices[0].platform)
        spent = compute(config, output, loaded[0], progress, meter)
        complete = len(output.finished) == len(output.place.plan.shards)
        summary = summary_of(output, spent, loaded[0], complete)
        if complete and share is None:
            progress.stage("completing")
            summary.carbon = output.finalize().get("carbon")
        elif (measured := meter.reading()) is not None:
            summary.carbon = carbon.result([measured], summary.computed)
    return summary if share is None else completed(config, summary, spent)


def completed(config: PredictConfig, summary: Summary, spent: Total) -> Summary:
    """The last process to end completes the run; the others find it locked or not complete."""
    try:
        whole = finalize(config.output)
    except TryAgain:
        return dataclasses.replace(summary, complete=False)
    return dataclasses.replace(whole, batch_tokens=summary.batch_tokens, **spent.fields())


def compute(
    config: PredictConfig, output: Output, reader: Reader, progress: Progress, meter: carbon.Meter
) -> Total:
    """Computes the parts that are left, and notes each, and what was measured meanwhile."""
    place, spent = output.place, Total()
    left = output.left()
    sizes = {i: sum(one.records for one in place.plan.shards[i]) for i in output.mine()}
    progress.begin(sum(sizes.values()), sum(sizes.values()) - sum(sizes[i] for i in left))
    run = engines.run_on_ray if config.engine == "ray" else engines.run_here
    try:
        for entry, took in run(config, place, reader, left, progress):
            output.note(entry)
            spent.add(entry, took)
            meter.count(entry.rows + entry.set_aside)
            output.note_measured(meter)
            progress.advance(0, 0, spent.fields()["padding_share"])
            refuse_too_many(config, output, place.plan)
    finally:
        meter.stop()
        if left:  # a run that is complete does not grow by being looked at
            output.note_measured(meter)
    return spent


def output_in(directory: str | Path, share: tuple[int, int] | None = None) -> Output:
    """The directory of a run, here or in an object store."""
    if stores.is_url(directory):
        return buckets.BucketOutput(str(directory), share)
    return Output(directory, share)


def finalize(directory: str | Path) -> Summary:
    """Declares complete what several processes have computed.

    Raises:
      UsageError: there is no run in the directory.
      TryAgain: parts are missing, or somebody is still writing there.
    """
    with output_in(directory) as output:
        output.go_on()
        done = output.finalize()
        summary = summary_of(output, Total(), None, True)
        return dataclasses.replace(summary, carbon=done.get("carbon"))


def check(config: PredictConfig, share: tuple[int, int] | None) -> None:
    """Refuses options that do not go together."""
    if not config.input:
        raise UsageError("there is no INPUT: give files, folders, patterns or a hub data set")
    if share is not None and not 0 <= share[0] < share[1]:
        raise UsageError(f"shard {share[0]}/{share[1]}: the first must be from 0 to the second - 1")
    if share is not None and config.engine != "local":
        raise UsageError("a share of the work is computed by the engine local")
    if config.carbon and config.engine != "local":
        raise UsageError(
            "--carbon is for the engine local, which measures the machine that it runs on; with "
            "--shard i/n on each host, the run has the sum of all hosts"
        )
    if config.profile is not None and config.engine != "local":
        raise UsageError("--profile is for the engine local, which computes in this process")


@dataclasses.dataclass
class Total:
    """What the parts that this run computed took."""

    computed: int = 0
    windows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, entry: Entry, took: Mapping[str, int]) -> None:
        self.computed += entry.rows + entry.set_aside
        for name in ("windows", "tokens", "computed_tokens"):
            setattr(self, name, getattr(self, name) + took[name])

    def fields(self) -> dict[str, Any]:
        return {
            "computed": self.computed,
            "windows": self.windows,
            "seconds": time.perf_counter() - self.began,
            "padding_share": (self.computed_tokens - self.tokens) / max(self.computed_tokens, 1),
        }


def summary_of(output: Output, total: Total, reader: Reader | None, complete: bool) -> Summary:
    entries = output.finished.values()
    return Summary(
        complete=complete,
        records=output.place.plan.records,
        answered=sum(entry.rows for entry in entries),
        set_aside=sum(entry.set_aside for entry in entries),
        parts=len(entries),
        batch_tokens=reader.predictor.row_tokens[-1] if reader is not None else None,
        **total.fields(),
    )


def refuse_too_many(config: PredictConfig, output: Output, plan: Plan) -> None:
    """Stops a run that is plainly wrong.

    Raises:
      DataError: more records were set aside than `max_errors` allows.
    """
    set_aside = sum(entry.set_aside for entry in output.finished.values())
    allowed = max(ALWAYS_ALLOWED, int(config.max_errors * plan.records))
    if set_aside > allowed:
        raise DataError(
            f"{set_aside:,} records were set aside, more than the {allowed:,} that --max-errors "
            f"{config.max_errors:g} allows of {plan.records:,}; the reasons are in "
            f"{output.path('_errors')}. Finished parts stay: a larger --max-errors goes on"
        )


# --- how long it would take ---


@dataclasses.dataclass
class Estimate:
    """What a run would come to, from a sample.

    Attributes:
      records: of the input.
      shards: of the input.
      sampled: records of the sample.
      set_aside: of the sample, records that would be set aside.
      windows: of the whole input, about.
      records_per_second: of this machine, once it is warm.
      minutes: of the whole input, about.
    """

    records: int
    shards: int
    sampled: int
    set_aside: int
    windows: int
    records_per_second: float
    minutes: float


SAMPLED_SHARDS, SAMPLED_SECONDS = 16, 10.0


def estimate(config: PredictConfig, *, progress: Progress | None = None) -> Estimate:
    """Reads the input, answers a sample of it for some seconds, and writes nothing.

    Args:
      config: of the run.
      progress: is told how it goes.
    """
    progress = progress or Silence()
    check(config, None)
    columns = columns_of(config)
    plan = plan_of(config, inputs_of(config), columns, progress)
    progress.stage("loading the checkpoint")
    worker = Worker(config, plan, "", load_reader(config))
    chosen = sorted({len(plan.shards) * i // SAMPLED_SHARDS for i in range(SAMPLED_SHARDS)})
    each = max(1, min(64, plan.shard_size))
    seconds, sampled, set_aside, windows = 0.0, 0, 0, 0
    progress.stage("answering a sample")
    for warm in (False, True):
        for shard in chosen:
            began = time.perf_counter()
            rows = itertools.islice(records.rows_of(plan, shard, worker.source), each)
            asked = [worker.asked(number, row) for number, row in rows]
            answers = list(worker.answers([asked]))
            if not warm:
                break  # what is compiled at first does not count
            seconds += time.perf_counter() - began
            sampled += len(asked)
            set_aside += sum(one.error is not None for one in answers)
            windows += sum(one.n_windows for one in answers)
            if seconds > SAMPLED_SECONDS:
                break
    rate = sampled / max(seconds, 1e-9)
    return Estimate(
        records=plan.records,
        shards=len(plan.shards),
        sampled=sampled,
        set_aside=set_aside,
        windows=round(plan.records * windows / max(sampled, 1)),
        records_per_second=rate,
        minutes=plan.records / rate / 60,
    )
