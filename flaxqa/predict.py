"""The model on every device: few fixed shapes, compiled before their first batch, work in flight.

Windows are sorted by length and cut into batches, each padded to the next of LENGTHS; the last
batch is filled up with empty rows, so every batch has a shape that was compiled. Fewer windows than
a batch make a smaller one, so that one question does not wait for a whole batch. Rows are split
over the devices by one of two strategies with one interface: `jit` over a mesh with the single axis
`data`, or `pmap`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxqa.errors import UsageError
from flaxqa.features import Feature
from flaxqa.model import QuestionAnsweringModel

LENGTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
TOKENS_PER_BATCH = {"cpu": 4_096}  # of one device; larger batches leave the CPU's cache
TOKENS_PER_BATCH_ELSEWHERE = 65_536
BATCHES_IN_FLIGHT = 3
MATMUL_PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "default")

Run = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """The two scores of every token of a window: float32 [T] each (float64 of a float64 model)."""

    start: np.ndarray
    end: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Which windows run together: their indices, and the shape (B, T) they are padded to."""

    rows: tuple[int, ...]
    shape: tuple[int, int]


def inputs_of(model: QuestionAnsweringModel) -> tuple[str, ...]:
    """The arrays that the model's logits depend on, each int32 [B, T]."""
    types = ("token_type_ids",) if model.config.type_vocab_size else ()
    return ("input_ids", "attention_mask", *types)


def logits_of(graphdef: nnx.GraphDef) -> Callable[..., tuple[Any, Any]]:
    """The function of weights and of `inputs_of` the model that strategies split over devices."""

    def forward(state: nnx.State, *inputs: Any) -> tuple[Any, Any]:
        out = nnx.merge(graphdef, state).forward(*inputs)
        return out.start_logits, out.end_logits

    return forward


class MeshJit:
    """Rows split over a mesh with the single axis `data`, parameters copied along it."""

    def __init__(self, model: QuestionAnsweringModel, devices: Sequence[jax.Device]):
        graphdef, state = nnx.split(model)
        # `Auto`: XLA propagates the sharding. The default, `Explicit`, makes nnx.Embed raise.
        mesh: Mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
        )
        whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.state, self.inputs = jax.device_put(state, whole), inputs_of(model)

        # Rows do not communicate, and shard_map says so: left to itself, XLA gathers a batch that
        # the model walks through row by row.
        sharded = jax.shard_map(
            logits_of(graphdef),
            mesh=mesh,
            in_specs=(P(), *(P("data") for _ in self.inputs)),
            out_specs=P("data"),
        )
        self.jitted = jax.jit(
            sharded, in_shardings=(whole, *(rows for _ in self.inputs)), out_shardings=rows
        )

    def compile(self, shape: tuple[int, int]) -> Run:
        """A function of the inputs [B, T] to start and end logits [B, T]."""
        tokens = [jax.ShapeDtypeStruct(shape, np.int32) for _ in self.inputs]
        compiled = self.jitted.lower(self.state, *tokens).compile()
        return lambda *inputs: compiled(self.state, *inputs)


class Pmap:
    """Each device gets its own rows [devices, B / devices, T], by `jax.pmap`."""

    def __init__(self, model: QuestionAnsweringModel, devices: Sequence[jax.Device]):
        graphdef, state = nnx.split(model)
        self.devices = list(devices)
        # One copy a device, made once: a broadcast argument would be copied with every batch.
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=self.devices
        )
        stacked = jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (len(devices), *x.shape)), state
        )
        self.state, self.inputs = (
            jax.device_put(stacked, NamedSharding(mesh, P("data"))),
            inputs_of(model),
        )
        self.mapped = jax.pmap(logits_of(graphdef), devices=self.devices)

    def compile(self, shape: tuple[int, int]) -> Run:
        """A function of the inputs [B, T] to logits [devices, B / devices, T]."""
        split = (len(self.devices), shape[0] // len(self.devices), shape[1])
        tokens = [jax.ShapeDtypeStruct(split, np.int32) for _ in self.inputs]
        compiled = self.mapped.lower(self.state, *tokens).compile()
        return lambda *inputs: compiled(self.state, *(each.reshape(split) for each in inputs))


STRATEGIES: dict[str, Callable[..., MeshJit | Pmap]] = {"jit": MeshJit, "pmap": Pmap}


class Predictor:
    """Windows in, logits out, in the order they came; over all chosen devices.

    Attributes:
      shapes: the (B, T) compiled so far.
      compile_seconds: the time it took, or to read them from JAX's persistent cache.
      computed_tokens: tokens computed so far, padding included.
    """

    def __init__(
        self,
        model: QuestionAnsweringModel,
        *,
        max_length: int = 384,
        batch_size: int | None = None,
        parallel: str = "jit",
        devices: int | Sequence[jax.Device] | None = None,
        matmul_precision: str = "float32",
    ):
        """Puts the weights on the devices; compiles nothing yet.

        Args:
          model: its weights are copied to every device.
          max_length: tokens of the longest window that will come.
          batch_size: rows of a batch on all devices together, rounded up to a multiple of their
            number; None takes as many as fill TOKENS_PER_BATCH on each device.
          parallel: "jit" or "pmap", how rows are split over the devices.
          devices: how many of this process's devices to use, or which; None for all.
          matmul_precision: of float32 products. "float32" is what it says on every device, where
            JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU.

        Raises:
          UsageError: `max_length` is above the checkpoint's positions, or an option has no such
            value.
        """
        positions = model.config.max_position_embeddings
        if not 1 <= max_length <= positions:
            raise UsageError(
                f"max_length {max_length}, but the checkpoint has {positions} positions"
            )
        if parallel not in STRATEGIES:
            raise UsageError(f"parallel {parallel!r} is neither 'jit' nor 'pmap'")
        if matmul_precision not in MATMUL_PRECISIONS:
            raise UsageError(
                f"matmul_precision {matmul_precision!r} is not one of {MATMUL_PRECISIONS}"
            )
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is below 1")
        self.devices = local_devices(devices)
        self.lengths = [*(length for length in LENGTHS if length < max_length), max_length]
        self.batch_size, self.matmul_precision = batch_size, matmul_precision
        self.pad_token_id = model.config.pad_token_id
        self.inputs = inputs_of(model)
        self.strategy = STRATEGIES[parallel](model, self.devices)
        self.compiled: dict[tuple[int, int], Run] = {}
        self.compile_seconds, self.computed_tokens = 0.0, 0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return sorted(self.compiled)

    def rows(self, length: int, windows: int) -> int:
        """The rows of a batch whose rows have `length` tokens: a multiple of the devices.

        Args:
          length: what its rows are padded to.
          windows: how many there are in all; fewer than a batch get the next power of two rows on
            each device.
        """
        n = len(self.devices)
        if self.batch_size is not None:
            full = -(-self.batch_size // n)
        else:
            tokens = TOKENS_PER_BATCH.get(self.devices[0].platform, TOKENS_PER_BATCH_ELSEWHERE)
            full = max(1, tokens // length)
        few: int = 1 << (-(-windows // n) - 1).bit_length()
        return min(full, few) * n

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Every window in exactly one batch, longest first, few tokens of padding.

        Raises:
          ValueError: a window is longer than `max_length`.
        """
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        batches = []
        while order:
            longest = lengths[order[0]]
            if longest > self.lengths[-1]:
                raise ValueError(f"a window of {longest} tokens, above {self.lengths[-1]}")
            length = next(length for length in self.lengths if length >= longest)
            size = self.rows(length, len(lengths))
            batches.append(Batch(tuple(order[:size]), (size, length)))
            order = order[size:]
        return batches

    def compile(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Compiles the shapes that are new, several at a time."""
        new = sorted(set(shapes) - self.compiled.keys())
        if not new:
            return
        began = time.perf_counter()

        def compile_one(shape: tuple[int, int]) -> Run:
            with jax.default_matmul_precision(self.matmul_precision):
                return self.strategy.compile(shape)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            self.compiled.update(zip(new, pool.map(compile_one, new), strict=True))
        self.compile_seconds += time.perf_counter() - began

    def predict(
        self,
        features: Sequence[Feature],
        progress: Callable[[int], None] = lambda windows: None,
    ) -> list[Logits]:
        """The logits of every window, in the order of the windows.

        Args:
          features: none longer than `max_length`.
          progress: called with the number of windows done, batch by batch.
        """
        plan = self.plan([len(feature) for feature in features])
        self.compile([batch.shape for batch in plan])
        logits: list[Logits | None] = [None] * len(features)
        in_flight: collections.deque[tuple[Batch, tuple[jax.Array, jax.Array]]] = (
            collections.deque()
        )

        def collect() -> None:
            batch, arrays = in_flight.popleft()
            start, end = (np.asarray(array).reshape(batch.shape) for array in arrays)
            for row, index in enumerate(batch.rows):
                tokens = len(features[index])
                logits[index] = Logits(start[row, :tokens], end[row, :tokens])
            progress(len(batch.rows))

        for batch in plan:
            if len(in_flight) == BATCHES_IN_FLIGHT:
                collect()
            inputs = self.arrays(batch, features)
            in_flight.append((batch, self.compiled[batch.shape](*inputs)))
            self.computed_tokens += inputs[0].size
        while in_flight:
            collect()
        return logits  # type: ignore[return-value]  # the plan has every row

    def arrays(self, batch: Batch, features: Sequence[Feature]) -> tuple[np.ndarray, ...]:
        """The model's inputs, int32 [B, T] each; rows past the batch's own are empty."""
        ids = np.full(batch.shape, self.pad_token_id, np.int32)
        mask, types = np.zeros(batch.shape, np.int32), np.zeros(batch.shape, np.int32)
        for row, index in enumerate(batch.rows):
            feature = features[index]
            ids[row, : len(feature)] = feature.input_ids
            mask[row, : len(feature)] = 1
            types[row, feature.context_start : len(feature)] = 1
        return (ids, mask, types)[: len(self.inputs)]


def local_devices(number: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """The first `number` devices of this process, or all of them; devices as they are."""
    if isinstance(number, Sequence):
        return list(number)
    devices = jax.local_devices()
    if number is None:
        return devices
    if not 1 <= number <= len(devices):
        hint = "; JAX_NUM_CPU_DEVICES=N simulates more" if devices[0].platform == "cpu" else ""
        raise UsageError(
            f"devices {number}, but this process has {len(devices)} ({devices[0].platform}){hint}"
        )
    return devices[:number]


def use_compilation_cache() -> None:
    """Makes JAX keep what it compiles, so that the next process starts without compiling.

    In $XDG_CACHE_HOME/flaxqa or ~/.cache/flaxqa, in a folder of this JAX version and processor, as
    code for one processor may not run on another that shares the home directory. A directory that
    was chosen with JAX_COMPILATION_CACHE_DIR or jax.config stays; one that cannot be made is done
    without.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            directory = base / "flaxqa" / f"jax-{jax.__version__}-{processor():08x}"
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            return
        if not os.access(directory, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def processor() -> int:
    """A number that differs between processors whose instructions differ."""
    description = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        description += sorted(processor_lines(file))
    return zlib.crc32("\n".join(description).encode())


def processor_lines(lines: Iterator[str]) -> set[str]:
    return {line.strip() for line in lines if line.startswith(("model name", "flags", "Features"))}
