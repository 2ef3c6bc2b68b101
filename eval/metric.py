"""The same metrics of SQuAD v1.1 and 2.0 as `evaluate.Metric`s, which need no network.

    from .metric import Squad
    Squad().compute(predictions=[{"id": "1", "prediction_text": "Bob"}],
                    references=[{"id": "1", "answers": {"text": ["Bob"], "answer_start": [32]}}])

`evaluate.load("squad")` fetches its code from the hub; a subclass that is there already does not.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from flaxqa import frames

from . import squad
from .questions import SquadExample, of_rows

REFERENCE = {
    "id": datasets.Value("string"),
    "answers": datasets.features.Sequence(
        {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
    ),
}


def read(predictions: Any, references: Any) -> tuple[list[SquadExample], dict[str, str]]:
    return list(of_rows(references)), {row["id"]: row["prediction_text"] for row in predictions}


class OfFrames(evaluate.Metric):
    """A metric whose `compute` also takes frames of pandas, polars and Arrow."""

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> Any:
        """As of `evaluate.Metric`."""
        given = {"predictions": predictions, "references": references}
        lists = {
            name: None if value is None else list(frames.rows_of(value, ("id",)))
            for name, value in given.items()
        }
        return super().compute(**lists, **options)


class Squad(OfFrames):
    """Exact match and F1 of SQuAD v1.1, in percent, from and to what `evaluate`'s `squad` takes.

    A reference without a prediction scores 0; a prediction without a reference is ignored.
    """

    def _info(self) -> evaluate.MetricInfo:
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="The official exact match and F1 of SQuAD v1.1.",
            citation="Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250",
            inputs_description="predictions: id, prediction_text; references: id, answers.",
            features=datasets.Features({"predictions": prediction, "references": REFERENCE}),
            codebase_urls=[],
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        questions, given = read(predictions, references)
        scores = squad.score(questions, given)
        return scores.means


class SquadV2(OfFrames):
    """The metric of SQuAD 2.0, in percent, from and to what `evaluate`'s `squad_v2` takes.

    `compute` also takes `no_answer_threshold` (1.0): where `no_answer_probability` is above it, the
    question counts as left unanswered. A reference without a prediction scores 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        prediction = {
            "id": datasets.Value("string"),
            "prediction_text": datasets.Value("string"),
            "no_answer_probability": datasets.Value("float32"),
        }
        return evaluate.MetricInfo(
            description="The official metric of SQuAD 2.0.",
            citation="Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822",
            inputs_description="predictions: id, prediction_text, no_answer_probability; "
            "references: id, answers.",
            features=datasets.Features({"predictions": prediction, "references": REFERENCE}),
            codebase_urls=[],
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(
        self, *, predictions: Any, references: Any, no_answer_threshold: float = 1.0
    ) -> dict[str, float]:
        questions, given = read(predictions, references)
        na_probs = {row["id"]: row["no_answer_probability"] for row in predictions}
        scores = squad.score(questions, given, v2=True)
        best = squad.best_thresholds(scores, given, na_probs)
        return {**scores.with_no_answer(na_probs, no_answer_threshold).by_answer(), **best}
