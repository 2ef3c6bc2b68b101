"""Records in files: what is asked, read from JSONL, CSV, Parquet, SQuAD JSON or a hub data set.

A record is a row with a question, a context and whatever else it has. Reading never stops at a bad
one: it comes as a `Row` with the reason. `plan` cuts all input into shards of a fixed number of
records, by the input and that number alone, so that any process can read any shard.

Blank lines are no records. A compressed file (.gz, .zst) can only be read from its beginning, so
several processes share many small ones better than a large one.
"""

from __future__ import annotations

import abc
import base64
import codecs
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from flaxqa import features
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems
from flaxqa.features import Example
from flaxqa.files import local

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LONGEST_LINE = 16 << 20  # bytes; a longer one is a record that cannot be read
BLOCK = 1 << 20
PIECE = 4_096
ROWS_AT_ONCE = 1_024
COUNTED_AT_ONCE = 16_384
SAMPLED = 100  # records in which a column that was asked for has to be
csv.field_size_limit(LONGEST_LINE)


class Row(NamedTuple):
    """One record as it was found.

    Attributes:
      file: its name as the plan has it.
      line: where it begins, from 1: the line of a text file, the row of any other.
      byte_offset: where it begins, in the decompressed content; None where there are no bytes.
      raw: the bytes of a text file's record.
      fields: its columns; None if it cannot be read.
      reason: why not.
    """

    file: str
    line: int
    byte_offset: int | None
    raw: bytes | None
    fields: Mapping[str, Any] | None
    reason: str | None = None

    def as_text(self) -> Any:
        """The record for a file of errors: text as it was, or its columns."""
        if self.raw is not None:
            return self.raw.decode("utf-8", "backslashreplace")
        if self.fields is None:
            return None
        return json.loads(json.dumps(dict(self.fields), default=repr))


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive records of one input.

    Attributes:
      input: its index in the plan.
      start: where the first begins: a byte of the decompressed content, or a row.
      line: the line, or row, from 1, of the first.
      records: how many.
    """

    input: int
    start: int
    line: int
    records: int


@dataclasses.dataclass(frozen=True)
class Input:
    """A file, or a hub data set, and what it was when it was planned.

    Attributes:
      path: of a file, absolute; the id of a data set.
      name: how outputs call it: its path below what the user named.
      format: of SUFFIXES, or "hub".
      compression: of COMPRESSIONS, or None.
      size: bytes.
      mtime_ns: of a file, when it was last changed.
      sha256: of a file's bytes; the commit of a data set.
      split: of a data set.
      records: how many it has.
    """

    path: str
    name: str
    format: str
    compression: str | None = None
    size: int = 0
    mtime_ns: int = 0
    sha256: str | None = None
    split: str | None = None
    records: int = 0


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
            "inputs": [dataclasses.asdict(one) for one in self.inputs],
            "shards": [[dataclasses.astuple(one) for one in shard] for shard in self.shards],
            "unique_ids": self.unique_ids,
            "duplicates": list(self.duplicates),
            "types": self.types,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        return cls(
            content["shard_size"],
            tuple(Input(**one) for one in content["inputs"]),
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
        """Whether it was made of the same: the same files by name, size and time."""
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
            take(path, path.name)
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


# --- reading ---


class Source(abc.ABC):
    """One input, to be read from any of its records on; a row for every record, good or bad."""

    def __init__(self, input: Input):
        self.input = input

    @abc.abstractmethod
    def places(self) -> Iterator[tuple[int, int, int]]:
        """Runs of records: where each starts, its line, and how many records it has.

        As in `Segment`; the runs of a text file have one record each.
        """

    @abc.abstractmethod
    def rows(self, start: int, line: int) -> Iterator[Row]:
        """The records from there on."""

    def columns(self) -> list[str] | None:
        """The names of its columns, where all records have the same."""
        return None

    def unreadable(self, line: int, offset: int | None, error: Exception) -> Row:
        """What stands for all that cannot be read from there on."""
        reason = f"the file cannot be read from here on: {error}"
        return Row(self.input.name, line, offset, None, None, reason)


class Pieces(io.RawIOBase):
    """A stream of pyarrow in small pieces: of one that is damaged it gives nothing."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.stream.read(min(len(buffer), PIECE))
        buffer[: len(piece)] = piece
        return len(piece)


class Line(NamedTuple):
    """A line of a text file: its offset, its number, and its bytes, or why there are none."""

    offset: int
    number: int
    content: bytes
    reason: str | None = None


class Lines(Source):
    """A text file."""

    def __init__(self, input: Input):
        super().__init__(input)
        self.stream: IO[bytes] | None = None  # of a compressed file, where the last reader left it
        self.at = 0

    def open(self, start: int) -> IO[bytes]:
        """The content from a byte on."""
        if self.input.compression is None:
            plain = open(self.input.path, "rb")  # noqa: SIM115
            plain.seek(start)
            return plain
        if self.stream is None or self.at > start:
            import pyarrow as pa

            raw = pa.input_stream(self.input.path, compression=self.input.compression)
            self.stream, self.at = io.BufferedReader(Pieces(raw), BLOCK), 0
        while self.at < start and (block := self.stream.read(min(BLOCK, start - self.at))):
            self.at += len(block)
        return self.stream

    def lines(self, start: int, number: int) -> Iterator[Line]:
        """The lines from there on; the last one has a reason if the file is damaged there."""
        offset = start
        try:
            stream = self.open(start)
            with stream if self.input.compression is None else contextlib.nullcontext():
                while content := stream.readline(LONGEST_LINE):
                    size, reason = len(content), None
                    if size == LONGEST_LINE and not content.endswith(b"\n"):
                        reason = f"the line has more than {LONGEST_LINE:,} bytes"
                        content = content[:1_000]
                        while tail := stream.readline(BLOCK):
                            size += len(tail)
                            if tail.endswith(b"\n"):
                                break
                    self.at = offset + size
                    yield Line(offset, number, content, reason)
                    offset, number = offset + size, number + 1
        except (OSError, EOFError, ValueError) as error:  # pyarrow's errors are of these kinds
            self.stream = None
            yield Line(offset, number, b"", f"the file cannot be read from here on: {error}")


class JsonLines(Lines):
    """A JSON object on each line."""

    def places(self) -> Iterator[tuple[int, int, int]]:
        for line in self.lines(0, 1):
            if line.reason is not None or not line.content.isspace():
                yield line.offset, line.number, 1

    def rows(self, start: int, line: int) -> Iterator[Row]:
        for one in self.lines(start, line):
            fields, reason = None, one.reason
            if reason is None:
                if one.content.isspace():
                    continue
                fields, reason = parsed(one.content, first=one.offset == 0)
            yield Row(self.input.name, one.number, one.offset, one.content, fields, reason)


def parsed(content: bytes, *, first: bool = False) -> tuple[Mapping[str, Any] | None, str | None]:
    """The object that a line has, or why it has none."""
    if first:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        fields = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"byte {error.start} of the line is not UTF-8"
    except RecursionError:
        return None, "the line is nested too deep"
    except ValueError as error:
        return None, f"the line is not JSON: {error}"
    if not isinstance(fields, dict):
        return None, f"the line is {kind_name(fields)}, not an object"
    return fields, None


def kind_name(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


class Csv(Lines):
    """A CSV or TSV file with a header."""

    def __init__(self, input: Input):
        super().__init__(input)
        self.delimiter = "\t" if input.format == "tsv" else ","

    def places(self) -> Iterator[tuple[int, int, int]]:
        for row in self.rows(0, 1):
            yield row.byte_offset or 0, row.line, 1

    @functools.cached_property
    def header(self) -> list[str]:
        found = next(self.records(0, 1), None)
        return [] if found is None or found[2] is None else found[2]

    def records(
        self, start: int, number: int
    ) -> Iterator[tuple[Line, bytes, list[str] | None, str | None]]:
        """Of each record its first line, its bytes, and its columns or why it has none."""
        taken: list[Line] = []

        def text() -> Iterator[str]:
            for line in self.lines(start, number):
                taken.append(line)
                if line.reason is not None:
                    raise csv.Error(line.reason)
                content = line.content
                if line.offset == 0:
                    content = content.removeprefix(codecs.BOM_UTF8)
                yield content.decode("utf-8", "surrogateescape")

        lines = text()
        while True:
            # A new reader for each record, as one that failed keeps what it had read.
            taken.clear()
            columns, reason = None, None
            try:
                columns = next(csv.reader(lines, delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                reason = str(error)
            if not taken:
                return
            raw = b"".join(line.content for line in taken)
            if columns != [] or reason is not None:
                yield taken[0], raw, columns, reason
            if taken[-1].reason is not None:
                # The generator ended with its error; what follows a line too long can be read.
                last = taken[-1]
                following = self.at
                if following <= last.offset:
                    return
                start, number = following, last.number + 1
                lines = text()

    def rows(self, start: int, line: int) -> Iterator[Row]:
        header = self.header
        for first, raw, columns, reason in self.records(start, line):
            if first.offset == 0:
                continue  # the header
            fields = None
            if columns is not None and len(columns) != len(header):
                reason = f"the row has {len(columns)} fields, the header {len(header)}"
            elif columns is not None:
                fields = dict(zip(header, columns, strict=True))
            yield Row(self.input.name, first.number, first.offset, raw, fields, reason)

    def columns(self) -> list[str] | None:
        return self.header


class Parquet(Source):
    """A Parquet file; of a damaged one each row that cannot be read is told of."""

    @functools.cached_property
    def file(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.input.path)

    def places(self) -> Iterator[tuple[int, int, int]]:
        try:
            rows = self.file.metadata.num_rows
        except (OSError, ValueError):
            rows = 1  # that the file cannot be read
        if rows:
            yield 0, 1, rows

    def rows(self, start: int, line: int) -> Iterator[Row]:
        try:
            metadata = self.file.metadata
        except (OSError, ValueError) as error:
            yield self.unreadable(line, None, error)
            return
        before = 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if before + size > start:
                yield from self.group(group, size, max(start - before, 0), before)
            before += size

    def group(self, group: int, size: int, skip: int, before: int) -> Iterator[Row]:
        """The rows of a row group from `skip` on; `before` counts those of the groups before."""
        at = 0
        try:
            for batch in self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                if at + len(batch) > skip:
                    for fields in batch.slice(max(skip - at, 0)).to_pylist():
                        place = max(at, skip)
                        yield Row(self.input.name, before + place + 1, None, None, fields)
                        at, skip = place + 1, place + 1
                else:
                    at += len(batch)
        except (OSError, ValueError) as error:
            for place in range(max(at, skip), size):
                reason = f"the row cannot be read: {error}"
                yield Row(self.input.name, before + place + 1, None, None, None, reason)

    def columns(self) -> list[str] | None:
        try:
            return list(self.file.schema_arrow.names)
        except (OSError, ValueError):
            return None

    def types(self) -> Mapping[str, Any]:
        """The Arrow type of each column."""
        try:
            return {field.name: field.type for field in self.file.schema_arrow}
        except (OSError, ValueError):
            return {}


class Document(Source):
    """A JSON file as a whole: SQuAD's articles, or an array of objects."""

    @functools.cached_property
    def found(self) -> list[tuple[Any, str | None]]:
        """Each record, and why it cannot be read."""
        try:
            with JsonLines(self.input).open(0) as stream:
                content = json.loads(stream.read().decode("utf-8-sig"))
        except (OSError, EOFError, ValueError, RecursionError) as error:
            return [(None, f"the file cannot be read: {error}")]
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            return list(squad_records(content["data"]))
        if isinstance(content, list):
            return [(one, None if isinstance(one, dict) else f"{kind_name(one)}, not an object")
                    for one in content]  # fmt: skip
        return [(None, "the file is neither SQuAD data nor an array of objects")]

    def places(self) -> Iterator[tuple[int, int, int]]:
        if self.found:
            yield 0, 1, len(self.found)

    def rows(self, start: int, line: int) -> Iterator[Row]:
        for index, (fields, reason) in enumerate(self.found[start:], start):
            yield Row(self.input.name, index + 1, None, None, fields, reason)


def squad_records(articles: list[Any]) -> Iterator[tuple[Any, str | None]]:
    """The questions of SQuAD data, and in their order what is not as it should be."""

    def items(value: Any, name: str, where: str) -> Iterator[tuple[str, Any]]:
        given = value.get(name) if isinstance(value, dict) else None
        if isinstance(given, list):
            yield from ((f"{where}.{name}[{index}]", one) for index, one in enumerate(given))
        else:
            yield where, f"{where} has no array {name!r}"

    for number, article in enumerate(articles):
        for place, paragraph in items(article, "paragraphs", f"data[{number}]"):
            if isinstance(paragraph, str):
                yield None, paragraph
                continue
            for where, question in items(paragraph, "qas", place):
                if not isinstance(question, dict):
                    told = question if isinstance(question, str) else f"{where} is not an object"
                    yield question if told is not question else None, told
                    continue
                title = {"title": article["title"]} if "title" in article else {}
                yield {"context": paragraph.get("context"), **title, **question}, None


class Hub(Source):
    """A data set of the Hugging Face Hub, streamed."""

    def __init__(self, input: Input):
        super().__init__(input)
        self.iterator: Iterator[Mapping[str, Any]] | None = None
        self.at = 0

    def stream(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.input.path, split=self.input.split, revision=self.input.sha256, streaming=True
            )
        except (OSError, ValueError) as error:  # datasets' errors are of these kinds
            raise TryAgain(f"the data set {self.input.path} cannot be read: {error}") from error

    def places(self) -> Iterator[tuple[int, int, int]]:
        stream = self.stream()
        splits = getattr(stream.info, "splits", None) or {}
        known = getattr(splits.get(self.input.split), "num_examples", None)
        rows = known if known else sum(1 for _ in stream)
        if rows:
            yield 0, 1, rows

    def rows(self, start: int, line: int) -> Iterator[Row]:
        if self.iterator is None or self.at != start:
            self.iterator, self.at = iter(self.stream().skip(start)), start
        for fields in self.iterator:
            self.at += 1
            yield Row(self.input.name, self.at, None, None, fields)

    def columns(self) -> list[str] | None:
        names: list[str] | None = self.stream().column_names
        return names


SOURCES: dict[str, type[Source]] = {
    "jsonl": JsonLines,
    "csv": Csv,
    "tsv": Csv,
    "parquet": Parquet,
    "json": Document,
    "hub": Hub,
}


def source_of(input: Input) -> Source:
    return SOURCES[input.format](input)


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
    shards: list[list[list[int]]] = []  # of each the fields of its segments
    ids = Ids() if unique_ids else None
    room = total = 0
    problems: list[str] = []
    types: list[Mapping[str, Any]] = []
    for index, one in enumerate(inputs):
        one = identified(one)
        source = source_of(one)
        if there := source.columns():
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
        for start, line, records in runs:
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
                    segments.append([index, start, line, taken])
                start, line, records = start + taken, line + taken, records - taken
                room -= taken
            if count % COUNTED_AT_ONCE == 0:
                progress(total + count)
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
    try:
        with open(one.path, "rb") as file:
            status = os.fstat(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TryAgain(f"{one.path} cannot be read: {error.strerror}") from error
    if one.format == "json" and looks_like_lines(one):
        one = dataclasses.replace(one, format="jsonl")
    return dataclasses.replace(one, size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


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


def looks_like_lines(one: Input) -> bool:
    """Whether a .json file has an object on each line, as many of that name do."""
    first = next(JsonLines(one).lines(0, 1), None)
    if first is None or first.reason is not None:
        return False
    fields, reason = parsed(first.content, first=True)
    return reason is None and fields is not None and "data" not in fields


def unchanged(one: Input) -> bool:
    """Whether a file is what it was when it was planned, by its size and time."""
    if one.format == "hub":
        return True  # a commit does not change
    try:
        status = os.stat(one.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (one.size, one.mtime_ns)


class Ids:
    """All ids of the input, as hashes of 128 bits: 24 bytes a record."""

    def __init__(self) -> None:
        self.hashes = bytearray()
        self.numbers: list[np.ndarray] = []
        self.count = 0

    def places(self, source: Source, columns: Columns) -> Iterator[tuple[int, int, int]]:
        """The runs of a source, each of one record, whose ids are noted."""
        numbers = []
        runs = (
            (start + index, line + index)
            for start, line, records in source.places()
            for index in range(records)
        )
        rows = source_of(source.input).rows(0, 1)  # another, as each keeps its place in the file
        for (start, line), row in zip(runs, rows, strict=True):
            identity = id_of(row, columns) if row.fields is not None else None
            if isinstance(identity, str):
                text = identity.encode("utf-8", "surrogatepass")
                self.hashes += hashlib.blake2b(text, digest_size=16).digest()
                numbers.append(self.count)
            self.count += 1
            yield start, line, 1
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

    def needed(self) -> tuple[str, ...]:
        """Those that are there where all records have the same."""
        return (self.question, self.context, *self.chosen())


def rows_of(
    plan: Plan, shard: int, sources: Callable[[Input], Source] = source_of
) -> Iterator[tuple[int, Row]]:
    """The rows of a shard, each with its number over all input.

    Raises:
      DataError: an input has changed since it was planned.
    """
    number = shard * plan.shard_size
    for segment in plan.shards[shard]:
        one = plan.inputs[segment.input]
        if not unchanged(one):
            raise DataError(f"{one.path} has changed since the run began")
        rows = sources(one).rows(segment.start, segment.line)
        count = 0
        for row in itertools.islice(rows, segment.records):
            yield number, row
            number, count = number + 1, count + 1
        if count < segment.records:
            raise DataError(f"{one.path} has fewer records than when the run began")


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
