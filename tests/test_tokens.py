"""Tokens and their places, against the library."""

import numpy as np
import pytest
import tokenizers
from conftest import QUICKSTART, SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flaxqa import tokens as library
from flaxqa.eval import questions as dataset
from flaxqa.tokens import Tokens, identify, never_looks_across_spaces, place

TOKENIZER = library.load_tokenizer(QUICKSTART / "checkpoint")[0]


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1), st.data())
def test_the_place_of_a_span_is_that_of_all_offsets_and_words(text, data):
    (tokens,) = place(TOKENIZER, [text]).values()
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


# Whatever might join or part what a space parts: marks that combine, blanks that are no space,
# signs that the normalizer drops, special tokens, words longer than the model takes.
PIECES = st.sampled_from([
    " ", "  ", "a", "Who", "lives", "-", "'s", "é", "e", "\u0301", "\u00a0", "\t", "\n", "\u3000",
    "\u200b", "\0", "\ufffd", "\x1c", "\u4e2d", "İ", "Σ", "ﬁ", "\U0001f600", "[SEP]", "[CLS]",
    "[MASK]", "[UNK]", "[", "SEP", "]", "x" * 101, "unaffable", "2", ".", "\u1100\u1161", "\r",
])  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=20).map("".join), st.text(max_size=40))


@settings(max_examples=500, deadline=None)
@given(st.lists(TEXTS, max_size=40))
@example(["", " ", "  a  ", "a\u0301 \u0301b", "[SEP] [CLS]x", "\u0301", "x" * 300 + " y"])
def test_texts_given_together_have_the_ids_of_each_alone(texts):
    assert never_looks_across_spaces(TOKENIZER)
    found = identify(TOKENIZER, texts)
    assert sorted(found) == sorted(set(texts))
    for text, ids in found.items():
        assert ids.tolist() == TOKENIZER.encode(text, add_special_tokens=False).ids
        assert ids.dtype == np.int32


@pytest.mark.shared
def test_the_questions_of_the_dev_set_have_the_ids_of_each_alone():
    tokenizer, _ = library.load_tokenizer(SHARED / "checkpoints" / "distilbert-minilm-squad")
    questions = dataset.read(SHARED / "squad" / "dev-v1.1.json").questions
    found = identify(tokenizer, (one.question for one in questions))
    encodings = tokenizer.encode_batch(list(found), add_special_tokens=False)
    assert [ids.tolist() for ids in found.values()] == [one.ids for one in encodings]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": tokenizers.normalizers.Replace(" ", "_")},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Punctuation()},
        {"added": tokenizers.AddedToken("berlin", lstrip=True)},
        {"added": tokenizers.AddedToken("berlin", rstrip=True)},
        {"added": tokenizers.AddedToken("ber", single_word=True)},
        {"added": tokenizers.AddedToken("new york")},
    ],
)
def test_a_tokenizer_that_may_look_across_spaces_is_given_each_text_alone(change):
    changed = tokenizers.Tokenizer.from_str(TOKENIZER.to_str())
    for name, part in change.items():
        if name == "added":
            changed.add_tokens([part])
        else:
            setattr(changed, name, part)
    assert not never_looks_across_spaces(changed)
    texts = [f"who lives in new york , berlin or ber lin {i} ?" for i in range(40)]
    for text, ids in identify(changed, texts).items():
        assert ids.tolist() == changed.encode(text, add_special_tokens=False).ids


def test_a_context_is_tokenized_once():
    known = {}
    first = place(TOKENIZER, ["Bob.", "Ada.", "Bob."], known)
    assert list(first) == ["Bob.", "Ada."]
    second = place(TOKENIZER, ["Who?", "Bob."], known)
    assert second["Bob."] is first["Bob."]
    assert list(known) == ["Who?", "Bob."]


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(1, 3))
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(text, piece, at_once):
    (whole,) = place(TOKENIZER, [text]).values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PIECE", piece)
        patch.setattr(library, "PIECES_AT_ONCE", at_once)
        (parts,) = place(TOKENIZER, [text]).values()
        ids = identify(TOKENIZER, [text, "who"])
    assert (parts.encoding is None) == (len(text) > piece * at_once)
    assert parts.ids.tolist() == ids[text].tolist() == whole.ids.tolist()
    np.testing.assert_array_equal(parts.places.offsets, whole.places.offsets)
    # The numbers of words may differ, not which tokens are of one.
    for one in (parts, whole):
        assert (np.diff(one.places.words) >= 0).all()
    np.testing.assert_array_equal(np.diff(parts.places.words) > 0, np.diff(whole.places.words) > 0)
