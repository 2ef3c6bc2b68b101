"""What the commands of the command line take: a class each, whose docstrings are the help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flaxqa.config import (
    AnswerOptions,
    DataOptions,
    ModelOptions,
    PredictConfig,
    ReaderOptions,
)
from flaxqa.eval.config import (
    BenchConfig,
    CardOptions,
    CompareConfig,
    CostOptions,
    EvalConfig,
    FinetuneConfig,
    GroupOptions,
    ProbeConfig,
    TrustOptions,
)


class Unchecked:
    """Leaves it to `check` to refuse options, or tyro would tell of them as of its own."""

    def __post_init__(self) -> None:
        pass


Named = Annotated[str | None, tyro.conf.arg(metavar="FILE")]  # a path, or an object's URL
NAMED = (
    "config", "context_file", "predictions", "na_prob_file", "out_file", "data", "heldout",
    "templates", "calibrate", "group_by",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask(Unchecked, ReaderOptions, AnswerOptions, ModelOptions):
    """Answer one question about one text.

    The text is --context, the file --context-file, or standard input. On a terminal the answer is
    shown in its text; piped, or with --json, it is one JSON line with character offsets.
    """

    question: str
    """What to ask."""

    context: str | None = None
    """The text that holds the answer."""

    context_file: Named = None
    """A UTF-8 file with the text."""

    json: bool = False
    """One JSON line, also on a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Unchecked, EvalConfig):
    """What is scored, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Unchecked, CompareConfig):
    """What is compared, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(Unchecked, BenchConfig):
    """What is measured, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(Unchecked, FinetuneConfig):
    """What is trained, on what, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probing(Unchecked, ProbeConfig):
    """What is asked, and of what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction(Unchecked, PredictConfig):
    """What answers, how, and where to."""

    input: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """Files, folders, patterns, here or in an object store (JSONL, CSV, Parquet, Arrow, SQuAD or
    MRQA JSON; .gz, .zst, .xz, .bz2), what save_to_disk wrote, a hub data set, or - for standard
    input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Unchecked, DataOptions):
    """Score a predictions file as the official SQuAD script does.

    Prints one JSON line in percent. For v1.1 data it is {"exact_match": ..., "f1": ...}; for SQuAD
    2.0, exact and f1 of all questions, of those with an answer (HasAns) and of those without
    (NoAns), and with --na-prob-file the best thresholds. Warnings go to stderr.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Questions with right answers, in all that `flaxqa eval` takes."""

    predictions: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PREDICTIONS")]
    """JSON object of question id to answer text; "" for no answer."""

    na_prob_file: Annotated[str | None, tyro.conf.arg(aliases=["-n"], metavar="FILE")] = None
    """SQuAD 2.0: JSON object of question id to how likely it has no answer. For null_odds.json of
    `flaxqa eval` the threshold is 0."""

    na_prob_thresh: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 1.0
    """SQuAD 2.0: a question counts as left unanswered where that number is above."""

    out_file: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Write the JSON line there instead of printing it."""

    only_predicted: bool = False
    """Score only the questions that have a prediction, and say how many those are; for what a run
    with --limit wrote."""

    intervals: bool = False
    """Also give 95 % bootstrap intervals and the number of questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Unchecked, ModelOptions):
    """Write a checkpoint as a file for other runtimes: ONNX, StableHLO, TensorFlow's SavedModel.

    All take input_ids and attention_mask (BERT's token_type_ids, too) of any batch and length, and
    give start_logits and end_logits. What was written is run, and kept only if its logits are the
    model's. Piped, what was written is printed as one JSON line.
    """

    format: Literal["onnx", "stablehlo", "saved_model"]
    """onnx and stablehlo (jax.export: CPU, CUDA, ROCm, TPU) are files, saved_model is a folder."""

    output: Path
    """Where to write it."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and operands; only stablehlo has others than float32."""

    overwrite: bool = False
    """Replace an export that is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Do the same work on several backends: the same answers, how good, how fast.

    Every backend gets the same checkpoint, windows and decoder in a process of its own; rounds are
    interleaved. Writes comparison.json, report.html and summary.md into --output. One that is not
    installed is told of; one whose answers are not those of the plain float32 model, or that
    answers otherwise while it is timed, is INVALID. Exit code 3 where one was, or
    failed with an error of its own, whose traceback is in workers.log.

      flaxqa compare --config compare --output runs/compare
      flaxqa compare --model MODEL --data dev.json --output OUT --backends jax torch mine:Backend
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    comparison: Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure one backend in three scenarios: offline, one question at a time, under random load.

    As `flaxqa compare`, for one.

      flaxqa bench --model MODEL --data dev-v1.1.json --output OUT --backend jax/bfloat16
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    bench: Benchmark


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Measure whom a checkpoint prefers where a text does not say, after UnQover (Li et al. 2020).

    Asks questions like "Who works as a nurse?" of texts that name two people and do not say.
    Writes probe.json and the page probe.html into --output. The measures are mu, how strong
    preferences are, eta, how steady, and how far the answers go by places and ignore negations.
    Piped, they are printed as one JSON line.

      flaxqa probe --model MODEL --output runs/probe
      flaxqa probe --model MODEL --templates mine.toml --output runs/mine
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    probing: Probing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Unchecked, TrustOptions, GroupOptions, CostOptions):
    """Make one page of the results of any runs of eval, compare, bench, probe and finetune.

    The page is a single HTML file that loads nothing. Of evaluations it shows every question: with
    filters, search and the keys j and k; what kinds of mistakes there are; how far scores can be
    trusted; and of several runs how they differ.

      flaxqa report runs/float32 runs/bfloat16
      flaxqa report runs/eval --group-by topics.csv --precision 0.9 --output page.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directories that were the --output of a run."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """Where to write the page, or the folder for another format."""

    format: Literal["page", "lm-eval"] = "page"
    """lm-eval writes the evaluations as EleutherAI's lm-evaluation-harness writes its results and
    samples, into a folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff(Unchecked, GroupOptions):
    """Tell whether RUN_B is better or worse than RUN_A, two evaluations of the same questions.

    Shows the differences of exact match and F1 with 95 % bootstrap intervals, paired by question,
    McNemar's exact test, and each group, and writes the page of both. Piped, the differences are
    printed as one JSON line. Runs of different questions are refused.

      flaxqa diff runs/float32 runs/bfloat16
      flaxqa diff runs/main runs/mine --gate
    """

    run_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    """Directory that was the --output of an eval."""

    run_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    """Another one."""

    gate: bool = False
    """Exit code 5 when RUN_B is worse beyond chance: when the whole interval of the difference of
    exact match or of F1 is below 0."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("diff.html")
    """Where to write the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(Unchecked, CardOptions):
    """Write or update a model card of the hub from the results of runs of one checkpoint.

    Takes what eval, compare, bench, probe and finetune wrote. In a card that is there only flaxqa's
    sections and the metadata that changes are replaced. With neither --output nor --push the card
    is printed.

      flaxqa card runs/eval runs/compare --output MODEL/README.md --license apache-2.0
      flaxqa card runs/eval --push me/my-model
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directories that were the --output of a run."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The card to write or update."""

    push: str | None = None
    """Update the card of this hub repository instead. Shows what would change and asks first."""

    yes: bool = False
    """Push without asking."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a checkpoint on questions with right answers: exact match, F1 and throughput.

    Writes predictions.json, nbest_predictions.json, per_example.parquet, metrics.json and run.json
    into --output, and null_odds.json for SQuAD 2.0. A run that was stopped goes on when the same
    command is given again. Piped, the content of metrics.json is printed as one JSON line.
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    evaluation: Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a checkpoint on questions with right answers, with --teacher by distillation.

    MODEL is a base model or one with a question-answering head. What comes out is a checkpoint that
    flaxqa and transformers load. The defaults are the recipe of the published distilled checkpoint.
    A run that was stopped, even by kill -9, goes on when the same command is given again. Piped,
    the content of finetune.json is printed as one JSON line.

      flaxqa finetune --model MODEL --data train.json --heldout dev.json --output trained
      flaxqa finetune --model MODEL --data train.json --teacher TEACHER --output student
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    restart: bool = False
    """Remove what another run left in --output and begin anew."""

    tuning: Tuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Unchecked, ReaderOptions):
    """Tell what would compute here, and why: versions, devices, kernels, attention.

    With --model the checkpoint is loaded, so that what is said is of it. Piped, it is one JSON
    line.
    """

    model: str | None = None
    """Checkpoint: a directory, or a hub id; without it, of DistilBERT-base's sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Answer any number of records, each exactly once.

    INPUT is files, folders or patterns of JSONL, CSV, Parquet or SQuAD JSON, with the columns
    question and context and perhaps id. Writes parts of --shard-size records into --output, whose
    sorted names give the order of the input, and what could not be answered into errors.jsonl.
    A run that was stopped, even by kill -9, goes on when the same command is given again.

      flaxqa predict "data/*.jsonl.gz" --model MODEL --output answers
      flaxqa predict data/ --model MODEL --output answers --columns id=qid context=passage
      flaxqa predict data/ --model MODEL --output answers --dry-run

    Several processes share the work with --shard 0/4, --shard 1/4, ..., with --multihost, or with
    --engine ray; the parts are the same. Piped, the counts are printed as one JSON line.
    """

    config: Named = None
    """TOML file with any of the options below, or the name of one of flaxqa's own; an option given
    here wins over it."""

    dry_run: bool = False
    """Only count records and shards, and tell from a sample how long it would take."""

    restart: bool = False
    """Remove what another run left in --output and begin anew."""

    shard: str | None = None
    """Share i/n of the work, i from 0: for one process of n that are started side by side."""

    multihost: bool = False
    """Take i and n from jax.distributed: TPU pods, Slurm, Open MPI."""

    finalize: bool = False
    """Only check that all parts are there, put errors.jsonl together, and write _SUCCESS."""

    prediction: Prediction
