"""What kind of mistake an answer is, by fixed rules; docs/report.md has them in words.

The first kind that fits is the question's. What places a right answer has is taken from the data
where they tell it, else every place in the context with its text is one. Leading and trailing
spaces, punctuation and a leading article do not count where places are compared.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flaxqa import features
from flaxqa.features import Windows

from . import squad
from .questions import SquadExample

KINDS = {
    "question_cut": "the question's end was cut off",
    "out_of_reach": "no right answer is whole in one window, or short enough",
    "unanswered": "left unanswered",
    "unanswerable": "answered, but there is no answer",
    "too_long": "the right answer and more",
    "too_short": "a part of the right answer",
    "overlapping": "overlaps the right answer",
    "elsewhere": "the right words at another place",
    "same_type": "another date, number or name",
    "other": "nothing in common",
}
Span = tuple[int, int]  # characters, the second one past the end
MOST_PLACES = 50  # of a text whose place the data do not tell


class Prediction(NamedTuple):
    """What was answered to a question; an empty text is no answer.

    Attributes:
      text: of the answer.
      span: its characters in the context; None if they are not known.
      question_cut: whether the model did not see the question's end.
      reachable: whether any right answer could have been given; see `reachable`.
    """

    text: str
    span: Span | None = None
    question_cut: bool = False
    reachable: bool = True


def kind_of(question: SquadExample, given: Prediction) -> str | None:
    """The kind of mistake, one of KINDS; None where it is none."""
    golds = [gold for gold in question.answers if squad.normalize_answer(gold)]
    if golds:
        exact = any(squad.exact_match(given.text, gold) for gold in golds)
    else:
        exact = bool(question.answers) or not given.text
    if not exact and given.question_cut:
        return "question_cut"
    if not golds:
        return None if exact else "unanswerable"
    if not exact and not given.reachable:
        return "out_of_reach"
    if not given.text.strip():
        return "unanswered"
    return kind_of_answer(question, given, exact)


def kind_of_answer(question: SquadExample, given: Prediction, exact: bool) -> str | None:
    """The same, where something was answered and something is right."""
    context = question.context
    spans = [given.span] if given.span else [*places_of(context, given.text)]
    right = places(question)
    shared = [(trimmed(context, span), trimmed(context, place), text) for place, text in right
              for span in spans if overlap(span, place)]  # fmt: skip
    shared = [each for each in shared if overlap(each[0], each[1])]
    if shared:
        if exact:
            return None
        (begin, end), (first, last), _ = max(shared, key=lambda each: squad.f1(given.text, each[2]))
        if begin <= first and last <= end:
            return "too_long"
        return "too_short" if first <= begin and end <= last else "overlapping"
    more = any(in_a_row(gold, given.text) for gold in question.answers)
    less = any(in_a_row(given.text, gold) for gold in question.answers)
    if (more or less) and right and spans:
        return "elsewhere"
    if more or less:  # nothing tells that it is another place
        return None if exact else "too_long" if more else "too_short"
    type_of_own = {type_of(context, span) for span in spans} - {None}
    if type_of_own & {type_of(context, place) for place, _ in right}:
        return "same_type"
    return "other"


def overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def places(question: SquadExample) -> list[tuple[Span, str]]:
    """The places of the right answers in the context, each with its text."""
    found = []
    starts: Sequence[int | None] = question.starts or [None] * len(question.answers)
    for text, start in zip(question.answers, starts, strict=False):
        if not text:
            continue
        if start is not None and question.context[start : start + len(text)] == text:
            found.append(((start, start + len(text)), text))
        else:
            found += [(place, text) for place in places_of(question.context, text)]
    return found


def places_of(context: str, text: str) -> Iterator[Span]:
    """Where a text is in a context."""
    begin = context.find(text) if text else -1
    for _ in range(MOST_PLACES):
        if begin < 0:
            break
        yield begin, begin + len(text)
        begin = context.find(text, begin + 1)


def trimmed(context: str, span: Span) -> Span:
    """A span without what does not count at its ends; as it is if nothing is left."""
    text = context[span[0] : span[1]]
    body = ENDS.fullmatch(text)
    if body is None or not body["body"]:
        return span
    return span[0] + body.start("body"), span[0] + body.end("body")


EDGE = rf"[\s{re.escape(string.punctuation)}]*"
ENDS = re.compile(
    rf"{EDGE}(?:(?:a|an|the)\b(?!$){EDGE})?(?P<body>.*?){EDGE}", re.DOTALL | re.IGNORECASE
)


def in_a_row(part: str, whole: str) -> bool:
    """Whether the words of one text are in a row in another, after `squad.normalize_answer`."""
    part, whole = squad.normalize_answer(part), squad.normalize_answer(whole)
    return bool(part) and f" {part} " in f" {whole} "


# ------------------------------------------------------------------------------------------- types

MONTHS = (
    "january february march april may june july august september october november december"
).split()
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
NUMBERS = frozenset((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred hundreds thousand thousands million millions billion billions trillion trillions "
    "dozen dozens half third quarter first second fourth fifth sixth seventh eighth ninth tenth "
    "eleventh twelfth once twice"
).split())  # fmt: skip
# "May" and "March" are words, too: as a month they begin with a capital.
MONTH = re.compile(rf"\b(?:{'|'.join(each.capitalize() for each in (*MONTHS, *WEEKDAYS))})s?\b")
DATE = re.compile(
    r"(?<![\d.,$€£])(?:1\d|20)\d\d(?![\d%]|[.,]\d)"  # a year on its own
    r"|\b(?:\d\d)?\d0'?s\b|\b\w+(?:st|nd|rd|th)[ -]centur(?:y|ies)\b",
    re.IGNORECASE,
)
UNIT = re.compile(  # a number in front of what is counted is no year
    r"^\W*(?:people|men|women|miles|km|meters|metres|feet|tons|tonnes|students|years|percent|acres)"
)
SMALL = frozenset(
    "a an and at by da de del der des di du for from in la le of on or the to van von with".split()
)
WORD = re.compile(r"[^\W_]+(?:['\u2019.&-][^\W_]+)*")


def type_of(context: str, span: Span) -> str | None:
    """Whether a span is a date, a number or a name; None if it is neither."""
    text = context[span[0] : span[1]]
    years = [year for year in DATE.finditer(text) if not UNIT.match(text[year.end() :])]
    if years or MONTH.search(text):
        return "date"
    words = WORD.findall(text)
    if any(character.isdigit() for character in text) or any(
        part in NUMBERS for word in words for part in word.lower().split("-")
    ):
        return "number"
    large = [word for word in words if word.lower() not in SMALL]
    if not large or not all(word[0].isupper() for word in large):
        return None
    # One capital at the beginning of a sentence tells nothing.
    alone = len(large) == 1 and not any(character.isupper() for character in large[0][1:])
    return None if alone and begins_a_sentence(context, context.find(large[0], span[0])) else "name"


def begins_a_sentence(context: str, at: int) -> bool:
    before = re.sub(r"(?:\b(?:a|an|the)\s+)?$", "", context[max(at - 80, 0) : at], flags=re.I)
    before = before.rstrip(" \t\"'\u201c\u201d\u2018\u2019([\u00ab")
    return not before or before[-1] in ".?!:\n"


# ------------------------------------------------------------------------------------------- reach


def reachable(
    questions: Sequence[SquadExample], windows: Windows, max_answer_length: int
) -> list[bool]:
    """Of each question whether a window has a right answer whole, of no more than so many tokens.

    Args:
      questions: each with right answers.
      windows: of them, in their order.
      max_answer_length: in tokens.
    """
    found = [False] * len(questions)
    for at, index in enumerate(windows.example.tolist()):
        offsets = windows.contexts[at].places.offsets
        first = int(windows.first[at])
        stop = first + int(windows.lengths[at] - 1 - windows.context_start[at])
        counts = windows.counts.get(at)
        for place, _ in places(questions[index]) if not found[index] else ():
            if (tokens := features.covering(offsets, place)) is None:
                continue
            begin, last = tokens
            inside = first <= begin and last < stop and last - begin < max_answer_length
            found[index] |= inside and (counts is None or bool(counts[begin - first]))
    return found


# ------------------------------------------------------------------------------------------ shares


def shares(kinds: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """How often each kind is there, in the order of KINDS: its count, and its share in percent.

    The share is of all questions, with Wilson's 95 % interval.
    """
    found = {}
    for kind in KINDS:
        if n := sum(each == kind for each in kinds):
            found[kind] = {"questions": n, **share(n, len(kinds))}
    return found


def share(n: int, of: int) -> dict[str, Any]:
    """A share in percent with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    low, high = binomtest(n, of).proportion_ci(method="wilson")
    return {"share": 100.0 * n / of, "interval": (100.0 * float(low), 100.0 * float(high))}
