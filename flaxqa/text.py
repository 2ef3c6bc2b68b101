"""Records in text: JSON lines, CSV and TSV, MRQA's lines.

Blank lines are no records. A compressed file (.gz, .zst, .xz, .bz2) can only be read from its
beginning, so several processes share many small ones better than a large one.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import functools
import io
import json
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from flaxqa import files, stores
from flaxqa.rows import Input, Row, Run, Source, kind_name

LONGEST_LINE = 16 << 20  # bytes; a longer one is a record that cannot be read
BLOCK = 1 << 20
PIECE = 4_096
ESCAPED = re.compile("[\udc80-\udcff]")  # what stands for bytes that could not be decoded
# Of CSV, as they are written on a command line.
DELIMITERS = {",": ",", "\t": "tab", ";": "';'", "|": "'|'"}
csv.field_size_limit(LONGEST_LINE)


def decompressed(file: Any, compression: str) -> IO[bytes]:
    """The content of a compressed file, from its beginning."""
    if compression == "xz":
        return io.BufferedReader(Pieces(lzma.LZMAFile(file)), BLOCK)
    import pyarrow as pa

    return io.BufferedReader(Pieces(pa.CompressedInputStream(file, compression)), BLOCK)


class Pieces(io.RawIOBase):
    """A stream in small pieces: pyarrow's gives nothing of one that is damaged."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self.stream.read(min(len(buffer), PIECE))
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
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
        self.encoding = input.encoding or "utf-8"

    def open(self, start: int) -> IO[bytes]:
        """The content from a byte on."""
        if self.input.compression is None:
            plain = files.open_input(self.input.path)
            plain.seek(start)
            return plain
        if self.stream is None or self.at > start:
            import pyarrow as pa

            remote = stores.is_url(self.input.path)
            raw = files.open_input(self.input.path) if remote else pa.OSFile(self.input.path)
            self.stream, self.at = decompressed(raw, self.input.compression), 0
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
                fields, reason = parsed(one.content, self.encoding, first=one.offset == 0)
            yield Row(self.input.name, one.number, one.offset, one.content, fields, reason)


def not_in(encoding: str, content: bytes, what: str) -> str:
    """Where bytes are not in an encoding, and the way out; they must not be."""
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start
    other = "cp1252" if encoding == "utf-8" else "utf-8"
    return (
        f"byte {at} of the {what}, 0x{content[at]:02X}, is not {encoding.upper()}; if the file has "
        f"another encoding, name it: --encoding {other}"
    )


def parsed(
    content: bytes, encoding: str = "utf-8", *, first: bool = False
) -> tuple[Mapping[str, Any] | None, str | None]:
    """The object that a line has, or why it has none."""
    if first:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        fields = json.loads(content.decode(encoding))
    except UnicodeDecodeError:
        return None, not_in(encoding, content, "line")
    except RecursionError:
        return None, "the line is nested too deep"
    except ValueError as error:
        return None, f"the line is not JSON: {error}"
    if not isinstance(fields, dict):
        return None, f"the line is {kind_name(fields)}, not an object"
    return fields, None


class Csv(Lines):
    """A CSV or TSV file with a header."""

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        super().__init__(input, wanted)
        self.delimiter = input.delimiter or ("\t" if input.format == "tsv" else ",")

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
                yield content.decode(self.encoding, "surrogateescape")

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
                wanted = fields if self.wanted is None else self.wanted
                if any(ESCAPED.search(fields.get(name, "")) for name in wanted):
                    fields, reason = None, not_in(self.encoding, raw, "record")
            yield Row(self.input.name, first.number, first.offset, raw, fields, reason)

    def columns(self) -> list[str] | None:
        return self.header

    def hint(self) -> str:
        counts = {each: "".join(self.header).count(each) for each in DELIMITERS}
        likely = max(counts, key=lambda each: counts[each])
        if len(self.header) > 1 or not counts[likely]:
            return ""
        return f"; if {likely!r} separates its columns: --delimiter {DELIMITERS[likely]}"


class Mrqa(Lines):
    """MRQA's lines: a context and its questions on each, after a header."""

    def places(self) -> Iterator[Run]:
        count = sum(1 for _ in self.every())
        if count:
            yield Run(0, 1, count)

    def rows(self, start: int, line: int) -> Iterator[Row]:
        """The questions from number `start` on; what goes on where the last reader stopped is not
        read anew."""
        if self.under_way is None or self.number != start:
            self.under_way, self.number = self.every(), 0
        for row in self.under_way:
            self.number += 1
            if self.number > start:
                yield row

    under_way: Iterator[Row] | None = None
    number = 0

    def every(self) -> Iterator[Row]:
        for one in self.lines(0, 1):
            if one.reason is None and one.content.isspace():
                continue
            fields, reason = None, one.reason
            if reason is None:
                fields, reason = parsed(one.content, self.encoding, first=one.offset == 0)
            row = Row(self.input.name, one.number, one.offset, one.content, fields, reason)
            if fields is None:
                yield row
            elif "header" not in fields or "qas" in fields:
                yield from questions_of(row, fields)


def questions_of(row: Row, fields: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each question of a line."""
    questions = fields.get("qas")
    if not isinstance(questions, list):
        yield row._replace(fields=None, reason=f"qas is {kind_name(questions)}, not an array")
        return
    for question in questions:
        if isinstance(question, dict):
            named = {"id": question.get("qid"), "context": fields.get("context"), **question}
            yield row._replace(fields=named, raw=json.dumps(named).encode())
        else:
            reason = f"a question is {kind_name(question)}, not an object"
            yield row._replace(fields=None, reason=reason)


def kind_of_lines(one: Input) -> str | None:
    """ "jsonl" if a file has an object on each line, "mrqa" if those are MRQA's, or None."""
    first = next(JsonLines(one).lines(0, 1), None)
    if first is None or first.reason is not None:
        return None
    fields, reason = parsed(first.content, first=True)
    if reason is not None or fields is None or "data" in fields:
        return None
    mrqa = "question" not in fields and ("qas" in fields or fields.keys() == {"header"})
    return "mrqa" if mrqa else "jsonl"
