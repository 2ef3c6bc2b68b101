"""The same work on several backends: do they answer alike, how well, and how fast.

Fairness is by construction. Every backend (`flaxqa.eval.backends`) has the same checkpoint bytes,
questions, windows, decoder and number of threads, and a process of its own, which is idle while
another one runs. Rounds are interleaved (A B C A B C ...), so that a machine that slows down slows
all; numbers are medians of rounds with their extremes, and ratios are taken round by round.

Scenarios, after MLPerf Inference: `offline` answers all questions at once; `single` one question
after the other; `server` questions that come at random (Poisson), at the highest rate at which 99
of 100 wait less than a bound. What counts is from raw text to answer, split into tokenizing,
computing logits and decoding. Besides, `start` is from a new process to all answers, once with
empty and once with full caches of compiled code; `step` is the largest batch alone.

A result is VALID only if the work was done: logits and answers are held against the plain model in
float32 (`jax-model`, in a process of its own), what is answered in timed runs must be what was
answered in the accuracy run (but for one in twenty where it is not float32), and asking one thing
again and again must not be faster than asking different ones (`flaxqa.eval.results`).

Everything runs where JAX runs, or on the kind of device that was chosen; what has no code for that
runs on the CPU, and the results say so. TPUs belong to one process at a time: there one backend is
measured after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import carbon, features, files
from flaxqa.errors import UsageError
from flaxqa.progress import Progress, Silence

from . import backend, backends, environment, groups, questions, trackers
from .config import BenchConfig, CompareConfig
from .results import AUDITS, FASTER, Contestant, Results, finite, percentile
from .runner import Job
from .worker import Worker

Given = tuple[questions.Data, dict[str, Any]] | None
REFERENCE = "jax-model"
PACKAGES = (
    "flaxqa", "jax", "jaxlib", "torch", "transformers", "onnx", "onnxruntime", "openvino",
    "tensorflow-cpu", "tensorflow", "numpy", "tokenizers",
)  # fmt: skip
SWEEP = (
    *((batch, 128) for batch in (1, 2, 4, 8, 16, 32)),
    *((8, length) for length in (32, 64, 256, 384)),
)  # windows and tokens
TRIALS = 6  # rates that are tried


def cpus() -> int:
    """Those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed or os.cpu_count() or 1


def variables(threads: int) -> dict[str, str]:
    """Variables that hold every library to so many threads, and JAX to the memory that it needs."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    others = {"TF_CPP_MIN_LOG_LEVEL": "2", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**dict.fromkeys(names, str(threads)), **others}


class Field:
    """What all backends of a comparison have in common; a context manager, that ends them.

    Attributes:
      questions: of the data; those that cannot be asked included.
      v2: whether they are SQuAD 2.0's.
      lengths: tokens of every window.
      device: "cpu", "gpu" or "tpu", once the reference runs; before that what was asked for.
    """

    def __init__(
        self, config: CompareConfig | BenchConfig, output: Path, progress: Progress, given: Given
    ):
        """Reads the questions and the checkpoint.

        Raises:
          UsageError, DataError, ModelRejected: see there.
        """
        import jax

        from flaxqa import checkpoint, weights

        from . import widen

        jax.config.update("jax_platforms", "cpu")  # an accelerator is for those that are measured
        self.config, self.output, self.progress = config, output, progress
        self.device: str = config.device
        progress.stage("reading questions")
        (asked, self.v2), self.source = given or questions.read_with_source(config.data, config)
        self.questions = asked[: config.limit]
        self.asked = [one for one in self.questions if features.why_unanswerable(one) is None]
        if not self.asked:
            raise UsageError(f"{config.data} has no question that can be asked")
        progress.stage("loading the checkpoint")
        self.loaded = checkpoint.load(
            config.model, revision=config.revision, weights_file=config.weights
        )
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        (self.folder / "prepared").mkdir()
        if config.width is not None:
            wider = widen.widened(self.loaded, config.width, self.folder / "model")
            self.loaded = checkpoint.load(wider)
        elif self.loaded.notes or not self.loaded.weights_file.startswith(weights.SAFETENSORS):
            # As every framework can read it.
            usual, loaded = self.folder / "model", self.loaded
            checkpoint.save(loaded.model, usual, tokenizer=loaded.tokenizer)
            self.loaded = checkpoint.load(usual)
        self.directory = self.loaded.directory.resolve()
        self.length = min(backend.LENGTH, self.loaded.config.max_position_embeddings)
        windows = features.make(
            self.asked, self.loaded.tokenizer, max_length=self.length,
            doc_stride=min(128, self.length // 2),
        )  # fmt: skip
        self.lengths = windows.lengths.tolist()
        names = ("id", "question", "context")
        rows = [{name: getattr(one, name) for name in names} for one in self.asked]
        self.path = self.folder / "questions.json"
        self.path.write_text(json.dumps(rows), encoding="utf-8")
        self.log = output / "workers.log"
        self.log.unlink(missing_ok=True)

    def worker(self, job: Job, **more: str) -> Worker:
        """A process for a job, with variables of its environment besides those of all."""
        made = Worker(
            "flaxqa.eval.runner",
            dataclasses.asdict(job),
            variables=variables(job.threads) | more,
            log=self.log,
        )
        self.stack.callback(made.close)
        return made

    def start(self, name: str, dtype: str) -> Contestant:
        """A backend, ready, its answers known; or with the reason why it is not."""
        self.progress.stage(f"setting up {name}/{dtype}")
        job = Job(
            backend=name,
            dtype=dtype,
            model=str(self.directory),
            questions=str(self.path),
            length=self.length,
            threads=self.config.threads or cpus(),
            folder=str(self.folder / "prepared"),
            seed=self.config.seed,
            device=self.device,
        )
        made = Contestant(job, self.worker(job))
        made.take_accuracy(self.folder / "logits.npz")
        return made

    def start_anew(self, one: Contestant) -> None:
        """Starts it twice more, with empty and then with full caches of compiled code."""
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            names = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
            for caches in ("empty", "full"):
                self.progress.stage(f"{one.name}: start, caches {caches}")
                began = time.perf_counter()
                worker = self.worker(one.job, **dict.fromkeys(names, cache))
                told = worker.ask("accuracy", str(self.folder / "logits.npz"))
                seconds = time.perf_counter() - began
                if told:
                    one.starts[caches] = {
                        "seconds": seconds,
                        "load_seconds": worker.ready["load_seconds"],
                        "first_call_seconds": worker.ready["first_call_seconds"],
                        "answers_seconds": told["seconds"],
                        "same_answers": told["answers"] == one.answers,
                    }
                worker.close()

    def reference(self) -> Contestant:
        """The plain model in float32, which also finds out where JAX runs; ended when it is known.

        Raises:
          UsageError: it cannot be had.
        """
        made = self.start(REFERENCE, "float32")
        if not made.answers:
            raise UsageError(f"the reference {made.name} fails: {made.worker.absent}")
        self.device = made.worker.ready["platform"]
        self.products = made.worker.ask("products")
        made.worker.close()
        return made

    def about(self, reference: Contestant) -> dict[str, Any]:
        """What was measured, on what."""
        config, loaded = self.config, self.loaded
        return {
            "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": dataclasses.asdict(config),
            "model": {
                "name": config.model,
                "commit": loaded.commit,
                "sha256": loaded.sha256(),
                "config": loaded.config.to_dict(),
            },
            "data": {**self.source, "questions_sha256": questions.sha256(self.questions)},
            "questions": len(self.questions),
            "set_aside": len(self.questions) - len(self.asked),
            "windows": len(self.lengths),
            "tokens": sum(self.lengths),
            "useful_flops": backends.useful_flops(loaded.config, self.lengths),
            "device": self.device,
            "device_name": reference.worker.ready["device"],
            "product_flops_per_second": self.products,
            "machine": environment.machine(),
            "versions": environment.versions(PACKAGES),
            "commit": environment.commit(),
        }

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def compare(
    config: CompareConfig | BenchConfig, progress: Progress | None = None, given: Given = None
) -> dict[str, Any]:
    """Measures all backends and writes `comparison.json`, after each step as far as it is known.

    Args:
      config: what is measured, and how.
      progress: is told how it goes.
      given: the questions and where they are from, where they are there already.

    Returns:
      Its content.

    Raises:
      UsageError, DataError, ModelRejected: before anything is measured; see there.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    trackers.check(config, config.output)
    content = compared(config, progress or Silence(), given)
    trackers.log(config, lambda: trackers.Results(
        files.local(config.output), dataclasses.asdict(config), trackers.of_backends(content),
        files=("comparison.json",),
    ))  # fmt: skip
    return content


def compared(
    config: CompareConfig | BenchConfig, progress: Progress, given: Given
) -> dict[str, Any]:
    """As `compare`, without trackers."""
    chosen = [parsed(name) for name in config.backends]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"backends are {config.backends}: at least one, and none of them twice")
    if config.profile is not None:
        if not any(backends.backend_of(backend).traceable for backend, _ in chosen):
            raise UsageError(f"--profile is for JAX backends, and {config.backends} has none")
        files.writable_directory(config.profile)
    groupings = groups.read(config.group_by)
    output = files.writable_directory(config.output)
    with carbon.Meter(config) as meter, Field(config, output, progress, given) as field:
        reference = field.reference()
        meter.covers(field.device)
        contestants: list[Contestant] = []
        about = field.about(reference)
        results = Results(
            field.questions, field.v2, reference, contestants, config, about, groupings
        )

        def content() -> dict[str, Any]:
            whole: dict[str, Any] = finite({**about, **results.content()})
            if (measured := meter.reading()) is not None:
                whole["carbon"] = carbon.add(measured)
                del whole["carbon"]["questions"]  # of which the backends answer one set many times
            files.write_whole(output / "comparison.json", json.dumps(whole, indent=1).encode())
            return whole

        together = field.device != "tpu"
        for group in [chosen] if together else [[one] for one in chosen]:
            started = [field.start(*one) for one in group]
            contestants += started
            measure(started, config, progress, save=content)
            for one in started if "start" in config.scenarios else ():
                if one.worker.absent is None:
                    field.start_anew(one)
            for one in started if not together else ():
                one.worker.close()
        progress.stage("scoring")
        meter.stop()
        return content()


def compact(content: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison without what each question took and was answered."""
    kept = {name: content[name] for name in content if name not in ("disagreements", "groups")}
    kept["backends"] = [
        {**row, "single": {k: v for k, v in (row.get("single") or {}).items() if k != "latencies"}}
        for row in content["backends"]
    ]
    return kept


def measure(
    contestants: Sequence[Contestant],
    config: CompareConfig | BenchConfig,
    progress: Progress,
    save: Callable[[], Any],
) -> None:
    """Runs the scenarios; rounds of all contestants are interleaved."""

    def everyone(what: str) -> Iterator[Contestant]:
        for one in contestants:
            if one.worker.absent is None:
                progress.stage(f"{one.name}: {what}")
                yield one

    if "offline" in config.scenarios:
        for way in config.ways:
            for one in everyone(f"warming up, {way}"):
                one.worker.ask("warm", way)
    least = config.min_seconds / config.rounds, -(-config.min_queries // config.rounds)
    for number in range(config.rounds):
        told = f"round {number + 1} of {config.rounds}"
        for way in config.ways if "offline" in config.scenarios else ():
            for one in everyone(f"{told}, offline, {way}"):
                if way != "streamed" or one.worker.ready["streams"]:
                    with carbon.Meter(config) as meter:
                        took = one.worker.ask("offline", way, least[0])
                        meter.count(took.get("queries", 0))
                    one.offline.setdefault(way, []).append(took)
                    if took and (measured := meter.reading()) is not None:
                        one.energy.setdefault(way, []).append(measured)
        if "single" in config.scenarios:
            for one in everyone(f"{told}, single"):
                one.single.append(one.worker.ask("single", *least))
        save()
    if "server" in config.scenarios:
        for one in everyone("server"):
            find_rate(one, config)
            save()
    for one in everyone("step") if "step" in config.scenarios else ():
        one.step = one.worker.ask("step")
    for batch, length in SWEEP if config.sweep else ():
        for one in everyone(f"{batch} windows of {length} tokens"):
            if length <= one.job.length:
                rate = one.worker.ask("sweep", batch, length)
                one.sweep.append({"batch": batch, "length": length, **rate})
    for one in everyone("audit"):
        for _ in range(AUDITS):  # once honest is enough: what else runs here may slow one side
            one.audit = one.worker.ask("audit")
            if one.audit and one.audit["different"] <= FASTER * one.audit["same"]:
                break
        one.usage = one.worker.ask("usage")
    if config.profile is not None:
        for one in everyone("profile"):
            if one.worker.ready["traceable"]:
                one.worker.ask("profile", str(Path(config.profile) / one.name.replace("/", "-")))


def find_rate(one: Contestant, config: CompareConfig | BenchConfig) -> None:
    """Looks for the highest rate at which 99 of 100 questions wait less than the bound.

    Rates double until one is too high, or are halved until one is not; then the middle is tried.
    """
    low, high = 0.0, math.inf
    alone = one.worker.ask("single", 0.0, 5)
    rate = 1.0 / statistics.median(alone["latencies"]) if alone else 1.0
    for _ in range(TRIALS):
        trial = one.worker.ask("server", rate, config.min_seconds, config.min_queries)
        if not trial:
            return
        one.server.append(trial)
        if percentile(trial["latencies"], 99) <= config.latency_bound:
            low = rate
        else:
            high = rate
        rate = rate * 2 if high == math.inf else (low + high) / 2


def parsed(name: str) -> tuple[str, str]:
    """`torch` or `torch/bfloat16` as backend and dtype.

    Raises:
      UsageError: there is no such backend, or it does not compute in that dtype.
    """
    backend, _, dtype = name.partition("/")
    dtypes = backends.backend_of(backend).dtypes
    if dtype and dtype not in dtypes:
        raise UsageError(f"backend {backend!r} computes in {', '.join(dtypes)}, not {dtype!r}")
    return backend, dtype or dtypes[0]
