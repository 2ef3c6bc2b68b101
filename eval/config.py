"""What an evaluation runs on, as one flat record: from a TOML file, the command line, or Python.

Light to import: the command line builds its help from it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from flaxqa.config import (
    MAX_ANSWER_LENGTH,
    CarbonOptions,
    DataOptions,
    ModelOptions,
    ReaderOptions,
)

Scenario = Literal["offline", "single", "server", "start", "step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject(DataOptions, ModelOptions):
    """A checkpoint and the questions that it is asked."""

    PATHS: ClassVar[tuple[str, ...]] = ("data", "output", "profile")
    COUNTS: ClassVar[tuple[str, ...]] = ("limit",)

    data: str
    """Questions with right answers: a file, a folder or a pattern of SQuAD or MRQA JSON, of rows as
    `datasets` gives them (JSON, JSON lines, Parquet, Arrow), also .gz and .zst; what save_to_disk
    wrote; or a hub data set (rajpurkar/squad)."""

    output: str
    """Directory for the results; made if missing. Results of an earlier run are replaced."""

    limit: int | None = None
    """Only the first so many questions. The scores are then those of this part alone."""

    profile: str | None = None
    """Write a trace of a few steady batches, by jax.profiler, into this directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(CarbonOptions, ReaderOptions, Subject):
    """One evaluation of a checkpoint on questions with right answers."""

    COUNTS: ClassVar[tuple[str, ...]] = ("n_best", "max_answer_length")
    FINITE: ClassVar[tuple[str, ...]] = ("null_score_diff_threshold", "min_f1")

    decoder: Literal["squad", "spans"] = "squad"
    """Which rule chooses answers: run_qa's, or that of `flaxqa ask` and the reader."""

    n_best: int = 20
    """Starts and ends tried for each window, and answers kept for each question."""

    max_answer_length: int = MAX_ANSWER_LENGTH
    """Tokens of the longest answer."""

    null_score_diff_threshold: float = 0.0
    """SQuAD 2.0: a question is left unanswered where its null odds are above this."""

    min_f1: float | None = None
    """A gate: exit code 5 when F1 in percent is below it. The results are written all the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(CarbonOptions, Subject):
    """What backends are measured on, and how."""

    COUNTS: ClassVar[tuple[str, ...]] = ("rounds", "min_queries", "threads", "width")
    POSITIVE: ClassVar[tuple[str, ...]] = ("min_seconds", "latency_bound")

    limit: int | None = 200
    """Only the first so many questions."""

    width: int | None = None
    """Repeat the checkpoint's channels until there are so many, which changes no answer: with 768
    it has DistilBERT-base's width, and with as many layers its speed."""

    scenarios: tuple[Scenario, ...] = ("offline", "single", "server")
    """offline: all questions at once; single: one after the other; server: at random times; start:
    from nothing to all answers, with empty and with full caches of compiled code; step: the largest
    batch alone."""

    ways: tuple[Literal["shipped", "tuned", "streamed"], ...] = ("shipped", "tuned", "streamed")
    """How offline questions are run. shipped: batches of 8, padded to 384; tuned: sorted by length,
    padded to their longest; streamed: as flaxqa's reader does it, tokenizing, computing and
    decoding side by side (backends that can)."""

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

    threads: int | None = None
    """Of each backend; as many as there are CPUs when left out."""

    seed: int = 0
    """Of the order and the times at which questions come."""

    def problems(self) -> list[str]:
        empty = [name for name in ("scenarios", "ways") if not getattr(self, name)]
        return [*super().problems(), *(f"there are no {name}" for name in empty)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Measurement):
    """Several backends beside each other."""

    backends: tuple[str, ...] = (
        "jax", "jax/bfloat16", "torch", "torch/bfloat16", "torch.compile", "onnxruntime",
        "onnxruntime/int8", "openvino", "openvino/bfloat16", "tensorflow", "jax-hf-style",
    )  # fmt: skip
    """The first is what the others' speeds are compared with; name, name/dtype or module:Class."""

    scenarios: tuple[Scenario, ...] = ("offline", "single")
    """offline: all questions at once; single: one after the other; server: at random times; start:
    from nothing to all answers, with empty and with full caches of compiled code; step: the largest
    batch alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(Measurement):
    """One backend in all scenarios."""

    backend: str = "jax"
    """Name, name/dtype or module:Class."""

    @property
    def backends(self) -> tuple[str, ...]:
        return (self.backend,)
