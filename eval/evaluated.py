"""What evaluations say: their table, their mistakes, how far to trust them, groups, differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxqa import carbon

from . import calibration, diff, explorer, mistakes
from .examples import Examples
from .groups import Grouping
from .plots import NOTHING, bars, lines, number
from .runs import Run, last_part, names
from .squad import METRICS, Scores
from .summaries import pieces, scored, signed

EXAMPLES = 3  # of a kind of mistake
Table = tuple[list[str], list[list[Any]]]


def title(runs: Sequence[Run]) -> str:
    """What was evaluated, on what."""
    models = dict.fromkeys(last_part(run.about["config"]["model"]) for run in runs)
    data = dict.fromkeys(run.data.name for run in runs)
    many = f"{len(runs)} evaluations: " if len(runs) > 1 else ""
    return f"{many}{', '.join(models)} on {', '.join(data)}"


def table(runs: Sequence[Run]) -> Table:
    """A row each."""
    measured = any("carbon" in run.content for run in runs)
    v2 = any("HasAns_f1" in run.content or "NoAns_f1" in run.content for run in runs)
    trusted = any("calibration" in run.content for run in runs)
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        content, about = run.content, run.about
        total, every = int(content["total"]), int(about["data"]["questions"])
        rows.append([
            name, about["started"][:16].replace("T", " "),
            last_part(about["config"]["model"]), run.data.name, about["platform"]["dtype"],
            f"{total:,}" if total == every else f"first {total:,} of {every:,}",
            *(with_interval(content, one) for one in METRICS),
            *(kinds_of_2(content) if v2 else ()),
            *([ece(content.get("calibration", {}))] if trusted else ()),
            number(content["questions_per_second"]),
            *(carbon.cells(content.get("carbon")) if measured else ()),
        ])  # fmt: skip
    labels = [one.label for one in METRICS.values()]
    head = ["run", "started", "model", "data", "dtype", "questions", *labels]
    head += [f"{kind} {label}" for kind in ("HasAns", "NoAns") for label in labels] if v2 else []
    head += ["calibration error"] if trusted else []
    return [*head, "questions/s", *(carbon.CELLS if measured else ())], rows


def parted(head: list[str], rows: list[list[Any]]) -> tuple[list[tuple[str, str]], Table]:
    """The table without the columns that say the same of every run, and what those say.

    Scores stay in the table.
    """
    labels = tuple(one.label for one in METRICS.values())
    same = [place for place, name in enumerate(head) if place and not name.endswith(labels)
            and len({row[place] for row in rows}) == 1]  # fmt: skip
    left = [place for place in range(len(head)) if place not in same]
    table_left = [head[place] for place in left], [[row[p] for p in left] for row in rows]
    return [(head[place], rows[0][place]) for place in same], table_left


def kinds_of_2(content: Mapping[str, Any]) -> list[str]:
    """The scores of questions with and without an answer, of SQuAD 2.0."""
    fields = [f"{kind}_{one.official}" for kind in ("HasAns", "NoAns") for one in METRICS.values()]
    return [f"{content[name]:.2f}" if name in content else NOTHING for name in fields]


def with_interval(metrics: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """A score and its interval, where there is one."""
    if name not in metrics:
        return NOTHING
    return scored(metrics[name], metrics[f"{name}_interval"], digits)


def ece(content: Mapping[str, Any]) -> str:
    return with_interval(content, "ece", 3)


def questions_differ(runs: Sequence[Run]) -> bool:
    """Whether some runs were asked other questions than others."""
    return len({run.about["data"].get("questions_sha256") for run in runs}) > 1


def plots(runs: Sequence[Run]) -> dict[str, str]:
    """Scores and speeds, one below the other; none of a single run."""
    if len(runs) < 2:
        return {}
    contents = [run.content for run in runs]
    scores = {one.label: [content[key] for content in contents] for key, one in METRICS.items()}
    spread = {one.label: [content[f"{key}_interval"] for content in contents]
              for key, one in METRICS.items()}  # fmt: skip
    speeds = {"speed": [content["questions_per_second"] for content in contents]}
    return {
        "Scores": bars(names(runs), scores, name="scores", spread=spread,
                       xlabel="percent; the line is the 95 % interval"),
        "Speed": bars(names(runs), speeds, name="eval-speed", xlabel="questions/s"),
    }  # fmt: skip


def common(runs: Sequence[Examples]) -> Table | None:
    """The scores on the questions that all runs have alike; None where there is none."""
    if not all(run.questions for run in runs):
        return None
    asked = [one for one in explorer.joined(runs) if None not in one.places]
    if not asked:
        return None
    rows = []
    for number_, run in enumerate(runs):
        places = np.array([one.places[number_] for one in asked])
        own = part(run.scores, places)
        content = own.means | {f"{k}_interval": v for k, v in own.intervals().items()}
        rows.append(
            [run.name, f"{len(asked):,}", *(with_interval(content, one) for one in METRICS)]
        )
    return ["run", "questions of all", *(one.label for one in METRICS.values())], rows


def part(scores: Scores, places: np.ndarray) -> Scores:
    """The scores of some of the questions."""
    ids = tuple(scores.ids[place] for place in places.tolist())
    values = {name: each[places] for name, each in scores.values.items()}
    return Scores(ids, values, (), scores.has_answer[places])


# ---------------------------------------------------------------------------------------- mistakes


def mistakes_of(runs: Sequence[Examples]) -> dict[str, Any]:
    """How often each kind is there, and some of the first run's."""
    told = [mistakes.shares(run.mistakes) for run in runs]
    rows, examples = [], {}
    for index, (kind, label) in enumerate(mistakes.KINDS.items()):
        if not any(kind in one for one in told):
            continue
        cells = []
        for one in told:
            found = one.get(kind)
            cells.append(NOTHING if found is None else (
                f"{found['questions']:,}: {found['share']:.1f} % ({found['interval'][0]:.1f} to "
                f"{found['interval'][1]:.1f})"
            ))  # fmt: skip
        rows.append({"label": label, "cells": cells, "filter": {"kind": str(index)}})
        run = next(run for run, one in zip(runs, told, strict=True) if kind in one)
        places = [at for at, each in enumerate(run.mistakes) if each == kind][:EXAMPLES]
        examples[label] = [example(run, place) for place in places]
    return {"head": [run.name for run in runs], "rows": rows, "examples": examples}


def example(run: Examples, place: int) -> dict[str, Any]:
    question, said = run.questions[place], run.predictions[place]
    right = [span for span, _ in mistakes.places(question)]
    own = run.spans[place] if said else None
    return {
        "id": question.id, "question": question.question, "answer": said or "",
        "right": " | ".join(dict.fromkeys(question.answers)), "run": run.name,
        "pieces": pieces(question.context, right, [own] if own else []),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- trust


def trust(runs: Sequence[tuple[Run, Examples]], precision: float | None) -> dict[str, Any]:
    """Tables and plots of how far scores can be trusted."""
    rows, reliability, spread, risks = [], {}, {}, {}
    for of_run, run in runs:
        own, right, reached = run.score[run.answered], run.right[run.answered], None
        content = of_run.content["calibration"]
        row = [run.name, f"{content['answers']:,}"]
        if len(own):
            row += [f"{content['mean_score']:.3f}", f"{content['right']:.3f}", ece(content),
                    f"{content['aurc']:.4f}"]  # fmt: skip
            found = content["bins"]
            reliability[run.name] = ([b["score"] for b in found], [b["right"] for b in found])
            spread[run.name] = [b["interval"] for b in found]
            curve = calibration.risk_coverage(own, right, len(run.questions))
            risks[run.name] = (curve.coverage.tolist(), (100.0 * curve.risk).tolist())
            if precision is not None:
                reached = calibration.for_precision(curve, precision)
        row += [NOTHING] * (6 - len(row))
        row += [precise(reached)] if precision is not None else []
        rows.append(row)
    head = ["run", "answers", "mean score", "share right", "calibration error", "AURC"]
    head += [f"for a precision of {precision:g}"] if precision is not None else []
    made: dict[str, str] = {}
    if reliability:
        made["Reliability"] = lines(
            reliability, name="reliability", spread=spread, diagonal="as it should be",
            xlabel="score, mean of a tenth",
            ylabel="share of answers that is right",
        )  # fmt: skip
        made["Risk and coverage"] = lines(
            risks, name="risk", xlabel="share of questions that is answered, highest score first",
            ylabel="percent of these answers that is wrong",
        )  # fmt: skip
    return {"table": (head, rows), "plots": made}


def precise(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not reached"
    return f"score {found['score']:.4f}, coverage {found['coverage']:.1%}"


def no_answer(runs: Sequence[tuple[Run, Examples]]) -> dict[str, Any] | None:
    """How SQuAD 2.0's questions without an answer are told from the others; None without any."""
    rows, roc, recall = [], {}, {}
    for run, own in runs:
        asked = ~np.isnan(own.null_odds)
        numbers, none = own.null_odds[asked], ~own.scores.has_answer[asked]
        ranked = calibration.ranking(numbers, none) if own.v2 else None
        if ranked is None:
            continue
        best = []
        for one in METRICS.values():
            name = f"best_{one.official}"
            best.append(
                f"{with_interval(run.content, name)} at "
                f"{with_interval(run.content, f'{name}_thresh')}"
            )
        rows.append([own.name, f"{ranked.roc_auc:.4f}", f"{ranked.average_precision:.4f}", *best])
        roc[own.name] = ([0.0, *ranked.false_positives.tolist()], [0.0, *ranked.recall.tolist()])
        recall[own.name] = (ranked.recall.tolist(), ranked.precision.tolist())
    if not rows:
        return None
    head = ["run", "area below ROC", "average precision",
            *(f"best {one.label}, at null odds" for one in METRICS.values())]  # fmt: skip
    return {
        "table": (head, rows),
        "plots": {
            "ROC of no answer": lines(
                roc, name="roc", diagonal="by chance",
                xlabel="share of the answerable taken for unanswerable",
                ylabel="share of the unanswerable found"),
            "Precision and recall of no answer": lines(
                recall, name="recall", xlabel="share of the unanswerable found",
                ylabel="share of what is taken for unanswerable that is"),
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------ groups, differences


def groups(runs: Sequence[Examples], groupings: Sequence[Grouping]) -> dict[str, Table]:
    """EM and F1 by group, a column a run."""
    found = {}
    for grouping in groupings:
        masks = [grouping.masks(run.questions) for run in runs]
        labels = [label for label in grouping.order if any(label in each for each in masks)]
        rows = [
            [label, told({int(each[label].sum()) for each in masks if label in each}),
             *(means(run.scores, each[label]) if label in each else NOTHING
               for run, each in zip(runs, masks, strict=True))]
            for label in labels
        ]  # fmt: skip
        found[grouping.title] = ([grouping.title, "questions", *(run.name for run in runs)], rows)
    return found


def told(counts: Iterable[int]) -> str:
    return " / ".join(f"{count:,}" for count in sorted(counts, reverse=True))


def means(scores: Scores, chosen: np.ndarray) -> str:
    return " / ".join(f"{scores.mean(name, chosen):.1f}" for name in scores.values)


def differences(
    runs: Sequence[tuple[Run, Examples]], groupings: Sequence[Grouping]
) -> list[dict[str, Any]]:
    """How each run differs from the first one, where both are of the same questions."""
    return [
        shown_difference(runs[0], other, diff.difference(runs[0][1], other[1], groupings))
        for other in runs[1:]
        if not questions_differ([runs[0][0], other[0]]) and runs[0][1].v2 == other[1].v2
    ]


def shown_difference(
    first: tuple[Run, Examples], second: tuple[Run, Examples], found: Mapping[str, Any]
) -> dict[str, Any]:
    """A difference as the page shows it."""
    both = first[1].name, second[1].name
    head = ["", *both, "difference"]
    group_head = ["", "questions", *(f"{one.label} difference" for one in METRICS.values())]
    return {
        "names": both,
        "table": (head, [[METRICS[name].label, f"{one['first']:.2f}", f"{one['second']:.2f}",
                          apart(one)] for name, one in found["scores"].items()]),
        "said": diff.sentences(found),
        "groups": {
            by: ([by, *group_head[1:]],
                 [[row["group"], f"{row['questions']:,}", *(apart(row[name]) for name in METRICS)]
                  for row in rows])
            for by, rows in found["groups"].items()
        },
        "settings": diff.settings(first[0], second[0]),
    }  # fmt: skip


def apart(one: Mapping[str, Any]) -> str:
    low, high = one["difference_interval"]
    return f"{signed(one['difference'])} ({signed(low)} to {signed(high)})"
