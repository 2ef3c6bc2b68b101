"""An evaluation: questions through a checkpoint to scores, with all that is needed to redo it.

Questions go through in chunks of fixed borders; after each chunk its answers are kept on disk, so a
run that was stopped goes on where it was when the same command is given again.

Files: `predictions.json` (the official form), `nbest_predictions.json`, `per_example.parquet`,
`metrics.json`, `run.json` (last: where it is, the others are whole), for SQuAD 2.0
`null_odds.json`, and `errors.jsonl` if questions were set aside.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import carbon, features, files, reader, stores
from flaxqa.answers import Answer, Answers, Decoder
from flaxqa.checkpoint import Checkpoint
from flaxqa.config import ModelOptions, ReaderOptions
from flaxqa.errors import DataError, TryAgain
from flaxqa.profile import Profile
from flaxqa.progress import Progress, Silence
from flaxqa.reader import Reader, Spent

from . import calibration, environment, examples, mistakes, questions, runs, squad, trackers
from .config import EvalConfig
from .questions import Data, SquadExample

SCHEMA_VERSION = 1  # of metrics.json; another one where a field is changed or removed
PACKAGES = ("flaxqa", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")


def evaluate(
    config: EvalConfig,
    progress: Progress | None = None,
    given: tuple[Data, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs the evaluation, writes its files and returns the content of `metrics.json`.

    Args:
      config: what is evaluated, and how.
      progress: is told how it goes.
      given: the questions and where they are from, where they are there already.

    Raises:
      UsageError, DataError, ModelRejected: before anything is computed; see there.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    trackers.check(config, config.output)
    with carbon.Meter(config) as meter:
        metrics = evaluated(config, progress or Silence(), given, meter)
    trackers.log(config, lambda: trackers.Results(
        files.local(config.output), dataclasses.asdict(config), trackers.numbers(metrics),
        files=("metrics.json", "run.json", "predictions.json"),
    ))  # fmt: skip
    return metrics


def evaluated(
    config: EvalConfig,
    progress: Progress,
    given: tuple[Data, dict[str, Any]] | None,
    meter: carbon.Meter,
) -> dict[str, Any]:
    """As `evaluate`, with a meter that runs."""
    began = now()
    output = files.working_directory(config.output)
    progress.stage("reading questions")
    data, source = given or questions.read_with_source(config.data, config)
    data = data._replace(questions=data.questions[: config.limit])
    progress.stage("loading the checkpoint")
    loading = time.perf_counter()
    loaded = reader.load(**config.of(ModelOptions), **config.of(ReaderOptions))
    load_seconds = time.perf_counter() - loading
    meter.covers(loaded.predictor.devices[0].platform)
    run = describe(config, loaded, data, source)
    fit = fitted(config, loaded, output, progress)
    temperature = run["temperature"] = fit["temperature"] if fit else config.temperature
    run["calibration"] = fit
    with Partial(output / ".partial.jsonl", run_key(run)) as partial:
        resumed = len(partial.rows)
        progress.begin(len(data.questions), resumed)
        left = data.questions[resumed:]  # which begins where a chunk does
        with Profile(config.profile) as profile:
            advance = profile.after(progress.advance)
            decode = decoder(config, temperature)
            for found, took in answers_of(left, loaded, decode, advance):
                meter.count(len(found))
                partial.append(found, took, meter)
    progress.stage("scoring")
    scoring = time.perf_counter()
    predictions, scores, of_v2 = scored(data, partial.rows, config)
    kinds = kinds_of(data, partial.rows, predictions, scores, loaded, config)
    metrics = results(scores, partial.rows, partial.spent, config) | of_v2
    metrics["mistakes"] = mistakes.shares(kinds)
    metrics["calibration"] = trust(data, partial.rows, predictions, scores, config)
    metrics["score_seconds"] = time.perf_counter() - scoring
    metrics["compile_seconds"] = loaded.predictor.compile_seconds
    metrics["load_seconds"] = load_seconds
    metrics["resumed_questions"] = resumed
    metrics["peak_memory_bytes"] = environment.peak_memory()
    if (measured := meter.stop()) is not None:
        parts = [*partial.measured.values(), measured]
        metrics["carbon"] = carbon.result(parts, len(partial.rows))
    run["shapes"] = [shape._asdict() for shape in loaded.predictor.shapes]
    run["started"], run["finished"] = began, now()
    write(output, data, partial.rows, predictions, scores, kinds, metrics, run)
    if stores.is_url(config.output):
        names = [path.name for path in output.iterdir() if not path.name.startswith(".")]
        for name in sorted(names, key=lambda name: name == "run.json"):  # which comes last
            stores.put(stores.below(config.output, name), (output / name).read_bytes())
        shutil.rmtree(output)
    else:
        partial.path.unlink()
    return metrics


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe(
    config: EvalConfig, loaded: Reader, data: Data, source: dict[str, Any]
) -> dict[str, Any]:
    """What decides the results, and what the run is made on: the content of `run.json`."""
    return {
        **describe_reader(config, loaded),
        "data": {
            **source,
            "version": questions.VERSION_2 if data.v2 else questions.VERSION,
            "questions_sha256": questions.sha256(data.questions),
        },
        "decoder": config.decoder,
    }


def describe_checkpoint(loaded: Checkpoint) -> dict[str, Any]:
    """Which files its weights and tokenizer are."""
    return {
        "directory": str(loaded.directory),
        "commit": loaded.commit,
        "sha256": loaded.sha256(),
        "ignored_tensors": dict(loaded.ignored),
        "notes": list(loaded.notes),
    }


def as_errors(reasons: Mapping[str, str]) -> bytes | None:
    """The content of errors.jsonl: each id with why its question was set aside; None of none."""
    lines = (json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in reasons.items())
    return "".join(lines).encode() or None


def describe_reader(config: ReaderOptions, loaded: Reader) -> dict[str, Any]:
    """The part of it that any run of a reader has."""
    checkpoint, predictor = loaded.checkpoint, loaded.predictor
    return {
        "config": dataclasses.asdict(config),
        "model": describe_checkpoint(checkpoint),
        "windows": {
            "max_length": loaded.max_length,
            "doc_stride": loaded.doc_stride,
            "kind": loaded.windows,
        },
        "platform": {
            "dtype": str(checkpoint.model.dtype),
            "backend": predictor.devices[0].platform,
            "device_kind": predictor.devices[0].device_kind,
            "devices": len(predictor.devices),
            **predictor.computed_by,
            **environment.machine(),
        },
        "versions": environment.versions(PACKAGES),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_")) and "DIR" not in name
        },
    }


def scored(
    data: Data, rows: Sequence[Answers], config: EvalConfig
) -> tuple[dict[str, str], squad.Scores, dict[str, Any]]:
    """The predictions, their scores, and what SQuAD 2.0 has besides."""
    threshold = config.null_score_diff_threshold if data.v2 else None
    predictions = best_texts(data.questions, rows, threshold)
    scores = squad.score(data.questions, predictions, v2=data.v2)
    if not data.v2:
        return predictions, scores, {}
    by_answer = {k: v for k, v in scores.by_answer().items() if k.startswith(("H", "N"))}
    spoken, odds = best_texts(data.questions, rows, None), null_odds(data.questions, rows)
    of_spoken = squad.score(data.questions, spoken, v2=True)
    best: dict[str, Any] = squad.best_thresholds(of_spoken, spoken, odds)
    for metric, values in of_spoken.values.items():
        name = f"best_{squad.METRICS[metric].official}"
        said = np.array([bool(spoken.get(each)) for each in scores.ids])
        gains = np.where(scores.has_answer, values, -said.astype(float))
        numbers = np.array([odds.get(each, np.inf) for each in scores.ids])
        ends = calibration.best_threshold(gains, numbers, ~scores.has_answer)
        best |= {f"{name}_interval": ends["score"], f"{name}_thresh_interval": ends["threshold"]}
    return predictions, scores, by_answer | best


def run_key(run: dict[str, Any]) -> str:
    """A hash of everything that decides an answer: a resumed run must have the same."""
    later = ("output", "min_f1", "null_score_diff_threshold", "profile", "carbon", "country",
             "grid", "precision", "log")  # these decide no row  # fmt: skip
    config = {k: v for k, v in run["config"].items() if k not in later}
    model = {k: v for k, v in run["model"].items() if k != "directory"}
    decides = {**run, "config": config, "model": model}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def answers_of(
    asked: Sequence[SquadExample],
    loaded: Reader,
    decode: Decoder,
    advance: Callable[[int, int], None],
) -> Iterator[tuple[list[Answers], Spent]]:
    """The answers to every question, chunk by chunk; in `error` why one cannot be asked."""
    chunks = reader.chunks(asked, size_of=features.characters)
    return loaded.answer_chunks(chunks, decode, advance)


def decoder(config: EvalConfig, temperature: float) -> Decoder:
    """The rule of a run."""
    options = {"max_answer_length": config.max_answer_length, "temperature": temperature}
    return Decoder.best(config.decoder, config.n_best, **options)


def fitted(
    config: EvalConfig, loaded: Reader, output: Path, progress: Progress
) -> dict[str, Any] | None:
    """The temperature that is fitted to --calibrate, and to which questions; None without it.

    What was fitted is kept in `calibration.json`, and taken from there by a run that goes on.
    """
    kept = output / "calibration.json"
    if config.calibrate is None:
        kept.unlink(missing_ok=True)
        return None
    data, source = questions.read_with_source(config.calibrate, config)
    key = run_key(describe(config, loaded, data, source))
    if kept.is_file() and (before := runs.read_json(kept)).get("key") == key:
        return dict(before)
    progress.begin(len(data.questions), 0, "calibrating")
    collector = calibration.Collector(decoder(config, 1.0))
    rows: list[Answers] = []
    for found, _ in answers_of(data.questions, loaded, collector, progress.advance):
        rows += found
    scores = squad.score(data.questions, best_texts(data.questions, rows, None), v2=data.v2)
    right = scores.values["exact_match"].tolist()
    if len(set(right)) < 2:
        raise DataError(f"{config.calibrate}: all answers are {'right' if right[0] else 'wrong'}, "
                        "so no temperature can be fitted to it")  # fmt: skip
    temperature = collector.fit(dict(zip(scores.ids, right, strict=True)))
    content = {"key": key, "temperature": temperature, "questions": len(right), "data": source}
    files.write_whole(kept, as_json(content))
    return content


def kinds_of(
    data: Data,
    rows: Sequence[Answers],
    predictions: Mapping[str, str],
    scores: squad.Scores,
    loaded: Reader,
    config: EvalConfig,
) -> list[str | None]:
    """The kind of mistake of each question, see `mistakes`."""
    exact = scores.values["exact_match"]
    wrong = [index for index, question in enumerate(data.questions)
             if not exact[index] and question.answers and rows[index].error is None]  # fmt: skip
    asked = [data.questions[index] for index in wrong]
    windows = loaded.windows_of(asked)
    found = mistakes.reachable(asked, windows, config.max_answer_length) if asked else []
    out_of_reach = {index for index, there in zip(wrong, found, strict=True) if not there}
    kinds = []
    for index, (question, row) in enumerate(zip(data.questions, rows, strict=True)):
        text = predictions.get(question.id, "")
        span = (row[0].start, row[0].end) if row and text else None
        given = mistakes.Prediction(text, span, row.question_cut, index not in out_of_reach)
        kinds.append(mistakes.kind_of(question, given))
    return kinds


def trust(
    data: Data,
    rows: Sequence[Answers],
    predictions: Mapping[str, str],
    scores: squad.Scores,
    config: EvalConfig,
) -> dict[str, Any]:
    """How far the scores of answers can be trusted, and those of "no answer"."""
    given = np.array([bool(row) and bool(predictions.get(question.id))
                      for question, row in zip(data.questions, rows, strict=True)])  # fmt: skip
    score = np.array([row[0].score if row else np.nan for row in rows])
    odds = np.array([np.nan if row.error else row.null_odds for row in rows])
    return calibration.told(scores, given, score, odds if data.v2 else None, config.precision)


class Partial:
    """The rows so far, in memory and in a file that a stopped run leaves behind.

    The file's first line is the run key, each other one a chunk. A last line that was cut by a
    crash is dropped; a file of another run is begun anew.

    Attributes:
      rows: the answers, in the order of the questions.
      spent: what they took.
      measured: of each session before this one the last record of its `carbon.Meter`.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self.rows: list[Answers] = []
        self.spent = Spent()
        self.measured: dict[str, carbon.Record] = {}
        try:
            path.touch()
            self.file = path.open("r+b")
        except OSError as error:
            raise TryAgain(f"{path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What is kept stays in place: a crash while resuming costs nothing.
            self.file.truncate(self.restore(self.file.readlines(), key))
            self.file.seek(0, os.SEEK_END)
            if self.file.tell() == 0:
                self.file.write(json.dumps({"run_key": key}).encode() + b"\n")
                self.file.flush()
        except OSError as error:
            self.file.close()
            busy = isinstance(error, BlockingIOError)
            reason = "another run is writing there" if busy else error.strerror
            raise TryAgain(f"{path.parent} cannot be written: {reason}") from error

    def restore(self, lines: list[bytes], key: str) -> int:
        """Takes the rows of every whole line and returns how many bytes those have."""
        size = 0
        for number, line in enumerate(lines):
            try:
                if not line.endswith(b"\n"):
                    break
                content = json.loads(line)
                if number == 0:
                    if content != {"run_key": key}:
                        break
                else:
                    rows = [from_fields(*fields) for fields in content["rows"]]
                    measured = {**self.measured, **content.get("measured", {})}
                    self.spent.add(Spent(**content["spent"]))
                    self.rows += rows
                    self.measured = measured
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
        return size

    def append(self, rows: Sequence[Answers], spent: Spent, meter: carbon.Meter) -> None:
        """Keeps a chunk, and what was measured so far; when this returns it is on disk."""
        self.rows += rows
        self.spent.add(spent)
        content = {
            "rows": [as_fields(row) for row in rows],
            "spent": dataclasses.asdict(spent),
        }
        if (reading := meter.reading()) is not None:
            content["measured"] = {meter.session: reading}
        try:
            self.file.write(json.dumps(content).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise TryAgain(f"{self.path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def as_fields(row: Answers) -> tuple[Any, ...]:
    """What is kept of the answers to a question."""
    found = [dataclasses.astuple(one) for one in row]
    return found, row.null_odds, row.n_windows, row.question_cut, row.error


def from_fields(
    found: list[Any], null_odds: float, n_windows: int, question_cut: bool, error: str | None
) -> Answers:
    """The answers that `as_fields` kept."""
    row = Answers(Answer(*fields) for fields in found)
    row.null_odds, row.n_windows = null_odds, n_windows
    row.question_cut, row.error = question_cut, error
    return row


def results(
    scores: squad.Scores,
    rows: Sequence[Answers],
    spent: Spent,
    config: EvalConfig,
) -> dict[str, Any]:
    """The scores and speeds of a run: the content of `metrics.json`, but for its last fields."""
    return {
        "schema_version": SCHEMA_VERSION,
        **scores.means,
        **{f"{name}_interval": interval for name, interval in scores.intervals().items()},
        "confidence": 0.95,
        "total": len(rows),
        "set_aside": sum(row.error is not None for row in rows),
        "questions_cut": sum(row.question_cut for row in rows),
        "limit": config.limit,
        "n_windows": spent.windows,
        "n_tokens": spent.tokens,
        "padding_share": 1 - spent.tokens / max(spent.computed_tokens, 1),
        "questions_per_second": len(rows) / max(spent.seconds, 1e-9),
        "windows_per_second": spent.windows / max(spent.seconds, 1e-9),
        "tokens_per_second": spent.tokens / max(spent.seconds, 1e-9),
        "seconds": spent.seconds,
        "tokenize_seconds": spent.tokenize_seconds,
        "device_seconds": spent.device_seconds,
        "decode_seconds": spent.decode_seconds,
    }


def best_texts(
    asked: Sequence[SquadExample], rows: Sequence[Answers], threshold: float | None
) -> dict[str, str]:
    """The official predictions: {id: text}, none for a question that was set aside.

    The text is "" where nothing counts, or where the null odds are above the threshold.
    """

    def abstains(row: Answers) -> bool:
        return threshold is not None and row.null_odds > threshold

    return {
        question.id: row[0].text if row and not abstains(row) else ""
        for question, row in zip(asked, rows, strict=True)
        if row.error is None
    }


def null_odds(asked: Sequence[SquadExample], rows: Sequence[Answers]) -> dict[str, float]:
    """{id: null odds}, as run_qa's null_odds.json; the largest float where there is no answer."""
    return {
        question.id: min(row.null_odds, sys.float_info.max)
        for question, row in zip(asked, rows, strict=True)
        if row.error is None
    }


def write(
    output: Path,
    data: Data,
    rows: Sequence[Answers],
    predictions: dict[str, str],
    scores: squad.Scores,
    kinds: Sequence[str | None],
    metrics: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Writes every file whole; `run.json` last, an old one having been taken away first."""
    asked = data.questions
    (output / "run.json").unlink(missing_ok=True)
    answered = {
        question.id: row for question, row in zip(asked, rows, strict=True) if row.error is None
    }
    nbest = {example_id: examples.n_best(row) for example_id, row in answered.items()}
    reasons = {
        question.id: row.error
        for question, row in zip(asked, rows, strict=True)
        if row.error is not None
    }
    files.write_whole(output / "predictions.json", as_json(predictions))
    files.write_whole(output / "nbest_predictions.json", as_json(nbest))
    table = examples.parquet(asked, rows, predictions, scores, kinds)
    files.write_whole(output / examples.FILE, table)
    optional = {
        "null_odds.json": as_json(null_odds(asked, rows)) if data.v2 else None,
        "errors.jsonl": as_errors(reasons),
    }
    for name, content in optional.items():
        write_or_remove(output / name, content)
    files.write_whole(output / "metrics.json", as_json(metrics))
    files.write_whole(output / "run.json", as_json(run))


def write_or_remove(path: Path, content: bytes | None) -> None:
    """Writes a file that only some runs have, or removes that of an earlier run."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        files.write_whole(path, content)


def as_json(content: Any) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
