"""Logits of an example's windows to answers with their characters.

The decoder `squad` is the rule of transformers' run_qa.py, in which published SQuAD scores are
made: in each window the n best starts and the n best ends are paired; a pair counts where both ends
are context, the end is not before the start, and the answer is at most `max_answer_length` tokens;
pairs of all windows compete by the sum of their two logits. Source:
examples/pytorch/question-answering/utils_qa.py of transformers 4.57.

It differs where run_qa leaves a result to chance or invents one: equal logits are ordered by
position; padding does not compete for the n best; and where no pair counts there is no answer,
instead of the text "empty".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flaxqa.features import Example, Feature
from flaxqa.predict import Logits

N_BEST = 20
MAX_ANSWER_LENGTH = 30  # tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the context that may answer the question.

    Attributes:
      text: `context[start:end]`, always.
      start: index of its first character, in code points.
      end: index after its last character.
      score: in [0, 1], the probability of its start times that of its end. Each is a softmax over
        the context tokens and `[CLS]` of all windows of the example together, so scores of
        different windows compare. With one window this is the score of transformers' pipeline.
      probability: in [0, 1], the softmax of the logit sums over the answers that are returned with
        it, as in run_qa's nbest_predictions.json.
      start_logit: of its first token; `start_logit + end_logit` orders the answers.
      end_logit: of its last token.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float
    start_logit: float
    end_logit: float


def non_finite(features: Sequence[Feature], logits: Sequence[Logits]) -> set[int]:
    """The examples with a logit that is NaN or infinite, for which no answer can be chosen."""
    return {
        feature.example
        for feature, scores in zip(features, logits, strict=True)
        if not (np.isfinite(scores.start).all() and np.isfinite(scores.end).all())
    }


def decode_squad(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[list[Answer]]:
    """For every example its best answers, best first: at most `n_best`, none if nothing counts.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      n_best: starts and ends tried in each window, and answers kept of each example.
      max_answer_length: in tokens.

    Raises:
      ValueError: a logit is not finite (see `non_finite`), or a number is below 1.
    """
    if n_best < 1 or max_answer_length < 1:
        raise ValueError(f"n_best {n_best} and max_answer_length {max_answer_length} must be >= 1")
    if bad := sorted(non_finite(features, logits)):
        raise ValueError(f"logits are not finite for {[examples[index].id for index in bad]}")
    answers: list[list[Answer]] = [[] for _ in examples]
    if not features:
        return answers
    start = padded([scores.start for scores in logits])
    end = padded([scores.end for scores in logits])
    example = np.array([feature.example for feature in features])
    context_start = np.array([feature.context_start for feature in features])
    context_length = np.array([len(feature.offsets) for feature in features])
    log_start = log_normalizer(start, example, context_start, context_length, len(examples))
    log_end = log_normalizer(end, example, context_start, context_length, len(examples))

    # Pairs [windows, n starts, n ends] of token positions, those that do not count at -inf.
    first, last = best(start, n_best), best(end, n_best)
    first_logit = np.take_along_axis(start, first, 1)
    last_logit = np.take_along_axis(end, last, 1)
    i, j = first[:, :, None], last[:, None, :]
    begin, stop = (
        column[:, None, None] for column in (context_start, context_start + context_length)
    )
    counts = (begin <= i) & (j < stop) & (i <= j) & (j - i < max_answer_length)
    sums = np.where(counts, first_logit[:, :, None] + last_logit[:, None, :], -np.inf)
    sums = sums.reshape(len(features), -1)

    # The best pairs of each window, then of each example.
    pair = best(sums, n_best)
    window = np.broadcast_to(np.arange(len(features))[:, None], pair.shape).reshape(-1)
    total = np.take_along_axis(sums, pair, 1).reshape(-1)
    pair = pair.reshape(-1)
    kept = np.flatnonzero(total > -np.inf)
    kept = kept[np.lexsort((-total[kept], example[window[kept]]))]
    owner = example[window[kept]]
    rank = np.arange(len(kept)) - np.searchsorted(owner, owner)
    kept, owner = kept[rank < n_best], owner[rank < n_best]

    window, total, pair = window[kept], total[kept], pair[kept]
    i = first[window, pair // last.shape[1]]
    j = last[window, pair % last.shape[1]]
    i_logit, j_logit = start[window, i], end[window, j]
    score = np.exp(i_logit.astype(np.float64) - log_start[owner] + j_logit - log_end[owner])
    exponential = np.exp(total.astype(np.float64) - highest(total, owner))
    probability = exponential / np.bincount(owner, exponential, len(examples))[owner]
    bases = np.cumsum(context_length) - context_length
    offsets = np.concatenate([feature.offsets for feature in features])
    at = bases[window] - context_start[window]
    columns = (
        owner,
        offsets[at + i, 0],
        offsets[at + j, 1],
        score,
        probability,
        i_logit,
        j_logit,
    )
    for index, char_start, char_end, *numbers in zip(*map(np.ndarray.tolist, columns), strict=True):
        text = examples[index].context[char_start:char_end]
        answers[index].append(Answer(text, char_start, char_end, *numbers))
    return answers


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[rows, longest], the shorter ones filled up with -inf."""
    table = np.full((len(rows), max(map(len, rows))), -np.inf, rows[0].dtype)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Columns [rows, n] of the n highest values of each row, highest first, ties in order."""
    n = min(n, scores.shape[1])
    columns = np.sort(np.argpartition(scores, scores.shape[1] - n, axis=1)[:, -n:], axis=1)
    values = np.take_along_axis(scores, columns, 1)
    return np.take_along_axis(columns, np.argsort(-values, axis=1, kind="stable"), 1)


def highest(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """For each value the highest one of the same owner; owners are sorted."""
    if not len(values):
        return values
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=len(values)))


def log_normalizer(
    logits: np.ndarray,
    example: np.ndarray,
    context_start: np.ndarray,
    context_length: np.ndarray,
    n_examples: int,
) -> np.ndarray:
    """Of each example the log of the summed exponentials over its context tokens and [CLS]s."""
    column = np.arange(logits.shape[1])
    after = column - context_start[:, None]
    inside = ((after >= 0) & (after < context_length[:, None])) | (column == 0)
    masked = np.where(inside, logits.astype(np.float64), -np.inf)
    peak = np.full(n_examples, -np.inf)
    np.maximum.at(peak, example, masked.max(axis=1))
    sums = np.bincount(
        example, np.exp(masked - peak[example, None]).sum(axis=1), minlength=n_examples
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # an example without windows
        return peak + np.log(sums)
