"""Every question of one or several evaluations, as the page's script and its tables show them."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import mistakes
from .examples import Examples
from .groups import Grouping
from .questions import SquadExample

MOST = 12_000  # questions
BYTES = 23_000_000  # of the questions: what the script reads, and the table without it
LONGEST_CONTEXT = 20_000  # characters that are shown whole
AROUND = (None, 2_000, 400, 100)  # characters around answers, fewer until all fits; first all
LONGEST_TEXT = 1_000  # characters of a question or an answer
CANDIDATES = 5
DIGITS = 4  # of scores
CELL = 24  # bytes of the tags of one


@dataclasses.dataclass
class Asked:
    """One question, with its place in each run; None where that run did not have it."""

    question: SquadExample
    places: list[int | None]


def joined(runs: Sequence[Examples]) -> list[Asked]:
    """The questions of all runs, each once: those of one run that others have alike together."""
    found: dict[tuple[Any, ...], Asked] = {}
    for number, run in enumerate(runs):
        for place, one in enumerate(run.questions):
            key = one.id, one.question, one.context, one.answers
            asked = found.setdefault(key, Asked(one, [None] * len(runs)))
            asked.places[number] = place
    return list(found.values())


def chosen(asked: Sequence[Asked], runs: Sequence[Examples], most: int = MOST) -> list[Asked]:
    """At most so many: those that some run has wrong come first, the order stays."""
    if len(asked) <= most:
        return list(asked)
    rights = [run.right for run in runs]

    def wrong(one: Asked) -> bool:
        return any(place is not None and not right[place]
                   for place, right in zip(one.places, rights, strict=True))  # fmt: skip

    order = sorted(range(len(asked)), key=lambda index: not wrong(asked[index]))
    return [asked[index] for index in sorted(order[:most])]


def payload(runs: Sequence[Examples], groupings: Sequence[Grouping]) -> dict[str, Any]:
    """What the script reads: of each question all that is shown, small enough for a page."""
    every = joined(runs)
    shown, steps = chosen(every, runs), iter(AROUND)
    candidates = [run.candidates() for run in runs]
    around: int | None = next(steps)
    while True:
        made = content(shown, runs, groupings, candidates, around)
        made["left_out"] = len(every) - len(shown)
        size = weight(made)
        if size <= BYTES or len(shown) == 1:
            return made
        if around == AROUND[-1]:
            shown = chosen(shown, runs, max(int(0.95 * len(shown) * BYTES / size), 1))
        around = next(steps, around)


def weight(made: Mapping[str, Any]) -> int:
    """About how many bytes the questions take on the page."""
    table = sum(
        len(html.escape(cell).encode()) + CELL for row in rows(made) for cell in (row[0], *row)
    )
    return len(as_script(made)) + table


def as_script(made: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element, whatever is in it."""
    text = json.dumps(made, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def content(
    shown: Sequence[Asked],
    runs: Sequence[Examples],
    groupings: Sequence[Grouping],
    candidates: Sequence[Mapping[str, Any]],
    around: int | None,
) -> dict[str, Any]:
    """The questions with so many characters of their contexts around answers."""
    contexts: dict[str, int] = {}
    orders = [{label: place for place, label in enumerate(one.order)} for one in groupings]
    questions = []
    for asked in shown:
        one = asked.question
        golds = mistakes.places(one)
        tops = [
            [(each["start"], each["end"], each["score"], each["text"])
             for each in (of.get(one.id) or ())[:CANDIDATES]] if place is not None else []
            for place, of in zip(asked.places, candidates, strict=True)
        ]  # fmt: skip
        spans = [place for place, _ in golds]
        spans += [found[0][:2] for found in tops if found]
        piece = Piece(one.context, spans, around)
        questions.append({
            "i": one.id, "q": cut(one.question),
            "c": contexts.setdefault(piece.text, len(contexts)),
            "m": int(piece.begin > 0) + 2 * int(piece.end < len(one.context)),
            "a": list(map(cut, one.answers)),
            "s": [piece.place(*place) for place, _ in golds],
            "l": len(one.context),
            "g": [order[grouping.of(one)]
                  for grouping, order in zip(groupings, orders, strict=True)],
            "r": [0 if place is None else result(run, place, piece, found)
                  for run, place, found in zip(runs, asked.places, tops, strict=True)],
        })  # fmt: skip
    return {
        "runs": [run.name for run in runs],
        "kinds": list(mistakes.KINDS.items()),
        "groups": [[one.title, list(one.order)] for one in groupings],
        "contexts": list(contexts),
        "questions": questions,
        "v2": any(run.v2 for run in runs),
    }


def result(
    run: Examples, place: int, piece: Piece, candidates: Sequence[tuple[int, int, float, str]]
) -> list[Any]:
    """What a run has of a question: prediction, EM, F1, kind, score, windows, and so on."""
    kind, span, text = run.mistakes[place], run.spans[place], run.predictions[place]
    odds = run.null_odds[place]
    return [
        None if text is None else cut(text),
        piece.place(*span) if span and text else None,
        int(run.scores.values["exact_match"][place]),
        round(float(run.scores.values["f1"][place]), DIGITS),
        -1 if kind is None else list(mistakes.KINDS).index(kind),
        None if np.isnan(run.score[place]) else round(float(run.score[place]), DIGITS),
        run.n_windows[place],
        int(run.question_cut[place]),
        [[*(piece.place(begin, end) or (-1, -1)), round(score, DIGITS),
          *(() if piece.place(begin, end) else (cut(text),))]
         for begin, end, score, text in candidates],
        round(float(odds), DIGITS) if run.v2 and np.isfinite(odds) else None,
        run.errors[place],
    ]  # fmt: skip


class Piece:
    """The part of a context that is shown.

    Attributes:
      begin: its first character, in code points.
      end: the one after its last.
      text: of it.
    """

    def __init__(self, context: str, spans: Sequence[tuple[int, int]], around: int | None):
        self.begin, self.end = 0, len(context)
        if around is None and self.end > LONGEST_CONTEXT:
            around = AROUND[1]
        if around is not None and self.end > 2 * around:
            first = min((begin for begin, _ in spans), default=0)
            last = max((end for _, end in spans), default=0)
            self.begin = max(first - around, 0)
            self.end = min(last + around, self.begin + 4 * around, self.end)
        self.text = context[self.begin : self.end]
        # Where JavaScript counts two for one character.
        self.before = None
        if not self.text.isascii():
            wide = np.array([ord(character) > 0xFFFF for character in self.text], bool)
            self.before = np.cumsum(np.append(0, wide))

    def place(self, begin: int, end: int) -> tuple[int, int] | None:
        """A span as JavaScript counts, from the beginning of the piece; None outside of it."""
        begin, end = begin - self.begin, end - self.begin
        if begin < 0 or end > len(self.text):
            return None
        if self.before is None:
            return begin, end
        return begin + int(self.before[begin]), end + int(self.before[end])


def cut(text: str) -> str:
    """The beginning of a text that is too long to be shown."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def rows(made: Mapping[str, Any]) -> Iterator[list[str]]:
    """The questions as rows of a table, for a browser without JavaScript."""
    kinds = [label for _, label in made["kinds"]]
    for one in made["questions"]:
        row = [one["i"], one["q"], " | ".join(dict.fromkeys(one["a"])) or "no answer"]
        for found in one["r"]:
            if not found:
                row += ["not asked", "", ""]
                continue
            text = found[0] if found[0] is not None else f"set aside: {found[10]}"
            told = "right" if found[2] else f"F1 {100 * found[3]:.0f}"
            kind = f", {kinds[found[4]]}" if found[4] >= 0 else ""
            row += [text or "no answer", told + kind, "" if found[5] is None else f"{found[5]:.2f}"]
        yield row
