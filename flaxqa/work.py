"""A worker of a batch run: shards of records in, the bytes of parts out, and what a run is.

While the devices work on one chunk of records, the next is read and tokenized, the one before
decoded; only at the end of a shard do they wait until its part is written, so that a crash costs
one shard.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import io
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flaxqa import features, records, rows, sources, stores
from flaxqa.config import AnswerOptions, ModelOptions, PredictConfig, ReaderOptions
from flaxqa.errors import UsageError
from flaxqa.features import Example
from flaxqa.parts import Entry
from flaxqa.records import KEYS, Columns, Plan
from flaxqa.rows import Input, Row, Source

if TYPE_CHECKING:
    import pyarrow as pa

    from flaxqa.answers import Answer, Answers
    from flaxqa.reader import Reader, Spent


class Worker:
    """Answers shards; holds a reader and what it needs to know of the run."""

    def __init__(self, config: PredictConfig, plan: Plan, run_key: str, reader: Reader):
        self.config, self.plan, self.run_key, self.reader = config, plan, run_key, reader
        self.columns = columns_of(config)
        self.sources: dict[str, Source] = {}
        self.duplicates = frozenset(plan.duplicates)
        self.model = model_name(config, reader)
        self.options = AnswerOptions(**config.of(AnswerOptions))
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
        value = rows.value_at(row.fields or {}, name)
        if name not in self.untouched:
            value = rows.plain_value(value)
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
                asked = (
                    (row, self.asked(number, row))
                    for number, row in records.rows_of(self.plan, shard, self.source)
                )
                chunk = None
                for some in reader.chunks(asked, size_of=lambda pair: features.characters(pair[1])):
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

        return answers.Decoder.of(self.options)

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
        config = worker.config
        kept = found.kept(worker.options)
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
            lines = (rows.to_json(dict(zip(names, row, strict=True)), as_plain)
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
    return rows.to_json(told, rows.shown).encode() + b"\n"


def as_span(one: Answer) -> dict[str, Any]:
    """One of several answers."""
    return {"text": one.text, "start": one.start, "end": one.end, "score": one.score}


def as_text(value: Any) -> str | None:
    """A value of any type as the text that a column of text has: JSON, but for text itself."""
    if value is None or isinstance(value, str):
        return value
    return rows.to_json(value, as_plain)


def as_plain(value: Any) -> Any:
    """What JSON has no type for, as text."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def columns_of(config: PredictConfig) -> Columns:
    """What the columns are called.

    Raises:
      UsageError: a name stands for nothing, or an output column is called like another.
    """
    columns = Columns.of(config.columns, config.keep)
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
    if stores.is_url(config.model):
        return config.model.rstrip("/").rpartition("/")[2]
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
            **config.of(AnswerOptions),
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

    return reader.load(**config.of(ModelOptions), **config.of(ReaderOptions))
