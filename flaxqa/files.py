"""Results on disk: a file is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flaxqa.errors import TryAgain, UsageError


def write_whole(path: Path, content: bytes) -> None:
    """The file appears with all of its content, on disk, or not at all.

    Raises:
      TryAgain: the place cannot be written or is full.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o666 & ~current_umask())
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise TryAgain(
            f"{path} ({len(content):,} bytes) cannot be written: {error.strerror}"
        ) from error


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def writable_directory(path: str | Path) -> Path:
    """Makes the directory if it is missing and proves that a file can be written into it.

    Raises:
      UsageError: the path is something else than a directory.
      TryAgain: it cannot be made or written.
    """
    directory = Path(path)
    try:
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"flaxqa")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TryAgain(f"{directory} cannot be written: {error.strerror}") from error
    return directory
