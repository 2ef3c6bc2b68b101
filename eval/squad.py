"""The official metrics of SQuAD v1.1 and 2.0 with their quirks, per question.

Sources of the metrics: evaluate-v1.1.py of Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250,
and evaluate-v2.0.py of Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822. Their quirks are
kept, because published numbers have them: punctuation is deleted and not replaced by a space
("twenty-one" becomes "twentyone"), and only ASCII punctuation is. In v1.1 an empty prediction for
the answer "the" has an exact match of 1 and an F1 of 0; in 2.0 both are 1, and answers of which
nothing is left do not count beside others.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxqa import files
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems

from .questions import SquadExample

RESAMPLES = 10_000
SEED = 0


def read_predictions(path: str | Path) -> dict[str, str]:
    """A predictions file in the official form, {id: text}.

    Raises:
      DataError: it cannot be read or has another form; names every entry.
    """
    return read_object(path, "text", str)


def read_na_probs(path: str | Path) -> dict[str, float]:
    """A file of how likely each question has no answer, {id: number}; a higher number is likelier.

    Raises:
      DataError: it cannot be read or has another form; names every entry.
    """
    content = read_object(path, "number", (int, float))
    problems = []
    for key, value in content.items():
        try:
            content[key] = float(value)
        except OverflowError:
            content[key] = math.inf
        if not math.isfinite(content[key]):
            problems.append(f"{key!r} is {str(value)[:20]}, not a finite number")
    if problems:
        raise DataError(all_problems(f"{path} has not a number for each id", problems))
    return content


def read_object(path: str | Path, what: str, kinds: type | tuple[type, ...]) -> dict[str, Any]:
    try:
        content = json.loads(files.read_named(path))
    except TryAgain:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must be a JSON object of id to {what}")
    problems = [
        f"{example_id!r} is {type(value).__name__}, not a {what}"
        for example_id, value in content.items()
        if not isinstance(value, kinds) or isinstance(value, bool)
    ]
    if problems:
        raise DataError(all_problems(f"{path} has not a {what} for each id", problems))
    return content


# ---------------------------------------------------------------------------------------- metric


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an, the, single spaces."""
    text = text.lower().translate(NO_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, answer: str, *, v2: bool = False) -> bool:
    """Whether both are the same after `normalize_answer`; `v2` changes nothing."""
    return normalize_answer(prediction) == normalize_answer(answer)


def f1(prediction: str, answer: str, *, v2: bool = False) -> float:
    """The harmonic mean of precision and recall over words, in [0, 1], after `normalize_answer`.

    Where one of them has no words it is 0; in SQuAD 2.0 it is 1 if neither has.
    """
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if v2 and not (predicted and right):
        return float(predicted == right)
    shared = sum((collections.Counter(predicted) & collections.Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(right)
    return 2 * precision * recall / (precision + recall)


class Metric(NamedTuple):
    """A number for a prediction beside a right answer; a question's is that of its best answer.

    Attributes:
      label: its name in tables.
      official: its name in the results of SQuAD 2.0's script.
      of: the number, in [0, 1].
      kind: its type.
    """

    label: str
    official: str
    of: Callable[..., float]
    kind: type[Any]


METRICS = {
    "exact_match": Metric("EM", "exact", exact_match, np.bool_),
    "f1": Metric("F1", "f1", f1, np.float64),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The metrics of every question, each against its best answer.

    Attributes:
      ids: of the questions, in their order.
      values: by name in METRICS, of that metric's kind, [questions], in [0, 1].
      unanswered: the ids without a prediction; their scores are 0 and they count in the total.
      has_answer: bool [questions], whether it has a right answer; in v1.1 each has.
    """

    ids: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    unanswered: tuple[str, ...]
    has_answer: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        """Of each metric the mean over all questions, in percent."""
        return {name: self.mean(name, slice(None)) for name in self.values}

    def mean(self, name: str, chosen: Any) -> float:
        """Of a metric the mean over some questions, in percent."""
        # Added in the questions' order, as the official script does: the same last digit.
        values = self.values[name][chosen].tolist()
        return 100.0 * sum(values) / len(values)

    @property
    def exact_match(self) -> float:
        """In percent of all questions."""
        return self.means["exact_match"]

    @property
    def f1(self) -> float:
        """The mean over all questions, in percent."""
        return self.means["f1"]

    def by_answer(self) -> dict[str, float]:
        """The official numbers of SQuAD 2.0 under their names, of all questions and of each kind.

        A kind of which there is no question is left out.
        """
        kinds = {"": np.ones_like(self.has_answer), "HasAns_": self.has_answer,
                 "NoAns_": ~self.has_answer}  # fmt: skip
        found: dict[str, float] = {}
        for prefix, chosen in kinds.items():
            if n := int(chosen.sum()):
                for name in self.values:
                    found[prefix + METRICS[name].official] = self.mean(name, chosen)
                found[f"{prefix}total"] = n
        return found

    def with_no_answer(self, na_probs: Mapping[str, float], threshold: float) -> Scores:
        """The scores when every question whose number is above the threshold is left unanswered.

        One without a prediction stays at 0.
        """
        missing = set(self.unanswered)
        left = np.array(
            [na_probs.get(each, -np.inf) > threshold and each not in missing for each in self.ids]
        )
        values = {
            name: np.where(left, (~self.has_answer).astype(own.dtype), own)
            for name, own in self.values.items()
        }
        return dataclasses.replace(self, values=values)

    def intervals(
        self, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the `means`, in percent.

        Questions are resampled as if independent, although those of one article are not quite. A
        resample only matters by how often each distinct row of scores is in it, and these counts
        are multinomial: drawing them is the same bootstrap, hundreds of times as fast.
        """
        every = np.stack([*self.values.values()], axis=1)
        rows, counts = np.unique(every, axis=0, return_counts=True)
        total = len(self.ids)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(total, counts / total, size=resamples)
        means = 100.0 * (drawn @ rows) / total
        tail = 50.0 * (1.0 - confidence)
        low, high = np.percentile(means, (tail, 100.0 - tail), axis=0)
        return dict(zip(self.values, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def score(
    questions: Sequence[SquadExample], predictions: Mapping[str, str], *, v2: bool = False
) -> Scores:
    """Scores predictions as the official script does; ids that no question has are ignored.

    Args:
      questions: with their right answers.
      predictions: {id: text}; "" is right for a question without an answer.
      v2: whether by the rules of SQuAD 2.0.
    """
    values = {name: np.zeros(len(questions), metric.kind) for name, metric in METRICS.items()}
    unanswered = []
    for index, question in enumerate(questions):
        prediction = predictions.get(question.id)
        if prediction is None:
            unanswered.append(question.id)
            continue
        golds: Sequence[str] = question.answers
        if v2:
            golds = [gold for gold in golds if normalize_answer(gold)] or [""]
        for name, metric in METRICS.items():
            values[name][index] = max(metric.of(prediction, gold, v2=v2) for gold in golds)
    ids = tuple(question.id for question in questions)
    has_answer = np.array([bool(question.answers) for question in questions])
    return Scores(ids, values, tuple(unanswered), has_answer)


def difference_interval(own: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The mean difference of paired scores in percent, with its 95 % bootstrap interval.

    Args:
      own: [questions], in [0, 1].
      theirs: the same questions' others, which are subtracted.
    """
    apart = 100.0 * (own.astype(np.float64) - theirs)
    values, counts = np.unique(apart, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(apart), counts / len(apart), RESAMPLES)
    low, high = np.percentile(drawn @ values / len(apart), (2.5, 97.5))
    return {"difference": float(apart.mean()), "difference_interval": (float(low), float(high))}


def best_thresholds(
    scores: Scores, predictions: Mapping[str, str], na_probs: Mapping[str, float]
) -> dict[str, float]:
    """The highest exact match and F1 that leaving questions unanswered can give, and from where on.

    Questions are answered one after the other from the lowest number on; `best_exact_thresh` is the
    number of the last one that is answered when the score is highest, 0 if none is. As the official
    script's `find_best_thresh` does; questions without a prediction never count as right.

    Args:
      scores: of the predictions, none left unanswered for its number.
      predictions: {id: text}.
      na_probs: {id: number}, for every prediction.
    """
    row = {example_id: index for index, example_id in enumerate(scores.ids)}
    ranked = [each for each in sorted(na_probs, key=lambda each: na_probs[each]) if each in row]
    ranked = [each for each in ranked if each in predictions]
    found = {}
    for metric, values in scores.values.items():
        name = METRICS[metric].official
        current = best = float(sum(not scores.has_answer[row[each]] for each in ranked))
        threshold = 0.0
        for example_id in ranked:
            index = row[example_id]
            if scores.has_answer[index]:
                current += float(values[index])
            elif predictions[example_id]:
                current -= 1
            if current > best:
                best, threshold = current, na_probs[example_id]
        found[f"best_{name}"] = 100.0 * best / len(scores.ids)
        found[f"best_{name}_thresh"] = threshold
    return found
