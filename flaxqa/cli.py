"""The command `flaxqa`. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 an unexpected error; 2 an option, config or data file that cannot be used;
3 done, with questions or records set aside; 4 a checkpoint that was refused; 5 below the score
asked for; 75 a place that cannot be written or reached now; 130 and 143 stopped by SIGINT and
SIGTERM.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from flaxqa import commands, files, stores
from flaxqa.config import (
    AnswerOptions,
    DataOptions,
    ModelOptions,
    Options,
    PredictConfig,
    ReaderOptions,
    read_toml,
)
from flaxqa.errors import FlaxqaError, UsageError, all_problems
from flaxqa.eval.config import (
    BenchConfig,
    CardOptions,
    CompareConfig,
    EvalConfig,
    FinetuneConfig,
    GroupOptions,
    ProbeConfig,
    TrustOptions,
)

HELP = """Extractive question answering with DistilBERT and BERT on JAX, and the harness that
measures it.

  flaxqa ask --model MODEL --question "Who?" --context "I am Bob."
  flaxqa predict records.jsonl --model MODEL --output answers
  flaxqa eval --config quickstart
  flaxqa score dev-v1.1.json predictions.json
  flaxqa report runs/eval
  flaxqa diff runs/main runs/mine --gate
  flaxqa compare --config compare --output runs/compare
  flaxqa finetune --model MODEL --data train.json --output trained
  flaxqa probe --model MODEL --output runs/probe
  flaxqa export --model MODEL --format onnx --output model.onnx

MODEL is a directory or a hub id. `flaxqa COMMAND --help` explains a command, `flaxqa info` tells
what would compute here. --config takes a file, or one of flaxqa's own by its name. Exit codes: 0
done, 2 bad option or data, 3 done but questions or records were set aside, 4 checkpoint refused, 5
below --min-f1 or --gate, 75 try again."""


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
class Report(Unchecked, TrustOptions, GroupOptions):
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
    """Where to write the page."""


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


# Of each command that takes --config: its class, its field with the options, and their class.
CONFIGURED: dict[str, tuple[Any, str, Any]] = {
    "predict": (Predict, "prediction", Prediction),
    "eval": (Eval, "evaluation", Evaluation),
    "compare": (Compare, "comparison", Comparison),
    "bench": (Bench, "bench", Benchmark),
    "finetune": (Finetune, "tuning", Tuning),
    "probe": (Probe, "probing", Probing),
}
# Of each command its class and what it does.
COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "ask": (Ask, commands.ask),
    "predict": (Predict, commands.predict),
    "eval": (Eval, lambda command: commands.evaluate(command.evaluation)),
    "score": (Score, commands.score),
    "compare": (Compare, lambda command: commands.compare(command.comparison)),
    "bench": (Bench, lambda command: commands.compare(command.bench)),
    "finetune": (Finetune, commands.finetune),
    "probe": (Probe, lambda command: commands.probe(command.probing)),
    "report": (Report, commands.write_report),
    "diff": (Diff, commands.diff),
    "card": (Card, lambda command: commands.write_card(command, options_of_commands())),
    "export": (Export, commands.write_export),
    "info": (Info, commands.info),
}


def options_of_commands() -> dict[str, type[Any]]:
    """The class of the options of each command."""
    return {name: CONFIGURED[name][2] if name in CONFIGURED else kind
            for name, (kind, _) in COMMANDS.items()}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for number in ENDED:
        signal.signal(number, end)
    try:
        sys.exit(run(argv))
    except FlaxqaError as error:
        print(f"flaxqa: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        sys.stderr.close()
        sys.exit(1)


ENDED = {signal.SIGINT: "stopped", signal.SIGTERM: "terminated"}
LATER = 0.02  # seconds


def end(signal_number: int, frame: types.FrameType | None) -> None:
    """Ends the process as by an exception, and two seconds later if that one was lost.

    Where an exception would be dropped, or would end a library in the middle of its start, the
    signal comes again a little later. Files are written whole, so an end without clean-up loses
    nothing.
    """
    if not ENDING:
        print(f"flaxqa: {ENDED[signal.Signals(signal_number)]}", file=sys.stderr, flush=True)
        certain = threading.Timer(2.0, os._exit, (128 + signal_number,))
        certain.daemon = True
        certain.start()
        ENDING.append(signal_number)
    if not may_raise(frame):
        again = threading.Timer(LATER, os.kill, (os.getpid(), signal_number))
        again.daemon = True
        again.start()
        return
    for number in ENDED:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signal_number)


ENDING: list[int] = []  # the signal that came


def may_raise(frame: types.FrameType | None) -> bool:
    """Whether an exception from there reaches `main`: not out of an import or the collector."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "_xla_gc_callback":
            return False
        if code is main.__code__:
            return True
        frame = frame.f_back
    return False  # the process is ending already


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if argv[:1] == ["--version"]:
        from flaxqa import __version__

        print(__version__)
        return 0
    command = parse(argv)
    name = next(name for name, (kind, _) in COMMANDS.items() if type(command) is kind)
    refuse_urls(command)
    check(command, name)
    return COMMANDS[name][1](command)


def check(command: Any, name: str) -> None:
    """Raises: UsageError: options that cannot be; says which, as the command line calls them."""
    if isinstance(command, Options):
        problems = [
            re.sub(r"^(\w+)(?= is )", lambda found: "--" + found[0].replace("_", "-"), problem)
            for problem in command.problems()
        ]
        if problems:
            hint = f"`flaxqa {name} --help` explains the options"
            told = problems[0] if len(problems) == 1 else all_problems("options", problems)
            raise UsageError(f"{told}\n{hint}")
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(value := getattr(command, field.name)):
            check(value, name)


def in_stores(command: Any, name: str) -> bool:
    """Whether an option may name what lies in an object store."""
    if name == "output":
        return isinstance(command, PredictConfig | EvalConfig)
    return name in (*NAMED, "model", "teacher", "input")


def refuse_urls(command: Any) -> None:
    """Raises: UsageError: something that is read or written is a URL of no store."""
    paths = (*(command.named("PATHS") if isinstance(command, Options) else ()), *NAMED)
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            refuse_urls(value)
        for one in value if isinstance(value, tuple) else (value,):
            named = isinstance(one, Path) or (isinstance(one, str) and field.name in paths)
            if named and not (in_stores(command, field.name) and stores.is_url(one)):
                files.local(one)


def parse(argv: list[str]) -> Any:
    """The command and its options; the fields of --config FILE are the defaults of the others."""
    defaults: dict[str, dict[str, Any]] = {}
    if (name := argv[0] if argv else "") in CONFIGURED:
        command, field, kind = CONFIGURED[name]
        given = option(argv, "--config")
        values = read_toml(given, kind) if given is not None else {}
        # What finalizes needs only the output.
        optional = {"input": (), "model": ""} if "--finalize" in argv else {}
        required = {
            one.name: optional.get(one.name, tyro.MISSING)
            for one in dataclasses.fields(kind)
            if one.default is one.default_factory is dataclasses.MISSING
        }
        defaults[name] = {"default": command(**{field: kind(**required | values)})}
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(name, {}))]
        for name, (kind, _) in COMMANDS.items()
    ]
    either: Any = functools.reduce(operator.or_, kinds)
    return tyro.cli(
        either,
        prog="flaxqa",
        description=HELP,
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        registry=REGISTRY,
    )


def option(argv: list[str], name: str) -> str | None:
    """The value of an option that is needed before the command line can be parsed."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
    return None


# --- options of any number of NAME=VALUE ---

REGISTRY = tyro.constructors.ConstructorRegistry()
PAIRS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    dict[str, str]: ("COLUMN", str),
    dict[str, float]: ("NUMBER", float),
}


@REGISTRY.primitive_rule
def pairs(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How the fields that are a dict are given."""
    if kind.type not in PAIRS:
        return None
    of, value = PAIRS[kind.type]

    def read(arguments: list[str]) -> dict[str, Any]:
        split = [argument.partition("=") for argument in arguments]
        if wrong := [name for name, equals, _ in split if not equals]:
            raise ValueError(f"{wrong[0]!r} is not NAME={of}")
        return {name: value(text) for name, _, text in split}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"NAME={of}",
        instance_from_str=read,
        is_instance=lambda given: isinstance(given, dict),
        str_from_instance=lambda given: [f"{name}={text}" for name, text in given.items()],
    )


if __name__ == "__main__":
    main()
