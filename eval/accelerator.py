"""How fast flaxqa is on this machine's accelerator, recorded: `make bench-gpu`.

For each dtype, in processes of their own: from an empty compilation cache and once more from the
full one, what compiling takes; then in interleaved rounds the whole way from raw text to answers
and the predictor on windows that are there already; the largest batch again and again, against the
rate of a large product; EM and F1. Then `flaxqa compare` beside torch and torch.compile, offline.
The file is written after each part, so that an interrupted run leaves what it has measured.

Runs on a CPU, too, where it takes hours with a whole data set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval import backends, environment, squad, worker
from eval.config import CompareConfig
from eval.worker import Worker
from flaxqa import files
from flaxqa.errors import FlaxqaError
from flaxqa.progress import Progress, TerminalProgress

DTYPES = ("bfloat16", "float32")
BESIDE = ("jax", "jax-pmap", "torch", "torch.compile")
STEPS = 20  # of the largest batch


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
      model: directory of the checkpoint.
      data: a SQuAD file.
      dtype: of weights and operands.
      limit: only the first so many questions.
      rounds: timed runs of everything; 0 for the first run alone.
    """

    model: str
    data: str
    dtype: str
    limit: int | None
    rounds: int


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function gave."""
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


def measured(job: Job) -> dict[str, Any]:
    """All that one process finds out, in seconds, FLOP/s, bytes and percent."""
    from flaxqa import reader

    questions, v2 = squad.read(job.data)
    questions = questions[: job.limit]
    load_seconds, loaded = timed(lambda: reader.load(job.model, dtype=job.dtype))
    predictor = loaded.predictor

    def answer() -> dict[str, str]:
        found = loaded.answers(questions)
        return {one.record.id: one[0].text if one else "" for one in found}

    first_seconds, answers = timed(answer)
    told: dict[str, Any] = {
        "load_seconds": load_seconds,
        "first_seconds": first_seconds,
        "compile_seconds": predictor.compile_seconds,
        "shapes": [shape._asdict() for shape in predictor.shapes],
        **predictor.computed_by,
        "device": predictor.devices[0].device_kind,
        "devices": len(predictor.devices),
    }
    if not job.rounds:
        return told
    windows = loaded.windows_of(questions)
    predictor.predict(windows)
    rounds = [(timed(answer)[0], timed(lambda: predictor.predict(windows))[0])
              for _ in range(job.rounds)]  # fmt: skip
    scores = squad.score(questions, answers, v2=v2)
    return told | {
        "questions": len(questions),
        "windows": len(windows),
        "tokens": int(windows.lengths.sum()),
        "answers_seconds": [answers for answers, _ in rounds],
        "predictor_seconds": [predict for _, predict in rounds],
        "step": step(predictor, windows, job.dtype),
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "device_memory_bytes": backends.jax_device_memory(),
    }


def step(predictor: Any, windows: Any, dtype: str) -> dict[str, Any]:
    """The largest batch again and again, nothing else between: what of the device is used."""
    import jax

    from flaxqa.features import Windows

    together = Windows.of(windows)
    lengths = together.lengths
    batch = max(predictor.plan(lengths.tolist()), key=lambda one: one.shape.tokens)
    rows = jax.device_put(predictor.inputs(batch, together)[0])
    run = predictor.compiled[batch.shape]
    jax.block_until_ready(run(rows))
    seconds, _ = timed(lambda: jax.block_until_ready([run(rows) for _ in range(STEPS)]))
    chosen = [index for row in batch.rows for index in row]
    useful = backends.useful_flops(predictor.config, lengths[chosen])
    rate = useful * STEPS / seconds / len(predictor.devices)
    products = backends.product_rate(dtype)
    return {
        **batch.shape._asdict(),
        "seconds": seconds / STEPS,
        "useful_flops_per_second": rate,
        "product_flops_per_second": products,
        "share_of_products": rate / products,
    }


def serve(job: Job) -> None:
    """Measures, as a worker."""
    worker.serve(lambda: (measured(job), lambda: {}))


def in_a_process(job: Job, cache: Path, log: Path) -> dict[str, Any]:
    """What a process of its own measures; {"absent": why} where it fails."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    one = Worker("eval.accelerator", dataclasses.asdict(job), variables=variables, log=log)
    with contextlib.closing(one):
        return one.ready


def parts(args: argparse.Namespace, folder: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    """What is measured, a part after the other."""
    from eval import compare

    model = args.model
    if args.width is not None:
        from eval.widen import widened
        from flaxqa import checkpoint

        model = str(widened(checkpoint.load(model), args.width, folder / "model"))
    log = Path(args.output).with_suffix(".log")
    for dtype in args.dtypes:
        for start, rounds in (("cold", 0), ("cached", args.rounds)):
            progress.stage(f"{dtype}, {start}")
            job = Job(model, args.data, dtype, args.limit, rounds)
            yield {f"{dtype}, {start}": in_a_process(job, folder / dtype, log)}
        config = CompareConfig(
            model=model, data=args.data, output=str(folder / f"compare-{dtype}"), limit=args.limit,
            backends=tuple(f"{name}/{dtype}" for name in args.beside), rounds=args.rounds,
            scenarios=("offline",), sweep=False, min_seconds=1.0,
        )  # fmt: skip
        found = compare.compare(config, progress)
        yield {f"{dtype}, beside others": compare.compact(found)}


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = ["| | " + " | ".join(found["dtypes"]) + " |", "|---|" + "---|" * len(found["dtypes"])]

    def row(name: str, *, of: str, value: Callable[[dict[str, Any]], str]) -> None:
        cells = []
        for dtype in found["dtypes"]:
            part = found["parts"].get(f"{dtype}, {of}", {"absent": "not yet"})
            cells.append(part["absent"] if "absent" in part else value(part))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    def seconds(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda part: f"{statistics.median(part[key]):.2f} s"

    row("attention", of="cached", value=lambda part: str(part["attention"]))
    for start in ("cold", "cached"):
        row(f"compiling, {start}", of=start, value=lambda part: f"{part['compile_seconds']:.1f} s")
    row("shapes", of="cached", value=lambda part: str(len(part["shapes"])))
    row("raw text to answers", of="cached", value=seconds("answers_seconds"))
    row("predictor, ready windows", of="cached", value=seconds("predictor_seconds"))
    row("a step, useful TFLOP/s", of="cached",
        value=lambda part: f"{part['step']['useful_flops_per_second'] / 1e12:.2f}")  # fmt: skip
    row("of a large product's rate", of="cached",
        value=lambda part: f"{part['step']['share_of_products']:.0%}")  # fmt: skip
    row("EM / F1", of="cached", value=lambda part: f"{part['exact_match']:.2f} / {part['f1']:.2f}")
    for name in found["beside"]:
        for way in ("tuned", "shipped"):
            row(f"computing, {name}, {way}", of="beside others", value=beside(name, way))
    return "\n".join(lines) + "\n"


def beside(name: str, way: str) -> Callable[[dict[str, Any]], str]:
    """A cell of one backend: seconds, times flaxqa's, and why that does not count if so."""

    def value(part: dict[str, Any]) -> str:
        (one,) = (each for each in part["backends"] if each["backend"] == name)
        if "absent" in one or way not in one["offline"]:
            return str(one.get("absent", "ended"))
        run = one["offline"][way]
        ratio = run["compute_slower_than_first"]
        times = "on another device" if ratio is None else f"{ratio:.2f} x"
        return f"{run['stages']['compute']:.2f} s, {times}" + (
            "" if one["verdict"] == "VALID" else f" ({one['verdict']}: {one['reasons'][0]})"
        )

    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m eval.accelerator", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    made.add_argument("--model", default="configs/quickstart/checkpoint", help="checkpoint")
    made.add_argument("--data", default="configs/quickstart/heldout.json", help="a SQuAD file")
    made.add_argument("--width", type=int, help="repeat the checkpoint's channels to so many, which"
                      " changes no answer: 768 is DistilBERT-base's size")  # fmt: skip
    made.add_argument("--limit", type=int, help="only the first so many questions")
    made.add_argument("--rounds", type=int, default=3, help="interleaved runs of each")
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="in this order")
    made.add_argument("--beside", nargs="+", choices=backends.BACKENDS, default=BESIDE,
                      help="of the comparison; the first is what ratios are to")  # fmt: skip
    made.add_argument("--output", required=True, help="file for the numbers, JSON; what goes wrong "
                      "is in the .log beside it")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    found: dict[str, Any] = {
        "arguments": vars(args), "commit": environment.commit(), "machine": environment.machine(),
        "versions": environment.versions(("jax", "jaxlib", "flax", "torch", "transformers")),
        "dtypes": args.dtypes, "beside": args.beside, "parts": {},
    }  # fmt: skip
    path = Path(args.output)
    try:
        files.writable_directory(path.parent)
        with tempfile.TemporaryDirectory() as folder, TerminalProgress("questions") as progress:
            for part in parts(args, Path(folder), progress):
                found["parts"] |= part
                files.write_whole(path, json.dumps(found, indent=1).encode() + b"\n")
    except FlaxqaError as error:
        print(f"accelerator: {error}", file=sys.stderr)
        return 2
    print(table(found), end="")
    return 3 if any("absent" in part for part in found["parts"].values()) else 0


if __name__ == "__main__":
    if "--worker" in sys.argv:
        serve(Job(**json.loads(sys.argv[sys.argv.index("--worker") + 1])))
    else:
        sys.exit(main())
