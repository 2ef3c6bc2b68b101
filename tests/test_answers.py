import dataclasses
import math

import numpy as np
import pytest

from flaxqa import answers
from flaxqa.features import Example, Feature
from flaxqa.spans import Logits, Scores
from flaxqa.tokens import Places, Tokens


def window(example, question_tokens, offsets, words=None, counts=None):
    """A window whose context tokens lie where `offsets` say, each a word unless `words` says."""
    before, n = question_tokens + 2, len(offsets)
    ids = np.full(before + n + 1, 7, np.int32)
    ids[0] = 1
    words = np.arange(n) if words is None else np.array(words)
    places = Places(np.array(offsets, np.int32).reshape(-1, 2), words)
    context = Tokens(ids[before:-1], places=places)
    return Feature(example, ids, before, context, slice(0, n), False, counts)


def random_case(rng, n_examples=12, context=60):
    """Examples of one to three windows over letters, one character a token."""
    examples, features, logits = [], [], []
    for index in range(n_examples):
        examples.append(Example(str(index), "q", "x" * context))
        for start in range(0, int(rng.integers(1, 4)) * 10, 10):
            tokens = int(rng.integers(1, 40))
            offsets = [(i, i + 1) for i in range(start, min(start + tokens, context))]
            features.append(window(index, int(rng.integers(1, 6)), offsets))
            size = len(features[-1])
            logits.append(Logits(*rng.normal(size=(2, size)).astype(np.float32) * 3))
    return examples, features, logits


def run_qa_rule(feature_logits, n_best, max_answer_length):
    """The rule written out: (score, start, end, start_logit, end_logit) of pairs, best first."""
    pairs = []
    for feature, scores in feature_logits:
        begin, stop = feature.context_start, feature.context_start + len(feature.offsets)
        starts = sorted(range(len(feature)), key=lambda i: -scores.start[i])[:n_best]
        ends = sorted(range(len(feature)), key=lambda i: -scores.end[i])[:n_best]
        for i in starts:
            for j in ends:
                if not (begin <= i < stop and begin <= j < stop):
                    continue
                if j < i or j - i + 1 > max_answer_length:
                    continue
                pairs.append(
                    (
                        scores.start[i] + scores.end[j],
                        int(feature.offsets[i - begin][0]),
                        int(feature.offsets[j - begin][1]),
                        float(scores.start[i]),
                        float(scores.end[j]),
                    )
                )
    return sorted(pairs, key=lambda pair: -pair[0])[:n_best]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (3, 4), (1, 1)])
def test_the_answers_are_those_of_run_qas_rule(seed, n_best, longest):
    examples, features, logits = random_case(np.random.default_rng(seed))
    found = answers.decode_squad(
        examples, features, logits, n_best=n_best, max_answer_length=longest
    )
    for index, example in enumerate(examples):
        own = [(f, x) for f, x in zip(features, logits, strict=True) if f.example == index]
        expected = run_qa_rule(own, n_best, longest)
        got = [(a.start, a.end, a.start_logit, a.end_logit) for a in found[index]]
        assert got == [pair[1:] for pair in expected]
        assert all(a.text == example.context[a.start : a.end] for a in found[index])
        sums = np.array([pair[3] + pair[4] for pair in expected], np.float64)
        softmax = np.exp(sums - sums.max(initial=0)) / np.exp(sums - sums.max(initial=0)).sum()
        np.testing.assert_allclose(answers.probabilities(found[index]), softmax, rtol=1e-6)


def test_the_score_is_a_probability_over_all_windows_and_cls():
    examples, features, logits = random_case(np.random.default_rng(3))
    found = answers.decode_squad(examples, features, logits)
    for index in range(len(examples)):
        own = [(f, x) for f, x in zip(features, logits, strict=True) if f.example == index]
        totals = [0.0, 0.0]
        for feature, scores in own:
            inside = [0, *range(feature.context_start, len(feature) - 1)]
            totals[0] += sum(math.exp(scores.start[i]) for i in inside)
            totals[1] += sum(math.exp(scores.end[i]) for i in inside)
        for answer in found[index]:
            expected = (
                math.exp(answer.start_logit) / totals[0] * math.exp(answer.end_logit) / totals[1]
            )
            assert answer.score == pytest.approx(expected, rel=1e-5)
            assert 0 <= answer.score <= 1


def test_equal_logits_are_ordered_by_position():
    feature = window(0, 1, [(i, i + 1) for i in range(6)])
    flat = Logits(np.zeros(len(feature), np.float32), np.zeros(len(feature), np.float32))
    (found,) = answers.decode_squad([Example("1", "q", "abcdef")], [feature], [flat])
    assert [a.text for a in found[:3]] == ["a", "ab", "abc"]


def test_a_window_of_another_length_changes_no_other_examples_answer():
    examples, features, logits = random_case(np.random.default_rng(5), n_examples=4)
    alone = answers.decode_squad(examples[:1], *zip_first(features, logits))
    assert answers.decode_squad(examples, features, logits)[0] == alone[0]


def zip_first(features, logits):
    kept = [i for i, feature in enumerate(features) if feature.example == 0]
    return [features[i] for i in kept], [logits[i] for i in kept]


def test_where_no_pair_counts_there_is_no_answer():
    nothing = window(0, 3, [])
    backwards = window(1, 1, [(0, 1), (1, 2)])
    scores = np.zeros(len(backwards), np.float32)
    logits = [
        Logits(np.zeros(len(nothing), np.float32), np.zeros(len(nothing), np.float32)),
        Logits(scores + np.eye(6, dtype=np.float32)[4], scores + np.eye(6, dtype=np.float32)[3]),
    ]
    examples = [Example("1", "q", "?"), Example("2", "q", "ab"), Example("3", "q", "c")]
    found = answers.decode_squad(examples, [nothing, backwards], logits, n_best=1)
    assert found == [[], [], []]
    assert answers.decode_squad(examples, [], []) == [[], [], []]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_by_example(value):
    examples, features, logits = random_case(np.random.default_rng(1), n_examples=3)
    logits[-1].end[2] = value
    assert np.flatnonzero(~Scores.of(logits).finite()).tolist() == [len(logits) - 1]
    with pytest.raises(ValueError, match=r"not finite for \['2'\]"):
        answers.decode_squad(examples, features, logits)


@pytest.mark.parametrize("limits", [{"n_best": 0}, {"max_answer_length": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="must be >= 1"):
        answers.decode_squad([], [], [], **limits)


# ------------------------------------------------------------------------------------------- spans


def brute_force(examples, features, logits, top_k, longest, overlapping):
    """The reader's rule written out: every span of every window, best first, none twice."""
    found = []
    for index in range(len(examples)):
        spans = []
        for feature, scores in zip(features, logits, strict=True):
            if feature.example != index:
                continue
            begin, size = feature.context_start, len(feature.offsets)
            base, words = feature.part.start, feature.context.places.words.tolist()
            for i in range(size):
                if feature.counts is not None and not feature.counts[i]:
                    continue
                for j in range(i, min(i + longest, size)):
                    total = float(scores.start[begin + i]) + float(scores.end[begin + j])
                    # A token is a character: the word's first and last are its place.
                    start = words.index(words[base + i])
                    end = len(words) - words[::-1].index(words[base + j])
                    spans.append((total, start, end))
        kept = []
        for total, start, end in sorted(spans, key=lambda span: -span[0]):
            if overlapping:
                there = any((start, end) == one[1:] for one in kept)
            else:
                there = any(start < one[2] and one[1] < end for one in kept)
            if not there:
                kept.append((total, start, end))
        found.append(kept[:top_k])
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(("top_k", "longest"), [(1, 30), (3, 5), (10, 30), (60, 4)])
def test_the_spans_are_those_of_searching_every_one(seed, overlapping, top_k, longest):
    rng = np.random.default_rng(seed)
    examples, features, logits = random_case(rng, n_examples=8)
    characters = np.arange(60)
    contexts = []
    for _ in examples:
        words = np.cumsum(rng.random(60) < 0.6) if seed % 2 else characters
        places = Places(np.stack((characters, characters + 1), 1), words)
        contexts.append(Tokens(characters, places=places))
    for row, feature in enumerate(features):
        start, stop = int(feature.offsets[0, 0]), int(feature.offsets[-1, 1])
        features[row] = dataclasses.replace(
            feature,
            context=contexts[feature.example],
            part=slice(start, stop),
            counts=rng.random(stop - start) < 0.7 if seed == 5 else None,
        )
    options = {"max_answer_length": longest, "overlapping": overlapping}
    found = answers.decode_spans(examples, features, logits, top_k=top_k, **options)
    expected = brute_force(examples, features, logits, top_k, longest, overlapping)
    for example, got, wanted in zip(examples, found, expected, strict=True):
        assert [(one.start, one.end) for one in got] == [span[1:] for span in wanted]
        sums = [one.start_logit + one.end_logit for one in got]
        np.testing.assert_allclose(sums, [span[0] for span in wanted], atol=1e-6)
        assert all(one.text == example.context[one.start : one.end] for one in got)
    every = answers.decode_spans(examples, features, logits, top_k=80, **options)
    assert [one[:top_k] for one in every] == [list(one) for one in found]


@pytest.mark.parametrize("overlapping", [False, True])
def test_spans_of_equal_sums_come_in_order_whatever_top_k_is(overlapping):
    features = [window(0, 1, [(i, i + 1) for i in range(6)]) for _ in range(2)]
    flat = [Logits(*np.zeros((2, len(features[0])), np.float32))] * 2
    example = Example("1", "q", "abcdef")
    every = answers.decode_spans([example], features, flat, top_k=30, overlapping=overlapping)[0]
    expected = list("abcdef") if not overlapping else ["a", "ab", "abc"]
    assert [one.text for one in every][: len(expected)] == expected
    for top_k in range(1, 22):
        (found,) = answers.decode_spans(
            [example], features, flat, top_k=top_k, overlapping=overlapping
        )
        assert found == every[:top_k]


def test_an_answer_begins_only_in_the_window_with_the_most_context():
    """The `mlperf` cutting: the second window has the higher logits, the first one may answer."""
    offsets = [(i, i + 1) for i in range(4)]
    shown = np.array([True, True, True, True])
    features = [window(0, 1, offsets, counts=shown), window(0, 1, offsets, counts=~shown)]
    logits = [Logits(*np.full((2, 8), value, np.float32)) for value in (0.0, 5.0)]
    logits[0].start[4] = 1
    example = Example("1", "q", "abcd")
    for decode in (answers.decode_spans, answers.decode_squad):
        (found,) = decode([example], features, logits)
        assert (found[0].text, found[0].start_logit) == ("b", 1.0)


def test_null_odds_are_those_of_run_qa():
    """The lowest sum of [CLS]'s logits in any window, less the best span's."""
    features = [window(0, 1, [(0, 1)]), window(0, 1, [(1, 2)]), window(2, 1, [])]
    logits = [Logits(*np.zeros((2, len(feature)), np.float32)) for feature in features]
    logits[0].start[0], logits[0].end[0] = 4, 3
    logits[1].start[0], logits[1].end[0] = 2, 1
    logits[1].start[3], logits[1].end[3] = 0.5, 0.25
    examples = [Example(str(i), "q", "ab") for i in range(3)]
    for decode in (answers.decode_spans, answers.decode_squad):
        found = decode(examples, features, logits)
        assert found[0][0].text == "b"
        assert found[0].null_odds == 3 - 0.75
        assert found[0].no_answer_score == pytest.approx(1 / (1 + math.exp(-2.25)))
        assert [one.null_odds for one in found[1:]] == [math.inf, math.inf]
        assert found[1].no_answer_score == 1.0


def test_limits_of_spans_below_one_are_refused():
    for limits in ({"top_k": 0}, {"max_answer_length": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            answers.decode_spans([], [], [], **limits)
    assert answers.decode_spans([Example("1", "q", "c")], [], []) == [[]]
