"""What can go wrong on the user's side, each kind with the exit code the command line gives it."""


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
