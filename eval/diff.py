"""Two evaluations of the same questions: is the second better or worse, beyond chance?

Differences are the second run less the first, in percent, paired by question: 95 % bootstrap
intervals, and McNemar's exact test of the exact matches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxqa.errors import DataError, all_problems

from . import runs, squad
from .examples import Examples
from .groups import Grouping

SHOWN = 3  # questions of each way in which two runs differ
# What a run.json has that differs from run to run, or says where something lies.
LEFT_OUT = ("config.output", "model.directory", "shapes", "started", "finished", "commit",
            "data.questions_sha256", "environment")  # fmt: skip


def refuse_others(first: Examples, second: Examples) -> None:
    """Raises: DataError: the runs are not of the same questions; says how they differ."""
    one, other = ({each.id: each for each in run.questions} for run in (first, second))
    problems = []
    for run, own, theirs in ((first, one, other), (second, other, one)):
        if alone := [name for name in own if name not in theirs]:
            some = ", ".join(map(repr, alone[:SHOWN]))
            problems.append(
                f"{len(alone):,} of the {len(own):,} questions of {run.directory} are not in the "
                f"other run: {some}{', ...' if len(alone) > SHOWN else ''}"
            )
    for field in ("question", "context", "answers"):
        changed = [name for name in one if name in other
                   and getattr(one[name], field) != getattr(other[name], field)]  # fmt: skip
        if changed:
            some = ", ".join(map(repr, changed[:SHOWN]))
            problems.append(f"{len(changed):,} questions have another {field}: {some}"
                            f"{', ...' if len(changed) > SHOWN else ''}")  # fmt: skip
    if first.v2 != second.v2:
        problems.append("one run is scored as SQuAD 2.0, the other as v1.1")
    if problems:
        raise DataError(all_problems(
            f"{first.directory} and {second.directory} are not of the same questions, so they "
            "cannot be compared", problems,
        ))  # fmt: skip


def difference(
    first: Examples, second: Examples, groupings: Sequence[Grouping] = ()
) -> dict[str, Any]:
    """How two runs differ, as `flaxqa diff` prints it.

    Raises:
      DataError: they are not of the same questions.
    """
    refuse_others(first, second)
    place = {name: index for index, name in enumerate(second.scores.ids)}
    order = np.array([place[name] for name in first.scores.ids])
    values = {
        name: (own.astype(float), second.scores.values[name][order].astype(float))
        for name, own in first.scores.values.items()
    }
    every = np.ones(len(order), bool)
    groups = {
        grouping.title: [
            {"group": label, "questions": int(chosen.sum()), **compared(values, chosen)}
            for label, chosen in grouping.masks(first.questions).items()
        ]
        for grouping in groupings
    }
    before, after = values["exact_match"]
    ids = np.array(first.scores.ids, object)
    won, lost = ids[after > before].tolist(), ids[after < before].tolist()
    found = {
        "runs": [str(run.directory) for run in (first, second)],
        "questions": len(order),
        "scores": compared(values, every),
        "mcnemar": {"won": len(won), "lost": len(lost), "p": mcnemar(len(won), len(lost))},
        "won": won,
        "lost": lost,
        "groups": groups,
    }
    return found | {"worse": worse(found["scores"])}


def compared(
    values: Mapping[str, tuple[np.ndarray, np.ndarray]], chosen: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Of each metric the means of both over some questions, and their difference."""
    return {
        name: {
            "first": 100.0 * float(before[chosen].mean()),
            "second": 100.0 * float(after[chosen].mean()),
            **squad.difference_interval(after[chosen], before[chosen]),
        }
        for name, (before, after) in values.items()
    }


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p of McNemar's exact test: of so many that changed, that unequal a split."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def worse(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics of which the whole 95 % interval of the difference is below 0."""
    return [name for name, one in scores.items() if one["difference_interval"][1] < 0]


def settings(first: runs.Run, second: runs.Run) -> list[tuple[str, Any, Any]]:
    """What differs in how two runs were made: the field, and its value in each."""
    one, other = flat(first.about), flat(second.about)
    return [
        (name, one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name) and not name.startswith(LEFT_OUT)
    ]


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested objects by dotted names."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


# ----------------------------------------------------------------------------------------- in words


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What one would say of it."""
    test = found["mcnemar"]
    n = test["won"] + test["lost"]
    said = [
        f"By exact match the second run wins {test['won']:,} questions and loses {test['lost']:,} "
        f"of {found['questions']:,}; McNemar's exact p is {test['p']:.3g}."
        if n
        else f"By exact match both have the same of the {found['questions']:,} questions right."
    ]
    better = [name for name, one in found["scores"].items() if one["difference_interval"][0] > 0]
    for names, word in ((found["worse"], "worse"), (better, "better")):
        if names:
            labels = " and ".join(squad.METRICS[name].label for name in names)
            said.append(f"Beyond chance the second run is {word} by {labels}.")
    if len(said) == 1:
        said.append("The differences may be chance.")
    return said


def as_text(found: Mapping[str, Any], changed: Sequence[tuple[str, Any, Any]]) -> str:
    """A summary for a terminal."""

    def apart(one: Mapping[str, Any]) -> str:
        low, high = one["difference_interval"]
        return f"{one['difference']:+.2f} ({low:+.2f} to {high:+.2f})"

    out = [f"{found['runs'][1]} less {found['runs'][0]}, {found['questions']:,} questions"]
    for name, one in found["scores"].items():
        label = squad.METRICS[name].label
        out.append(f"{label} {one['first']:.2f} to {one['second']:.2f}: {apart(one)}")
    out += sentences(found)
    for title, rows in found["groups"].items():
        out.append(f"by {title}:")
        width = max(len(row["group"]) for row in rows)
        for row in rows:
            scores = "   ".join(f"{squad.METRICS[name].label} {apart(row[name])}"
                                for name in found["scores"])  # fmt: skip
            out.append(f"  {row['group']:{width}} {row['questions']:>7,}   {scores}")
    if changed:
        out.append("what was set otherwise:")
        out += [f"  {name}: {before} to {after}" for name, before, after in changed]
    return "\n".join(out)
