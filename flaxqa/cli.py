"""The command `flaxqa`. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 an unexpected error; 2 an option, config or data file that cannot be used;
3 done, with questions or records set aside; 4 a checkpoint that was refused; 5 below the score
asked for; 75 a place that cannot be written or reached now; 130 and 143 stopped by SIGINT and
SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from eval.config import BenchConfig, CompareConfig, EvalConfig
from flaxqa import files
from flaxqa.config import PredictConfig, read_toml
from flaxqa.errors import DataError, FlaxqaError, GateNotMet, UsageError

if TYPE_CHECKING:
    from flaxqa.answers import Answer
    from flaxqa.batch import Estimate, Summary

SET_ASIDE = 3
SHOWN = 20  # of many warnings of one kind
HELP = """Extractive question answering with DistilBERT and BERT on JAX, and the harness that
measures it.

  flaxqa ask --model MODEL --question "Who?" --context "I am Bob."
  flaxqa predict records.jsonl --model MODEL --output answers
  flaxqa eval --config configs/quickstart.toml
  flaxqa score dev-v1.1.json predictions.json
  flaxqa compare --config configs/compare.toml --output runs/compare
  flaxqa export --model MODEL --format onnx --output model.onnx

MODEL is a directory or a hub id. `flaxqa COMMAND --help` explains a command, `flaxqa --version`
tells the version. Exit codes: 0 done, 2 bad option or data, 3 done but questions or records were
set aside, 4 checkpoint refused, 5 below --min-f1, 75 try again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Answer one question about one text.

    The text is --context, the file --context-file, or standard input. On a terminal the answer is
    shown in its text; piped, or with --json, it is one JSON line with character offsets.
    """

    model: str
    """Checkpoint: a directory, or a hub id (distilbert/distilbert-base-uncased-distilled-squad)."""

    question: str
    """What to ask."""

    context: str | None = None
    """The text that holds the answer."""

    context_file: Path | None = None
    """A UTF-8 file with the text."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    top_k: int = 1
    """How many answers to give, best first."""

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

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of weights and operands; auto is bfloat16 on GPUs and TPUs, float32 on CPUs."""

    json: bool = False
    """One JSON line, also on a terminal."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Score a predictions file as the official SQuAD script does.

    Prints one JSON line in percent. For v1.1 data it is {"exact_match": ..., "f1": ...}; for SQuAD
    2.0, exact and f1 of all questions, of those with an answer (HasAns) and of those without
    (NoAns), and with --na-prob-file the best thresholds. Warnings go to stderr.
    """

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """SQuAD v1.1 or 2.0 JSON file."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """JSON object of question id to answer text; "" for no answer."""

    na_prob_file: Annotated[Path | None, tyro.conf.arg(aliases=["-n"], metavar="FILE")] = None
    """SQuAD 2.0: JSON object of question id to how likely it has no answer. For null_odds.json of
    `flaxqa eval` the threshold is 0."""

    na_prob_thresh: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 1.0
    """SQuAD 2.0: a question counts as left unanswered where that number is above."""

    out_file: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Write the JSON line there instead of printing it."""

    intervals: bool = False
    """Also give 95 % bootstrap intervals and the number of questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a file for other runtimes: ONNX, StableHLO, TensorFlow's SavedModel.

    All take input_ids and attention_mask (BERT's token_type_ids, too) of any batch and length, and
    give start_logits and end_logits. What was written is run, and kept only if its logits are the
    model's. Piped, what was written is printed as one JSON line.
    """

    model: str
    """Checkpoint: a directory, or a hub id (distilbert/distilbert-base-uncased-distilled-squad)."""

    format: Literal["onnx", "stablehlo", "saved_model"]
    """onnx and stablehlo (jax.export: CPU, CUDA, ROCm, TPU) are files, saved_model is a folder."""

    output: Path
    """Where to write it."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

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
    answers otherwise while it is timed, is INVALID. Exit code 3 where one was.

      flaxqa compare --config configs/compare.toml --output runs/compare
      flaxqa compare --model MODEL --data dev.json --output OUT --backends jax torch mine:Backend
    """

    config: Path | None = None
    """TOML file with any of the options below; an option given here wins over the file."""

    comparison: CompareConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure one backend in three scenarios: offline, one question at a time, under random load.

    As `flaxqa compare`, for one.

      flaxqa bench --model MODEL --data dev-v1.1.json --output OUT --backend jax/bfloat16
    """

    config: Path | None = None
    """TOML file with any of the options below; an option given here wins over the file."""

    bench: BenchConfig


@dataclasses.dataclass(frozen=True)
class Report:
    """Make one page of the results of any runs of eval, compare and bench.

    The page is a single HTML file that loads nothing.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directories that were the --output of a run."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """Where to write the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a checkpoint on SQuAD v1.1 or 2.0: exact match, F1 and throughput.

    Writes predictions.json, nbest_predictions.json, per_example.parquet, metrics.json and run.json
    into --output, and null_odds.json for SQuAD 2.0. A run that was stopped goes on when the same
    command is given again. Piped, the content of metrics.json is printed as one JSON line.
    """

    config: Path | None = None
    """TOML file with any of the options below; an option given here wins over the file."""

    evaluation: EvalConfig


def pairs(of: str, value: Callable[[str], Any]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """An option of any number of NAME=VALUE."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction(PredictConfig):
    """What answers, how, and where to."""

    columns: Annotated[dict[str, str], pairs("COLUMN", str)] = dataclasses.field(
        default_factory=dict
    )
    worker_resources: Annotated[dict[str, float], pairs("NUMBER", float)] = dataclasses.field(
        default_factory=dict
    )
    input: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]


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

    config: Path | None = None
    """TOML file with any of the options below; an option given here wins over the file."""

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


# Of each command that takes --config: its field with the options, and their class.
CONFIGURED: dict[str, tuple[Any, str, Any]] = {
    "predict": (Predict, "prediction", Prediction),
    "eval": (Eval, "evaluation", EvalConfig),
    "compare": (Compare, "comparison", CompareConfig),
    "bench": (Bench, "bench", BenchConfig),
}


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
        import importlib.metadata

        print(importlib.metadata.version("flaxqa"))
        return 0
    command = parse(argv)
    refuse_urls(command)
    if isinstance(command, Ask):
        return ask(command)
    if isinstance(command, Score):
        return score(command)
    if isinstance(command, Predict):
        return predict(command)
    if isinstance(command, Export):
        return write_export(command)
    if isinstance(command, Compare):
        return compare(command.comparison)
    if isinstance(command, Bench):
        return compare(command.bench)
    if isinstance(command, Report):
        return write_report(command)
    return evaluate(command.evaluation)


def refuse_urls(command: Any) -> None:
    """Raises: UsageError: something that is read or written is a URL."""
    paths = getattr(command, "PATHS", ("model",))
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            refuse_urls(value)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Path) or (isinstance(one, str) and field.name in paths):
                files.local(one)


def parse(argv: list[str]) -> Any:
    """The command and its options; the fields of --config FILE are the defaults of the others."""
    defaults: dict[str, Any] = dict.fromkeys(CONFIGURED)
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
        defaults[name] = command(**{field: kind(**required | values)})
    commands = (
        Annotated[Ask, tyro.conf.subcommand("ask")]
        | Annotated[Predict, tyro.conf.subcommand("predict", default=defaults["predict"])]
        | Annotated[Eval, tyro.conf.subcommand("eval", default=defaults["eval"])]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Compare, tyro.conf.subcommand("compare", default=defaults["compare"])]
        | Annotated[Bench, tyro.conf.subcommand("bench", default=defaults["bench"])]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    return tyro.cli(
        commands,
        prog="flaxqa",
        description=HELP,
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )


def option(argv: list[str], name: str) -> str | None:
    """The value of an option that is needed before the command line can be parsed."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
    return None


def ask(command: Ask) -> int:
    from flaxqa import features, reader

    context = read_context(command)
    example = features.Example("question", command.question, context)
    if (reason := features.why_unanswerable(example)) is not None:
        raise UsageError(reason)
    loaded = reader.load(
        command.model,
        revision=command.revision,
        dtype=command.dtype,
        devices=1,
        max_length=command.max_length,
        doc_stride=command.doc_stride,
    )
    found = loaded.answer(
        command.question,
        context,
        top_k=command.top_k,
        max_answer_length=command.max_answer_length,
        align_to_words=command.align_to_words,
        overlapping=command.overlapping,
        min_score=command.min_score,
        no_answer_threshold=command.no_answer_threshold,
    )
    if found.question_cut:
        limit = features.question_limit(loaded.max_length, loaded.doc_stride)
        print(f"flaxqa: the question was cut to its first {limit} tokens", file=sys.stderr)
    if command.json or not sys.stdout.isatty():
        result = {
            "question": command.question,
            "answers": [
                {
                    name: value
                    for name, value in dataclasses.asdict(one).items()
                    if name != "context"
                }
                for one in found
            ],
            "no_answer_score": found.no_answer_score,
            "decoder": "spans",
            "n_windows": found.n_windows,
            "model": command.model,
            "commit": loaded.checkpoint.commit,
        }
        print(json.dumps(result))
    else:
        show(context, found, found.n_windows)
    return 0


def write_export(command: Export) -> int:
    from flaxqa import checkpoint, export

    loaded = checkpoint.load(command.model, revision=command.revision, dtype=command.dtype)
    done = export.export(loaded.model, command.format, command.output, overwrite=command.overwrite)
    if sys.stdout.isatty():
        print(
            f"{done.path}: {done.size:,} bytes; in {done.checked_with} its logits are the model's "
            f"to {done.difference:.1e}"
        )
    else:
        print(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}))
    return 0


def compare(config: CompareConfig | BenchConfig) -> int:
    from eval import compare, report
    from flaxqa.progress import TerminalProgress

    with TerminalProgress() as progress:
        found = compare.compare(config, progress)
    output = Path(config.output)
    report.write([report.read(output)], output / "report.html")
    files.write_whole(output / "summary.md", report.markdown(found).encode())
    told = (
        report.markdown(found) if sys.stdout.isatty() else json.dumps(compare.compact(found)) + "\n"
    )
    print(told, end="")
    print(f"flaxqa: {output / 'report.html'}", file=sys.stderr)
    verdicts = [row.get("verdict") for row in found["backends"]]
    return SET_ASIDE if "INVALID" in verdicts or not any(verdicts) else 0


def write_report(command: Report) -> int:
    from eval import report

    if not command.runs:
        raise UsageError("give at least one RUN: the --output of an eval, compare or bench")
    report.write([report.read(one) for one in command.runs], command.output)
    print(f"flaxqa: {command.output}", file=sys.stderr)
    return 0


def read_context(command: Ask) -> str:
    if command.context is not None and command.context_file is not None:
        raise UsageError("give --context or --context-file, not both")
    if command.context is not None:
        return command.context
    name = "standard input" if command.context_file is None else str(command.context_file)
    try:
        if command.context_file is None:
            if sys.stdin.isatty():
                print(
                    "flaxqa: reading the context from the terminal, end with Ctrl-D",
                    file=sys.stderr,
                )
            return sys.stdin.buffer.read().decode()
        return files.read_named(command.context_file).decode()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}") from error


def show(context: str, found: Sequence[Answer], n_windows: int) -> None:
    """The answers in bold, each with its numbers and the text around it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    if not found:
        console.print("no answer found")
    for number, one in enumerate(found, 1):
        if number > 1:
            console.print()
        head = Text(f"{number}. " if len(found) > 1 else "", style="dim")
        console.print(head.append(one.text, style="bold green"))
        before, after = excerpt(context, one.start, one.end)
        around = Text(before, style="dim").append(one.text, style="green")
        console.print(Padding(around.append(after, style="dim"), (0, 0, 0, 2)))
        plural = "" if n_windows == 1 else "s"
        console.print(
            f"  score {one.score:.4g}, characters {one.start} to {one.end}, "
            f"{n_windows} window{plural}",
            style="dim",
        )


def excerpt(context: str, start: int, end: int, around: int = 80) -> tuple[str, str]:
    """The text before and after an answer, whole words on one line, `…` where more is left out."""
    before, after = context[max(0, start - around) : start], context[end : end + around]
    if start > around:
        before = "… " + re.sub(r"^\S*\s", "", before)
    if end + around < len(context):
        after = re.sub(r"\s\S*$", "", after) + " …"
    return re.sub(r"\s+", " ", before).lstrip(), re.sub(r"\s+", " ", after).rstrip()


def evaluate(options: EvalConfig) -> int:
    from eval import run
    from flaxqa.progress import TerminalProgress

    with TerminalProgress() as progress:
        metrics = run.evaluate(options, progress)
    summary(metrics, options.output)
    if not sys.stdout.isatty():
        print(json.dumps(metrics))
    if options.min_f1 is not None and metrics["f1"] < options.min_f1:
        raise GateNotMet(f"F1 is {metrics['f1']:.4f}, below --min-f1 {options.min_f1}")
    return SET_ASIDE if metrics["set_aside"] else 0


def summary(metrics: dict[str, Any], output: str) -> None:
    def scored(name: str) -> str:
        low, high = metrics[f"{name}_interval"]
        return f"{metrics[name]:.2f} ({low:.2f} to {high:.2f})"

    stages = ", ".join(
        f"{stage} {metrics[f'{stage}_seconds']:.1f} s"
        for stage in ("load", "compile", "tokenize", "device", "decode", "score")
    )
    part = f", the first {metrics['limit']} only" if metrics["limit"] else ""
    lines = [
        f"EM {scored('exact_match')}   F1 {scored('f1')}   95 % bootstrap intervals",
        f"{metrics['total']:,} questions{part}, {metrics['n_windows']:,} windows, "
        f"{metrics['padding_share']:.1%} padding",
        f"{metrics['questions_per_second']:,.1f} questions/s, "
        f"{metrics['windows_per_second']:,.1f} windows/s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        stages,
        f"results in {output}",
    ]
    if "best_f1" in metrics:
        kinds = [
            f"{kind}: EM {metrics[f'{kind}_exact']:.2f}, F1 {metrics[f'{kind}_f1']:.2f} "
            f"({metrics[f'{kind}_total']:,})"
            for kind in ("HasAns", "NoAns")
            if f"{kind}_f1" in metrics
        ]
        lines.insert(1, "   ".join(kinds))
        lines.insert(
            2,
            f"best EM {metrics['best_exact']:.2f} at null odds {metrics['best_exact_thresh']:.3f}, "
            f"best F1 {metrics['best_f1']:.2f} at {metrics['best_f1_thresh']:.3f}",
        )
    if metrics["set_aside"]:
        lines.insert(
            1, f"{metrics['set_aside']} questions set aside, see errors.jsonl; they score 0"
        )
    print("\n".join(lines), file=sys.stderr)


def predict(command: Predict) -> int:
    from flaxqa import batch
    from flaxqa.progress import TerminalProgress

    config = command.prediction
    told = [name for name in ("dry_run", "restart", "shard", "multihost", "finalize")
            if getattr(command, name)]  # fmt: skip
    if len(told) > 1:
        raise UsageError(" and ".join(f"--{name.replace('_', '-')}" for name in told)
                         + " do not go together")  # fmt: skip
    if command.finalize:
        return tell(batch.finalize(config.output), config.output)
    with TerminalProgress("records") as progress:
        if command.dry_run:
            return foretell(batch.estimate(config, progress=progress))
        share = None if command.shard is None else parse_share(command.shard)
        if command.multihost:
            with batch.multihost_share() as share:
                done = batch.predict(config, share=share, progress=progress)
            if share[0] == 0 and not done.complete:
                done = batch.finalize(config.output)
        else:
            done = batch.predict(config, share=share, restart=command.restart, progress=progress)
    return tell(done, config.output)


def parse_share(text: str) -> tuple[int, int]:
    """The numbers of `i/n`."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise UsageError(f"--shard {text}: it must be i/n, as 0/4")
    return int(found[1]), int(found[2])


def tell(done: Summary, output: str) -> int:
    """Tells what a batch run came to."""
    lines = [
        f"{done.records:,} records = {done.answered:,} answered + {done.set_aside:,} set aside"
        if done.complete
        else f"{done.answered + done.set_aside:,} of {done.records:,} records; other processes "
        "have the rest, and the last of them, or --finalize, completes the run"
    ]
    if done.computed:
        seconds = max(done.seconds, 1e-9)
        lines.append(
            f"{done.computed:,} of them now, {done.computed / seconds:,.1f} records/s, "
            f"{done.windows / seconds:,.1f} windows/s, {done.padding_share:.1%} padding"
        )
    if done.set_aside and done.complete:
        lines.append(f"what was set aside is in {Path(output) / 'errors.jsonl'}, with the reasons")
    lines.append(f"{done.parts:,} parts in {output}")
    print("\n".join(lines), file=sys.stderr)
    if not sys.stdout.isatty():
        print(json.dumps(dataclasses.asdict(done)))
    return SET_ASIDE if done.set_aside else 0


def foretell(found: Estimate) -> int:
    """Tells what a batch run would come to."""
    from flaxqa.progress import duration

    print(
        f"{found.records:,} records in {found.shards:,} shards, about {found.windows:,} windows\n"
        f"about {duration(60 * found.minutes)} on this machine, at {found.records_per_second:,.1f} "
        f"records/s\n"
        f"of a sample of {found.sampled:,} records {found.set_aside:,} would be set aside",
        file=sys.stderr,
    )
    if not sys.stdout.isatty():
        print(json.dumps(dataclasses.asdict(found)))
    return 0


def score(command: Score) -> int:
    from eval import squad
    from flaxqa import files

    content = squad.loads(squad.read_bytes(command.data), command.data)
    questions, v2 = squad.parse(content, str(command.data))
    if not v2 and (version := content.get("version")) != squad.VERSION:
        print(
            f"flaxqa: expected version {squad.VERSION}, the data say {version!r}", file=sys.stderr
        )
    if not v2 and command.na_prob_file is not None:
        raise UsageError(f"--na-prob-file is for SQuAD 2.0, which {command.data} is not")
    if command.na_prob_file is None and command.na_prob_thresh != 1.0:
        raise UsageError("--na-prob-thresh needs --na-prob-file")
    predictions = squad.read_predictions(command.predictions)
    scores = squad.score(questions, predictions, v2=v2)
    for example_id in scores.unanswered[:SHOWN]:
        print(f"Unanswered question {example_id} will receive score 0.", file=sys.stderr)
    if (more := len(scores.unanswered) - SHOWN) > 0:
        print(f"... and {more:,} more unanswered questions", file=sys.stderr)
    if len(scores.unanswered) == len(questions):
        print(
            f"flaxqa: no prediction in {command.predictions} is for a question of {command.data}",
            file=sys.stderr,
        )
    result: dict[str, Any] = {"exact_match": scores.exact_match, "f1": scores.f1}
    if v2:
        best = {}
        if command.na_prob_file is not None:
            na_probs = squad.read_na_probs(command.na_prob_file)
            if missing := [each for each in predictions if each not in na_probs]:
                raise DataError(
                    f"{command.na_prob_file} has no number for {len(missing)} predictions, the "
                    f"first of them {missing[0]!r}"
                )
            best = squad.best_thresholds(scores, predictions, na_probs)
            scores = scores.with_no_answer(na_probs, command.na_prob_thresh)
        result = {**scores.by_answer(), **best}
    if command.intervals:
        for name, interval in scores.intervals().items():
            result[f"{'exact' if v2 and name == 'exact_match' else name}_interval"] = interval
        result["total"] = len(questions)
    if command.out_file is None:
        print(json.dumps(result))
    else:
        files.write_named(command.out_file, json.dumps(result).encode() + b"\n")
    return 0


if __name__ == "__main__":
    main()
