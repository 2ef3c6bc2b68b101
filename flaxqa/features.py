"""Question and context to windows: rows of tokens that know their characters.

The windows are those of transformers' fast tokenizer with `truncation="only_second"`,
`return_overflowing_tokens=True` and `stride=doc_stride`: neighbours overlap by `doc_stride` tokens.
Checked against it in tests/test_features.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from flaxqa.errors import DataError, UsageError, all_problems

SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]


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
      offsets: int32 [C, 2], where each of its C context tokens starts and ends in the context, in
        code points, end exclusive: `context[start:end]` is the token's text.
      question_cut: whether the question was longer than `question_limit` and lost its end.
    """

    example: int
    input_ids: np.ndarray
    context_start: int
    offsets: np.ndarray
    question_cut: bool

    def __len__(self) -> int:
        return len(self.input_ids)


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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"the {name} has a lone surrogate, U+{ord(text[error.start]):04X}, "
                f"at character {error.start}"
            )
    return None


def make(
    examples: Sequence[Example],
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
) -> list[Feature]:
    """The windows of all examples, in their order; each distinct text is tokenized once.

    Args:
      examples: none of them blank (see `why_unanswerable`).
      tokenizer: without truncation and padding, as `flaxqa.checkpoint.load` gives it.
      max_length: the most tokens of a window, special ones included.
      doc_stride: how many context tokens neighbouring windows share.

    Raises:
      DataError: an example cannot be asked (see `why_unanswerable`); names every one.
      UsageError: `max_length` and `doc_stride` do not fit (see `question_limit`).
    """
    longest_question = question_limit(max_length, doc_stride)
    problems = [
        f"{example.id!r}: {reason}"
        for example in examples
        if (reason := why_unanswerable(example)) is not None
    ]
    if problems:
        raise DataError(all_problems("examples that cannot be asked", problems))
    cls, sep = (np.array([tokenizer.token_to_id(name)], np.int32) for name in ("[CLS]", "[SEP]"))
    questions = {
        text: np.array(encoding.ids, np.int32)
        for text, encoding in encode(tokenizer, (example.question for example in examples))
    }
    contexts = {
        text: (
            np.array(encoding.ids, np.int32),
            np.array(encoding.offsets, np.int32).reshape(-1, 2),
        )
        for text, encoding in encode(tokenizer, (example.context for example in examples))
    }
    features = []
    for index, example in enumerate(examples):
        question = questions[example.question]
        cut = len(question) > longest_question
        question = question[:longest_question]
        before = np.concatenate((cls, question, sep))
        context, offsets = contexts[example.context]
        size = max_length - SPECIAL_TOKENS - len(question)
        for start in range(0, max(len(context), 1), size - doc_stride):
            part = slice(start, start + size)
            ids = np.concatenate((before, context[part], sep))
            features.append(Feature(index, ids, len(before), offsets[part], cut))
            if start + size >= len(context):
                break
    return features


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Iterable[str]
) -> Iterable[tuple[str, tokenizers.Encoding]]:
    """Each distinct text with its encoding, without special tokens."""
    distinct = list(dict.fromkeys(texts))
    return zip(distinct, tokenizer.encode_batch(distinct, add_special_tokens=False), strict=True)
