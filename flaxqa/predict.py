"""The model on every device: few fixed shapes, compiled before their first batch, work in flight.

A batch is one row of tokens for each device (see `flaxqa.plan`, `flaxqa.inference`). Rows are split
over the devices by one of two strategies with one interface: `jit` over a mesh with the single axis
`data`, or `pmap`. On accelerators the best spans of each window are found there, too, and are all
that comes back; logits follow when somebody asks for them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxqa import attention, inference, native
from flaxqa.config import DeviceOptions, takes
from flaxqa.devices import (
    compiler_options,
    keep_freed_memory,
    local_devices,
    processor_flags,
    refuse_fork,
)
from flaxqa.errors import TryAgain, UsageError
from flaxqa.features import Feature, Windows
from flaxqa.model import QuestionAnsweringModel, accumulator
from flaxqa.plan import LONG_SLOT_TOKENS, SLOT_TOKENS, Batch, Context, Ragged, Shape, Sizes
from flaxqa.spans import Found, Rule, Scores, Summary

ROW_TOKENS_OF_A_CPU = 4_096  # larger rows leave its cache
ROW_TOKENS_OF_A_CORE = 512  # four blocks of rows for each to compute, in float32
ROW_TOKENS_ELSEWHERE = 16_384
BATCHES_IN_FLIGHT = 3
# A round of the loop over layers has dozens of small kernels on a GPU (copies of weights, cuDNN's
# offsets): 218 kernels for six layers one by one, 143 two by two; all at once compile too long.
LAYERS_AT_ONCE = {"gpu": 2}
KERNELS = ("auto", "native", "xla")
MATMUL_PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "default")

Run = Callable[..., Any]
log = logging.getLogger(__name__)


class Chunk:
    """The windows of a chunk and what is known of them so far.

    Attributes:
      rules: by which devices look for the best spans: one, or none where logits come back.
      left: windows that no batch has answered yet.
      computed_tokens: padding included.
    """

    def __init__(self, windows: Windows, rules: Sequence[Rule], dtype: np.dtype):
        self.windows, self.rules, self.left = windows, rules, len(windows)
        self.computed_tokens = 0
        self.width = int(windows.lengths.max(initial=0))
        self.dtype = dtype
        self.arrays: list[tuple[Batch, jax.Array]] = []  # logits that are still on devices
        self.told: list[np.ndarray] | None = None

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits of all windows, fetched if they are still on devices."""
        shape = (2, len(self.windows), self.width)
        start, end = np.full(shape, -np.inf, self.dtype)
        for batch, array in self.arrays:
            self.fill((start, end), batch, np.asarray(array))
        self.arrays.clear()
        return start, end

    def fill(self, tables: tuple[np.ndarray, np.ndarray], batch: Batch, logits: np.ndarray) -> None:
        """Puts logits [devices, M, 2] of a batch where they belong."""
        for row, of_row in zip(batch.rows, logits, strict=True):
            chosen = np.array(row, np.int64)
            sizes = self.windows.lengths[chosen]
            ends = np.cumsum(sizes)
            total = int(ends[-1]) if row else 0
            place = np.arange(total) + np.repeat(chosen * self.width - ends + sizes, sizes)
            for table, column in zip(tables, of_row[:total].T, strict=True):
                table.reshape(-1)[place] = column

    def note(self, batch: Batch, told: tuple[Found, Summary]) -> None:
        """Keeps what the devices found in a batch, [devices, W, ...] each."""
        arrays = [np.asarray(array) for array in jax.tree.leaves(told)]
        if self.told is None:
            self.told = [
                np.zeros((len(self.windows), *array.shape[2:]), array.dtype) for array in arrays
            ]
        for device, row in enumerate(batch.rows):
            for whole, part in zip(self.told, arrays, strict=True):
                whole[row] = part[device, : len(row)]

    def scores(self) -> Scores:
        return DeviceScores(self)


class DeviceScores(Scores):
    """Logits that may still be on devices, with what was found there."""

    def __init__(self, chunk: Chunk):
        self.chunk, self.lengths = chunk, chunk.windows.lengths

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        return self.chunk.tables

    def told(self, rule: Rule) -> tuple[Found, Summary] | None:
        if rule not in self.chunk.rules or self.chunk.told is None:
            return None
        arrays = self.chunk.told
        return Found(*arrays[: len(Found._fields)]), Summary(*arrays[len(Found._fields) :])


class UnderWay(NamedTuple):
    """A batch that the devices compute.

    Attributes:
      chunk: whose windows it has.
      batch: which of them.
      logits: once they are there, [devices, M, 2]; None if the devices had no memory for them.
      told: what was found in them; None where nobody asked.
    """

    chunk: Chunk
    batch: Batch
    logits: jax.Array | None
    told: tuple[Found, Summary] | None = None


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


class MeshJit:
    """Rows split over a mesh with the single axis `data`, weights copied along it."""

    def __init__(self, weights: inference.Weights, devices: Sequence[jax.Device]):
        self.mesh, self.options = mesh_of(devices), compiler_options(devices[0])
        self.weights = jax.device_put(weights, NamedSharding(self.mesh, P()))

    def compile(self, function: Callable[..., Any], *given: Any) -> Run:
        """A function of one device's weights and arrays, on all of them, compiled.

        Args:
          function: what each device computes.
          *given: trees of abstract arrays, the first axis that of the devices.
        """

        def one_row(weights: inference.Weights, *rows: Any) -> Any:
            own = jax.tree.map(lambda array: array[0], rows)
            return jax.tree.map(lambda array: array[None], function(weights, *own))

        # Rows do not communicate, so there is nothing for shard_map to check.
        sharded = jax.shard_map(
            one_row,
            mesh=self.mesh,
            in_specs=(P(), *[P("data")] * len(given)),
            out_specs=P("data"),
            check_vma=False,
        )
        rows = NamedSharding(self.mesh, P("data"))
        jitted = jax.jit(
            sharded,
            in_shardings=(NamedSharding(self.mesh, P()), *[rows] * len(given)),
            out_shardings=rows,
        )
        compiled = jitted.lower(self.weights, *given).compile(self.options)
        return functools.partial(compiled, self.weights)


class Pmap:
    """Each device gets its own row, by `jax.pmap`."""

    def __init__(self, weights: inference.Weights, devices: Sequence[jax.Device]):
        self.devices, self.options = list(devices), compiler_options(devices[0])
        # One copy a device, made once: a broadcast argument would be copied with every batch.
        stacked = jax.tree.map(
            lambda array: np.broadcast_to(array, (len(devices), *array.shape)), weights
        )
        self.weights = jax.device_put(stacked, NamedSharding(mesh_of(devices), P("data")))

    def compile(self, function: Callable[..., Any], *given: Any) -> Run:
        """As that of `MeshJit`."""
        mapped = jax.pmap(function, devices=self.devices)
        compiled = mapped.lower(self.weights, *given).compile(self.options)
        return functools.partial(compiled, self.weights)


def mesh_of(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    # `Auto`: XLA propagates the sharding.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )


class Predictor:
    """Windows in, logits or best spans out, in the order they came; over all chosen devices.

    Attributes:
      kernels: "native" or "xla", what computes; see `__init__`.
      attention: the kind of `flaxqa.attention`, or "native".
      window_by_window: whether that goes from window to window, as on CPUs; elsewhere rows have few
        sizes, and the best spans are found on the devices.
      short: whether bfloat16 lies between products, too; see `flaxqa.inference`.
      shapes: those compiled so far.
      compile_seconds: the time it took, or to read them from JAX's persistent cache.
      computed_tokens: of the chunks given so far, padding included.
    """

    strategies: ClassVar[Mapping[str, Callable[..., MeshJit | Pmap]]] = {
        "jit": MeshJit,
        "pmap": Pmap,
    }

    @takes(DeviceOptions)
    def __init__(self, model: QuestionAnsweringModel, *, max_length: int = 384, **options: Any):
        """Puts the weights on the devices; compiles nothing but a trial of attention yet.

        Args:
          model: its weights are copied to every device.
          max_length: tokens of the longest window that will come.
          **options: those of `flaxqa.config.DeviceOptions`; `devices` may also be a list of them.
            "auto" `kernels` are the fastest that are known: the C++ library of `flaxqa.native` on
            CPUs, in float32 and bfloat16; on accelerators XLA with the fused attention that suits
            them (see `flaxqa.attention`). Logits differ in the last digits.

        Raises:
          UsageError: `max_length` is above the checkpoint's positions, or an option has no such
            value.
        """
        chosen = DeviceOptions(**options)
        parallel, kernels, batch_tokens = chosen.parallel, chosen.kernels, chosen.batch_tokens
        matmul_precision = chosen.matmul_precision
        positions = model.config.max_position_embeddings
        if not 1 <= max_length <= positions:
            raise UsageError(
                f"max_length {max_length}, but the checkpoint has {positions} positions"
            )
        if parallel not in self.strategies:
            raise UsageError(f"parallel {parallel!r} is neither 'jit' nor 'pmap'")
        if matmul_precision not in MATMUL_PRECISIONS:
            raise UsageError(
                f"matmul_precision {matmul_precision!r} is not one of {MATMUL_PRECISIONS}"
            )
        self.devices = local_devices(chosen.devices)
        on_cpu = self.devices[0].platform == "cpu"
        if on_cpu:
            keep_freed_memory()
        self.max_length, self.matmul_precision = max_length, matmul_precision
        self.config, self.dtype = model.config, model.dtype
        self.kernels = choose_kernels(kernels, model, on_cpu)
        self.with_types = model.config.type_vocab_size > 0
        if self.kernels == "native":
            weights, self.attention = native.weights_of(model), "native"
        else:
            weights = inference.weights_of(model)
            with jax.default_matmul_precision(matmul_precision):
                self.attention = self.choose_attention(plain=kernels == "xla")
        self.window_by_window = self.attention in ("native", "windows")
        self.short = not self.window_by_window and self.dtype == "bfloat16"
        self.strategy = self.strategies[parallel](weights, self.devices)
        self.usual_tokens = row_tokens(on_cpu)
        self.size_rows(self.usual_tokens if batch_tokens is None else batch_tokens)
        self.compiled: dict[Shape, Run] = {}
        self.searches: dict[tuple[Shape, Rule], Run] = {}
        self.compile_seconds, self.computed_tokens = 0.0, 0

    def choose_attention(self, plain: bool) -> str:
        """The kind of attention; see `flaxqa.attention.choose`."""
        device, dtype = self.devices[0], str(self.dtype)
        return attention.choose(device, self.config, dtype, self.max_length, plain=plain)

    @property
    def instruction_set(self) -> str | None:
        """That of the native kernels; None for those of XLA."""
        return native.library().instruction_sets[-1] if self.kernels == "native" else None

    @property
    def computed_by(self) -> dict[str, str | None]:
        """The names of what computes, for the records of a run."""
        names = ("kernels", "instruction_set", "attention")
        return {name: getattr(self, name) for name in names}

    @property
    def shapes(self) -> list[Shape]:
        return sorted(self.compiled)

    @property
    def row_tokens(self) -> tuple[int, ...]:
        """The sizes of rows, ascending."""
        return self.sizes.tokens

    # --- what runs together ---

    def size_rows(self, most: int) -> None:
        """Chooses the sizes of rows, none of them larger than `most` if one window is not."""
        most, longest = max(most, self.max_length), self.max_length
        if not self.window_by_window:
            # Few sizes, for each takes seconds to compile; tiles of products have 128 rows.
            tokens = {-(-max(size, longest) // 128) * 128 for size in (most, most // 4, most // 16)}
            slots: tuple[int, ...] = (SLOT_TOKENS, LONG_SLOT_TOKENS)
        elif self.kernels == "native":
            # A row costs what its tokens cost, so one program serves all but the largest.
            usual = min(self.usual_tokens, most)
            tokens = {usual, *(size for size in eighths(most) if size > usual), most}
            slots = (1,)
        else:
            tail = max(most // 8, longest)
            tokens = {size for size in eighths(tail) if size >= longest} | {tail, most}
            tokens |= {*range(32, longest, 32), longest}
            slots = (1,)
        self.sizes = Sizes(len(self.devices), longest, tuple(sorted(tokens)), slots)

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Every window in exactly one batch; see `flaxqa.plan`."""
        return self.sizes.plan(lengths)

    def tokens_of(self, batch: Batch, lengths: Sequence[int]) -> int:
        """The tokens that are computed of a batch, padding included."""
        if self.kernels == "native":
            return int(sum(lengths[index] for row in batch.rows for index in row))
        return batch.shape.tokens * len(batch.rows)

    def halve(self) -> None:
        """Makes batches half as large from now on, though never smaller than one window.

        Raises:
          TryAgain: they are no larger than that.
        """
        largest = self.row_tokens[-1]
        self.size_rows(largest // 2)
        if self.row_tokens[-1] == largest:
            raise TryAgain(
                f"the devices' memory does not suffice for a batch of {largest:,} tokens, one "
                "window on each"
            )
        log.warning(
            "out of memory with batches of %s tokens on each device, going on with %s",
            f"{largest:,}",
            f"{self.row_tokens[-1]:,}",
        )

    # --- compiling ---

    def compile(self, shapes: Iterable[Shape], *rules: Rule) -> None:
        """Compiles what is new, several at a time: shapes, and the search by rules in each."""
        wanted = sorted(set(shapes))
        new = [shape for shape in wanted if shape not in self.compiled]
        searches = [(shape, rule) for shape in wanted for rule in rules]
        searches = [each for each in searches if each not in self.searches]
        if not new and not searches:
            return
        refuse_fork()
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = pool.map(self.compile_shape, new)
            found = pool.map(lambda each: self.compile_search(*each), searches)
            self.compiled.update(zip(new, runs, strict=True))
            self.searches.update(zip(searches, found, strict=True))
        self.compile_seconds += time.perf_counter() - began

    def compile_shape(self, shape: Shape) -> Run:
        """Rows of a shape to logits [devices, M, 2]."""
        if self.kernels == "native":
            forward = functools.partial(native.forward, config=self.config)
        else:
            forward = functools.partial(
                inference.forward,
                config=self.config,
                attention=attention.KINDS[self.attention],
                longest=self.max_length,
                short=self.short,
                unroll=LAYERS_AT_ONCE.get(self.devices[0].platform, 1),
            )
        with jax.default_matmul_precision(self.matmul_precision):
            return self.strategy.compile(forward, self.abstract(shape)[0])

    def compile_search(self, shape: Shape, rule: Rule) -> Run:
        """Logits and rows of a shape to the best spans."""
        search = functools.partial(inference.search, rule=rule, longest=self.max_length)
        rows, contexts = self.abstract(shape)
        logits_shape = len(self.devices), shape.tokens, 2
        logits = jax.ShapeDtypeStruct(logits_shape, accumulator(self.dtype))
        return self.strategy.compile(lambda weights, *given: search(*given), logits, rows, contexts)

    def abstract(self, shape: Shape) -> tuple[Ragged, Context]:
        """The rows of a batch without their numbers."""
        n = len(self.devices)
        tokens: Any = jax.ShapeDtypeStruct((n, shape.tokens), np.int32)
        windows: Any = jax.ShapeDtypeStruct((n, shape.windows), np.int32)
        may_start: Any = jax.ShapeDtypeStruct((n, shape.tokens), np.bool_)
        rows = Ragged(tokens, tokens, tokens, tokens, windows, windows)
        return rows, Context(windows, may_start)

    # --- running ---

    def predict(
        self,
        features: Sequence[Feature],
        progress: Callable[[int], None] = lambda windows: None,
    ) -> Scores:
        """The logits of every window, in the order of the windows.

        Args:
          features: none longer than `max_length`.
          progress: called with the number of windows done, batch by batch.
        """
        (scores,) = self.stream([features], progress)
        return scores

    def stream(
        self,
        chunks: Iterable[Sequence[Feature]],
        progress: Callable[[int], None] = lambda windows: None,
        rule: Rule | None = None,
    ) -> Generator[Scores]:
        """The logits of every window of each chunk; the devices go on with the next meanwhile.

        A chunk is given once the first batches of the one after it are under way. What a batch
        holds depends on its own chunk alone.

        Args:
          chunks: windows as in `predict`.
          progress: called with the number of windows done, batch by batch, chunk after chunk.
          rule: by which accelerators look for the best spans of each window. Then these come back,
            and logits only when they are asked for. CPUs take no notice.
        """
        rules = [rule] if rule is not None and not self.window_by_window else []
        dtype = accumulator(self.dtype)
        unfinished: collections.deque[Chunk] = collections.deque()
        in_flight: collections.deque[UnderWay] = collections.deque()

        def collect() -> None:
            first = in_flight.popleft()
            self.take(first)
            progress(sum(map(len, first.batch.rows)))

        def take() -> Scores:
            chunk = unfinished.popleft()
            self.computed_tokens += chunk.computed_tokens
            return chunk.scores()

        for features in chunks:
            chunk = Chunk(Windows.of(features), rules, dtype)
            lengths = chunk.windows.lengths.tolist()
            plan = self.plan(lengths)
            self.compile((batch.shape for batch in plan), *rules)
            chunk.computed_tokens = sum(self.tokens_of(batch, lengths) for batch in plan)
            unfinished.append(chunk)
            for batch in plan:
                if len(in_flight) == BATCHES_IN_FLIGHT:
                    collect()
                in_flight.append(self.start(batch, chunk))
                if len(unfinished) > 1 and not unfinished[0].left:
                    yield take()
            if len(unfinished) > 1:
                while unfinished[0].left:
                    collect()
                yield take()
        for _ in range(len(unfinished)):
            while unfinished[0].left:
                collect()
            yield take()

    def start(self, batch: Batch, chunk: Chunk) -> UnderWay:
        """Sends a batch to the devices."""
        rows, contexts = self.inputs(batch, chunk.windows)
        try:
            logits = self.compiled[batch.shape](rows)
            told = None
            for rule in chunk.rules:
                told = self.searches[batch.shape, rule](logits, rows, contexts)
            return UnderWay(chunk, batch, logits, told)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return UnderWay(chunk, batch, None)

    def take(self, one: UnderWay) -> None:
        """Waits for a batch and puts what came of it where it belongs.

        Where the devices' memory did not suffice, its windows are computed again in smaller
        batches, and so are all later ones.

        Raises:
          TryAgain: the memory does not suffice for single windows.
        """
        chunk, batch = one.chunk, one.batch
        try:
            if one.logits is not None:
                if one.told is None:
                    chunk.fill(chunk.tables, batch, np.asarray(one.logits))
                else:
                    chunk.note(batch, one.told)
                    chunk.arrays.append((batch, one.logits))
                chunk.left -= sum(map(len, batch.rows))
                return
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
        while batch.shape.tokens <= self.row_tokens[-1]:
            self.halve()
        indices = [index for row in batch.rows for index in row]
        lengths = chunk.windows.lengths[indices].tolist()
        plan = self.plan(lengths)
        self.compile((each.shape for each in plan), *chunk.rules)
        for each in plan:
            rows = [[indices[place] for place in row] for row in each.rows]
            self.take(self.start(each._replace(rows=rows), chunk))

    def inputs(self, batch: Batch, windows: Windows) -> tuple[Ragged, Context]:
        """The rows of a batch, of every device one."""
        n, shape = len(self.devices), batch.shape
        ids = np.full((n, shape.tokens), self.config.pad_token_id, np.int32)
        types, positions, window = np.zeros((3, *ids.shape), np.int32)
        starts, lengths, contexts = np.zeros((3, n, shape.windows), np.int32)
        may_start = np.ones(ids.shape, np.bool_)
        for device, indices in enumerate(batch.rows):
            if not indices:
                continue
            chosen, count = np.array(indices), len(indices)
            sizes = windows.lengths[chosen]
            ends = np.cumsum(sizes)
            total = int(ends[-1])
            lengths[device, :count], starts[device, :count] = sizes, ends - sizes
            contexts[device, :count] = windows.context_start[chosen]
            column = np.arange(total)
            ids[device, :total] = windows.input_ids[
                column + np.repeat(windows.ends[chosen] - ends, sizes)
            ]
            positions[device, :total] = own = column - np.repeat(ends - sizes, sizes)
            if not self.window_by_window:
                window[device, :total] = np.repeat(np.arange(count), sizes)
            if self.with_types:
                types[device, :total] = own >= np.repeat(windows.context_start[chosen], sizes)
            for place, index in enumerate(indices if windows.counts else ()):
                if (counts := windows.counts.get(index)) is not None:
                    first = starts[device, place] + windows.context_start[index]
                    may_start[device, first : first + len(counts)] = counts
        rows = Ragged(ids, types, positions, window, starts, lengths)
        return rows, Context(contexts, may_start)


def eighths(most: int) -> list[int]:
    """Numbers below `most` an eighth of a power of two apart, so that rows are nearly full."""
    sizes = {k * 128 << bits for bits in range(most.bit_length()) for k in range(1, 16)}
    return sorted(size for size in sizes if size < most)


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
