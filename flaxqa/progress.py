"""What a long run shows on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a long run tells while it goes on."""

    def stage(self, description: str) -> None:
        """What it does now."""

    def count(self, found: int) -> None:
        """How many were found so far, while they are counted."""

    def begin(self, total: int, done: int = 0, doing: str = "answering") -> None:
        """How many there are to answer, and how many an earlier run has done."""

    def advance(
        self, answered: int, windows: int, padding: float | None = None, told: str = ""
    ) -> None:
        """How many were just answered, their windows, the share of padding so far, and a remark."""


class Silence:
    """Shows nothing; a context manager, as `TerminalProgress`."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stage(self, description: str) -> None:
        pass

    def count(self, found: int) -> None:
        pass

    def begin(self, total: int, done: int = 0, doing: str = "answering") -> None:
        pass

    def advance(
        self, answered: int, windows: int, padding: float | None = None, told: str = ""
    ) -> None:
        pass


class TerminalProgress:
    """Shows what is done, speeds and the time left; a context manager."""

    def __init__(self, noun: str = "questions") -> None:
        """Starts with nothing done; `noun` says of what."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.noun = noun
        self.total = self.done = self.answered = self.windows = 0
        self.padding: float | None = None
        self.began = self.last_line = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=not self.terminal,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, speed="")

    def __enter__(self) -> TerminalProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def stage(self, description: str) -> None:
        self.bar.update(self.task, description=description)
        self.line(description)

    def count(self, found: int) -> None:
        text = f"counting {self.noun}, {found:,} so far"
        self.bar.update(self.task, description=text)
        self.now_and_then(text)

    def begin(self, total: int, done: int = 0, doing: str = "answering") -> None:
        self.total, self.done, self.began = total, done, time.monotonic()
        self.answered, self.windows, self.padding = 0, 0, None
        self.bar.update(self.task, description=doing, total=total, completed=done)
        before = f", {done:,} of them done before" if done else ""
        self.line(f"{doing} {total:,} {self.noun}{before}")

    def advance(
        self, answered: int, windows: int, padding: float | None = None, told: str = ""
    ) -> None:
        self.done += answered
        self.answered += answered
        self.windows += windows
        self.padding = self.padding if padding is None else padding
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = (
            f"{self.answered / seconds:,.0f} {self.noun}/s, {self.windows / seconds:,.0f} windows/s"
        )
        if self.padding is not None:
            speed += f", {self.padding:.1%} padding"
        speed += f", {told}" if told else ""
        self.bar.update(self.task, completed=self.done, speed=speed)
        left = duration((self.total - self.done) * seconds / max(self.answered, 1))
        self.now_and_then(f"{self.done:,} of {self.total:,} {self.noun}, {speed}, {left} left")

    def now_and_then(self, text: str) -> None:
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.line(text)

    def line(self, text: str) -> None:
        if not self.terminal:
            print(f"flaxqa: {text}", file=sys.stderr, flush=True)
            self.last_line = time.monotonic()


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 40 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    left = round(seconds)
    first = next(index for index, (_, size) in enumerate(units) if left >= size)
    (large, size), (small, part) = units[first], units[first + 1]
    return f"{left // size} {large} {left % size // part} {small}"
