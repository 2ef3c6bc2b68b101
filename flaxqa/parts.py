"""The directory of a batch run: a part for each shard, whole or not there, and what is known of it.

    part-00000-of-00042.parquet   answers; sorted, the names give the order of the input
    errors.jsonl                  records that were set aside, each with its reason
    _run.json                     what was asked of whom: all that decides an answer
    _plan.json                    the shards
    _manifest.jsonl               a line for each finished part, appended: its rows and sha256
    _SUCCESS                      counts; written last, when everything is there
    _carbon-0123456789ab.json     what a process measured with --carbon; _SUCCESS has the sum
    _errors/                      what was set aside of each shard

A part and what belongs to it appear by renaming after they are on disk; then comes the line in the
manifest. So a part without a line is computed again, and whatever a crash cut short is found. What
is read again has a checksum: the run, the plan, each line. Nothing is removed that these do not
name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flaxqa import carbon, files
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems
from flaxqa.records import Plan
from flaxqa.seals import as_json, checksum, sealed, unsealed

RUN, PLAN, MANIFEST = "_run.json", "_plan.json", "_manifest.jsonl"
ERRORS, FRAGMENTS, SUCCESS, LOCK = "errors.jsonl", "_errors", "_SUCCESS", ".lock"
SUFFIXES = {"parquet": ".parquet", "jsonl": ".jsonl"}
SHOWN = 10
MEASURED = re.compile(r"_carbon-[0-9a-f]+\.json")
STATE = re.compile(
    r"_manifest(-\d+-of-\d+)?\.jsonl|_run\.json|_plan\.json|_SUCCESS|errors\.jsonl|"
    + MEASURED.pattern
)
LOCKS = re.compile(r"\.lock(-begin|-\d+-of-\d+)?")
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")  # of `files.write_whole`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What the manifest says of a finished part.

    Attributes:
      shard: its number.
      part: its file.
      rows: how many it has.
      sha256: of its bytes.
      set_aside: records of the shard that are not in it.
      errors_sha256: of the file that has those, None without any.
      run_key: of the run.
      computed_by: what computed it: device, kernels, versions. It decides no more than last digits.
      state: of the part in an object store, by which a listing tells whether it has changed.
      errors_state: of the file of what was set aside, likewise.
    """

    shard: int
    part: str
    rows: int
    sha256: str
    set_aside: int
    errors_sha256: str | None
    run_key: str
    computed_by: Mapping[str, Any]
    state: tuple[int, str] | None = None
    errors_state: tuple[int, str] | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the parts of a run go; all that somebody who computes them needs to know.

    Attributes:
      directory: of the run.
      plan: of the run.
      run_key: of the run.
      suffix: of the parts.
    """

    directory: Path
    plan: Plan
    run_key: str
    suffix: str

    def name(self, shard: int) -> str:
        """A part's name without suffix."""
        return part_name(shard, len(self.plan.shards))

    def fragment(self, shard: int) -> Path:
        """The file of what was set aside of a shard."""
        return self.directory / FRAGMENTS / f"{self.name(shard)}.jsonl"

    def write(
        self,
        shard: int,
        content: bytes,
        rows: int,
        errors: list[bytes],
        computed_by: Mapping[str, Any],
    ) -> Entry:
        """Writes a part and what was set aside; a line in the manifest then makes it count."""
        name, aside, aside_state = self.name(shard) + self.suffix, None, None
        if errors:
            aside, aside_state = self.stored(self.fragment(shard), b"".join(errors))
        sha256, state = self.stored(self.part(name), content)
        return Entry(
            shard=shard,
            part=name,
            rows=rows,
            sha256=sha256,
            set_aside=len(errors),
            errors_sha256=aside,
            run_key=self.run_key,
            computed_by=computed_by,
            state=state,
            errors_state=aside_state,
        )

    def part(self, name: str) -> Any:
        """Where a part is."""
        return self.directory / name

    def stored(self, path: Any, content: bytes) -> tuple[str, tuple[int, str] | None]:
        """Writes a file; gives the hash of what it has, and its state in an object store."""
        files.write_whole(path, content)
        return hashlib.sha256(content).hexdigest(), None

    def counts(self, entry: Entry) -> tuple[int, int]:
        """The answers in a part and the lines of what was set aside, as they are there."""
        try:
            part = self.directory / entry.part
            if self.suffix == SUFFIXES["parquet"]:
                import pyarrow.parquet as pq

                rows = pq.read_metadata(part).num_rows
            else:
                rows = lines_in(part)
            return rows, lines_in(self.fragment(entry.shard)) if entry.errors_sha256 else 0
        except ValueError as error:
            raise DataError(f"{entry.part} cannot be read: {error}") from error
        except OSError as error:
            raise TryAgain(f"{entry.part} cannot be read: {error}") from error

    def is_whole(self, entry: Entry) -> bool:
        """Whether a part and what belongs to it have the bytes that were written."""
        if entry.part != self.name(entry.shard) + self.suffix:
            return False
        if sha256_of(self.directory / entry.part) != entry.sha256:
            return False
        return entry.errors_sha256 is None or (
            sha256_of(self.fragment(entry.shard)) == entry.errors_sha256
        )


class Output:
    """The directory of a run, which nobody else writes meanwhile; a context manager.

    `begin` or `go_on` comes first.

    Attributes:
      directory: where.
      share: (i, n) if this is process i of n that share it; None if it is alone.
      place: of the run.
      finished: the parts that are there, by shard.
    """

    place: Place

    def __init__(self, directory: str | Path, share: tuple[int, int] | None = None):
        """Locks the directory, which is made if missing.

        Raises:
          TryAgain: it cannot be written, or somebody else is writing there.
        """
        self.directory, self.share = files.writable_directory(directory), share
        self.finished: dict[int, Entry] = {}
        with contextlib.ExitStack() as locks:
            # Those that share the directory keep each other out of their shares only.
            kind = fcntl.LOCK_EX if share is None else fcntl.LOCK_SH
            locks.enter_context(held(self.path(LOCK), kind))
            if share is not None:
                own = self.path(f"{LOCK}-{share[0]}-of-{share[1]}")
                locks.enter_context(held(own, fcntl.LOCK_EX))
            self.locks = locks.pop_all()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.locks.close()

    def path(self, name: str) -> Path:
        return self.directory / name

    # --- what is there ---

    def begin(
        self,
        make_plan: Callable[[Plan | None], Plan],
        describe: Callable[[Plan], dict[str, Any]],
        *,
        suffix: str,
        restart: bool = False,
    ) -> None:
        """Writes down what is asked, or goes on with the run that is there if it is the same.

        Args:
          make_plan: gives the plan; is given that of an earlier start, which it may return.
          describe: gives all that decides an answer.
          suffix: of the parts.
          restart: whether to begin anew.

        Raises:
          UsageError: another run is there, which differs; says in what.
          TryAgain: the directory cannot be written.
        """
        with self.alone():
            if restart:
                if self.share is not None:
                    raise UsageError("--restart is for a run that is alone")
                self.remove_all()
            before, planned = self.read(RUN), self.read_plan()
            if before is None and (strangers := self.strangers()):
                raise UsageError(
                    f"{self.directory} has {strangers[0]} but no {RUN}: it is of another "
                    "program, or what is left of a run; choose another directory"
                )
            plan = make_plan(planned)
            run = describe(plan)
            key = checksum(run)
            asked = before and {name: before[name] for name in before.keys() - {"run_key", "plan"}}
            if asked is not None and (changes := differences(asked, run)):
                where = (
                    f"{self.directory} has another run; choose another directory, or --restart to "
                    "begin anew. They differ in"
                )
                raise UsageError(all_problems(where, changes))
            whole = {"run_key": key, "plan": plan.sha256(), **run}
            if before is not None and before.get("plan") != whole["plan"]:
                raise DataError(
                    f"{self.path(PLAN)} is not the plan of {RUN}; --restart begins anew"
                )
            self.publish(whole if before is None else None, plan if plan != planned else None)
            self.place = self.place_of(plan, key, suffix)
        self.find_finished()

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts nobody else begins here."""
        return held(self.path(f"{LOCK}-begin"), fcntl.LOCK_EX, wait=True)

    def strangers(self) -> list[str]:
        """The names of parts that are there."""
        return sorted(path.name for path in self.directory.glob("part-*"))

    def publish(self, run: Mapping[str, Any] | None, plan: Plan | None) -> None:
        """Writes down the run and its plan, those that are not there yet."""
        if plan is not None:
            self.put(PLAN, sealed(plan.to_json()))
        if run is not None:
            self.put(RUN, sealed(run))
        try:
            self.path(FRAGMENTS).mkdir(exist_ok=True)
        except OSError as error:
            raise TryAgain(f"{self.directory} cannot be written: {error}") from error

    def place_of(self, plan: Plan, run_key: str, suffix: str) -> Place:
        return Place(self.directory, plan, run_key, suffix)

    def put(self, name: str, content: bytes) -> None:
        """Writes a file of the directory, whole or not at all."""
        files.write_whole(self.path(name), content)

    def go_on(self) -> None:
        """Takes up the run that is there, without asking for anything.

        Raises:
          UsageError: there is none.
        """
        run, plan = self.read(RUN), self.read_plan()
        if run is None or plan is None:
            raise UsageError(f"{self.directory} has no run")
        suffix = SUFFIXES[run["output"]["format"]]
        if plan.sha256() != run["plan"]:
            raise DataError(f"{self.path(PLAN)} is not the plan of {RUN}; --restart begins anew")
        self.place = self.place_of(plan, run["run_key"], suffix)
        self.find_finished()

    def read(self, name: str) -> dict[str, Any] | None:
        """A sealed file of the directory, None if it is missing."""
        path = self.path(name)
        try:
            content = self.content(name)
        except FileNotFoundError:
            return None
        if (found := unsealed(content)) is None:
            raise DataError(f"{path} is damaged; --restart begins anew")
        return found

    def content(self, name: str) -> bytes:
        """The bytes of a file of the directory.

        Raises:
          FileNotFoundError: it is missing.
          TryAgain: it cannot be read.
        """
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise TryAgain(f"{self.path(name)} cannot be read: {error.strerror}") from error

    def read_plan(self) -> Plan | None:
        """The plan of the run that is there."""
        planned = self.read(PLAN)
        try:
            return None if planned is None else Plan.from_json(planned)
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path(PLAN)} is of another version; --restart begins anew"
            ) from error

    def remove_all(self) -> None:
        """Removes what an earlier run wrote.

        Raises:
          UsageError: there is something else; says what, and removes nothing.
        """
        try:
            there = [*self.directory.iterdir()]
            if self.path(FRAGMENTS).is_dir():
                there += self.path(FRAGMENTS).iterdir()
            known = self.known()
            ours = [path for path in there if self.is_ours(path, known)]
            if strangers := sorted(str(path.relative_to(self.directory))
                                   for path in {*there} - {*ours}):  # fmt: skip
                raise UsageError(
                    f"{self.directory} has what this run did not write: {some_of(strangers)}. "
                    "Nothing is removed; choose another directory"
                )
            for path in sorted(ours, key=lambda path: (path.name != SUCCESS, path.name == RUN)):
                if path.name != FRAGMENTS and not LOCKS.fullmatch(path.name):
                    path.unlink()
            if self.path(FRAGMENTS).is_dir():
                self.path(FRAGMENTS).rmdir()
        except OSError as error:
            raise TryAgain(f"{self.directory} cannot be cleared: {error}") from error

    def known(self) -> set[str]:
        """The names of the parts that the run here may have written, without suffix.

        They are those of its plan, and those of its manifest.
        """
        if not self.is_there(RUN):
            return set()
        names = {Path(entry.part).stem for entry in self.noted()}
        try:
            planned = unsealed(self.content(PLAN))
        except FileNotFoundError:
            planned = None
        n = len(planned["shards"]) if planned is not None else 0
        return names | {part_name(shard, n) for shard in range(n)}

    def is_there(self, name: str) -> bool:
        return self.path(name).is_file()

    def is_ours(self, path: Path, known: Collection[str]) -> bool:
        """Whether the run here wrote it, or may be writing it."""
        if path.is_symlink() or not path.is_file():
            return path == self.path(FRAGMENTS) and not path.is_symlink() and path.is_dir()
        name = path.name
        if (temporary := TEMPORARY.fullmatch(name)) is not None:
            name = temporary[1]
        if path.parent == self.path(FRAGMENTS):
            return name.removesuffix(".jsonl") in known and name.endswith(".jsonl")
        if LOCKS.fullmatch(name):
            return True
        if STATE.fullmatch(name):
            # The plan is there before the run is.
            return self.path(RUN).is_file() or name in (RUN, PLAN)
        stem, dot, suffix = name.partition(".")
        return stem in known and dot + suffix in SUFFIXES.values()

    def find_finished(self) -> None:
        """Finds the parts that are there with the bytes that the manifest says."""
        plan = self.place.plan
        if self.share is None:
            known = self.known()
            for pattern in (".*", f"{FRAGMENTS}/.*"):
                for path in self.directory.glob(pattern):  # what a crash left half written
                    if TEMPORARY.fullmatch(path.name) and self.is_ours(path, known):
                        path.unlink(missing_ok=True)
        entries = {
            entry.shard: entry
            for entry in self.noted()
            if entry.run_key == self.place.run_key and entry.shard < len(plan.shards)
        }
        self.finished = {
            shard: entry for shard, entry in sorted(entries.items()) if self.place.is_whole(entry)
        }
        if len(self.finished) < len(plan.shards):
            self.path(SUCCESS).unlink(missing_ok=True)

    def noted(self) -> Iterator[Entry]:
        """The lines of the manifests that are whole."""
        for path in self.manifests():
            for line in self.content(path.name).splitlines():
                if (content := unsealed(line)) is not None:
                    with contextlib.suppress(TypeError):  # a line of another version
                        yield Entry(**content)

    def manifests(self) -> list[Path]:
        paths = self.directory.glob("_manifest*.jsonl")
        return sorted(path for path in paths if STATE.fullmatch(path.name))

    def mine(self) -> range:
        """The shards that this process answers for."""
        i, n = self.share or (0, 1)
        return range(i, len(self.place.plan.shards), n)

    def left(self) -> list[int]:
        """Those of them that are not finished."""
        return [shard for shard in self.mine() if shard not in self.finished]

    # --- what is written ---

    def note(self, entry: Entry) -> None:
        """Appends a line to this process's manifest; when this returns the part counts."""
        name = MANIFEST
        if self.share is not None:
            name = "_manifest-{}-of-{}.jsonl".format(*self.share)
        files.append_line(self.path(name), line_of(entry))
        self.finished[entry.shard] = entry

    def note_measured(self, meter: carbon.Meter) -> None:
        """Writes what this process has measured so far, if it measures."""
        if (reading := meter.reading()) is not None:
            self.put(f"_carbon-{meter.session}.json", sealed(reading))

    def measured(self) -> list[carbon.Record]:
        """What every process has measured; one that is damaged was not measured."""
        names = sorted(name for name in self.names() if MEASURED.fullmatch(name))
        found = [unsealed(self.content(name)) for name in names]
        return [one for one in found if one is not None]

    def names(self) -> list[str]:
        """Of the files that are there."""
        return [path.name for path in self.directory.iterdir()]

    def finalize(self) -> dict[str, Any]:
        """Puts what was set aside together and declares the run complete.

        Returns:
          The content of _SUCCESS.

        Raises:
          TryAgain: parts are missing; says which.
          DataError: the counts do not add up.
        """
        plan, place = self.place.plan, self.place
        if missing := [place.name(i) for i in range(len(plan.shards)) if i not in self.finished]:
            raise TryAgain(f"{self.directory} misses {some_of(missing)}")
        entries = [self.finished[i] for i in range(len(plan.shards))]
        for entry, shard in zip(entries, plan.shards, strict=True):
            planned = sum(segment.records for segment in shard)
            rows, set_aside = place.counts(entry)
            if (rows, set_aside) != (entry.rows, entry.set_aside) or rows + set_aside != planned:
                raise DataError(
                    f"{entry.part} has {rows} answers and {set_aside} records were set aside, but "
                    f"{MANIFEST} has {entry.rows} and {entry.set_aside}, the shard {planned}"
                )
        self.join([entry for entry in entries if entry.set_aside])
        self.write_manifest(b"".join(line_of(entry) + b"\n" for entry in entries))
        summary = {
            "records": plan.records,
            "answered": sum(entry.rows for entry in entries),
            "set_aside": sum(entry.set_aside for entry in entries),
            "parts": len(entries),
            "run_key": place.run_key,
        }
        if measured := self.measured():
            summary["carbon"] = carbon.result(measured, plan.records)
        self.put(SUCCESS, as_json(summary))
        return summary

    def join(self, entries: Sequence[Entry]) -> None:
        """Writes what was set aside of some shards into one file."""
        if entries:
            fragments = [self.place.fragment(entry.shard) for entry in entries]
            files.write_joined(self.path(ERRORS), fragments)

    def write_manifest(self, lines: bytes) -> None:
        """Leaves one manifest, of all parts."""
        manifests = self.manifests()
        if manifests != [self.path(MANIFEST)] or self.content(MANIFEST) != lines:
            self.put(MANIFEST, lines)
            for path in manifests:
                if path.name != MANIFEST:
                    path.unlink()


@contextlib.contextmanager
def held(path: Path, kind: int, *, wait: bool = False) -> Iterator[IO[str]]:
    """Holds a lock on a file, which is made if missing; the system lets go when the process ends.

    Raises:
      TryAgain: somebody else has it.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise TryAgain(f"{path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                yield file  # a file system without locks
                return
            file.seek(0)
            who = file.read(200).strip()
            raise TryAgain(
                f"{path.parent} cannot be written: another run is writing there"
                + (f" ({who})" if who else "")
            ) from error
        if kind == fcntl.LOCK_EX:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield file


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, field by field."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted(before.keys() | now.keys()):
            if name == "run_key":
                continue
            place = f"{where}.{name}" if where else name
            found += differences(before.get(name), now.get(name), place)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    if before == now:
        return []
    return [f"{where}: it was {short(before)}, now it is {short(now)}"]


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sha256_of(path: Path) -> str | None:
    """The hash of a file's bytes, None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def line_of(entry: Entry) -> bytes:
    """An entry as a line of the manifest, sealed."""
    content = dataclasses.asdict(entry)
    return json.dumps({**content, "checksum": checksum(content)}).encode()


def lines_in(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(files.BLOCK), b""))


def some_of(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def part_name(shard: int, n: int) -> str:
    """The name of part `shard` of n, without suffix."""
    width = max(5, len(str(n)))
    return f"part-{shard:0{width}d}-of-{n:0{width}d}"
