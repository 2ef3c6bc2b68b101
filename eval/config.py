"""What an evaluation runs on, as one flat record: from a TOML file, the command line, or Python.

Light to import: the command line builds its help from it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from flaxqa.errors import UsageError, all_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation of a checkpoint on a SQuAD v1.1 or 2.0 data set."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "data", "output")

    model: str
    """Checkpoint: a directory, or a hub id (distilbert/distilbert-base-uncased-distilled-squad)."""

    data: str
    """Questions: a SQuAD v1.1 or 2.0 JSON file, or a hub data set (rajpurkar/squad)."""

    output: str
    """Directory for the results; made if missing. Results of an earlier run are replaced."""

    revision: str | None = None
    """Branch, tag or commit of a hub model. The commit it resolves to is in run.json."""

    split: str = "validation"
    """Split of a hub data set."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    limit: int | None = None
    """Only the first so many questions. The scores are then those of this part alone."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of weights and operands; sums, norms and softmax are float32 in any case. auto is bfloat16 on
    GPUs and TPUs, float32 on CPUs; which it was is in run.json."""

    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16", "default"] = "float32"
    """Of float32 products. JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU."""

    kernels: Literal["auto", "native", "xla"] = "auto"
    """What computes on a CPU: the C++ library that was compiled at installation, or XLA. auto is
    the library where it can be used; which it was is in run.json."""

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
