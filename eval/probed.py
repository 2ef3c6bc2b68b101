"""What a probe says: its measures, and how the page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plots import NOTHING, number
from .summaries import excerpt, signed

MOST_ASSOCIATIONS = 12  # of a section, before the others are folded in

MEASURES = {  # with their digits
    "mu": ("\u03bc, how strong", 4), "eta": ("\u03b7, how steady", 2),
    "positional_error": ("positional error", 4), "attribute_error": ("attribute error", 4),
}  # fmt: skip


def measures(content: Mapping[str, Any]) -> list[list[str]]:
    """Of each section and of all together its name, its questions and its measures."""
    every = [*content["sections"], {"name": "overall", "questions": content["questions"],
                                    **content["overall"]}]  # fmt: skip
    return [
        [one["name"], f"{one['questions']:,}",
         *(f"{one[name]['value']:.{digits}f} ({one[name]['interval'][0]:.{digits}f}{NOTHING}"
           f"{one[name]['interval'][1]:.{digits}f})" for name, (_, digits) in MEASURES.items())]
        for one in every
    ]  # fmt: skip


def probe_summary(content: Mapping[str, Any]) -> list[str]:
    """The example and the measures for a terminal, a line each."""
    head = ["", "questions", *(label for label, _ in MEASURES.values())]
    rows = [head, *measures(content)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    one = content["example"]
    first = f"{one['context']} {one['question']} {one['answer']} (score {number(one['score'])})"
    return [first, *lines, "in brackets 95 % bootstrap intervals", *content["notes"]]


def probed(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A probe as the page shows it."""
    example, platform = content["example"], content["platform"]
    described = {one["name"]: one for one in content["templates"]["sections"]}
    sections = []
    for one in content["sections"]:
        rows = [*one["associations"], *one["groups"]]
        scale = max((abs(end) for row in rows for end in (row["gamma"], *row["gamma_interval"])),
                    default=0) or 1  # fmt: skip
        sections.append({
            "name": one["name"], "mean_score": number(one["mean_score"]),
            "examples": [(each["context"], " / ".join(each["questions"]))
                         for each in described[one["name"]]["examples"]],
            "groups": [association(row, scale) for row in one["groups"]],
            "associations": [association(row, scale) for row in one["associations"]],
        })  # fmt: skip
    return {
        "name": name,
        "about": f"{content['started'][:16].replace('T', ' ')} \u00b7 {content['config']['model']} "
                 f"\u00b7 {platform['dtype']} \u00b7 {Path(content['templates']['path']).name}",
        "made_of": {"config": content["config"], "model": content["model"],
                    "templates": content["templates"], "platform": platform,
                    "versions": content["versions"]},
        "question": example["question"], "answer": example["answer"],
        "score": number(example["score"]),
        "pieces": excerpt(example["context"], [example["answer"]]),
        "note": content["templates"]["note"], "notes": list(content["notes"]),
        "head": ["section", "questions", *(label for label, _ in MEASURES.values())],
        "rows": measures(content), "sections": sections,
    }  # fmt: skip


def association(row: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A line of the ranked associations; what is drawn goes from -100 to 100."""
    low, high = row["gamma_interval"]
    at, begin, end = (100 * value / scale for value in (row["gamma"], low, high))
    return {
        "subject": row.get("subject"), "group": row["group"], "attribute": row["attribute"],
        "gamma": f"{signed(row['gamma'], 4)} ({signed(low, 4)} to {signed(high, 4)})",
        "eta": signed(row["eta"]), "n": f"{row['n']:,}", "left": f"{min(at, 0):.1f}",
        "width": f"{abs(at):.1f}", "begin": f"{begin:.1f}", "end": f"{end:.1f}", "less": at < 0,
    }  # fmt: skip
