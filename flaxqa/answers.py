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
  `flaxqa.pipeline_answers`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxqa import show
from flaxqa.config import MAX_ANSWER_LENGTH, AnswerOptions
from flaxqa.features import Example, Feature, Windows
from flaxqa.spans import WINDOWS_AT_ONCE, Found, Logits, Pairs, Rule, Scores, Spans

N_BEST = 20
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
        `Reader.search`), of logits that are divided by the temperature where one was asked for. So
        scores of different windows compare, and those of different spans sum to at most 1. With one
        window and no temperature this is the score of transformers' pipeline.
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

    def _repr_html_(self) -> str:
        return show.as_html(self)

    def kept(self, options: AnswerOptions) -> list[Answer]:
        """Those that `min_score` and `no_answer_threshold` leave."""
        threshold = options.no_answer_threshold
        if threshold is not None and self.no_answer_score > threshold:
            return []
        return [one for one in self if one.score >= options.min_score]

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
        self.temperature = rule.temperature
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
        """Of each example the log of the summed exponentials over its context tokens and [CLS]s.

        Each logit is divided by the temperature.
        """
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
            powers /= self.temperature
            np.exp(powers, out=powers, where=weighed)
            sums[rows] = powers.sum(axis=1)
        return self.summed(sums, peak / self.temperature)

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
        i_own, j_own = (each.astype(np.float64) / self.temperature for each in (i_logit, j_logit))
        score = np.exp(i_own - self.log_start[owner] + j_own - self.log_end[owner])
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
    """A rule of DECODERS with its options, to be called with what there is.

    Attributes:
      rule: by which devices can look for all that it needs of a window; None if it needs logits.
    """

    def __init__(self, name: str, **options: Any):
        """Takes the options of the rule's function."""
        kind = DECODERS[name]
        self.decode = functools.partial(kind.decode, **options)
        self.rule = kind.on_devices(**options)

    @classmethod
    def best(cls, name: str, n: int, **options: Any) -> Decoder:
        """A rule by name, for the n best answers, with the options that all rules have."""
        return cls(name, **{DECODERS[name].amount: n}, **options)

    @classmethod
    def of(cls, options: AnswerOptions) -> Decoder:
        """The rule `spans` as the options say; see also `Answers.kept`."""
        names = ("top_k", "max_answer_length", "align_to_words", "overlapping", "temperature")
        return cls("spans", **{name: getattr(options, name) for name in names})

    def __call__(
        self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Logits]
    ) -> list[Answers]:
        """The answers to each example; see `decode_spans` and `decode_squad`."""
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
    temperature: float = 1.0,
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
      temperature: divides the logits of the softmax behind scores.

    Raises:
      NotFinite: a logit is not finite.
      ValueError: a number is below 1.
    """
    if top_k < 1 or max_answer_length < 1:
        raise ValueError(f"top_k {top_k} and max_answer_length {max_answer_length} must be >= 1")
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits, Spans(1, max_answer_length, temperature))
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
            taken[row, table.begin[row] : table.stop[row]] |= covered(table.windows[row], last)
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


def covered(window: Feature, answer: Answer) -> np.ndarray:
    """bool [C], which of a window's context tokens share a character with an answer."""
    start = window.offsets[:, 0]
    # A token without characters, as a normalizer may leave, is taken with its place.
    width = np.maximum(window.offsets[:, 1] - start, 1)
    shared: np.ndarray = (start < answer.end) & (start + width > answer.start)
    return shared


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
    temperature: float = 1.0,
) -> list[Answers]:
    """For every example its best answers, best first: at most `top_k`, none if nothing counts.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      n_best: starts and ends tried in each window.
      max_answer_length: in tokens.
      top_k: answers kept of each example; None for `n_best`.
      temperature: divides the logits of the softmax behind scores.

    Raises:
      NotFinite: a logit is not finite.
      ValueError: a number is below 1.
    """
    if n_best < 1 or max_answer_length < 1:
        raise ValueError(f"n_best {n_best} and max_answer_length {max_answer_length} must be >= 1")
    if not features:
        return [Answers() for _ in examples]
    table = Table(examples, features, logits, Pairs(n_best, max_answer_length, temperature))
    return table.collected(table.answers(table.found, top_k or n_best, words=False))


class Decoding(NamedTuple):
    """One way to choose answers.

    Attributes:
      decode: examples, features, logits and options to answers.
      amount: what its option for the number of answers is called.
      on_devices: its options to the rule by which devices can look for all that it needs of a
        window, None if it needs logits.
    """

    decode: Callable[..., list[Answers]]
    amount: str
    on_devices: Callable[..., Rule | None]


def spans_on_devices(
    top_k: int = 1,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    overlapping: bool = False,
    align_to_words: bool = True,
    temperature: float = 1.0,
) -> Rule | None:
    return None if top_k > 1 or overlapping else Spans(1, max_answer_length, temperature)


def squad_on_devices(
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Rule:
    return Pairs(n_best, max_answer_length, temperature)


DECODERS = {
    "spans": Decoding(decode_spans, "top_k", spans_on_devices),
    "squad": Decoding(decode_squad, "n_best", squad_on_devices),
}


def probabilities(answers: Sequence[Answer]) -> list[float]:
    """The softmax of their logit sums, as run_qa's nbest_predictions.json has it."""
    sums = [answer.start_logit + answer.end_logit for answer in answers]
    highest = max(sums, default=0.0)
    exponentials = [math.exp(value - highest) for value in sums]
    total = sum(exponentials)
    return [value / total for value in exponentials]
