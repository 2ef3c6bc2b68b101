"""flaxqa's programs compiled for TPUs that are not here: what they take, before one is paid for.

libtpu, the compiler that a TPU host has, runs anywhere: it compiles the whole sharded program, its
kernels included, for a named set of chips. `make tpu` installs it beside the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxqa import attention, files, predict
from flaxqa.checkpoint import DistilBertForQuestionAnswering
from flaxqa.model import DistilBertConfig
from flaxqa.plan import Shape
from flaxqa.spans import Spans

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5e:4x4")
WINDOWS = 1_045  # of a chunk, for each chip
NAMED_BY = ("chips", "parallel", "dtype", "program", "tokens", "windows")
GROWTH = 1.05  # from here on memory has grown


def on_paper(weights: Any, sharding: NamedSharding, *axes: int) -> Any:
    """Weights without numbers, with axes before their own."""

    def one(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*axes, *array.shape), array.dtype, sharding=sharding)

    return jax.tree.map(one, weights)


class MeshOnPaper(predict.MeshJit):
    """`MeshJit` for devices that are not here."""

    def __init__(self, weights: Any, devices: Sequence[jax.Device]):
        self.mesh, self.options = predict.mesh_of(devices), {}
        self.weights = on_paper(weights, NamedSharding(self.mesh, P()))


class PmapOnPaper(predict.Pmap):
    """`Pmap` for devices that are not here."""

    def __init__(self, weights: Any, devices: Sequence[jax.Device]):
        self.devices, self.options = list(devices), {}
        sharding = NamedSharding(predict.mesh_of(devices), P("data"))
        self.weights = on_paper(weights, sharding, len(devices))


class PredictorOnPaper(predict.Predictor):
    """A predictor that compiles and never runs."""

    strategies: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "jit": MeshOnPaper,
        "pmap": PmapOnPaper,
    }

    def choose_attention(self, plain: bool) -> str:
        """The first that suits the devices, untried."""
        head = self.config.dim // self.config.n_heads
        kinds = list(attention.suitable(self.devices[0], head, str(self.dtype)))
        return kinds[-1 if plain else 0]


def devices_of(topology: str) -> list[jax.Device]:
    """The chips that a name such as "v5e:2x2" stands for.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks a cloud's metadata server
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(found.devices)


def base_model(dtype: str) -> DistilBertForQuestionAnswering:
    """A model of DistilBERT-base's size, random."""
    from flax import nnx

    config = DistilBertConfig(
        vocab_size=30_522, max_position_embeddings=512, dim=768, n_heads=12, n_layers=6,
        hidden_dim=3_072,
    )  # fmt: skip
    return DistilBertForQuestionAnswering(config, dtype=dtype, rngs=nnx.Rngs(0))


def shapes_of(predictor: predict.Predictor) -> list[Shape]:
    """Those of a long stream of windows as long as SQuAD's: 20 chunks, the last one short."""
    rng, shapes, chunk = np.random.default_rng(0), set[Shape](), WINDOWS * len(predictor.devices)
    for windows in (*[chunk] * 19, chunk // 2):
        lengths = rng.gamma(7, 25, windows).astype(int).clip(20, predictor.max_length)
        shapes |= {batch.shape for batch in predictor.plan(lengths.tolist())}
    return sorted(shapes)


def compiled(
    topologies: Sequence[str], dtype: str = "bfloat16", kernels: str = "auto"
) -> Iterator[dict[str, Any]]:
    """What each program of each set of chips takes, as soon as it is compiled."""
    model, rule = base_model(dtype), Spans(1, 30)
    for topology in topologies:
        devices = devices_of(topology)
        for parallel in PredictorOnPaper.strategies:
            predictor = PredictorOnPaper(model, devices=devices, parallel=parallel, kernels=kernels)
            for shape in shapes_of(predictor):
                row: dict[str, Any] = {"chips": topology, "devices": len(devices)}
                row |= {"parallel": parallel, "dtype": dtype, "attention": predictor.attention}
                row |= shape._asdict()
                yield row | {"program": "logits"} | taken(predictor.compile_shape, shape)
                yield row | {"program": "spans"} | taken(predictor.compile_search, shape, rule)


def taken(compile_one: Callable[..., Any], *of: Any) -> dict[str, Any]:
    """The seconds that compiling takes; what the program needs of each chip, by the compiler."""
    began = time.perf_counter()
    program = compile_one(*of).func  # without its weights
    seconds = time.perf_counter() - began
    memory, cost = program.memory_analysis(), program.cost_analysis()
    estimate = cost.get("optimal_seconds", -1.0)  # of XLA; now and then it is nonsense
    return {
        "compile_seconds": round(seconds, 1),
        "bytes_moved": int(cost["bytes accessed"]),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "estimated_seconds": estimate if 0 < estimate < 1 else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| chips | split by | program | tokens | attention | compiling | moves | temporaries "
        "| XLA's estimate without kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        estimate = row["estimated_seconds"]
        lines.append(
            f"| {row['chips']} | {row['parallel']} | {row['program']} | {row['tokens']:,} "
            f"| {row['attention']} | {row['compile_seconds']:.1f} s "
            f"| {row['bytes_moved'] / 1e9:.2f} GB | {row['temporary_bytes'] / 1e6:.0f} MB "
            f"| {'' if estimate is None else f'{estimate * 1e3:.1f} ms'} |"
        )
    return "\n".join(lines) + "\n"


def grown(rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]) -> list[str]:
    """What takes more than it took when the limits were recorded; programs that are new."""
    known = {tuple(row[key] for key in NAMED_BY): row for row in limits}
    problems = []
    for row in rows:
        name = tuple(row[key] for key in NAMED_BY)
        called = " ".join(map(str, name))
        if name not in known:
            problems.append(f"{called} is a program that was not there")
            continue
        problems += [
            f"{called}: {key} is {row[key]:,}, where it was {known[name][key]:,}"
            for key in ("temporary_bytes", "bytes_moved")
            if row[key] > GROWTH * known[name][key] + (1 << 20)
        ]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flaxqa.eval.aot", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("topologies", nargs="*", default=list(TOPOLOGIES), metavar="CHIPS",
                        help="sets of chips: v5e:2x2, v6e:2x2, v5p:2x2x1, ...")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the model")  # fmt: skip
    parser.add_argument("--kernels", choices=("auto", "xla"), default="auto",
                        help="xla: without splash attention")  # fmt: skip
    parser.add_argument("--output", help="file for the numbers, JSON")
    parser.add_argument(
        "--limits", help="such a file; exit code 5 where more is taken than it says"
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    try:
        for row in compiled(args.topologies, args.dtype, args.kernels):
            rows.append(row)
            print(f"aot: {table([row]).splitlines()[-1]}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        print(f"aot: {error}; `make tpu` installs libtpu", file=sys.stderr)
        return 2
    if args.output:
        content = {"versions": {"jax": jax.__version__}, "programs": rows}
        files.write_named(args.output, json.dumps(content, indent=1).encode() + b"\n")
    print(table(rows), end="")
    if args.limits:
        limits = json.loads(Path(args.limits).read_bytes())["programs"]
        for problem in (problems := grown(rows, limits)):
            print(f"aot: {problem}", file=sys.stderr)
        return 5 if problems else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
