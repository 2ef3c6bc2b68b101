"""What the user names as input, found: files, folders, patterns, saved data sets, the hub."""

from __future__ import annotations

import atexit
import codecs
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from flaxqa import stores
from flaxqa.config import DataOptions
from flaxqa.errors import TryAgain, UsageError, all_problems
from flaxqa.files import local, open_input, stands_in, state_of
from flaxqa.rows import Input
from flaxqa.text import kind_of_lines

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
BINARY = ("parquet", "arrow")  # which are compressed inside
METADATA = ("state.json", "dataset_info.json", "dataset_dict.json")  # of save_to_disk
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bz2"}
STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def find(
    names: Sequence[str],
    *,
    options: DataOptions | None = None,
    split: str = "train",
    unnamed: str | None = None,
) -> list[Input]:
    """The inputs that names stand for: files, folders, patterns, or data sets.

    Args:
      names: a folder stands for all files below it of a known kind, in the order of their paths,
        hidden ones left out; so does a pattern with `*`, `?` or `[`. A folder that `save_to_disk`
        of `datasets` wrote is that data set. Standard input (`-`) and pipes are copied to a file
        that is there until this process ends. What is not here is a data set of the hub.
      options: how they are read.
      split: of a data set that has several, where the options name none.
      unnamed: what a file is whose name tells no format; None to refuse it.

    Raises:
      UsageError: a name stands for nothing, a file's kind is not known, or one is named twice.
    """
    options = options or DataOptions()
    finder = Finder(options, options.split or split, unnamed)
    for name in names:
        if stores.is_url(name):
            finder.take_url(name)
            continue
        path = local(name)
        if name in STDIN or path.is_fifo():
            finder.take_pipe(name)
        elif path.is_dir():
            finder.take_folder(path, name)
        elif path.is_file():
            finder.take_file(path, path.name)
        elif path.exists():
            finder.problems.append(f"{name} is no file: a device or a socket")
        elif glob.has_magic(name):
            finder.take_pattern(name)
        elif looks_like_a_hub_id(name):
            finder.found.append(
                Input(name, name, "hub", sha256=options.data_revision, split=finder.split,
                      config=options.data_config)
            )  # fmt: skip
        else:
            finder.problems.append(f"{name} is missing")
    return finder.result()


class Finder:
    """Inputs as they are found.

    Attributes:
      named: of each path what the user would write.
    """

    def __init__(self, options: DataOptions, split: str, unnamed: str | None):
        self.options, self.split, self.unnamed = options, split, unnamed
        self.found: list[Input] = []
        self.named: dict[str, str] = {}
        self.problems: list[str] = []

    def take(self, path: str, name: str, written: str) -> None:
        """A file, or an object, and what the user would write."""
        try:
            self.found.append(file_input(path, name, self.options, self.unnamed))
            self.named[path] = written
        except UsageError as error:
            self.problems.append(str(error))

    def take_file(self, path: Path, name: str) -> None:
        self.take(str(path.resolve()), name, path.as_posix())

    def take_pipe(self, name: str) -> None:
        """Standard input or a FIFO, which can be read but once: as a file."""
        path = Path(spool(), f"{len(self.found)}-stdin")
        try:
            if name in STDIN:
                if sys.stdin is None or sys.stdin.isatty():
                    raise UsageError(f"{name}: nothing is piped into standard input")
                with path.open("wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            else:
                with open(name, "rb") as pipe, path.open("wb") as file:
                    shutil.copyfileobj(pipe, file, 1 << 20)
        except UsageError as error:
            self.problems.append(str(error))
            return
        except OSError as error:
            raise TryAgain(f"{name} cannot be read: {error}") from error
        kind = self.options.input_format if self.options.input_format != "auto" else self.unnamed
        if kind is None:
            self.problems.append(f"{name} has no name that tells a format; give --input-format")
            return
        start = start_of(path)
        # The shell numbers its pipes as it likes; a run that goes on must find the same name.
        called = "stdin" if name in STDIN or name.startswith("/dev/fd/") else Path(name).name
        self.found.append(
            Input(str(path), called, kind, compression_of(start), self.options.encoding,
                  delimiter_of(self.options))
        )  # fmt: skip

    def take_url(self, url: str) -> None:
        """An object, those below a URL, or those that a pattern matches."""
        url = url.rstrip("/")
        root = re.split(r"[*?[]", url)[0].rpartition("/")[0]  # as of a pattern and of an object
        if glob.has_magic(url):
            found = stores.matching(url)
        elif (info := stores.info_of(url)) is not None and info["type"] == "file":
            found = [url]
        else:
            names = [*stores.states_below(url)]
            read = lambda name: stores.read(stores.below(url, name))  # noqa: E731
            chosen = data_files(names, read, self.split, url, self.problems)
            root, found = url, [stores.below(url, name) for name in chosen]
        if not found:
            self.problems.append(f"{url} has no files of {', '.join(SUFFIXES)}")
        for each in found:
            self.take(each, each.removeprefix(root).lstrip("/"), each)

    def take_folder(self, folder: Path, name: str) -> None:
        """All files of a folder, or the data set that it is; not what a link leads out to."""
        files = (path for path in folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(folder) for path in files)
        read = lambda one: (folder / one).read_bytes()  # noqa: E731
        chosen = data_files(
            [one.as_posix() for one in names], read, self.split, name, self.problems
        )
        if not chosen:
            self.problems.append(f"{name} has no files of {', '.join(SUFFIXES)}")
        for one in chosen:
            path = folder / one
            if path.resolve().is_relative_to(folder.resolve()):
                self.take_file(path, one)
            else:
                self.problems.append(
                    f"{path} is a link that leads out of {folder}; name its target instead"
                )

    def take_pattern(self, name: str) -> None:
        """All files that it matches."""
        matches = sorted(each for each in glob.glob(name, recursive=True) if Path(each).is_file())
        if not matches:
            self.problems.append(f"{name} matches no file")
        root = os.path.commonpath([str(Path(each).parent) for each in matches] or ["."])
        for match in matches:
            self.take_file(Path(match), os.path.relpath(match, root))

    def result(self) -> list[Input]:
        """Raises: UsageError: something was wrong, or named twice."""
        seen: set[str] = set()
        for one in self.found:
            if one.path in seen:
                self.problems.append(f"{one.path} is named twice")
            seen.add(one.path)
        if self.problems:
            raise UsageError(all_problems("the input cannot be used", self.problems))
        if len({one.name for one in self.found}) < len(self.found):  # one name in two folders
            return [
                dataclasses.replace(one, name=self.named.get(one.path, one.name))
                for one in self.found
            ]
        return self.found


def refuse_inside(names: Sequence[str], inputs: Sequence[Input], output: str) -> None:
    """Refuses an output that is, holds or lies in an input: its parts would be records.

    Args:
      names: as given to `find`.
      inputs: that it found.
      output: a directory, perhaps not there yet.

    Raises:
      UsageError: it does; says with which input.
    """
    if stores.is_url(output):
        below = output.rstrip("/") + "/"
        for one in inputs:
            if one.path.startswith(below):
                raise UsageError(f"--output {output} holds the input {one.path}; choose another")
        for name in filter(stores.is_url, names):
            pattern = glob.has_magic(name)
            folder = name.rpartition("/")[0] if pattern else name.rstrip("/")
            base = re.split(r"[*?[]", folder)[0]
            deep = not pattern or base != folder  # whether folders below are input, or may be
            if below == f"{folder}/" or (
                deep and below.startswith(base if pattern else f"{folder}/")
            ):
                raise UsageError(
                    f"--output {output} lies in the input {name}, so that its parts would be "
                    "records of the next run; choose another"
                )
        return
    place = local(output).resolve()
    for one in inputs:
        if one.format != "hub" and Path(one.path).is_relative_to(place):
            raise UsageError(f"--output {output} holds the input {one.path}; choose another")
    for name in names:
        if stores.is_url(name):
            continue
        root = local(name)
        while glob.has_magic(str(root)) and not root.exists():
            root = root.parent
        # Whether folders below are input, or may be.
        deep = root == local(name) or glob.has_magic(str(local(name).parent))
        root = root.resolve()
        if root.is_dir() and (place == root or (deep and place.is_relative_to(root))):
            raise UsageError(
                f"--output {output} lies in the input {name}, so that its parts would be records "
                "of the next run; choose another"
            )


def data_files(
    names: Sequence[str],
    read: Callable[[str], bytes],
    split: str,
    where: str,
    problems: list[str],
) -> list[str]:
    """Those of the files below a place that are data: all of a known kind, or those of what
    `save_to_disk` wrote, in their order.

    Args:
      names: of all files, by their paths below the place.
      read: gives the content of one.
      split: of what has several.
      where: what messages call the place.
      problems: what is wrong is added here.
    """
    there, folder = {*names}, ""
    if "dataset_dict.json" in there:
        folder = f"{split}/"
        if f"{folder}state.json" not in there:
            splits = sorted(
                one.removesuffix("/state.json") for one in there if "/state.json" in one
            )
            problems.append(f"{where} has no split {split!r}; it has {', '.join(splits)}")
            return []
    state = f"{folder}state.json"
    if not {state, f"{folder}dataset_info.json"} <= there:
        arrows = {one.rpartition("/")[0] for one in names if one.endswith(".arrow")}
        return [one for one in names if is_data(one, arrows)]
    try:
        files = [one["filename"] for one in json.loads(read(state))["_data_files"]]
        if not files or not all("/" not in one and folder + one in there for one in files):
            problems.append(f"{where}/{state} names files that are not beside it")
            return []
    except TryAgain:
        raise
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        problems.append(f"{where}/{state} is damaged: {error!r}")
        return []
    return [folder + one for one in files]


def is_data(name: str, arrows: Collection[str]) -> bool:
    """Whether a file below a folder can be input; not if it is hidden or describes a data set.

    Args:
      name: its path below the folder.
      arrows: the folders that have Arrow files.
    """
    parent, _, own = name.rpartition("/")
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return (
        not hidden and kind_of(name)[0] is not None and not (own in METADATA and parent in arrows)
    )


def kind_of(path: str) -> tuple[str | None, str | None]:
    """The format and the compression that a file's name tells."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None, compression


def file_input(path: str, name: str, options: DataOptions, unnamed: str | None) -> Input:
    kind, compression = kind_of(path)
    kind = kind or unnamed
    if options.input_format != "auto":
        kind = options.input_format
    if kind is None:
        raise UsageError(
            f"{path}: its name tells no format; those are {', '.join(SUFFIXES)}, also with "
            f"{' or '.join(COMPRESSIONS)}; or give --input-format"
        )
    if kind in BINARY and compression is not None:
        raise UsageError(f"{path}: {kind.capitalize()} is compressed inside, not as a whole")
    return Input(path, name, kind, compression, options.encoding, delimiter_of(options))


def delimiter_of(options: DataOptions) -> str | None:
    return "\t" if options.delimiter == "tab" else options.delimiter


@functools.cache
def spool() -> str:
    """A folder for what can be read but once; removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="flaxqa-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start_of(path: str | Path) -> bytes:
    """The first bytes of a file.

    Raises:
      TryAgain: it cannot be read.
    """
    try:
        with open_input(str(path), block=256) as file:
            return file.read(256)
    except TryAgain:
        raise
    except OSError as error:
        raise TryAgain(f"{path} cannot be read: {error.strerror}") from error


def compression_of(start: bytes) -> str | None:
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def refuse_stand_in(one: Input) -> None:
    """Raises: UsageError: a file is not what its name says, so that every record would be bad."""
    start = start_of(one.path)
    reason = stands_in(start)
    if one.format not in BINARY and one.compression is None:
        if (kind := compression_of(start)) is not None:
            suffix = next(each for each, name in COMPRESSIONS.items() if name == kind)
            reason = (
                f"is compressed by {kind}, and its name does not say so; it should end in {suffix}"
            )
        elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            reason = "is UTF-16; convert it: iconv -f utf-16 -t utf-8"
    if reason is not None:
        raise UsageError(f"{one.path} {reason}")


def looks_like_a_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and name[0] not in ".~" and not Path(name).suffix


# --- what tells an input from others ---


def identified(one: Input) -> Input:
    """The input with what tells it from others: a file's hash, a data set's commit."""
    if one.format == "hub":
        return hub_commit(one)
    refuse_stand_in(one)
    state = state_of(one.path)
    if state is None:
        raise TryAgain(f"{one.path} cannot be read")
    sha256 = sha256_of(one.path, state)
    if one.format in ("json", "jsonl") and (lines := kind_of_lines(one)) is not None:
        one = dataclasses.replace(one, format=lines)
    return dataclasses.replace(one, state=state, size=state[0], sha256=sha256)


def hub_commit(one: Input) -> Input:
    """The data set with its commit.

    Raises:
      UsageError: there is no such data set.
      TryAgain: the hub cannot be reached.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(one.path, revision=one.sha256)
    except (huggingface_hub.errors.RepositoryNotFoundError,
            huggingface_hub.errors.RevisionNotFoundError, ValueError) as error:  # fmt: skip
        raise UsageError(
            f"{one.path} is neither a file or folder here nor a data set of the hub: {error}"
        ) from error
    except Exception as error:  # of the network, in the kinds of whichever library
        raise TryAgain(
            f"{one.path} is neither a file or folder here nor a data set that can be reached "
            f"({type(error).__name__}: {error})"
        ) from error
    return dataclasses.replace(one, sha256=info.sha)


@functools.lru_cache(maxsize=4_096)
def sha256_of(path: str, state: tuple[int, ...]) -> str:
    """The hash of a file that is in such a state; it is read once for each.

    Raises:
      TryAgain: it cannot be read.
    """
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except TryAgain:
        raise
    except OSError as error:
        raise TryAgain(f"{path} cannot be read: {error.strerror}") from error


def unchanged(one: Input) -> bool:
    """Whether a file has the bytes that it had when it was planned."""
    if one.format == "hub":
        return True  # a commit does not change
    state = state_of(one.path)
    if state is None or state[0] != one.size:
        return False
    return state == one.state or sha256_of(one.path, state) == one.sha256
