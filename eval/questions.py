"""Questions with their right answers, out of whatever `flaxqa predict` reads, too.

SQuAD's JSON (v1.1 and 2.0), the flattened rows that `datasets` gives (a JSON array, `{"data":
[...]}`, JSON lines, Parquet, Arrow, a folder of `save_to_disk`), MRQA's lines, CSV, and hub data
sets; text also as .gz and .zst.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxqa import frames, inputs, rows, sources
from flaxqa.config import DataOptions
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems
from flaxqa.features import Example
from flaxqa.records import KEYS, Columns, example_of
from flaxqa.rows import Input, Row

VERSION, VERSION_2 = "1.1", "v2.0"
ANSWERS, IMPOSSIBLE = "answers", "is_impossible"


@dataclasses.dataclass(frozen=True, slots=True)
class SquadExample(Example):
    """A question with the answers that count as right; in SQuAD 2.0 there may be none.

    Attributes:
      answers: their texts.
      starts: the character where each begins in the context; none where the data do not tell.
    """

    answers: tuple[str, ...]
    starts: tuple[int, ...] = dataclasses.field(default=(), compare=False)


class Data(NamedTuple):
    """The questions of a data set, and whether they are scored as SQuAD 2.0."""

    questions: list[SquadExample]
    v2: bool


@dataclasses.dataclass
class Found:
    """What is known of the questions while they are read.

    Attributes:
      where: what messages call the data.
      strict: whether a question without an answer is wrong in v1.1, as in SQuAD's own files; in
        rows it makes the data SQuAD 2.0.
      problems: of each whether it is none in SQuAD 2.0.
      unscored: questions that tell of no answers at all.
    """

    where: str
    strict: bool = False
    v2: bool = False
    questions: list[SquadExample] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, bool]] = dataclasses.field(default_factory=list)
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    unscored: int = 0

    def add(self, row: Row, columns: Columns) -> None:
        """Takes a row, or notes what is wrong with it."""
        place = row.called()
        example = example_of(row, columns, max_context_chars=None)
        if isinstance(example, str):
            self.problems.append((f"{place}: {example}", False))
            return
        fields = row.fields or {}
        self.v2 |= fields.get(IMPOSSIBLE) is not None
        if rows.value_at(fields, columns.id) is None:
            self.problems.append((f"{place}: the record has no column {columns.id!r}", False))
        try:
            golds, starts = golds_of(fields.get(ANSWERS)), starts_of(fields.get(ANSWERS))
        except ValueError as error:
            self.problems.append((f"{place}: {error}", False))
            golds, starts = (), ()
        if golds is None:
            self.unscored += 1
            if not fields.get(IMPOSSIBLE):
                self.problems.append((f"{place}: the record has no column {ANSWERS!r}", False))
            golds = ()
        elif not golds and self.strict:
            self.problems.append((
                f"{place}: answers is empty: a question without an answer (as in SQuAD 2.0) has no "
                "v1.1 score", True,
            ))  # fmt: skip
        self.v2 |= not golds and not self.strict
        if example.id in self.places:
            other = self.places[example.id]
            self.problems.append((f"{place}: its id {example.id!r} is also that of {other}", False))
        self.places[example.id] = place
        asked = example.id, example.question, example.context
        self.questions.append(SquadExample(*asked, golds, starts))

    def data(self) -> Data:
        """What was found.

        Raises:
          DataError: a row is not as it should be; names every place.
        """
        problems = [text for text, fine_in_v2 in self.problems if not (self.v2 and fine_in_v2)]
        if self.unscored and self.unscored == len(self.questions):
            raise DataError(
                f"{self.where} has no right answers, so nothing can be scored; `flaxqa predict` "
                "answers its questions"
            )
        if not self.questions and not problems:
            problems.append("data holds no question")
        if problems:
            kind = "SQuAD 2.0" if self.v2 else "SQuAD v1.1"
            raise DataError(all_problems(f"{self.where} cannot be scored as {kind}", problems))
        return Data(self.questions, self.v2)


def golds_of(value: Any) -> tuple[str, ...] | None:
    """The texts of right answers in any of the forms that data sets have; None if there is no form.

    `[{"text": ...}]` as SQuAD's, `{"text": [...]}` as that of `datasets`, `[...]` as MRQA's; in CSV
    any of them as JSON.

    Raises:
      ValueError: it is something else.
    """
    value = structured(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        if "text" not in value:
            raise ValueError("answers has no 'text'")
        value = value["text"]
        value = [value] if isinstance(value, str) else value
    if hasattr(value, "tolist"):  # numpy's, as pandas has them
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"answers must be a list, it is {rows.kind_name(value)}")
    texts: list[Any] = [one.get("text") if isinstance(one, Mapping) else one for one in value]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"answers[{number}].text must be a string, it is {rows.kind_name(text)}"
            )
    return tuple(texts)


def starts_of(value: Any) -> tuple[int, ...]:
    """The `answer_start` of every right answer, in the forms of `golds_of`; () if one has none."""
    value = structured(value)
    found: Any
    if isinstance(value, Mapping):
        found = value.get("answer_start")
        found = [found] if isinstance(found, int) else found
    else:
        found = [one.get("answer_start") if isinstance(one, Mapping) else None
                 for one in (value if isinstance(value, list | tuple) else ())]  # fmt: skip
    found = found.tolist() if hasattr(found, "tolist") else found
    whole = isinstance(found, list | tuple) and all(type(start) is int for start in found)
    return tuple(found) if found and whole else ()


def structured(value: Any) -> Any:
    """What a table's cell has; of text what it is as JSON.

    Raises:
      ValueError: it is text and no JSON.
    """
    value = rows.plain_value(value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"answers is text and not JSON: {error}") from error


def read(name: str | Path, options: DataOptions | None = None) -> Data:
    """The questions of a file, folder or data set; see `read_with_source`."""
    return read_with_source(name, options)[0]


def read_with_source(
    name: str | Path, options: DataOptions | None = None, split: str = "validation"
) -> tuple[Data, dict[str, Any]]:
    """The questions with right answers, in their order, and where they are from.

    SQuAD's JSON is taken as 2.0 if its version says so, or if a question says whether it
    `is_impossible`; rows are if a question has no answer.

    Args:
      name: a file, a folder, a pattern, or the id of a hub data set.
      options: how it is read.
      split: of a data set that has several, where the options name none.

    Raises:
      DataError: it is missing, damaged, has an id twice, or cannot be scored; names every place.
      TryAgain: the hub cannot be reached.
    """
    options = options or DataOptions()
    columns = Columns.of(options.columns)
    source: dict[str, Any] = {"name": str(name)}
    found = Found(str(name))
    for one in inputs_of(str(name), options, split):
        read_into(found, one, columns, source)
    data = found.data()
    source["questions"] = len(data.questions)
    return data, source


def inputs_of(name: str, options: DataOptions, split: str = "validation") -> list[Input]:
    """What a name stands for.

    Raises:
      DataError: nothing that can be read.
    """
    try:
        found = inputs.find([name], options=options, split=split, unnamed="json")
        return [one if one.format == "hub" else inputs.identified(one) for one in found]
    except UsageError as error:
        raise DataError(str(error)) from error
    except (OSError, TryAgain) as error:
        if isinstance(error, TryAgain) and "cannot be read" not in str(error):
            raise
        raise DataError(f"{name} cannot be read: {error}") from error


def read_into(found: Found, one: Input, columns: Columns, source: dict[str, Any]) -> None:
    """Reads the questions of one input, and notes what it is."""
    wanted = (*columns.wanted(), ANSWERS, IMPOSSIBLE)
    reader = sources.source_of(one, wanted)
    if isinstance(reader, sources.Hub):
        reader.streaming = False  # by way of its cache, which also works offline
        stream = reader.stream()
        commits = re.findall(r"@([0-9a-f]{40})/", " ".join(stream.info.download_checksums or ()))
        source |= {"split": one.split, "commit": commits[0] if commits else None}
    else:
        source.setdefault("files", {})[one.name] = one.sha256
        if len(source["files"]) == 1:
            source["sha256"] = one.sha256
        else:
            source.pop("sha256", None)
    if isinstance(reader, sources.Document):
        note_version(found, reader.content)
        source["version_told"] = version_of(reader.content)
    there = reader.columns()
    missing = [] if there is None else [
        name for name in columns.needed() if not rows.has_column(there, name)]  # fmt: skip
    if missing:
        raise DataError(
            f"{found.where} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(there or ())}{reader.hint()}"
        )
    for row in reader.rows(0, 1):
        found.add(row, columns)
    if one.format != "hub" and not inputs.unchanged(one):
        raise DataError(f"{found.where} changed while it was read")


def version_of(content: Any) -> Any:
    return content.get("version") if isinstance(content, Mapping) else None


def note_version(found: Found, content: Any) -> None:
    """Notes how a document's questions are scored."""
    version = version_of(content)
    found.strict = sources.is_squad(content)
    found.v2 |= isinstance(version, str) and version.removeprefix("v").startswith("2")


def parse(content: Any, where: str) -> Data:
    """The questions of a JSON document that is read already; see `read_with_source`."""
    found = Found(where)
    note_version(found, content)
    for index, (fields, reason, place) in enumerate(sources.records_in(content)):
        fields = fields if reason is None else None
        found.add(Row(where, index + 1, None, None, fields, reason, place or None), Columns())
    return found.data()


def from_rows(records: Iterable[Any], columns: Columns) -> tuple[Data, dict[str, Any]]:
    """The questions of rows that are there already, and what they are called.

    Args:
      records: mappings, `SquadExample`s, or a frame of pandas, polars or Arrow.
      columns: what their columns are called.

    Raises:
      DataError: as `read_with_source`.
      UsageError: a frame has no such column.
    """
    found = Found("the rows")
    for index, fields in enumerate(frames.rows_of(records, columns.needed())):
        if isinstance(fields, SquadExample):
            fields = {**{name: getattr(fields, name) for name in KEYS}, ANSWERS: fields.answers}
        there, reason = isinstance(fields, Mapping), None
        if not there:
            reason = f"it is {type(fields).__name__}, not a mapping"
        row = Row("rows", index, None, None, fields if there else None, reason, f"row {index}")
        found.add(row, columns)
    data = found.data()
    return data, {"name": "rows", "questions": len(data.questions)}


def sha256(questions: Iterable[SquadExample]) -> str:
    """A hash of the questions themselves, the same for a file and a hub data set of one content."""
    digest = hashlib.sha256()
    for example in questions:
        row = [example.id, example.question, example.context, *example.answers]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def of_rows(references: Sequence[Mapping[str, Any]]) -> Iterator[SquadExample]:
    """Questions of which only id and right answers are known, as metrics get them."""
    for row in references:
        yield SquadExample(str(row["id"]), "", "", golds_of(row["answers"]) or ())
