"""The logits of `model.py`, computed for speed: ragged rows, fused and stacked weights.

A row holds the tokens of many windows one after the other, without padding between them. All that
a token does alone (norms, projections, feed-forward: 24 parts in 25 of the work at 176 tokens)
runs over the whole row as one product; attention runs window by window. So a row is full whatever
the lengths of its windows, and one compiled shape serves them all.

Axes: M tokens of a row, W windows of a row, L tokens of its longest window; D, F, N, H and S as in
`model.py`, which says what is computed; tests/test_inference.py holds the two together. What
differs is the order of the work:

- queries, keys and values come out of one product, the scale of the scores folded into its weights;
- layers are stacked and scanned over, so that a compiled program has one of them;
- scores are normalised after they have weighted the values, in M x D numbers instead of M x S x N.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxqa.model import ACTIVATIONS, EncoderConfig, QuestionAnsweringModel, accumulator

Weights = dict[str, Any]
PerToken = Int[Array | np.ndarray, "M"]
PerWindow = Int[Array | np.ndarray, "W"]
NORM = ("scale", "bias")


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
      starts: int32 [W], the first token of each window.
      lengths: int32 [W], 0 after the last window.
    """

    input_ids: PerToken
    token_types: PerToken
    positions: PerToken
    window: PerToken
    starts: PerWindow
    lengths: PerWindow


def weights_of(model: QuestionAnsweringModel) -> Weights:
    """The weights of a model as `forward` takes them: of each kind one array for all layers."""
    encoder, sums = model.encoder, accumulator(model.dtype)
    scale = (model.config.dim // model.config.n_heads) ** -0.5

    def linear(*layers: Any, scales: tuple[float, ...] = (1.0,)) -> dict[str, np.ndarray]:
        """Layers that read the same input, side by side."""
        pairs = list(zip(layers, scales, strict=True))

        def side_by_side(name: str, dtype: np.dtype) -> np.ndarray:
            arrays = [(np.asarray(getattr(layer, name)[...]), scale) for layer, scale in pairs]
            scaled = [a if s == 1.0 else (a.astype(sums) * s).astype(a.dtype) for a, s in arrays]
            joined = scaled[0] if len(scaled) == 1 else np.concatenate(scaled, axis=-1)
            return joined.astype(dtype, copy=False)

        return {"kernel": side_by_side("kernel", model.dtype), "bias": side_by_side("bias", sums)}

    def norm(layer: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(layer, name)[...]).astype(sums) for name in NORM}

    layers = [
        {
            "qkv": linear(
                *(getattr(block.attention, name) for name in ("q_lin", "k_lin", "v_lin")),
                scales=(scale, 1.0, 1.0),
            ),
            "out": linear(block.attention.out_lin),
            "attention_norm": norm(block.sa_layer_norm),
            "lin1": linear(block.ffn.lin1),
            "lin2": linear(block.ffn.lin2),
            "output_norm": norm(block.output_layer_norm),
        }
        for block in encoder.transformer.layer
    ]
    tables = {
        name: np.asarray(getattr(encoder.embeddings, name).embedding[...])
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        if hasattr(encoder.embeddings, name)
    }
    return {
        **tables,
        "embedding_norm": norm(encoder.embeddings.LayerNorm),
        "layers": jax.tree.map(lambda *arrays: np.stack(arrays), *layers),
        "qa_outputs": linear(model.qa_outputs),
    }


def forward(
    weights: Weights, row: Ragged, *, config: EncoderConfig, lengths: tuple[int, ...]
) -> Float[Array, "M 2"]:
    """The start and end logits of every token of a row; those after the last window mean nothing.

    Args:
      weights: of `weights_of`.
      row: its windows have at most `lengths[-1]` tokens.
      config: of the model.
      lengths: ascending, at most M; what the windows are padded to for their attention alone.
    """
    sums = weights["qa_outputs"]["bias"].dtype
    x = weights["word_embeddings"][row.input_ids].astype(sums)
    if config.type_vocab_size:
        x += weights["token_type_embeddings"][row.token_types].astype(sums)
    x += weights["position_embeddings"][row.positions].astype(sums)
    norm = functools.partial(layer_norm, epsilon=config.layer_norm_eps)
    activation = ACTIVATIONS[config.activation]

    def layer(x: Array, layer: Weights) -> tuple[Array, None]:
        mixed = attention(linear(x, layer["qkv"]), row, config.n_heads, lengths, layer)
        x = norm(x + linear(mixed, layer["out"]), layer["attention_norm"])
        fed = linear(activation(linear(x, layer["lin1"])), layer["lin2"])
        return norm(x + fed, layer["output_norm"]), None

    x, _ = jax.lax.scan(layer, norm(x, weights["embedding_norm"]), weights["layers"])
    return linear(x, weights["qa_outputs"])


def linear(x: Array, layer: Weights) -> Array:
    """x [M, A] to [M, B]; the product has the kernel's dtype, the sums the bias's."""
    kernel, bias = layer["kernel"], layer["bias"]
    return jax.lax.dot(x.astype(kernel.dtype), kernel, preferred_element_type=bias.dtype) + bias


def layer_norm(x: Array, layer: Weights, *, epsilon: float) -> Array:
    """Each token's channels with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * layer["scale"] + layer["bias"]


def attention(
    qkv: Array, row: Ragged, n_heads: int, lengths: tuple[int, ...], layer: Weights
) -> Array:
    """The values [M, D] that the tokens of each window mix for each other, from qkv [M, 3 D]."""
    given = {"n_heads": n_heads, "lengths": lengths, "dtype": layer["out"]["kernel"].dtype}
    by_platform: dict[str, Callable[..., Array]] = {
        "cpu": functools.partial(window_by_window, **given),
        "default": functools.partial(all_windows, **given),
    }
    return jax.lax.platform_dependent(qkv, row, **by_platform)


def window_by_window(
    qkv: Array, row: Ragged, *, n_heads: int, lengths: tuple[int, ...], dtype: Any
) -> Array:
    """Attention for a CPU, where the scores of one window stay in the cache.

    One loop for the windows of each length: of a row, whatever it holds, next to nothing is padded.
    """
    dim = qkv.shape[1] // 3

    def one(length: int, index: Array, mixed: Array) -> Array:
        # The last windows are read from further left, so that the slice stays inside the row.
        start = jnp.minimum(row.starts[index], len(qkv) - length)
        first = row.starts[index] - start
        column = jnp.arange(length)
        own = (column >= first) & (column < first + row.lengths[index])
        part = jax.lax.dynamic_slice_in_dim(qkv, start, length).astype(dtype)
        q, k, v = (each.reshape(length, n_heads, -1) for each in jnp.split(part, 3, axis=1))
        new = attend(q, k, v, own).reshape(length, dim)
        old = jax.lax.dynamic_slice_in_dim(mixed, start, length)
        new = jnp.where(own[:, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(mixed, new, start, axis=0)

    mixed, begin = jnp.zeros((len(qkv), dim), qkv.dtype), jnp.int32(0)
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):
        end = (row.lengths > shorter).sum(dtype=np.int32)
        mixed = jax.lax.fori_loop(begin, end, functools.partial(one, length), mixed)
        begin = end
    return mixed


def all_windows(
    qkv: Array, row: Ragged, *, n_heads: int, lengths: tuple[int, ...], dtype: Any
) -> Array:
    """Attention for an accelerator: all windows at once, each padded to the longest."""
    longest = lengths[-1]
    column = jnp.arange(longest)
    place = jnp.minimum(row.starts[:, None] + column, len(qkv) - 1)
    padded = qkv.astype(dtype)[place].reshape(*place.shape, 3, n_heads, -1)
    own = column < row.lengths[:, None]
    mixed = jax.vmap(attend)(padded[:, :, 0], padded[:, :, 1], padded[:, :, 2], own)
    return mixed.reshape(place.size, -1)[row.window * longest + row.positions]


def attend(q: Array, k: Array, v: Array, own: Array) -> Array:
    """One window's attention: q, k, v [L, N, H] and which of its L are tokens to [L, N, H]."""
    sums = accumulator(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=sums)
    scores = product("TNH,SNH->NTS", q, k)
    # The lowest finite number and not -inf: a window without tokens must not become NaN.
    scores = jnp.where(own, scores, jnp.finfo(sums).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = product("NTS,SNH->TNH", weights.astype(q.dtype), v)
    return mixed / weights.sum(-1).T[:, :, None]
