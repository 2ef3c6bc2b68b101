"""A process that measures: it says when it is ready, then answers a line for each that it is sent.

What is measured beside each other runs in processes of their own, so that no library changes
another one's threads, allocator or precision.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Told = dict[str, Any]


class Worker:
    """The side that asks.

    Attributes:
      ready: what it told first.
      absent: why it does not answer, None while it does.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        *,
        variables: Mapping[str, str],
        log: Path | None = None,
    ):
        """Starts a process and waits until it is ready.

        Args:
          module: whose `__main__` serves the job, given as JSON after `--worker`.
          job: what it has to know.
          variables: of its environment, besides those of this process.
          log: file for what it prints otherwise; None to drop that.
        """
        self.folder = tempfile.TemporaryDirectory(prefix="flaxqa-")  # for all that it leaves
        with open(log if log is not None else os.devnull, "ab") as errors:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module, "--worker", json.dumps(dict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TMPDIR": self.folder.name, **variables},
            )
        self.absent: str | None = None
        self.ready = self.read()

    def read(self) -> Told:
        assert self.process.stdout is not None  # noqa: S101 (for the type checker)
        line = self.process.stdout.readline()
        told: Told = json.loads(line) if line else {"absent": "the process ended"}
        self.absent = told.get("absent", self.absent)
        return told

    def ask(self, *message: Any) -> Told:
        """What it answers; {} if it is absent, or ends meanwhile."""
        if self.absent is not None:
            return {}
        assert self.process.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # what then is read says so
            print(json.dumps(message), file=self.process.stdin, flush=True)
        told = self.read()
        return told if self.absent is None else {}

    def close(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        self.folder.cleanup()


def serve(start: Callable[[], tuple[Told, Callable[..., Told]]], needs: str = "") -> None:
    """The side that answers, until nobody asks any more.

    Args:
      start: gives what is told first, and what answers a message.
      needs: what has to be installed for it.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers

    def tell(content: Told) -> None:
        print(json.dumps(content), file=out, flush=True)

    try:
        ready, answer = start()
        tell(ready)
        for line in sys.stdin:
            tell(answer(*json.loads(line)))
    except ModuleNotFoundError as error:
        hint = f": pip install {needs}" if needs else ""
        tell({"absent": f"{error.name} is not installed{hint}"})
    except Exception as error:
        tell({"absent": f"{type(error).__name__}: {error}".splitlines()[0]})
