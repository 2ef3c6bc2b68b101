"""What an evaluation runs on, as one flat record: from a TOML file, the command line, or Python.

Light to import: the command line builds its help from it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from flaxqa.errors import UsageError, all_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint and the questions that it is asked."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "data", "output")

    model: str
    """Checkpoint: a directory, or a hub id (distilbert/distilbert-base-uncased-distilled-squad)."""

    data: str
    """Questions: a SQuAD v1.1 or 2.0 JSON file, or a hub data set (rajpurkar/squad)."""

    output: str
    """Directory for the results; made if missing. Results of an earlier run are replaced."""

    revision: str | None = None
    """Branch, tag or commit of a hub model. The commit it resolves to is in the results."""

    split: str = "validation"
    """Split of a hub data set."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    limit: int | None = None
    """Only the first so many questions. The scores are then those of this part alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Subject):
    """One evaluation of a checkpoint on a SQuAD v1.1 or 2.0 data set."""

    PATHS: ClassVar[tuple[str, ...]] = (*Subject.PATHS, "profile")

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of weights and operands; sums, norms and softmax are float32 in any case. auto is bfloat16 on
    GPUs and TPUs, float32 on CPUs; which it was is in run.json."""

    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16", "default"] = "float32"
    """Of float32 products. JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU."""

    kernels: Literal["auto", "native", "xla"] = "auto"
    """What computes on a CPU: the C++ library that was compiled at installation, or XLA. auto is
    the library where it can be used; which it was is in run.json. On GPUs and TPUs xla leaves out
    fused attention."""

    parallel: Literal["jit", "pmap"] = "jit"
    """How rows are split over devices: jit over a mesh, or pmap. The answers are the same."""

    devices: int | None = None
    """How many local devices to use; all of them when left out."""

    batch_tokens: int | None = None
    """Tokens of a batch on each device; what suits the device when left out."""

    max_length: int = 384
    """Tokens of a window: question, part of the context and three special tokens."""

    doc_stride: int = 128
    """Context tokens that neighbouring windows share; with mlperf, by which they advance."""

    windows: Literal["overlap", "mlperf"] = "overlap"
    """How a long context is cut: as run_qa does, or as BERT's run_squad.py and MLPerf do."""

    decoder: Literal["squad", "spans"] = "squad"
    """Which rule chooses answers: run_qa's, or that of `flaxqa ask` and the reader."""

    n_best: int = 20
    """Starts and ends tried for each window, and answers kept for each question."""

    max_answer_length: int = 30
    """Tokens of the longest answer."""

    null_score_diff_threshold: float = 0.0
    """SQuAD 2.0: a question is left unanswered where its null odds are above this."""

    profile: str | None = None
    """Write a trace of a few steady batches, by jax.profiler, into this directory."""

    min_f1: float | None = None
    """A gate: exit code 5 when F1 in percent is below it. The results are written all the same."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, it must be at least 1"
            for name in ("limit", "devices", "batch_tokens", "n_best", "max_answer_length")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name} is {value}, it must be a finite number"
            for name in ("null_score_diff_threshold", "min_f1")
            if (value := getattr(self, name)) is not None and not math.isfinite(value)
        ]
        if problems:
            raise UsageError(all_problems("the config cannot be used", problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Subject):
    """What backends are measured on, and how."""

    PATHS: ClassVar[tuple[str, ...]] = (*Subject.PATHS, "profile")

    limit: int | None = 200
    """Only the first so many questions."""

    scenarios: tuple[Literal["offline", "single", "server"], ...] = ("offline", "single", "server")
    """offline: all questions at once; single: one after the other; server: at random times."""

    ways: tuple[Literal["shipped", "tuned"], ...] = ("shipped", "tuned")
    """shipped: batches of 8, padded to 384; tuned: sorted by length, padded to their longest."""

    rounds: int = 5
    """Interleaved runs of each."""

    sweep: bool = True
    """Whether to measure throughput by batch size and by length, too."""

    min_seconds: float = 5.0
    """The least duration of each scenario."""

    min_queries: int = 100
    """The least number of questions of each scenario."""

    latency_bound: float = 1.0
    """Seconds in which 99 of 100 questions of the scenario server have to be answered."""

    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where to compute; auto is where JAX runs. What cannot compute there runs on the CPU, and the
    results say so."""

    profile: str | None = None
    """Write a trace of a few steady batches of each JAX backend, by jax.profiler, below this
    directory, once everything is measured."""

    threads: int | None = None
    """Of each backend; as many as there are CPUs when left out."""

    seed: int = 0
    """Of the order and the times at which questions come."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, it must be at least 1"
            for name in ("limit", "rounds", "min_queries", "threads")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name} is {value}, it must be a number above 0"
            for name in ("min_seconds", "latency_bound")
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        problems += [
            f"there are no {name}" for name in ("scenarios", "ways") if not getattr(self, name)
        ]
        if problems:
            raise UsageError(all_problems("the config cannot be used", problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Measurement):
    """Several backends beside each other."""

    backends: tuple[str, ...] = (
        "jax", "jax/bfloat16", "torch", "torch/bfloat16", "torch.compile", "onnxruntime",
        "onnxruntime/int8", "openvino", "openvino/bfloat16", "tensorflow", "jax-hf-style",
    )  # fmt: skip
    """The first is what the others' speeds are compared with; name, name/dtype or module:Class."""

    scenarios: tuple[Literal["offline", "single", "server"], ...] = ("offline", "single")
    """offline: all questions at once; single: one after the other; server: at random times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(Measurement):
    """One backend in all scenarios."""

    backend: str = "jax"
    """Name, name/dtype or module:Class."""

    @property
    def backends(self) -> tuple[str, ...]:
        return (self.backend,)
