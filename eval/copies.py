"""Tables as text that goes into other documents: Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after the end of a row they would be its options
    "\u2212": "$-$", "\u2013": "--", "\u2014": "---", "\u00b1": r"$\pm$", "\u00d7": r"$\times$",
    "\u03bc": r"$\mu$", "\u00b5": r"$\mu$", "\u03b3": r"$\gamma$", "\u03b7": r"$\eta$",
    "\u00b7": r"$\cdot$", "\u2026": r"\ldots{}", "\u2082": "$_2$",
}  # fmt: skip
CODES = str.maketrans(LATEX)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, their bars escaped."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def plain_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of any texts, a line each."""

    def line(cells: Sequence[str]) -> list[str]:
        return [one_line(cell).replace("|", "\\|") for cell in cells]

    return markdown(line(head), map(line, rows))


def latex(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A tabular of any texts; the first column on the left, numbers on the right."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(one_line(cell).translate(CODES) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(head) - 1)
    body = [line(head), r"\hline", *map(line, rows)]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def one_line(text: str) -> str:
    return " ".join(str(text).split())
