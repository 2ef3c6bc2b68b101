"""Whether scores can be trusted: how they go with what is right, and with having no answer.

Sources: expected calibration error and temperature of Guo et al. 2017,
https://arxiv.org/abs/1706.04599; risk and coverage of El-Yaniv and Wiener 2010, and Geifman and
El-Yaniv 2017, https://arxiv.org/abs/1705.08500.

Axes: Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxqa.answers import Answers, Decoder
from flaxqa.features import Example, Feature
from flaxqa.spans import Logits

from . import squad
from .mistakes import share

BINS = 10
RESAMPLES = 2_000  # of the error, and of the best threshold
TEMPERATURES = (0.05, 20.0)  # among which one is searched


class Bin(NamedTuple):
    """Answers of about one score.

    Attributes:
      low: of the scores; those of a bin are above it, those of the first also 0.
      high: which they are not above.
      questions: how many.
      score: their mean.
      right: share of them that is right, in [0, 1].
      interval: Wilson's of 95 %.
    """

    low: float
    high: float
    questions: int
    score: float
    right: float
    interval: tuple[float, float]


def bin_of(scores: np.ndarray) -> np.ndarray:
    """int [Q], which of BINS bins of equal width each score is in."""
    return np.clip(np.ceil(scores * BINS).astype(int) - 1, 0, BINS - 1)


def reliability(scores: np.ndarray, right: np.ndarray) -> list[Bin]:
    """The bins with any answer.

    Args:
      scores: [Q], in [0, 1].
      right: bool [Q].
    """
    owner, found = bin_of(scores), []
    for index in np.unique(owner).tolist():
        own = owner == index
        told = share(int(right[own].sum()), int(own.sum()))
        low, high = (end / 100.0 for end in told["interval"])
        found.append(
            Bin(index / BINS, (index + 1) / BINS, int(own.sum()), float(scores[own].mean()),
                told["share"] / 100.0, (low, high))
        )  # fmt: skip
    return found


def log_loss(logs: np.ndarray, right: np.ndarray) -> float:
    """The mean of -log(score) of right answers and -log(1 - score) of wrong ones, in nats.

    Args:
      logs: [Q], the logarithms of the scores.
      right: bool [Q].
    """
    logs = np.minimum(logs, -1e-12)  # a score of 1 that is wrong does not cost everything
    return float(-np.where(right, logs, np.log(-np.expm1(logs))).mean())


def error(scores: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error, in [0, 1]: how far a bin's mean score is from its share.

    The mean of that over all answers.
    """
    apart = np.bincount(bin_of(scores), right - scores, BINS)
    return float(np.abs(apart).sum() / len(scores))


def error_interval(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Its 95 % bootstrap interval, by percentiles.

    Chance alone moves bins apart, so that resamples have larger errors; the interval is widened to
    the error where it misses it.
    """
    rng, owner, apart = np.random.default_rng(squad.SEED), bin_of(scores), right - scores
    every, value, errors = len(scores), error(scores, right), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, every, every)
        sums = np.bincount(owner[drawn], apart[drawn], BINS)
        errors.append(float(np.abs(sums).sum() / every))
    low, high = np.percentile(errors, (2.5, 97.5)).tolist()
    return min(low, value), max(high, value)


class Curve(NamedTuple):
    """What is right if only the answers of the highest scores are given, at each different score.

    Attributes:
      threshold: float [N], falls: answers of at least this score are given.
      coverage: float [N], the share of questions that have one.
      risk: float [N], the share of those answers that is wrong.
    """

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray

    @property
    def area(self) -> float:
        """The mean risk over all coverages, in [0, 1]: AURC; lower is better."""
        widths = np.diff(self.coverage, prepend=0.0)
        return float((self.risk * widths).sum() / self.coverage[-1])


def risk_coverage(scores: np.ndarray, right: np.ndarray, questions: int | None = None) -> Curve:
    """The curve of some answers.

    Args:
      scores: [Q] of the answers.
      right: bool [Q].
      questions: of which coverage is a share; Q when left out.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, n = scores[order], np.arange(1, len(scores) + 1)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    wrong = np.cumsum(~right[order].astype(bool))[last]
    return Curve(ranked[last], n[last] / (questions or len(scores)), wrong / n[last])


def for_precision(curve: Curve, precision: float) -> dict[str, Any] | None:
    """The lowest score from which on so large a share is right; None if there is none."""
    fine = np.flatnonzero(1.0 - curve.risk >= precision)
    if not len(fine):
        return None
    at = int(fine[-1])
    return {
        "wanted": precision, "score": float(curve.threshold[at]),
        "coverage": float(curve.coverage[at]), "precision": float(1.0 - curve.risk[at]),
    }  # fmt: skip


def told(
    scores: squad.Scores,
    given: np.ndarray,
    score: np.ndarray,
    null_odds: np.ndarray | None,
    precision: float | None = None,
) -> dict[str, Any]:
    """What `metrics.json` says of it.

    Args:
      scores: of Q questions.
      given: bool [Q], whether an answer was given, which are those that are looked at.
      score: [Q], of the answers.
      null_odds: [Q], NaN of questions that were set aside; None in v1.1.
      precision: see `for_precision`.
    """
    right = scores.values["exact_match"].astype(bool)
    found: dict[str, Any] = {"answers": int(given.sum())}
    if given.any():
        own, truth = score[given], right[given]
        curve = risk_coverage(own, truth, len(given))
        found |= {
            "mean_score": float(own.mean()), "right": float(truth.mean()),
            "log_loss": log_loss(np.log(np.maximum(own, np.finfo(float).tiny)), truth),
            "ece": error(own, truth), "ece_interval": error_interval(own, truth),
            "aurc": curve.area, "bins": [each._asdict() for each in reliability(own, truth)],
        }  # fmt: skip
        if precision is not None:
            found["for_precision"] = for_precision(curve, precision)
    if null_odds is not None:
        asked = ~np.isnan(null_odds)
        if (ranked := ranking(null_odds[asked], ~scores.has_answer[asked])) is not None:
            found["no_answer"] = {
                "roc_auc": ranked.roc_auc, "average_precision": ranked.average_precision,
            }  # fmt: skip
    return found


# --------------------------------------------------------------------------------------- no answer


class Ranking(NamedTuple):
    """How questions without an answer are told from the others by a number, at each of its values.

    Attributes:
      threshold: float [N], falls; a question of at least this number counts as unanswerable.
      false_positives: float [N], the share of questions with an answer that count so.
      recall: float [N], the share of questions without one that do.
      precision: float [N], the share of those that count so which have none.
    """

    threshold: np.ndarray
    false_positives: np.ndarray
    recall: np.ndarray
    precision: np.ndarray

    @property
    def roc_auc(self) -> float:
        """The area below recall over false positives, straight lines between the points."""
        x, y = np.append(0.0, self.false_positives), np.append(0.0, self.recall)
        return float((np.diff(x) * (y[1:] + y[:-1]) / 2.0).sum())

    @property
    def average_precision(self) -> float:
        """The precisions, each by how much recall it adds."""
        return float((np.diff(self.recall, prepend=0.0) * self.precision).sum())


def ranking(numbers: np.ndarray, no_answer: np.ndarray) -> Ranking | None:
    """ROC and precision-recall of "no answer"; None if not both kinds of questions are there.

    Args:
      numbers: [Q], higher where no answer is likelier: null odds.
      no_answer: bool [Q].
    """
    positive = int(no_answer.sum())
    if positive in (0, len(numbers)):
        return None
    order = np.argsort(-numbers, kind="stable")
    ranked, found = numbers[order], np.cumsum(no_answer[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    n, true = last + 1, found[last]
    return Ranking(ranked[last], (n - true) / (len(numbers) - positive), true / positive, true / n)


def best_threshold(
    gains: np.ndarray, numbers: np.ndarray, no_answer: np.ndarray
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the best score of SQuAD 2.0 and of the threshold that has it.

    As `squad.best_thresholds`: questions are answered from the lowest number on.

    Args:
      gains: [Q], what each adds to the score when it is answered: its score, or -1 where there is
        no answer and something is said.
      numbers: [Q], null odds.
      no_answer: bool [Q].
    """
    order = np.argsort(numbers, kind="stable")
    gains, numbers, base = gains[order], numbers[order], no_answer[order].astype(float)
    rng, every = np.random.default_rng(squad.SEED), len(gains)
    thresholds, scores = [], []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, every, every), minlength=every)
        sums = np.cumsum(times * gains)
        at = int(sums.argmax())
        thresholds.append(float(numbers[at]) if sums[at] > 0 else 0.0)
        scores.append(100.0 * (float((times * base).sum()) + max(float(sums[at]), 0.0)) / every)
    ends = [np.percentile(each, (2.5, 97.5)).tolist() for each in (scores, thresholds)]
    return {"score": (ends[0][0], ends[0][1]), "threshold": (ends[1][0], ends[1][1])}


# ------------------------------------------------------------------------------------- temperature


class Collector(Decoder):
    """A rule that keeps of each question what temperatures can be tried on.

    Attributes:
      tops: {id: start and end logit of the best answer, added}.
      tables: {id: the start and the end logits that its score is made of}.
    """

    def __init__(self, decoder: Decoder):
        self.decode, self.rule = decoder.decode, None
        self.tops: dict[str, float] = {}
        self.tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(
        self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Logits]
    ) -> list[Answers]:
        found = super().__call__(examples, features, logits)
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for feature, one in zip(features, logits, strict=True):
            weighed = [0, *range(feature.context_start, len(feature) - 1)]
            pair = one.start[weighed], one.end[weighed]
            parts.setdefault(feature.example, []).append(pair)
        for index, row in enumerate(found):
            if row:
                starts, ends = zip(*parts[index], strict=True)
                name = examples[index].id
                self.tables[name] = np.concatenate(starts), np.concatenate(ends)
                self.tops[name] = row[0].start_logit + row[0].end_logit
        return found

    def fit(self, right: dict[str, bool]) -> float:
        """The temperature with the highest likelihood of what is right, given the scores.

        That is the lowest mean of -log(score) of right answers and -log(1 - score) of wrong ones.

        Args:
          right: {id: whether the best answer is right}.
        """
        from scipy.optimize import minimize_scalar

        loss = self.loss_of(right)
        low, high = np.log(TEMPERATURES)
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
        return float(np.exp(found.x))

    def loss_of(self, right: dict[str, bool]) -> Callable[[float], float]:
        """The loss as a function of the temperature's logarithm."""
        names = [name for name in self.tops if name in right]
        tops = np.array([self.tops[name] for name in names])
        truth = np.array([right[name] for name in names])
        tables = []
        for side in (0, 1):
            rows = [self.tables[name][side] for name in names]
            begins = np.cumsum([0, *(len(row) for row in rows[:-1])])
            tables.append((np.concatenate(rows).astype(np.float64), begins))

        def loss(log_temperature: float) -> float:
            temperature = np.exp(log_temperature)
            logs = tops / temperature
            for values, begins in tables:
                logs = logs - log_sums(values / temperature, begins)
            return log_loss(logs, truth)

        return loss


def log_sums(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The log of the summed exponentials of each stretch of values."""
    peaks = np.maximum.reduceat(values, begins)
    sizes = np.diff(np.append(begins, len(values)))
    sums = np.add.reduceat(np.exp(values - np.repeat(peaks, sizes)), begins)
    return peaks + np.log(sums)
