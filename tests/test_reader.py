import collections
import copy
import gc
import itertools
import math

import numpy as np
import pytest
from conftest import QUICKSTART
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxqa
from flaxqa import features, predict, tokens
from flaxqa.errors import DataError, ModelRejected, UsageError
from flaxqa.eval import questions as dataset
from flaxqa.reader import Reader, chunks
from flaxqa.spans import Logits

CONTEXT = (
    "Sailors still speak of the ship Tulflora. It was commanded by Oben Adsen. "
    "The ship Tulflora carried dried fish."
)
QUESTION = "What did the ship Tulflora carry?"


class Broken(collections.UserDict):
    """A record that raises whatever is asked of it."""

    def __getitem__(self, name):
        raise RuntimeError("boom")


@pytest.fixture(scope="module")
def reader():
    return flaxqa.load(QUICKSTART / "checkpoint", devices=1)


@pytest.fixture(scope="module")
def small(reader):
    """Windows of 40 tokens, so that most contexts need several."""
    return Reader(reader.checkpoint, max_length=40, doc_stride=8, devices=1)


@pytest.fixture(scope="module")
def questions():
    return dataset.read(QUICKSTART / "heldout.json").questions


def test_an_answer_is_a_piece_of_the_context(reader):
    found = reader.answer(QUESTION, CONTEXT)
    assert isinstance(found, list)
    (answer,) = found
    assert answer.text == "dried fish" == CONTEXT[answer.start : answer.end]
    assert 0 < answer.score <= 1
    assert found.n_windows == 1
    assert found.error is None


def test_fewer_answers_are_the_first_of_more(small, questions):
    records = [(q.question, q.context) for q in questions[:60]]
    for overlapping in (False, True):
        ten = list(small.answers(records, top_k=10, overlapping=overlapping))
        assert max(found.n_windows for found in ten) > 1
        for top_k in (1, 2, 5):
            fewer = list(small.answers(records, top_k=top_k, overlapping=overlapping))
            for less, more in zip(fewer, ten, strict=True):
                assert [one.text for one in less] == [one.text for one in more[:top_k]]
                assert less[:1] == more[:1]


def test_answers_do_not_overlap_unless_asked(small, questions):
    records = [(q.question, q.context) for q in questions[:40]]
    for found in small.answers(records, top_k=5):
        places = sorted((one.start, one.end) for one in found)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    nested = small.answer(QUESTION, CONTEXT, top_k=5, overlapping=True)
    assert len({(one.start, one.end) for one in nested}) == len(nested) == 5
    assert any(a.start < b.end and b.start < a.end for a, b in itertools.combinations(nested, 2))


def test_mentions_of_one_text_keep_their_own_places(reader):
    context = "It carried dried fish. Dried fish is what it carried. He ate dried fish."
    found = reader.answer("What did it carry?", context, top_k=300, overlapping=True)
    places = sorted(one.start for one in found if one.text.lower() == "dried fish")
    assert places == [11, 23, 61]


def test_a_huge_longest_answer_is_that_of_the_window(reader):
    plain = reader.answer(QUESTION, CONTEXT, top_k=3, max_answer_length=384)
    assert reader.answer(QUESTION, CONTEXT, top_k=3, max_answer_length=10**12) == plain


def test_scores_sum_to_at_most_one_and_fall(small, questions):
    records = [(q.question, q.context) for q in questions[:40]]
    for found in small.answers(records, top_k=20, overlapping=True):
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) >= 0
        assert sum(scores) <= 1 + 1e-9


def test_answers_below_the_least_score_are_left_out(reader):
    every = reader.answer(QUESTION, CONTEXT, top_k=10)
    least = every[1].score
    assert reader.answer(QUESTION, CONTEXT, top_k=10, min_score=least) == every[:2]
    assert reader.answer(QUESTION, CONTEXT, min_score=1.0) == []


def test_no_answer_is_a_score_and_a_threshold(reader):
    found = reader.answer(QUESTION, CONTEXT)
    (feature,) = reader.windows_of([features.Example("", QUESTION, CONTEXT)])
    (logits,) = reader.predictor.predict([feature])
    best = found[0].start_logit + found[0].end_logit
    assert found.null_odds == pytest.approx(float(logits.start[0] + logits.end[0]) - best, abs=1e-4)
    assert found.no_answer_score == pytest.approx(1 / (1 + math.exp(-found.null_odds)))
    assert 0 < found.no_answer_score < 1
    just = found.no_answer_score
    assert reader.answer(QUESTION, CONTEXT, no_answer_threshold=just) == found
    assert reader.answer(QUESTION, CONTEXT, no_answer_threshold=just * 0.999) == []


def test_records_come_back_whole_and_in_order(reader, questions):
    records = [
        {"id": q.id, "question": q.question, "context": q.context, "title": i}
        for i, q in enumerate(questions[:30])
    ]
    stream = reader.answers(iter(records), chunk_size=7)
    found = list(stream)
    assert [one.record for one in found] == records
    one_by_one = [reader.answer(r["question"], r["context"]) for r in records[:5]]
    assert [one[0].text for one in found[:5]] == [one[0].text for one in one_by_one]


@pytest.mark.parametrize(("chunk_size", "first", "later"), [(4, 12, 16), (1, 1, 7)])
def test_a_stream_reads_two_chunks_ahead_and_no_further(reader, chunk_size, first, later):
    taken = []

    def records():
        for i in itertools.count():
            taken.append(i)
            yield {"question": "Who?", "context": f"It is {i}.", "id": i}

    stream = reader.answers(records(), chunk_size=chunk_size)
    assert next(stream).record["id"] == 0
    assert len(taken) == first
    assert [next(stream).record["id"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert len(taken) == later


def test_what_was_read_before_an_error_of_the_source_is_answered(reader):
    def records():
        yield QUESTION, CONTEXT
        yield [QUESTION, CONTEXT]  # as JSON has a pair
        raise OSError("the source is gone")

    stream = reader.answers(records())
    assert [next(stream)[0].text for _ in range(2)] == ["dried fish"] * 2
    with pytest.raises(OSError, match="the source is gone"):
        next(stream)


def test_two_streams_of_one_reader_do_not_mix(reader):
    contexts = [f"The ship Tulflora carried {thing}." for thing in ("salt", "iron", "cloth")]
    streams = [reader.answers([(QUESTION, one)] * 5, chunk_size=2) for one in contexts]
    alone = [reader.answer(QUESTION, one) for one in contexts]
    for _ in range(5):
        for found, wanted in zip(map(next, streams), alone, strict=True):
            assert [one.text for one in found] == [one.text for one in wanted]
            assert found[0].score == pytest.approx(wanted[0].score, rel=1e-4)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "", "context": "x"}, "the question is empty"),
        ({"question": "Who?", "context": " \n"}, "the context is blank"),
        ({"question": "Who?"}, "the record has no context"),
        ({"question": 7, "context": "x"}, "the question is int, not a string"),
        (("Who?", None), "the context is NoneType, not a string"),
        ("Who?", "the record is str"),
        (None, "the record is NoneType"),
        (features.Example("x", None, CONTEXT), "the question is NoneType, not a string"),
        (Broken(), "the question cannot be read: RuntimeError('boom')"),
        ({"question": "Who?", "context": "\ud800"}, "lone surrogate"),
    ],
)
def test_a_record_that_cannot_be_asked_stops_no_other(reader, record, reason):
    good = (QUESTION, CONTEXT)
    before, bad, after = reader.answers([good, record, good])
    assert before == after == reader.answer(*good)
    assert bad == []
    assert reason in bad.error
    assert bad.record is record
    assert bad.no_answer_score == 1


@pytest.mark.parametrize(("question", "context"), [("", "x"), ("x", " "), (None, "x")])
def test_one_question_that_cannot_be_asked_is_an_error(reader, question, context):
    with pytest.raises(DataError):
        reader.answer(question, context)


def test_logits_that_are_not_finite_are_an_error_of_their_row(reader, monkeypatch):
    whole = predict.Predictor.stream

    def spoilt(self, chunks, progress, rule):
        for logits in whole(self, chunks, progress, rule):
            yield [
                Logits(one.start * np.nan, one.end) if index == 1 else one
                for index, one in enumerate(logits)
            ]

    monkeypatch.setattr(predict.Predictor, "stream", spoilt)
    good, bad, also = reader.answers([(QUESTION, CONTEXT)] * 3)
    assert (good.error, bad.error, also.error) == (None, "the model's logits are not finite", None)
    assert good == also
    assert bad == []

    def infinite(self, chunks, progress, rule):
        for logits in whole(self, chunks, progress, rule):
            yield [Logits(one.start * np.inf, one.end) for one in logits]

    monkeypatch.setattr(predict.Predictor, "stream", infinite)
    with pytest.raises(ModelRejected, match="not finite"):
        reader.answer(QUESTION, CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": "3"}, "top_k is '3', it must be an integer"),
        ({"min_score": "x"}, "min_score is 'x'"),
        ({"max_answer_length": 0}, "max_answer_length is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"min_score": 1.5}, "min_score is 1.5"),
        ({"no_answer_threshold": -1}, "no_answer_threshold is -1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_read(reader, options, message):
    def records():
        raise AssertionError("something was read")
        yield

    with pytest.raises(UsageError, match=message):
        reader.answers(records(), **options)


def test_a_single_record_is_not_taken_for_many(reader):
    with pytest.raises(UsageError, match="there is answer"):
        reader.answers({"question": QUESTION, "context": CONTEXT})


def test_many_questions_tokenize_their_context_once(small, monkeypatch):
    texts = []
    place = tokens.place

    def counting(tokenizer, contexts, known):
        contexts = list(contexts)
        texts.extend(set(contexts) - known.keys())
        return place(tokenizer, contexts, known)

    monkeypatch.setattr(tokens, "place", counting)
    asked = [f"{QUESTION} {i}" for i in range(5)]
    found = small.answer_questions(asked, CONTEXT, top_k=2, chunk_size=2)
    assert texts.count(CONTEXT) == 1
    assert [one.record["question"] for one in found] == asked
    assert [len(one) for one in found] == [2] * 5


def test_search_is_the_answer_in_one_softmax_over_all_contexts(reader):
    contexts = ["The ship Mila carried salt.", CONTEXT, "Bob likes the ship Tulflora."]
    found = reader.search(QUESTION, contexts, top_k=3)
    apart = [reader.answer(QUESTION, context, top_k=3) for context in contexts]
    every = [(one, index) for index, each in enumerate(apart) for one in each]
    every.sort(key=lambda pair: -(pair[0].start_logit + pair[0].end_logit))
    assert [(one.text, one.start, one.context) for one in found] == [
        (one.text, one.start, index) for one, index in every[:3]
    ]
    assert contexts[found[0].context][found[0].start : found[0].end] == found[0].text
    total = [sum(math.exp(each.log_normalizers[side]) for each in apart) for side in (0, 1)]
    for one in found:
        expected = math.exp(one.start_logit) / total[0] * math.exp(one.end_logit) / total[1]
        assert one.score == pytest.approx(expected, rel=1e-4)
    nulls = [each.null_odds + each[0].start_logit + each[0].end_logit for each in apart]
    best = found[0].start_logit + found[0].end_logit
    assert found.null_odds == pytest.approx(min(nulls) - best, abs=1e-4)


def test_search_divides_by_the_temperature(reader):
    options = {"top_k": 2, "temperature": 2.5}
    alone = reader.answer(QUESTION, CONTEXT, **options)
    found = reader.search(QUESTION, [CONTEXT], **options)
    assert [one.score for one in found] == pytest.approx([one.score for one in alone])
    assert found[0].score != pytest.approx(reader.answer(QUESTION, CONTEXT)[0].score, rel=1e-3)
    assert found[0].text == reader.answer(QUESTION, CONTEXT)[0].text


def test_search_takes_any_number_of_contexts_and_names_bad_ones(reader):
    contexts = (CONTEXT if i == 30 else f"It is {i}." if i % 10 else " " for i in range(50))
    found = reader.search(QUESTION, contexts, chunk_size=8)
    # Each tenth one is blank, but for the one that holds the answer.
    assert (found[0].text, found[0].context) == ("dried fish", 30)
    assert found.error.count("the context is blank") == 4
    assert reader.search(QUESTION, []) == []
    assert reader.search(QUESTION, [CONTEXT], min_score=1.0) == []
    assert reader.search(QUESTION, [CONTEXT], no_answer_threshold=0.0) == []
    assert reader.search(QUESTION, [" "] * 999).error.endswith("; and 979 more")
    with pytest.raises(UsageError, match="min_score is 5"):
        reader.search(QUESTION, [CONTEXT], min_score=5)
    with pytest.raises(UsageError, match="no_answer_threshold is nan"):
        reader.search(QUESTION, [CONTEXT], no_answer_threshold=math.nan)
    for bad in ("", "\ud800", None):
        with pytest.raises(DataError, match="the question"):
            reader.search(bad, [CONTEXT])


def test_one_string_is_not_taken_for_many(reader):
    with pytest.raises(UsageError, match="contexts are an iterable"):
        reader.search(QUESTION, CONTEXT)
    with pytest.raises(UsageError, match="questions are an iterable"):
        reader.answer_questions(QUESTION, CONTEXT)


def test_what_is_shown_says_what_is_wrong(reader):
    (bad,) = reader.answers([("", CONTEXT)])
    assert repr(bad) == "Answers([], error='the question is empty')"
    assert (copy.copy(bad).error, bad.copy().error) == (bad.error, bad.error)
    assert "distilbert, 4 layers, 128 channels, float32, on 1 cpu" in repr(reader)
    assert "load" in dir(flaxqa)
    assert issubclass(flaxqa.errors.DataError, ValueError)


def test_the_mlperf_windows_are_an_option(reader):
    loaded = flaxqa.load(QUICKSTART / "checkpoint", devices=1, windows="mlperf")
    assert loaded.answer(QUESTION, CONTEXT)[0].text == "dried fish"
    with pytest.raises(UsageError, match="neither 'overlap' nor 'mlperf'"):
        Reader(reader.checkpoint, windows="other")


# Names that have letters, marks, emoji, surrogates and controls, and words of the vocabulary.
TEXT = st.text() | st.lists(
    st.sampled_from(["ship", "e\u0301", "\u4e2d", "\x00", " ", "[CLS]"])
).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=10, max_size=10))
def test_any_text_gives_pieces_of_its_context(small, pairs):
    """10,000 random Unicode strings, as questions and as contexts."""
    for (_, context), found in zip(pairs, small.answers(pairs, top_k=3), strict=True):
        for one in found:
            assert context[one.start : one.end] == one.text


def test_questions_of_every_length_are_answered(small, reader):
    lengths = [*range(0, 64), *range(64, 2001, 121), 2000]
    pairs = [(" ".join(["ship"] * n), CONTEXT) for n in lengths]
    for loaded in (small, reader):
        for n, found in zip(lengths, loaded.answers(pairs), strict=True):
            limit = features.question_limit(loaded.max_length, loaded.doc_stride)
            assert (found.error is None) == (n > 0)
            assert found.question_cut == (n > limit)
            assert all(CONTEXT[one.start : one.end] == one.text for one in found)


@pytest.mark.parametrize("size", [1, 1_000, 100_000, 1_000_000])
def test_contexts_up_to_a_megabyte_are_answered(reader, size):
    # Words of 150 letters are a token each, so that the megabyte is not an hour of computing.
    filler = (f"It is a {'x' * 150}. " * (size // 158 + 1))[: max(size - len(CONTEXT), 0)]
    context = (filler + CONTEXT)[-size:] if size > 1 else "x"
    found = reader.answer(QUESTION, context)
    assert all(context[one.start : one.end] == one.text for one in found)
    assert len(context) == size
    if size >= 1_000:
        assert found[0].text == "dried fish"


def test_chunks_have_a_bounded_number_of_records_and_characters(monkeypatch):
    assert list(chunks("abcdefg", 3, size_of=len)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    monkeypatch.setattr("flaxqa.reader.CHARACTERS_PER_CHUNK", 5)
    texts = ["aa", "bb", "cc", "ddddddd", "e"]
    assert list(chunks(texts, 9, size_of=len)) == [["aa", "bb"], ["cc"], ["ddddddd"], ["e"]]
    assert list(chunks([], size_of=len)) == []


def test_the_public_names_are_there():
    for name in flaxqa.__all__:
        assert getattr(flaxqa, name) is not None
    assert flaxqa.pipeline is flaxqa.pipeline  # the function, also the second time
    assert callable(flaxqa.pipeline)


def test_the_collector_is_left_as_it_was(reader):
    """While answers stream, what was there before is not looked through; afterwards it is again."""
    assert gc.get_freeze_count() == 0
    stream = reader.answers([(QUESTION, CONTEXT)] * 3, chunk_size=2)
    next(stream)
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    other = reader.answers([(QUESTION, CONTEXT)] * 2)
    assert len(list(other)) == 2  # inside of another stream nothing is changed
    assert gc.get_freeze_count() > 0.99 * frozen  # a few of them are gone by now
    stream.close()
    assert gc.get_freeze_count() == 0
    gc.freeze()  # somebody else's stay
    try:
        reader.answer(QUESTION, CONTEXT)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_a_panic_of_the_tokenizer_is_an_error_of_its_row(reader, monkeypatch):
    class PanicException(BaseException):
        pass

    real = features.make

    def make(examples, *args, **options):
        if any("boom" in example.question for example in examples):
            raise PanicException("called `Result::unwrap()`")
        return real(examples, *args, **options)

    monkeypatch.setattr(features, "make", make)
    rows = [("who?", "It is Bob."), ("boom?", "It is Bob."), ("", "x"), ("what?", "It is Bob.")]
    found = list(reader.answers(rows))
    assert [one.error for one in found] == [
        None, "the tokenizer fails: called `Result::unwrap()`", "the question is empty", None,
    ]  # fmt: skip
    assert found[0]
    assert found[3]
