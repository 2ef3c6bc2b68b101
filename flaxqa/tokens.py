"""Texts to tokens, and tokens back to their places in a text, by the library `tokenizers`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers


class Places(NamedTuple):
    """Where the C tokens of a text are.

    Attributes:
      offsets: int32 [C, 2], where each starts and ends in the text, in code points, end exclusive.
      words: int32 [C], the number of the word (a piece between spaces and punctuation marks) each
        belongs to; never falls.
    """

    offsets: np.ndarray
    words: np.ndarray


class Tokens:
    """A text's C tokens, without special ones.

    Attributes:
      ids: int32 [C].
      encoding: the library's, if it knows where the tokens are. All places are read from it when
        they are asked for; those of a span without the others.
    """

    def __init__(
        self,
        ids: np.ndarray,
        encoding: tokenizers.Encoding | None = None,
        places: Places | None = None,
    ):
        self.ids, self.encoding = ids, encoding
        if places is not None:
            self.places = places

    @functools.cached_property
    def places(self) -> Places:
        """Those of all tokens."""
        assert self.encoding is not None  # noqa: S101 (for the type checker)
        pairs = itertools.chain.from_iterable(self.encoding.offsets)
        offsets = np.fromiter(pairs, np.int32, 2 * len(self.ids)).reshape(-1, 2)
        return Places(offsets, np.array(self.encoding.word_ids, np.int32))

    def span(self, first: int, last: int, whole_words: bool) -> tuple[int, int]:
        """Where the text from a token to another, not before it, starts and ends.

        With `whole_words` it is widened to all tokens of the words that the two belong to.
        """
        if (encoding := self.encoding) is not None:
            if whole_words:
                first, _ = encoding.word_to_tokens(encoding.token_to_word(first))
                last = encoding.word_to_tokens(encoding.token_to_word(last))[1] - 1
            return encoding.token_to_chars(first)[0], encoding.token_to_chars(last)[1]
        offsets, words = self.places
        if whole_words:
            first = int(np.searchsorted(words, words[first]))
            last = int(np.searchsorted(words, words[last], "right")) - 1
        return int(offsets[first, 0]), int(offsets[last, 1])


def tokenize(
    tokenizer: tokenizers.Tokenizer,
    questions: Sequence[str],
    contexts: Iterable[str],
    known: dict[str, Tokens] | None = None,
) -> dict[str, Tokens]:
    """The tokens of each distinct text, on all cores; `known` gives what it has, then holds these.

    Those of texts that are questions alone have no places, which nobody reads and which take time.
    """
    before = known or {}
    placed = dict.fromkeys(contexts)
    tokens = {
        text: found
        for text in itertools.chain(placed, questions)
        if (found := before.get(text)) and (found.encoding is not None or text not in placed)
    }
    new = [text for text in placed if text not in tokens]
    for text, encoding in zip(
        new, tokenizer.encode_batch(new, add_special_tokens=False), strict=True
    ):
        tokens[text] = Tokens(np.array(encoding.ids, np.int32), encoding)
    new = [text for text in dict.fromkeys(questions) if text not in tokens]
    for text, encoding in zip(
        new, tokenizer.encode_batch_fast(new, add_special_tokens=False), strict=True
    ):
        tokens[text] = Tokens(np.array(encoding.ids, np.int32))
    if known is not None:
        known.clear()
        known.update(tokens)
    return tokens
