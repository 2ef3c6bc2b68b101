"""A trace of a few steady batches, by `jax.profiler`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flaxqa import files

SKIPPED, TRACED = 4, 8  # batches
log = logging.getLogger(__name__)


class Profile:
    """Traces batches into a directory; a context manager, that ends a trace under way.

    The first batches, with all that is set up for them, are left out.
    """

    def __init__(self, directory: str | Path | None):
        """A profile that traces nothing if there is no directory.

        Raises:
          TryAgain: the directory cannot be written.
        """
        self.directory = None if directory is None else files.writable_directory(directory)
        self.done = 0

    def after(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """The callback of `Reader.answer_chunks`, which begins and ends the trace besides."""

        def advance(questions: int, windows: int) -> None:
            progress(questions, windows)
            if windows:
                self.count()

        return progress if self.directory is None else advance

    def count(self) -> None:
        """Takes note of a batch that is done."""
        import jax

        self.done += 1
        if self.done == SKIPPED and self.directory is not None:
            jax.profiler.start_trace(self.directory)
        elif self.done == SKIPPED + TRACED:
            jax.profiler.stop_trace()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        if self.directory is None or self.done >= SKIPPED + TRACED:
            return
        if self.done >= SKIPPED:
            import jax

            jax.profiler.stop_trace()
        log.warning(
            "the run had %s batches: %s of the %s to be traced are in %s",
            self.done,
            max(self.done - SKIPPED, 0),
            TRACED,
            self.directory,
        )
