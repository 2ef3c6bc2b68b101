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
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flaxqa

Told = dict[str, Any]


class NotHere(RuntimeError):
    """What a job needs is not on this machine: a kind of device."""


class Worker:
    """The side that asks.

    Attributes:
      ready: what it told first.
      absent: why it does not answer, None while it does.
      failed: whether that is an error of its own, and not that something is not installed.
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
                [sys.executable, "-P", "-m", module, "--worker", json.dumps(dict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment() | {"TMPDIR": self.folder.name, **variables},
            )
        self.absent: str | None = None
        self.ready = self.read()

    def read(self) -> Told:
        assert self.process.stdout is not None  # noqa: S101 (for the type checker)
        line = self.process.stdout.readline()
        told: Told = json.loads(line) if line else {"absent": "the process ended", "failed": True}
        self.absent = told.get("absent", self.absent)
        self.failed = told.get("failed", False)
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


def environment() -> dict[str, str]:
    """That of a process that finds flaxqa where this one has, and nothing in its folder."""
    root = str(Path(flaxqa.__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, given), root])}


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
    except NotHere as error:
        tell({"absent": str(error)})
    except Exception as error:
        traceback.print_exc()  # into the log
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        tell({"absent": told, "failed": True})
