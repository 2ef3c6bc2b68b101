"""The directory of a batch run in an object store: as `flaxqa.parts`, without locks and renaming.

    part-00000-of-00042.parquet            answers
    _errors/part-00000-of-00042.jsonl      what was set aside of a shard
    _manifest/part-00000-of-00042.json     that a part is finished: its rows, sha256 and state
    _manifest/rolled-0.jsonl               the same of many parts, so that few objects are read
    _run.json, _plan.json                  what was asked of whom; the shards
    errors.jsonl, _manifest.jsonl, _SUCCESS   written at the end

A put is whole or not there, and `_run.json` and the parts are created only where there is none: of
two writers the first wins, and the other takes what is there. So nobody needs a lock, and any
number may work on one run. What is finished is told by a single listing: a part counts with the
state (size and ETag) that its manifest object has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from flaxqa import stores
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.parts import (
    ERRORS,
    FRAGMENTS,
    MANIFEST,
    PLAN,
    RUN,
    SUCCESS,
    SUFFIXES,
    Entry,
    Output,
    Place,
    line_of,
    some_of,
)
from flaxqa.records import Plan
from flaxqa.seals import sealed, unsealed

NOTES = "_manifest"
ROLLED = f"{NOTES}/rolled-"  # begins the names of what has many entries
ROLLED_AFTER = 500  # parts


@dataclasses.dataclass(frozen=True)
class BucketPlace(Place):
    """Where the parts of a run go; `directory` is a URL."""

    directory: str  # type: ignore[assignment]

    def part(self, name: str) -> str:
        return stores.below(self.directory, name)

    def fragment(self, shard: int) -> str:  # type: ignore[override]
        return self.part(f"{FRAGMENTS}/{self.name(shard)}.jsonl")

    def stored(self, path: str, content: bytes) -> tuple[str, stores.State]:
        """Creates an object; where somebody was first, theirs counts.

        Raises:
          DataError: theirs has not as many records.
        """
        if not stores.create(path, content):
            try:
                there = stores.read(path)
            except FileNotFoundError as error:
                raise TryAgain(f"{path} was removed while the run goes on") from error
            if there != content and records_in(path, there) != records_in(path, content):
                raise DataError(f"{path} is not of this run; --restart begins anew")
            content = there
        if (state := stores.state_of(path)) is None:
            raise TryAgain(f"{path} was removed while the run goes on")
        return hashlib.sha256(content).hexdigest(), state

    def counts(self, entry: Entry) -> tuple[int, int]:
        """As the entry has them: a part in the state that it tells of has the bytes of then."""
        return entry.rows, entry.set_aside


class BucketOutput(Output):
    """A run in an object store, which others may write meanwhile; a context manager."""

    directory: str  # type: ignore[assignment]
    place: BucketPlace

    def __init__(self, directory: str, share: tuple[int, int] | None = None):
        """Proves that the place can be written.

        Raises:
          UsageError: access is denied, or there is no such bucket.
          TryAgain: it cannot be reached now.
        """
        self.directory, self.share = directory.rstrip("/"), share
        self.finished: dict[int, Entry] = {}
        self.states: dict[str, stores.State] = {}
        self.noted_here = 0
        stores.prove_writable(self.directory)

    def __exit__(self, *error: object) -> None:
        """There is nothing to let go of."""

    def path(self, name: str) -> Any:
        return stores.below(self.directory, name)

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        self.states = stores.states_below(self.directory)
        return contextlib.nullcontext()

    def names(self) -> list[str]:
        return list(self.states)

    def strangers(self) -> list[str]:
        return [name for name in self.states if name.startswith("part-")]

    def content(self, name: str) -> bytes:
        return stores.read(self.path(name))

    def put(self, name: str, content: bytes) -> None:
        stores.put(self.path(name), content)

    def publish(self, run: Mapping[str, Any] | None, plan: Plan | None) -> None:
        """The run comes first, for it can be created but once; its plan is the same from anybody.

        Raises:
          TryAgain: somebody else began another run at this moment.
        """
        first = run is None or stores.create(self.path(RUN), sealed(run))
        if not first and self.read(RUN) != run:
            raise TryAgain(f"another run was begun in {self.directory} at this moment")
        if plan is not None:
            self.put(PLAN, sealed(plan.to_json()))

    def place_of(self, plan: Plan, run_key: str, suffix: str) -> BucketPlace:
        return BucketPlace(self.directory, plan, run_key, suffix)

    def remove_all(self) -> None:
        """As that of `Output`; the run itself last, so that what is cut short can be repeated."""
        own, ours = {RUN, PLAN}, [stores.PROBE]
        if RUN in self.states:
            own |= {MANIFEST, SUCCESS, ERRORS}
            ours += [ROLLED, "_carbon-"]
        for part in self.known():
            own |= {part + suffix for suffix in SUFFIXES.values()}
            own |= {f"{FRAGMENTS}/{part}.jsonl", f"{NOTES}/{part}.json"}
        if strangers := [name for name in self.states
                         if name not in own and not name.startswith(tuple(ours))]:  # fmt: skip
            raise UsageError(
                f"{self.directory} has what this run did not write: {some_of(strangers)}. Nothing "
                "is removed; choose another directory"
            )
        names = sorted(self.states, key=lambda name: (name != SUCCESS, name in (RUN, PLAN)))
        stores.remove(self.path(name) for name in names)
        self.states = {}

    def is_there(self, name: str) -> bool:
        return name in self.states

    def find_finished(self) -> None:
        """Finds the parts that are there in the state that their manifest objects tell."""
        self.states = stores.states_below(self.directory)
        plan, self.finished = self.place.plan, {}
        for entry in self.noted():
            if entry.shard in self.finished:
                continue
            known = entry.run_key == self.place.run_key and entry.shard < len(plan.shards)
            name = self.place.name(entry.shard) + self.place.suffix
            if known and entry.part == name and self.is_whole(entry):
                self.finished[entry.shard] = entry
        self.finished = dict(sorted(self.finished.items()))
        # What was damaged is computed anew, and can be created again.
        told = {f"{NOTES}/{self.place.name(shard)}.json": shard for shard in self.left_of_all()}
        broken = [shard for name, shard in told.items() if name in self.states]
        stores.remove(self.path(name) for shard in broken for name in self.names_of(shard))
        if len(self.finished) < len(plan.shards) and SUCCESS in self.states:
            stores.remove([self.path(SUCCESS)])

    def is_whole(self, entry: Entry) -> bool:
        """Whether a part and what belongs to it are as they were written.

        What the listing has otherwise is asked for: others may have written it meanwhile.
        """
        fragment = f"{FRAGMENTS}/{PurePosixPath(entry.part).stem}.jsonl"
        wanted = [(entry.part, entry.state)]
        if entry.errors_sha256 is not None:
            wanted.append((fragment, entry.errors_state))
        return all(
            self.states.get(name) == state or stores.state_of(self.path(name)) == state
            for name, state in wanted
        )

    def left_of_all(self) -> list[int]:
        """Those that are not finished, of all processes."""
        return [i for i in range(len(self.place.plan.shards)) if i not in self.finished]

    def names_of(self, shard: int) -> list[str]:
        """The objects of a shard, what says that it is finished first."""
        name = self.place.name(shard)
        own = (f"{NOTES}/{name}.json", name + self.place.suffix, f"{FRAGMENTS}/{name}.jsonl")
        return [one for one in own if one in self.states]

    def noted(self) -> Iterator[Entry]:
        """What the manifests tell: those of many parts first, then the others one by one.

        An entry that is told already, of a part in its state, is not read again.
        """
        many = [name for name in self.states if name == MANIFEST or name.startswith(ROLLED)]
        told = set()
        for content in stores.read_many(map(self.path, many)).values():
            for entry in entries_of(content.splitlines()):
                if self.states.get(entry.part) == entry.state:
                    told.add(f"{NOTES}/{PurePosixPath(entry.part).stem}.json")
                    yield entry
        every = [name for name in self.states if name.startswith(f"{NOTES}/")]
        singly = [name for name in every if name not in told and name not in many]
        yield from entries_of(stores.read_many(map(self.path, singly)).values())

    def note(self, entry: Entry) -> None:
        """Writes a part's manifest object; when this returns the part counts."""
        name = PurePosixPath(entry.part).stem
        self.put(f"{NOTES}/{name}.json", line_of(entry))
        self.finished[entry.shard] = entry
        self.noted_here += 1
        if self.noted_here % ROLLED_AFTER == 0:
            lines = b"".join(line_of(one) + b"\n" for one in self.finished.values())
            self.put(f"{ROLLED}{self.share[0] if self.share else 0}.jsonl", lines)

    def finalize(self) -> dict[str, Any]:
        """As that of `Output`, of parts that a listing still has."""
        self.states = stores.states_below(self.directory)
        self.finished = {i: one for i, one in self.finished.items() if self.is_whole(one)}
        return super().finalize()

    def join(self, entries: Sequence[Entry]) -> None:
        urls = [self.place.fragment(entry.shard) for entry in entries]
        found = stores.read_many(urls)
        for entry, url in zip(entries, urls, strict=True):
            content = found.get(url)
            if content is None or hashlib.sha256(content).hexdigest() != entry.errors_sha256:
                raise TryAgain(f"{url} is not what was written; the same command computes it anew")
        if urls:
            self.put(ERRORS, b"".join(found[url] for url in urls))

    def write_manifest(self, lines: bytes) -> None:
        self.put(MANIFEST, lines)


def records_in(path: str, content: bytes) -> int:
    """How many records the bytes of a part have, or of what was set aside."""
    if not path.endswith(SUFFIXES["parquet"]):
        return content.count(b"\n")
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(io.BytesIO(content)).num_rows)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def entries_of(lines: Any) -> Iterator[Entry]:
    """The entries that are whole."""
    for line in lines:
        if (content := unsealed(line)) is not None:
            with contextlib.suppress(TypeError, LookupError):  # of another version
                states = {name: tuple(content[name]) for name in ("state", "errors_state")
                          if content[name] is not None}  # fmt: skip
                yield Entry(**{**content, **states})
