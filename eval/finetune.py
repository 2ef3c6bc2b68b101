"""A training run: a checkpoint and questions in, a trained checkpoint out, resumable at any time.

Everything follows from the options and the seed: which windows make a batch, in which order, and
what dropout takes. So a run that was killed goes on from its last saved state to the same weights,
on a CPU bit for bit.

Files: the trained checkpoint (`config.json`, `model.safetensors`, the tokenizer's), written last;
`finetune.json`, what was asked, on what, and what came of each epoch; `log.jsonl`, a line for each
step; `epoch-N/`, the checkpoint after each epoch and its evaluation in `eval/`, where there are
held-out questions; `errors.jsonl` if questions were set aside; `state/` and `teacher/` until the
run is complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxqa import carbon, checkpoint, features, files, parts, reader, teacher, training
from flaxqa.checkpoint import Checkpoint
from flaxqa.config import DataOptions
from flaxqa.devices import default_dtype, local_devices, use_compilation_cache
from flaxqa.dropout import Rates
from flaxqa.errors import DataError, UsageError, all_problems
from flaxqa.progress import Progress, Silence
from flaxqa.training import Recipe, Rows, Span, State, Told, Trainer

from . import environment, questions, run
from .config import EvalConfig, FinetuneConfig
from .questions import Data, SquadExample
from .squad import METRICS

MANIFEST, LOG, ERRORS = "finetune.json", "log.jsonl", "errors.jsonl"
STATE, TEACHER = "state", "teacher"
PACKAGES = (*run.PACKAGES, "optax", "orbax-checkpoint")
LATER = (  # options that decide no weight
    "output", "stop_after", "save_every", "cache_teacher", "heldout", "carbon", "country", "grid",
)  # fmt: skip


def finetune(
    config: FinetuneConfig, progress: Progress | None = None, *, restart: bool = False
) -> dict[str, Any]:
    """Trains a checkpoint, writes it, and returns the content of `finetune.json`.

    Args:
      config: what is trained, on what, and how.
      progress: is told how it goes.
      restart: whether to remove what another run left in the output and begin anew.

    Raises:
      UsageError, DataError, ModelRejected: before anything is computed; see there.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    progress = progress or Silence()
    output = files.writable_directory(config.output)
    use_compilation_cache()
    with parts.held(output / parts.LOCK, fcntl.LOCK_EX):
        if restart:
            remove(output)
        refuse_other(output)
        with carbon.Meter(config) as meter:
            work = Work.prepare(config, output, progress)
            meter.covers(work.trainer.devices[0].platform)
            with Saved(output / STATE, config.save_every) as saved:
                return Training(work, saved, meter, progress).run()


def remove(output: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    if not (output / MANIFEST).is_file():
        return
    for name in (STATE, TEACHER, *(path.name for path in output.glob("epoch-[0-9]*"))):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (MANIFEST, LOG, ERRORS, *CHECKPOINT):
        (output / name).unlink(missing_ok=True)


CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def refuse_other(output: Path) -> None:
    """Raises: UsageError: the output has a checkpoint that no run of this kind wrote."""
    if not (output / MANIFEST).is_file() and any((output / name).exists() for name in CHECKPOINT):
        raise UsageError(
            f"{output} has a checkpoint already; name another directory for the output"
        )


# --- what is trained, on what ---


@dataclasses.dataclass
class Work:
    """All that a run needs to begin.

    Attributes:
      config: what was asked.
      output: where results go.
      loaded: the checkpoint where training begins, in float32.
      trainer: the steps.
      rows: the windows.
      heldout: the questions that score each epoch and where they are from, or None.
      questions_per_window: how many questions a window is, on average.
      manifest: the content of `finetune.json`.
    """

    config: FinetuneConfig
    output: Path
    loaded: Checkpoint
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
        windows, answers = windows_of(config, loaded, asked)
        max_length, doc_stride = features.sizes(config, loaded.config.max_position_embeddings)
        rows = Rows(windows, answers, config.batch_size, len(devices), max_length)
        manifest = describe(config, loaded, taught_by, devices) | {
            "data": {
                **source,
                "questions": len(asked),
                "set_aside": len(reasons),
                "questions_sha256": questions.sha256(asked),
            },
            "windows": {
                "max_length": max_length,
                "doc_stride": doc_stride,
                "kind": config.windows,
                "total": len(windows),
                "without_answer": int((answers[:, 0] == 0).sum()),
            },
            "steps": rows.steps_per_epoch * config.epochs,
        }
        manifest = resumed(output, manifest)
        files.write_whole(output / MANIFEST, run.as_json(manifest))
        write_errors(output, reasons)
        if taught_by is not None:
            rows = dataclasses.replace(
                rows, teacher=teacher_logits(config, output, taught_by, rows, progress)
            )
        trainer = Trainer(
            loaded.model,
            recipe_of(config, loaded, rows),
            devices,
            matmul_precision=config.matmul_precision,
        )
        return cls(
            config, output, loaded, trainer, rows, heldout, len(asked) / len(windows), manifest
        )


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


def windows_of(
    config: FinetuneConfig, loaded: Checkpoint, asked: Sequence[SquadExample]
) -> tuple[features.Windows, np.ndarray]:
    """The windows of all questions, and where the answer is in each; see `training.positions`."""
    max_length, doc_stride = features.sizes(config, loaded.config.max_position_embeddings)
    windows = features.make(
        asked,
        loaded.tokenizer,
        max_length=max_length,
        doc_stride=doc_stride,
        windows=config.windows,
    )
    spans: list[Span | None] = [
        (one.starts[0], one.starts[0] + len(one.answers[0])) if one.answers else None
        for one in asked
    ]
    return windows, training.positions(windows, spans)


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

    def about(one: Checkpoint) -> dict[str, Any]:
        return {
            "name": one.name,
            "directory": str(one.directory),
            "commit": one.commit,
            "sha256": one.sha256(),
            "notes": list(one.notes),
        }

    return {
        "config": dataclasses.asdict(config),
        "model": about(loaded),
        "teacher": None if taught_by is None else about(taught_by),
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


def write_errors(output: Path, reasons: dict[str, str]) -> None:
    lines = [json.dumps({"id": name, "reason": why}) + "\n" for name, why in reasons.items()]
    if lines:
        files.write_whole(output / ERRORS, "".join(lines).encode())
    else:
        (output / ERRORS).unlink(missing_ok=True)


# --- the run ---


class Saved:
    """The states of a run on disk, by orbax: the newest one, and the one before until it is whole.

    A save that was cut short is none.
    """

    def __init__(self, folder: Path, every: int):
        """Makes the folder if it is missing."""
        import orbax.checkpoint as ocp

        self.every, self.args = every, ocp.args
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()

    @property
    def step(self) -> int:
        """Steps that the newest state has seen; 0 without any."""
        return self.manager.latest_step() or 0

    def save(self, state: State, step: int) -> None:
        """Keeps a state; it is on disk a little later."""
        if step > self.step:
            # Copies, as the next step takes over the arrays themselves.
            leaves = {str(at): np.array(leaf) for at, leaf in enumerate(jax.tree.leaves(state))}
            self.manager.save(step, args=self.args.StandardSave(leaves), force=True)

    def restore(self, state: State) -> State:
        """The newest state in the place of a new one, which it has the form of."""
        leaves, form = jax.tree.flatten(state)
        wanted = {str(at): np.zeros(leaf.shape, leaf.dtype) for at, leaf in enumerate(leaves)}
        found = self.manager.restore(self.step, args=self.args.StandardRestore(wanted))
        restored = [jnp.asarray(found[str(at)]) for at in range(len(leaves))]
        return jax.tree.unflatten(form, restored)


class Training:
    """The steps of a run, from where it was to its end."""

    def __init__(self, work: Work, saved: Saved, meter: carbon.Meter, progress: Progress):
        """Begins nothing yet."""
        self.work, self.saved, self.meter, self.progress = work, saved, meter, progress
        self.config, self.rows, self.manifest = work.config, work.rows, work.manifest
        self.steps = self.manifest["steps"]
        self.last = min(self.config.stop_after or self.steps, self.steps)
        self.rate = work.trainer.recipe.schedule()
        self.log: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Goes through the epochs that are left, and writes the checkpoint."""
        trainer, per_epoch = self.work.trainer, self.rows.steps_per_epoch
        if self.manifest["finished"] and self.manifest["steps_done"] == self.steps:
            return self.manifest
        state, done = trainer.begin(), self.saved.step
        if done:
            state = jax.device_put(self.saved.restore(state), trainer.everywhere)
        self.log = kept_log(self.work.output / LOG, done)
        self.show(done)
        while done < self.last:
            epoch = done // per_epoch
            end = min((epoch + 1) * per_epoch, self.last)
            state = self.through(state, epoch, done, end)
            done = end
            self.keep(state, done)
            self.conclude(state, done)
        if len(self.manifest["epochs"]) == 0 or self.manifest["epochs"][-1]["step"] != done:
            self.conclude(state, done)  # it was stopped between the two
        return self.finish(state, done)

    def show(self, done: int) -> None:
        """Begins the bar: questions of all epochs, and those that are done."""
        total = self.rows.steps_per_epoch * self.config.epochs
        share = self.work.questions_per_window * len(self.rows.windows) * self.config.epochs / total
        self.progress.begin(round(share * self.last), round(share * done), "training on")

    def through(self, state: State, epoch: int, begin: int, end: int) -> State:
        """The steps from one number to another, all of one epoch."""
        first = epoch * self.rows.steps_per_epoch
        told: tuple[int, Told, int] | None = None  # of the step before: the devices go on meanwhile
        clock = time.perf_counter()
        with (self.work.output / LOG).open("a", encoding="utf-8") as file:

            def note() -> None:
                nonlocal clock
                if told is None:
                    return
                number, values, n_windows = told
                line = {
                    "step": number + 1,
                    "epoch": epoch + 1,
                    **{name: float(value) for name, value in values._asdict().items()},
                    "learning_rate": float(self.rate(number)),
                    "windows": n_windows,
                }
                now = time.perf_counter()
                line["seconds"], clock = now - clock, now
                self.log.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                asked = round(n_windows * self.work.questions_per_window)
                self.meter.count(asked)
                self.progress.advance(asked, n_windows, told=f"loss {line['loss']:.3f}")

            batches = self.rows.epoch(self.config.seed, epoch, begin - first)
            for number, (chosen, batch) in zip(range(begin, end), batches, strict=False):
                state, values = self.work.trainer.step(state, batch, number)
                note()
                told = number, values, len(chosen)
                if (number + 1) % self.saved.every == 0:
                    self.keep(state, number + 1)
            note()
        return state

    def keep(self, state: State, done: int) -> None:
        """Saves a state, and what the energy so far was."""
        self.saved.save(state, done)
        if (record := self.meter.reading()) is not None:
            self.manifest["measured"][self.meter.session] = record
            self.write_manifest()

    def write_manifest(self) -> None:
        files.write_whole(self.work.output / MANIFEST, run.as_json(self.manifest))

    def conclude(self, state: State, done: int) -> None:
        """Notes what an epoch came to, scored on the held-out questions if there are any."""
        per_epoch = self.rows.steps_per_epoch
        lines = [one for one in self.log if done - (done - 1) % per_epoch <= one["step"] <= done]
        seconds = sum(one["seconds"] for one in lines)
        n_windows = sum(one["windows"] for one in lines)
        questions_each = self.work.questions_per_window
        result: dict[str, Any] = {
            "epoch": done / per_epoch,
            "step": done,
            "loss": sum(one["loss"] * one["windows"] for one in lines) / max(n_windows, 1),
            "seconds": seconds,
            "questions_per_second": n_windows * questions_each / max(seconds, 1e-9),
        }
        if self.work.heldout is not None:
            folder = self.work.output / f"epoch-{done / per_epoch:g}"
            result |= self.score(state, folder)
            self.show(done)
        self.manifest["epochs"] = [one for one in self.manifest["epochs"] if one["step"] < done] + [
            result
        ]
        self.manifest["steps_done"] = done
        self.write_manifest()

    def score(self, state: State, folder: Path) -> dict[str, Any]:
        """Writes the checkpoint of an epoch and evaluates it."""
        self.write(state, folder)
        config = self.config
        options = {
            name: getattr(config, name)
            for name in ("max_length", "doc_stride", "windows", "devices", "matmul_precision")
        }
        metrics = run.evaluate(
            EvalConfig(
                model=str(folder), data=str(config.heldout), output=str(folder / "eval"), **options
            ),
            self.progress,
            self.work.heldout,
        )
        names = [name for key in METRICS for name in (key, f"{key}_interval")]
        return {name: metrics[name] for name in (*names, "total")}

    def write(self, state: State, folder: Path) -> None:
        """Writes the checkpoint of a state."""
        checkpoint.save(
            self.work.trainer.trained(state),
            folder,
            tokenizer=self.work.loaded.tokenizer,
            content=self.work.loaded.content,
        )

    def finish(self, state: State, done: int) -> dict[str, Any]:
        """Writes the trained checkpoint; what only a resumed run needs goes when all is done."""
        self.progress.stage("writing the checkpoint")
        self.write(state, self.work.output)
        self.manifest["finished"] = run.now()
        if (record := self.meter.stop()) is not None:
            self.manifest["measured"][self.meter.session] = record
        if measured := [*self.manifest["measured"].values()]:
            seen = round(self.rows.batch_size * done * self.work.questions_per_window)
            self.manifest["carbon"] = carbon.result(measured, seen)
        self.write_manifest()
        if done == self.steps:
            self.saved.manager.wait_until_finished()
            for name in (STATE, TEACHER):
                shutil.rmtree(self.work.output / name, ignore_errors=True)
        return self.manifest


def kept_log(path: Path, done: int) -> list[dict[str, Any]]:
    """The lines of the steps that the saved state has seen; the file has no others afterwards."""
    lines = list(whole_lines(path))
    kept = [one for one in lines if one["step"] <= done]
    files.write_whole(path, "".join(json.dumps(one) + "\n" for one in kept).encode())
    return kept


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, without one that a crash cut short."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                return
            yield found
