"""Kinds of mistakes, beside 120 cases that were sorted by hand, the code unseen.

tests/mistakes.json has 60 invented ones whole, and the ids of 60 of SQuAD's. They were sorted by
the words of docs/report.md alone.
"""

import json
from pathlib import Path

import pytest
from conftest import QUICKSTART, SHARED

from flaxqa import checkpoint, features
from flaxqa.eval import mistakes, questions
from flaxqa.eval.questions import SquadExample

CASES = json.loads(Path(__file__).with_name("mistakes.json").read_text(encoding="utf-8"))
# "Mira took the boat": that this is a name, only a reader knows.
OTHERWISE = {31: "other"}


def question_of(case, name="1"):
    starts = tuple(one["start"] for one in case["answers"])
    golds = tuple(one["text"] for one in case["answers"])
    starts = () if None in starts else starts
    return SquadExample(name, case["question"], case["context"], golds, starts)


def kind_of(case):
    said = case["prediction"]
    span = (said["start"], said["end"]) if said else None
    given = mistakes.Prediction(
        said["text"] if said else "", span, case["question_cut"], case["reachable"]
    )
    return mistakes.kind_of(question_of(case), given)


@pytest.mark.parametrize("number", range(60))
def test_invented_cases_are_sorted_as_by_hand(number):
    case = CASES["invented"][number]
    assert kind_of(case) == OTHERWISE.get(number, case["kind"])


def test_every_kind_is_among_them():
    kinds = [case["kind"] for case in CASES["invented"]]
    assert len(kinds) == 60
    assert {*kinds} == {*mistakes.KINDS, None}


@pytest.mark.shared
def test_real_cases_are_sorted_as_by_hand():
    """Predictions of the small checkpoint by transformers' torch class."""
    asked = questions.read(SHARED / "squad" / "heldout-v1.1.json").questions
    said, spans = (
        json.loads((SHARED / "reference" / f"heldout_{name}.json").read_text())
        for name in ("predictions", "spans")
    )
    found = {
        one.id: mistakes.kind_of(one, mistakes.Prediction(said[one.id], tuple(spans[one.id][:2])))
        for one in asked
        if one.id in CASES["heldout"]
    }
    assert len(found) == 60
    assert found == CASES["heldout"]


def asked(context, *answers, starts=()):
    return SquadExample("1", "Who?", context, answers, starts)


def test_without_places_of_the_data_every_place_of_the_text_is_one():
    context = "Ada met Bo. Later Ada left."
    told = asked(context, "Ada", starts=(0,))
    assert mistakes.kind_of(told, mistakes.Prediction("Ada", (18, 21))) == "elsewhere"
    assert mistakes.kind_of(asked(context, "Ada"), mistakes.Prediction("Ada", (18, 21))) is None
    # A place that has another text is none.
    wrong = asked(context, "Ada", starts=(4,))
    assert mistakes.kind_of(wrong, mistakes.Prediction("Ada", (18, 21))) is None


def test_a_prediction_without_characters_is_looked_for():
    told = asked("Ada met Bo. Later Ada left.", "Ada", starts=(0,))
    assert mistakes.kind_of(told, mistakes.Prediction("Ada")) is None
    assert mistakes.kind_of(told, mistakes.Prediction("Later Ada")) == "elsewhere"
    assert mistakes.kind_of(told, mistakes.Prediction("Ada met")) == "too_long"


def test_without_a_context_the_words_decide():
    told = asked("", "Ada Lovelace")
    for text, kind in (("Ada Lovelace", None), ("Ada", "too_short"), ("Rome", "other"),
                       ("Countess Ada Lovelace", "too_long"), ("", "unanswered")):  # fmt: skip
        assert mistakes.kind_of(told, mistakes.Prediction(text)) == kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [("May 1914", "date"), ("in 1844", "date"), ("the 1960s", "date"), ("the 19th century", "date"),
     ("Monday", "date"), ("1200 tonnes", "number"), ("$1,500", "number"), ("12 percent", "number"),
     ("twenty-one", "number"), ("3.1415", "number"), ("1850.5", "number"),
     ("Bank of England", "name"), ("NATO", "name"), ("may be", None),
     ("of the", None), ("iron ore", None), ("Ada", None)],
)  # fmt: skip
def test_types_go_by_simple_rules(text, kind):
    assert mistakes.type_of(text, (0, len(text))) == kind


def test_a_capital_at_the_beginning_of_a_sentence_tells_nothing():
    context = "He saw it. Farmers came. In Rome Farmers stayed."
    assert mistakes.type_of(context, (11, 18)) is None
    assert mistakes.type_of(context, (28, 32)) == "name"
    assert mistakes.type_of(context, (33, 40)) == "name"


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load(QUICKSTART / "checkpoint").tokenizer


@pytest.mark.parametrize("kind", features.WINDOWS)
def test_out_of_reach_is_what_no_window_has_whole(tokenizer, kind):
    words = [f"w{number}" for number in range(60)]
    context = " ".join(words)

    def place(first, last):
        text = " ".join(words[first : last + 1])
        return asked(context, text, starts=(context.index(text),))

    every = [place(first, last) for first in range(0, 50, 3) for last in (first, first + 8)]
    sizes = {"max_length": 32, "doc_stride": 8} if kind == "overlap" else {
        "max_length": 80, "doc_stride": 60}  # fmt: skip
    windows = features.make(every, tokenizer, windows=kind, **sizes)
    found = mistakes.reachable(every, windows, 30)
    expected = []
    for index, one in enumerate(every):
        begin, there = one.starts[0], False
        for at, window in enumerate(windows):
            offsets = window.offsets
            first = [token for token, (a, b) in enumerate(offsets) if a <= begin < b]
            last = [token for token, (a, b) in enumerate(offsets)
                    if a < begin + len(one.answers[0]) <= b]  # fmt: skip
            if windows.example[at] == index and first and last:
                there |= window.counts is None or bool(window.counts[first[0]])
        expected.append(there)
    assert found == expected
    assert True in found
    assert False in found
    longer = every[1::2]  # of more than two tokens
    windows = features.make(longer, tokenizer, windows=kind, **sizes)
    assert not any(mistakes.reachable(longer, windows, 2))
    covered = [features.covering(windows.contexts[0].places.offsets, place)
               for one in longer for place, _ in mistakes.places(one)]  # fmt: skip
    sizes = [last - first + 1 for first, last in covered]
    most = max(size for size, there in zip(sizes, found[1::2], strict=True) if there)
    for limit in (most - 1, most):
        again = mistakes.reachable(longer, windows, limit)
        assert again == [there and size <= limit
                         for size, there in zip(sizes, found[1::2], strict=True)]  # fmt: skip


def test_shares_are_of_all_questions():
    found = mistakes.shares(["other", None, "too_long", "other"])
    assert list(found) == ["too_long", "other"]
    assert found["other"]["questions"] == 2
    assert found["other"]["share"] == 50.0
    # Wilson's interval by hand: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    z, n, p = 1.959963984540054, 4, 0.5
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    assert found["other"]["interval"] == pytest.approx(
        (100 * (middle - half), 100 * (middle + half))
    )
