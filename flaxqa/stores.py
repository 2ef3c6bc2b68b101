"""Files in object stores (s3://, gs://, az://, hf://), through fsspec.

A put is whole or not there; there is no renaming and no lock. Each call is tried again with growing
pauses where the store is busy or the network fails, and what is left of an error is told as one of
`flaxqa.errors`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flaxqa.errors import TryAgain, UsageError

Value = TypeVar("Value")
State = tuple[int, str]  # the size, and what changes with the content: an ETag, or a time

# What each scheme needs besides fsspec, and how its credentials are found.
PACKAGES = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "hf": ""}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "`hf auth login`, or HF_TOKEN",
}
URL = re.compile(r"([a-z][a-z0-9]*)://")
TRIES, PAUSE = 3, 0.5  # of a call that may succeed later, and the first pause in seconds
PROBE = ".write-"  # begins the name of an object that proves that a place can be written
BLOCK = 4 << 20  # bytes that are read at once


def is_url(name: str | Path) -> bool:
    """Whether a name is in one of the stores."""
    found = URL.match(str(name))
    return found is not None and found[1] in PACKAGES and "::" not in str(name)


def below(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


@functools.lru_cache(maxsize=64)
def opened(scheme: str, process: int) -> Any:
    """The file system of a scheme, in a process: a fork must not use its parent's connections.

    Raises:
      UsageError: its package is not installed.
    """
    import fsspec

    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        package = PACKAGES[scheme]
        raise UsageError(
            f"{scheme}:// cannot be opened: {error}" + (
                f"; pip install 'flaxqa[{package}]'" if isinstance(error, ImportError) else "")
        ) from error  # fmt: skip


def placed(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    scheme, _, path = url.partition("://")
    return call(url, opened, scheme, os.getpid()), path.rstrip("/")


def told(url: str, error: Exception) -> Exception:
    """An error of a store as one of ours; one that says that nothing is there stays."""
    scheme = {"gcs": "gs", "abfs": "az"}.get(url.partition("://")[0], url.partition("://")[0])
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError | FileExistsError | UsageError | TryAgain):
        return error
    if "Credential" in kind or isinstance(error, PermissionError) or "NoAuth" in kind:
        return UsageError(
            f"{url} cannot be reached with the credentials that there are ({kind}: {error}); they "
            f"come from {CREDENTIALS.get(scheme, 'the environment')}"
        )
    if isinstance(error, ValueError):  # an endpoint or a name that cannot be
        return UsageError(f"{url} cannot be used ({kind}: {error})")
    if isinstance(error, TypeError | LookupError | NotImplementedError):
        return error  # a fault of a program, or something that the store cannot do at all
    return TryAgain(f"{url} cannot be reached now ({kind}: {error}); try again")


def call(url: str, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """What a function of a store gives, at last.

    Raises:
      FileNotFoundError, FileExistsError: it says so.
      UsageError: access is denied.
      TryAgain: it does not work now.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return function(*args, **kwargs)
        except Exception as error:  # of the network, in the kinds of whichever library
            ours = told(url, error)
            if isinstance(ours, TryAgain) and attempt < TRIES:
                apart = 0.5 + os.urandom(1)[0] / 512  # so that many do not come back together
                time.sleep(PAUSE * 2 ** (attempt - 1) * apart)
                continue
            if ours is error:
                raise
            raise ours from error
    raise AssertionError


# --- one object ---


def state_in(info: Mapping[str, Any]) -> State:
    """What tells an object's content, of what a store says of it."""
    names = ("ETag", "etag", "md5Hash", "blob_id", "generation", "LastModified", "last_modified")
    mark = next((str(info[name]) for name in names if info.get(name)), "")
    return int(info.get("size") or 0), mark.strip('"')


def info_of(url: str) -> Mapping[str, Any] | None:
    """What a store says of an object or a folder, None if there is neither."""
    store, path = placed(url)
    try:
        found: Mapping[str, Any] = call(url, store.info, path)
    except FileNotFoundError:
        return None
    return found


def state_of(url: str) -> State | None:
    """As `flaxqa.files.state_of`."""
    info = info_of(url)
    return None if info is None or info["type"] != "file" else state_in(info)


def read(url: str) -> bytes:
    """Raises: FileNotFoundError: there is no such object."""
    store, path = placed(url)
    content: bytes = call(url, store.cat_file, path)
    return content


def read_many(urls: Iterable[str]) -> dict[str, bytes]:
    """The content of objects, many at a time; of those that are there."""
    paths = {placed(url)[1]: url for url in urls}
    if not paths:
        return {}
    first = next(iter(paths.values()))
    store = placed(first)[0]

    def all_of_them() -> dict[str, Any]:
        found = store.cat(list(paths), on_error="return")
        for one in found.values():
            if isinstance(one, Exception) and not isinstance(one, FileNotFoundError):
                raise one
        return dict(found)

    return {
        paths[path]: content
        for path, content in call(first, all_of_them).items()
        if isinstance(content, bytes)
    }


def put(url: str, content: bytes) -> None:
    """Writes an object, whole or not at all, in the place of what is there."""
    store, path = placed(url)
    call(url, store.pipe_file, path, content)


def create(url: str, content: bytes) -> bool:
    """Writes an object if there is none; False if somebody else was first.

    Raises:
      UsageError: the store cannot do that.
    """
    store, path = placed(url)
    try:
        call(url, store.pipe_file, path, content, mode="create")
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError) as error:  # as of hf://
        raise UsageError(
            f"{url} is in a store that cannot create what must not be there"
        ) from error
    return True


def remove(urls: Iterable[str]) -> None:
    """Removes objects; those that are gone are no error."""
    for url in urls:
        store, path = placed(url)
        try:
            call(url, store.rm_file, path)
        except FileNotFoundError:
            continue


class Remote(io.RawIOBase):
    """An object as a file, read in blocks."""

    def __init__(self, url: str):
        """Raises: FileNotFoundError: there is no such object."""
        super().__init__()
        self.url, self.at = url, 0
        self.store, self.path = placed(url)
        self.size = int(call(url, self.store.info, self.path)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        part = call(self.url, self.store.cat_file, self.path, start=self.at, end=end)
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


def open_object(url: str, block: int = BLOCK) -> io.BufferedReader:
    """An object as a file, of which so many bytes are read at once.

    Raises:
      TryAgain: it is missing, or cannot be reached now.
    """
    try:
        return io.BufferedReader(Remote(url), block)
    except FileNotFoundError as error:
        raise TryAgain(f"{url} is missing") from error


# --- many objects ---


def states_below(url: str) -> dict[str, State]:
    """All objects below a URL by what follows it, with their states; in the order of names."""
    store, path = placed(url)
    try:
        found = call(url, store.find, path, detail=True)
    except FileNotFoundError:
        return {}
    return {
        name.removeprefix(path).lstrip("/"): state_in(info)
        for name, info in sorted(found.items())
        if info.get("type") == "file" and name != path
    }


def matching(url: str) -> list[str]:
    """The URLs of the objects that a pattern matches, sorted."""
    store, path = placed(url)
    scheme = url.partition("://")[0]
    found = call(url, store.glob, path, detail=True)
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


def prove_writable(url: str) -> None:
    """Proves that objects can be written below a URL, and that none replaces another unasked.

    Raises:
      UsageError: they cannot; or the store's package takes no notice of "create only".
      TryAgain: they cannot now.
    """
    probe = below(url, f"{PROBE}{os.getpid()}-{time.time_ns()}")
    try:
        exclusive = create(probe, b"flaxqa") and not create(probe, b"again")
        remove([probe])
    except FileNotFoundError as error:
        raise UsageError(f"{url} cannot be written: {error}; is there such a bucket?") from error
    if not exclusive:
        raise UsageError(
            f"{url} cannot be written safely: an object that was there was replaced, although it "
            "was to be created; a newer version of the store's package may do better"
        )


def cache(kind: str, key: str) -> Path:
    """A folder of the user's cache, $XDG_CACHE_HOME/flaxqa or ~/.cache/flaxqa, for a key."""
    import hashlib

    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "flaxqa" / kind / hashlib.sha256(key.encode()).hexdigest()[:32]


def folder_of(url: str, names: Iterable[str], states: Mapping[str, State]) -> Path:
    """A local folder with some objects below a URL, from the cache if they have not changed.

    Named by their states, so that it never has others than those asked for.
    """
    import shutil

    chosen = sorted(names)
    folder = cache("fetched", json.dumps([url, [(name, states[name]) for name in chosen]]))
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for name in chosen:
                with open_object(below(url, name)) as source, (temporary / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, BLOCK)
                if state_of(below(url, name)) != states[name]:
                    raise TryAgain(f"{below(url, name)} changed while it was read")
            try:
                temporary.rename(folder)
            except OSError:  # somebody else was first
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if isinstance(error, TryAgain):
            raise
        raise TryAgain(f"{folder} cannot be written: {error}") from error
    return folder
