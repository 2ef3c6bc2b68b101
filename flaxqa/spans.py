"""The best spans of each window, out of its logits: the part of decoding that devices can do, too.

What is here computes over tables of W windows by T tokens with numpy or, inside a compiled program,
with jax.numpy: each function takes the module as `xp` and chooses the same columns with both. What
competes between the windows of an example is chosen from that in `flaxqa.answers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

Table = Any  # [W, T], an array of numpy or of jax.numpy
WINDOWS_AT_ONCE = 2_048  # of which arrays besides their logits are made


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """The two scores of every token of a window: float32 [T] each (float64 of a float64 model)."""

    start: np.ndarray
    end: np.ndarray


class Found(NamedTuple):
    """The best spans of each window, n of them, best first, and what belongs to a window.

    Attributes:
      first: int [W, n], the column of the first token.
      last: int [W, n], the column of the last token.
      start: float [W, n], the start logit of the first token; -inf where there is no such span.
      end: float [W, n], the end logit of the last token.
    """

    first: Any
    last: Any
    start: Any
    end: Any


class Summary(NamedTuple):
    """What a device tells of each window besides its best spans, all [W].

    Attributes:
      finite: whether all its logits are.
      null_start: the start logit of `[CLS]`.
      null_end: the end logit of `[CLS]`.
      log_start: the log of the summed exponentials of the start logits that are weighed, each
        divided by the rule's temperature.
      log_end: the same of the end logits.
    """

    finite: Any
    null_start: Any
    null_end: Any
    log_start: Any
    log_end: Any


@dataclasses.dataclass(frozen=True)
class Spans:
    """The spans with the highest sum of start and end logit, all of them searched.

    Attributes:
      n: how many of each window.
      max_answer_length: in tokens.
      temperature: divides the logits of the softmax behind scores; what is best stays.
    """

    n: int
    max_answer_length: int
    temperature: float = 1.0

    def find(self, start: Table, end: Table, xp: Any) -> Found:
        """The best spans; equal sums are ordered by position.

        Args:
          start: logits of the tokens where an answer may begin, -inf of the others.
          end: logits of the tokens where an answer may end, -inf of the others.
          xp: numpy or jax.numpy.
        """
        width = min(self.max_answer_length, start.shape[1])
        # The best sum that begins at each column. A span among the n best begins in one of the n
        # best of these, so only those starts are paired with every end.
        begins = xp.sort(best(start + highest_ahead(end, width, xp), self.n, xp), axis=1)
        ends = begins[:, :, None] + xp.arange(width)
        inside = xp.minimum(ends, end.shape[1] - 1)
        paired = xp.where(ends < end.shape[1], xp.take_along_axis(end[:, None], inside, 2), -xp.inf)
        sums = xp.take_along_axis(start, begins, 1)[:, :, None] + paired
        pair = best(sums.reshape(len(sums), -1), self.n, xp)
        first = xp.take_along_axis(begins, pair // width, 1)
        return found(start, end, first, first + pair % width, xp)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of the n best starts and the n best ends of each window that may be an answer.

    Attributes:
      n: also how many pairs of each window.
      max_answer_length: in tokens.
      temperature: as of `Spans`.
    """

    n: int
    max_answer_length: int
    temperature: float = 1.0

    def find(self, start: Table, end: Table, may_start: Table, may_end: Table, xp: Any) -> Found:
        """The best pairs; all tokens compete for the n best, and only then is asked what they are.

        Args:
          start: the start logits, -inf past a window's end.
          end: the end logits.
          may_start: bool, where an answer may begin.
          may_end: bool, where an answer may end.
          xp: numpy or jax.numpy.
        """
        first, last = best(start, self.n, xp), best(end, self.n, xp)
        i, j = first[:, :, None], last[:, None, :]
        begins = xp.take_along_axis(may_start, first, 1)[:, :, None]
        ends = xp.take_along_axis(may_end, last, 1)[:, None, :]
        counts = begins & ends & (i <= j) & (j - i < self.max_answer_length)
        i_logit, j_logit = xp.take_along_axis(start, first, 1), xp.take_along_axis(end, last, 1)
        sums = xp.where(counts, i_logit[:, :, None] + j_logit[:, None, :], -xp.inf)
        sums = sums.reshape(len(sums), -1)
        pair = best(sums, self.n, xp)
        there = xp.take_along_axis(sums, pair, 1) > -xp.inf
        n = last.shape[1]
        first, last = (
            xp.take_along_axis(columns, at, 1)
            for columns, at in ((first, pair // n), (last, pair % n))
        )
        one = found(start, end, first, last, xp)
        return one._replace(start=xp.where(there, one.start, -xp.inf))


Rule = Spans | Pairs


def found(start: Table, end: Table, first: Any, last: Any, xp: Any) -> Found:
    """Spans with their logits; past the last column there is none."""
    inside = xp.minimum(last, end.shape[1] - 1)
    start, end = xp.take_along_axis(start, first, 1), xp.take_along_axis(end, inside, 1)
    return Found(first, last, xp.where(last == inside, start, -xp.inf), end)


def highest_ahead(values: Table, width: int, xp: Any) -> Table:
    """[W, T], the highest of each value and the `width` - 1 that follow it."""
    highest, reach = values, 1
    while reach < min(width, values.shape[1]):
        step = min(reach, width - reach)
        ahead = xp.maximum(highest[:, :-step], highest[:, step:])
        highest = xp.concatenate([ahead, highest[:, -step:]], axis=1)
        reach += step
    return highest


def best(scores: Table, n: int, xp: Any) -> Any:
    """Columns [rows, n] of the n highest values of each row, highest first, ties in order."""
    n = min(n, scores.shape[1])
    if n == 1:
        return scores.argmax(axis=1)[:, None]
    if xp is not np:
        import jax

        return jax.lax.top_k(scores, n)[1]
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


class Scores(Sequence[Logits]):
    """The logits of W windows side by side: a sequence of them, without what fills the table up.

    Attributes:
      lengths: int [W], the tokens of each window.
    """

    def __init__(self, start: np.ndarray, end: np.ndarray, lengths: np.ndarray):
        """Takes [W, T] start and end logits, -inf past a window's end."""
        self.tables, self.lengths = (start, end), lengths

    @property
    def start(self) -> np.ndarray:
        """[W, T], -inf past a window's end."""
        return self.tables[0]

    @property
    def end(self) -> np.ndarray:
        """[W, T]."""
        return self.tables[1]

    @classmethod
    def of(cls, logits: Sequence[Logits]) -> Scores:
        """Logits side by side; what is there already stays."""
        if isinstance(logits, Scores):
            return logits
        lengths = np.array([len(one.start) for one in logits], np.int64)
        inside = np.arange(lengths.max(initial=0)) < lengths[:, None]

        def table(rows: Sequence[np.ndarray]) -> np.ndarray:
            made = np.full(inside.shape, -np.inf, rows[0].dtype if rows else np.float32)
            made[inside] = np.concatenate(rows) if rows else ()
            return made

        return cls(
            table([one.start for one in logits]), table([one.end for one in logits]), lengths
        )

    def told(self, rule: Rule) -> tuple[Found, Summary] | None:
        """What devices have found by a rule already, or None."""
        return None

    def finite(self) -> np.ndarray:
        """bool [W], whether all logits of a window are numbers and not infinite."""
        fine = np.zeros(len(self), np.bool_)
        for begin in range(0, len(self), WINDOWS_AT_ONCE):
            rows = slice(begin, begin + WINDOWS_AT_ONCE)
            outside = np.arange(self.start.shape[1]) >= self.lengths[rows, None]
            both = np.isfinite(self.start[rows]) & np.isfinite(self.end[rows])
            fine[rows] = (both | outside).all(axis=1)
        return fine

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Logits: ...
    @overload
    def __getitem__(self, index: slice) -> list[Logits]: ...
    def __getitem__(self, index: int | slice) -> Logits | list[Logits]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        length = self.lengths[index]
        return Logits(self.start[index, :length], self.end[index, :length])
