"""An evaluation: questions through a checkpoint to scores, with all that is needed to redo it.

Questions go through in chunks of fixed borders; after each chunk its answers are kept on disk, so a
run that was stopped goes on where it was when the same command is given again.

Files: `predictions.json` (the official form), `nbest_predictions.json`, `per_example.parquet`,
`metrics.json`, `run.json` (last: where it is, the others are whole), and `errors.jsonl` if
questions were set aside.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from eval import squad
from eval.config import EvalConfig
from flaxqa import answers, checkpoint, features, files, predict
from flaxqa.answers import Answer
from flaxqa.errors import DataError, TryAgain

QUESTIONS_PER_CHUNK = 1_024
CHARACTERS_PER_CHUNK = 4_000_000  # so that a few huge contexts do not fill the memory
DECODER = "squad"
PACKAGES = ("flaxqa", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")


class Progress(Protocol):
    """What `evaluate` tells while it works; `flaxqa.progress` shows it on a terminal."""

    def stage(self, description: str) -> None: ...
    def begin(self, questions: int) -> None: ...
    def advance(self, questions: int, windows: int) -> None: ...


class Silence:
    """Shows nothing."""

    def stage(self, description: str) -> None:
        pass

    def begin(self, questions: int) -> None:
        pass

    def advance(self, questions: int, windows: int) -> None:
        pass


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What came of one question: its answers best first, or why it was set aside."""

    answers: list[Answer]
    n_windows: int
    question_cut: bool
    error: str | None = None


@dataclasses.dataclass
class Spent:
    """What a run, or a chunk of it, took: seconds of each stage, and counts."""

    tokenize_seconds: float = 0.0
    device_seconds: float = 0.0
    decode_seconds: float = 0.0
    windows: int = 0
    tokens: int = 0
    computed_tokens: int = 0

    def add(self, other: Spent) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the evaluation, writes its files and returns the content of `metrics.json`.

    Raises:
      UsageError, DataError, ModelRejected: before anything is computed; see there.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    progress = progress or Silence()
    began = datetime.datetime.now(datetime.UTC)
    features.question_limit(config.max_length, config.doc_stride)  # refuses a pair that cannot be
    output = files.writable_directory(config.output)
    progress.stage("reading questions")
    questions, data_source = read_data(config)
    progress.stage("loading the checkpoint")
    predict.use_compilation_cache()
    loading = time.perf_counter()
    loaded = checkpoint.load(config.model, revision=config.revision, dtype=config.dtype)
    predictor = predict.Predictor(
        loaded.model,
        max_length=config.max_length,
        batch_size=config.batch_size,
        parallel=config.parallel,
        devices=config.devices,
        matmul_precision=config.matmul_precision,
    )
    load_seconds = time.perf_counter() - loading
    run: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "model": {
            "directory": str(loaded.directory),
            "commit": loaded.commit,
            "sha256": loaded.sha256(),
            "ignored_tensors": dict(loaded.ignored),
        },
        "data": {**data_source, "questions_sha256": squad.sha256(questions)},
        "decoder": DECODER,
        "platform": {
            "backend": predictor.devices[0].platform,
            "device_kind": predictor.devices[0].device_kind,
            "devices": len(predictor.devices),
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_")) and "DIR" not in name
        },
    }
    with Partial(output / ".partial.jsonl", run_key(run)) as partial:
        rows, spent, resumed = partial.rows, partial.spent, len(partial.rows)
        progress.begin(len(questions))
        progress.advance(resumed, spent.windows)
        for chunk in chunks(questions, resumed):
            partial.append(*answer(chunk, loaded, predictor, config, progress))
    progress.stage("scoring")
    scoring = time.perf_counter()
    scores = squad.score(questions, best_texts(questions, rows))
    metrics = results(scores, rows, spent, config)
    metrics["score_seconds"] = time.perf_counter() - scoring
    metrics["compile_seconds"] = predictor.compile_seconds
    metrics["load_seconds"] = load_seconds
    metrics["resumed_questions"] = resumed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics["peak_memory_bytes"] = peak * (1 if sys.platform == "darwin" else 1024)
    run["shapes"] = [list(shape) for shape in predictor.shapes]
    run["started"] = began.isoformat(timespec="seconds")
    run["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(output, questions, rows, scores, metrics, run)
    partial.path.unlink()
    return metrics


def read_data(config: EvalConfig) -> tuple[list[squad.SquadExample], dict[str, Any]]:
    """The questions, cut to `limit`, and where they came from."""
    path = Path(config.data)
    source: dict[str, Any] = {"name": config.data}
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if is_file:
        questions = squad.read(path)
        source["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif is_there or path.suffix == ".json" or config.data.startswith((".", "/", "~")):
        raise DataError(f"{path} is {'not a file' if is_there else 'missing'}")
    else:
        questions, commit = squad.read_hub(
            config.data, split=config.split, revision=config.data_revision
        )
        source |= {"split": config.split, "commit": commit}
    source["questions"] = len(questions)
    return questions[: config.limit], source


def run_key(run: dict[str, Any]) -> str:
    """A hash of everything that decides an answer: a resumed run must have the same."""
    config = {k: v for k, v in run["config"].items() if k not in ("output", "min_f1")}
    model = {k: v for k, v in run["model"].items() if k != "directory"}
    decides = {**run, "config": config, "model": model}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def chunks(
    questions: Sequence[squad.SquadExample], begin: int
) -> Iterator[list[squad.SquadExample]]:
    """The questions from `begin`, a border, on, in pieces whose borders do not depend on it.

    A piece has QUESTIONS_PER_CHUNK questions and those that follow on the same context, so that a
    context is tokenized once; but it ends where it would have too many characters.
    """
    chunk: list[squad.SquadExample] = []
    size = 0
    for question in questions[begin:]:
        size += len(question.context)
        full = len(chunk) >= QUESTIONS_PER_CHUNK and question.context != chunk[-1].context
        if chunk and (full or size > CHARACTERS_PER_CHUNK):
            yield chunk
            chunk, size = [], len(question.context)
        chunk.append(question)
    if chunk:
        yield chunk


def answer(
    chunk: Sequence[squad.SquadExample],
    loaded: checkpoint.Checkpoint,
    predictor: predict.Predictor,
    config: EvalConfig,
    progress: Progress,
) -> tuple[list[Row], Spent]:
    """A row for every question of the chunk; what cannot be asked is set aside with the reason."""
    reasons = [features.why_unanswerable(question) for question in chunk]
    asked = [q for q, reason in zip(chunk, reasons, strict=True) if reason is None]
    progress.advance(len(chunk) - len(asked), 0)
    clock = [time.perf_counter()]
    windows = features.make(
        asked, loaded.tokenizer, max_length=config.max_length, doc_stride=config.doc_stride
    )
    clock.append(time.perf_counter())
    compiled, computed = predictor.compile_seconds, predictor.computed_tokens
    seen = 0

    def advance(done: int) -> None:
        # Windows come back sorted by length: questions are shown in proportion.
        nonlocal seen
        before, seen = seen, seen + done
        share = [len(asked) * windows_done // len(windows) for windows_done in (before, seen)]
        progress.advance(share[1] - share[0], done)

    logits = predictor.predict(windows, advance)
    clock.append(time.perf_counter())
    compiled = predictor.compile_seconds - compiled
    bad = answers.non_finite(windows, logits)
    finite = [index for index, window in enumerate(windows) if window.example not in bad]
    decoded = answers.decode_squad(
        asked,
        [windows[index] for index in finite],
        [logits[index] for index in finite],
        n_best=config.n_best,
        max_answer_length=config.max_answer_length,
    )
    clock.append(time.perf_counter())
    counts, cuts = [0] * len(asked), [False] * len(asked)
    for window in windows:
        counts[window.example] += 1
        cuts[window.example] = window.question_cut
    answered = iter(
        Row(found, count, cut, "the model's logits are not finite" if index in bad else None)
        for index, (found, count, cut) in enumerate(zip(decoded, counts, cuts, strict=True))
    )
    rows = [next(answered) if reason is None else Row([], 0, False, reason) for reason in reasons]
    return rows, Spent(
        tokenize_seconds=clock[1] - clock[0],
        device_seconds=clock[2] - clock[1] - compiled,
        decode_seconds=clock[3] - clock[2],
        windows=len(windows),
        tokens=sum(map(len, windows)),
        computed_tokens=predictor.computed_tokens - computed,
    )


class Partial:
    """The rows so far, in memory and in a file that a stopped run leaves behind.

    The file's first line is the run key, each other one a chunk. A last line that was cut by a
    crash is dropped; a file of another run is begun anew.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self.rows: list[Row] = []
        self.spent = Spent()
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
                    rows = [
                        Row([Answer(*fields) for fields in found], *rest)
                        for found, *rest in content["rows"]
                    ]
                    self.spent.add(Spent(**content["spent"]))
                    self.rows += rows
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
        return size

    def append(self, rows: Sequence[Row], spent: Spent) -> None:
        """Keeps a chunk; when this returns it is on disk."""
        self.rows += rows
        self.spent.add(spent)
        content = {
            "rows": [dataclasses.astuple(row) for row in rows],
            "spent": dataclasses.asdict(spent),
        }
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


def results(
    scores: squad.Scores,
    rows: Sequence[Row],
    spent: Spent,
    config: EvalConfig,
) -> dict[str, Any]:
    """The scores and speeds of a run: the content of `metrics.json`, but for its last fields."""
    intervals = scores.intervals()
    seconds = spent.tokenize_seconds + spent.device_seconds + spent.decode_seconds
    return {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "exact_match_interval": intervals["exact_match"],
        "f1_interval": intervals["f1"],
        "confidence": 0.95,
        "total": len(rows),
        "set_aside": sum(row.error is not None for row in rows),
        "questions_cut": sum(row.question_cut for row in rows),
        "limit": config.limit,
        "n_windows": spent.windows,
        "n_tokens": spent.tokens,
        "padding_share": 1 - spent.tokens / max(spent.computed_tokens, 1),
        "questions_per_second": len(rows) / max(seconds, 1e-9),
        "windows_per_second": spent.windows / max(seconds, 1e-9),
        "tokens_per_second": spent.tokens / max(seconds, 1e-9),
        "tokenize_seconds": spent.tokenize_seconds,
        "device_seconds": spent.device_seconds,
        "decode_seconds": spent.decode_seconds,
    }


def best_texts(questions: Sequence[squad.SquadExample], rows: Sequence[Row]) -> dict[str, str]:
    """The official predictions: {id: text}; "" where nothing counts, none for one set aside."""
    return {
        question.id: row.answers[0].text if row.answers else ""
        for question, row in zip(questions, rows, strict=True)
        if row.error is None
    }


def write(
    output: Path,
    questions: Sequence[squad.SquadExample],
    rows: Sequence[Row],
    scores: squad.Scores,
    metrics: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Writes every file whole; `run.json` last, an old one having been taken away first."""
    (output / "run.json").unlink(missing_ok=True)
    nbest = {
        question.id: [dataclasses.asdict(found) for found in row.answers]
        for question, row in zip(questions, rows, strict=True)
        if row.error is None
    }
    errors = [
        {"id": question.id, "reason": row.error}
        for question, row in zip(questions, rows, strict=True)
        if row.error is not None
    ]
    files.write_whole(output / "predictions.json", as_json(best_texts(questions, rows)))
    files.write_whole(output / "nbest_predictions.json", as_json(nbest))
    files.write_whole(output / "per_example.parquet", parquet(questions, rows, scores))
    if errors:
        lines = "".join(json.dumps(error) + "\n" for error in errors)
        files.write_whole(output / "errors.jsonl", lines.encode())
    else:
        (output / "errors.jsonl").unlink(missing_ok=True)
    files.write_whole(output / "metrics.json", as_json(metrics))
    files.write_whole(output / "run.json", as_json(run))


def as_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def parquet(
    questions: Sequence[squad.SquadExample], rows: Sequence[Row], scores: squad.Scores
) -> bytes:
    """One row a question, for looking at what went wrong and for comparing two runs."""
    import pyarrow
    import pyarrow.parquet

    best = [row.answers[0] if row.answers else None for row in rows]

    def column(name: str) -> list[Any]:
        return [None if found is None else getattr(found, name) for found in best]

    table = pyarrow.table(
        {
            "id": [question.id for question in questions],
            "question": [valid(question.question) for question in questions],
            "answers": [list(map(valid, question.answers)) for question in questions],
            "prediction": pyarrow.array(column("text"), pyarrow.string()),
            "start": pyarrow.array(column("start"), pyarrow.int64()),
            "end": pyarrow.array(column("end"), pyarrow.int64()),
            "score": pyarrow.array(column("score"), pyarrow.float64()),
            "probability": pyarrow.array(column("probability"), pyarrow.float64()),
            "start_logit": pyarrow.array(column("start_logit"), pyarrow.float64()),
            "end_logit": pyarrow.array(column("end_logit"), pyarrow.float64()),
            "exact_match": scores.exact_matches,
            "f1": scores.f1s,
            "n_windows": pyarrow.array([row.n_windows for row in rows], pyarrow.int32()),
            "question_cut": [row.question_cut for row in rows],
            "error": pyarrow.array([row.error for row in rows], pyarrow.string()),
        }
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def valid(text: str) -> str:
    """The text with lone surrogates, which no file format takes, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
