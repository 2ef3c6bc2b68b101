"""Results on disk, or in a store: a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from flaxqa import stores
from flaxqa.errors import TryAgain, UsageError

BLOCK = 1 << 20
URL = re.compile(r"[A-Za-z][\w+.:-]+:/")  # a drive has one letter


def local(name: str | Path) -> Path:
    """The path that a name stands for.

    Raises:
      UsageError: it is a URL other than file://, or no system has such a name.
    """
    if URL.match(str(name)):
        if not str(name).startswith("file:///"):
            kinds = ", ".join(f"{scheme}://" for scheme in stores.PACKAGES)
            raise UsageError(
                f"{name} is a URL that cannot be used here: local files and folders can, and for "
                f"inputs, checkpoints, configs and the outputs of predict, eval and score {kinds}"
            )
        from urllib.request import url2pathname  # with modules for the network that few need

        name = url2pathname(str(name)[len("file://") :])
    path = Path(name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # who reads or writes it will say more
    except (OSError, ValueError) as error:  # too long, a link to itself, no text
        told = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(name)[:100]!a} cannot be read or written: {told}") from error
    return path


def stands_in(start: bytes) -> str | None:
    """What a file is that stands in the place of the one that was meant, and the way out.

    Args:
      start: its first 64 bytes or more.
    """
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "is a pointer of Git LFS and not the file itself; `git lfs pull` there fetches it"
    if re.match(rb"\s*<(!doctype\s+)?html", start, re.IGNORECASE):
        return "is an HTML page, as servers send for an error or a login; fetch the file again"
    return None


def read_named(name: str | Path) -> bytes:
    """The content of a file that the user named, or of a pipe that this process was given.

    Raises:
      UsageError: it is neither.
      OSError: it cannot be read.
    """
    if stores.is_url(name):
        try:
            return stores.read(str(name))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(name)) from error
    path = local(name)
    given = str(name).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (given and stat.S_ISFIFO(mode))):
        raise UsageError(f"{name} is no file: a FIFO, a device or a socket")
    return path.read_bytes()


def open_input(path: str, block: int = stores.BLOCK) -> IO[bytes]:
    """A file, or an object of a store, for reading; of that so many bytes at once."""
    return stores.open_object(path, block) if stores.is_url(path) else open(path, "rb")


def working_directory(output: str) -> Path:
    """The directory of an output, or where it is made until it is put into a store.

    Raises:
      UsageError, TryAgain: it cannot be written.
    """
    if not stores.is_url(output):
        return writable_directory(output)
    stores.prove_writable(output)
    return writable_directory(stores.cache("making", output))


def state_of(path: str | Path) -> tuple[Any, ...] | None:
    """What changes when a file does, also where its time was set back; None if it is missing."""
    if isinstance(path, str) and stores.is_url(path):
        return stores.state_of(path)
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def write_named(name: str | Path, content: bytes) -> None:
    """Writes a file that the user named, whole or not at all; of a link that it leads to.

    Folders that are missing are made. What is no file but takes bytes (/dev/stdout, a FIFO) is
    written as it is.

    Raises:
      UsageError: it is a folder, a URL, or something else that cannot be written.
      TryAgain: the place cannot be written or is full.
    """
    if stores.is_url(name):
        stores.put(str(name), content)
        return
    path = local(name)
    try:
        path = path.resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:  # a new file, perhaps at the end of a link
        path, mode = path.resolve(), stat.S_IFREG
        writable_directory(path.parent)
    except (OSError, RuntimeError) as error:  # a part that is no folder, or may not be entered
        raise UsageError(f"{name} cannot be written: {error}") from error
    if stat.S_ISREG(mode):
        write_whole(path, content)
    elif stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        try:
            with path.open("wb", buffering=0) as file:
                write_all(file.fileno(), content)
        except OSError as error:
            raise TryAgain(f"{name} cannot be written: {error.strerror}") from error
    else:
        kind = "a folder" if stat.S_ISDIR(mode) else "a socket or a disk"
        raise UsageError(f"{name} cannot be written: it is {kind}")


def write_whole(path: Path, content: bytes) -> None:
    """The file appears with all of its content, on disk, or not at all.

    Raises:
      TryAgain: the place cannot be written or is full.
    """
    write_blocks(path, [content], f"{path} ({len(content):,} bytes)")


def write_joined(path: Path, parts: Sequence[Path]) -> None:
    """The file appears with the content of all parts, one after the other, or not at all.

    Raises:
      TryAgain: a part cannot be read, or the place cannot be written or is full.
    """

    def blocks() -> Iterator[bytes]:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(BLOCK):
                    yield block

    write_blocks(path, blocks(), str(path))


def write_blocks(path: Path, blocks: Iterable[bytes], called: str) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            try:
                os.fchmod(descriptor, 0o666 & ~current_umask())
                for block in blocks:
                    write_all(descriptor, block)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise TryAgain(f"{called} cannot be written: {error.strerror or error}") from error


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file, which is made if missing; when this returns it is on disk.

    What a crash cut short at the end of the file is ended first, so that it spoils no other line.

    Raises:
      TryAgain: the place cannot be written or is full.
    """
    try:
        new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            cut = size and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, (b"\n" if cut else b"") + line + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_directory(path.parent)
    except OSError as error:
        raise TryAgain(f"{path} cannot be written: {error.strerror or error}") from error


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on disk, where a system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def writable_directory(path: str | Path) -> Path:
    """Makes the directory if it is missing and proves that a file can be written into it.

    Raises:
      UsageError: the path is something else than a directory, or a URL.
      TryAgain: it cannot be made or written.
    """
    directory = local(path)
    try:
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"flaxqa")
            file.flush()
            os.fsync(file.fileno())
    except (NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"{directory} cannot be: a part of it is not a directory") from error
    except OSError as error:
        raise TryAgain(f"{directory} cannot be written: {error.strerror}") from error
    return directory
