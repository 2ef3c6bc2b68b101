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
import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from flaxqa.errors import DataError, UsageError, all_problems

SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]
WINDOWS = ("overlap", "mlperf")
MLPERF_QUESTION_TOKENS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One question about one context."""

    id: str
    question: str
    context: str


class Tokens:
    """A text's C tokens, without special ones.

    Attributes:
      ids: int32 [C].
      offsets: int32 [C, 2], where each starts and ends in the text, in code points, end exclusive.
      words: int32 [C], the number of the word (a piece between spaces and punctuation marks) each
        belongs to; never falls.
    """

    encoding: tokenizers.Encoding

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, words: np.ndarray):
        self.ids, self.offsets, self.words = ids, offsets, words

    @classmethod
    def of(cls, encoding: tokenizers.Encoding) -> Tokens:
        """The tokens of an encoding, whose offsets and words are read when they are asked for."""
        tokens = cls.__new__(cls)
        tokens.ids, tokens.encoding = np.array(encoding.ids, np.int32), encoding
        return tokens

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        pairs = itertools.chain.from_iterable(self.encoding.offsets)
        return np.fromiter(pairs, np.int32, 2 * len(self.ids)).reshape(-1, 2)

    @functools.cached_property
    def words(self) -> np.ndarray:
        return np.array(self.encoding.word_ids, np.int32)


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
    context: Tokens
    part: slice
    question_cut: bool
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def offsets(self) -> np.ndarray:
        """int32 [C, 2] of its own context tokens: `context[start:end]` is the token's text."""
        return self.context.offsets[self.part]

    @property
    def words(self) -> np.ndarray:
        """int32 [C], the words of its own context tokens."""
        return self.context.words[self.part]


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
    for name in ("question", "context"):
        text = getattr(example, name)
        if not text.strip():
            return f"the {name} is {'blank' if text else 'empty'}"
    return why_invalid(example)


def why_invalid(example: Example) -> str | None:
    """Where an example has a lone surrogate, which is not Unicode text, or None."""
    for name in ("question", "context"):
        text = getattr(example, name)
        if (at := lone_surrogate(text)) is not None:
            return f"the {name} has a lone surrogate, U+{ord(text[at]):04X}, at character {at}"
    return None


def lone_surrogate(text: str) -> int | None:
    """Where a text has one first, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def make(
    examples: Sequence[Example],
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    windows: str = "overlap",
    max_question_length: int | None = None,
    known: dict[str, Tokens] | None = None,
) -> list[Feature]:
    """The windows of all examples, in their order; each distinct text is tokenized once.

    Args:
      examples: none with a lone surrogate (see `why_invalid`).
      tokenizer: without truncation and padding, as `flaxqa.checkpoint.load` gives it.
      max_length: the most tokens of a window, special ones included.
      doc_stride: context tokens that neighbouring windows share, or in `mlperf` by which they
        advance.
      windows: "overlap" or "mlperf", see the top of this file.
      max_question_length: the most tokens a question keeps; None for the default of `windows`.
      known: tokens of texts that came before; those of this call's texts take their place, so that
        a context which goes on in the next call is not tokenized again.

    Raises:
      DataError: an example is not Unicode text, or its question leaves no room for its context;
        names every one.
      UsageError: `max_length` and `doc_stride` do not fit (see `question_limit`), or no such
        `windows`.
    """
    limit = max_question_length
    if limit is None:
        limit = default_question_limit(max_length, doc_stride, windows)
    problems = [
        f"{example.id!r}: {reason}"
        for example in examples
        if (reason := why_invalid(example)) is not None
    ]
    if problems:
        raise DataError(all_problems("examples that cannot be asked", problems))
    cls, sep = (np.array([tokenizer.token_to_id(name)], np.int32) for name in ("[CLS]", "[SEP]"))
    texts = [text for example in examples for text in (example.question, example.context)]
    tokens = tokenize(tokenizer, texts, known)
    features = []
    for index, example in enumerate(examples):
        question, context = tokens[example.question].ids, tokens[example.context]
        cut = len(question) > limit
        before = (cls, question[:limit], sep)
        begin = min(len(question), limit) + 2
        size, length = max_length - begin - 1, len(context.ids)
        step = doc_stride if windows == "mlperf" else size - doc_stride
        if length > size and (size < 1 or step < 1):
            problems.append(
                f"{example.id!r}: a question of {len(question)} tokens leaves no room for its "
                f"context at max_length {max_length} and doc_stride {doc_stride}"
            )
            continue
        parts = split(length, size, min(step, size))
        counts = most_context(parts) if windows == "mlperf" else [None] * len(parts)
        for part, count in zip(parts, counts, strict=True):
            ids = np.concatenate((*before, context.ids[part], sep))
            features.append(Feature(index, ids, begin, context, part, cut, count))
    if problems:
        raise DataError(all_problems("examples that cannot be asked", problems))
    return features


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


def tokenize(
    tokenizer: tokenizers.Tokenizer, texts: Iterable[str], known: dict[str, Tokens] | None = None
) -> dict[str, Tokens]:
    """The tokens of each distinct text; `known` gives what it has and then holds these."""
    before = dict(known or ())
    distinct = list(dict.fromkeys(texts))
    new = [text for text in distinct if text not in before]
    encodings = tokenizer.encode_batch(new, add_special_tokens=False)
    fresh = {text: Tokens.of(encoding) for text, encoding in zip(new, encodings, strict=True)}
    tokens = {text: fresh[text] if text in fresh else before[text] for text in distinct}
    if known is not None:
        known.clear()
        known.update(tokens)
    return tokens


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
