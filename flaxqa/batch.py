"""Any number of records answered, each exactly once or set aside with its reason.

The input is cut into shards (`flaxqa.records`), each of which becomes one part of the output
(`flaxqa.parts`). A `Worker` answers shards one after the other; engines only say who works:

- `local`: this process, on its devices.
- `ray`: a pool of actors of Ray Data, a shard for each task.
- one process for each host, by `share`: process i of n takes every n-th shard.

No engine changes a byte of the parts. While the devices work on one chunk of records, the next is
read and tokenized, the one before decoded; only at the end of a shard do they wait until its part
is written, so that a crash costs one shard.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxqa import features, records, sources
from flaxqa.config import PredictConfig
from flaxqa.errors import DataError, TryAgain, UsageError, check_counts, check_shares
from flaxqa.features import Example
from flaxqa.parts import SUFFIXES, Entry, Output, Place
from flaxqa.progress import Progress, Silence
from flaxqa.records import Columns, Plan
from flaxqa.sources import Input, Row, Source

if TYPE_CHECKING:
    import pyarrow as pa

    from flaxqa.answers import Answer, Answers
    from flaxqa.reader import Reader, Spent

ALWAYS_ALLOWED = 100  # records set aside, however few there are in all
KEYS = ("id", "question", "context")


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


class Worker:
    """Answers shards; holds a reader and what it needs to know of the run."""

    def __init__(self, config: PredictConfig, plan: Plan, run_key: str, reader: Reader):
        self.config, self.plan, self.run_key, self.reader = config, plan, run_key, reader
        self.columns = columns_of(config)
        self.sources: dict[str, Source] = {}
        self.duplicates = frozenset(plan.duplicates)
        self.model = model_name(config, reader)
        self.schema = schema_of(config, plan)
        texts = {field.name for field in self.schema if str(field.type) == "string"}
        self.texts = texts if config.format == "parquet" else ()
        # Of the others those of Arrow's types stay what they are.
        self.untouched = set(self.schema.names) - texts if config.format == "parquet" else ()

    def source(self, one: Input) -> Source:
        """The source of an input, kept open: the next shard often goes on where one ended."""
        if one.path not in self.sources:
            self.sources.clear()
            self.sources[one.path] = sources.source_of(one, self.columns.wanted())
        return self.sources[one.path]

    def asked(self, number: int, row: Row) -> Example | str:
        """What a record asks, or why it is set aside."""
        if number in self.duplicates:
            return f"the id {records.id_of(row, self.columns)!r} came before"
        limit = self.config.max_context_chars
        example = records.example_of(row, self.columns, max_context_chars=limit)
        for name in self.config.keep if not isinstance(example, str) else ():
            try:
                self.kept(row, name)
            except ValueError as error:
                return f"the column {name!r} cannot be kept: {error}"
        return example

    def kept(self, row: Row, name: str) -> Any:
        """The value of a column that goes into the output.

        Raises:
          ValueError: it cannot be represented there.
        """
        value = (row.fields or {}).get(name)
        if name not in self.untouched:
            value = sources.plain_value(value)
        return as_text(value) if name in self.texts else value

    def run(
        self,
        shards: Iterable[int],
        write: Callable[..., Entry],
        progress: Callable[[int, int], None] = lambda records, windows: None,
    ) -> Iterator[tuple[Entry, Spent]]:
        """Answers shards in their order; each is written when it is given.

        Args:
          shards: their numbers.
          write: that of a `Place`.
          progress: called with the numbers of records and of windows just done.

        Raises:
          DataError: an input has changed.
          TryAgain: a part cannot be written.
        """
        from flaxqa import reader

        under_way: collections.deque[Chunk] = collections.deque()

        def chunks() -> Iterator[list[Example | str]]:
            for shard in shards:
                rows = (
                    (row, self.asked(number, row))
                    for number, row in records.rows_of(self.plan, shard, self.source)
                )
                chunk = None
                for some in reader.chunks(rows, size_of=lambda pair: features.characters(pair[1])):
                    chunk = Chunk(shard, some)
                    under_way.append(chunk)
                    yield [example for _, example in some]
                if chunk is not None:
                    chunk.last = True
                    # An empty chunk: what comes after it starts when the part is written.
                    under_way.append(Chunk(shard, []))
                    yield []

        part = Part(self)
        for found, spent in self.reader.answer_chunks(chunks(), self.decode, progress):
            chunk = under_way.popleft()
            part.spent.add(spent)
            for (row, example), one in zip(chunk.rows, found, strict=True):
                part.add(row, example, one)
            if chunk.last:
                entry = write(
                    chunk.shard, part.content(), part.rows, part.errors, self.computed_by()
                )
                yield entry, part.spent
                part = Part(self)

    def answers(self, chunks: Iterable[list[Example | str]]) -> Iterator[Answers]:
        """The answers to chunks of what `asked` gave."""
        for found, _ in self.reader.answer_chunks(chunks, self.decode):
            yield from found

    @functools.cached_property
    def decode(self) -> Any:
        """The rule of the run."""
        from flaxqa import answers

        names = ("top_k", "max_answer_length", "align_to_words", "overlapping")
        return answers.Decoder("spans", **{name: getattr(self.config, name) for name in names})

    def computed_by(self) -> dict[str, Any]:
        """What computes: for the manifest."""
        import jax

        import flaxqa

        predictor = self.reader.predictor
        return {
            "device": predictor.devices[0].device_kind,
            "devices": len(predictor.devices),
            **predictor.computed_by,
            "batch_tokens": predictor.row_tokens[-1],
            "machine": platform.machine(),
            "flaxqa": flaxqa.__version__,
            "jax": jax.__version__,
        }


@dataclasses.dataclass
class Chunk:
    """Records on their way, of one shard.

    Attributes:
      rows: each with what it asks, or why it asks nothing.
      last: whether the shard has no more; known once the next chunk was asked for.
    """

    shard: int
    rows: list[tuple[Row, Example | str]]
    last: bool = False


class Part:
    """The answers to a shard, as they come."""

    def __init__(self, worker: Worker):
        from flaxqa.reader import Spent

        self.worker, self.spent = worker, Spent()
        self.records: list[tuple[Any, ...]] = []  # each has a value for every column
        self.errors: list[bytes] = []

    @property
    def rows(self) -> int:
        return len(self.records)

    def add(self, row: Row, example: Example | str, found: Answers) -> None:
        """One record: a row of the part, or one that is set aside."""
        if found.error is not None or isinstance(example, str):
            self.errors.append(error_line(row, found.error or str(example)))
            return
        worker = self.worker
        config, threshold = worker.config, worker.config.no_answer_threshold
        kept: Sequence[Answer] = found
        if config.min_score > 0:
            kept = [one for one in found if one.score >= config.min_score]
        if threshold is not None and found.no_answer_score > threshold:
            kept = ()
        best: tuple[Any, ...] = (None,) * 4
        if kept:
            one = kept[0]
            best = (one.text, one.start, one.end, one.score)
        self.records.append((
            example.id,
            *best,
            *([[as_span(one) for one in kept]] if config.top_k > 1 else ()),
            found.no_answer_score,
            found.n_windows,
            found.question_cut,
            worker.model,
            worker.run_key,
            *(worker.kept(row, name) for name in config.keep),
        ))  # fmt: skip

    def content(self) -> bytes:
        """The bytes of the part's file: those of one version of pyarrow are always the same."""
        names = self.worker.schema.names
        if self.worker.config.format == "jsonl":
            lines = (sources.to_json(dict(zip(names, row, strict=True)), as_plain)
                     for row in self.records)  # fmt: skip
            return "".join(f"{line}\n" for line in lines).encode()
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        columns = zip(*self.records, strict=True) if self.records else ([] for _ in names)
        table = pa.table(
            dict(zip(names, map(list, columns), strict=True)), schema=self.worker.schema
        )
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()


def error_line(row: Row, reason: str) -> bytes:
    """A line of errors.jsonl."""
    told = {
        "file": row.file,
        "line": row.line,
        "byte_offset": row.byte_offset,
        "reason": reason,
        "row": row.as_text(),
    }
    return sources.to_json(told, sources.shown).encode() + b"\n"


def as_span(one: Answer) -> dict[str, Any]:
    """One of several answers."""
    return {"text": one.text, "start": one.start, "end": one.end, "score": one.score}


def as_text(value: Any) -> str | None:
    """A value of any type as the text that a column of text has: JSON, but for text itself."""
    if value is None or isinstance(value, str):
        return value
    return sources.to_json(value, as_plain)


def as_plain(value: Any) -> Any:
    """What JSON has no type for, as text."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


# --- what a run is ---


def columns_of(config: PredictConfig) -> Columns:
    """What the columns are called.

    Raises:
      UsageError: a name stands for nothing, or an output column is called like another.
    """
    if unknown := config.columns.keys() - set(KEYS):
        raise UsageError(
            f"columns: {', '.join(sorted(unknown))} cannot be named; those are {', '.join(KEYS)}"
        )
    columns = Columns(**config.columns, keep=config.keep)
    taken = [*own_columns(config), *config.keep]
    if twice := sorted({name for name in taken if taken.count(name) > 1}):
        raise UsageError(f"the output would have two columns {', '.join(map(repr, twice))}")
    return columns


def own_columns(config: PredictConfig) -> list[str]:
    """The names of the output's columns but those that are kept."""
    many = ["answers"] if config.top_k > 1 else []
    return ["id", "answer", "start", "end", "score", *many, "no_answer_score", "n_windows",
            "question_cut", "model", "run_key"]  # fmt: skip


def schema_of(config: PredictConfig, plan: Plan) -> pa.Schema:
    """The columns of a part with their types."""
    import pyarrow as pa

    span = {"text": pa.string(), "start": pa.int64(), "end": pa.int64(), "score": pa.float64()}
    types = {
        "id": pa.string(),
        "answer": pa.string(),
        **{name: span[name] for name in ("start", "end", "score")},
        "answers": pa.list_(pa.struct(list(span.items()))),
        "no_answer_score": pa.float64(),
        "n_windows": pa.int32(),
        "question_cut": pa.bool_(),
        "model": pa.string(),
        "run_key": pa.string(),
    }
    kept = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plan.types))) if plan.types else None
    fields = [(name, types[name]) for name in own_columns(config)]
    return pa.schema(fields + [
        (name, kept.field(name).type if kept is not None and name in kept.names else pa.string())
        for name in config.keep
    ])  # fmt: skip


def model_name(config: PredictConfig, reader: Reader) -> str:
    """What the output calls the model: its hub id and commit, or the name of its directory."""
    commit = reader.checkpoint.commit
    return f"{config.model}@{commit}" if commit else reader.checkpoint.directory.resolve().name


def describe(config: PredictConfig, plan: Plan, reader: Reader) -> dict[str, Any]:
    """All that decides an answer or its form, for the run key: the content of _run.json.

    Devices, batches and engines do not. Kernels and kinds of devices decide last digits; they may
    change in a run that is moved, and the manifest has those of each part.
    """
    import flaxqa

    columns = columns_of(config)
    return {
        "model": {"name": model_name(config, reader), "sha256": reader.checkpoint.sha256()},
        "data": {
            "inputs": plan.identity(),
            "shard_size": plan.shard_size,
            "columns": {name: getattr(columns, name) for name in KEYS},
            "keep": list(columns.keep),
            "unique_ids": config.unique_ids,
            "max_context_chars": config.max_context_chars,
        },
        "answers": {
            "decoder": "spans",
            **{
                name: getattr(config, name)
                for name in ("top_k", "max_answer_length", "align_to_words", "overlapping",
                             "min_score", "no_answer_threshold")
            },
        },
        "windows": {
            "max_length": reader.max_length,
            "doc_stride": reader.doc_stride,
            "kind": reader.windows,
        },
        "precision": {
            "dtype": str(reader.checkpoint.model.dtype),
            "matmul_precision": config.matmul_precision,
        },
        "output": {"format": config.format},
        "flaxqa": flaxqa.__version__,
    }  # fmt: skip


def load_reader(config: PredictConfig) -> Reader:
    from flaxqa import reader

    return reader.load(
        config.model,
        **{
            name: getattr(config, name)
            for name in ("revision", "dtype", "parallel", "devices", "batch_tokens", "max_length",
                         "doc_stride", "windows", "matmul_precision", "kernels")
        },
    )  # fmt: skip


def inputs_of(config: PredictConfig) -> list[Input]:
    found = records.find(config.input, format=config.input_format, split=config.split)
    records.refuse_inside(config.input, found, config.output)
    return [
        dataclasses.replace(one, sha256=config.data_revision) if one.format == "hub" else one
        for one in found
    ]


def plan_of(
    config: PredictConfig, inputs: Sequence[Input], columns: Columns, progress: Progress
) -> Plan:
    progress.stage("counting records")
    return records.plan(
        inputs,
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
    inputs = inputs_of(config)
    if config.engine == "ray":
        config = for_ray(config)
    loaded = [] if reader is None else [reader]

    def make_plan(before: Plan | None) -> Plan:
        if before is not None and before.is_of(inputs, config.shard_size, config.unique_ids):
            return before
        return plan_of(config, inputs, columns, progress)

    def describe_run(plan: Plan) -> dict[str, Any]:
        if not loaded:
            progress.stage("loading the checkpoint")
            loaded.append(load_reader(config))
        return describe(config, plan, loaded[0])

    with Output(config.output, share) as output:
        output.begin(make_plan, describe_run, suffix=SUFFIXES[config.format], restart=restart)
        place, spent = output.place, Total()
        left = output.left()
        sizes = {i: sum(one.records for one in place.plan.shards[i]) for i in output.mine()}
        progress.begin(sum(sizes.values()), sum(sizes.values()) - sum(sizes[i] for i in left))
        run = run_on_ray if config.engine == "ray" else run_here
        for entry, took in run(config, place, loaded[0], left, progress):
            output.note(entry)
            spent.add(entry, took)
            progress.advance(0, 0, spent.fields()["padding_share"])
            refuse_too_many(config, output, place.plan)
        complete = len(output.finished) == len(place.plan.shards)
        if complete and share is None:
            progress.stage("completing")
            output.finalize()
        summary = summary_of(output, spent, loaded[0], complete)
    if share is not None:
        # The last process to end completes the run; the others find it locked or not complete.
        try:
            whole = finalize(config.output)
            return dataclasses.replace(whole, batch_tokens=summary.batch_tokens, **spent.fields())
        except TryAgain:
            return dataclasses.replace(summary, complete=False)
    return summary


def finalize(directory: str | Path) -> Summary:
    """Declares complete what several processes have computed.

    Raises:
      UsageError: there is no run in the directory.
      TryAgain: parts are missing, or somebody is still writing there.
    """
    with Output(directory) as output:
        output.go_on()
        output.finalize()
        return summary_of(output, Total(), None, True)


def check(config: PredictConfig, share: tuple[int, int] | None) -> None:
    """Refuses options that cannot be."""
    if not config.input:
        raise UsageError("there is no INPUT: give files, folders, patterns or a hub data set")
    counts = ("shard_size", "max_context_chars", "top_k", "max_answer_length")
    check_counts(**{name: getattr(config, name) for name in counts})
    check_shares(
        max_errors=config.max_errors,
        min_score=config.min_score,
        no_answer_threshold=config.no_answer_threshold,
    )
    if share is not None and not 0 <= share[0] < share[1]:
        raise UsageError(f"shard {share[0]}/{share[1]}: the first must be from 0 to the second - 1")
    if share is not None and config.engine != "local":
        raise UsageError("a share of the work is computed by the engine local")
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
            f"{output.directory / '_errors'}. Finished parts stay: a larger --max-errors goes on"
        )


def run_here(
    config: PredictConfig, place: Place, reader: Reader, left: Sequence[int], progress: Progress
) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """The engine `local`: this process answers all."""
    from flaxqa.profile import Profile

    worker = Worker(config, place.plan, place.run_key, reader)
    with Profile(config.profile) as profile:
        for entry, spent in worker.run(left, place.write, profile.after(progress.advance)):
            yield entry, dataclasses.asdict(spent)


def for_ray(config: PredictConfig) -> PredictConfig:
    """The config with what actors would each decide by the devices that they see.

    This process only hands out work: it keeps its hands off accelerators, which are the actors'.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if config.dtype != "auto":
        return config
    accelerated = config.worker_gpus > 0 or bool(config.worker_resources)
    return dataclasses.replace(config, dtype="bfloat16" if accelerated else "float32")


def run_on_ray(
    config: PredictConfig, place: Place, reader: Reader, left: Sequence[int], progress: Progress
) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """The engine `ray`: a pool of actors of Ray Data, a shard for each task.

    The cluster is that of RAY_ADDRESS, or one that is started in this machine, on loopback.
    """
    if not left:
        return
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        # Ray reads it when it is imported. Only so does it listen on loopback alone on Linux, too:
        # it takes an address of 127.0.0.1 that it is given for the machine's address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray: pip install 'flaxqa[ray]' ({error})") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": 128 << 20,  # what passes through it is small
        }
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if "RAY_ADDRESS" in os.environ else local),
        )
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        workers = config.workers or default_workers(config, ray)
        # A fraction of a CPU, as actors that take them all leave none for Ray Data to read with;
        # JAX takes the cores that it finds in any case.
        cpus = 0.5 / workers if config.worker_cpus is None else config.worker_cpus
        shards = ray.data.from_items(
            [{"shard": shard} for shard in left], override_num_blocks=len(left)
        )
        results = shards.map_batches(
            RayWorker,
            fn_constructor_args=(config, place),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(left))),
            num_cpus=cpus,
            num_gpus=config.worker_gpus,
            resources=dict(config.worker_resources),
            # Lost actors are replaced, but not for ever where it is the shard that ends them.
            ray_remote_args_fn=lambda: {"max_task_retries": 3},
        )
        for row in results.iter_rows():
            entry, took = Entry(**json.loads(row["entry"])), json.loads(row["took"])
            progress.advance(entry.rows + entry.set_aside, took["windows"])
            yield entry, took
    except ray.exceptions.RayError as error:
        raise TryAgain(f"Ray gave up: {error}") from error
    finally:
        if started:
            ray.shutdown()


def default_workers(config: PredictConfig, ray: Any) -> int:
    """One for each GPU if workers take GPUs, otherwise one for each machine."""
    if config.worker_gpus:
        return max(1, int(ray.cluster_resources().get("GPU", 0) // config.worker_gpus))
    return sum(bool(node["Alive"]) for node in ray.nodes())


class RayWorker:
    """A `Worker` in an actor of Ray Data: shards in, what the manifest says of them out."""

    def __init__(self, config: PredictConfig, place: Place):
        self.place = place
        self.worker = Worker(config, place.plan, place.run_key, load_reader(config))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        shards = [int(shard) for shard in batch["shard"]]
        done = list(self.worker.run(shards, self.place.write))
        return {
            "entry": [json.dumps(dataclasses.asdict(entry)) for entry, _ in done],
            "took": [json.dumps(dataclasses.asdict(spent)) for _, spent in done],
        }


@contextlib.contextmanager
def multihost_share() -> Iterator[tuple[int, int]]:
    """This process's share of the work, by `jax.distributed`, which all processes have to enter.

    At the end each waits for the others once. Meanwhile they do not communicate.

    Raises:
      UsageError: there is nothing that tells who the others are.
      TryAgain: another process was lost; what this one finished is kept.
    """
    import jax
    from jax.experimental import multihost_utils

    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        given: dict[str, Any] = {
            name: int(os.environ[variable])
            for name, variable in variables.items()
            if variable in os.environ
        }
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        if address.startswith(("127.", "localhost:", "[::1]")):
            given["coordinator_bind_address"] = address  # or JAX would listen to everybody
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--multihost: jax.distributed cannot start: {error}. On TPU pods, Slurm and Open MPI "
            "it finds the other processes by itself; elsewhere set JAX_COORDINATOR_ADDRESS, "
            f"{' and '.join(variables.values())}, or use --shard i/n"
        ) from error
    yield jax.process_index(), jax.process_count()
    try:
        multihost_utils.sync_global_devices("flaxqa: all parts are written")
    except jax.errors.JaxRuntimeError as error:
        raise TryAgain(f"another process was lost: {error}") from error


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
    inputs = inputs_of(config)
    plan = plan_of(config, inputs, columns, progress)
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
            found = list(worker.answers([asked]))
            if not warm:
                break  # what is compiled at first does not count
            seconds += time.perf_counter() - began
            sampled += len(asked)
            set_aside += sum(one.error is not None for one in found)
            windows += sum(one.n_windows for one in found)
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


# --- in other people's pipelines ---


class QuestionAnswerer:
    """Answers batches of columns: for `datasets.Dataset.map` and `ray.data.Dataset.map_batches`.

        dataset.map(QuestionAnswerer(model), batched=True)
        dataset.map_batches(QuestionAnswerer, fn_constructor_args=(model,), concurrency=2, ...)

    Adds the columns `answer`, `start`, `end`, `score`, `no_answer_score`, `n_windows` and `error`.
    Columns there have one type, so where there is no answer these are "", -1, -1 and 0, and `error`
    is "" or says why a row could not be answered. The model is loaded with the first batch, in the
    process that has it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        question: str = "question",
        context: str = "context",
        answer_options: Mapping[str, Any] | None = None,
        **load_options: Any,
    ):
        """Notes what to do; loads nothing.

        Args:
          model: a directory or a hub id.
          question: the column with the question.
          context: the column with the context.
          answer_options: those of `Reader.answers`, but for `top_k`.
          **load_options: those of `flaxqa.load`.
        """
        self.model, self.question, self.context = model, question, context
        self.answer_options, self.load_options = dict(answer_options or {}), load_options
        self.reader: Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}  # a copy loads its own

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the columns added.

        Raises:
          UsageError: a column is missing.
        """
        if self.reader is None:
            from flaxqa import reader

            self.reader = reader.load(self.model, **self.load_options)
        for name in (self.question, self.context):
            if name not in batch:
                raise UsageError(f"the batch has no column {name!r}; it has {', '.join(batch)}")
        pairs = zip(batch[self.question], batch[self.context], strict=True)
        found = list(self.reader.answers(pairs, **self.answer_options))
        first = [one[0] if one else None for one in found]
        added = {
            "answer": ["" if one is None else one.text for one in first],
            "start": [-1 if one is None else one.start for one in first],
            "end": [-1 if one is None else one.end for one in first],
            "score": [0.0 if one is None else one.score for one in first],
            "no_answer_score": [one.no_answer_score for one in found],
            "n_windows": [one.n_windows for one in found],
            "error": [one.error or "" for one in found],
        }
        return {**batch, **added}
