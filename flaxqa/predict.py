"""The model on every device: few fixed shapes, compiled before their first batch, work in flight.

A batch is one row of tokens for each device, filled with whole windows (see `flaxqa.inference`):
the longest first, then always the longest that still fits. What is left over when a row is full is
the only padding, a few tokens in a thousand. The rows of a small job are shorter, so that
one question does not wait for a whole batch. Rows are split over the devices by one of two
strategies with one interface: `jit` over a mesh with the single axis `data`, or `pmap`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxqa import inference, native
from flaxqa.errors import TryAgain, UsageError
from flaxqa.features import Feature
from flaxqa.inference import Ragged
from flaxqa.model import QuestionAnsweringModel

LENGTHS = (*range(32, 385, 32), 448, 512)  # that windows are padded to for their attention
ROW_TOKENS_OF_A_CPU = 4_096  # larger rows leave its cache
ROW_TOKENS_OF_A_CORE = 512  # four blocks of rows for each to compute, in float32
ROW_TOKENS_ELSEWHERE = 16_384
BATCHES_IN_FLIGHT = 3
KERNELS = ("auto", "native", "xla")
MATMUL_PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "default")

Run = Callable[[Ragged], jax.Array]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """The two scores of every token of a window: float32 [T] each (float64 of a float64 model)."""

    start: np.ndarray
    end: np.ndarray


class Shape(NamedTuple):
    """What is fixed in a compiled program, for the row of one device.

    Attributes:
      tokens: of the row.
      windows: the most windows of the row.
      lengths: what windows are padded to for their attention.
    """

    tokens: int
    windows: int
    lengths: tuple[int, ...]


class Batch(NamedTuple):
    """Which windows run together: the indices of those in each device's row."""

    shape: Shape
    rows: list[list[int]]


class UnderWay(NamedTuple):
    """A batch that the devices compute.

    Attributes:
      features: of its chunk.
      logits: of its chunk, where those of the batch will be.
      batch: which windows it has.
      inputs: its rows.
      array: their logits once they are there; None if the devices had no memory for them.
    """

    features: Sequence[Feature]
    logits: list[Logits | None]
    batch: Batch
    inputs: Ragged
    array: jax.Array | None


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


class Left:
    """The windows that no batch has yet, by their number of tokens."""

    def __init__(self, lengths: Sequence[int]):
        self.by_length: dict[int, list[int]] = {}
        for index in range(len(lengths) - 1, -1, -1):
            self.by_length.setdefault(lengths[index], []).append(index)
        self.there = sum(1 << length for length in self.by_length)  # bit n: some have n tokens
        self.tokens = sum(lengths)

    def longest(self, most: int | None = None) -> int:
        """The tokens of the longest window, of those with at most `most`; -1 if there is none."""
        there = self.there if most is None else self.there & ((2 << most) - 1)
        return there.bit_length() - 1

    def shortest(self) -> int:
        """The tokens of the shortest window; -1 if there is none."""
        return (self.there & -self.there).bit_length() - 1

    def take(self, length: int) -> int:
        """The first window of that length, which is then gone."""
        indices = self.by_length[length]
        index = indices.pop()
        if not indices:
            self.there ^= 1 << length
        self.tokens -= length
        return index


class MeshJit:
    """Rows split over a mesh with the single axis `data`, weights copied along it."""

    def __init__(
        self, model: QuestionAnsweringModel, devices: Sequence[jax.Device], compute: ModuleType
    ):
        self.compute, self.config = compute, model.config
        self.mesh = mesh_of(devices)
        self.weights = jax.device_put(compute.weights_of(model), NamedSharding(self.mesh, P()))

    def compile(self, shape: Shape) -> Run:
        """A function of a row of each device to logits [devices, M, 2]."""
        forward = functools.partial(self.compute.forward, config=self.config, lengths=shape.lengths)

        def one_row(weights: inference.Weights, rows: Ragged) -> jax.Array:
            return forward(weights, jax.tree.map(lambda array: array[0], rows))[None]

        # Rows do not communicate, so there is nothing for shard_map to check.
        sharded = jax.shard_map(
            one_row, mesh=self.mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
        )
        rows = NamedSharding(self.mesh, P("data"))
        jitted = jax.jit(
            sharded,
            in_shardings=(NamedSharding(self.mesh, P()), rows),
            out_shardings=rows,
        )
        compiled = jitted.lower(self.weights, abstract(shape, self.mesh.size)).compile()
        return functools.partial(compiled, self.weights)


class Pmap:
    """Each device gets its own row, by `jax.pmap`."""

    def __init__(
        self, model: QuestionAnsweringModel, devices: Sequence[jax.Device], compute: ModuleType
    ):
        self.compute, self.config, self.devices = compute, model.config, list(devices)
        # One copy a device, made once: a broadcast argument would be copied with every batch.
        stacked = jax.tree.map(
            lambda array: np.broadcast_to(array, (len(devices), *array.shape)),
            compute.weights_of(model),
        )
        self.weights = jax.device_put(stacked, NamedSharding(mesh_of(devices), P("data")))

    def compile(self, shape: Shape) -> Run:
        """A function of a row of each device to logits [devices, M, 2]."""
        forward = functools.partial(self.compute.forward, config=self.config, lengths=shape.lengths)
        mapped = jax.pmap(forward, devices=self.devices)
        compiled = mapped.lower(self.weights, abstract(shape, len(self.devices))).compile()
        return functools.partial(compiled, self.weights)


STRATEGIES: dict[str, Callable[..., MeshJit | Pmap]] = {"jit": MeshJit, "pmap": Pmap}


def mesh_of(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    # `Auto`: XLA propagates the sharding.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )


def abstract(shape: Shape, devices: int) -> Ragged:
    """The rows of a batch without their numbers."""
    tokens = jax.ShapeDtypeStruct((devices, shape.tokens), np.int32)
    windows = jax.ShapeDtypeStruct((devices, shape.windows), np.int32)
    return Ragged(tokens, tokens, tokens, tokens, windows, windows)  # type: ignore[arg-type]


class Predictor:
    """Windows in, logits out, in the order they came; over all chosen devices.

    Attributes:
      kernels: "native" or "xla", what computes; see `__init__`.
      shapes: those compiled so far.
      compile_seconds: the time it took, or to read them from JAX's persistent cache.
      computed_tokens: of the chunks given so far, padding included.
    """

    def __init__(
        self,
        model: QuestionAnsweringModel,
        *,
        max_length: int = 384,
        batch_tokens: int | None = None,
        parallel: str = "jit",
        devices: int | Sequence[jax.Device] | None = None,
        matmul_precision: str = "float32",
        kernels: str = "auto",
    ):
        """Puts the weights on the devices; compiles nothing yet.

        Args:
          model: its weights are copied to every device.
          max_length: tokens of the longest window that will come.
          batch_tokens: of a batch on each device, never fewer than one window has; None for what
            suits the device.
          parallel: "jit" or "pmap", how rows are split over the devices.
          devices: how many of this process's devices to use, or which; None for all.
          matmul_precision: of float32 products. "float32" is what it says on every device, where
            JAX's own default is TF32 on NVIDIA and bfloat16 passes on TPU.
          kernels: "native" for the C++ library of `flaxqa.native`, "xla" for what XLA makes of
            `flaxqa.inference`; "auto" is native where it can be and is known to be faster: on CPUs,
            in float32 and bfloat16. Logits differ in the last digits.

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
        if batch_tokens is not None and batch_tokens < 1:
            raise UsageError(f"batch_tokens {batch_tokens} is below 1")
        self.devices = local_devices(devices)
        self.on_cpu = self.devices[0].platform == "cpu"
        if self.on_cpu:
            keep_freed_memory()
        self.max_length, self.matmul_precision = max_length, matmul_precision
        self.kernels = choose_kernels(kernels, model, self.on_cpu)
        self.lengths = [*(length for length in LENGTHS if length < max_length), max_length]
        self.usual_tokens = row_tokens(self.on_cpu)
        most = max(self.usual_tokens if batch_tokens is None else batch_tokens, max_length)
        # An eighth of a power of two apart, so that the row of a small job is nearly full, too.
        sizes = {k * 128 << bits for bits in range(most.bit_length()) for k in range(1, 16)}
        longer = (size for size in sizes if max_length < size < most)
        self.row_tokens = sorted({*self.lengths, *longer, most})
        self.pad_token_id = model.config.pad_token_id
        self.with_types = model.config.type_vocab_size > 0
        compute = native if self.kernels == "native" else inference
        self.strategy = STRATEGIES[parallel](model, self.devices, compute)
        self.compiled: dict[Shape, Run] = {}
        self.compile_seconds, self.computed_tokens = 0.0, 0

    @property
    def instruction_set(self) -> str | None:
        """That of the native kernels; None for those of XLA."""
        return native.library().instruction_sets[-1] if self.kernels == "native" else None

    @property
    def shapes(self) -> list[Shape]:
        return sorted(self.compiled)

    def row_size(self, longest: int, tokens: int) -> int:
        """How full each row of the next batch may get, for windows that have `tokens` in all.

        Raises:
          ValueError: `longest`, the tokens of their longest, is above `max_length`.
        """
        if longest > self.max_length:
            raise ValueError(f"a window of {longest} tokens, above {self.max_length}")
        # As many batches as there must be, all of one size.
        whole = len(self.devices) * self.row_tokens[-1]
        batches = -(-tokens // whole)
        each = max(-(-tokens // (batches * len(self.devices))), longest)
        if self.kernels == "native":
            return each
        return next((size for size in self.row_tokens if size >= each), self.row_tokens[-1])

    def shape(self, longest: int, size: int) -> Shape:
        """The shape of rows that hold `size` tokens in windows of at most `longest`."""
        if self.kernels == "native":
            # Costs what its tokens cost, so one program serves all but the largest rows.
            usual = min(self.row_tokens[-1], self.usual_tokens)
            row = next(most for most in self.row_tokens if most >= max(size, usual))
            return Shape(row, row, ())
        if self.on_cpu:
            # One window at a time, so one program serves every mix of lengths.
            lengths = tuple(length for length in self.lengths if length <= size)
            return Shape(size, size, lengths)
        # All at once, so there is room for as many as are likely, each padded to the longest.
        longest = next(length for length in self.lengths if length >= longest)
        return Shape(size, -(-3 * size // (2 * longest)), (longest,))

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Every window in exactly one batch, the longest first.

        Raises:
          ValueError: a window is longer than `max_length`.
        """
        left, batches = Left(lengths), []
        while left.there:
            size = self.row_size(left.longest(), left.tokens)
            shape = self.shape(left.longest(), size)
            rows = []
            for _ in self.devices:
                row: list[int] = []
                room = size
                while room > 0 and len(row) < shape.windows and left.there:
                    length = left.longest(room)
                    if length < 0 and self.kernels == "native":
                        length = left.shortest()  # a little more than its share, no padding
                    if not 0 <= length <= room + shape.tokens - size:
                        break
                    row.append(left.take(length))
                    room -= length
                rows.append(row)
            batches.append(Batch(shape, rows))
        return batches

    def tokens_of(self, batch: Batch, lengths: Sequence[int]) -> int:
        """The tokens that are computed of a batch, padding included."""
        if self.kernels == "native":
            return sum(lengths[index] for row in batch.rows for index in row)
        return batch.shape.tokens * len(batch.rows)

    def compile(self, shapes: Iterable[Shape]) -> None:
        """Compiles the shapes that are new, several at a time."""
        new = sorted(set(shapes) - self.compiled.keys())
        if not new:
            return
        began = time.perf_counter()

        def compile_one(shape: Shape) -> Run:
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
        (logits,) = self.stream([features], progress)
        return logits

    def stream(
        self,
        chunks: Iterable[Sequence[Feature]],
        progress: Callable[[int], None] = lambda windows: None,
    ) -> Generator[list[Logits]]:
        """The logits of every window of each chunk; the devices go on with the next meanwhile.

        A chunk is given once the first batches of the one after it are under way. What a batch
        holds depends on its own chunk alone.

        Args:
          chunks: windows as in `predict`.
          progress: called with the number of windows done, batch by batch, chunk after chunk.
        """
        unfinished: collections.deque[tuple[list[Logits | None], int]] = collections.deque()
        in_flight: collections.deque[UnderWay] = collections.deque()

        def collect() -> None:
            first = in_flight.popleft()
            self.take(first)
            progress(sum(map(len, first.batch.rows)))

        def finished() -> bool:
            return not in_flight or in_flight[0].logits is not unfinished[0][0]

        def take() -> list[Logits]:
            logits, tokens = unfinished.popleft()
            self.computed_tokens += tokens
            return logits  # type: ignore[return-value]  # the plan has every window

        for features in chunks:
            lengths = [len(feature) for feature in features]
            plan = self.plan(lengths)
            self.compile(batch.shape for batch in plan)
            logits: list[Logits | None] = [None] * len(features)
            tokens = sum(self.tokens_of(batch, lengths) for batch in plan)
            unfinished.append((logits, tokens))
            for batch in plan:
                if len(in_flight) == BATCHES_IN_FLIGHT:
                    collect()
                in_flight.append(self.start(batch, features, logits))
                if len(unfinished) > 1 and finished():
                    yield take()
            if len(unfinished) > 1:
                while not finished():
                    collect()
                yield take()
        for _ in range(len(unfinished)):
            while not finished():
                collect()
            yield take()

    def start(
        self, batch: Batch, features: Sequence[Feature], logits: list[Logits | None]
    ) -> UnderWay:
        """Sends a batch to the devices."""
        inputs = self.inputs(batch, features)
        try:
            array = self.compiled[batch.shape](inputs)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            array = None
        return UnderWay(features, logits, batch, inputs, array)

    def take(self, one: UnderWay) -> None:
        """Waits for a batch and puts its logits where they belong.

        Where the devices' memory did not suffice, its windows are computed again in smaller
        batches, and so are all later ones.

        Raises:
          TryAgain: the memory does not suffice for single windows.
        """
        try:
            if one.array is not None:
                both = np.asarray(one.array)
                start, end = np.ascontiguousarray(np.moveaxis(both, -1, 0))
                for device, row in enumerate(one.batch.rows):
                    first = one.inputs.starts[device, : len(row)]
                    stop = first + one.inputs.lengths[device, : len(row)]
                    for index, i, j in zip(row, first.tolist(), stop.tolist(), strict=True):
                        one.logits[index] = Logits(start[device, i:j], end[device, i:j])
                return
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
        while one.batch.shape.tokens <= self.row_tokens[-1]:
            self.halve()
        indices = [index for row in one.batch.rows for index in row]
        again: list[Logits | None] = [None] * len(indices)
        windows = [one.features[index] for index in indices]
        plan = self.plan([len(window) for window in windows])
        self.compile(batch.shape for batch in plan)
        for batch in plan:
            self.take(self.start(batch, windows, again))
        for index, logits in zip(indices, again, strict=True):
            one.logits[index] = logits

    def halve(self) -> None:
        """Makes batches half as large from now on, though never smaller than one window.

        Raises:
          TryAgain: they are no larger than that.
        """
        largest = self.row_tokens[-1]
        if largest == self.max_length:
            raise TryAgain(
                f"the devices' memory does not suffice for a batch of {largest:,} tokens, one "
                "window on each"
            )
        most = max(largest // 2, self.max_length)
        self.row_tokens = [*(size for size in self.row_tokens if size < most), most]
        log.warning(
            "out of memory with batches of %s tokens on each device, going on with %s",
            f"{largest:,}",
            f"{most:,}",
        )

    def inputs(self, batch: Batch, features: Sequence[Feature]) -> Ragged:
        """The rows of a batch, of every device one."""
        n = len(self.devices)
        ids = np.full((n, batch.shape.tokens), self.pad_token_id, np.int32)
        types, positions, window = np.zeros((3, *ids.shape), np.int32)
        starts, lengths = np.zeros((2, n, batch.shape.windows), np.int32)
        for device, indices in enumerate(batch.rows):
            if not indices:
                continue
            row = [features[index] for index in indices]
            sizes = np.array([len(feature) for feature in row], np.int32)
            total, count = int(sizes.sum()), len(row)
            lengths[device, :count] = sizes
            starts[device, :count] = np.cumsum(sizes) - sizes
            np.concatenate([feature.input_ids for feature in row], out=ids[device, :total])
            if not self.on_cpu:  # where attention goes window by window
                window[device, :total] = np.repeat(np.arange(count, dtype=np.int32), sizes)
            place = np.arange(total, dtype=np.int32) - np.repeat(starts[device, :count], sizes)
            positions[device, :total] = place
            if self.with_types:
                first = np.array([feature.context_start for feature in row], np.int32)
                types[device, :total] = place >= np.repeat(first, sizes)
        return Ragged(ids, types, positions, window, starts, lengths)


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for JAX's CPU client allocates its buffers anew each time.

    Given back to the system, large buffers cost a page fault for each of their pages in every
    batch: a tenth to a quarter of the time. Where the MALLOC_* environment variables are set, or
    another allocator is at work, nothing is changed.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOPT.values():
            mallopt(option, value)


MALLOPT = {  # glibc's malloc.h: each option's number there, and its value
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 1 << 30),
    "M_TOP_PAD": (-2, 64 << 20),
}


def row_tokens(on_cpu: bool) -> int:
    """The tokens of a row that suit a device."""
    if not on_cpu:
        return ROW_TOKENS_ELSEWHERE
    return max(ROW_TOKENS_OF_A_CPU, ROW_TOKENS_OF_A_CORE * (os.cpu_count() or 1))


def choose_kernels(kernels: str, model: QuestionAnsweringModel, on_cpu: bool) -> str:
    """What "auto" stands for.

    Raises:
      UsageError: there is no such choice, or the library is asked for and cannot compute this.
    """
    if kernels not in KERNELS:
        raise UsageError(f"kernels {kernels!r} is not one of {KERNELS}")
    if kernels == "xla" or (kernels == "auto" and not on_cpu):
        return "xla"
    problem = native.why_not(model.config, model.dtype) if on_cpu else "it is for CPUs"
    if problem is None:
        # XLA has products for AMX, the library has not.
        amx = model.dtype == "bfloat16" and "amx_bf16" in processor_flags()
        return "xla" if kernels == "auto" and amx else "native"
    if kernels == "native":
        raise UsageError(f"kernels 'native' cannot be used: {problem}")
    if native.library().problem == problem:
        log.warning("the compiled encoder cannot be used, so XLA computes, slower: %s", problem)
    return "xla"


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


def default_dtype(number: int | None = None) -> str:
    """bfloat16 where products in it are many times faster and norms stay float32; else float32."""
    return "float32" if local_devices(number)[0].platform == "cpu" else "bfloat16"


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
    description = [platform.machine(), platform.processor(), *sorted(processor_lines())]
    return zlib.crc32("\n".join(description).encode())


def processor_flags() -> set[str]:
    """The names of a processor's instructions, where the system tells them."""
    return {name for line in processor_lines() for name in line.partition(":")[2].split()}


@functools.cache
def processor_lines() -> frozenset[str]:
    """What /proc/cpuinfo says of name and instructions; empty where there is none."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        kinds = ("model name", "flags", "Features")
        return frozenset(line.strip() for line in file if line.startswith(kinds))
    return frozenset()
