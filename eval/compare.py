"""The same work on several backends: do they answer alike, how well, and how fast.

Fairness is by construction. Every backend (`eval.backends`) has the same checkpoint bytes,
questions, windows, decoder and number of threads, and a process of its own, which is idle while
another one runs. Rounds are interleaved (A B C A B C ...), so that a machine that slows down slows
all; numbers are medians of rounds with their extremes, and ratios are taken round by round.

Scenarios, after MLPerf Inference: `offline` answers all questions at once; `single` one question
after the other; `server` questions that come at random (Poisson), at the highest rate at which 99
of 100 wait less than a bound. What counts is from raw text to answer, split into tokenizing,
computing logits and decoding.

A result is VALID only if the work was done: logits and answers are held against the plain model in
float32 (`jax-model`, in a process of its own), what is answered in timed runs must be what was
answered in the accuracy run (but for one in twenty where it is not float32), and asking one thing
again and again must not be faster than asking different ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import backends, environment, squad, worker
from eval.config import BenchConfig, CompareConfig
from eval.worker import Worker
from flaxqa import answers, features, files
from flaxqa.errors import UsageError
from flaxqa.features import Example, Feature
from flaxqa.progress import Progress, Silence
from flaxqa.spans import Logits

REFERENCE = "jax-model"
PACKAGES = (
    "flaxqa", "jax", "jaxlib", "torch", "transformers", "onnx", "onnxruntime", "openvino",
    "tensorflow-cpu", "tensorflow", "numpy", "tokenizers",
)  # fmt: skip
SWEEP = (
    *((batch, 128) for batch in (1, 2, 4, 8, 16, 32)),
    *((8, length) for length in (32, 64, 256, 384)),
)  # windows and tokens
STAGES = ("tokenize", "compute", "decode")
CLOSE = 1e-3  # logits of float32 backends; rounding makes 1e-5
ALIKE = 0.999  # share of answers that are the reference's, in float32
WORTH = 0.99  # F1 of any dtype, of the reference's, unless chance explains it
# Share of answers in timed runs that may not be those of the accuracy run, by whether it is
# float32: scales of dynamic quantization depend on what else is in the batch.
STRAY = {True: 1 - ALIKE, False: 0.05}
FASTER = 1.5  # asking one thing again, to asking different ones: from here on it was not computed
AUDITED, AUDITS = 8, 3  # windows of that, and how often it has to be so
SERVED_AT_ONCE = 32  # waiting questions that are answered together
TRIALS = 6  # rates that are tried
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
      backend: of `eval.backends`.
      dtype: of weights and operands.
      model: directory of the checkpoint.
      questions: file with the questions.
      length: tokens of the longest window.
      threads: of the process.
      seed: of all that is drawn.
    """

    backend: str
    dtype: str
    model: str
    questions: str
    length: int
    threads: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.dtype}"


# --- a worker ---


class Runner:
    """A backend and the questions, in the process that measures it."""

    def __init__(self, job: Job):
        from flaxqa import checkpoint

        self.job = job
        rows = json.loads(Path(job.questions).read_bytes())
        self.examples = [Example(**row) for row in rows]
        self.tokenizer = checkpoint.load_tokenizer(Path(job.model))[0]
        kind = backends.backend_of(job.backend)
        folder = tempfile.mkdtemp()  # below that of the worker, with which it goes
        prepared = kind.prepare(job.model, job.dtype, folder)
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
        found = answers.decode_squad(examples, windows, logits)
        return [one[0].text if one else "" for one in found]

    def answer(
        self, examples: Sequence[Example], way: str
    ) -> tuple[list[str], Sequence[Logits], dict[str, float]]:
        """Answers, the logits they come from, and the seconds of each stage."""
        times = [time.perf_counter()]
        windows = self.windows(examples)
        times.append(time.perf_counter())
        logits = self.backend.run(windows, way)
        times.append(time.perf_counter())
        found = self.decode(examples, windows, logits)
        times.append(time.perf_counter())
        seconds = (after - before for before, after in itertools.pairwise(times))
        return found, logits, dict(zip(STAGES, seconds, strict=True))

    def wrong(self, examples: Sequence[Example], found: Sequence[str]) -> int:
        """How many answers are not those of the accuracy run."""
        pairs = zip(examples, found, strict=True)
        return sum(self.right[example.id] != answer for example, answer in pairs)

    # --- what a worker is asked to do ---

    def accuracy(self, path: str) -> dict[str, Any]:
        """Answers everything; the logits go into a file."""
        found, logits, _ = self.answer(self.examples, "tuned")
        self.right = {one.id: text for one, text in zip(self.examples, found, strict=True)}
        np.savez(
            path,
            start=np.concatenate([one.start for one in logits]),
            end=np.concatenate([one.end for one in logits]),
        )
        return {"answers": self.right}

    def offline(self, way: str, seconds: float) -> dict[str, Any]:
        """Answers everything at once, again and again for so long: seconds of one time."""
        passes: list[dict[str, float]] = []
        wrong, began = 0, time.perf_counter()
        while not passes or time.perf_counter() - began < seconds:
            found, _, took = self.answer(self.examples, way)
            passes.append(took)
            wrong += self.wrong(self.examples, found)
        return {
            "elapsed": time.perf_counter() - began,
            "seconds": {stage: statistics.mean(took[stage] for took in passes) for stage in STAGES},
            "queries": len(passes) * len(self.examples),
            "wrong": wrong,
        }

    def warm(self, way: str) -> dict[str, Any]:
        self.answer(self.examples, way)
        return {}

    def single(self, seconds: float, queries: int) -> dict[str, Any]:
        """One question after the other, until both minima are reached."""
        order = np.random.default_rng(self.job.seed).permutation(len(self.examples))
        for index in order[:3]:
            self.answer([self.examples[index]], "tuned")
        latencies: list[float] = []
        stages: list[dict[str, float]] = []
        wrong, elapsed, began = 0, 0.0, time.perf_counter()
        for index in itertools.cycle(order.tolist()):
            elapsed = time.perf_counter() - began
            if len(latencies) >= queries and elapsed >= seconds:
                break
            example = self.examples[index]
            found, _, took = self.answer([example], "tuned")
            latencies.append(sum(took.values()))
            stages.append(took)
            wrong += self.wrong([example], found)
        return {
            "elapsed": elapsed,
            "latencies": latencies,
            "queries": len(latencies),
            "wrong": wrong,
            "stages": {stage: sum(took[stage] for took in stages) for stage in STAGES},
        }

    def server(self, rate: float, seconds: float, queries: int) -> dict[str, Any]:
        """Questions that come at random, `rate` of them a second; those that wait go together."""
        rng = np.random.default_rng(self.job.seed)
        number = max(queries, round(rate * seconds))
        arrivals = np.cumsum(rng.exponential(1 / rate, number))
        asked = rng.integers(0, len(self.examples), number)
        latencies: list[float] = []
        stages = dict.fromkeys(STAGES, 0.0)
        wrong, began, done = 0, time.perf_counter(), 0
        while done < number:
            now = time.perf_counter() - began
            if arrivals[done] > now:
                time.sleep(arrivals[done] - now)
                continue
            here = min(int(np.searchsorted(arrivals, now, "right")), done + SERVED_AT_ONCE)
            some = [self.examples[index] for index in asked[done:here]]
            found, _, took = self.answer(some, "tuned")
            stages = {stage: stages[stage] + took[stage] for stage in STAGES}
            ended = time.perf_counter() - began
            latencies += (ended - arrivals[done:here]).tolist()
            wrong += self.wrong(some, found)
            done = here
        return {"latencies": latencies, "queries": number, "wrong": wrong, "rate": rate,
                "stages": stages}  # fmt: skip

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

    def memory(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024)}


COMMANDS = ("accuracy", "offline", "warm", "single", "server", "audit", "sweep", "memory")


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

        seconds = {name: getattr(runner, name) for name in ("load_seconds", "first_call_seconds")}
        return seconds, answer

    worker.serve(start, backends.backend_of(job.backend).needs)


# --- the process that compares ---


def cpus() -> int:
    """Those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed or os.cpu_count() or 1


def variables(threads: int) -> dict[str, str]:
    """Variables that hold every library to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TF_CPP_MIN_LOG_LEVEL": "2"}


@dataclasses.dataclass
class Contestant:
    """A backend and what was measured of it.

    Attributes:
      job: which it is.
      worker: its process.
      answers: by question, of the accuracy run; none if it never came to one.
      logits: [2, tokens of all windows], of the same.
      offline: of each way the rounds.
      single: the rounds.
      server: the rates that were tried.
      audit: see `Runner.audit`.
      sweep: by batch size and length, tokens a second.
      memory: the peak, in bytes.
    """

    job: Job
    worker: Worker
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    logits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0)))
    offline: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    single: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    server: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    audit: dict[str, float] = dataclasses.field(default_factory=dict)
    sweep: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: int | None = None

    def take_accuracy(self, path: Path) -> None:
        """Runs everything once; what later runs answer has to be the same."""
        if told := self.worker.ask("accuracy", str(path)):
            self.answers = told["answers"]
            with np.load(path) as arrays:
                self.logits = np.stack([arrays["start"], arrays["end"]])

    @property
    def name(self) -> str:
        return self.job.name


def compare(
    config: CompareConfig | BenchConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Measures all backends and writes `comparison.json`, after each step as far as it is known.

    Returns:
      Its content.

    Raises:
      UsageError, DataError, ModelRejected: before anything is measured; see there.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    from eval import run
    from flaxqa import checkpoint

    progress = progress or Silence()
    chosen = [parsed(name) for name in config.backends]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"backends are {config.backends}: at least one, and none of them twice")
    output = files.writable_directory(config.output)
    progress.stage("reading questions")
    (questions, v2), source = run.read_data(config)
    asked = [one for one in questions if features.why_unanswerable(one) is None]
    if not asked:
        raise UsageError(f"{config.data} has no question that can be asked")
    progress.stage("loading the checkpoint")
    loaded = checkpoint.load(config.model, revision=config.revision)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "questions.json"
        rows = [{name: getattr(one, name) for name in ("id", "question", "context")}
                for one in asked]  # fmt: skip
        path.write_text(json.dumps(rows), encoding="utf-8")
        log = output / "workers.log"
        log.unlink(missing_ok=True)

        def start(backend: str, dtype: str) -> Contestant:
            progress.stage(f"setting up {backend}/{dtype}")
            job = Job(
                backend=backend,
                dtype=dtype,
                model=str(loaded.directory.resolve()),
                questions=str(path),
                length=min(backends.LENGTH, loaded.config.max_position_embeddings),
                threads=config.threads or cpus(),
                seed=config.seed,
            )
            made = Contestant(
                job,
                Worker(
                    "eval.compare",
                    dataclasses.asdict(job),
                    variables=variables(job.threads),
                    log=log,
                ),
            )
            stack.callback(made.worker.close)
            made.take_accuracy(folder / "logits.npz")
            return made

        reference = start(REFERENCE, "float32")
        if not reference.answers:
            raise UsageError(f"the reference {reference.name} fails: {reference.worker.absent}")
        reference.worker.close()
        contestants = [start(*one) for one in chosen]
        about = {
            "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": dataclasses.asdict(config),
            "model": {
                "name": config.model,
                "commit": loaded.commit,
                "sha256": loaded.sha256(),
                "config": loaded.config.to_dict(),
            },
            "data": {**source, "questions_sha256": squad.sha256(questions)},
            "questions": len(questions),
            "set_aside": len(questions) - len(asked),
            "tokens": reference.logits.shape[1],
            "machine": environment.machine(),
            "versions": environment.versions(PACKAGES),
            "commit": environment.commit(),
        }

        results = Results(questions, v2, reference, contestants, config)

        def content() -> dict[str, Any]:
            whole: dict[str, Any] = finite({**about, **results.content()})
            files.write_whole(output / "comparison.json", json.dumps(whole, indent=1).encode())
            return whole

        measure(contestants, config, progress, save=content)
        progress.stage("scoring")
        return content()


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
                one.offline.setdefault(way, []).append(one.worker.ask("offline", way, least[0]))
        if "single" in config.scenarios:
            for one in everyone(f"{told}, single"):
                one.single.append(one.worker.ask("single", *least))
        save()
    if "server" in config.scenarios:
        for one in everyone("server"):
            find_rate(one, config)
            save()
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
        one.memory = one.worker.ask("memory").get("peak_memory_bytes")


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


# --- what was found ---


@dataclasses.dataclass
class Results:
    """What comes of the measurements, at any time while they go on."""

    questions: Sequence[squad.SquadExample]
    v2: bool
    reference: Contestant
    contestants: Sequence[Contestant]
    config: CompareConfig | BenchConfig
    known: dict[int, squad.Scores] = dataclasses.field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        there = [one for one in self.contestants if one.answers]
        exact = [one for one in there if one.job.dtype == "float32"]
        return {
            "reference": self.reference.name,
            "backends": [self.row(one) for one in self.contestants],
            "float32_logit_differences": {
                f"{a.name} - {b.name}": differences(a, b)["largest"]
                for a, b in itertools.combinations(exact, 2)
            },
            "groups": self.groups(there),
            "disagreements": self.disagreements(there),
        }

    def row(self, one: Contestant) -> dict[str, Any]:
        """All about one backend."""
        job, ready = one.job, one.worker.ready
        row: dict[str, Any] = {"name": one.name, "backend": job.backend, "dtype": job.dtype}
        if not one.answers:
            return row | {"absent": one.worker.absent}
        reasons = self.reasons(one)
        return row | {
            "verdict": "INVALID" if reasons else "VALID",
            "reasons": reasons,
            "load_seconds": ready["load_seconds"],
            "first_call_seconds": ready["first_call_seconds"],
            "peak_memory_bytes": one.memory,
            "parity": {
                **differences(one, self.reference),
                "same_answers": self.same_answers(one),
            },
            "scores": self.scores(one),
            "offline": {
                way: self.offline(one, way) for way, rounds in one.offline.items() if any(rounds)
            },
            "single": self.latencies(one),
            "server": self.server(one),
            "sweep": one.sweep,
            "audit": one.audit,
        }

    def same_answers(self, one: Contestant) -> float:
        """The share of answers that are the reference's."""
        theirs = self.reference.answers
        return sum(theirs[key] == text for key, text in one.answers.items()) / len(theirs)

    def scored(self, one: Contestant) -> squad.Scores:
        """The scores of a backend, whose answers do not change while it is timed."""
        if id(one) not in self.known:
            self.known[id(one)] = squad.score(self.questions, one.answers, v2=self.v2)
        return self.known[id(one)]

    def scores(self, one: Contestant) -> dict[str, Any]:
        """EM and F1 with intervals, and their distance from the reference's, by question."""
        own, theirs = self.scored(one), self.scored(self.reference)
        intervals, found = own.intervals(), {}
        for name, values in (("exact_match", "exact_matches"), ("f1", "f1s")):
            apart = difference_interval(getattr(own, values), getattr(theirs, values))
            found[name] = {"value": getattr(own, name), "interval": intervals[name], **apart}
        return found

    def reasons(self, one: Contestant) -> list[str]:
        """Why the numbers of a backend do not count."""
        found = []
        if one.worker.absent is not None:
            found.append(f"it ended before it was measured: {one.worker.absent}")
        parity, same = differences(one, self.reference), self.same_answers(one)
        if one.job.dtype == "float32":
            if not parity["largest"] <= CLOSE:
                found.append(
                    f"logits differ from the reference's by {parity['largest']:.2g}, more than "
                    f"{CLOSE:g}"
                )
            if same < ALIKE:
                found.append(f"{same:.1%} of the answers are the reference's, not {ALIKE:.1%}")
        f1, theirs = self.scores(one)["f1"], self.scored(self.reference).f1
        if theirs + f1["difference_interval"][1] < WORTH * theirs:
            found.append(
                f"F1 is {f1['value']:.2f}, which is not by chance less than {WORTH:.0%} of the "
                f"reference's {theirs:.2f}"
            )
        rounds = [*itertools.chain(*one.offline.values()), *one.single, *one.server]
        asked, wrong = (sum(each.get(key, 0) for each in rounds) for key in ("queries", "wrong"))
        if wrong > asked * STRAY[one.job.dtype == "float32"]:
            found.append(
                f"{wrong:,} of {asked:,} answers in timed runs are not those of the accuracy run"
            )
        for name, queries, seconds in self.amounts(one):
            if queries < self.config.min_queries:
                found.append(f"{name} had {queries} queries, less than {self.config.min_queries}")
            if seconds < self.config.min_seconds:
                found.append(
                    f"{name} took {seconds:.2f} s, less than {self.config.min_seconds:g} s"
                )
        audit = one.audit
        if audit and audit["different"] > FASTER * audit["same"]:
            found.append(
                f"what was asked before takes {audit['different'] / audit['same']:.1f} times less "
                f"time than what is new, {AUDITS} times measured: answers seem to be kept"
            )
        return found

    def amounts(self, one: Contestant) -> Iterator[tuple[str, int, float]]:
        """Of each scenario how many questions were asked, and for how many seconds."""
        scenarios = {f"offline, {way},": rounds for way, rounds in one.offline.items()}
        for name, rounds in {**scenarios, "single": one.single}.items():
            there = [each for each in rounds if each]
            if there:
                queries, seconds = (sum(each[key] for each in there)
                                    for key in ("queries", "elapsed"))  # fmt: skip
                yield name, queries, seconds

    def offline(self, one: Contestant, way: str) -> dict[str, Any]:
        rounds = [each["seconds"] for each in one.offline[way] if each]
        totals = [sum(each.values()) for each in rounds]
        first = next(each for each in self.contestants if any(each.offline.get(way, ())))
        ratios = [
            sum(mine["seconds"].values()) / sum(theirs["seconds"].values())
            for mine, theirs in zip(one.offline[way], first.offline[way], strict=False)
            if mine and theirs
        ]
        asked = len(one.answers)
        return {
            "rounds": rounds,
            "seconds": statistics.median(totals),
            "questions_per_second": asked / statistics.median(totals),
            "lowest": asked / max(totals),
            "highest": asked / min(totals),
            "stages": {
                stage: statistics.median(each[stage] for each in rounds) for stage in STAGES
            },
            "slower_than_first": statistics.median(ratios) if ratios else None,
        }

    def latencies(self, one: Contestant) -> dict[str, Any] | None:
        """Of the scenario `single`, in seconds; `stages` are of a question on average."""
        every = [seconds for each in one.single if each for seconds in each["latencies"]]
        if not every:
            return None
        stages = {
            stage: sum(each["stages"][stage] for each in one.single if each) / len(every)
            for stage in STAGES
        }
        return {"queries": len(every), **percentiles(every), "stages": stages, "latencies": every}

    def server(self, one: Contestant) -> dict[str, Any] | None:
        """The highest rate that kept the bound, and all that were tried."""
        if not one.server:
            return None
        trials = [
            {"rate": each["rate"], "queries": len(each["latencies"]),
             "stages": each["stages"], **percentiles(each["latencies"])}
            for each in one.server
        ]  # fmt: skip
        kept = [each["rate"] for each in trials if each["p99"] <= self.config.latency_bound]
        return {"bound": self.config.latency_bound, "rate": max(kept, default=0.0),
                "trials": sorted(trials, key=lambda each: each["rate"])}  # fmt: skip

    def groups(self, there: Sequence[Contestant]) -> dict[str, list[dict[str, Any]]]:
        """EM and F1 of each backend by the kind of question, and by lengths."""
        scored = {one.name: self.scored(one) for one in there}
        found: dict[str, list[dict[str, Any]]] = {}
        for title, group_of, order in GROUPS:
            labels = np.array([group_of(question) for question in self.questions])
            found[title] = [
                {
                    "group": label,
                    "questions": int((labels == label).sum()),
                    "scores": {
                        name: {
                            "exact_match": 100 * float(one.exact_matches[labels == label].mean()),
                            "f1": 100 * float(one.f1s[labels == label].mean()),
                        }
                        for name, one in scored.items()
                    },
                }
                for label in order
                if (labels == label).any()
            ]
        return found

    def disagreements(self, there: Sequence[Contestant]) -> list[dict[str, Any]]:
        """The questions that not all answer alike, with what each says."""
        found = []
        for question in self.questions:
            right = self.reference.answers.get(question.id)
            texts = {one.name: one.answers.get(question.id) for one in there}
            if any(text != right for text in texts.values()):
                found.append(
                    {
                        "id": question.id,
                        "question": question.question,
                        "context": question.context,
                        "right": list(question.answers),
                        "reference": right,
                        "answers": texts,
                    }
                )
        return found


def differences(a: Contestant, b: Contestant) -> dict[str, float]:
    """Largest and mean of the differences of two backends' logits."""
    if a.logits.shape != b.logits.shape:
        return {"largest": math.inf, "mean": math.inf}
    apart = np.abs(a.logits.astype(np.float64) - b.logits)
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def difference_interval(own: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The mean difference of paired scores in percent, with its 95 % bootstrap interval."""
    apart = 100.0 * (own.astype(np.float64) - theirs)
    values, counts = np.unique(apart, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(apart), counts / len(apart), RESAMPLES)
    low, high = np.percentile(drawn @ values / len(apart), (2.5, 97.5))
    return {"difference": float(apart.mean()), "difference_interval": (float(low), float(high))}


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinite numbers: None in their place."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many percent are not above."""
    return float(np.percentile(values, share, method="higher"))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": percentile(values, share) for share in (50, 90, 99)}


def question_word(question: squad.SquadExample) -> str:
    """Its question word."""
    words = question.question.lower().split()
    return next((word for word in words if word in QUESTION_WORDS), "other")


def answer_length(question: squad.SquadExample) -> str:
    words = min((len(answer.split()) for answer in question.answers), default=0)
    return next(label for end, label in ANSWER_LENGTHS if words <= end)


def context_length(question: squad.SquadExample) -> str:
    words = len(question.context.split())
    return next(label for end, label in CONTEXT_LENGTHS if words <= end)


QUESTION_WORDS = ("what", "who", "when", "where", "which", "how", "why")
ANSWER_LENGTHS = (
    (0, "none"), (1, "1 word"), (2, "2 words"), (4, "3 or 4 words"), (9, "5 to 9 words"),
    (math.inf, "10 words or more"),
)  # fmt: skip
CONTEXT_LENGTHS = (
    (99, "up to 99 words"), (149, "100 to 149 words"), (199, "150 to 199 words"),
    (299, "200 to 299 words"), (math.inf, "300 words or more"),
)  # fmt: skip
GROUPS: tuple[tuple[str, Callable[[squad.SquadExample], str], Sequence[str]], ...] = (
    ("question word", question_word, (*QUESTION_WORDS, "other")),
    ("shortest right answer", answer_length, [label for _, label in ANSWER_LENGTHS]),
    ("length of the context", context_length, [label for _, label in CONTEXT_LENGTHS]),
)


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


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[sys.argv.index("--worker") + 1])))
