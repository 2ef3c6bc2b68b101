"""Answers as people see them: on a terminal, and in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flaxqa.answers import Answer, Answers


def excerpt(context: str, start: int, end: int, around: int = 80) -> tuple[str, str]:
    """The text before and after an answer, whole words on one line, `…` where more is left out."""
    before, after = context[max(0, start - around) : start], context[end : end + around]
    if start > around:
        before = "… " + re.sub(r"^\S*\s", "", before)
    if end + around < len(context):
        after = re.sub(r"\s\S*$", "", after) + " …"
    return re.sub(r"\s+", " ", before).lstrip(), re.sub(r"\s+", " ", after).rstrip()


def on_terminal(context: str, found: Sequence[Answer], n_windows: int) -> None:
    """The answers in bold, each with its numbers and the text around it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    if not found:
        console.print("no answer found")
    for number, one in enumerate(found, 1):
        if number > 1:
            console.print()
        head = Text(f"{number}. " if len(found) > 1 else "", style="dim")
        console.print(head.append(one.text, style="bold green"))
        before, after = excerpt(context, one.start, one.end)
        around = Text(before, style="dim").append(one.text, style="green")
        console.print(Padding(around.append(after, style="dim"), (0, 0, 0, 2)))
        plural = "" if n_windows == 1 else "s"
        console.print(
            f"  score {one.score:.4g}, characters {one.start} to {one.end}, "
            f"{n_windows} window{plural}",
            style="dim",
        )


def as_html(found: Answers) -> str:
    """The question, and each answer marked in its context; everything that is data is escaped."""
    from flaxqa.features import as_example

    asked = as_example(found.record)
    question, context = ("", "") if isinstance(asked, str) else (asked.question, asked.context)
    if isinstance(asked, str) and isinstance(found.record, dict):
        question = str(found.record.get("question", ""))
    lines = [f"<p><b>{html.escape(question)}</b></p>"] if question else []
    if found.error is not None:
        lines.append(f"<p>{html.escape(found.error)}</p>")
    elif not found:
        lines.append("<p>no answer</p>")
    for one in found:
        before, after = excerpt(context, one.start, one.end) if context else ("", "")
        where = f"characters {one.start} to {one.end}" if context else f"context {one.context}"
        lines.append(
            f"<p>{html.escape(before)}<mark>{html.escape(one.text)}</mark>{html.escape(after)}<br>"
            f"<small>score {one.score:.4g}, {where}</small></p>"
        )
    return f"<div>{''.join(lines)}</div>"


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts, which are escaped."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(one)}</{tag}>" for one in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
