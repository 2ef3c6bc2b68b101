"""The devices of this process, and what is set once for JAX on them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxqa.errors import UsageError, check_integers

STARTED: list[int] = []  # the process in which JAX was first used here


def refuse_fork() -> None:
    """Raises: UsageError: this process is a fork of one in which JAX runs.

    What is compiled already runs there; XLA's compiler would wait for threads that a fork has not.
    """
    if STARTED and STARTED[0] != os.getpid():
        raise UsageError(
            "this process is a fork of one in which JAX runs, and nothing can be compiled in it. "
            "Start processes by spawn (multiprocessing.get_context('spawn')), use JAX in them "
            "alone, or let the reader answer such a question before the fork"
        )


def local_devices(number: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """The first `number` devices of this process, or all of them; devices as they are."""
    if isinstance(number, str) or not isinstance(number, Sequence):
        check_integers(devices=number)
    if isinstance(number, Sequence):
        return list(number)
    refuse_fork()
    devices = jax.local_devices()
    STARTED[:] = [os.getpid()]
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


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """What XLA is told for programs of a device.

    On GPUs products are cuBLAS' alone: they are at nine tenths of what the device can do, and XLA
    compiles and tries dozens of Triton kernels for each if it may. cuBLAS adds biases in passing,
    which it cannot where XLA joins the three products of queries, keys and values to one.
    """
    if device.platform != "gpu":
        return {}
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


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


@contextlib.contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Spares Python's garbage collector all objects that are there now, until the end.

    The modules of JAX alone are 150,000 objects, which it would look through every few thousand
    answers: a tenth of the host's time. Where somebody has frozen objects, nothing is changed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
