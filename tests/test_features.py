import itertools
import json
import re

import numpy as np
import pytest
import transformers
from conftest import QUICKSTART, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqa import features, tokens
from flaxqa.errors import DataError, UsageError
from flaxqa.eval import questions as dataset
from flaxqa.features import Example


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(QUICKSTART / "checkpoint")[0]


@pytest.fixture(scope="module")
def transformers_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(QUICKSTART / "checkpoint")


def check_against_transformers(examples, tokenizer, theirs, max_length=384, doc_stride=128):
    """Ids and offsets of every window are those of transformers' fast tokenizer."""
    ours = features.make(examples, tokenizer, max_length=max_length, doc_stride=doc_stride)
    expected = theirs(
        [example.question for example in examples],
        [example.context for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [feature.example for feature in ours] == expected["overflow_to_sample_mapping"]
    for index, feature in enumerate(ours):
        assert feature.input_ids.tolist() == expected["input_ids"][index]
        context = [i for i, part in enumerate(expected.sequence_ids(index)) if part == 1]
        offsets = [list(expected["offset_mapping"][index][i]) for i in context]
        assert feature.offsets.tolist() == offsets
        assert not context or context[0] == feature.context_start
    return ours


@pytest.mark.parametrize(("max_length", "doc_stride"), [(384, 128), (96, 32), (48, 0), (60, 20)])
def test_windows_are_those_of_transformers(
    tokenizer, transformers_tokenizer, max_length, doc_stride
):
    examples = dataset.read(QUICKSTART / "heldout.json").questions
    windows = check_against_transformers(
        examples, tokenizer, transformers_tokenizer, max_length, doc_stride
    )
    assert len(windows) > len(examples)
    assert max(map(len, windows)) == max_length


@pytest.mark.parametrize("words", [*range(118, 124), *range(370, 384)])
def test_a_context_at_the_border_of_a_window_is_cut_as_transformers_cuts_it(
    tokenizer, transformers_tokenizer, words
):
    example = Example("1", "Who is the mayor?", " ".join(["it"] * words))
    check_against_transformers([example], tokenizer, transformers_tokenizer)
    check_against_transformers([example], tokenizer, transformers_tokenizer, 128, 64)


def test_special_tokens_in_the_text_shift_no_window(tokenizer, transformers_tokenizer):
    context = "The [SEP] mayor [CLS] of [MASK] it [SEP] is Bob. " * 40
    (first, *_) = check_against_transformers(
        [Example("1", "Who [SEP] is?", context)], tokenizer, transformers_tokenizer
    )
    assert first.offsets[0].tolist() == [0, 3]


@pytest.mark.shared
def test_the_dev_set_has_10784_windows_exactly_as_transformers_makes_them():
    folder = SHARED / "checkpoints" / "distilbert-minilm-squad"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    examples = dataset.read(SHARED / "squad" / "dev-v1.1.json").questions
    windows = check_against_transformers(examples, tokens.load_tokenizer(folder)[0], theirs)
    assert len(windows) == 10_784
    assert sum(map(len, windows)) == 1_897_568


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1), st.text(min_size=1))
def test_offsets_are_code_points_of_the_original_text(question, context):
    tokenizer = tokens.load_tokenizer(QUICKSTART / "checkpoint")[0]
    example = Example("1", question, context)
    if features.why_unanswerable(example) is not None:
        return
    for feature in features.make([example], tokenizer, max_length=24, doc_stride=8):
        assert len(feature) <= 24
        assert len(feature) == feature.context_start + len(feature.offsets) + 1
        starts, ends = feature.offsets[:, 0], feature.offsets[:, 1]
        assert (starts >= 0).all()
        assert (starts <= ends).all()
        assert (ends <= len(context)).all()
        assert (np.diff(starts) >= 0).all()


def test_an_emoji_counts_as_one_character(tokenizer):
    example = Example("1", "Who?", "\U0001f600\U0001f600 the mayor")
    (feature,) = features.make([example], tokenizer)
    assert [example.context[a:b] for a, b in feature.offsets.tolist()][-2:] == ["the", "mayor"]


def test_a_question_too_long_is_cut_by_the_stated_rule(tokenizer, transformers_tokenizer):
    limit = features.question_limit(384, 128)
    assert limit == 189
    context = " ".join(["it"] * 800)
    whole = Example("1", " ".join(["who"] * limit), context)
    longer = Example("2", " ".join(["who"] * 2000), context)
    windows = check_against_transformers([whole], tokenizer, transformers_tokenizer)
    cut = features.make([longer], tokenizer)
    assert not any(window.question_cut for window in windows)
    assert all(window.question_cut for window in cut)
    assert [w.input_ids.tolist() for w in cut] == [w.input_ids.tolist() for w in windows]


@pytest.mark.parametrize("words", range(0, 2000, 97))
def test_questions_of_every_length_make_windows_that_advance(tokenizer, words):
    example = Example("1", " ".join(["who"] * words) or "?", " ".join(["it"] * 3000))
    windows = features.make([example], tokenizer)
    assert len(windows) <= 3000 / 64 + 1
    covered = np.unique(np.concatenate([window.offsets[:, 0] for window in windows]))
    assert len(covered) == 3000


def test_a_context_of_a_megabyte_is_covered(tokenizer):
    context = "it is the mayor. " * 60_000
    windows = features.make([Example("1", "Who?", context)], tokenizer)
    assert windows[-1].offsets[-1].tolist() == [len(context) - 2, len(context) - 1]
    assert len(windows) == -(-(300_000 - 128) // (384 - 3 - 2 - 128))


@pytest.mark.parametrize(
    ("question", "context", "reason"),
    [
        ("", "Bob", "the question is empty"),
        (" \n", "Bob", "the question is blank"),
        ("Who?", "", "the context is empty"),
        ("Who?", "\u2003", "the context is blank"),
        ("Who?", "ab\ud800", r"lone surrogate, U\+D800, at character 2"),
        ("\udfff", "Bob", r"the question has a lone surrogate, U\+DFFF, at character 0"),
    ],
)
def test_an_example_that_cannot_be_asked_is_named(tokenizer, question, context, reason):
    example = Example("seven", question, context)
    assert re.search(reason, features.why_unanswerable(example))
    if "surrogate" in reason:
        with pytest.raises(DataError, match=f"'seven'.*{reason}"):
            features.make([example], tokenizer)
    else:
        assert len(features.make([example], tokenizer)) == 1


def test_a_context_that_comes_again_in_the_next_call_is_not_tokenized_again(tokenizer):
    known = {}
    (first,) = features.make([Example("1", "Who?", "Bob.")], tokenizer, known=known)
    assert sorted(known) == ["Bob."]
    (second,) = features.make([Example("2", "What?", "Bob.")], tokenizer, known=known)
    assert second.context is first.context
    assert sorted(known) == ["Bob."]


def test_a_question_that_leaves_no_room_is_named(tokenizer):
    long, short = Example("long", "who " * 200, "it " * 300), Example("short", "who", "it " * 300)
    fits = Example("fits", "who " * 200, "it")
    with pytest.raises(DataError, match="'long': a question of 200 tokens leaves no room"):
        features.make([short, long], tokenizer, max_length=256, max_question_length=256)
    assert len(features.make([fits], tokenizer, max_length=256, max_question_length=256)) == 1


# ------------------------------------------------------------------------------------------ mlperf


def run_squad_windows(length, size, stride):
    """BERT's run_squad.py written out: (start, end) of the windows and who owns each token."""
    spans, start = [], 0
    while start < length:
        end = min(start + size, length)
        spans.append((start, end))
        if end == length:
            break
        start += min(end - start, stride)
    owners = []
    for token in range(length):
        scores = [
            min(token - a, b - 1 - token) + 0.01 * (b - a) if a <= token < b else -1
            for a, b in spans
        ]
        owners.append(scores.index(max(scores)))
    return spans, owners


# The last one has windows of lengths so different that the hundredths of a length decide.
@pytest.mark.parametrize(
    ("length", "size", "stride"),
    [
        *itertools.product((1, 40, 41, 90, 97, 200), (40,), (1, 7, 20, 40, 90)),
        (700, 317, 128),
        (650, 317, 300),
    ],
)
def test_mlperf_windows_are_those_of_run_squad(tokenizer, length, size, stride):
    example = Example("1", "who " * 80, "it " * length)
    windows = features.make(
        [example], tokenizer, max_length=64 + 3 + size, doc_stride=stride, windows="mlperf"
    )
    spans, owners = run_squad_windows(length, size, stride)
    assert [(w.part.start, w.part.stop) for w in windows] == spans
    for index, (window, (start, end)) in enumerate(zip(windows, spans, strict=True)):
        assert window.question_cut
        assert window.context_start == 64 + 2
        counts = np.ones(end - start, bool) if window.counts is None else window.counts
        assert counts.tolist() == [owners[t] == index for t in range(start, end)]


@pytest.mark.shared
def test_the_dev_set_has_10833_windows_in_the_mlperf_cutting():
    examples = dataset.read(SHARED / "squad" / "dev-v1.1.json").questions
    tokenizer, _ = tokens.load_tokenizer(SHARED / "checkpoints" / "distilbert-minilm-squad")
    assert len(features.make(examples, tokenizer, windows="mlperf")) == 10_833


def test_an_unknown_way_of_cutting_is_refused(tokenizer):
    with pytest.raises(UsageError, match="'bert' is neither 'overlap' nor 'mlperf'"):
        features.make([], tokenizer, windows="bert")
    with pytest.raises(UsageError, match="needs a stride of at least 1"):
        features.make([], tokenizer, windows="mlperf", doc_stride=0)


@pytest.mark.parametrize(("max_length", "doc_stride"), [(384, 378), (3, 0), (384, -1)])
def test_a_stride_that_leaves_no_room_is_refused(tokenizer, max_length, doc_stride):
    with pytest.raises(UsageError, match="the stride must be"):
        features.make([], tokenizer, max_length=max_length, doc_stride=doc_stride)


def test_truncation_and_padding_in_tokenizer_json_change_nothing(tokenizer, tmp_path):
    content = json.loads((QUICKSTART / "checkpoint" / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 16, "strategy": "OnlySecond", "stride": 4,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    spoilt = tokens.load_tokenizer(tmp_path)[0]
    examples = dataset.read(QUICKSTART / "heldout.json").questions[:50]
    for a, b in zip(
        features.make(examples, tokenizer), features.make(examples, spoilt), strict=True
    ):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.offsets.tolist() == b.offsets.tolist()
