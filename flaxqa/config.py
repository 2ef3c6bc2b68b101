"""What a batch run does, as one flat record: from a TOML file, the command line, or Python.

Light to import: the command line builds its help from it.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from flaxqa import files
from flaxqa.errors import UsageError, all_problems

SHARD_SIZE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Answers to any number of records."""

    PATHS: ClassVar[tuple[str, ...]] = ("input", "output", "model", "profile")

    input: tuple[str, ...]
    """Files, folders, patterns (JSONL, CSV, Parquet, SQuAD JSON, .gz, .zst), or a hub data set."""

    output: str
    """Directory for the answers; made if missing. A run that was stopped goes on there."""

    model: str
    """Checkpoint: a directory, or a hub id (distilbert/distilbert-base-uncased-distilled-squad)."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    input_format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    """What all files are; auto goes by their names. json is SQuAD data or an array of objects."""

    split: str = "train"
    """Split of a hub data set."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the columns id, question and context are called: id=qid context=passage."""

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

    top_k: int = 1
    """How many answers to give, best first; above 1 they are in the column answers."""

    max_answer_length: int = 30
    """Tokens of the longest answer, before it is widened to whole words."""

    align_to_words: bool = True
    """Whether an answer is widened to whole words."""

    overlapping: bool = False
    """Whether an answer may share characters with a better one."""

    min_score: float = 0.0
    """Leave out answers with a lower score."""

    no_answer_threshold: float | None = None
    """Give no answer where the score of "no answer" is above this; 0.5 suits SQuAD 2.0's models."""

    max_length: int | None = None
    """Tokens of a window; 384, or the checkpoint's positions if those are fewer."""

    doc_stride: int | None = None
    """Tokens that neighbouring windows share; 128, or half a window if that is less."""

    windows: Literal["overlap", "mlperf"] = "overlap"
    """How a long context is cut: as run_qa does, or as BERT's run_squad.py and MLPerf do."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of weights and operands; auto is bfloat16 on GPUs and TPUs, float32 on CPUs."""

    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16", "default"] = "float32"
    """Of float32 products. JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU."""

    kernels: Literal["auto", "native", "xla"] = "auto"
    """What computes on a CPU: the C++ library that was compiled at installation, or XLA. On GPUs
    and TPUs xla leaves out fused attention."""

    parallel: Literal["jit", "pmap"] = "jit"
    """How rows are split over devices: jit over a mesh, or pmap."""

    devices: int | None = None
    """How many local devices to use; all of them when left out."""

    batch_tokens: int | None = None
    """Tokens of a batch on each device; what suits the device when left out."""

    profile: str | None = None
    """Write a trace of a few steady batches, by jax.profiler, into this directory."""

    engine: Literal["local", "ray"] = "local"
    """This process, or actors of Ray Data, in the cluster of RAY_ADDRESS or one started here."""

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
      path: of the file.
      kind: the dataclass whose fields they are; its `PATHS` names those that are paths.

    Raises:
      UsageError: the file cannot be read, or has an unknown field or a value of another type.
    """
    path = files.local(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
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
        elif name in kind.PATHS:
            values[name] = from_file(path, value)
        else:
            values[name] = value
    if problems:
        raise UsageError(all_problems(str(path), problems))
    return values


def from_file(file: Path, value: Any) -> Any:
    """A path, or several, as seen from a config file."""
    if isinstance(value, tuple):
        return tuple(from_file(file, one) for one in value)
    return str((file.parent / value).resolve()) if value.startswith(("./", "../")) else value


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
