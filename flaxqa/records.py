"""All input of a run, cut into shards, and what its records ask.

`plan` cuts all input (`flaxqa.inputs`) into shards of a fixed number of records, by the input and
that number alone, so that any process can read any shard. What is read later is held against what
was planned before a shard counts.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxqa import features
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems
from flaxqa.features import Example
from flaxqa.files import state_of
from flaxqa.inputs import identified, unchanged
from flaxqa.rows import MISSING, Input, Row, Run, Source, has_column, kind_name, value_at
from flaxqa.sources import source_of

KEYS = ("id", "question", "context")
COUNTED_AT_ONCE = 16_384
SAMPLED = 100  # records in which a column that was asked for has to be


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive records of one input.

    Attributes:
      input: its index in the plan.
      start: where the first begins: a byte of the decompressed content, or a row.
      line: the line, or row, from 1, of the first.
      records: how many.
      digest: of the bytes of a text file's records; "" of others.
    """

    input: int
    start: int
    line: int
    records: int
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All input, cut into shards.

    Attributes:
      shard_size: records of each shard but the last.
      inputs: in their order.
      shards: the segments of each.
      unique_ids: whether ids that come more than once were looked for.
      duplicates: numbers, from 0 over all input, of records whose id came before.
      types: the Arrow schema of the columns to keep, serialized and in base64; where all inputs
        are Parquet and agree.
    """

    shard_size: int
    inputs: tuple[Input, ...]
    shards: tuple[tuple[Segment, ...], ...]
    unique_ids: bool = False
    duplicates: tuple[int, ...] = ()
    types: str | None = None

    @property
    def records(self) -> int:
        return sum(one.records for one in self.inputs)

    def to_json(self) -> dict[str, Any]:
        return {
            "shard_size": self.shard_size,
            "inputs": [{**vars(one), "state": list(one.state)} for one in self.inputs],
            "shards": [[dataclasses.astuple(one) for one in shard] for shard in self.shards],
            "unique_ids": self.unique_ids,
            "duplicates": list(self.duplicates),
            "types": self.types,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        return cls(
            content["shard_size"],
            tuple(Input(**{**one, "state": tuple(one["state"])}) for one in content["inputs"]),
            tuple(tuple(Segment(*one) for one in shard) for shard in content["shards"]),
            content["unique_ids"],
            tuple(content["duplicates"]),
            content["types"],
        )

    def sha256(self) -> str:
        """A hash of all that decides a part, wherever the inputs lie."""
        content = {**self.to_json(), "inputs": self.identity()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def is_of(self, inputs: Sequence[Input], shard_size: int, unique_ids: bool) -> bool:
        """Whether it was made of the same: the same files by name and content."""
        if (shard_size, unique_ids) != (self.shard_size, self.unique_ids):
            return False
        names = ("path", "name", "compression", "encoding", "delimiter", "split", "config")
        asked, had = (
            [[getattr(one, name) for name in names] for one in each]
            for each in (inputs, self.inputs)
        )
        return asked == had and all(map(unchanged, self.inputs))

    def identity(self) -> list[dict[str, Any]]:
        """What the input is, wherever it lies and whenever it was written."""
        kept = ("name", "format", "compression", "encoding", "delimiter", "size", "sha256", "split",
                "config", "records")  # fmt: skip
        return [{name: getattr(one, name) for name in kept} for one in self.inputs]


# --- planning ---


def plan(
    inputs: Sequence[Input],
    shard_size: int,
    *,
    columns: Columns,
    unique_ids: bool = False,
    progress: Callable[[int], None] = lambda records: None,
) -> Plan:
    """Reads all input once and cuts it into shards.

    Args:
      inputs: of `find`.
      shard_size: records of a shard.
      columns: which must be there, where a file's columns are known.
      unique_ids: whether to look for ids that come more than once.
      progress: called with the number of records found so far.

    Raises:
      UsageError: a column is missing, or there is no record.
      TryAgain: an input cannot be read now.
    """
    planned: list[Input] = []
    cutter = Cutter(shard_size)
    ids = Ids() if unique_ids else None
    total = 0
    problems: list[str] = []
    types: list[Mapping[str, Any]] = []
    for index, one in enumerate(inputs):
        one = identified(one)
        source = source_of(one, columns.wanted())
        found, usable = column_problems(source, columns)
        problems += found
        if not usable:
            continue
        count = 0
        for run in source.places() if ids is None else ids.places(source, columns):
            count += run.records
            cutter.take(index, run)
            if count % COUNTED_AT_ONCE == 0:
                progress(total + count)
        if one.state != state_of(one.path) and one.format != "hub":
            raise TryAgain(f"{one.path} changed while it was read")
        cutter.end(index)
        total += count
        planned.append(dataclasses.replace(one, records=count))
        types.append(source.types())
        progress(total)
    if problems:
        raise UsageError(all_problems("the input cannot be used", problems))
    if not total:
        raise UsageError("the input has no record")
    return Plan(
        shard_size,
        tuple(planned),
        tuple(tuple(Segment(*fields) for fields in segments) for segments in cutter.shards),
        unique_ids,
        ids.duplicates() if ids is not None else (),
        common_types(types, columns.keep),
    )


def column_problems(source: Source, columns: Columns) -> tuple[list[str], bool]:
    """What is wrong with an input's columns, and whether its records can still be counted."""
    name, there = source.input.name, source.columns()
    if there:
        twice = sorted({each for each in there if there.count(each) > 1})
        problems = [f"{name} has the column {each!r} twice" for each in twice]
        missing = [each for each in columns.needed() if not has_column(there, each)]
        told = f"it has {', '.join(there)}{source.hint()}"
        problems += [f"{name} has no column {each!r}; {told}" for each in missing]
        return problems, not missing
    if there is not None:
        return [], True
    never = never_there(source, columns)
    return [
        f"none of the first {SAMPLED} records of {name} has the column {each!r}" for each in never
    ], True


class Cutter:
    """Cuts runs of records into shards.

    Attributes:
      shards: of each the fields of its segments, with what makes the digest in its place.
    """

    def __init__(self, shard_size: int):
        self.shard_size, self.room = shard_size, 0
        self.shards: list[list[list[Any]]] = []

    def take(self, index: int, run: Run) -> None:
        """The next records of an input."""
        start, line, records, raw = run
        while records:
            if not self.room:
                self.shards.append([])
                self.room = self.shard_size
            taken = min(self.room, records)
            segments = self.shards[-1]
            if segments and segments[-1][0] == index:  # which goes on
                segments[-1][3] += taken
            else:
                segments.append([index, start, line, taken, new_digest()])
            if raw is not None:
                segments[-1][4].update(raw)
            start, line, records = start + taken, line + taken, records - taken
            self.room -= taken

    def end(self, index: int) -> None:
        """All records of an input are taken."""
        for segments in self.shards:
            if segments[-1][0] == index and not isinstance(segments[-1][4], str):
                segments[-1][4] = digest_of(segments[-1][4])


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def digest_of(made: Any) -> str:
    """The digest; "" if nothing went into it."""
    return "" if made.digest() == NOTHING else str(made.hexdigest())


NOTHING = new_digest().digest()


def never_there(source: Source, columns: Columns) -> list[str]:
    """The columns that no record at the beginning of an input has.

    Those of the usual names count only where there are many records, for a record without one is
    set aside, and that is no reason to stop.
    """
    sample = list(itertools.islice(source.rows(0, 1), SAMPLED))
    readable = [row.fields for row in sample if row.fields is not None]
    names: Sequence[str] = columns.needed()
    if not readable:
        names = columns.chosen()
    elif len(sample) < SAMPLED:
        names = [name for name in names if name not in KEYS]
    return [
        name for name in names
        if not any(value_at(fields, name, MISSING) is not MISSING for fields in readable)
    ]  # fmt: skip


def common_types(types: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """The schema of the columns that have one type in all inputs, as `Plan.types`."""
    import pyarrow as pa

    common = [
        (name, types[0][name])
        for name in names
        if all(name in one and one[name] == types[0].get(name) for one in types)
    ]
    if not common:
        return None
    return base64.b64encode(pa.schema(common).serialize().to_pybytes()).decode()


class Ids:
    """All ids of the input, as hashes of 128 bits: 24 bytes a record."""

    def __init__(self) -> None:
        self.hashes = bytearray()
        self.numbers: list[np.ndarray] = []
        self.count = 0

    def places(self, source: Source, columns: Columns) -> Iterator[Run]:
        """The runs of a source, each of one record, whose ids are noted."""
        numbers = []
        runs = (
            Run(run.start + index, run.line + index, 1, run.raw)
            for run in source.places()
            for index in range(run.records)
        )
        # Another source, as each keeps its place in the file.
        rows = source_of(source.input, columns.wanted()).rows(0, 1)
        for run, row in zip(runs, rows, strict=True):
            identity = id_of(row, columns) if row.fields is not None else None
            if isinstance(identity, str):
                text = identity.encode("utf-8", "surrogatepass")
                self.hashes += hashlib.blake2b(text, digest_size=16).digest()
                numbers.append(self.count)
            self.count += 1
            yield run
        self.numbers.append(np.array(numbers, np.int64))

    def duplicates(self) -> tuple[int, ...]:
        """The numbers of the records whose id an earlier one has."""
        halves = np.frombuffer(self.hashes, np.uint64).reshape(-1, 2)
        numbers = np.concatenate(self.numbers) if self.numbers else np.zeros(0, np.int64)
        order = np.lexsort((numbers, halves[:, 1], halves[:, 0]))
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        return tuple(np.sort(numbers[order[1:][same]]).tolist())


# --- what is asked ---


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns of a record are called.

    Attributes:
      keep: other columns, which go into the output.
    """

    id: str = "id"
    question: str = "question"
    context: str = "context"
    keep: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Mapping[str, str], keep: tuple[str, ...] = ()) -> Columns:
        """What an option calls them.

        Raises:
          UsageError: a name stands for nothing.
        """
        if unknown := names.keys() - set(KEYS):
            raise UsageError(
                f"columns: {', '.join(sorted(unknown))} cannot be named; those are "
                f"{', '.join(KEYS)}"
            )
        return cls(**dict(names), keep=keep)

    def chosen(self) -> tuple[str, ...]:
        """Those that were asked for by name and need not be in every record."""
        return (*(() if self.id == "id" else (self.id,)), *self.keep)

    def wanted(self) -> tuple[str, ...]:
        """All that is read of a record."""
        return (self.id, self.question, self.context, *self.keep)

    def needed(self) -> tuple[str, ...]:
        """Those that are there where all records have the same."""
        return (self.question, self.context, *self.chosen())


def rows_of(
    plan: Plan, shard: int, sources: Callable[[Input], Source] = source_of
) -> Iterator[tuple[int, Row]]:
    """The rows of a shard, each with its number over all input.

    Raises:
      DataError: an input has changed since it was planned; perhaps after rows were given.
    """
    number = shard * plan.shard_size
    for segment in plan.shards[shard]:
        one = plan.inputs[segment.input]
        changed = DataError(f"{one.path} has changed since the run began")
        if not unchanged(one):
            raise changed
        rows, digest = sources(one).rows(segment.start, segment.line), new_digest()
        count = 0
        for row in itertools.islice(rows, segment.records):
            if row.raw is not None and segment.digest:
                digest.update(row.raw)
            yield number, row
            number, count = number + 1, count + 1
        if count < segment.records:
            raise DataError(f"{one.path} has fewer records than when the run began")
        # What was read is what was planned: text by its bytes, the rest by the file's state.
        if segment.digest != (digest_of(digest) if segment.digest else "") or not unchanged(one):
            raise changed


def id_of(row: Row, columns: Columns) -> str | Exception | None:
    """The id of a record; its place where it has none; an error for what cannot be one."""
    value = value_at(row.fields or {}, columns.id)
    if value is None:
        return f"{row.file}:{row.line}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    return ValueError(
        f"the column {columns.id!r} is {kind_name(value)}, not a string or an integer"
    )


def example_of(row: Row, columns: Columns, *, max_context_chars: int | None) -> Example | str:
    """What a record asks, or why it cannot be asked.

    What is wrong with the texts themselves (blank, lone surrogates) is for the reader to say.
    """
    fields = row.fields
    if row.reason is not None or fields is None:
        return row.reason or "the record is empty"
    question, context = (
        value_at(fields, name, MISSING) for name in (columns.question, columns.context)
    )
    if not (isinstance(question, str) and isinstance(context, str)):
        name, value = columns.context, context
        if not isinstance(question, str):
            name, value = columns.question, question
        if value is MISSING:
            return f"the record has no column {name!r}"
        return f"the column {name!r} is {kind_name(value)}, not a string"
    identity = id_of(row, columns)
    if isinstance(identity, Exception):
        return str(identity)
    for name in (columns.id, *columns.keep):
        value = identity if name == columns.id else value_at(fields, name)
        if isinstance(value, str) and (at := features.lone_surrogate(value)) is not None:
            return f"the column {name!r} has a lone surrogate at character {at}"
    if max_context_chars is not None and (size := len(context)) > max_context_chars:
        return f"the context has {size:,} characters, more than {max_context_chars:,}"
    return Example(identity or "", question, context)
