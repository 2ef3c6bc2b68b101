"""Tokens and their places, against the library."""

import numpy as np
from conftest import QUICKSTART
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqa import checkpoint
from flaxqa.tokens import Tokens, tokenize

TOKENIZER = checkpoint.load_tokenizer(QUICKSTART / "checkpoint")[0]


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1), st.data())
def test_the_place_of_a_span_is_that_of_all_offsets_and_words(text, data):
    (tokens,) = tokenize(TOKENIZER, [], [text]).values()
    if not len(tokens.ids):
        return
    first = data.draw(st.integers(0, len(tokens.ids) - 1))
    last = data.draw(st.integers(first, len(tokens.ids) - 1))
    encoding = TOKENIZER.encode(text, add_special_tokens=False)
    assert tokens.span(first, last, False) == (
        encoding.offsets[first][0],
        encoding.offsets[last][1],
    )
    begin, end, words = first, last, encoding.word_ids
    while begin and words[begin - 1] == words[first]:
        begin -= 1
    while end + 1 < len(words) and words[end + 1] == words[last]:
        end += 1
    whole = encoding.offsets[begin][0], encoding.offsets[end][1]
    assert tokens.span(first, last, True) == whole
    assert Tokens(tokens.ids, places=tokens.places).span(first, last, True) == whole


class Counting:
    def __init__(self):
        self.placed, self.bare = [], []

    def encode_batch(self, texts, **options):
        self.placed += texts
        return TOKENIZER.encode_batch(texts, **options)

    def encode_batch_fast(self, texts, **options):
        self.bare += texts
        return TOKENIZER.encode_batch_fast(texts, **options)


def test_each_distinct_text_is_tokenized_once_and_questions_without_places():
    counting, known = Counting(), {}
    first = tokenize(counting, ["Who?", "Bob.", "Who?"], ["Bob.", "Ada.", "Ada."], known)
    assert (counting.placed, counting.bare) == (["Bob.", "Ada."], ["Who?"])
    assert known == first
    # A question before that is a context now has to be placed; what is known is taken.
    second = tokenize(counting, ["Ada.", "What?"], ["Who?", "Bob."], known)
    assert (counting.placed, counting.bare) == (["Bob.", "Ada.", "Who?"], ["Who?", "What?"])
    assert sorted(known) == ["Ada.", "Bob.", "What?", "Who?"]
    assert second["Bob."] is first["Bob."]
    for text, tokens in second.items():
        assert tokens.ids.tolist() == TOKENIZER.encode(text, add_special_tokens=False).ids
        assert tokens.ids.dtype == np.int32
    assert second["Who?"].places.offsets.tolist() == [[0, 3], [3, 4]]
