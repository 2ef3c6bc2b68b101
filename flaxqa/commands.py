"""What the commands of `flaxqa.cli` do. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxqa import carbon, files
from flaxqa.config import AnswerOptions, ModelOptions, ReaderOptions
from flaxqa.errors import DataError, GateNotMet, TryAgain, UsageError

if TYPE_CHECKING:
    from flaxqa.arguments import Ask, Card, Diff, Export, Finetune, Info, Predict, Report, Score
    from flaxqa.batch import Estimate, Summary
    from flaxqa.eval.config import BenchConfig, CompareConfig, EvalConfig, ProbeConfig

SET_ASIDE = 3
SHOWN = 20  # of many warnings of one kind


def ask(command: Ask) -> int:
    from flaxqa import features, reader, show

    context = read_context(command)
    example = features.Example("question", command.question, context)
    if (reason := features.why_unanswerable(example)) is not None:
        raise UsageError(reason)
    options = command.of(ReaderOptions) | {"devices": command.devices or 1}
    loaded = reader.load(**command.of(ModelOptions), **options)
    found = loaded.answer(command.question, context, **command.of(AnswerOptions))
    if found.question_cut:
        limit = features.default_question_limit(
            loaded.max_length, loaded.doc_stride, loaded.windows
        )
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
        show.on_terminal(context, found, found.n_windows)
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
    except TryAgain:
        raise
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}") from error


def write_export(command: Export) -> int:
    from flaxqa import checkpoint, export

    loaded = checkpoint.load(
        command.model, revision=command.revision, weights_file=command.weights, dtype=command.dtype
    )
    done = export.export(loaded.model, command.format, command.output, overwrite=command.overwrite)
    if sys.stdout.isatty():
        print(
            f"{done.path}: {done.size:,} bytes; in {done.checked_with} its logits are the model's "
            f"to {done.difference:.1e}"
        )
    else:
        print(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}))
    return 0


def missing(what: str, *packages: str) -> str | None:
    """Which packages are not installed, and what installs them; None if all are."""
    if not (names := [name for name in packages if importlib.util.find_spec(name) is None]):
        return None
    return (
        f"{what} needs {' and '.join(names)}, which this Python does not have: "
        "pip install 'flaxqa[compare]'"
    )


def needs(what: str, *packages: str) -> None:
    """Raises: UsageError: a package is not installed; says what installs them all."""
    if (told := missing(what, *packages)) is not None:
        raise UsageError(told)


def compare(config: CompareConfig | BenchConfig) -> int:
    needs("the report", "jinja2", "matplotlib")
    from flaxqa.eval import compare, report, summaries
    from flaxqa.progress import TerminalProgress

    with TerminalProgress() as progress:
        found = compare.compare(config, progress)
    output = Path(config.output)
    report.write([report.read(output)], output / "report.html")
    told = summaries.markdown(found)
    files.write_whole(output / "summary.md", told.encode())
    print(told if sys.stdout.isatty() else json.dumps(compare.compact(found)) + "\n", end="")
    print(f"flaxqa: {output / 'report.html'}", file=sys.stderr)
    verdicts = [row.get("verdict") for row in found["backends"]]
    failed = any(row.get("failed") for row in found["backends"])
    return SET_ASIDE if failed or "INVALID" in verdicts or not any(verdicts) else 0


def write_report(command: Report) -> int:
    from flaxqa.eval import groups, report

    if not command.runs:
        raise UsageError("give at least one RUN: the --output of an eval or compare, say")
    if command.format == "lm-eval":
        return export_results(command)
    needs("the report", "jinja2", "matplotlib")
    found = [report.read(one) for one in command.runs]
    report.write(found, command.output, groupings=groups.read(command.group_by),
                 precision=command.precision, dollars=command.dollars_per_hour)  # fmt: skip
    print(f"flaxqa: {command.output}", file=sys.stderr)
    return 0


def export_results(command: Report) -> int:
    """Writes evaluations as another tool's results."""
    from flaxqa.eval import lm_eval, runs

    if command.output.suffix == ".html":
        raise UsageError(f"--format {command.format} needs a folder: --output DIR")
    for path in lm_eval.export([runs.evaluation(one) for one in command.runs], command.output):
        print(f"flaxqa: {path}", file=sys.stderr)
    return 0


def diff(command: Diff) -> int:
    from flaxqa.eval import diff, examples, groups, report, runs

    groupings = groups.read(command.group_by)
    both = [runs.evaluation(one) for one in (command.run_a, command.run_b)]
    first, second = (runs.checked(one, examples.of_run) for one in both)
    found = diff.difference(first, second, groupings)
    print(diff.as_text(found, diff.settings(*both)), file=sys.stderr)
    if not sys.stdout.isatty():
        print(json.dumps(found))
    told = missing("the page", "jinja2", "matplotlib")
    if told is None:
        pages = [report.read(one.directory) for one in both]
        report.write(pages, command.output, groupings=groupings)
    print(f"flaxqa: {told or command.output}", file=sys.stderr)
    if command.gate and found["worse"]:
        raise GateNotMet(f"{command.run_b} is worse than {command.run_a} beyond chance")
    return 0


def probe(config: ProbeConfig) -> int:
    from flaxqa.eval import probe, probed, report
    from flaxqa.progress import TerminalProgress

    with TerminalProgress() as progress:
        found = probe.probe(config, progress)
    print("\n".join(probed.probe_summary(found)), file=sys.stderr)
    page = Path(config.output) / "probe.html"
    told = missing("the page", "jinja2")
    if told is None:
        report.write([report.Run(page.parent.name, probe=found)], page)
    print(f"flaxqa: {told or page}", file=sys.stderr)
    if not sys.stdout.isatty():
        print(json.dumps(probe.compact(found)))
    return 0


def write_card(command: Card, kinds: Mapping[str, type[Any]]) -> int:
    from flaxqa.eval import card, push, runs
    from flaxqa.eval.config import CardOptions

    def warn(text: str) -> None:
        print(f"flaxqa: {text}", file=sys.stderr)

    if not command.runs:
        raise UsageError("give at least one RUN: the --output of an eval, compare or finetune, say")
    if command.push is not None and command.output is not None:
        raise UsageError("--output and --push do not go together: each updates a card of its own")
    asks = command.push is not None and not command.yes
    if asks and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--push asks first, and there is no terminal here to ask on: give --yes")
    found = [run for directory in command.runs for run in runs.read(directory)]
    repository = None if command.push is None else push.Repository(command.push)
    old = repository.card if repository else card.read_card(command.output)
    options = CardOptions(**command.of(CardOptions))
    if repository is not None and options.model_id is None:
        options = dataclasses.replace(options, model_id=command.push)
    content = card.made(found, old, options, kinds, warn)
    if repository is None:
        if command.output is None:
            sys.stdout.write(content.decode())
        else:
            files.write_named(command.output, content)
            warn(str(command.output))
        return 0
    difference = repository.difference(content)
    print(difference or "flaxqa: the card there says all of this already", file=sys.stderr, end="")
    if difference and (command.yes or agreed(f"push this to {command.push}? [y/N] ")):
        print(repository.put(content))
    return 0


def agreed(question: str) -> bool:
    """Whether the user, who is asked on the terminal, says yes."""
    print(question, file=sys.stderr, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def evaluate(options: EvalConfig) -> int:
    from flaxqa.eval import run
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
    from flaxqa.eval.squad import METRICS

    def scored(name: str) -> str:
        low, high = metrics[f"{name}_interval"]
        return f"{metrics[name]:.2f} ({low:.2f} to {high:.2f})"

    stages = ", ".join(
        f"{stage} {metrics[f'{stage}_seconds']:.1f} s"
        for stage in ("load", "compile", "tokenize", "device", "decode", "score")
    )
    part = f", the first {metrics['limit']} only" if metrics["limit"] else ""
    scores = "   ".join(f"{one.label} {scored(name)}" for name, one in METRICS.items())
    lines = [
        f"{scores}   95 % bootstrap intervals",
        f"{metrics['total']:,} questions{part}, {metrics['n_windows']:,} windows, "
        f"{metrics['padding_share']:.1%} padding",
        f"{metrics['questions_per_second']:,.1f} questions/s, "
        f"{metrics['windows_per_second']:,.1f} windows/s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        stages,
        *([carbon.told(metrics["carbon"])] if "carbon" in metrics else []),
        *trusted(metrics["calibration"]),
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


def trusted(content: Mapping[str, Any]) -> list[str]:
    """How far scores can be trusted, a line each."""
    if not content["answers"]:
        return []
    low, high = content["ece_interval"]
    said = [f"mean score {content['mean_score']:.3f}, right {content['right']:.3f}; calibration "
            f"error {content['ece']:.3f} ({low:.3f} to {high:.3f})"]  # fmt: skip
    if "for_precision" in content:
        found = content["for_precision"]
        said.append(
            "no score reaches the precision asked for"
            if found is None
            else f"from a score of {found['score']:.4f} on, {found['precision']:.1%} of the "
            f"answers are right; {found['coverage']:.1%} of the questions have one"
        )
    return said


def finetune(command: Finetune) -> int:
    from flaxqa.eval import finetune
    from flaxqa.eval.squad import METRICS
    from flaxqa.progress import TerminalProgress

    with TerminalProgress() as progress:
        done = finetune.finetune(command.tuning, progress, restart=command.restart)
    for one in done["epochs"]:
        line = f"epoch {one['epoch']:g}: loss {one['loss']:.4f}"
        line += "".join(f", {metric.label} {one[name]:.2f}" for name, metric in METRICS.items()
                        if name in one)  # fmt: skip
        print(f"{line}, {one['questions_per_second']:,.1f} questions/s", file=sys.stderr)
    if aside := done["data"]["set_aside"]:
        print(f"{aside} questions set aside, see errors.jsonl", file=sys.stderr)
    whole = done["steps_done"] == done["steps"]
    part = "" if whole else f" after {done['steps_done']:,} of {done['steps']:,} steps"
    if done["carbon"] is not None:
        print(carbon.told(done["carbon"]), file=sys.stderr)
    print(f"trained checkpoint{part} in {command.tuning.output}", file=sys.stderr)
    if not sys.stdout.isatty():
        print(json.dumps(done))
    return SET_ASIDE if aside else 0


def predict(command: Predict) -> int:
    from flaxqa import batch, engines
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
            with engines.multihost_share() as share:
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
    if done.carbon is not None:
        alone = "" if done.complete else "; of this process alone"
        lines.append(carbon.told(done.carbon) + alone)
    lines.append(f"{done.parts:,} parts in {output}")
    print("\n".join(lines), file=sys.stderr)
    if not sys.stdout.isatty():
        counts = dataclasses.asdict(done)
        if done.carbon is None:
            del counts["carbon"]
        print(json.dumps(counts))
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
    from flaxqa.eval import questions, squad

    (asked, v2), source = questions.read_with_source(command.data, command)
    told = source.get("version_told", questions.VERSION)
    if not v2 and told != questions.VERSION:
        print(
            f"flaxqa: expected version {questions.VERSION}, the data say {told!r}", file=sys.stderr
        )
    if not v2 and command.na_prob_file is not None:
        raise UsageError(f"--na-prob-file is for SQuAD 2.0, which {command.data} is not")
    if command.na_prob_file is None and command.na_prob_thresh != 1.0:
        raise UsageError("--na-prob-thresh needs --na-prob-file")
    predictions = squad.read_predictions(command.predictions)
    every = len(asked)
    if command.only_predicted:
        asked = [one for one in asked if one.id in predictions]
        if not asked:
            raise DataError(
                f"no prediction in {command.predictions} is for a question of {command.data}"
            )
    scores = squad.score(asked, predictions, v2=v2)
    tell_unanswered(command, scores.unanswered, len(asked))
    result: dict[str, Any] = dict(scores.means)
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
        result["total"] = len(asked)
    if command.only_predicted:
        result |= {"only_predicted": len(asked), "of_questions": every}
    if command.out_file is None:
        print(json.dumps(result))
    else:
        files.write_named(command.out_file, json.dumps(result).encode() + b"\n")
    return 0


def tell_unanswered(command: Score, unanswered: Sequence[str], total: int) -> None:
    """Warns of questions without a prediction, as the official script does."""
    for example_id in unanswered[:SHOWN]:
        print(f"Unanswered question {example_id} will receive score 0.", file=sys.stderr)
    if (more := len(unanswered) - SHOWN) > 0:
        print(f"... and {more:,} more unanswered questions", file=sys.stderr)
    if len(unanswered) == total:
        print(
            f"flaxqa: no prediction in {command.predictions} is for a question of {command.data}",
            file=sys.stderr,
        )
    elif unanswered:
        print(
            "flaxqa: --only-predicted scores only the questions that have a prediction",
            file=sys.stderr,
        )


def info(command: Info) -> int:
    from flaxqa.eval import environment

    found = environment.computes(command.model, **command.of(ReaderOptions))
    if sys.stdout.isatty():
        for name, value in found.items():
            print(f"{name:24} {value}")
    else:
        print(json.dumps(found))
    return 0
