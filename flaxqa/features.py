"""Question and context to windows: rows of tokens that know their characters.

Two ways of cutting a context that does not fit one window, by name:

- `overlap`: as transformers' fast tokenizer does with `truncation="only_second"`,
  `return_overflowing_tokens=True` and `stride=doc_stride`: neighbours share `doc_stride` tokens.
  Checked against it in tests/test_features.py. 10,784 windows on the SQuAD v1.1 dev set.
- `mlperf`: as BERT's original run_squad.py (Devlin et al. 2018, google-research/bert) does, and
  with it MLPerf: a window begins `doc_stride` tokens after the one before, a question keeps 64
  tokens, and an answer counts only in the window that shows the most context around its first
  token. 10,833 windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import tokenizers

from flaxqa import tokens
from flaxqa.config import WindowOptions
from flaxqa.errors import DataError, UsageError, all_problems, check_integers

MAX_LENGTH, DOC_STRIDE = 384, 128
SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]
WINDOWS = ("overlap", "mlperf")
MLPERF_QUESTION_TOKENS = 64
TEXTS = ("question", "context")


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One question about one context."""

    id: str
    question: str
    context: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """One window: `[CLS] question [SEP] part of the context [SEP]`, T tokens without padding.

    Attributes:
      example: index of its example in the sequence given to `make`.
      input_ids: int32 [T].
      context_start: index in `input_ids` of the first context token.
      context: the tokens of the whole context.
      part: which of them the window has.
      question_cut: whether the question was too long and lost its end.
      counts: bool [C], which of its context tokens may begin an answer; None if all may.
    """

    example: int
    input_ids: np.ndarray
    context_start: int
    context: tokens.Tokens
    part: slice
    question_cut: bool
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def offsets(self) -> np.ndarray:
        """int32 [C, 2] of its own context tokens: `context[start:end]` is the token's text."""
        return self.context.places.offsets[self.part]

    @property
    def words(self) -> np.ndarray:
        """int32 [C], the words of its own context tokens."""
        return self.context.places.words[self.part]


class Windows(Sequence[Feature]):
    """Windows side by side: a sequence of features, made when they are asked for.

    Attributes:
      input_ids: int32, the tokens of all windows one after the other.
      ends: int64 [W], where each ends in `input_ids`.
      lengths: int64 [W], the tokens of each.
      example: int64 [W], the example of each, as in `Feature`.
      context_start: int64 [W], as in `Feature`.
      first: int64 [W], the first of its context's tokens that each has.
      contexts: of each, the tokens of the whole context.
      question_cut: of each, as in `Feature`.
      counts: as in `Feature`, by window; those without are not in it.
    """

    def __init__(
        self,
        pieces: Sequence[np.ndarray],
        columns: Sequence[tuple[int, int, int, int]],
        contexts: Sequence[tokens.Tokens],
        question_cut: Sequence[bool],
        counts: dict[int, np.ndarray],
    ):
        """Puts windows together.

        Args:
          pieces: whose tokens follow each other.
          columns: of each window its length, example, `context_start` and `first`.
          contexts: see above.
          question_cut: see above.
          counts: see above.
        """
        self.input_ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        table = np.array(columns, np.int64).reshape(-1, 4)
        self.lengths, self.example, self.context_start, self.first = table.T.copy()
        self.ends = np.cumsum(self.lengths)
        self.contexts, self.question_cut, self.counts = contexts, question_cut, counts

    @classmethod
    def of(cls, features: Sequence[Feature]) -> Windows:
        """Features side by side; what is there already stays."""
        if isinstance(features, Windows):
            return features
        return cls(
            [one.input_ids for one in features],
            [(len(one), one.example, one.context_start, one.part.start) for one in features],
            [one.context for one in features],
            [one.question_cut for one in features],
            {at: one.counts for at, one in enumerate(features) if one.counts is not None},
        )

    def __len__(self) -> int:
        return len(self.contexts)

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        end, length = int(self.ends[index]), int(self.lengths[index])
        begin, first = int(self.context_start[index]), int(self.first[index])
        return Feature(
            int(self.example[index]),
            self.input_ids[end - length : end],
            begin,
            self.contexts[index],
            slice(first, first + length - begin - 1),
            self.question_cut[index],
            self.counts.get(index),
        )


def window_sizes(options: WindowOptions, positions: int) -> tuple[int, int]:
    """The `max_length` and `doc_stride` of a checkpoint with so many positions.

    Raises:
      UsageError: they leave no room for a question and a context.
    """
    max_length, doc_stride = options.max_length, options.doc_stride
    check_integers(doc_stride=doc_stride)
    if max_length is None:
        max_length = min(MAX_LENGTH, positions)
    if doc_stride is None:
        doc_stride = min(DOC_STRIDE, max_length // 2)
    default_question_limit(max_length, doc_stride, options.windows)
    return max_length, doc_stride


def question_limit(max_length: int, doc_stride: int) -> int:
    """The most tokens a question keeps: three quarters of what a window has beyond its stride.

    At 384 and 128 that is 189. A longer question would leave windows that advance by a few tokens
    (872 of them for 500 words) or not at all, where transformers' tokenizer panics.

    Raises:
      UsageError: no room for a question and a context is left.
    """
    room = max_length - SPECIAL_TOKENS - doc_stride
    if doc_stride < 0 or room < 4:
        raise UsageError(
            f"max_length {max_length} and doc_stride {doc_stride}: the stride must be from 0 to "
            f"max_length - {SPECIAL_TOKENS + 4}"
        )
    return room * 3 // 4


def why_unanswerable(example: Example) -> str | None:
    """What keeps an example from being asked at all, or None: blank or invalid text."""
    for name in TEXTS:
        text = getattr(example, name)
        if not text.strip():
            return f"the {name} is {'blank' if text else 'empty'}"
    return why_invalid(example)


def why_invalid(example: Example) -> str | None:
    """Where an example has a lone surrogate, which is not Unicode text, or None."""
    for name in TEXTS:
        text = getattr(example, name)
        if (at := lone_surrogate(text)) is not None:
            return f"the {name} has a lone surrogate, U+{ord(text[at]):04X}, at character {at}"
    return None


def lone_surrogate(text: str) -> int | None:
    """Where a text has one first, or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def as_example(record: Any) -> Example | str:
    """The question and the context of a record, or why it has none."""
    names = ("question", "context")
    if type(record) is dict:  # as nearly all are
        question, context = record.get("question"), record.get("context")
        if type(question) is str and type(context) is str:
            return Example("", question, context)
    if isinstance(record, Example):
        record = {name: getattr(record, name) for name in names}
    elif isinstance(record, (tuple, list)) and len(record) == 2:
        record = dict(zip(names, record, strict=True))
    if not isinstance(record, Mapping):
        return f"the record is {type(record).__name__}, not a mapping, a pair or an Example"
    texts = []
    for name in names:
        try:
            text = record[name]
        except KeyError:
            return f"the record has no {name}"
        except Exception as error:  # whatever the mapping does: a row never ends a stream
            return f"the {name} cannot be read: {error!r}"
        if not isinstance(text, str):
            return f"the {name} is {type(text).__name__}, not a string"
        texts.append(text)
    return Example("", *texts)


def characters(example: Example | str) -> int:
    """How much text an example has; none if it is the reason why there is none."""
    return 0 if isinstance(example, str) else len(example.question) + len(example.context)


def why_not_text(name: str, text: Any) -> str | None:
    """Why this cannot be a question or a context, or None."""
    if not isinstance(text, str):
        return f"the {name} is {type(text).__name__}, not a string"
    return why_unanswerable(Example("", **{"question": "?", "context": ".", name: text}))


def make(
    examples: Sequence[Example],
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    windows: str = "overlap",
    max_question_length: int | None = None,
    known: dict[str, tokens.Tokens] | None = None,
) -> Windows:
    """The windows of all examples, in their order; each distinct text is tokenized once.

    Args:
      examples: none with a lone surrogate (see `why_invalid`).
      tokenizer: without truncation and padding, as `flaxqa.checkpoint.load` gives it.
      max_length: the most tokens of a window, special ones included.
      doc_stride: context tokens that neighbouring windows share, or in `mlperf` by which they
        advance.
      windows: "overlap" or "mlperf", see the top of this file.
      max_question_length: the most tokens a question keeps; None for the default of `windows`.
      known: tokens of contexts that came before; those of this call take their place, so that a
        context which goes on in the next call is not tokenized again.

    Raises:
      DataError: an example is not Unicode text, or its question leaves no room for its context;
        names every one.
      UsageError: `max_length` and `doc_stride` do not fit, or no such `windows`.
    """
    limit = max_question_length or default_question_limit(max_length, doc_stride, windows)
    refuse_examples((example.id, why_invalid(example)) for example in examples)
    cls, sep = (np.array([tokenizer.token_to_id(name)], np.int32) for name in ("[CLS]", "[SEP]"))
    questions = tokens.identify(tokenizer, (example.question for example in examples))
    contexts = tokens.place(tokenizer, (example.context for example in examples), known)
    pieces: list[np.ndarray] = []
    columns, question_cut = [], []
    of_windows: list[tokens.Tokens] = []
    counts: dict[int, np.ndarray] = {}
    problems: list[tuple[str, str | None]] = []
    for index, example in enumerate(examples):
        question, context = questions[example.question], contexts[example.context]
        cut = len(question) > limit
        question = question[:limit]
        begin, length = len(question) + 2, len(context.ids)
        parts = parts_of(length, max_length - begin - 1, doc_stride, windows)
        if parts is None:
            where = f"at max_length {max_length} and doc_stride {doc_stride}"
            asked = len(questions[example.question])
            told = f"a question of {asked} tokens leaves no room for its context {where}"
            problems.append((example.id, told))
            continue
        if windows == "mlperf" and len(parts) > 1:
            counts |= enumerate(most_context(parts), len(of_windows))
        for part in parts:
            pieces += (cls, question, sep, context.ids[part], sep)
            columns.append((begin + part.stop - part.start + 1, index, begin, part.start))
        of_windows += [context] * len(parts)
        question_cut += [cut] * len(parts)
    refuse_examples(problems)
    return Windows(pieces, columns, of_windows, question_cut, counts)


def refuse_examples(reasons: Iterable[tuple[str, str | None]]) -> None:
    """Raises: DataError: there is a reason; says of which examples, by their ids."""
    if found := [f"{name!r}: {reason}" for name, reason in reasons if reason is not None]:
        raise DataError(all_problems("examples that cannot be asked", found))


def default_question_limit(max_length: int, doc_stride: int, windows: str) -> int:
    """The most tokens a question keeps when nothing else is said.

    Raises:
      UsageError: `max_length` and `doc_stride` leave no room, or there is no such `windows`.
    """
    if windows not in WINDOWS:
        raise UsageError(f"windows {windows!r} is neither 'overlap' nor 'mlperf'")
    if windows == "overlap":
        return question_limit(max_length, doc_stride)
    if doc_stride < 1 or max_length < MLPERF_QUESTION_TOKENS + SPECIAL_TOKENS + 1:
        raise UsageError(
            f"max_length {max_length} and doc_stride {doc_stride}: windows 'mlperf' needs a stride "
            f"of at least 1 and a length above {MLPERF_QUESTION_TOKENS + SPECIAL_TOKENS}"
        )
    return MLPERF_QUESTION_TOKENS


def parts_of(length: int, size: int, doc_stride: int, windows: str) -> list[slice] | None:
    """The parts of a context, at most `size` tokens of each; None if there is no room."""
    if length <= size:
        return [slice(0, length)]
    step = doc_stride if windows == "mlperf" else size - doc_stride
    return split(length, size, min(step, size)) if min(size, step) >= 1 else None


def split(length: int, size: int, step: int) -> list[slice]:
    """Parts of `size` tokens that begin every `step`, up to the first that reaches the end."""
    if length <= size:
        return [slice(0, length)]
    starts = range(0, length - size + step, step)
    return [slice(start, min(start + size, length)) for start in starts]


def most_context(parts: Sequence[slice]) -> list[np.ndarray]:
    """For each part, bool [its tokens]: where none of the parts shows more context than it does.

    The context of a token in a part is the smaller of the numbers of tokens before and after it,
    plus a hundredth of the part's length; of equals the first part has it. Source:
    `_check_is_max_context` in run_squad.py of google-research/bert.
    """
    best = np.full(parts[-1].stop, -1.0)
    owner = np.zeros(len(best), np.int32)
    for index, part in enumerate(parts):
        position = np.arange(part.stop - part.start)
        context = np.minimum(position, position[::-1]) + 0.01 * len(position)
        more = context > best[part]
        best[part][more] = context[more]
        owner[part][more] = index
    return [owner[part] == index for index, part in enumerate(parts)]


def covering(offsets: np.ndarray, span: tuple[int, int]) -> tuple[int, int] | None:
    """The first and the last of a context's tokens that have a character of an answer, or None.

    Args:
      offsets: int [C, 2] of the tokens, see `Feature.offsets`.
      span: the answer's characters.
    """
    first = int(np.searchsorted(offsets[:, 1], span[0], "right"))
    last = int(np.searchsorted(offsets[:, 0], span[1], "left")) - 1
    return (first, last) if first <= last else None
