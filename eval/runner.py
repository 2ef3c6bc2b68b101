"""The side that is measured: a backend and the questions, in a process of its own.

`flaxqa.eval.compare` asks it, a command after the other; see there for what they are for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import answers, features, tokens
from flaxqa.features import Example, Feature
from flaxqa.spans import Logits

from . import backends, environment, worker

STAGES = ("tokenize", "compute", "decode")
AUDITED = 8  # windows that are asked again
TRACED = 512  # windows
SERVED_AT_ONCE = 32  # waiting questions that are answered together


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
      backend: of `flaxqa.eval.backends`.
      dtype: of weights and operands.
      model: directory of the checkpoint.
      questions: file with the questions.
      length: tokens of the longest window.
      threads: of the process.
      folder: where what is made of the checkpoint lies, for all workers.
      seed: of all that is drawn.
      device: "cpu", "gpu" or "tpu", where it is to compute if it can.
    """

    backend: str
    dtype: str
    model: str
    questions: str
    length: int
    threads: int
    folder: str
    seed: int = 0
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.dtype}"


@dataclasses.dataclass
class Took:
    """Seconds: of everything, and of each stage; streamed, stages go on side by side."""

    total: float = 0.0
    stages: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: Took) -> None:
        self.total += other.total
        self.stages = {stage: self.stages[stage] + other.stages[stage] for stage in STAGES}


class Runner:
    """A backend and the questions, in the process that measures it."""

    def __init__(self, job: Job):

        if job.device == "auto":
            import jax

            job = dataclasses.replace(job, device=jax.default_backend())
        self.job = job
        rows = json.loads(Path(job.questions).read_bytes())
        self.examples = [Example(**row) for row in rows]
        self.tokenizer = tokens.load_tokenizer(Path(job.model))[0]
        kind = backends.backend_of(job.backend)
        kind.device = job.device if job.device in kind.devices else "cpu"
        prepared = kind.prepare(job.model, job.dtype, job.folder)
        began = time.perf_counter()
        self.backend = kind(prepared, job.dtype, job.threads)
        self.backend.length = job.length
        self.load_seconds = time.perf_counter() - began
        began = time.perf_counter()
        self.backend.run(self.windows(self.examples[:1])[:1], "tuned")
        self.first_call_seconds = time.perf_counter() - began
        self.right: dict[str, str] = {}  # the answers of the accuracy run
        self.rng = np.random.default_rng(job.seed)  # of windows that nobody has seen

    def windows(self, examples: Sequence[Example]) -> Sequence[Feature]:
        return features.make(examples, self.tokenizer, max_length=self.job.length,
                             doc_stride=min(128, self.job.length // 2))  # fmt: skip

    def decode(
        self, examples: Sequence[Example], windows: Sequence[Feature], logits: Sequence[Logits]
    ) -> list[str]:
        found = answers.decode_squad(examples, windows, logits, top_k=1)
        return [one[0].text if one else "" for one in found]

    def answer(
        self, examples: Sequence[Example], way: str
    ) -> tuple[list[str], Sequence[Logits], Took]:
        """Answers, the logits they come from if they are told, and the time it took."""
        times = [time.perf_counter()]
        if way == "streamed":
            found, stages = self.backend.stream(examples)
            return found, (), Took(time.perf_counter() - times[0], stages)
        windows = self.windows(examples)
        times.append(time.perf_counter())
        logits = self.backend.run(windows, way)
        times.append(time.perf_counter())
        found = self.decode(examples, windows, logits)
        times.append(time.perf_counter())
        seconds = (after - before for before, after in itertools.pairwise(times))
        stages = dict(zip(STAGES, seconds, strict=True))
        return found, logits, Took(times[-1] - times[0], stages)

    def wrong(self, examples: Sequence[Example], found: Sequence[str]) -> int:
        """How many answers are not those of the accuracy run."""
        pairs = zip(examples, found, strict=True)
        return sum(self.right[example.id] != answer for example, answer in pairs)

    # --- what a worker is asked to do ---

    def accuracy(self, path: str) -> dict[str, Any]:
        """Answers everything; the logits go into a file."""
        found, logits, took = self.answer(self.examples, "tuned")
        self.right = {one.id: text for one, text in zip(self.examples, found, strict=True)}
        np.savez(
            path,
            start=np.concatenate([one.start for one in logits]),
            end=np.concatenate([one.end for one in logits]),
        )
        return {"answers": self.right, "seconds": took.total}

    def offline(self, way: str, seconds: float) -> dict[str, Any]:
        """Answers everything at once, again and again for so long: seconds of one time."""
        if way == "streamed" and not self.backend.streams:
            return {}
        sums, passes = Took(), 0
        wrong, began = 0, time.perf_counter()
        while not passes or time.perf_counter() - began < seconds:
            found, _, took = self.answer(self.examples, way)
            sums.add(took)
            passes += 1
            wrong += self.wrong(self.examples, found)
        return {
            "elapsed": time.perf_counter() - began,
            "total": sums.total / passes,
            "seconds": {stage: each / passes for stage, each in sums.stages.items()},
            "queries": passes * len(self.examples),
            "wrong": wrong,
        }

    def warm(self, way: str) -> dict[str, Any]:
        if way != "streamed" or self.backend.streams:
            self.answer(self.examples, way)
        return {}

    def single(self, seconds: float, queries: int) -> dict[str, Any]:
        """One question after the other, until both minima are reached."""
        order = np.random.default_rng(self.job.seed).permutation(len(self.examples))
        for index in order[:3]:
            self.answer([self.examples[index]], "tuned")
        latencies: list[float] = []
        sums = Took()
        wrong, elapsed, began = 0, 0.0, time.perf_counter()
        for index in itertools.cycle(order.tolist()):
            elapsed = time.perf_counter() - began
            if len(latencies) >= queries and elapsed >= seconds:
                break
            example = self.examples[index]
            found, _, took = self.answer([example], "tuned")
            latencies.append(took.total)
            sums.add(took)
            wrong += self.wrong([example], found)
        return {
            "elapsed": elapsed,
            "latencies": latencies,
            "queries": len(latencies),
            "wrong": wrong,
            "stages": sums.stages,
        }

    def server(self, rate: float, seconds: float, queries: int) -> dict[str, Any]:
        """Questions that come at random, `rate` of them a second; those that wait go together."""
        rng = np.random.default_rng(self.job.seed)
        number = max(queries, round(rate * seconds))
        arrivals = np.cumsum(rng.exponential(1 / rate, number))
        asked = rng.integers(0, len(self.examples), number)
        latencies: list[float] = []
        sums = Took()
        wrong, began, done = 0, time.perf_counter(), 0
        while done < number:
            now = time.perf_counter() - began
            if arrivals[done] > now:
                time.sleep(arrivals[done] - now)
                continue
            here = min(int(np.searchsorted(arrivals, now, "right")), done + SERVED_AT_ONCE)
            some = [self.examples[index] for index in asked[done:here]]
            found, _, took = self.answer(some, "tuned")
            sums.add(took)
            ended = time.perf_counter() - began
            latencies += (ended - arrivals[done:here]).tolist()
            wrong += self.wrong(some, found)
            done = here
        return {"latencies": latencies, "queries": number, "wrong": wrong, "rate": rate,
                "stages": sums.stages}  # fmt: skip

    def audit(self) -> dict[str, Any]:
        """Whether what was computed before is computed again, as MLPerf's test of caching asks.

        Seconds for windows that were never seen, and for one of them as often; the least of some.
        """
        window = max(self.windows(self.examples[:AUDITED]), key=len)

        def new() -> Feature:
            ids = window.input_ids.copy()
            places = self.rng.integers(1, len(ids) - 1, 3)
            ids[places] = self.rng.integers(5, self.tokenizer.get_vocab_size(), 3)
            return dataclasses.replace(window, input_ids=ids)

        self.backend.run([window], "tuned")
        took: dict[str, list[float]] = {"different": [], "same": []}
        for _ in range(5):
            ways = {"different": [new() for _ in range(AUDITED)], "same": [window] * AUDITED}
            for name, windows in ways.items():
                began = time.perf_counter()
                for one in windows:
                    self.backend.run([one], "tuned")
                took[name].append(time.perf_counter() - began)
        return {name: min(each) for name, each in took.items()}

    def sweep(self, batch: int, length: int) -> dict[str, Any]:
        """Tokens a second of windows of one length, so many at a time."""
        rng = np.random.default_rng(self.job.seed)
        like = self.windows(self.examples[:1])[0]
        highest = self.tokenizer.get_vocab_size()
        windows = [
            dataclasses.replace(like, input_ids=rng.integers(0, highest, length).astype(np.int32))
            for _ in range(batch)
        ]
        self.backend.run(windows, "whole")
        took = []
        for _ in range(3):
            began = time.perf_counter()
            self.backend.run(windows, "whole")
            took.append(time.perf_counter() - began)
        return {"tokens_per_second": batch * length / min(took)}

    def step(self) -> dict[str, Any]:
        """The largest batch alone, again and again; see `Backend.step`."""
        return self.backend.step(self.windows(self.examples))

    def products(self) -> dict[str, float]:
        """FLOP/s of a large matrix product on JAX's device, by dtype."""
        return {dtype: backends.product_rate(dtype) for dtype in ("bfloat16", "float32")}

    def profile(self, directory: str) -> dict[str, Any]:
        """Traces a few batches."""
        import jax

        few = self.windows(self.examples)[:TRACED]
        self.backend.run(few, "tuned")
        with jax.profiler.trace(directory):
            self.backend.run(few, "tuned")
        return {"profile": directory}

    def usage(self) -> dict[str, Any]:
        """What it took in memory, and how it computes."""
        return {
            "peak_memory_bytes": environment.peak_memory(),
            "device_memory_bytes": self.backend.device_memory(),
            "about": self.backend.about(),
        }


COMMANDS = (
    "accuracy", "offline", "warm", "single", "server", "audit", "sweep", "products", "usage",
    "profile", "step",
)  # fmt: skip


def serve(job: Job) -> None:
    """Measures a backend, as a worker."""

    def start() -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
        if hasattr(os, "sched_setaffinity"):  # what not every library can be told
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
        runner = Runner(job)

        def answer(command: str, *arguments: Any) -> dict[str, Any]:
            assert command in COMMANDS  # noqa: S101
            told: dict[str, Any] = getattr(runner, command)(*arguments)
            return told

        ready = {name: getattr(runner, name) for name in ("load_seconds", "first_call_seconds")}
        ready |= {"device": runner.backend.where(), "platform": runner.job.device}
        ready |= {name: getattr(runner.backend, name) for name in ("traceable", "streams")}
        return ready, answer

    worker.serve(start, backends.backend_of(job.backend).needs)


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[sys.argv.index("--worker") + 1])))
