"""Every option that is said more than once, with its text; and configs out of TOML files.

The command line builds its help from these classes, `flaxqa.load` and `Reader.answers` take their
fields as keywords, and the configs of runs inherit them. Light to import.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import posixpath
import re
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from flaxqa import files, stores
from flaxqa.errors import TryAgain, UsageError, all_problems

SHARD_SIZE = 10_000
MAX_ANSWER_LENGTH = 30  # tokens
ASCII = bytes(range(128))
OWN = Path(__file__).with_name("configs")

Function = TypeVar("Function", bound=Callable[..., Any])


class Options:
    """Fields with their limits; those that cannot be are refused when one is made.

    Attributes:
      PATHS: fields that are paths.
      COUNTS: fields that are integers of at least 1, or None.
      SEEDS: fields that are integers of at least 0.
      SHARES: fields that are numbers from 0 to 1, or None.
      POSITIVE: fields that are finite numbers above 0.
      FINITE: fields that are finite numbers, or None.
    """

    PATHS: ClassVar[tuple[str, ...]] = ()
    COUNTS: ClassVar[tuple[str, ...]] = ()
    SEEDS: ClassVar[tuple[str, ...]] = ()
    SHARES: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    FINITE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise UsageError(all_problems("the options cannot be used", problems)
                             if len(problems) > 1 else problems[0])  # fmt: skip

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        found = []

        def refuse(kind: str, fine: Callable[[Any], bool], wanted: str) -> None:
            for name in self.named(kind):
                value = getattr(self, name)
                if value is not None and not fine(value):
                    found.append(f"{name} is {value!r}, it must be {wanted}")

        refuse("COUNTS", is_count, "an integer of at least 1")
        refuse("SEEDS", lambda value: is_count(value) or value == 0, "an integer of at least 0")
        refuse("SHARES", lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        refuse("POSITIVE", lambda value: is_number(value) and value > 0, "a number above 0")
        refuse("FINITE", is_number, "a finite number")
        return found

    @classmethod
    def named(cls, kind: str) -> tuple[str, ...]:
        """The fields of a kind of limit, here and in all classes that these options are put of."""
        every = [vars(each).get(kind, ()) for each in reversed(cls.__mro__)]
        return tuple(dict.fromkeys(name for names in every for name in names))

    def of(self, kind: type[Any]) -> dict[str, Any]:
        """Those of the fields that another class has, as keywords."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def takes(kind: type[Any]) -> Callable[[Function], Function]:
    """Shows the fields of a class in the signature of a function that takes them as keywords."""

    def shown(function: Function) -> Function:
        own = inspect.signature(function)
        fields = inspect.signature(kind).parameters.values()
        plain = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
        more = [one for one in fields if one.name not in own.parameters]
        function.__signature__ = own.replace(parameters=[*plain, *more])  # type: ignore[attr-defined]
        return function

    return shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which checkpoint."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Checkpoint: a directory, a URL (s3://bucket/folder), or a hub id
    (distilbert/distilbert-base-uncased-distilled-squad)."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    weights: str | None = None
    """Name of the checkpoint's file of weights, where it has another than the usual ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options):
    """Where it is computed, and how exactly."""

    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16", "default"] = "float32"
    """Of float32 products. JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU."""

    devices: int | None = None
    """How many local devices to use; all of them when left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(PlaceOptions):
    """How and where it is computed."""

    COUNTS: ClassVar[tuple[str, ...]] = ("batch_tokens",)

    kernels: Literal["auto", "native", "xla"] = "auto"
    """What computes on a CPU: the C++ library that was compiled at installation, or XLA. auto is
    the library where it can be used. On GPUs and TPUs xla leaves out fused attention."""

    parallel: Literal["jit", "pmap"] = "jit"
    """How rows are split over devices: jit over a mesh, or pmap. The answers are the same."""

    batch_tokens: int | None = None
    """Tokens of a batch on each device, never fewer than one window has; what suits the device when
    left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowOptions(Options):
    """How a context is cut into windows."""

    COUNTS: ClassVar[tuple[str, ...]] = ("max_length",)

    max_length: int | None = None
    """Tokens of a window: question, part of the context and three special tokens; 384, or the
    checkpoint's positions if those are fewer."""

    doc_stride: int | None = None
    """Context tokens that neighbouring windows share, with mlperf by which they advance; 128, or
    half a window if that is less."""

    windows: Literal["overlap", "mlperf"] = "overlap"
    """How a long context is cut: as run_qa does, or as BERT's run_squad.py and MLPerf do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderOptions(WindowOptions, DeviceOptions):
    """How a reader cuts windows, and how and where it computes."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of weights and operands; sums, norms and softmax are float32 in any case. auto is bfloat16 on
    GPUs and TPUs, float32 on CPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """What scores are made of logits by."""

    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature",)

    temperature: float = 1.0
    """Divide logits by this before scores are made of them: what `flaxqa eval --calibrate` fitted
    to this checkpoint. Answers and their order stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(ScoreOptions):
    """How answers are chosen, by the rule `spans` of `flaxqa.answers`."""

    COUNTS: ClassVar[tuple[str, ...]] = ("top_k", "max_answer_length")
    SHARES: ClassVar[tuple[str, ...]] = ("min_score", "no_answer_threshold")

    top_k: int = 1
    """How many answers to give at most, best first. A larger number never changes the first."""

    max_answer_length: int = MAX_ANSWER_LENGTH
    """Tokens of the longest answer, before it is widened to whole words."""

    align_to_words: bool = True
    """Whether an answer is widened to whole words."""

    overlapping: bool = False
    """Whether an answer may share characters with a better one."""

    min_score: float = 0.0
    """Leave out answers with a lower score."""

    no_answer_threshold: float | None = None
    """Give no answer where the score of "no answer" is above this; 0.5 suits SQuAD 2.0's models.
    Models that know no unanswerable questions are never asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """What the questions are in."""

    input_format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "mrqa"] = (
        "auto"
    )
    """What all files are; auto goes by their names. json is SQuAD data or an array of objects."""

    split: str | None = None
    """Split of a hub data set, or of one that save_to_disk wrote; train for predict and finetune,
    otherwise validation."""

    data_config: str | None = None
    """Configuration of a hub data set that has several."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the columns id, question and context are called: id=qid context=passage; a column inside
    another is input.question."""

    encoding: str | None = None
    """Of text files; UTF-8 when left out. cp1252 is that of Windows in Western Europe."""

    delimiter: str | None = None
    """What separates the columns of CSV files: one character, or tab; a comma when left out."""

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        found = super().problems()
        if self.delimiter is not None and len(self.delimiter) != 1 and self.delimiter != "tab":
            found.append(f"delimiter is {self.delimiter!r}, it must be one character, or tab")
        try:
            ascii_too = ASCII.decode(self.encoding or "utf-8") == ASCII.decode()
        except (LookupError, ValueError):
            ascii_too = None
        if ascii_too is None:
            found.append(f"encoding is {self.encoding!r}, which Python does not know; cp1252, say")
        elif not ascii_too:
            found.append(
                f"encoding {self.encoding!r} writes line ends in a way of its own; convert the "
                f"files first: iconv -f {self.encoding} -t utf-8"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CarbonOptions(Options):
    """Whether energy and CO2e are measured. They decide no answer."""

    FINITE: ClassVar[tuple[str, ...]] = ("grid",)

    carbon: bool = False
    """Measure the energy that the machine takes, by codecarbon and without the network; with
    --country or --grid, which make CO2e of it."""

    country: str | None = None
    """With --carbon: whose average electricity counts, as ISO 3166-1 has it in three letters: FRA,
    DEU, USA."""

    grid: float | None = None
    """With --carbon: g CO2e of a kWh, where that of the electricity used here is known."""

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        found = super().problems()
        given = [name for name in ("country", "grid") if getattr(self, name) is not None]
        if self.carbon and not given:
            found.append("carbon is asked for, but not whose electricity counts: give --country "
                         "FRA, or --grid with the g CO2e of a kWh")  # fmt: skip
        elif self.carbon and len(given) > 1:
            found.append("carbon is asked for with --country and --grid; give only one")
        elif not self.carbon:
            found += [f"{name} is given without --carbon, which measures" for name in given]
        if self.country is not None and not re.fullmatch("[A-Z]{3}", self.country):
            found.append(
                f"country is {self.country!r}, it must be three capital letters, as FRA or DEU"
            )
        if is_number(self.grid) and self.grid is not None and self.grid < 0:
            found.append(f"grid is {self.grid!r}, it must be a number of at least 0")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig(CarbonOptions, ReaderOptions, AnswerOptions, DataOptions, ModelOptions):
    """Answers to any number of records."""

    PATHS: ClassVar[tuple[str, ...]] = ("input", "output", "profile")
    COUNTS: ClassVar[tuple[str, ...]] = ("shard_size", "max_context_chars")
    SHARES: ClassVar[tuple[str, ...]] = ("max_errors",)

    input: tuple[str, ...]
    """Files, folders, patterns (JSONL, CSV, Parquet, Arrow, SQuAD or MRQA JSON; .gz, .zst, .xz,
    .bz2), what save_to_disk wrote, a hub data set, or - for standard input."""

    output: str
    """Directory for the answers, here or in an object store (s3://bucket/folder); made if missing.
    A run that was stopped goes on there."""

    keep: tuple[str, ...] = ()
    """Other columns that go into the output."""

    format: Literal["parquet", "jsonl"] = "parquet"
    """Of the output."""

    shard_size: int = SHARD_SIZE
    """Records of a part of the output: what is lost at most when a run is killed."""

    unique_ids: bool = False
    """Whether a record whose id came before is set aside. Takes 24 bytes of memory a record."""

    max_context_chars: int = 1_000_000
    """A record with a longer context is set aside."""

    max_errors: float = 0.01
    """Stop when more than this share of the records is set aside; a hundred always may be."""

    profile: str | None = None
    """Write a trace of a few steady batches, by jax.profiler, into this directory."""

    engine: Literal["local", "ray"] = "local"
    """This process, or actors of Ray, in the cluster of RAY_ADDRESS or one started here."""

    workers: int | None = None
    """Actors of Ray; one for each machine, or for each GPU if they take GPUs, when left out."""

    worker_cpus: float | None = None
    """What each actor asks of Ray; a fraction of one CPU when left out."""

    worker_gpus: float = 0.0
    """GPUs of each actor."""

    worker_resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other resources of each actor: TPU=4."""


def read_toml(path: str | Path, kind: type[Any]) -> dict[str, Any]:
    """The fields of a config that a TOML file sets, checked one by one.

    A path that begins with `./` or `../` is relative to the file; any other is taken as on the
    command line.

    Args:
      path: of the file; a bare name, as `quickstart`, is that of a config of flaxqa's own.
      kind: the dataclass whose fields they are; see `Options`.

    Raises:
      UsageError: the file cannot be read, or has an unknown field or a value of another type.
    """
    own = {one.stem: one for one in OWN.glob("*.toml")}
    path = own.get(str(path)) or (str(path) if stores.is_url(path) else files.local(path))
    try:
        values = tomllib.loads(files.read_named(path).decode("utf-8"))
    except TryAgain:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    known = typing.get_type_hints(kind)
    known = {field.name: known[field.name] for field in dataclasses.fields(kind)}
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"{name} is no field; those are {', '.join(known)}")
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not fits(value, known[name]):
            problems.append(f"{name} is {value!r}, it must be {described(known[name])}")
        elif name in kind.named("PATHS"):
            values[name] = from_file(path, value)
        else:
            values[name] = value
    if problems:
        raise UsageError(all_problems(str(path), problems))
    return values


def from_file(file: Path | str, value: Any) -> Any:
    """A path, or several, as seen from a config file."""
    if isinstance(value, tuple):
        return tuple(from_file(file, one) for one in value)
    if not value.startswith(("./", "../")):
        return value
    if isinstance(file, Path):
        return str((file.parent / value).resolve())
    scheme, _, place = file.partition("://")  # of an object store
    return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(place), value))}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a field's type; an integer is a number, too."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if isinstance(kind, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, arguments[1]) for one in value.values())
    return type(value) is kind or (kind is float and type(value) is int)


def described(kind: Any) -> str:
    """What a field's type is called in messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if isinstance(kind, types.UnionType):
        return described(next(one for one in arguments if one is not types.NoneType))
    if origin is tuple:
        return f"an array, each of it {described(arguments[0])}"
    if origin is dict:
        return f"a table, each value {described(arguments[1])}"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names[kind]
