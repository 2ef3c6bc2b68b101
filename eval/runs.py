"""What the directories of runs have: results, the checkpoint and the data that they are of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from flaxqa import files, weights
from flaxqa.errors import DataError, ModelRejected, UsageError, all_problems

Warn = Callable[[str], None]
Result = TypeVar("Result")
Kind = Literal["eval", "probe", "finetune", "compare"]
# Of each command the file with its results; the first that there is tells of the checkpoint.
FILES: dict[Kind, str] = {
    "eval": "metrics.json", "probe": "probe.json", "finetune": "finetune.json",
    "compare": "comparison.json",
}  # fmt: skip
# sha256 of the official files, and of dev-v1.1's questions in any other format.
KNOWN = {
    "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955":
        ("rajpurkar/squad", "plain_text", "train", "SQuAD v1.1"),
    "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9":
        ("rajpurkar/squad", "plain_text", "validation", "SQuAD v1.1"),
    "3aa015c71f3f93b335a772fdc9bf5140705e386e20523f858a1bf85a06c7bb9b":
        ("rajpurkar/squad", "plain_text", "validation", "SQuAD v1.1"),
    "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002":
        ("rajpurkar/squad_v2", "squad_v2", "train", "SQuAD 2.0"),
    "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8":
        ("rajpurkar/squad_v2", "squad_v2", "validation", "SQuAD 2.0"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one run.

    Attributes:
      kind: which command made them.
      directory: they are in.
      content: of the file of its kind.
      about: content of run.json for an evaluation, otherwise `content` again.
    """

    kind: Kind
    directory: Path
    content: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the command."""
        return "bench" if "backend" in self.about["config"] else self.kind

    @property
    def data(self) -> DataSet:
        return DataSet.of(self.about["data"], self.about["config"])

    @property
    def part(self) -> bool:
        """Whether an evaluation is of less than all questions of its data."""
        return int(self.content["total"]) < int(self.about["data"]["questions"])


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set by the names that the hub knows.

    Attributes:
      id: of a hub data set; the name of a file.
      name: for people.
      on_hub: whether the hub has it.
      revision: commit of the hub's.
      hashes: sha256 of a file, or of the questions.
    """

    id: str
    name: str
    on_hub: bool
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, source: Mapping[str, Any], config: Mapping[str, Any]) -> DataSet:
        """What a run's `data` stands for; a file is an official one only if its hash says so."""
        hashes = {key: str(source[key]) for key in ("sha256", "questions_sha256")
                  if source.get(key)}  # fmt: skip
        name = " ".join(str(source["name"]).split())
        if "sha256" not in source and "files" not in source and source.get("commit"):
            return cls(name, name, True, config.get("data_config"), source.get("split"),
                       source["commit"], hashes)  # fmt: skip
        # That of a file is of all of it; that of the questions only where no limit cut them.
        for value in hashes.values():
            if value in KNOWN:
                known, its_config, split, title = KNOWN[value]
                return cls(known, title, True, its_config, split, None, hashes)
        return cls(last_part(name), last_part(name), False, hashes=hashes)

    @property
    def hash(self) -> tuple[str, str] | None:
        """What tells its content: the hash of the file, otherwise of the questions; and which."""
        return next(iter(self.hashes.items()), None)


def last_part(name: str) -> str:
    """A path without the folders it is in."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return "model" if last in ("", ".", "..", "~") else last


# --- reading ---


def read(directory: str | Path) -> list[Run]:
    """The results in a directory.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    directory = files.local(directory)
    found = []
    for kind, name in FILES.items():
        if (directory / name).is_file():
            content = read_json(directory / name)
            about = read_json(directory / "run.json") if kind == "eval" else content
            found.append(Run(kind, directory, content, about))
    if found:
        return found
    if not directory.is_dir():
        raise UsageError(f"{directory} is {'no directory' if directory.exists() else 'missing'}")
    raise UsageError(f"{directory} has none of {', '.join(FILES.values())}")


def evaluation(directory: str | Path) -> Run:
    """The evaluation in a directory.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    for one in read(directory):
        if one.kind == "eval":
            return one
    raise UsageError(f"{directory} has no evaluation: no {FILES['eval']}")


def names(found: Sequence[Run]) -> list[str]:
    """The names of their directories, with as much of the paths as tells them apart."""
    whole = [os.fsencode(files.local(run.directory).absolute()) for run in found]
    paths = [Path(path.decode(errors="replace")).parts for path in whole]
    for count in range(1, max(map(len, paths), default=0) + 1):
        short = ["/".join(parts[-count:]) for parts in paths]
        if len(set(short)) == len(short):
            return short
    return [f"{parts[-1]} ({number})" for number, parts in enumerate(paths, 1)]


def read_json(path: Path, *, lines: bool = False) -> Any:
    """What a file has: a JSON object, or one on each line."""
    try:
        text = path.read_bytes()
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not all(isinstance(one, dict) for one in (content if lines else [content])):
        raise DataError(f"{path} is no JSON object")
    return content


def checked(run: Run, made: Callable[[Run], Result]) -> Result:
    """What is made of a run.

    Raises:
      DataError: its results are damaged.
    """
    try:
        return made(run)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UsageError | DataError):
            raise
        raise DataError(
            f"the results in {run.directory} are damaged, or of another version: "
            f"{type(error).__name__}: {error}"
        ) from error


# --- which checkpoint ---


@dataclasses.dataclass(frozen=True)
class Subject:
    """The checkpoint of a card.

    Attributes:
      sha256: of every file that was read, by name.
      directory: where it was when it was measured; it may be gone.
      name: what the runs call it.
      on_hub: whether that is a hub id.
    """

    sha256: Mapping[str, str]
    directory: Path
    name: str
    on_hub: bool


def subject_of(run: Run) -> Subject:
    """The checkpoint of a run that measured one."""
    model = run.about["model"]
    name = str(model.get("name") or run.about["config"]["model"])
    on_hub = bool(model.get("commit"))
    directory = Path(model.get("directory") or name).expanduser()
    hashes = {str(key): str(value) for key, value in model["sha256"].items()}
    return Subject(hashes, directory, name, on_hub)


def written_by(run: Run) -> list[Subject]:
    """The checkpoints that a fine-tuning wrote, in its directory and in the folders there.

    Raises:
      DataError: there is none.
    """
    found = []
    for folder in (
        run.directory,
        *sorted(each for each in run.directory.iterdir() if each.is_dir()),
    ):
        try:
            names = [path.name for path in weights.find(folder)]
        except ModelRejected:
            continue
        names = ["config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt", *names]
        hashes = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
        found.append(Subject(hashes, folder, run.directory.resolve().name, False))
    if not found:
        raise DataError(f"{run.directory} has finetune.json, and no checkpoint that belongs to it")
    return found


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def weights_of(subject: Subject) -> dict[str, str]:
    return {key: value for key, value in subject.sha256.items() if weights.is_weights(key)}


def one_subject(runs: Sequence[Run]) -> list[Subject]:
    """The checkpoint that all runs are of, as each of them knows it; the best known first.

    Raises:
      UsageError: they are of several; names all runs.
      DataError: a run's results are damaged.
    """
    order = sorted(runs, key=lambda run: list(FILES).index(run.kind))
    measured = [(run, checked(run, subject_of)) for run in order if run.kind != "finetune"]
    tuned = [(run, checked(run, written_by)) for run in order if run.kind == "finetune"]
    first = measured[0][1] if measured else tuned[0][1][0]
    same = all(subject.sha256 == first.sha256 for _, subject in measured)
    # Training may write files that an evaluation does not read; the weights both have.
    for run, written in tuned:
        belongs = [one for one in written if weights_of(one) == weights_of(first)]
        same = same and bool(belongs)
        measured.append((run, (belongs or written)[0]))
    if not same:
        raise UsageError(all_problems(
            "these runs are of different checkpoints, which one card cannot be about (the start of "
            "the sha256 of the weights is behind each)",
            [told(run, subject) for run, subject in measured],
        ))  # fmt: skip
    return [subject for _, subject in measured]


def told(run: Run, subject: Subject) -> str:
    short = ", ".join(value[:12] for value in weights_of(subject).values()) or "no weights"
    width = (run.about.get("config") or {}).get("width")
    wider = f", widened by --width {width}, which makes it another one" if width else ""
    return f"{run.directory}: {last_part(subject.name)}{wider} ({short})"


def where_it_is(subjects: Sequence[Subject], warn: Warn) -> Path | None:
    """A directory that has the files of the checkpoint as they were measured."""
    problems = []
    for subject in subjects:
        for name, expected in subjects[0].sha256.items():
            path = subject.directory / name
            if not path.is_file():
                problems.append(f"{path} is not there")
            elif sha256(path) != expected:
                problems.append(f"{path} is not what was measured")
            else:
                continue
            break
        else:
            return subject.directory
    warn(f"the code that shows how to use it is left out: {problems[0]}, and it is run first")
    return None
