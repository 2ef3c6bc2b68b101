"""What a training run needs before its first step; see `flaxqa.eval.finetune`.

Everything is read and held against what an earlier run in the output says, so that what cannot be
is refused before anything is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxqa import checkpoint, features, files, parts, reader, teacher, training
from flaxqa.checkpoint import Checkpoint
from flaxqa.config import DataOptions, ModelOptions
from flaxqa.devices import default_dtype, local_devices
from flaxqa.dropout import Rates
from flaxqa.errors import DataError, UsageError, all_problems
from flaxqa.progress import Progress
from flaxqa.training import Recipe, Rows, Span, Trainer

from . import environment, questions, run
from .config import FinetuneConfig
from .questions import Data, SquadExample

MANIFEST, LOG, ERRORS = "finetune.json", "log.jsonl", "errors.jsonl"
STATE, TEACHER = "state", "teacher"
CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
PACKAGES = (*run.PACKAGES, "optax", "orbax-checkpoint")
# Options that decide no weight, or of which the sha256 of what they name tells more.
LATER = (
    *(field.name for kind in (ModelOptions, DataOptions) for field in dataclasses.fields(kind)),
    "data", "limit", "teacher",
    "output", "stop_after", "save_every", "cache_teacher", "heldout", "carbon", "country", "grid",
    "log",
)  # fmt: skip


@dataclasses.dataclass
class Work:
    """All that a run needs to begin.

    Attributes:
      config: what was asked.
      output: where results go.
      loaded: the checkpoint where training begins, in float32.
      taught_by: the teacher, or None.
      trainer: the steps.
      rows: the windows.
      heldout: the questions that score each epoch and where they are from, or None.
      questions_per_window: how many questions a window is, on average.
      manifest: the content of `finetune.json`.
    """

    config: FinetuneConfig
    output: Path
    loaded: Checkpoint
    taught_by: Checkpoint | None
    trainer: Trainer
    rows: Rows
    heldout: tuple[Data, dict[str, Any]] | None
    questions_per_window: float
    manifest: dict[str, Any]

    @classmethod
    def prepare(cls, config: FinetuneConfig, output: Path, progress: Progress) -> Work:
        """Reads everything, and refuses what cannot be before anything is computed."""
        progress.stage("reading questions")
        options = DataOptions(**config.of(DataOptions))
        data, source = questions.read_with_source(config.data, options, "train")
        heldout = None
        if config.heldout is not None:
            options = dataclasses.replace(options, split=None)
            heldout = questions.read_with_source(config.heldout, options)
        progress.stage("loading the checkpoint")
        devices = local_devices(config.devices)
        loaded = checkpoint.load(
            config.model,
            revision=config.revision,
            weights_file=config.weights,
            new_head=config.seed,
        )
        taught_by = None
        if config.teacher is not None:
            taught_by = checkpoint.load(config.teacher, dtype=default_dtype(config.devices))
            teacher.check(taught_by, loaded)
        progress.stage("cutting windows")
        asked, reasons = usable(data.questions[: config.limit])
        max_length, doc_stride = features.window_sizes(
            config, loaded.config.max_position_embeddings
        )
        windows = features.make(
            asked,
            loaded.tokenizer,
            max_length=max_length,
            doc_stride=doc_stride,
            windows=config.windows,
        )
        answers = training.positions(windows, [span_of(one) for one in asked])
        rows = Rows(windows, answers, config.batch_size, len(devices), max_length)
        manifest = describe(config, loaded, taught_by, devices) | {
            "data": {
                **source,
                "questions": len(asked),
                "set_aside": len(reasons),
                "questions_sha256": questions.sha256(asked),
            },
            "windows": describe_windows(rows, doc_stride, config.windows),
            "steps": rows.steps_per_epoch * config.epochs,
        }
        manifest = resumed(output, manifest)
        files.write_whole(output / MANIFEST, run.as_json(manifest))
        run.write_or_remove(output / ERRORS, run.as_errors(reasons))
        trainer = Trainer(
            loaded.model,
            recipe_of(config, loaded, rows),
            devices,
            matmul_precision=config.matmul_precision,
        )
        share = len(asked) / len(windows)
        return cls(config, output, loaded, taught_by, trainer, rows, heldout, share, manifest)

    @property
    def complete(self) -> bool:
        """Whether an earlier run has done it all."""
        return bool(self.manifest["finished"]) and (
            self.manifest["steps_done"] == self.manifest["steps"]
        )

    def ask_teacher(self, progress: Progress) -> None:
        """Gives the rows what the teacher, if there is one, says of them."""
        if self.taught_by is not None:
            found = teacher_logits(self.config, self.output, self.taught_by, self.rows, progress)
            self.rows = dataclasses.replace(self.rows, teacher=found)


def usable(asked: Sequence[SquadExample]) -> tuple[list[SquadExample], dict[str, str]]:
    """The questions that can be learnt from, each with one place of its answer; of others why not.

    The first right answer counts. It is where the data say, or, if that is not its text, where it
    stands in the context if it does so once.
    """
    found, reasons = [], {}
    for question in asked:
        if (reason := features.why_unanswerable(question)) is not None:
            reasons[question.id] = reason
            continue
        if not question.answers:
            found.append(question)
            continue
        answer, context = question.answers[0], question.context
        start = question.starts[0] if question.starts else -1
        if start < 0 or context[start : start + len(answer)] != answer:
            start = context.find(answer)
            if start < 0 or context.find(answer, start + 1) >= 0:
                often = "more than once" if start >= 0 else "nowhere"
                told = f"the answer {answer[:40]!r} is not at its answer_start, and {often} else"
                reasons[question.id] = told
                continue
        if not answer.strip():
            reasons[question.id] = "the answer is blank"
            continue
        found.append(dataclasses.replace(question, answers=(answer,), starts=(start,)))
    if not found:
        raise DataError(
            all_problems("no question can be learnt from", [*map(": ".join, reasons.items())])
        )
    return found, reasons


def span_of(question: SquadExample) -> Span | None:
    """The characters of the answer to a question that can be learnt from."""
    if not question.answers:
        return None
    return question.starts[0], question.starts[0] + len(question.answers[0])


def recipe_of(config: FinetuneConfig, loaded: Checkpoint, rows: Rows) -> Recipe:
    rates = Rates.of(loaded.content, loaded.config.model_type) if config.dropout else Rates()
    dtype = default_dtype(config.devices) if config.dtype == "auto" else config.dtype
    return Recipe(
        steps=rows.steps_per_epoch * config.epochs,
        rates=rates,
        dtype=dtype,
        **{
            name: getattr(config, name)
            for name in (
                "learning_rate",
                "warmup",
                "weight_decay",
                "temperature",
                "distillation",
                "freeze_embeddings",
                "seed",
            )
        },
    )


def teacher_logits(
    config: FinetuneConfig, output: Path, taught_by: Checkpoint, rows: Rows, progress: Progress
) -> np.ndarray:
    """Those of `teacher.logits`, shown as they are computed."""
    asker = reader.Reader(
        taught_by, max_length=rows.longest, devices=config.devices,
        matmul_precision=config.matmul_precision,
    )  # fmt: skip
    progress.begin(len(rows.windows), 0, "asking the teacher")
    about = {
        "teacher": taught_by.sha256(),
        "dtype": str(taught_by.model.dtype),
        "matmul_precision": config.matmul_precision,
    }
    folder = Path(config.cache_teacher) if config.cache_teacher else output / TEACHER
    return teacher.logits(
        asker.predictor, rows.windows, folder, about,
        lambda windows: progress.advance(windows, windows),
    )  # fmt: skip


def describe(
    config: FinetuneConfig,
    loaded: Checkpoint,
    taught_by: Checkpoint | None,
    devices: Sequence[jax.Device],
) -> dict[str, Any]:
    """What decides the weights, and what they are computed on."""

    return {
        "config": dataclasses.asdict(config),
        "model": run.describe_checkpoint(loaded),
        "teacher": None if taught_by is None else run.describe_checkpoint(taught_by),
        "platform": {
            "backend": devices[0].platform,
            "device_kind": devices[0].device_kind,
            "devices": len(devices),
            **environment.machine(),
        },
        "versions": environment.versions(PACKAGES),
        "steps_done": 0,
        "epochs": [],
        "measured": {},
        "carbon": None,
        "started": run.now(),
        "finished": None,
    }


def describe_windows(rows: Rows, doc_stride: int, kind: str) -> dict[str, Any]:
    """How contexts were cut, and where the answers are."""
    return {
        "max_length": rows.longest,
        "doc_stride": doc_stride,
        "kind": kind,
        "total": len(rows.windows),
        "without_answer": int((rows.answers[:, 0] == 0).sum()),
        "answers_sha256": hashlib.sha256(rows.answers.tobytes()).hexdigest(),
    }


def resumed(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a new run, or that of the one in the output if it is the same.

    Raises:
      UsageError: that is another one; says in what.
    """
    path = output / MANIFEST
    if not path.is_file():
        return manifest
    try:
        before = json.loads(path.read_bytes())
        found = parts.differences(decides(before), decides(manifest))
        kept = {
            name: before[name]
            for name in ("steps_done", "epochs", "measured", "carbon", "started", "finished")
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged; --restart begins anew") from error
    if found:
        raise UsageError(
            all_problems(
                f"{output} has another run; choose another directory, or --restart to begin anew",
                found,
            )
        )
    return manifest | kept


def decides(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of a manifest decides the weights."""
    config = {name: value for name, value in manifest["config"].items() if name not in LATER}
    named = {
        name: None if manifest[name] is None else manifest[name]["sha256"]
        for name in ("model", "teacher")
    }
    told = {name: manifest["data"][name] for name in ("questions_sha256", "questions")}
    return {"config": config, **named, "data": told, "windows": manifest["windows"]}
