"""All input of a run: found by name, cut into shards, and what its records ask.

`plan` cuts all input (`flaxqa.sources`) into shards of a fixed number of records, by the input and
that number alone, so that any process can read any shard. What is read later is held against what
was planned before a shard counts.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import features
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems
from flaxqa.features import Example
from flaxqa.files import local, state_of
from flaxqa.sources import (
    Input,
    Parquet,
    Row,
    Run,
    Source,
    kind_name,
    looks_like_lines,
    source_of,
)

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
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
        asked = [(one.path, one.name, one.split) for one in inputs]
        had = [(one.path, one.name, one.split) for one in self.inputs]
        return asked == had and all(map(unchanged, self.inputs))

    def identity(self) -> list[dict[str, Any]]:
        """What the input is, wherever it lies and whenever it was written."""
        kept = ("name", "format", "compression", "size", "sha256", "split", "records")
        return [{name: getattr(one, name) for name in kept} for one in self.inputs]


# --- finding inputs ---


def find(names: Sequence[str], *, format: str = "auto", split: str = "train") -> list[Input]:
    """The inputs that names stand for: files, folders, patterns, or a hub data set.

    Args:
      names: a folder stands for all files below it of a known kind, in the order of their paths,
        hidden ones left out; so does a pattern with `*`, `?` or `[`.
      format: "auto" goes by the name; otherwise what all files are.
      split: of a hub data set.

    Raises:
      UsageError: a name stands for nothing, a file's kind is not known, or one is named twice.
    """
    found: list[Input] = []
    named: dict[str, str] = {}  # of each path what the user would write

    def take(path: Path, name: str) -> None:
        try:
            found.append(file_input(path, name, format))
            named[found[-1].path] = path.as_posix()
        except UsageError as error:
            problems.append(str(error))

    problems: list[str] = []
    for name in names:
        path = local(name)
        if path.is_dir():
            files = below(path, problems)
            if not files:
                problems.append(f"{name} has no files of {', '.join(SUFFIXES)}")
            for each in files:
                take(each, each.relative_to(path).as_posix())
        elif path.exists():
            if path.is_file():
                take(path, path.name)
            else:
                problems.append(f"{name} is no file: a FIFO, a device or a socket")
        elif glob.has_magic(name):
            matches = sorted(
                each for each in glob.glob(name, recursive=True) if Path(each).is_file()
            )
            if not matches:
                problems.append(f"{name} matches no file")
            root = os.path.commonpath([str(Path(each).parent) for each in matches] or ["."])
            for match in matches:
                take(Path(match), os.path.relpath(match, root))
        elif looks_like_a_hub_id(name):
            found.append(Input(name, name, "hub", split=split))
        else:
            problems.append(f"{name} is missing")
    seen: dict[str, str] = {}
    for one in found:
        if one.path in seen:
            problems.append(f"{one.path} is named twice")
        seen[one.path] = one.name
    if problems:
        raise UsageError(all_problems("the input cannot be used", problems))
    if len({one.name for one in found}) < len(found):  # the same name in two folders
        found = [dataclasses.replace(one, name=named.get(one.path, one.name)) for one in found]
    return found


def refuse_inside(names: Sequence[str], inputs: Sequence[Input], output: str) -> None:
    """Refuses an output that is, holds or lies in an input: its parts would be records.

    Args:
      names: as given to `find`.
      inputs: that it found.
      output: a directory, perhaps not there yet.

    Raises:
      UsageError: it does; says with which input.
    """
    place = local(output).resolve()
    for one in inputs:
        if one.format != "hub" and Path(one.path).is_relative_to(place):
            raise UsageError(f"--output {output} holds the input {one.path}; choose another")
    for name in names:
        root = local(name)
        while glob.has_magic(str(root)) and not root.exists():
            root = root.parent
        # Whether folders below are input, or may be.
        deep = root == local(name) or glob.has_magic(str(local(name).parent))
        root = root.resolve()
        if root.is_dir() and (place == root or (deep and place.is_relative_to(root))):
            raise UsageError(
                f"--output {output} lies in the input {name}, so that its parts would be records "
                "of the next run; choose another"
            )


def below(folder: Path, problems: list[str]) -> list[Path]:
    """The files of a folder that can be input; a link that leads out of it is a problem."""
    files = []
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "_")) for part in parts) or not path.is_file():
            continue
        if kind_of(path)[0] is None:
            continue
        if not path.resolve().is_relative_to(root):
            problems.append(f"{path} is a link that leads out of {folder}; name its target instead")
            continue
        files.append(path)
    return files


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """The format and the compression that a file's name tells."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None, compression


def file_input(path: Path, name: str, format: str) -> Input:
    kind, compression = kind_of(path)
    if format != "auto":
        kind = format
    if kind is None:
        raise UsageError(
            f"{path}: its name tells no format; those are {', '.join(SUFFIXES)}, also with "
            f"{' or '.join(COMPRESSIONS)}; or give --input-format"
        )
    if kind == "parquet" and compression is not None:
        raise UsageError(f"{path}: Parquet is compressed inside, not as a whole")
    return Input(str(path.resolve()), name, kind, compression)


def looks_like_a_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and name[0] not in ".~" and not Path(name).suffix


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
    shards: list[list[list[Any]]] = []  # of each the fields of its segments
    ids = Ids() if unique_ids else None
    room = total = 0
    problems: list[str] = []
    types: list[Mapping[str, Any]] = []
    for index, one in enumerate(inputs):
        one = identified(one)
        source = source_of(one, columns.wanted())
        if there := source.columns():
            twice = sorted({name for name in there if there.count(name) > 1})
            problems += [f"{one.name} has the column {name!r} twice" for name in twice]
            missing = [name for name in columns.needed() if name not in there]
            problems += [
                f"{one.name} has no column {name!r}; it has {', '.join(there)}" for name in missing
            ]
            if missing:
                continue
        elif there is None:
            problems += [
                f"none of the first {SAMPLED} records of {one.name} has the column {name!r}"
                for name in never_there(source, columns.chosen())
            ]
        runs = source.places() if ids is None else ids.places(source, columns)
        count = 0
        for start, line, records, raw in runs:
            count += records
            while records:
                if not room:
                    shards.append([])
                    room = shard_size
                taken = min(room, records)
                segments = shards[-1]
                if segments and segments[-1][0] == index:  # which goes on
                    segments[-1][3] += taken
                else:
                    segments.append([index, start, line, taken, new_digest()])
                if raw is not None:
                    segments[-1][4].update(raw)
                start, line, records = start + taken, line + taken, records - taken
                room -= taken
            if count % COUNTED_AT_ONCE == 0:
                progress(total + count)
        if one.state != state_of(one.path) and one.format != "hub":
            raise TryAgain(f"{one.path} changed while it was read")
        for segments in shards:
            if segments[-1][0] == index and not isinstance(segments[-1][4], str):
                segments[-1][4] = digest_of(segments[-1][4])
        total += count
        planned.append(dataclasses.replace(one, records=count))
        types.append(source.types() if isinstance(source, Parquet) else {})
        progress(total)
    if problems:
        raise UsageError(all_problems("the input cannot be used", problems))
    if not total:
        raise UsageError("the input has no record")
    return Plan(
        shard_size,
        tuple(planned),
        tuple(tuple(Segment(*fields) for fields in segments) for segments in shards),
        unique_ids,
        ids.duplicates() if ids is not None else (),
        common_types(types, columns.keep),
    )


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def digest_of(made: Any) -> str:
    """The digest; "" if nothing went into it."""
    return "" if made.digest() == NOTHING else str(made.hexdigest())


NOTHING = new_digest().digest()


def never_there(source: Source, names: Sequence[str]) -> list[str]:
    """Those of the names that no record at the beginning of an input has."""
    left = set(names)
    if left:
        for row in itertools.islice(source.rows(0, 1), SAMPLED):
            left -= (row.fields or {}).keys()
    return [name for name in names if name in left]


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


def identified(one: Input) -> Input:
    """The input with what tells it from others: a file's hash, a data set's commit."""
    if one.format == "hub":
        return hub_commit(one)
    state = state_of(one.path)
    if state is None:
        raise TryAgain(f"{one.path} cannot be read")
    sha256 = sha256_of(one.path, state)
    if one.format == "json" and looks_like_lines(one):
        one = dataclasses.replace(one, format="jsonl")
    return dataclasses.replace(one, state=state, size=state[0], sha256=sha256)


def hub_commit(one: Input) -> Input:
    """The data set with its commit.

    Raises:
      UsageError: there is no such data set.
      TryAgain: the hub cannot be reached.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(one.path, revision=one.sha256)
    except (huggingface_hub.errors.RepositoryNotFoundError,
            huggingface_hub.errors.RevisionNotFoundError, ValueError) as error:  # fmt: skip
        raise UsageError(
            f"{one.path} is neither a file or folder here nor a data set of the hub: {error}"
        ) from error
    except Exception as error:  # of the network, in the kinds of whichever library
        raise TryAgain(
            f"{one.path} is neither a file or folder here nor a data set that can be reached "
            f"({type(error).__name__}: {error})"
        ) from error
    return dataclasses.replace(one, sha256=info.sha)


@functools.lru_cache(maxsize=4_096)
def sha256_of(path: str, state: tuple[int, ...]) -> str:
    """The hash of a file that is in such a state; it is read once for each.

    Raises:
      TryAgain: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TryAgain(f"{path} cannot be read: {error.strerror}") from error


def unchanged(one: Input) -> bool:
    """Whether a file has the bytes that it had when it was planned."""
    if one.format == "hub":
        return True  # a commit does not change
    state = state_of(one.path)
    if state is None or state[0] != one.size:
        return False
    return state == one.state or sha256_of(one.path, state) == one.sha256


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
    value = (row.fields or {}).get(columns.id)
    if value is None:
        return f"{row.file}:{row.line}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    return ValueError(
        f"the column {columns.id!r} is {kind_name(value)}, not a string or an integer"
    )


def example_of(row: Row, columns: Columns, *, max_context_chars: int) -> Example | str:
    """What a record asks, or why it cannot be asked.

    What is wrong with the texts themselves (blank, lone surrogates) is for the reader to say.
    """
    fields = row.fields
    if row.reason is not None or fields is None:
        return row.reason or "the record is empty"
    question, context = fields.get(columns.question), fields.get(columns.context)
    if not (isinstance(question, str) and isinstance(context, str)):
        name = columns.context if isinstance(question, str) else columns.question
        if name not in fields:
            return f"the record has no column {name!r}"
        return f"the column {name!r} is {kind_name(fields[name])}, not a string"
    identity = id_of(row, columns)
    if isinstance(identity, Exception):
        return str(identity)
    for name in (columns.id, *columns.keep):
        value = identity if name == columns.id else fields.get(name)
        if isinstance(value, str) and (at := features.lone_surrogate(value)) is not None:
            return f"the column {name!r} has a lone surrogate at character {at}"
    if (size := len(context)) > max_context_chars:
        return f"the context has {size:,} characters, more than {max_context_chars:,}"
    return Example(identity or "", question, context)
