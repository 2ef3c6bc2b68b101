"""The logits of `flaxqa.inference` on CPUs, by a C++ library that was compiled at installation.

The same computation as one custom call of JAX (`jax.ffi`), from token ids to logits: encoder.cc
computes, ffi.cc checks and binds, build.py compiles. Three things make it faster than what XLA
makes of `flaxqa.inference`: what follows a product (bias, activation, residual, norm) happens while
its numbers are in the core's cache; attention is one pass over a window's scores; weights are
packed once in the order in which they are read. Rows are computed up to the end of their last
window, so a row of any length costs what its tokens cost.

A token's logits depend on its window alone, bit for bit, whatever else is in the row.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flaxqa import inference
from flaxqa.inference import Weights
from flaxqa.model import EncoderConfig, QuestionAnsweringModel
from flaxqa.plan import Ragged

PANEL = 32  # kPanel of encoder.h
FOLDER = Path(__file__).parent
LIBRARY, RECORD = FOLDER / "encoder.so", FOLDER / "encoder.json"
SOURCES = ("encoder.cc", "encoder.h", "ffi.cc")
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("gelu", "relu")


class Library(NamedTuple):
    """The compiled library, or why there is none.

    Attributes:
      instruction_sets: that were compiled and that this processor has, the fastest last.
      problem: why it cannot be used, or None.
    """

    instruction_sets: tuple[str, ...]
    problem: str | None


@functools.cache
def library() -> Library:
    """Loads the library into this process, once."""
    if (problem := why_not_whole()) is not None:
        return Library((), problem)
    try:
        loaded = ctypes.CDLL(os.fspath(LIBRARY))
        handler = jax.ffi.pycapsule(loaded.flaxqa_forward)
        jax.ffi.register_ffi_target("flaxqa_forward", handler, platform="cpu")
        loaded.flaxqa_instruction_sets.restype = ctypes.c_char_p
        names = loaded.flaxqa_instruction_sets().decode().split()
    except Exception as error:  # of the loader, or of XLA when its interface is another
        return Library((), str(error))
    return Library(tuple(names), None)


def why_not_whole() -> str | None:
    """Why the file is not the library that was compiled of these sources, or None.

    Half a library would end the process when it is loaded.
    """
    try:
        content, record = LIBRARY.read_bytes(), json.loads(RECORD.read_bytes())
        sources = b"".join((FOLDER / name).read_bytes() for name in SOURCES)
    except FileNotFoundError:
        return "it was not compiled when flaxqa was installed"
    except (OSError, ValueError) as error:
        return f"{LIBRARY.name} cannot be read: {error}"
    again = "install flaxqa again"
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        return f"{LIBRARY.name} is not what was compiled; {again}"
    if hashlib.sha256(sources).hexdigest() != record.get("sources_sha256"):
        return f"{LIBRARY.name} was compiled of other sources; {again}"
    return None


def why_not(config: EncoderConfig, dtype: DTypeLike) -> str | None:
    """Why the library does not compute this model on this machine, or None."""
    name = np.dtype(dtype).name
    if name not in DTYPES:
        return f"it computes in {' and '.join(DTYPES)}, not in {name}"
    if config.function not in ACTIVATIONS:
        return f"it has no activation {config.activation!r}"
    if name == "bfloat16" and config.dim // config.n_heads % 2:
        return "in bfloat16 it computes heads of even size only"
    return library().problem


def weights_of(model: QuestionAnsweringModel) -> Weights:
    """The weights of a model as `forward` takes them."""
    return pack(inference.weights_of(model))


def pack(weights: Weights) -> Weights:
    """Weights of `inference.weights_of` in the order of the library: see `packed`."""

    def one(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
        return packed(array) if path[-1].key == "kernel" else filled(array, -1)

    packed_weights: Weights = jax.tree_util.tree_map_with_path(one, weights)
    return packed_weights


def filled(array: np.ndarray, axis: int, multiple: int = PANEL) -> np.ndarray:
    """The array with zeros up to a whole multiple along an axis."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    width = [(0, 0)] * array.ndim
    width[axis] = (0, missing)
    return np.pad(array, width)


def packed(kernel: np.ndarray) -> np.ndarray:
    """Matrices [..., K, N] as [..., N / 32, K, 32]; of bfloat16 [..., N / 32, K / 2, 32, 2]."""
    depth = 4 // kernel.dtype.itemsize
    kernel = filled(filled(kernel, -1), -2, depth)
    *layers, k, n = kernel.shape
    split = kernel.reshape(*layers, k // depth, depth, n // PANEL, PANEL)
    inner = len(layers)
    order = (*range(inner), inner + 2, inner, inner + 3, inner + 1)
    return np.ascontiguousarray(split.transpose(order))


def forward(
    weights: Weights,
    row: Ragged,
    *,
    config: EncoderConfig,
    instruction_set: str | None = None,
) -> Float[Array, "M 2"]:
    """The start and end logits of every token of a row; 0 after the last window.

    Args:
      weights: of `weights_of`.
      row: whose windows lie one after the other from its beginning.
      config: of the model.
      instruction_set: one of `library().instruction_sets`; None for the fastest.

    Raises:
      jax.errors.JaxRuntimeError: when it runs: an id, a position, a segment or a window is outside
        its table or row. Nothing is computed then.
    """
    dtype = weights["qa_outputs"]["kernel"].dtype
    tokens = row.input_ids.shape[0]
    width, wide = (-(-size // PANEL) * PANEL for size in (config.dim, 3 * config.dim))
    call = jax.ffi.ffi_call(
        "flaxqa_forward",
        (
            jax.ShapeDtypeStruct((tokens, 2), jnp.float32),
            jax.ShapeDtypeStruct((tokens, width), jnp.float32),  # these three are room to work
            jax.ShapeDtypeStruct((tokens, wide), dtype),
            jax.ShapeDtypeStruct((tokens, width), dtype),
        ),
    )
    layers = weights["layers"]
    logits, *_ = call(
        row.input_ids,
        row.token_types,
        row.positions,
        row.starts,
        row.lengths,
        weights["word_embeddings"],
        weights["position_embeddings"],
        weights.get("token_type_embeddings", jnp.zeros((0, width), dtype)),
        *(weights["embedding_norm"][name] for name in inference.NORM),
        *(layers["qkv"][name] for name in ("kernel", "bias")),
        *(layers["out"][name] for name in ("kernel", "bias")),
        *(layers["attention_norm"][name] for name in inference.NORM),
        *(layers["lin1"][name] for name in ("kernel", "bias")),
        *(layers["lin2"][name] for name in ("kernel", "bias")),
        *(layers["output_norm"][name] for name in inference.NORM),
        *(weights["qa_outputs"][name] for name in ("kernel", "bias")),
        instruction_set=instruction_set or library().instruction_sets[-1],
        activation=config.function,
        dim=np.int64(config.dim),
        hidden_dim=np.int64(config.hidden_dim),
        n_heads=np.int64(config.n_heads),
        epsilon=np.float32(config.layer_norm_eps),
    )
    return logits
