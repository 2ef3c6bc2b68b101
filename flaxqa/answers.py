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
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flaxqa.features import Example, Feature, Windows
from flaxqa.spans import WINDOWS_AT_ONCE, Found, Logits, Pairs, Rule, Scores, Spans

N_BEST = 20
MAX_ANSWER_LENGTH = 30  # tokens
Rows = slice | np.ndarray  # of the windows of a table


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

    __slots__ = (
        "error", "log_normalizers", "n_windows", "null_logit", "null_odds", "question_cut",
        "record",
    )  # fmt: skip

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        super().__init__(answers)
        self.null_odds = self.null_logit = math.inf
        self.log_normalizers = (-math.inf, -math.inf)
        self.n_windows, self.question_cut = 0, False
        self.record: Any = None
        self.error: str | None = None

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


class NotFinite(ValueError):
    """Logits that are NaN or infinite, for which no answer can be chosen.

    Attributes:
      examples: that have them.
    """

    def __init__(self, examples: Sequence[int], names: Sequence[str]):
        super().__init__(f"logits are not finite for {list(names)}")
        self.examples = examples


class Table:
    """The windows of some examples with the best spans of each, for `spans` and `squad`.

    Attributes:
      windows: those W windows.
      scores: their logits.
      example: int [W], never falls.
      begin: int [W], the column of the first context token.
      stop: int [W], the column after the last one.
      found: the best spans of each window.
      null: float64 [examples], the lowest sum of the two logits of [CLS] in any window.
      log_start: float64 [examples], the log of the summed exponentials over the context tokens and
        [CLS]s.
      log_end: the same of the end logits.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        logits: Sequence[Logits],
        rule: Rule,
    ):
        """Asks for what devices have found already, or searches here.

        Raises:
          NotFinite: some logits are not.
        """
        self.examples, self.windows, self.scores = examples, Windows.of(features), Scores.of(logits)
        self.example, self.begin = self.windows.example, self.windows.context_start
        self.stop = self.windows.lengths - 1
        told = self.scores.told(rule)
        finite = self.scores.finite() if told is None else told[1].finite
        if not finite.all():
            bad = np.unique(self.example[~finite]).tolist()
            raise NotFinite(bad, [examples[index].id for index in bad])
        if told is None:
            start, end = self.scores.start, self.scores.end
            null = start[:, 0].astype(np.float64) + end[:, 0]
            self.log_start, self.log_end = self.log_normalizer(start), self.log_normalizer(end)
            self.found = self.search(rule)
        else:
            self.found, summary = told
            null = summary.null_start.astype(np.float64) + summary.null_end
            self.log_start, self.log_end = (
                self.joined(summary.log_start),
                self.joined(summary.log_end),
            )
        self.null = np.full(len(examples), np.inf)
        np.minimum.at(self.null, self.example, null)

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Rows]:
        """All windows, or some, not too many at a time, for the arrays of many are large."""
        for begin in range(0, len(self.windows) if rows is None else len(rows), WINDOWS_AT_ONCE):
            part = slice(begin, begin + WINDOWS_AT_ONCE)
            yield part if rows is None else rows[part]

    def may_end(self, rows: Rows) -> np.ndarray:
        """bool [rows, T], the context tokens."""
        column = np.arange(self.scores.start.shape[1])
        begin, stop = self.begin[rows, None], self.stop[rows, None]
        inside: np.ndarray = (column >= begin) & (column < stop)
        return inside

    def may_start(self, rows: Rows) -> np.ndarray:
        """bool [rows, T], the context tokens that may begin an answer (see `Feature.counts`)."""
        may_start = self.may_end(rows)
        for place, row in enumerate(np.arange(len(self.windows))[rows].tolist()):
            if (counts := self.windows.counts.get(row)) is not None:
                may_start[place, may_start[place]] = counts
        return may_start

    def start(self, rows: Rows) -> np.ndarray:
        """[rows, T], the start logits where an answer may begin, else -inf."""
        may = self.may_start(rows) if self.windows.counts else self.may_end(rows)
        return np.where(may, self.scores.start[rows], -np.inf)

    def end(self, rows: Rows) -> np.ndarray:
        """[rows, T], the end logits where an answer may end, else -inf."""
        return np.where(self.may_end(rows), self.scores.end[rows], -np.inf)

    def search(self, rule: Rule) -> Found:
        """The best spans of each window by a rule."""
        return joined(self.search_block(rule, rows) for rows in self.blocks())

    def search_block(self, rule: Rule, rows: Rows) -> Found:
        if isinstance(rule, Spans):
            return rule.find(self.start(rows), self.end(rows), np)
        start, end = self.scores.start[rows], self.scores.end[rows]
        return rule.find(start, end, self.may_start(rows), self.may_end(rows), np)

    def log_normalizer(self, logits: np.ndarray) -> np.ndarray:
        """Of each example the log of the summed exponentials over its context tokens and [CLS]s."""
        peak = np.full(len(self.examples), -np.inf)
        for rows in self.blocks():
            highest = logits[rows].max(axis=1, where=self.weighed(rows), initial=-np.inf)
            np.maximum.at(peak, self.example[rows], highest)
        sums = np.zeros(len(logits))
        for rows in self.blocks():
            # Nothing is computed of the rest, which is most of a table.
            weighed, part = self.weighed(rows), logits[rows]
            powers = np.zeros(part.shape)
            own = peak[self.example[rows], None]
            np.subtract(part, own, out=powers, where=weighed, dtype=np.float64)
            np.exp(powers, out=powers, where=weighed)
            sums[rows] = powers.sum(axis=1)
        return self.summed(sums, peak)

    def weighed(self, rows: Rows) -> np.ndarray:
        """bool [rows, T], the context tokens and [CLS]."""
        weighed = self.may_end(rows)
        weighed[:, 0] = True
        return weighed

    def joined(self, logs: np.ndarray) -> np.ndarray:
        """Of each example the same, from that of each window alone."""
        logs = logs.astype(np.float64)
        peak = np.full(len(self.examples), -np.inf)
        np.maximum.at(peak, self.example, logs)
        return self.summed(np.exp(logs - peak[self.example]), peak)

    def summed(self, exponentials: np.ndarray, peak: np.ndarray) -> np.ndarray:
        sums = np.bincount(self.example, exponentials, minlength=len(self.examples))
        with np.errstate(divide="ignore", invalid="ignore"):  # an example without windows
            return peak + np.log(sums)

    def answers(self, found: Found, n: int, words: bool) -> Iterator[tuple[int, Answer]]:
        """Of each example its n highest spans of all windows as (example, answer), best first.

        With `words` each is widened to whole words of the context.
        """
        total = (found.start + found.end).reshape(-1)
        kept = np.flatnonzero(total > -np.inf)
        owner = self.example[kept // found.first.shape[1]]
        order = np.lexsort((-total[kept], owner))
        kept, owner = kept[order], owner[order]
        chosen = kept[np.arange(len(kept)) - np.searchsorted(owner, owner) < n]
        window = chosen // found.first.shape[1]
        i, j, i_logit, j_logit = (each.reshape(-1)[chosen] for each in found)
        owner = self.example[window]
        score = np.exp(
            i_logit.astype(np.float64) - self.log_start[owner] + j_logit - self.log_end[owner]
        )
        base = self.windows.first[window] - self.begin[window]
        columns = (owner, window, i + base, j + base, score, i_logit, j_logit)
        contexts, examples = self.windows.contexts, self.examples
        for index, at, first, last, *numbers in zip(*(c.tolist() for c in columns), strict=True):
            begin, end = contexts[at].span(first, last, words)
            yield index, Answer(examples[index].context[begin:end], begin, end, *numbers)

    def collected(self, answers: Iterable[tuple[int, Answer]]) -> list[Answers]:
        """The answers of each example, its best first, with what belongs to all of them."""
        found = [Answers() for _ in self.examples]
        for index, answer in answers:
            found[index].append(answer)
        columns = (self.null, self.log_start, self.log_end)
        rows = zip(found, *(column.tolist() for column in columns), strict=True)
        for one, null, log_start, log_end in rows:
            one.null_logit, one.log_normalizers = null, (log_start, log_end)
            if one:
                one.null_odds = null - one[0].start_logit - one[0].end_logit
        return found


class Decoder:
    """One of the rules `spans` and `squad` with its options, to be called with what there is.

    Attributes:
      rule: by which devices can look for all that it needs of a window; None if it needs logits.
    """

    def __init__(self, name: str, **options: Any):
        """Takes the options of `decode_spans` or `decode_squad`."""
        decoders: dict[str, Callable[..., list[Answers]]] = {
            "spans": decode_spans,
            "squad": decode_squad,
        }
        self.decode = functools.partial(decoders[name], **options)
        longest = options.get("max_answer_length", MAX_ANSWER_LENGTH)
        self.rule: Rule | None = Spans(1, longest)
        if name == "squad":
            self.rule = Pairs(options.get("n_best", N_BEST), longest)
        elif options.get("top_k", 1) > 1 or options.get("overlapping", False):
            self.rule = None

    def __call__(
        self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Logits]
    ) -> list[Answers]:
        """See `decode_spans` and `decode_squad`."""
        return self.decode(examples, features, logits)


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
      NotFinite: a logit is not finite.
      ValueError: a number is below 1.
    """
    if top_k < 1 or max_answer_length < 1:
        raise ValueError(f"top_k {top_k} and max_answer_length {max_answer_length} must be >= 1")
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits, Spans(1, max_answer_length))
    if overlapping:
        return overlapping_spans(table, top_k, max_answer_length, align_to_words)
    found = table.collected(table.answers(table.found, 1, align_to_words))
    # Once a span is taken, the next best is searched among those without any of its tokens.
    taken = np.zeros((len(features), int(table.windows.lengths.max())), np.bool_)
    active = np.arange(len(features))
    for rank in range(1, top_k):
        active = np.array([row for row in active if len(found[table.example[row]]) == rank], int)
        if not len(active):
            break
        for row in active.tolist():
            last = found[table.example[row]][-1]
            offsets = table.windows[row].offsets
            # A token without characters, as a normalizer may leave, is taken with its place.
            width = np.maximum(offsets[:, 1] - offsets[:, 0], 1)
            covered = (offsets[:, 0] < last.end) & (offsets[:, 0] + width > last.start)
            taken[row, table.begin[row] : table.stop[row]] |= covered
        free = joined(
            free_spans(table.start(rows), table.end(rows), taken[rows], max_answer_length)
            for rows in table.blocks(active)
        )
        # Rows that are not asked any more have nothing.
        shape = (2, len(features), 1)
        next_best = Found(*np.zeros(shape, int), *np.full(shape, -np.inf))
        for whole, part in zip(next_best, free, strict=True):
            whole[active] = part
        for index, answer in table.answers(next_best, 1, align_to_words):
            found[index].append(answer)
    return found


def joined(parts: Iterable[Found]) -> Found:
    """What was found in blocks of windows, one after the other."""
    first, *others = parts
    if not others:
        return first
    return Found(*(np.concatenate(each) for each in zip(first, *others, strict=True)))


def overlapping_spans(
    table: Table, top_k: int, max_answer_length: int, align_to_words: bool
) -> list[Answers]:
    """The `top_k` highest spans of each example, each place once."""
    n = 2 * top_k + 8
    while True:  # windows share tokens, and words have several: places come more than once
        found = table.search(Spans(n, max_answer_length))
        candidates = table.collected(table.answers(found, n, align_to_words))
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
) -> Found:
    """Of each row the best span without a taken token."""
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
    row, i = np.arange(len(total)), total.argmax(axis=1)
    j = i + length[row, i]
    none = total[row, i] == -np.inf
    columns = (i, j, np.where(none, -np.inf, start[row, i]), end[row, j])
    return Found(*(each[:, None] for each in columns))


def decode_squad(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    top_k: int | None = None,
) -> list[Answers]:
    """For every example its best answers, best first: at most `top_k`, none if nothing counts.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      n_best: starts and ends tried in each window.
      max_answer_length: in tokens.
      top_k: answers kept of each example; None for `n_best`.

    Raises:
      NotFinite: a logit is not finite.
      ValueError: a number is below 1.
    """
    if n_best < 1 or max_answer_length < 1:
        raise ValueError(f"n_best {n_best} and max_answer_length {max_answer_length} must be >= 1")
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits, Pairs(n_best, max_answer_length))
    return table.collected(table.answers(table.found, top_k or n_best, words=False))


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


def whole_words(words: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The first and the last token of the words that two tokens belong to, in a window.

    Args:
      words: int32 [C], the word of each token, as in `Feature`.
      first: a token.
      last: another, not before it.
    """
    while first and words[first - 1] == words[first]:
        first -= 1
    while last + 1 < len(words) and words[last + 1] == words[last]:
        last += 1
    return first, last
