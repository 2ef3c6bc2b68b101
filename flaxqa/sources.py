"""Records in tables and documents: Parquet, Arrow, SQuAD's JSON, hub data sets; and all formats."""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flaxqa import files, stores
from flaxqa.errors import DataError, TryAgain
from flaxqa.rows import Input, Row, Run, Source, kind_name
from flaxqa.text import Csv, JsonLines, Mrqa, decompressed, not_in

ROWS_AT_ONCE = 1_024


class Parquet(Source):
    """A Parquet file; of a damaged one each row that cannot be read is told of."""

    @functools.cached_property
    def file(self) -> Any:
        import pyarrow.parquet as pq

        remote = stores.is_url(self.input.path)
        return pq.ParquetFile(files.open_input(self.input.path) if remote else self.input.path)

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
        if names is not None:
            names = self.read_of(names)
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
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            return None

    def types(self) -> Mapping[str, Any]:
        """The Arrow type of each column."""
        try:
            return {field.name: field.type for field in self.file.schema_arrow}
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
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


class Arrow(Source):
    """Arrow's own files: what `datasets` keeps and `save_to_disk` writes, and Feather."""

    def batches(self) -> Iterator[Any]:
        """The record batches, each checked.

        Raises:
          OSError, ValueError: the file is damaged, or cannot be read.
        """
        import pyarrow as pa

        remote = stores.is_url(self.input.path)
        with (
            pa.PythonFile(files.open_input(self.input.path), mode="r")
            if remote
            else pa.memory_map(self.input.path)
        ) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            for batch in batches:
                batch.validate(full=True)
                yield batch

    def places(self) -> Iterator[Run]:
        count = 0
        try:
            for batch in self.batches():
                count += len(batch)
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            count += 1  # that the rest cannot be read
        if count:
            yield Run(0, 1, count)

    def rows(self, start: int, line: int) -> Iterator[Row]:
        before = 0
        try:
            for batch in self.batches():
                if before + len(batch) > start:
                    names = self.read_of(batch.schema.names)
                    skip = max(start - before, 0)
                    part = batch.select(names).slice(skip)
                    for number, (fields, reason) in enumerate(fields_of(part), before + skip + 1):
                        yield Row(self.input.name, number, None, None, fields, reason)
                before += len(batch)
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            if start <= before:
                yield self.unreadable(before + 1, None, error)

    @functools.cached_property
    def schema(self) -> Mapping[str, Any]:
        try:
            first = next(self.batches(), None)
        except (OSError, ValueError) as error:
            self.raise_what_may_pass(error)
            return {}
        return {} if first is None else {field.name: field.type for field in first.schema}

    def columns(self) -> list[str] | None:
        return list(self.schema) or None

    def types(self) -> Mapping[str, Any]:
        return self.schema


class Document(Source):
    """A JSON file as a whole: SQuAD's articles, or an array of objects, perhaps below `data`."""

    @functools.cached_property
    def content(self) -> Any:
        """What the file has.

        Raises:
          DataError: the file is not what it was when it was planned, or it is damaged.
        """
        try:
            with files.open_input(self.input.path) as file:
                raw = file.read()
            if self.input.sha256 not in (None, hashlib.sha256(raw).hexdigest()):
                raise DataError(f"{self.input.path} has changed since the run began")
            if self.input.compression is not None:
                raw = decompressed(io.BytesIO(raw), self.input.compression).read()
            encoding = self.input.encoding or "utf-8"
            content = raw.removeprefix(codecs.BOM_UTF8)
            return json.loads(content.decode(encoding))
        except UnicodeDecodeError:
            return Damage(not_in(encoding, content, "file"))
        except (OSError, EOFError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            self.raise_what_may_pass(error)
            told = "cannot be read" if isinstance(error, (OSError, EOFError)) else "is not JSON"
            return Damage(f"the file {told}: {error}")

    @functools.cached_property
    def found(self) -> list[Record]:
        """Its records.

        Raises:
          DataError: see `content`.
        """
        if isinstance(self.content, Damage):
            return [(None, self.content.reason, "")]
        return list(records_in(self.content))

    def places(self) -> Iterator[Run]:
        if self.found:
            yield Run(0, 1, len(self.found))

    def rows(self, start: int, line: int) -> Iterator[Row]:
        for index, (fields, reason, place) in enumerate(self.found[start:], start):
            raw = None
            if reason is not None and fields is not None:
                fields, raw = None, json.dumps(fields).encode()
            yield Row(self.input.name, index + 1, None, raw, fields, reason, place or None)


class Damage:
    """Why a document has no content."""

    def __init__(self, reason: str):
        self.reason = reason


Record = tuple[Any, str | None, str]  # what is there, why it cannot be read, and where it is


def is_squad(content: Any) -> bool:
    """Whether a document has SQuAD's articles, and not rows below `data` as run_qa takes them."""
    articles = content.get("data") if isinstance(content, dict) else None
    return isinstance(articles, list) and not (
        articles
        and all(
            isinstance(one, dict) and "paragraphs" not in one and "context" in one
            for one in articles
        )
    )


def records_in(content: Any) -> Iterator[Record]:
    """The records of a document, and in their order what is not as it should be."""
    if is_squad(content):
        yield from squad_records(content["data"])
        return
    found = content.get("data") if isinstance(content, dict) else content
    if not isinstance(found, list):
        given = "missing" if isinstance(content, dict) and "data" not in content else (
            kind_name(found))  # fmt: skip
        yield None, ("the file is neither SQuAD data nor an array of objects: data must be a list, "
                     f"it is {given}"), ""  # fmt: skip
        return
    name = "data" if isinstance(content, dict) else ""
    for index, one in enumerate(found):
        reason = None if isinstance(one, dict) else f"{kind_name(one)}, not an object"
        yield one, reason, f"{name}[{index}]"


def squad_records(articles: list[Any]) -> Iterator[Record]:
    """The questions of SQuAD data, and in their order what is not as it should be."""

    def items(value: Any, name: str, where: str) -> tuple[list[tuple[str, Any]], str | None]:
        given = value.get(name) if isinstance(value, dict) else None
        if not isinstance(given, list):
            missing = isinstance(value, dict) and name not in value
            told = "missing" if missing else kind_name(given if isinstance(value, dict) else value)
            return [], f"{where}.{name} must be a list, it is {told}"
        return [(f"{where}.{name}[{index}]", one) for index, one in enumerate(given)], None

    for number, article in enumerate(articles):
        paragraphs, reason = items(article, "paragraphs", where := f"data[{number}]")
        if reason is not None:
            yield article, reason, ""
        for place, paragraph in paragraphs:
            questions, reason = items(paragraph, "qas", place)
            if reason is not None:
                yield paragraph, reason, ""
            for where, question in questions:
                if not isinstance(question, dict):
                    told = f"{where} must be an object, it is {kind_name(question)}"
                    yield question, told, ""
                    continue
                title = {"title": article["title"]} if "title" in article else {}
                row = {"context": paragraph.get("context"), **title, **question}
                yield row, None, where


class Hub(Source):
    """A data set of the Hugging Face Hub, streamed, or by way of its cache."""

    streaming = True

    def __init__(self, input: Input, wanted: Sequence[str] | None = None):
        super().__init__(input, wanted)
        self.iterator: Iterator[Mapping[str, Any]] | None = None
        self.at = 0

    def stream(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.input.path, self.input.config, split=self.input.split,
                revision=self.input.sha256, streaming=self.streaming,
            )  # fmt: skip
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise TryAgain(
                f"the data set {self.input.path} cannot be loaded ({error}); name a file or a "
                "folder, or try again online"
            ) from error
        except ValueError as error:  # no such configuration or split
            raise DataError(f"the data set {self.input.path}: {error}") from error

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
    "arrow": Arrow,
    "json": Document,
    "mrqa": Mrqa,
    "hub": Hub,
}


def source_of(input: Input, wanted: Sequence[str] | None = None) -> Source:
    """The reader of an input; see `Source`."""
    return SOURCES[input.format](input, wanted)
