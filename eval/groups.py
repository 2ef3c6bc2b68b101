"""Questions in groups: by question word and lengths, and by columns of a file of one's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxqa import files
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems

from .questions import SquadExample

MOST_GROUPS = 100  # of a column; more are values of each question, no groups


class Grouping(NamedTuple):
    """One way to put questions in groups.

    Attributes:
      title: what the groups are by.
      of: a question's group.
      order: the groups, as tables show them.
    """

    title: str
    of: Callable[[SquadExample], str]
    order: Sequence[str]

    def masks(self, questions: Sequence[SquadExample]) -> dict[str, np.ndarray]:
        """Of each group that any question is in, bool [questions], which are."""
        labels = np.array([self.of(question) for question in questions], object)
        return {label: labels == label for label in self.order if (labels == label).any()}


def question_word(question: SquadExample) -> str:
    """Its question word."""
    words = question.question.lower().split()
    return next((word for word in words if word in QUESTION_WORDS), "other")


def answer_length(question: SquadExample) -> str:
    words = min((len(answer.split()) for answer in question.answers), default=0)
    return next(label for end, label in ANSWER_LENGTHS if words <= end)


def context_length(question: SquadExample) -> str:
    words = len(question.context.split())
    return next(label for end, label in CONTEXT_LENGTHS if words <= end)


QUESTION_WORDS = ("what", "who", "when", "where", "which", "how", "why")
ANSWER_LENGTHS = (
    (0, "none"), (1, "1 word"), (2, "2 words"), (4, "3 or 4 words"), (9, "5 to 9 words"),
    (math.inf, "10 words or more"),
)  # fmt: skip
CONTEXT_LENGTHS = (
    (99, "up to 99 words"), (149, "100 to 149 words"), (199, "150 to 199 words"),
    (299, "200 to 299 words"), (math.inf, "300 words or more"),
)  # fmt: skip
GROUPINGS = (
    Grouping("question word", question_word, (*QUESTION_WORDS, "other")),
    Grouping("shortest right answer", answer_length, [label for _, label in ANSWER_LENGTHS]),
    Grouping("length of the context", context_length, [label for _, label in CONTEXT_LENGTHS]),
)


def read(path: str | Path | None) -> list[Grouping]:
    """The built-in groupings, and one for each column of a CSV file besides its `id`.

    Questions that the file does not have, or has with an empty cell, are in the group "none".

    Args:
      path: a UTF-8 file with a header; None without one.

    Raises:
      UsageError: it cannot be read.
      DataError: it has no column id, the same id twice, a row of another length, or a column with
        more than MOST_GROUPS values.
    """
    if path is None:
        return list(GROUPINGS)
    try:
        text = files.read_named(path).decode("utf-8-sig")
    except TryAgain:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}") from error
    return [*GROUPINGS, *columns(str(path), rows)]


def columns(path: str, rows: Sequence[Sequence[str]]) -> list[Grouping]:
    """The groupings of a file's rows."""
    head = list(rows[0]) if rows else []
    if "id" not in head or len(head) < 2 or len(set(head)) < len(head):
        raise DataError(
            f"{path} must begin with a header that has id and other columns, each once; it has "
            f"{', '.join(head) or 'nothing'}"
        )
    own, problems = head.index("id"), []
    by_id: dict[str, Sequence[str]] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(head):
            problems.append(f"row {number} has {len(row)} cells, the header {len(head)}")
        elif row[own] in by_id:
            problems.append(f"row {number} has the id {row[own]!r}, which came before")
        else:
            by_id[row[own]] = row
    made = []
    for place, title in enumerate(head):
        if place == own:
            continue
        values = {name: row[place].strip() for name, row in by_id.items() if row[place].strip()}
        order = sorted(set(values.values()), key=natural)
        if len(order) > MOST_GROUPS:
            problems.append(
                f"column {title!r} has {len(order):,} different values; groups are {MOST_GROUPS} "
                "at most"
            )
        made.append(Grouping(title, OfFile(values), [*order, NONE]))
    if problems:
        raise DataError(all_problems(f"{path} gives no groups", problems))
    return made


NONE = "none"


class OfFile:
    """The group that a file gives a question."""

    def __init__(self, values: dict[str, str]):
        self.values = values

    def __call__(self, question: SquadExample) -> str:
        return self.values.get(question.id, NONE)


def natural(text: str) -> tuple[bool, float, str]:
    """Numbers first, by size, then texts."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
