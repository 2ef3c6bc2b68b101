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
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxqa import carbon, checkpoint, files, parts, predict
from flaxqa.devices import use_compilation_cache
from flaxqa.errors import ModelRejected, UsageError
from flaxqa.progress import Progress, Silence
from flaxqa.training import Batch, State, Told

from . import run, trackers
from .config import EvalConfig, FinetuneConfig
from .preparation import CHECKPOINT, ERRORS, LOG, MANIFEST, STATE, TEACHER, Work
from .squad import METRICS


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
    trackers.check(config, config.output)
    content = trained(config, progress or Silence(), restart)
    output = files.local(config.output)
    trackers.log(config, lambda: trackers.Results(
        output, dataclasses.asdict(config), files=(MANIFEST, LOG),
        **trackers.of_training(content, list(whole_lines(output / LOG))),
    ))  # fmt: skip
    return content


def trained(config: FinetuneConfig, progress: Progress, restart: bool) -> dict[str, Any]:
    """As `finetune`, without trackers."""
    output = files.writable_directory(config.output)
    use_compilation_cache()
    with parts.held(output / parts.LOCK, fcntl.LOCK_EX):
        if restart:
            remove(output)
        refuse_other(output)
        with carbon.Meter(config) as meter:
            work = Work.prepare(config, output, progress)
            meter.covers(work.trainer.devices[0].platform)
            if work.complete:
                return work.manifest
            work.ask_teacher(progress)
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


def refuse_other(output: Path) -> None:
    """Raises: UsageError: the output has a checkpoint that no run of this kind wrote."""
    if not (output / MANIFEST).is_file() and any((output / name).exists() for name in CHECKPOINT):
        raise UsageError(
            f"{output} has a checkpoint already; name another directory for the output"
        )


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
        self.windows = 0  # that were seen so far

    def run(self) -> dict[str, Any]:
        """Goes through the epochs that are left, and writes the checkpoint."""
        trainer, per_epoch = self.work.trainer, self.rows.steps_per_epoch
        state, done = trainer.begin(), self.saved.step
        if done:
            state = jax.device_put(self.saved.restore(state), trainer.everywhere)
        self.log = kept_log(self.work.output / LOG, done)
        self.windows = sum(line["windows"] for line in self.log)
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

    @property
    def questions(self) -> int:
        """How many were seen so far, once for each epoch."""
        return round(self.windows * self.work.questions_per_window)

    def show(self, done: int) -> None:
        """Begins the bar: questions of all epochs, and those that are done."""
        total = self.work.questions_per_window * len(self.rows.windows) * self.config.epochs
        share = total / self.steps
        self.progress.begin(round(share * self.last), round(share * done), "training on")

    def through(self, state: State, epoch: int, begin: int, end: int) -> State:
        """The steps from one number to another, all of one epoch."""
        first = epoch * self.rows.steps_per_epoch
        told: tuple[int, Told, int] | None = None  # of the step before: the devices go on meanwhile
        clock = time.perf_counter()
        with (self.work.output / LOG).open("a", encoding="utf-8") as file:

            def note() -> None:
                nonlocal clock, told
                if told is None:
                    return
                number, values, n_windows = told
                refuse_infinite(float(values.loss), number)
                line = {
                    "step": number + 1,
                    "epoch": epoch + 1,
                    **{name: float(value) for name, value in values._asdict().items()},
                    "learning_rate": float(self.rate(number)),
                    "windows": n_windows,
                }
                now = time.perf_counter()
                line["seconds"], clock = now - clock, now
                before = self.questions
                self.log.append(line)
                self.windows += n_windows
                file.write(json.dumps(line) + "\n")
                file.flush()
                told = None
                asked = self.questions - before
                self.meter.count(asked)
                self.progress.advance(asked, n_windows, told=f"loss {line['loss']:.3f}")

            batches = self.rows.epoch(self.config.seed, epoch, begin - first)
            for number, (chosen, batch) in zip(range(begin, end), batches, strict=False):
                state, values = self.step(state, batch, number)
                note()
                told = number, values, len(chosen)
                if (number + 1) % self.saved.every == 0:
                    note()
                    self.keep(state, number + 1)
            note()
        return state

    def step(self, state: State, batch: Batch, number: int) -> tuple[State, Told]:
        """One step.

        Raises:
          UsageError: the devices have no memory for it.
        """
        try:
            return self.work.trainer.step(state, batch, number)
        except RuntimeError as error:
            if not predict.is_out_of_memory(error):
                raise
            n_rows, n_tokens = batch.input_ids.shape
            raise UsageError(
                f"the devices have no memory for {n_rows} windows of {n_tokens} tokens; take a "
                f"smaller --batch-size than {self.config.batch_size}, or more devices"
            ) from error

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
            self.manifest["carbon"] = carbon.result(measured, self.questions)
        self.write_manifest()
        if done == self.steps:
            self.saved.manager.wait_until_finished()
            for name in (STATE, TEACHER):
                shutil.rmtree(self.work.output / name, ignore_errors=True)
        return self.manifest


def refuse_infinite(loss: float, number: int) -> None:
    """Raises: ModelRejected: training has gone astray; what was saved before is still there."""
    if not math.isfinite(loss):
        raise ModelRejected(
            f"the loss of step {number + 1} is {loss}; a smaller --learning-rate, or --warmup, may "
            "keep it finite"
        )


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
