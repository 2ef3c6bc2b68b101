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
    Options,
    PlaceOptions,
    ReaderOptions,
    ScoreOptions,
    WindowOptions,
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
class LogOptions(Options):
    """Which experiment trackers are told of the results. They decide none."""

    log: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = ()
    """Tell these trackers, through their own packages and offline: trackio where it keeps its runs,
    the others in --output, unless MLFLOW_TRACKING_URI or WANDB_MODE say otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """Into which groups questions are put."""

    PATHS: ClassVar[tuple[str, ...]] = ("group_by",)

    group_by: str | None = None
    """A CSV file with a column id and others, each of which puts questions in groups of its own
    beside those by question word and by lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostOptions(Options):
    """What the machine costs. It decides no result."""

    POSITIVE: ClassVar[tuple[str, ...]] = ("dollars_per_hour",)

    dollars_per_hour: float | None = None
    """Price of an hour of the machine: tells how many questions a dollar answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustOptions(Options):
    """What is told of how far scores can be trusted."""

    SHARES: ClassVar[tuple[str, ...]] = ("precision",)

    precision: float | None = None
    """Tell from which score on this share of the answers is right, as 0.9, and which share of the
    questions has such a score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(LogOptions, TrustOptions, CarbonOptions, ScoreOptions, ReaderOptions, Subject):
    """One evaluation of a checkpoint on questions with right answers."""

    PATHS: ClassVar[tuple[str, ...]] = ("calibrate",)
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

    calibrate: str | None = None
    """Other questions with right answers, read as --data is, on which one temperature is fitted:
    with it, scores tell best how many answers are right. The scores of this run are those with it;
    answers do not change."""

    min_f1: float | None = None
    """A gate: exit code 5 when F1 in percent is below it. The results are written all the same."""

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        found = super().problems()
        if self.calibrate is not None and self.temperature != 1.0:
            found.append("calibrate fits the temperature, so --temperature cannot be given, too")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(
    LogOptions, CarbonOptions, WindowOptions, PlaceOptions, DataOptions, ModelOptions
):
    """One training of a checkpoint on questions with right answers."""

    PATHS: ClassVar[tuple[str, ...]] = ("data", "heldout", "teacher", "cache_teacher", "output")
    COUNTS: ClassVar[tuple[str, ...]] = (
        "limit",
        "batch_size",
        "epochs",
        "stop_after",
        "save_every",
    )
    SEEDS: ClassVar[tuple[str, ...]] = ("seed",)
    SHARES: ClassVar[tuple[str, ...]] = ("distillation", "warmup", "weight_decay")
    POSITIVE: ClassVar[tuple[str, ...]] = ("learning_rate", "temperature")

    data: str
    """Questions with right answers, in all that `flaxqa eval` takes; the first answer counts."""

    output: str
    """Directory for the trained checkpoint; made if missing. A run that was stopped goes on there
    when the same command is given again."""

    heldout: str | None = None
    """Other questions, which score the checkpoint after each epoch; read as --data is."""

    limit: int | None = None
    """Only the first so many questions of --data."""

    teacher: str | None = None
    """Checkpoint to distil from, with the same vocabulary: the student learns its logits, too."""

    cache_teacher: str | None = None
    """Folder for the teacher's logits, which are computed once, so that other runs with the same
    teacher and data need not; in --output when left out."""

    temperature: float = 2.0
    """Of the softmax of teacher and student."""

    distillation: float = 0.5
    """Share of the teacher in the loss; the rest is the cross entropy of the right answers."""

    epochs: int = 3
    """How often every window is seen."""

    batch_size: int = 12
    """Windows of a step, on all devices together."""

    learning_rate: float = 3e-5
    """The highest; it falls to 0 in a straight line."""

    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0 first."""

    weight_decay: float = 0.0
    """AdamW's, of kernels and embeddings; biases and norms have none."""

    freeze_embeddings: bool = False
    """Leave the embeddings and their norm as they are."""

    dropout: bool = True
    """Whether to drop out at random, at the rates in the checkpoint's config.json."""

    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of the operands of products; the weights are float32 in any case. auto is bfloat16 on GPUs
    and TPUs, float32 on CPUs."""

    seed: int = 0
    """Of the order of windows, of dropout, and of the new head of a base model."""

    stop_after: int | None = None
    """Stop after so many steps, for a trial; the same command without it goes on from there."""

    save_every: int = 200
    """Steps after which the state is saved: what is lost at most when a run is killed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(LogOptions, GroupOptions, CostOptions, CarbonOptions, Subject):
    """What backends are measured on, and how."""

    COUNTS: ClassVar[tuple[str, ...]] = ("rounds", "min_queries", "threads", "width")
    SEEDS: ClassVar[tuple[str, ...]] = ("seed",)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(ReaderOptions, ModelOptions):
    """Underspecified questions that measure whom a checkpoint prefers."""

    PATHS: ClassVar[tuple[str, ...]] = ("templates", "output")
    SEEDS: ClassVar[tuple[str, ...]] = ("seed",)

    templates: str = "underspecified"
    """A TOML file of templates, JSON that UnQover generated, or the name of flaxqa's own."""

    output: str
    """Directory for the results; made if missing. Results of an earlier run are replaced."""

    seed: int = 0
    """Of the resampling that gives intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardOptions(Options):
    """What a model card says that runs do not know; what is left out is not in the card."""

    model_id: str | None = None
    """What the card calls the checkpoint: the hub id that it will have, or a path."""

    license: str | None = None
    """License of the weights, as the hub names it: apache-2.0."""

    language: tuple[str, ...] = ()
    """Languages that it answers in: en de."""

    base_model: str | None = None
    """Hub id of the model that it was trained from; that of `flaxqa finetune` when left out."""

    dataset: tuple[str, ...] = ()
    """Hub ids of the data sets that it was trained on; those of `flaxqa finetune` when left out."""
