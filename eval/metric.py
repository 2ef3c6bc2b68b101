"""The same exact match and F1 as an `evaluate.Metric`, which needs no network.

    from eval.metric import Squad
    Squad().compute(predictions=[{"id": "1", "prediction_text": "Bob"}],
                    references=[{"id": "1", "answers": {"text": ["Bob"], "answer_start": [32]}}])

`evaluate.load("squad")` fetches its code from the hub; a subclass that is there already does not.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from eval import squad


class Squad(evaluate.Metric):
    """Exact match and F1 of SQuAD v1.1, in percent, from and to what `evaluate`'s `squad` takes.

    A reference without a prediction scores 0; a prediction without a reference is ignored.
    """

    def _info(self) -> evaluate.MetricInfo:
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        reference = {
            "id": datasets.Value("string"),
            "answers": datasets.features.Sequence(
                {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
            ),
        }
        return evaluate.MetricInfo(
            description="The official exact match and F1 of SQuAD v1.1.",
            citation="Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250",
            inputs_description="predictions: id, prediction_text; references: id, answers.",
            features=datasets.Features({"predictions": prediction, "references": reference}),
            codebase_urls=[],
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        given = {row["id"]: row["prediction_text"] for row in predictions}
        questions = [
            squad.SquadExample(row["id"], "", "", tuple(row["answers"]["text"]))
            for row in references
        ]
        scores = squad.score(questions, given)
        return {"exact_match": scores.exact_match, "f1": scores.f1}
