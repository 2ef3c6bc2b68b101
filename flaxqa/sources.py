"""Records as they lie in a JSONL, CSV, Parquet or JSON file, or a hub data set: a row for each.

Reading never stops at a bad record: it comes as a `Row` with the reason. Blank lines are no
records. A compressed file (.gz, .zst) can only be read from its beginning, so several processes
share many small ones better than a large one.
"""

from __future__ import annotations

import abc
import codecs
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from flaxqa.errors import DataError, TryAgain

LONGEST_LINE = 16 << 20  # bytes; a longer one is a record that cannot be read
BLOCK = 1 << 20
PIECE = 4_096
ROWS_AT_ONCE = 1_024
csv.field_size_limit(LONGEST_LINE)


class Row(NamedTuple):
    """One record as it was found.

    Attributes:
      file: its name as the plan has it.
      line: where it begins, from 1: the line of a text file, the row of any other.
      byte_offset: where it begins, in the decompressed content; None where there are no bytes.
      raw: the bytes of a text file's record.
      fields: its columns; None if it cannot be read. A Parquet file's dates, numbers of other kinds
        than Python's, lists and structures are Arrow's scalars.
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
        return json.loads(to_json(dict(self.fields), shown))


def to_json(value: Any, default: Callable[[Any], Any]) -> str:
    """Strict JSON, whose numbers are finite: null stands for others."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and value - value != 0 else value

    try:
        return json.dumps(value, default=default, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), default=lambda value: finite(default(value)))


def shown(value: Any) -> Any:
    """What JSON has no type for, as it is told of."""
    import pyarrow as pa

    if not isinstance(value, pa.Scalar):
        return repr(value)
    try:
        return plain_value(value)
    except ValueError as error:
        return f"<{value.type}: {error}>"


@dataclasses.dataclass(frozen=True)
class Input:
    """A file, or a hub data set, and what it was when it was planned.

    Attributes:
      path: of a file, absolute; the id of a data set.
      name: how outputs call it: its path below what the user named.
      format: a key of SOURCES.
      compression: of `records.COMPRESSIONS`, or None.
      state: of a file, what changes with it: size, inode, and the times of its last changes.
      size: bytes.
      sha256: of a file's bytes; the commit of a data set.
      split: of a data set.
      records: how many it has.
    """

    path: str
    name: str
    format: str
    compression: str | None = None
    state: tuple[int, ...] = ()
    size: int = 0
    sha256: str | None = None
    split: str | None = None
    records: int = 0


class Run(NamedTuple):
    """Consecutive records: where they start, the line, how many; of one of text its bytes."""

    start: int
    line: int
    records: int
    raw: bytes | None = None


class Source(abc.ABC):
    """One input, to be read from any of its records on; a row for every record, good or bad."""

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        """Opens nothing yet; `wanted` are the columns that are read where others need not be."""
        self.input, self.wanted = input, wanted

    @abc.abstractmethod
    def places(self) -> Iterator[Run]:
        """Where the records are; the runs of a text file have one each."""

    @abc.abstractmethod
    def rows(self, start: int, line: int) -> Iterator[Row]:
        """The records from there on."""

    def columns(self) -> list[str] | None:
        """The names of its columns, where all records have the same."""
        return None

    def raise_what_may_pass(self, error: Exception) -> None:
        """Raises: TryAgain: it is an error of the system, and no damage of the file."""
        if isinstance(error, OSError) and error.errno:
            told = error.strerror or error
            raise TryAgain(f"{self.input.path} cannot be read: {told}") from error

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

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        super().__init__(input, wanted)
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
            self.raise_what_may_pass(error)
            yield Line(offset, number, b"", f"the file cannot be read from here on: {error}")


class JsonLines(Lines):
    """A JSON object on each line."""

    def places(self) -> Iterator[Run]:
        for line in self.lines(0, 1):
            if line.reason is not None or not line.content.isspace():
                yield Run(line.offset, line.number, 1, line.content)

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


def looks_like_lines(one: Input) -> bool:
    """Whether a .json file has an object on each line, as many of that name do."""
    first = next(JsonLines(one).lines(0, 1), None)
    if first is None or first.reason is not None:
        return False
    fields, reason = parsed(first.content, first=True)
    return reason is None and fields is not None and "data" not in fields


def kind_name(value: Any) -> str:
    """What JSON calls a value, or Arrow."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a truth value"}
    kinds |= dict.fromkeys((int, float), "a number")
    arrow = getattr(value, "type", type(value).__name__)
    return "null" if value is None else kinds.get(type(value), f"of the type {arrow}")


class Csv(Lines):
    """A CSV or TSV file with a header."""

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        super().__init__(input, wanted)
        self.delimiter = "\t" if input.format == "tsv" else ","

    def places(self) -> Iterator[Run]:
        for row in self.rows(0, 1):
            yield Run(row.byte_offset or 0, row.line, 1, row.raw)

    @functools.cached_property
    def header(self) -> list[str]:
        found = next(self.records(0, 1), None)
        return [] if found is None or found[2] is None else found[2]

    def records(
        self, start: int, number: int, width: int | None = None
    ) -> Iterator[tuple[Line, bytes, list[str] | None, str | None]]:
        """Of each record its first line, its bytes, and its columns or why it has none.

        A record of many lines that cannot be, as where a quote is not closed, is its first line
        alone; what follows is read anew.

        Args:
          start: the byte to begin with.
          number: its line.
          width: the fields that a record has; None if that is not known yet.
        """
        lines, ahead = self.lines(start, number), collections.deque[Line]()
        taken: list[Line] = []

        def text() -> Iterator[str]:
            size = 0
            while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
                taken.append(line)
                if line.reason is not None:
                    raise csv.Error(line.reason)
                if (size := size + len(line.content)) > LONGEST_LINE:
                    raise csv.Error(f"the record has more than {LONGEST_LINE:,} bytes")
                content = line.content
                if line.offset == 0:
                    content = content.removeprefix(codecs.BOM_UTF8)
                yield content.decode("utf-8", "surrogateescape")

        while True:
            # A new reader for each record, as one that failed keeps what it had read.
            taken.clear()
            columns, reason = None, None
            try:
                columns = next(csv.reader(text(), delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                reason = str(error)
            if not taken:
                return
            unlike = columns is not None and width is not None and len(columns) != width
            if len(taken) > 1 and (columns is None or unlike):
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
                columns, reason = None, "the line opens a quote that is not closed"
            if columns != []:
                yield taken[0], b"".join(line.content for line in taken), columns, reason

    def rows(self, start: int, line: int) -> Iterator[Row]:
        header = self.header
        for first, raw, columns, reason in self.records(start, line, len(header)):
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

    def places(self) -> Iterator[Run]:
        try:
            metadata = self.file.metadata
            rows = sum(
                metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
            )
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            rows = 1  # that the file cannot be read
        if rows:
            yield Run(0, 1, rows)

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
        at, names, problem = 0, self.columns(), "it is missing"
        if self.wanted is not None and names is not None:
            names = [name for name in names if name in self.wanted]
        try:
            batches = self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names)
            for batch in batches:
                if at + len(batch) > skip:
                    first = max(skip - at, 0)
                    for fields, reason in fields_of(batch.slice(first)):
                        place = max(at, skip)
                        yield Row(self.input.name, before + place + 1, None, None, fields, reason)
                        at, skip = place + 1, place + 1
                else:
                    at += len(batch)
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            problem = str(error)
        for place in range(max(at, skip), size):
            reason = f"the row cannot be read: {problem}"
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


def fields_of(batch: Any) -> Iterator[tuple[Mapping[str, Any] | None, str | None]]:
    """The rows of an Arrow batch, or why one of them cannot be read."""
    import pyarrow.types as t

    plain = (t.is_string, t.is_large_string, t.is_boolean, t.is_integer, t.is_floating, t.is_binary)
    problems: dict[int, str] = {}
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if t.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not any(kind(column.type) for kind in plain):
            columns[name] = list(column)
            continue
        try:
            columns[name] = column.to_pylist()
        except ValueError:  # text that is not UTF-8
            columns[name] = []
            for row, one in enumerate(column):
                try:
                    value = one.as_py()
                except ValueError as error:
                    value = None
                    problems.setdefault(row, f"the column {name!r} cannot be read: {error}")
                columns[name].append(value)
    for row in range(len(batch)):
        if row in problems:
            yield None, problems[row]
        else:
            yield {name: values[row] for name, values in columns.items()}, None


def plain_value(value: Any) -> Any:
    """A value of a row as JSON has it, or text.

    Raises:
      ValueError: it cannot be represented: a date that no calendar has, text that is not UTF-8.
    """
    import pyarrow as pa

    if not isinstance(value, pa.Scalar):
        return value
    try:
        if pa.types.is_nested(value.type):
            return value.as_py()
        return value.cast(pa.string()).as_py()
    except (OverflowError, NotImplementedError, TypeError, LookupError) as error:
        raise ValueError(str(error)) from error


class Document(Source):
    """A JSON file as a whole: SQuAD's articles, or an array of objects."""

    @functools.cached_property
    def found(self) -> list[tuple[Any, str | None]]:
        """Each record, and why it cannot be read.

        Raises:
          DataError: the file is not what it was when it was planned.
        """
        try:
            with open(self.input.path, "rb") as file:
                raw = file.read()
            if self.input.sha256 not in (None, hashlib.sha256(raw).hexdigest()):
                raise DataError(f"{self.input.path} has changed since the run began")
            if self.input.compression is not None:
                import pyarrow as pa

                with pa.input_stream(pa.py_buffer(raw), compression=self.input.compression) as file:
                    raw = file.read()
            content = json.loads(raw.decode("utf-8-sig"))
        except (OSError, EOFError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            self.raise_what_may_pass(error)
            return [(None, f"the file cannot be read: {error}")]
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            return list(squad_records(content["data"]))
        if isinstance(content, list):
            return [(one, None if isinstance(one, dict) else f"{kind_name(one)}, not an object")
                    for one in content]  # fmt: skip
        return [(None, "the file is neither SQuAD data nor an array of objects")]

    def places(self) -> Iterator[Run]:
        if self.found:
            yield Run(0, 1, len(self.found))

    def rows(self, start: int, line: int) -> Iterator[Row]:
        for index, (fields, reason) in enumerate(self.found[start:], start):
            raw = None
            if reason is not None and fields is not None:
                fields, raw = None, json.dumps(fields).encode()
            yield Row(self.input.name, index + 1, None, raw, fields, reason)


def squad_records(articles: list[Any]) -> Iterator[tuple[Any, str | None]]:
    """The questions of SQuAD data, and in their order what is not as it should be."""

    def items(value: Any, name: str, where: str) -> list[tuple[str, Any]] | None:
        given = value.get(name) if isinstance(value, dict) else None
        if not isinstance(given, list):
            return None
        return [(f"{where}.{name}[{index}]", one) for index, one in enumerate(given)]

    for number, article in enumerate(articles):
        paragraphs = items(article, "paragraphs", where := f"data[{number}]")
        if paragraphs is None:
            yield article, f"{where} has no array 'paragraphs'"
        for place, paragraph in paragraphs or ():
            questions = items(paragraph, "qas", place)
            if questions is None:
                yield paragraph, f"{place} has no array 'qas'"
            for where, question in questions or ():
                if not isinstance(question, dict):
                    yield question, f"{where} is not an object"
                    continue
                title = {"title": article["title"]} if "title" in article else {}
                yield {"context": paragraph.get("context"), **title, **question}, None


class Hub(Source):
    """A data set of the Hugging Face Hub, streamed."""

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        super().__init__(input, wanted)
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

    def places(self) -> Iterator[Run]:
        stream = self.stream()
        splits = getattr(stream.info, "splits", None) or {}
        known = getattr(splits.get(self.input.split), "num_examples", None)
        rows = known if known else sum(1 for _ in stream)
        if rows:
            yield Run(0, 1, rows)

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


def source_of(input: Input, wanted: Sequence[str] | None = None) -> Source:
    """The reader of an input; see `Source`."""
    return SOURCES[input.format](input, wanted)
