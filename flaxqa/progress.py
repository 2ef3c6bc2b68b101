"""What a long run shows on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class TerminalProgress:
    """Shows questions done, windows/s and the time left; a context manager."""

    def __init__(self) -> None:
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

        self.total = self.done = self.windows = 0
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

    def begin(self, questions: int) -> None:
        self.total, self.began = questions, time.monotonic()
        self.bar.update(self.task, description="answering", total=questions)
        self.line(f"answering {questions:,} questions")

    def advance(self, questions: int, windows: int) -> None:
        self.done += questions
        self.windows += windows
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = f"{self.windows / seconds:,.0f} windows/s"
        self.bar.update(self.task, completed=self.done, speed=speed)
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.line(f"{self.done:,} of {self.total:,} questions, {speed}")

    def line(self, text: str) -> None:
        if not self.terminal:
            print(f"flaxqa: {text}", file=sys.stderr, flush=True)
            self.last_line = time.monotonic()
