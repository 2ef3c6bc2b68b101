"""What a backend is: it loads a checkpoint, and then turns windows into logits.

Windows and decoder are flaxqa's for all. Those that take padded batches get them in one of two
ways: `shipped`, as transformers 4.57's pipeline and documentation do it, in the order they come, 8
at a time, padded to 384; `tuned`, sorted by length and padded to their longest. (`whole` is one
batch of them all.) On an accelerator batches are larger, and all are sent before the first result
is fetched.

A backend of your own is a subclass of `Backend` named as `module:Class`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from flaxqa.features import Example, Feature
from flaxqa.spans import Logits

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LENGTH, SHIPPED_BATCH = 384, 8
TUNED_TOKENS = 2_048  # of a batch that is sorted by length
TUNED_TOKENS_ELSEWHERE = 65_536  # the fastest for torch on an H100
STEPS = 10  # of the largest batch
MULTIPLE = 8  # what the length of a tuned batch is rounded up to


class Backend(abc.ABC):
    """Loads a checkpoint; then windows to logits.

    Attributes:
      dtypes: that it computes in, the first by default.
      devices: kinds of devices that it computes on.
      device: the kind that it is asked to compute on, if it can; set before it is made.
      needs: what installs it.
      traceable: whether jax.profiler sees what it does.
      length: tokens of the longest window.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    device: ClassVar[str] = "cpu"
    needs: ClassVar[str] = ""
    traceable: ClassVar[bool] = False
    length = LENGTH

    @classmethod
    def prepare(cls, model: str, dtype: str, folder: str) -> str:
        """Makes of a checkpoint directory what the constructor takes, in a folder.

        All workers of a comparison share the folder, so that what one has made is there. This is
        not part of the time to load it. As it is, the constructor takes the directory.
        """
        return model

    @abc.abstractmethod
    def __init__(self, model: str, dtype: str, threads: int):
        """Loads what `prepare` gave.

        Raises:
          ImportError: a package is not installed.
        """

    @abc.abstractmethod
    def run(self, windows: Sequence[Feature], way: str) -> Sequence[Logits]:
        """The logits of every window."""

    def stream(self, examples: Sequence[Example]) -> tuple[list[str], dict[str, float]]:
        """From examples to their answers by run_qa's rule, in the backend's own way.

        Returns:
          The text of each answer, "" for none, and the seconds of each of `runner.STAGES`, which
          may go on side by side.
        """
        raise TypeError(f"{type(self).__name__} has no `stream` of its own")

    @property
    def streams(self) -> bool:
        """Whether it takes examples and gives answers by itself: it has a `stream` of its own."""
        return type(self).stream is not Backend.stream

    def step(self, windows: Sequence[Feature]) -> dict[str, Any]:
        """The largest batch of these windows again and again; {} where that means nothing.

        Returns:
          `seconds` of one, `useful_flops` in it, `tokens` and `windows` of its shape.
        """
        return {}

    def where(self) -> str:
        """The name of what computes."""
        return "cpu"

    def device_memory(self) -> int | None:
        """The most bytes of the device's own memory that were in use; None on a CPU."""
        return None

    def about(self) -> dict[str, Any]:
        """What else is worth knowing of how it computes."""
        return {}


class Padded(Backend):
    """One that takes rows of one length.

    Attributes:
      fixed: whether each shape has to be compiled, so that there should be few of them.
    """

    fixed: ClassVar[bool] = False

    @abc.abstractmethod
    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask and token_type_ids, int64 [B, T], to logits, float32 [B, T]."""

    def send(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Begins with a batch; where a device works on its own, `fetch` waits for it."""
        return self.logits(inputs)

    def fetch(self, sent: Any) -> tuple[np.ndarray, np.ndarray]:
        """The logits of what was sent."""
        start, end = sent
        return start, end

    def run(self, windows: Sequence[Feature], way: str) -> list[Logits]:
        found: dict[int, Logits] = {}
        tokens, multiple = TUNED_TOKENS, MULTIPLE
        if self.device != "cpu":
            tokens, multiple = TUNED_TOKENS_ELSEWHERE, 64 if self.fixed else MULTIPLE
        lengths = list(map(len, windows))
        sent = []
        for rows, length in padded_batches(lengths, way, self.length, tokens, multiple):
            there = [windows[index] for index in rows]
            room = len(rows)
            if self.fixed and self.device != "cpu" and way == "tuned":  # few sizes
                room = min(1 << (room - 1).bit_length(), max(1, tokens // length))
            sent.append((rows, self.send(padded(there, length, room))))
        for rows, batch in sent:
            start, end = self.fetch(batch)
            for row, index in enumerate(rows):
                own = slice(lengths[index])
                found[index] = Logits(start[row, own], end[row, own])
        return [found[index] for index in range(len(windows))]


def padded_batches(
    lengths: Sequence[int],
    way: str,
    longest: int = LENGTH,
    tokens: int = TUNED_TOKENS,
    multiple: int = MULTIPLE,
) -> list[tuple[list[int], int]]:
    """The windows of each batch and the length they are padded to.

    Args:
      lengths: tokens of the windows.
      way: "shipped", "tuned" or "whole".
      longest: tokens of the longest window.
      tokens: of a tuned batch, padding included.
      multiple: what the length of a tuned batch is rounded up to.
    """
    if way == "shipped":
        rows = list(range(len(lengths)))
        return [
            (rows[i : i + SHIPPED_BATCH], longest) for i in range(0, len(lengths), SHIPPED_BATCH)
        ]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if way == "whole":
        return [(order, max(lengths))]
    batches = []
    while order:
        length = min(-(-lengths[order[0]] // multiple) * multiple, longest)
        size = max(1, tokens // length)
        batches.append((order[:size], length))
        order = order[size:]
    return batches


def padded(windows: Sequence[Feature], length: int, rows: int) -> dict[str, np.ndarray]:
    """Windows as the inputs of transformers' models, in so many rows."""
    ids, mask, types = np.zeros((3, rows, length), np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window.input_ids
        mask[row, : len(window)] = 1
        types[row, window.context_start : len(window)] = 1
    return dict(zip(INPUTS, (ids, mask, types), strict=True))
