"""A record as it was found, and what an input is: what all formats have in common.

Reading never stops at a bad record: it comes as a `Row` with the reason.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flaxqa.errors import TryAgain


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
      place: where it is in a file that is read as a whole: data[0].paragraphs[1].qas[2].
    """

    file: str
    line: int
    byte_offset: int | None
    raw: bytes | None
    fields: Mapping[str, Any] | None
    reason: str | None = None
    place: str | None = None

    def called(self) -> str:
        """What messages call it."""
        return self.place or f"{self.file}:{self.line}"

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
      compression: of `inputs.COMPRESSIONS`, or None.
      encoding: of a text file; None for UTF-8.
      delimiter: of a CSV file's columns; None for the usual one.
      state: of a file, what changes with it: size, inode, and the times of its last changes.
      size: bytes.
      sha256: of a file's bytes; the commit of a data set.
      split: of a data set.
      config: of a data set that has several.
      records: how many it has.
    """

    path: str
    name: str
    format: str
    compression: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    state: tuple[int, ...] = ()
    size: int = 0
    sha256: str | None = None
    split: str | None = None
    config: str | None = None
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

    def read_of(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read."""
        if self.wanted is None:
            return list(names)
        wanted = [f"{each}." for each in self.wanted]
        return [name for name in names if any(each.startswith(f"{name}.") for each in wanted)]

    def hint(self) -> str:
        """What may be the cause where a column is missing, to be added to a message."""
        return ""

    def types(self) -> Mapping[str, Any]:
        """The Arrow type of each column, where they have some."""
        return {}

    def raise_what_may_pass(self, error: Exception) -> None:
        """Raises: TryAgain: it is an error of the system, and no damage of the file."""
        if isinstance(error, TryAgain):
            raise error
        if isinstance(error, OSError) and error.errno:
            told = error.strerror or error
            raise TryAgain(f"{self.input.path} cannot be read: {told}") from error

    def unreadable(self, line: int, offset: int | None, error: Exception) -> Row:
        """What stands for all that cannot be read from there on."""
        reason = f"the file cannot be read from here on: {error}"
        return Row(self.input.name, line, offset, None, None, reason)


def has_column(names: Collection[str], name: str) -> bool:
    """Whether a column is among some, or may be inside one of them: input.question in input."""
    parts = name.split(".")
    return any(".".join(parts[:size]) in names for size in range(len(parts), 0, -1))


MISSING = object()


def value_at(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of a column, or of one inside another: input.question is {"input": {"question"}}.

    A column that is called so itself comes first.
    """
    if name in fields:
        return fields[name]
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        inner: Any = fields.get(".".join(parts[:size]))
        if hasattr(inner, "as_py"):  # a structure of Arrow
            inner = inner.as_py()
        if isinstance(inner, Mapping):
            found = value_at(inner, ".".join(parts[size:]), MISSING)
            if found is not MISSING:
                return found
    return default


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
    # Of a type that has no text Arrow says so by an error of its own; the row is set aside with it.
    except (OverflowError, pa.ArrowNotImplementedError, TypeError, LookupError) as error:
        raise ValueError(str(error)) from error


def kind_name(value: Any) -> str:
    """What JSON calls a value, or Arrow."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a truth value"}
    kinds |= dict.fromkeys((int, float), "a number")
    arrow = getattr(value, "type", type(value).__name__)
    return "null" if value is None else kinds.get(type(value), f"of the type {arrow}")
