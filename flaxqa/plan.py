"""Which windows run together: batches of a few fixed sizes, filled evenly.

A batch has a row of tokens for each device. The windows of a chunk are dealt, the longest first, to
whichever row is the emptiest, so that all rows of a plan are about equally full and hold about as
many windows; what is left over is the only padding. A large job has rows of two sizes, whole ones
and tails; the single row of a small job has the least of some smaller sizes that it fits.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

PerToken = Int[Array | np.ndarray, "M"]
PerWindow = Int[Array | np.ndarray, "W"]
SLOT_TOKENS = 32  # of the shortest windows for which a row has slots enough
KEPT_BACK = 8  # one window of so many
LONG_SLOT_TOKENS = 128  # the same where empty slots cost time, and windows have that on average


class Shape(NamedTuple):
    """What is fixed in a compiled program, for the row of one device.

    Attributes:
      tokens: of the row.
      windows: the most windows of the row.
    """

    tokens: int
    windows: int


class Batch(NamedTuple):
    """Which windows run together: the indices of those in each device's row, the longest first."""

    shape: Shape
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of rows on some devices.

    Attributes:
      devices: how many.
      longest: tokens of the longest window.
      tokens: of rows, ascending; the last is that of whole rows, the last but one that of tails,
        the others are for small jobs.
      slot_tokens: a row has a window slot for so many of its tokens; or, where those are several,
        for the largest of them that windows have on average.
    """

    devices: int
    longest: int
    tokens: tuple[int, ...]
    slot_tokens: tuple[int, ...]

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Every window in exactly one batch.

        Raises:
          ValueError: a window is longer than `longest`.
        """
        sizes = np.asarray(lengths, np.int64)
        if not sizes.size:
            return []
        if (longest := int(sizes.max())) > self.longest:
            raise ValueError(f"a window of {longest} tokens, above {self.longest}")
        mean = sizes.mean()
        fitting = [tokens for tokens in self.slot_tokens if tokens <= mean]
        slot = max(fitting, default=self.slot_tokens[0])
        each = -(-int(sizes.sum()) // self.devices)
        order = np.argsort(-sizes, kind="stable").tolist()
        for batches in self.batches(max(each, longest)):
            shapes = [Shape(tokens, max(1, tokens // slot)) for tokens in batches]
            for kept_back in (0, KEPT_BACK):
                rows = deal(sizes.tolist(), order, shapes, self.devices, kept_back)
                if rows is not None:
                    starts = range(0, len(rows), self.devices)
                    by_batch = [rows[start : start + self.devices] for start in starts]
                    return [Batch(*pair) for pair in zip(shapes, by_batch, strict=True)]
        raise AssertionError("a batch for each window is enough")

    def batches(self, tokens: int) -> Iterator[list[int]]:
        """The row sizes of batches with room for so many tokens on each device, then for more."""
        *small, whole = self.tokens
        tail = small[-1] if small else whole
        yield from ([size] for size in small if size >= tokens)
        whole_ones, rest = divmod(tokens, whole)
        tails = -(-rest // tail)
        while True:
            if tails * tail >= whole:
                whole_ones, tails = whole_ones + 1, 0
            yield [whole] * whole_ones + [tail] * tails
            tails += 1


def deal(
    sizes: Sequence[int],
    order: Sequence[int],
    shapes: Sequence[Shape],
    devices: int,
    kept_back: int,
) -> list[list[int]] | None:
    """The windows of each row, for every shape as many rows as devices; None if they do not fit.

    Args:
      sizes: tokens of the windows.
      order: of the windows, the longest first.
      shapes: of the batches.
      devices: how many.
      kept_back: of so many windows one is dealt last, to whatever row it fits best, which leaves
        less room than the smallest window needs; 0 for none, which fills rows more evenly.
    """
    if len(sizes) > sum(shape.windows for shape in shapes) * devices:
        return None
    room = [shape.tokens for shape in shapes for _ in range(devices)]
    slots = [shape.windows for shape in shapes for _ in range(devices)]
    capacity = tuple(room)
    rows: list[list[int]] = [[] for _ in room]
    emptiest = [(-1.0, index) for index in range(len(rows))]  # a heap
    kept = [(sizes[window], -window) for window in order[::kept_back]] if kept_back else []
    kept.sort()
    for place, window in enumerate(order):
        if kept_back and place % kept_back == 0:
            continue
        size = sizes[window]
        while emptiest and room[emptiest[0][1]] < size:
            heapq.heappop(emptiest)
        if not emptiest:
            if not kept_back:
                return None
            bisect.insort(kept, (size, -window))
            continue
        index = emptiest[0][1]
        rows[index].append(window)
        room[index] -= size
        slots[index] -= 1
        if slots[index]:
            heapq.heapreplace(emptiest, (-room[index] / capacity[index], index))
        else:
            heapq.heappop(emptiest)
    for index, row in enumerate(rows):
        while kept and slots[index] and (fits := bisect.bisect(kept, (room[index], 1))):
            size, window = kept.pop(fits - 1)
            row.append(-window)
            room[index] -= size
            slots[index] -= 1
        row.sort(key=lambda window: -sizes[window])
    return None if kept else rows


# --- what a batch is on a device ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Windows one after the other in a row of M tokens; or such rows, one for each device.

    A longer window never comes after a shorter one.

    Attributes:
      input_ids: int32 [M]; after the last window any id.
      token_types: int32 [M], 0 for `[CLS] question [SEP]` and 1 for `context [SEP]`. Read by models
        with segment embeddings.
      positions: int32 [M], the place of each token in its window, 0 after the last window.
      window: int32 [M], the window of each token, 0 after the last window. A CPU does not read it.
      starts: int32 [W], the first token of each window, 0 after the last window.
      lengths: int32 [W], 0 after the last window.
    """

    input_ids: PerToken
    token_types: PerToken
    positions: PerToken
    window: PerToken
    starts: PerWindow
    lengths: PerWindow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Where the answers of a row's windows may be; or of such rows, one for each device.

    Attributes:
      start: int32 [W], the place of each window's first context token; the last one is before the
        window's last token.
      may_start: bool [M], which of the context tokens may begin an answer.
    """

    start: PerWindow
    may_start: Any


def row_of(sizes: Sequence[int], *, tokens: int, windows: int) -> Ragged:
    """A row of windows of so many tokens each, all of their ids and types 0."""
    lengths = np.zeros(windows, np.int32)
    lengths[: len(sizes)] = sizes
    starts = np.where(lengths > 0, np.cumsum(lengths) - lengths, 0).astype(np.int32)
    nothing = np.zeros(tokens, np.int32)
    positions, window = nothing.copy(), nothing.copy()
    total = int(lengths.sum())
    window[:total] = np.repeat(np.arange(windows), lengths)
    positions[:total] = np.arange(total) - np.repeat(starts, lengths)
    return Ragged(nothing, nothing, positions, window, starts, lengths)
