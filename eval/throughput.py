"""How fast questions are answered, from raw text to decoded answers, beside other engines.

Every engine gets the same questions, the same weights and the same cores, and a process of its own.
Rounds are interleaved (A B C A B C ...), so that a machine that slows down slows all of them; what
counts are medians and ratios. Set-up (loading, compiling, a warm-up run of everything) is timed
apart. In each round the rate of the model's matrix products alone is measured, too, so that the
distance of the best engine from what the machine can do is a number.

Two ways of running each: `shipped`, as its documentation does it: windows in the order they come,
8 at a time, padded to 384; `tuned`: windows sorted by length, batches padded to their longest.
Windows and decoder are flaxqa's for all. flaxqa is timed with its reader as a user calls it, and
once more with nothing in the devices' place, which leaves the host's work.

`--steps` measures flaxqa alone, from the model as it is to all that makes it fast, step by step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import backends, environment, squad, worker
from eval.worker import Worker
from flaxqa import answers, features, files
from flaxqa.errors import UsageError
from flaxqa.features import Example
from flaxqa.plan import Shape

PACKAGES = ("flaxqa", "jax", "jaxlib", "torch", "transformers", "onnxruntime", "openvino", "numpy")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
      engine: a key of ENGINES or OURS, or "products" or "host".
      way: "shipped" or "tuned".
      dtype: of weights and operands.
      model: directory of the checkpoint.
      data: a SQuAD file.
      questions: how many of it, drawn with a fixed seed.
      step: what flaxqa gained with it, with `--steps`.
      environment: variables of its process.
    """

    engine: str
    way: str
    dtype: str
    model: str
    data: str
    questions: int
    step: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.way} {self.dtype}"


ENGINES = {  # by the names of `eval.backends`
    "torch": "torch",
    "torch.compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "flaxqa-model": "jax-model",
}
OURS: dict[str, dict[str, Any]] = {  # the options of each
    "flaxqa": {},
    "flaxqa-pmap": {"parallel": "pmap"},
    "flaxqa-xla": {"kernels": "xla"},
    "flaxqa-predictor": {},
    "flaxqa-predict": {},
}
DEFAULT_ENGINES = ("flaxqa", "flaxqa-pmap", "torch", "torch.compile", "onnxruntime", "openvino")
AS_USED = "as a user calls it"
STEPS: tuple[tuple[str, str, str, str, dict[str, str]], ...] = (
    ("the model, 8 windows at a time, padded to 384", "flaxqa-model", "shipped", "float32", {}),
    ("windows sorted by length", "flaxqa-model", "tuned", "float32", {}),
    # Any MALLOC_ variable makes the predictor leave the allocator as it is.
    ("ragged rows, stacked and fused weights", "flaxqa-xla", AS_USED, "float32",
     {"MALLOC_ARENA_TEST": "8"}),
    ("freed memory kept", "flaxqa-xla", AS_USED, "float32", {}),
    ("native kernels", "flaxqa", AS_USED, "float32", {}),
    ("bfloat16", "flaxqa", AS_USED, "bfloat16", {}),
)  # fmt: skip


def questions_of(job: Job) -> list[Example]:
    """So many of the data, drawn with a fixed seed; more than there are come again and again."""
    every = squad.read(Path(job.data)).questions
    whole, rest = divmod(job.questions, len(every))
    chosen = random.Random(0).sample(range(len(every)), rest)  # noqa: S311
    return [*whole * every, *(every[index] for index in sorted(chosen))]


def prepare(job: Job) -> Callable[[], list[str]]:
    """Loads the engine; the function answers all questions once and returns the answers."""
    examples = questions_of(job)
    if job.engine in OURS:
        from flaxqa import reader

        loaded = reader.load(job.model, dtype=job.dtype, **OURS[job.engine])
        records = [(example.question, example.context) for example in examples]
        return lambda: [found[0].text if found else "" for found in loaded.answers(records)]

    from flaxqa import checkpoint

    tokenizer = checkpoint.load(job.model).tokenizer
    folder = tempfile.mkdtemp()  # below that of the worker, with which it goes
    cpus = os.cpu_count() or 1
    engine = backends.load(ENGINES[job.engine], job.model, job.dtype, cpus, folder)

    def run() -> list[str]:
        windows = features.make(examples, tokenizer)
        logits = engine.run(windows, job.way)
        found = answers.decode_spans(examples, windows, logits)
        return [one[0].text if one else "" for one in found]

    return run


def products(dtype: str) -> float:
    """FLOP/s of the matrix products of a DistilBERT-base layer alone, the best of some sizes."""
    import jax
    import jax.numpy as jnp

    dim, hidden = 768, 3_072
    sizes = ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim))
    rng = np.random.default_rng(0)
    best = 0.0
    for rows in (1_024, 4_096):
        seconds = 0.0
        for inner, outer in sizes:
            a, b = (
                jnp.asarray(rng.normal(size=shape), dtype)
                for shape in ((rows, inner), (inner, outer))
            )
            product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
            product(a, b).block_until_ready()
            took = []
            for _ in range(5):
                began = time.perf_counter()
                product(a, b).block_until_ready()
                took.append(time.perf_counter() - began)
            seconds += statistics.median(took)
        flops = sum(2 * rows * inner * outer for inner, outer in sizes)
        best = max(best, flops / seconds)
    return best


def torch_products(dtype: str) -> float:
    """The same by torch."""
    import torch

    rows, dim, hidden = 4_096, 768, 3_072
    seconds, flops = 0.0, 0
    for inner, outer in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)):
        a = torch.randn(rows, inner).to(getattr(torch, dtype))
        b = torch.randn(outer, inner).to(getattr(torch, dtype))
        took = []
        for _ in range(6):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            took.append(time.perf_counter() - began)
        seconds += statistics.median(took)
        flops += 2 * rows * inner * outer
    return flops / seconds


def useful_flops(job: Job) -> dict[str, int]:
    """Multiplications and additions that the answers need, without padding; and the windows."""
    from flaxqa import checkpoint

    loaded = checkpoint.load(job.model)
    lengths = features.make(questions_of(job), loaded.tokenizer).lengths
    flops = backends.useful_flops(loaded.config, lengths)
    return {"windows": len(lengths), "tokens": int(lengths.sum()), "useful_flops": flops}


def prepare_predictor(job: Job) -> Callable[[], list[str]]:
    """The predictor alone on windows that are there already; it gives no answers."""
    from flaxqa import reader

    loaded = reader.load(job.model, dtype=job.dtype)
    windows = loaded.windows_of(questions_of(job))

    def run() -> list[str]:
        loaded.predictor.predict(windows)
        return []

    return run


def prepare_predict(job: Job) -> Callable[[], list[str]]:
    """`flaxqa predict` from a file to parts, without starting and loading."""
    from flaxqa import batch, reader
    from flaxqa.config import PredictConfig

    loaded = reader.load(job.model, dtype=job.dtype)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "records.jsonl"
    rows = (json.dumps(dataclasses.asdict(example)) for example in questions_of(job))
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def run() -> list[str]:
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory(dir=folder.name) as output:
            config = PredictConfig(input=(str(path),), output=output, model=job.model)
            batch.predict(config, reader=loaded)
            return [
                answer or ""
                for part in sorted(Path(output).glob("part-*"))
                for answer in pq.read_table(part)["answer"].to_pylist()
            ]

    return run


def prepare_host(job: Job) -> Callable[[], int]:
    """The reader with nothing in the devices' place; the function returns how many it answered."""
    from flaxqa import reader

    loaded = reader.load(job.model)
    predictor, rng = loaded.predictor, np.random.default_rng(0)

    def given(logits: np.ndarray) -> Any:
        return lambda rows: logits

    def compile_nothing(shapes: Iterable[Shape], *rules: Any) -> None:
        for shape in set(shapes) - predictor.compiled.keys():
            size = (len(predictor.devices), shape.tokens, 2)
            predictor.compiled[shape] = given(rng.normal(size=size).astype(np.float32))

    predictor.compile = compile_nothing  # type: ignore[method-assign]
    records = [(example.question, example.context) for example in questions_of(job)]
    return lambda: sum(len(found) for found in loaded.answers(records))


PREPARE: dict[str, Callable[[Job], Callable[[], Any]]] = {
    "host": prepare_host,
    "flaxqa-predictor": prepare_predictor,
    "flaxqa-predict": prepare_predict,
}


def serve(job: Job) -> None:
    """Does a job again and again, as a worker."""

    def start() -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
        began = time.perf_counter()
        if job.engine == "products":
            rate = products if job.way == "jax" else torch_products
            rate(job.dtype)
            return {"setup_seconds": time.perf_counter() - began}, lambda: {"rate": rate(job.dtype)}
        run = PREPARE.get(job.engine, prepare)(job)
        first = run()

        def again() -> dict[str, Any]:
            began = time.perf_counter()
            found = run()
            return {"seconds": time.perf_counter() - began, "same": found == first}

        return {"setup_seconds": time.perf_counter() - began, "answers": first}, again

    backend = ENGINES.get(job.engine)
    worker.serve(start, backends.BACKENDS[backend].needs if backend is not None else "")


class Measured:
    """A job in a process of its own, and what each of its rounds gave."""

    def __init__(self, job: Job):
        self.job = job
        self.worker = Worker("eval.throughput", vars(job), variables=job.environment)
        self.rounds: list[dict[str, Any]] = []

    def round(self) -> None:
        if told := self.worker.ask():
            self.rounds.append(told)

    @property
    def absent(self) -> str | None:
        """Why it has no times, or None."""
        return self.worker.absent


@contextlib.contextmanager
def workers(jobs: Sequence[Job], say: Callable[[str], None]) -> Iterator[list[Measured]]:
    """The jobs, ready; each that did not come up is told of."""
    started: list[Measured] = []
    try:
        for job in jobs:
            say(f"setting up {job.name}")
            started.append(Measured(job))
            if reason := started[-1].absent:
                say(f"{job.name} is left out: {reason}")
        yield started
    finally:
        for one in started:
            one.worker.close()


def base_checkpoint(like: str, directory: Path) -> None:
    """A checkpoint of the size of DistilBERT-base, random weights, with the tokenizer of another.

    Random weights compute as fast as trained ones.
    """
    import shutil

    from flax import nnx

    from flaxqa import DistilBertConfig, DistilBertForQuestionAnswering, checkpoint

    vocabulary = checkpoint.load(like).tokenizer.get_vocab_size()
    config = DistilBertConfig(
        vocab_size=vocabulary, max_position_embeddings=512, dim=768, n_heads=12, n_layers=6,
        hidden_dim=3_072,
    )  # fmt: skip
    DistilBertForQuestionAnswering(config, rngs=nnx.Rngs(0)).save_pretrained(directory)
    for file in Path(like).iterdir():
        if "token" in file.name or file.name.startswith("vocab"):
            shutil.copy(file, directory)


def jobs_of(args: argparse.Namespace, model: str) -> list[Job]:
    common = {"model": model, "data": args.data, "questions": args.questions}
    if args.steps:
        return [Job(engine, way, dtype, **common, step=step, environment=environment)
                for step, engine, way, dtype, environment in STEPS]  # fmt: skip
    jobs = []
    for name in args.engines:
        if name in OURS:
            jobs.append(Job(name, AS_USED, args.dtype, **common))
        elif name in ENGINES:
            dtypes = [d for d in backends.BACKENDS[ENGINES[name]].dtypes if d == args.dtype]
            if name == "onnxruntime" and args.dtype == "bfloat16":
                dtypes = ["int8"]  # what it has instead
            jobs += [Job(name, way, dtype, **common) for dtype in dtypes for way in args.ways
                     if (name, way) != ("torch.compile", "shipped")]  # fmt: skip
        else:
            raise UsageError(f"engine {name!r} is not one of {[*OURS, *ENGINES]}")
    return jobs


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs all jobs and returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.size == "base":
            model = folder
            base_checkpoint(args.model, Path(folder))
        jobs = jobs_of(args, model)
        common = (args.dtype, model, args.data, args.questions)
        others = [Job("products", "jax", *common), Job("products", "torch", *common)]
        others.append(Job("host", AS_USED, *common))
        counts = useful_flops(jobs[0])
        with workers([*jobs, *others], say) as started:
            for number in range(args.rounds):
                for each in started:
                    each.round()
                    if each.absent is None:
                        last = each.rounds[-1]
                        value = last.get("seconds") or last.get("rate", 0) / 1e9
                        say(f"round {number + 1} of {args.rounds}: {each.job.name} {value:.2f}")
            return report(args, counts, started)


def report(
    args: argparse.Namespace, counts: dict[str, int], started: Sequence[Measured]
) -> dict[str, Any]:
    """Everything that was measured, each number in the unit that its name says."""
    rates = [
        statistics.median(one["rate"] for one in each.rounds)
        for each in started
        if each.job.engine == "products" and each.absent is None
    ]
    ceiling = max(rates, default=float("nan"))
    by_name = {each.job.name: each for each in started if not each.absent}
    ours = by_name.get(f"flaxqa {AS_USED} {args.dtype}")
    host = by_name.get(f"host {AS_USED} {args.dtype}")
    rows = []
    for each in started:
        job = each.job
        if job.engine in ("products", "host"):
            continue
        row: dict[str, Any] = {"engine": job.engine, "way": job.way, "dtype": job.dtype}
        if job.step is not None:
            row["step"] = job.step
        if reason := each.absent:
            rows.append(row | {"absent": reason})
            continue
        seconds = [one["seconds"] for one in each.rounds]
        median = statistics.median(seconds)
        row |= {
            "seconds": seconds,
            "median_seconds": median,
            "questions_per_second": args.questions / median,
            "useful_gflops_per_second": counts["useful_flops"] / median / 1e9,
            "share_of_products": counts["useful_flops"] / median / ceiling
            if job.dtype in (args.dtype, "int8")
            else None,
            "setup_seconds": each.worker.ready["setup_seconds"],
            "same_answers_every_round": all(one["same"] for one in each.rounds),
        }
        if ours is not None:
            pairs = zip(each.rounds, ours.rounds, strict=True)
            row["flaxqa_is_faster_by"] = statistics.median(
                theirs["seconds"] / mine["seconds"] for theirs, mine in pairs
            )
            theirs, mine = each.worker.ready["answers"], ours.worker.ready["answers"]
            if theirs:  # the predictor alone gives none
                row["same_answers_as_flaxqa"] = sum(map(str.__eq__, theirs, mine)) / len(mine)
        rows.append(row)
    host_seconds, our_seconds = (
        statistics.median(one["seconds"] for one in each.rounds) if each else float("nan")
        for each in (host, ours)
    )
    host_share = host_seconds / our_seconds
    return {
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "size": args.size,
        "dtype": args.dtype,
        "data": Path(args.data).name,
        "data_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
        "questions": args.questions,
        **counts,
        "rounds": args.rounds,
        "products_gflops_per_second": ceiling / 1e9,
        "host_seconds": None if math.isnan(host_seconds) else host_seconds,
        "host_share": None if math.isnan(host_share) else host_share,
        "machine": environment.machine(),
        "versions": environment.versions(PACKAGES),
        "engines": rows,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['questions']:,} questions, {report['windows']:,} windows, "
        f"{report['tokens']:,} tokens; {report['size']} size, {report['dtype']}; medians of "
        f"{report['rounds']} rounds; matrix products alone "
        f"{report['products_gflops_per_second']:,.0f} GFLOP/s.",
    ]
    if report["host_share"] is not None:
        lines.append(
            f"The host's work alone: {report['questions'] / report['host_seconds']:,.0f} "
            "questions/s, "
            f"{report['host_share']:.1%} of flaxqa's time."
        )
    lines += [
        "",
        "| engine | how | dtype | questions/s | useful GFLOP/s | of the products' rate "
        "| flaxqa is faster by | set-up s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["engines"]:
        names = f"| {row['engine']} | {row.get('step', row['way'])} | {row['dtype']} "
        if "absent" in row:
            lines.append(f"{names}| left out: {row['absent'].splitlines()[0]} | | | | |")
            continue
        faster, share = row.get("flaxqa_is_faster_by"), row["share_of_products"]
        lines.append(
            f"{names}| {row['questions_per_second']:,.1f} "
            f"| {row['useful_gflops_per_second']:,.0f} "
            f"| {'' if share is None else f'{share:.0%}'} "
            f"| {'' if faster is None else f'{faster:.2f} x'} | {row['setup_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def waterfall(report: dict[str, Any], path: Path) -> None:
    """Draws what each step took off the time of the one before, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "flaxqa"  # the same numbers make the same file
    import matplotlib.pyplot as plt

    rows = [row for row in report["engines"] if "step" in row and "absent" not in row]
    figure, axes = plt.subplots(figsize=(8.5, 0.55 * len(rows) + 1.3), layout="constrained")
    before = None
    for place, row in enumerate(rows):
        seconds = row["median_seconds"]
        axes.barh(place, seconds, color="#1f6feb", height=0.62)
        if before is not None and before > seconds:
            axes.barh(place, before - seconds, left=seconds, color="#d0d7de", height=0.62)
        gain = "" if before is None else f", {before / seconds:.2f} x"
        label = f"{seconds:,.1f} s, {row['questions_per_second']:,.1f} questions/s{gain}"
        right = max(seconds, before or 0.0)
        axes.text(right + 0.01 * rows[0]["median_seconds"], place, label, va="center", fontsize=9)
        before = seconds
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(row["median_seconds"] for row in rows))
    axes.set_xlabel(
        f"seconds for {report['questions']:,} questions, {report['size']} size, "
        f"{report['machine']['processor']}, {report['machine']['cpus']} CPUs",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m eval.throughput", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    quickstart = "configs/quickstart"
    made.add_argument("--model", default=f"{quickstart}/checkpoint", help="checkpoint directory")
    made.add_argument("--data", default=f"{quickstart}/heldout.json", help="a SQuAD file")
    made.add_argument(
        "--size", choices=("base", "model"), default="base",
        help="base: random weights of DistilBERT-base's size; model: those of --model",
    )  # fmt: skip
    made.add_argument("--questions", type=int, default=100, help="how many, drawn at random")
    made.add_argument("--rounds", type=int, default=5, help="interleaved runs of each engine")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all")
    made.add_argument(
        "--engines", nargs="+", default=list(DEFAULT_ENGINES), metavar="NAME",
        help=f"of {', '.join([*OURS, *ENGINES])}",
    )  # fmt: skip
    made.add_argument(
        "--ways", nargs="+", choices=("shipped", "tuned"), default=["shipped", "tuned"],
        help="how the others are run",
    )  # fmt: skip
    made.add_argument(
        "--steps", action="store_true",
        help="measure flaxqa alone, step by step from its model to all that makes it fast",
    )  # fmt: skip
    made.add_argument("--plot", help="file for a picture of the steps, SVG; with --steps")
    made.add_argument("--output", help="file for everything measured, JSON")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main() -> int:
    args = parser().parse_args()
    if args.plot and not args.steps:
        print("throughput: --plot is a picture of --steps", file=sys.stderr)
        return 2
    if args.worker:
        serve(Job(**json.loads(args.worker)))
        return 0

    def say(text: str) -> None:
        print(f"throughput: {text}", file=sys.stderr, flush=True)

    try:
        found = measure(args, say)
    except (UsageError, ValueError, OSError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    if args.plot:
        waterfall(found, Path(args.plot))
    if args.output:
        files.write_named(args.output, json.dumps(found, indent=1).encode() + b"\n")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
