"""Logits of an example's windows to answers with their characters.

Three rules, by name:

- `spans`, the reader's: of all spans of at most `max_answer_length` tokens in all windows, those
  with the highest sum of start and end logit; searched completely, so more answers never change
  the first ones. Spans are widened to whole words, and one that shares a character with a better
  answer is left out, unless told otherwise.
- `squad`, the evaluation's: run_qa.py's, in which published SQuAD scores are made. In each window
  the n best starts and the n best ends are paired; a pair counts where both ends are context, the
  end is not before the start, and the answer is at most `max_answer_length` tokens; pairs of all
  windows compete by the sum of their two logits. Source:
  examples/pytorch/question-answering/utils_qa.py of transformers 4.57. It differs where run_qa
  leaves a result to chance or invents one: equal logits are ordered by position; padding does not
  compete for the n best; and where no pair counts there is no answer, instead of the text "empty".
- `pipeline`, for those who come from transformers' question-answering pipeline: see
  `decode_pipeline`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
        the context tokens and `[CLS]` of all windows of the example together (of all contexts, from
        `Reader.search`), so scores of different windows compare, and those of different spans sum
        to at most 1. With one window this is the score of transformers' pipeline.
      start_logit: of its first token; `start_logit + end_logit` orders the answers.
      end_logit: of its last token.
      context: which of several contexts it is from, counted from 0.
    """

    text: str
    start: int
    end: int
    score: float
    start_logit: float
    end_logit: float
    context: int = 0


class Answers(list[Answer]):
    """The answers to one example, best first: a list, with what belongs to all of them.

    Attributes:
      null_odds: how far the logits of `[CLS]`, "no answer", are above those of the best span: the
        lowest sum of its start and end logit in any window, minus the best span's sum. run_qa's
        `score_diff`; infinite where there is no span. Means something for models trained on
        questions without answers, as those of SQuAD 2.0.
      null_logit: the lowest sum of the start and end logit of `[CLS]` in any window.
      log_normalizers: of the start and of the end softmax behind `Answer.score`.
      n_windows: how many windows the context was cut into.
      question_cut: whether the question was too long and lost its end.
      record: what was asked, as it came, other fields included.
      error: why nothing could be answered, or None.
    """

    null_odds: float = math.inf
    null_logit: float = math.inf
    log_normalizers: tuple[float, float] = (-math.inf, -math.inf)
    n_windows: int = 0
    question_cut: bool = False
    record: Any = None
    error: str | None = None

    def copy(self) -> Answers:
        """The same answers with all that belongs to them."""
        return copy.copy(self)

    def __repr__(self) -> str:
        error = "" if self.error is None else f", error={self.error!r}"
        return f"Answers({super().__repr__()}{error})"

    @property
    def no_answer_score(self) -> float:
        """In [0, 1], the probability of "no answer" against the best span: sigmoid(null_odds)."""
        return 0.5 * (1.0 + math.tanh(0.5 * self.null_odds))


def non_finite(features: Sequence[Feature], logits: Sequence[Logits]) -> set[int]:
    """The examples with a logit that is NaN or infinite, for which no answer can be chosen."""
    if (
        not logits
        or np.isfinite(
            np.concatenate([scores for one in logits for scores in (one.start, one.end)])
        ).all()
    ):
        return set()
    return {
        feature.example
        for feature, scores in zip(features, logits, strict=True)
        if not (np.isfinite(scores.start).all() and np.isfinite(scores.end).all())
    }


class Table:
    """The logits of many windows side by side, W windows by T tokens, for `spans` and `squad`.

    Attributes:
      start: [W, T], -inf past a window's end.
      end: [W, T].
      example: int [W], never falls.
      begin: int [W], the column of the first context token.
      stop: int [W], the column after the last one.
      may_end: bool [W, T], the context tokens.
      may_start: bool [W, T], those of them that may begin an answer (see `Feature.counts`).
    """

    def __init__(
        self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Logits]
    ):
        if bad := sorted(non_finite(features, logits)):
            raise ValueError(f"logits are not finite for {[examples[index].id for index in bad]}")
        self.examples, self.features = examples, features
        self.start = padded([scores.start for scores in logits])
        self.end = padded([scores.end for scores in logits])
        self.example = np.array([feature.example for feature in features])
        self.begin = np.array([feature.context_start for feature in features])
        length = np.array([feature.part.stop - feature.part.start for feature in features])
        self.stop = self.begin + length
        column = np.arange(self.start.shape[1])
        self.may_end = (column >= self.begin[:, None]) & (column < self.stop[:, None])
        self.may_start = self.may_end.copy()
        for row, feature in enumerate(features):
            if feature.counts is not None:
                self.may_start[row, self.may_end[row]] = feature.counts
        self.log_start = self.log_normalizer(self.start)
        self.log_end = self.log_normalizer(self.end)

    def log_normalizer(self, logits: np.ndarray) -> np.ndarray:
        """Of each example the log of the summed exponentials over its context tokens and [CLS]s."""
        masked = np.where(self.may_end, logits.astype(np.float64), -np.inf)
        masked[:, 0] = logits[:, 0]
        peak = np.full(len(self.examples), -np.inf)
        np.maximum.at(peak, self.example, masked.max(axis=1))
        exponentials = np.exp(masked - peak[self.example, None]).sum(axis=1)
        sums = np.bincount(self.example, exponentials, minlength=len(self.examples))
        with np.errstate(divide="ignore", invalid="ignore"):  # an example without windows
            return peak + np.log(sums)

    def null(self) -> np.ndarray:
        """Of each example the lowest sum of the two logits of [CLS] in any of its windows."""
        lowest = np.full(len(self.examples), np.inf)
        np.minimum.at(lowest, self.example, self.start[:, 0].astype(float) + self.end[:, 0])
        return lowest

    def candidates(self, sums: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each example its n highest sums, best first: (example, window, pair), each [A].

        Args:
          sums: [W, pairs], -inf for a pair that does not count.
          n: the most of one example.
        """
        pair = best(sums, n)
        total = np.take_along_axis(sums, pair, 1).reshape(-1)
        window = np.broadcast_to(np.arange(len(pair))[:, None], pair.shape).reshape(-1)
        pair = pair.reshape(-1)
        kept = np.flatnonzero(total > -np.inf)
        kept = kept[np.lexsort((-total[kept], self.example[window[kept]]))]
        owner = self.example[window[kept]]
        rank = np.arange(len(kept)) - np.searchsorted(owner, owner)
        kept, owner = kept[rank < n], owner[rank < n]
        return owner, window[kept], pair[kept]

    def answers(
        self, owner: np.ndarray, window: np.ndarray, i: np.ndarray, j: np.ndarray, words: bool
    ) -> Iterator[tuple[int, Answer]]:
        """Spans of the columns i to j [A] as (example, answer), in their order.

        With `words` each is widened to whole words of the context.
        """
        i_logit, j_logit = self.start[window, i], self.end[window, j]
        score = np.exp(
            i_logit.astype(np.float64) - self.log_start[owner] + j_logit - self.log_end[owner]
        )
        columns = (owner, window, i - self.begin[window], j - self.begin[window], score)
        rows = zip(*(column.tolist() for column in (*columns, i_logit, j_logit)), strict=True)
        for index, at, first, last, *numbers in rows:
            feature = self.features[at]
            context, base = feature.context, feature.part.start
            first, last = base + first, base + last
            if words:
                first, last = whole_words(context.words, first, last)
            begin, end = int(context.offsets[first, 0]), int(context.offsets[last, 1])
            yield index, Answer(self.examples[index].context[begin:end], begin, end, *numbers)

    def collected(self, answers: Iterable[tuple[int, Answer]]) -> list[Answers]:
        """The answers of each example, its best first, with what belongs to all of them."""
        found = [Answers() for _ in self.examples]
        for index, answer in answers:
            found[index].append(answer)
        columns = (self.null(), self.log_start, self.log_end)
        rows = zip(found, *(column.tolist() for column in columns), strict=True)
        for one, null, log_start, log_end in rows:
            one.null_logit, one.log_normalizers = null, (log_start, log_end)
            if one:
                one.null_odds = null - one[0].start_logit - one[0].end_logit
        return found


def whole_words(words: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The first and the last token of the words that two tokens belong to.

    Args:
      words: int [C], the word of each token, as in `Tokens`.
      first: a token.
      last: another, not before it.
    """
    while first and words[first - 1] == words[first]:
        first -= 1
    while last + 1 < len(words) and words[last + 1] == words[last]:
        last += 1
    return first, last


def decode_spans(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    top_k: int = 1,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    align_to_words: bool = True,
    overlapping: bool = False,
) -> list[Answers]:
    """For every example its `top_k` best spans, best first; fewer if it has no more.

    The answers to a smaller `top_k` are the first of those to a larger one.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      top_k: how many answers of each example.
      max_answer_length: in tokens, before the answer is widened to words.
      align_to_words: whether an answer is widened to whole words.
      overlapping: whether an answer may share characters with a better one.

    Raises:
      ValueError: a logit is not finite (see `non_finite`), or a number is below 1.
    """
    if top_k < 1 or max_answer_length < 1:
        raise ValueError(f"top_k {top_k} and max_answer_length {max_answer_length} must be >= 1")
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits)
    start = np.where(table.may_start, table.start, -np.inf)
    end = np.where(table.may_end, table.end, -np.inf)
    max_answer_length = min(max_answer_length, start.shape[1])
    if overlapping:
        return overlapping_spans(table, start, end, top_k, max_answer_length, align_to_words)
    found = table.collected(spans(table, start, end, 1, max_answer_length, align_to_words))
    # Once a span is taken, the next best is searched among those without any of its tokens.
    taken = np.zeros(start.shape, np.bool_)
    active = np.arange(len(features))
    for rank in range(1, top_k):
        active = np.array([row for row in active if len(found[table.example[row]]) == rank], int)
        if not len(active):
            break
        for row in active.tolist():
            last = found[table.example[row]][-1]
            offsets = features[row].offsets
            # A token without characters, as a normalizer may leave, is taken with its place.
            width = np.maximum(offsets[:, 1] - offsets[:, 0], 1)
            covered = (offsets[:, 0] < last.end) & (offsets[:, 0] + width > last.start)
            taken[row, table.begin[row] : table.stop[row]] |= covered
        i, j, total = free_spans(start[active], end[active], taken[active], max_answer_length)
        order = np.lexsort((-total, table.example[active]))
        order = order[total[order] > -np.inf]
        owner, first = np.unique(table.example[active[order]], return_index=True)
        chosen = order[first]
        spans_found = owner, active[chosen], i[chosen], j[chosen]
        for index, answer in table.answers(*spans_found, align_to_words):
            found[index].append(answer)
    return found


def spans(
    table: Table,
    start: np.ndarray,
    end: np.ndarray,
    n: int,
    max_answer_length: int,
    align_to_words: bool,
) -> Iterator[tuple[int, Answer]]:
    """The n highest spans of each example, equal sums ordered by window and position."""
    # The best sum that begins at each column. A span among the n best begins in one of the n best
    # of these, so only those starts are paired with every end.
    first = np.sort(best(start + highest_ahead(end, max_answer_length), n), axis=1)
    last = first[:, :, None] + np.arange(max_answer_length)
    pairs = np.take_along_axis(start, first, 1)[:, :, None] + np.where(
        last < end.shape[1],
        np.take_along_axis(end[:, None], np.minimum(last, end.shape[1] - 1), 2),
        -np.inf,
    )
    owner, window, pair = table.candidates(pairs.reshape(len(pairs), -1), n)
    i = first[window, pair // max_answer_length]
    return table.answers(owner, window, i, i + pair % max_answer_length, align_to_words)


def overlapping_spans(
    table: Table,
    start: np.ndarray,
    end: np.ndarray,
    top_k: int,
    max_answer_length: int,
    align_to_words: bool,
) -> list[Answers]:
    """The `top_k` highest spans of each example, each place once."""
    n = 2 * top_k + 8
    while True:  # windows share tokens, and words have several: places come more than once
        candidates = table.collected(spans(table, start, end, n, max_answer_length, align_to_words))
        short = False
        for one in candidates:
            places = {(answer.start, answer.end): answer for answer in reversed(one)}
            short |= len(places) < top_k and len(one) == n
            kept = [answer for answer in one if places[answer.start, answer.end] is answer]
            one[:] = kept[:top_k]
        if not short:
            return candidates
        n *= 4


def free_spans(
    start: np.ndarray, end: np.ndarray, taken: np.ndarray, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the columns i and j [W] of the best span without a taken token, and its sum."""
    width = start.shape[1]
    free = ~taken
    total, length = np.full(start.shape, -np.inf), np.zeros(start.shape, int)
    for more in range(min(max_answer_length, width)):
        # free[:, i]: whether none of the tokens from i to i + more is taken
        free = free[:, : width - more] & ~taken[:, more:]
        sums = np.where(free, start[:, : width - more] + end[:, more:], -np.inf)
        better = sums > total[:, : width - more]
        total[:, : width - more][better] = sums[better]
        length[:, : width - more][better] = more
    i = total.argmax(axis=1)
    row = np.arange(len(total))
    return i, i + length[row, i], total[row, i]


def highest_ahead(values: np.ndarray, width: int) -> np.ndarray:
    """[W, T], the highest of each value and the `width` - 1 that follow it."""
    highest, reach = values, 1
    while reach < min(width, values.shape[1]):
        step = min(reach, width - reach)
        shifted = np.full_like(highest, -np.inf)
        shifted[:, :-step] = highest[:, step:]
        highest, reach = np.maximum(highest, shifted), reach + step
    return highest


def decode_squad(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Answers]:
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
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits)
    # Pairs [W, n starts, n ends] of columns, those that do not count at -inf.
    first, last = best(table.start, n_best), best(table.end, n_best)
    i, j = first[:, :, None], last[:, None, :]
    begins = np.take_along_axis(table.may_start, first, 1)[:, :, None]
    ends = np.take_along_axis(table.may_end, last, 1)[:, None, :]
    counts = begins & ends & (i <= j) & (j - i < max_answer_length)
    first_logit = np.take_along_axis(table.start, first, 1)
    last_logit = np.take_along_axis(table.end, last, 1)
    sums = np.where(counts, first_logit[:, :, None] + last_logit[:, None, :], -np.inf)
    owner, window, pair = table.candidates(sums.reshape(len(features), -1), n_best)
    i = first[window, pair // last.shape[1]]
    j = last[window, pair % last.shape[1]]
    return table.collected(table.answers(owner, window, i, j, words=False))


def probabilities(answers: Sequence[Answer]) -> list[float]:
    """The softmax of their logit sums, as run_qa's nbest_predictions.json has it."""
    sums = [answer.start_logit + answer.end_logit for answer in answers]
    highest = max(sums, default=0.0)
    exponentials = [math.exp(value - highest) for value in sums]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def decode_pipeline(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    top_k: int = 1,
    max_answer_length: int = 15,
    align_to_words: bool = True,
    handle_impossible_answer: bool = False,
) -> list[list[dict[str, Any]]]:
    """For every example what transformers 4.57's question-answering pipeline answered.

    Each window by itself: start and end are softmaxes over its context tokens and `[CLS]`; a span's
    score is the product of the two; the best `2 * top_k + 10` spans (`top_k` without alignment) are
    widened to words as far as the window shows them. Then over the windows: answers of one text,
    upper and lower case alike, become the first of them with the sum of their scores, which
    can therefore exceed 1. "No answer" has the lowest product that `[CLS]` has in any window.
    Source: src/transformers/pipelines/question_answering.py of transformers 4.57.6. Spans of equal
    scores are taken in the order in which numpy's partition leaves them, as there.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      top_k: how many answers of each example, at most.
      max_answer_length: in tokens.
      align_to_words: whether an answer is widened to whole words.
      handle_impossible_answer: whether "no answer", the text "", competes.

    Returns:
      For each example dicts of `score`, `start`, `end`, `answer`, best first.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in examples]
    least = [1e6] * len(examples)
    for feature, scores in zip(features, logits, strict=True):
        index = feature.example
        stop = feature.context_start + feature.part.stop - feature.part.start
        inside = np.zeros(len(feature), np.bool_)
        inside[0] = inside[feature.context_start : stop] = True
        # [CLS] is in the softmax, and so is a "[CLS]" that the question spells.
        weighed = inside | (feature.input_ids == feature.input_ids[0])
        start, end = window_softmax(scores.start, weighed), window_softmax(scores.end, weighed)
        least[index] = min(least[index], float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        wanted = 2 * top_k + 10 if align_to_words else top_k
        firsts, lasts, products = window_spans(start, end, inside, wanted, max_answer_length)
        for first, last, product in zip(firsts, lasts, products, strict=True):
            begin, finish = characters(feature, int(first), int(last), align_to_words)
            text = examples[index].context[begin:finish]
            same = (one for one in found[index] if one["answer"].lower() == text.lower())
            if (one := next(same, None)) is not None:
                one["score"] += float(product)
            else:
                found[index].append(
                    {"score": float(product), "start": begin, "end": finish, "answer": text}
                )
    for index, answers in enumerate(found):
        if handle_impossible_answer:
            answers.append({"score": least[index], "start": 0, "end": 0, "answer": ""})
        answers.sort(key=lambda answer: -answer["score"])
        del answers[top_k:]
    return found


def window_softmax(logits: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[T] in the logits' own dtype, what is not inside as good as 0."""
    masked = np.where(inside, logits, logits.dtype.type(-10_000.0))
    exponentials = np.exp(masked - masked.max())
    return exponentials / exponentials.sum()


def window_spans(
    start: np.ndarray, end: np.ndarray, inside: np.ndarray, n: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first and last tokens [A] of the n best spans of a window, and their products [A].

    Spans that touch a token which is not inside are dropped after the choice, as in the source.
    """
    reach = min(max_answer_length, len(start))
    products = np.tril(np.triu(start[:, None] * end[None, :]), reach - 1)
    flat = products.reshape(-1)
    if n == 1:
        order = np.array([np.argmax(flat)])
    elif len(flat) <= n:
        order = np.argsort(-flat)
    else:
        chosen = np.argpartition(-flat, n)[:n]
        order = chosen[np.argsort(-flat[chosen])]
    first, last = np.unravel_index(order, products.shape)
    kept = inside[first] & inside[last]
    return first[kept], last[kept], products[first[kept], last[kept]]


def characters(feature: Feature, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where a span of a window's tokens lies in the context: (0, 0) begins at `[CLS]`."""
    i, j = first - feature.context_start, last - feature.context_start
    if align_to_words and i >= 0 and j >= 0:
        i, j = whole_words(feature.words, i, j)
    return (
        int(feature.offsets[i, 0]) if i >= 0 else 0,
        int(feature.offsets[j, 1]) if j >= 0 else 0,
    )


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[rows, longest], the shorter ones filled up with -inf."""
    table = np.full((len(rows), max(map(len, rows))), -np.inf, rows[0].dtype)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Columns [rows, n] of the n highest values of each row, highest first, ties in order."""
    n = min(n, scores.shape[1])
    if n == 1:
        return scores.argmax(axis=1)[:, None]
    columns = np.sort(np.argpartition(scores, scores.shape[1] - n, axis=1)[:, -n:], axis=1)
    lowest = np.take_along_axis(scores, columns, 1).min(axis=1, keepdims=True)
    # A partition takes any of several equal values: of those at the border take the first.
    higher, equal = scores > lowest, scores == lowest
    wanted = n - higher.sum(axis=1, keepdims=True)
    tied = np.flatnonzero(equal.sum(axis=1) > wanted[:, 0])
    chosen = higher[tied] | (equal[tied] & (equal[tied].cumsum(axis=1) <= wanted[tied]))
    columns[tied] = np.nonzero(chosen)[1].reshape(len(tied), n)
    values = np.take_along_axis(scores, columns, 1)
    return np.take_along_axis(columns, np.argsort(-values, axis=1, kind="stable"), 1)
