"""What can go wrong on the user's side, each kind with the exit code the command line gives it."""

import numbers
from typing import Any


class FlaxqaError(Exception):
    """The parent of every error that flaxqa raises on purpose; its message is for the user."""

    exit_code = 1


class UsageError(FlaxqaError, ValueError):
    """An option, a config field or an argument that cannot be used."""

    exit_code = 2


class DataError(FlaxqaError, ValueError):
    """A data or predictions file that cannot be read as what it should be."""

    exit_code = 2


class ModelRejected(FlaxqaError, ValueError):
    """A checkpoint that is not computed, because its answers could not be trusted."""

    exit_code = 4


class GateNotMet(FlaxqaError):
    """The run is complete, its score is below the one that was asked for."""

    exit_code = 5


class TryAgain(FlaxqaError, OSError):
    """A place that cannot be written or reached now; the same command may succeed later."""

    exit_code = 75


def all_problems(where: str, problems: list[str], shown: int = 20) -> str:
    """`where` and its problems as one message, a line each, cut after `shown`."""
    lines = problems[:shown]
    if len(problems) > shown:
        lines.append(f"and {len(problems) - shown} more")
    return f"{where}:\n  " + "\n  ".join(lines)


def check_integers(**values: Any) -> None:
    """Refuses what is neither None nor an integer; numpy's are integers."""
    for name, value in values.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, numbers.Integral)
        ):
            raise UsageError(f"{name} is {value!r}, it must be an integer")


def check_counts(**counts: Any) -> None:
    """Refuses what is not an integer of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise UsageError(f"{name} is {value!r}, it must be an integer of at least 1")


def check_shares(**shares: Any) -> None:
    """Refuses what is neither None nor a number from 0 to 1."""
    for name, value in shares.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise UsageError(f"{name} is {value!r}, it must be a number from 0 to 1")
