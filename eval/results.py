"""What comes of a comparison: parity, scores and speeds of each backend, and a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import carbon

from . import squad
from .config import BenchConfig, CompareConfig
from .groups import GROUPINGS, Grouping
from .questions import SquadExample
from .runner import STAGES, Job
from .worker import Worker

CLOSE = 1e-3  # logits of float32 backends; rounding makes 1e-5
ALIKE = 0.999  # share of answers that are the reference's, in float32
WORTH = 0.99  # F1 of any dtype, of the reference's, unless chance explains it
# Share of answers in timed runs that may not be those of the accuracy run, by whether it is
# float32: scales of dynamic quantization depend on what else is in the batch.
STRAY = {True: 1 - ALIKE, False: 0.05}
FASTER = 1.5  # asking one thing again, to asking different ones: from here on it was not computed
AUDITS = 3  # how often it has to be so


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
      starts: with empty and with full caches.
      step: see `Backend.step`.
      audit: see `Runner.audit`.
      sweep: by batch size and length, tokens a second.
      usage: see `Runner.usage`.
      energy: of each way the records of the rounds, see `flaxqa.carbon`; none if not measured.
    """

    job: Job
    worker: Worker
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    logits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0)))
    offline: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    single: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    server: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    starts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] = dataclasses.field(default_factory=dict)
    audit: dict[str, float] = dataclasses.field(default_factory=dict)
    sweep: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    energy: dict[str, list[carbon.Record]] = dataclasses.field(default_factory=dict)

    def take_accuracy(self, path: Path) -> None:
        """Runs everything once; what later runs answer has to be the same."""
        if told := self.worker.ask("accuracy", str(path)):
            self.answers = told["answers"]
            with np.load(path) as arrays:
                self.logits = np.stack([arrays["start"], arrays["end"]])

    @property
    def name(self) -> str:
        return self.job.name


@dataclasses.dataclass
class Results:
    """What comes of the measurements, at any time while they go on."""

    questions: Sequence[SquadExample]
    v2: bool
    reference: Contestant
    contestants: Sequence[Contestant]
    config: CompareConfig | BenchConfig
    about: Mapping[str, Any]
    groupings: Sequence[Grouping] = GROUPINGS
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
            failed = getattr(one.worker, "failed", False)
            return row | {"absent": one.worker.absent, "failed": failed}
        reasons = self.reasons(one)
        return row | {
            "verdict": "INVALID" if reasons else "VALID",
            "reasons": reasons,
            "load_seconds": ready["load_seconds"],
            "first_call_seconds": ready["first_call_seconds"],
            "device": ready["device"],
            "peak_memory_bytes": one.usage.get("peak_memory_bytes"),
            "device_memory_bytes": one.usage.get("device_memory_bytes"),
            "about": one.usage.get("about", {}),
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
            "starts": one.starts,
            "step": self.step(one),
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
        for name, mean in own.means.items():
            apart = squad.difference_interval(own.values[name], theirs.values[name])
            found[name] = {"value": mean, "interval": intervals[name], **apart}
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
        """The speed of one way; ratios are to the first backend of its dtype, round by round."""
        rounds = [each for each in one.offline[way] if each]
        totals = [each["total"] for each in rounds]
        stages = {
            stage: statistics.median(each["seconds"][stage] for each in rounds) for stage in STAGES
        }
        pairs = self.pairs(one, way)
        ratios = [mine["total"] / theirs["total"] for mine, theirs in pairs]
        compute_ratios = [mine["seconds"]["compute"] / theirs["seconds"]["compute"]
                          for mine, theirs in pairs]  # fmt: skip
        asked, seconds = len(one.answers), statistics.median(totals)
        # Streamed, the devices work while the host does: what counts is everything.
        busy = seconds if way == "streamed" else stages["compute"]
        return {
            "rounds": [each["seconds"] for each in rounds],
            "totals": totals,
            "seconds": seconds,
            "questions_per_second": asked / seconds,
            "lowest": asked / max(totals),
            "highest": asked / min(totals),
            "stages": stages,
            "host_share": 1 - stages["compute"] / seconds if way != "streamed" else None,
            **self.useful(one, self.about["useful_flops"] / busy),
            **self.energy(one, way),
            "slower_than_first": statistics.median(ratios) if ratios else None,
            "compute_slower_than_first": statistics.median(compute_ratios) if ratios else None,
        }

    def energy(self, one: Contestant, way: str) -> dict[str, Any]:
        """What the machine took while the rounds of one way ran; nothing if not measured."""
        if not one.energy.get(way):
            return {}
        whole = carbon.add(*one.energy[way])
        return carbon.per_1000(whole, whole["questions"])

    def pairs(self, one: Contestant, way: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Rounds of a backend and, side by side, of the first one of its dtype on its device."""
        alike = (each for each in self.contestants if each.job.dtype == one.job.dtype)
        first = next(each for each in alike if any(each.offline.get(way, ())))
        if one.worker.ready["device"] != first.worker.ready["device"]:
            return []
        both = zip(one.offline[way], first.offline[way], strict=False)
        return [(mine, theirs) for mine, theirs in both if mine and theirs]

    def useful(self, one: Contestant, rate: float) -> dict[str, Any]:
        """A rate of useful FLOP/s, and its share of that of a large product there."""
        products = self.about["product_flops_per_second"].get(one.job.dtype)
        same_place = one.worker.ready["device"] == self.about["device_name"]
        share = rate / products if products and same_place else None
        return {"useful_flops_per_second": rate, "share_of_products": share}

    def step(self, one: Contestant) -> dict[str, Any] | None:
        """The largest batch alone; None of a backend that has none."""
        if not one.step:
            return None
        n_devices = one.usage.get("about", {}).get("devices", 1)
        return one.step | self.useful(
            one, one.step["useful_flops"] / one.step["seconds"] / n_devices
        )

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
        for grouping in self.groupings:
            found[grouping.title] = [
                {
                    "group": label,
                    "questions": int(chosen.sum()),
                    "scores": {
                        name: {metric: one.mean(metric, chosen) for metric in one.values}
                        for name, one in scored.items()
                    },
                }
                for label, chosen in grouping.masks(self.questions).items()
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
