"""Energy and CO2e of a run, by codecarbon and without the network; docs/carbon.md says what counts.

A `Meter` measures what runs inside it. What it gives is a record, a dict:

    kwh, kwh_cpu, kwh_gpu, kwh_ram    energy of the machine
    g_co2e, grid_g_per_kwh            grams; those of a kWh of its electricity
    country, source                   whose average that is; where it is from
    measured_by                       of cpu, gpu and ram how: a counter's name, or an estimate's
    tracking                          "machine": all that the machine took, by whomever
    seconds, hosts, questions         for how long, on how many machines, how much was done
    codecarbon                        its version

The record of one meter says besides which machine it was on, which GPUs it saw, and from when to
when (`host`, `gpus`, `began`, `ended`), so that `add` counts a machine once while several meters
ran there. Light to import.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxqa.config import CarbonOptions
from flaxqa.errors import UsageError

Record = dict[str, Any]
PARTS = ("cpu", "gpu", "ram")
TRACKING = "machine"  # counters of processors and GPUs know no processes
INTERVAL = 5.0  # seconds between two readings: what a kill loses at most
BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
COUNTERS = {
    "intel_rapl": "RAPL", "windows_emi": "Windows EMI", "intel_power_gadget": "Power Gadget",
    "AppleSiliconChip": "powermetrics", "Raspberry": "vcgencmd",
    "NvidiaGPUDevice": "NVML", "AMDGPUDevice": "AMD SMI",
}  # fmt: skip
log = logging.getLogger("codecarbon")


class Meter:
    """Measures the machine from entering to `stop` or leaving; if not asked to, it does nothing.

    Attributes:
      session: names this measurement among those of a run.
      questions: that were done so far; see `count`.
    """

    def __init__(self, options: CarbonOptions):
        self.options, self.session, self.questions = options, uuid.uuid4().hex[:12], 0
        self.tracker: Any = None
        self.latest: Record | None = None
        self.silence = contextlib.ExitStack()

    def __enter__(self) -> Meter:
        """Starts.

        Raises:
          UsageError: codecarbon is not installed, has no factor for the country, or cannot start.
        """
        if self.options.carbon:
            if importlib.util.find_spec("codecarbon") is None:
                raise UsageError("--carbon needs codecarbon: pip install 'flaxqa[carbon]'")
            with contextlib.ExitStack() as silence:
                told = silence.enter_context(quiet())
                self.grid, self.source = factor(self.options)
                self.tracker = tracker_of(self.grid, Handler(self.take))
                self.tracker.start()
                if self.latest is None:  # codecarbon tells of its errors in its log alone
                    reason = " ".join(told) or "it gives no reason"
                    raise UsageError(f"--carbon: codecarbon cannot start here: {reason}")
                self.silence = silence.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def covers(self, platform: str) -> None:
        """Refuses to measure what computes on devices that codecarbon does not see, as TPUs.

        Args:
          platform: of the devices, as JAX calls it.

        Raises:
          UsageError: their energy would be missing.
        """
        if self.latest and platform != "cpu" and self.latest["measured_by"]["gpu"] is None:
            raise UsageError(
                f"--carbon: the run computes on {platform.upper()}s, whose energy codecarbon does "
                "not see here, and which would be most of it; leave --carbon out"
            )

    def count(self, questions: int) -> None:
        """So many more questions were done."""
        self.questions += questions

    def reading(self) -> Record | None:
        """The record as of some seconds ago at most, energy and questions; None if not measured."""
        return self.latest

    def stop(self) -> Record | None:
        """Ends the measurement; the record of all of it, None if there is none."""
        if self.tracker is not None:
            with self.silence:
                self.tracker.stop()
            self.tracker = None
        return self.latest

    def take(self, total: Any) -> None:
        """Makes a record of what codecarbon has measured so far, its `EmissionsData`."""
        self.latest = {
            "kwh": total.energy_consumed,
            **{f"kwh_{part}": getattr(total, f"{part}_energy") for part in PARTS},
            "g_co2e": total.energy_consumed * self.grid,
            "grid_g_per_kwh": self.grid,
            "country": self.options.country,
            "source": self.source,
            "measured_by": measured_by(self.tracker),
            "tracking": total.tracking_mode,
            "seconds": total.duration,
            "hosts": 1,
            "questions": self.questions,
            "codecarbon": importlib.metadata.version("codecarbon"),
            "host": this_host(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES")
                    or "all",
            "began": time.time() - total.duration,
            "ended": time.time(),
        }  # fmt: skip


class Handler:
    """Takes what codecarbon gives to its outputs: after each reading, and when it stops."""

    def __init__(self, take: Callable[[Any], None]):
        self.take = take

    def live_out(self, total: Any, delta: Any) -> None:
        self.take(total)

    out = live_out

    def task_out(self, data: Any, name: str) -> None:
        """Nobody asks for tasks."""

    def exit(self) -> None:
        """There is nothing to let go of."""


def tracker_of(grid: float, handler: Handler) -> Any:
    """One of codecarbon's trackers, which can be started once.

    Everything that would send, write or choose another factor is set, so that codecarbon's own
    configuration cannot; what that says of the machine (`force_cpu_power`, `gpu_ids`) counts.
    """
    import codecarbon

    return codecarbon.OfflineEmissionsTracker(
        force_carbon_intensity_g_co2e_kwh=grid,  # then nothing is looked up, here or elsewhere
        country_iso_code=None, country_2letter_iso_code=None, region=None, cloud_provider=None,
        cloud_region=None, electricitymaps_api_token=None, emissions_endpoint=None,
        output_methods=[], output_handlers=[handler], output_dir=tempfile.gettempdir(),
        measure_power_secs=INTERVAL, api_call_interval=1, tracking_mode=TRACKING,
        allow_multiple_runs=True,  # or it takes a lock, and the signals of the process
        pue=1.0, wue=0.0, log_level=log.level,
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keeps what codecarbon logs off the terminal; gives the exceptions that it tells there."""
    told: list[str] = []

    def taken(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            told.append(f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}")
        return False

    log.addFilter(taken)
    try:
        yield told
    finally:
        log.removeFilter(taken)


def factor(options: CarbonOptions) -> tuple[float, str]:
    """Grams of CO2e for a kWh, and where that is from.

    Raises:
      UsageError: codecarbon has none for the country; it would go on with another one.
    """
    if options.grid is not None:
        return float(options.grid), "given by --grid"
    from codecarbon.input import DataSource

    mixes, country = DataSource().get_global_energy_mix_data(), options.country
    table = f"codecarbon {importlib.metadata.version('codecarbon')}"
    way_out = "give --grid, the g CO2e of a kWh, in its place"
    if country not in mixes:
        raise UsageError(
            f"country is {country!r}, which {table} does not have: codes are those of ISO 3166-1 "
            f"with three letters (FRA, DEU, USA); where yours is right, {way_out}"
        )
    mix = mixes[country]
    if not (mix.get("carbon_intensity") or 0) > 0:
        raise UsageError(
            f"country is {country!r}, {mix['country_name']}, for which {table} has no factor; "
            f"{way_out}"
        )
    average = f"{table}, average of {mix['country_name']} in {mix['year']}"
    return float(mix["carbon_intensity"]), average


def measured_by(tracker: Any) -> dict[str, str | None]:
    """How codecarbon measures each part; None where it sees none.

    It has no public name for this: `_hardware` has an object for each part.
    """
    found: dict[str, str | None] = dict.fromkeys(PARTS)
    for one in getattr(tracker, "_hardware", ()):
        kind = type(one).__name__
        if kind == "GPU":
            devices = {type(each).__name__ for each in one.devices.devices}
            found["gpu"] = "; ".join(sorted(COUNTERS.get(name, name) for name in devices)) or None
        elif kind == "RAM":
            given = one._force_ram_power
            found["ram"] = ("estimate: watts by the size of the memory" if given is None
                            else f"estimate: {given:g} W, as codecarbon was told")  # fmt: skip
        elif kind == "CPU":
            found["cpu"] = COUNTERS.get(one._mode) or estimated(one, tracker)
        else:  # a chip that tells of itself
            found[getattr(one, "chip_part", "cpu").lower()] = COUNTERS.get(kind, kind)
    return found


def estimated(cpu: Any, tracker: Any) -> str:
    """What the power of a processor without a counter was taken from."""
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE
    from codecarbon.external.hardware import POWER_CONSTANT

    threads = tracker._conf.get("cpu_count") or 0
    sockets = tracker._conf.get("cpu_physical_count") or 1
    guesses = {DEFAULT_POWER_PER_CORE * threads * sockets: f"{DEFAULT_POWER_PER_CORE} W a thread",
               POWER_CONSTANT: "what it takes for any processor"}  # fmt: skip
    if tracker._force_cpu_power is not None:
        origin = "as codecarbon was told"
    elif (guess := guesses.get(cpu._tdp)) is not None:
        origin = f"a guess, {guess}"
    else:
        origin = "the processor's TDP"
    by = "by the load of the machine up to" if cpu._mode == "cpu_load" else "half of"
    return f"estimate: {by} {cpu._tdp:g} W, {origin}"


def this_host() -> str:
    """Tells machines apart without naming them."""
    try:
        name = BOOT.read_text()
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.strip().encode()).hexdigest()[:12]


# --- sums ---


def add(*records: Record) -> Record:
    """The record of several, at least one: of resumptions, of processes, of hosts.

    While several meters ran on one machine each measured all of it. Of such records the sum is
    taken times the share of their seconds that is left when each moment counts once; of the GPUs
    only if they saw the same ones.
    """

    def machine(place: int) -> Hashable:
        return records[place].get("host") or place

    def gpus(place: int) -> Hashable:
        return machine(place), records[place].get("gpus")

    shares = {"cpu": once(records, machine), "gpu": once(records, gpus)}
    shares["ram"] = shares["cpu"]
    energy = [{part: one[f"kwh_{part}"] * shares[part][place] for part in PARTS}
              for place, one in enumerate(records)]  # fmt: skip
    kwh = sum(sum(one.values()) for one in energy)
    grids = {one["grid_g_per_kwh"] for one in records}
    grams = sum(sum(parts.values()) * one["grid_g_per_kwh"]
                for parts, one in zip(energy, records, strict=True))  # fmt: skip

    def every(name: str) -> str | None:
        return union([one[name] for one in records])

    return {
        "kwh": kwh,
        **{f"kwh_{part}": sum(one[part] for one in energy) for part in PARTS},
        "g_co2e": grams,
        "grid_g_per_kwh": grids.pop() if len(grids) == 1 or not kwh else grams / kwh,
        "country": every("country"),
        "source": every("source"),
        "measured_by": {part: union([one["measured_by"][part] for one in records])
                        for part in PARTS},
        "tracking": every("tracking"),
        "seconds": sum(one["seconds"] * share for one, share in
                       zip(records, shares["cpu"], strict=True)),
        "hosts": sum({machine(place): one["hosts"] for place, one in enumerate(records)}.values()),
        "questions": sum(one["questions"] for one in records),
        "codecarbon": every("codecarbon"),
    }  # fmt: skip


def once(records: Sequence[Record], group: Callable[[int], Hashable]) -> list[float]:
    """Of each record the share of the time of its group that counts, each moment once."""
    times: dict[Hashable, list[tuple[float, float]]] = collections.defaultdict(list)
    for place, one in enumerate(records):
        if "host" in one:
            times[group(place)].append((one["began"], one["ended"]))
    shares = {}
    for name, spans in times.items():
        covered, reached = 0.0, -float("inf")
        for began, ended in sorted(spans):
            covered += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        measured = sum(ended - began for began, ended in spans)
        shares[name] = covered / measured if measured > 0 else 1.0
    return [shares.get(group(place), 1.0) for place in range(len(records))]


def union(values: Sequence[str | None]) -> str | None:
    """What several say, each once."""
    pieces = [piece for value in values if value for piece in value.split("; ")]
    return "; ".join(dict.fromkeys(pieces)) or None


def per_1000(record: Record, questions: int) -> dict[str, float | None]:
    """Energy and CO2e for a thousand of so many questions; None of none."""
    return {f"{name}_per_1000_questions": 1_000 * record[name] / questions if questions else None
            for name in ("kwh", "g_co2e")}  # fmt: skip


def result(records: Sequence[Record], questions: int) -> Record:
    """What is told of a run of so many questions: `of_questions`; it may be that not all of them
    were measured, `questions`, by which the numbers for a thousand are."""
    whole = add(*records)
    return {**whole, "of_questions": questions, **per_1000(whole, whole["questions"])}


def told(record: Record) -> str:
    """One line for a terminal or a page."""
    by = record["measured_by"]
    how = ", ".join(f"{part.upper()} by {by[part]}" if not by[part].startswith("estimate")
                    else f"{part.upper()} estimated" for part in PARTS if by[part])  # fmt: skip
    line = (
        f"energy {1_000 * record['kwh']:,.3g} Wh ({how}; the whole machine), "
        f"{record['g_co2e']:,.3g} g CO2e at {record['grid_g_per_kwh']:,.4g} g/kWh"
    )
    if (each := record.get("kwh_per_1000_questions")) is not None:
        line += f"; {1_000 * each:,.3g} Wh for 1,000 questions"
    if record.get("questions", 0) < (every := record.get("of_questions", 0)):
        line += f"; measured on {record['questions']:,} of {every:,} questions"
    return line


CELLS = ("Wh/1,000", "g CO2e/1,000", "energy is")


def cells(record: Record | None) -> tuple[str, ...]:
    """What a table says of a run, below `CELLS`."""
    if record is None or record["kwh_per_1000_questions"] is None:
        return ("\u2013",) * len(CELLS)
    guessed = any((by or "").startswith("estimate") for by in record["measured_by"].values())
    return (f"{1_000 * record['kwh_per_1000_questions']:,.3g}",
            f"{record['g_co2e_per_1000_questions']:,.3g}",
            "partly estimated" if guessed else "measured")  # fmt: skip
