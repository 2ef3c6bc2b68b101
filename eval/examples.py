"""The questions of an evaluation and what was answered: `per_example.parquet`, both ways."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import answers, files
from flaxqa.answers import Answers
from flaxqa.errors import DataError

from . import runs, squad
from .questions import VERSION, SquadExample

FILE = "per_example.parquet"


def n_best(row: Answers) -> list[dict[str, Any]]:
    """The answers as in run_qa's nbest_predictions.json, with their characters besides."""
    return [
        {
            "text": one.text,
            "start": one.start,
            "end": one.end,
            "score": one.score,
            "probability": probability,
            "start_logit": one.start_logit,
            "end_logit": one.end_logit,
        }
        for one, probability in zip(row, answers.probabilities(row), strict=True)
    ]


def valid(text: str) -> str:
    """The text with lone surrogates, which no file format takes, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parquet(
    asked: Sequence[SquadExample],
    rows: Sequence[Answers],
    predictions: Mapping[str, str],
    scores: squad.Scores,
    mistakes: Sequence[str | None],
) -> bytes:
    """One row a question, for looking at what went wrong and for comparing two runs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    best = [n_best(row)[0] if row else {} for row in rows]
    odds = [None if row.error else row.null_odds for row in rows]
    kinds = {"start": pa.int64(), "end": pa.int64()} | dict.fromkeys(
        ("score", "probability", "start_logit", "end_logit"), pa.float64()
    )
    table = pa.table(
        {
            "id": [valid(question.id) for question in asked],
            "question": [valid(question.question) for question in asked],
            "context": [valid(question.context) for question in asked],
            "answers": pa.array(
                [list(map(valid, question.answers)) for question in asked], pa.list_(pa.string())
            ),
            "answer_starts": pa.array([list(one.starts) for one in asked], pa.list_(pa.int64())),
            "prediction": pa.array([predictions.get(each.id) for each in asked], pa.string()),
            **{name: pa.array([one.get(name) for one in best], kinds[name]) for name in kinds},
            "null_odds": pa.array(odds, pa.float64()),
            **scores.values,
            "mistake": pa.array(mistakes, pa.string()),
            "n_windows": pa.array([row.n_windows for row in rows], pa.int32()),
            "question_cut": [row.question_cut for row in rows],
            "error": pa.array([row.error for row in rows], pa.string()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The Q questions of an evaluation, in their order.

    Attributes:
      name: of the run.
      v2: whether they are scored as SQuAD 2.0.
      questions: with contexts and right answers.
      scores: of each.
      predictions: "" where none was given, None where a question was set aside.
      spans: the characters of the best answer; None where there is none.
      score: float [Q], of the best answer; NaN where there is none.
      null_odds: float [Q]; NaN where a question was set aside.
      mistakes: the kind of each, of `mistakes.KINDS`; None where it is none.
      n_windows: of each.
      question_cut: of each.
      errors: why it was set aside, or None.
      directory: of the run, for the file with the other candidates.
    """

    name: str
    v2: bool
    questions: Sequence[SquadExample]
    scores: squad.Scores
    predictions: Sequence[str | None]
    spans: Sequence[tuple[int, int] | None]
    score: np.ndarray
    null_odds: np.ndarray
    mistakes: Sequence[str | None]
    n_windows: Sequence[int]
    question_cut: Sequence[bool]
    errors: Sequence[str | None]
    directory: Path

    @property
    def right(self) -> np.ndarray:
        """bool [Q], whether the exact match is 1."""
        found: np.ndarray = self.scores.values["exact_match"].astype(bool)
        return found

    @property
    def answered(self) -> np.ndarray:
        """bool [Q], whether an answer was given that has a score."""
        return np.array([bool(text) for text in self.predictions]) & ~np.isnan(self.score)

    def candidates(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """{id: answers, best first}, of nbest_predictions.json.

        Raises:
          DataError: it cannot be read.
        """
        found: dict[str, Any] = runs.read_json(self.directory / "nbest_predictions.json")
        return found


def of_run(run: runs.Run) -> Examples:
    """The questions of an evaluation.

    Raises:
      DataError: a file is damaged, or of a flaxqa that did not keep contexts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run.directory / FILE
    try:
        with path.open("rb") as file:  # its name may not be UTF-8, which pyarrow needs
            columns = pq.read_table(file).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if "context" not in columns or "mistake" not in columns:
        raise DataError(
            f"{path} is of an earlier flaxqa and has no contexts; run `flaxqa eval` again"
        )
    names = ("id", "question", "context", "answers", "answer_starts")
    questions = [
        SquadExample(example_id, question, context, tuple(golds), tuple(starts))
        for example_id, question, context, golds, starts in zip(
            *(columns[name] for name in names), strict=True
        )
    ]
    values = {name: np.array(columns[name], one.kind) for name, one in squad.METRICS.items()}
    unanswered = tuple(
        one.id for one, text in zip(questions, columns["prediction"], strict=True) if text is None
    )
    has_answer = np.array([bool(one.answers) for one in questions])
    spans = [None if start is None else (start, end)
             for start, end in zip(columns["start"], columns["end"], strict=True)]  # fmt: skip
    return Examples(
        name=files.local(run.directory).name,
        v2=str(run.about["data"]["version"]) != VERSION,
        questions=questions,
        scores=squad.Scores(tuple(one.id for one in questions), values, unanswered, has_answer),
        predictions=columns["prediction"],
        spans=spans,
        score=np.array(columns["score"], float),
        null_odds=np.array(columns["null_odds"], float),
        mistakes=columns["mistake"],
        n_windows=columns["n_windows"],
        question_cut=columns["question_cut"],
        errors=columns["error"],
        directory=run.directory,
    )
