"""The logits of `model.py`, computed for speed: ragged rows, fused and stacked weights.

A row holds the tokens of many windows one after the other, without padding between them. All that
a token does alone (norms, projections, feed-forward: 24 parts in 25 of the work at 176 tokens)
runs over the whole row as one product; attention (`flaxqa.attention`) stays inside the windows. So
a row is full whatever the lengths of its windows, and one compiled shape serves them all.

Axes: M tokens of a row, W window slots of a row; D, F, N, H as in `model.py`, which says what is
computed; tests/test_inference.py holds the two together. What differs is the order of the work:
the scale of the scores is folded into the weights of the queries, and layers are stacked and
scanned over, so that a compiled program has one of them.

On accelerators what lies in memory between products is bfloat16 where the weights are: the results
of products and the residuals; norms, activations and sums inside products stay float32. Logits are
then within 0.006 of those of float32, relative, where float32 between the products gives 0.003; F1
is the same (docs/performance.md).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxqa.attention import Attention
from flaxqa.model import ACTIVATIONS, EncoderConfig, QuestionAnsweringModel, accumulator
from flaxqa.plan import Context, Ragged
from flaxqa.spans import Found, Rule, Spans, Summary

Weights = dict[str, Any]
NORM = ("scale", "bias")


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
    weights: Weights,
    row: Ragged,
    *,
    config: EncoderConfig,
    attention: Attention,
    longest: int,
    short: bool = False,
    unroll: int = 1,
) -> Float[Array, "M 2"]:
    """The start and end logits of every token of a row; those after the last window mean nothing.

    Args:
      weights: of `weights_of`.
      row: its windows have at most `longest` tokens.
      config: of the model.
      attention: of `flaxqa.attention`.
      longest: tokens of the longest window.
      short: whether what lies between products has the dtype of the weights; else that of sums.
      unroll: layers in one round of the loop.
    """
    dtype, sums = (weights["qa_outputs"][name].dtype for name in ("kernel", "bias"))
    between = dtype if short else sums
    x = weights["word_embeddings"][row.input_ids].astype(sums)
    if config.type_vocab_size:
        x += weights["token_type_embeddings"][row.token_types].astype(sums)
    x += weights["position_embeddings"][row.positions].astype(sums)

    activation = ACTIVATIONS[config.function]
    if short and config.function == "gelu":
        activation = short_gelu

    def norm(x: Array, layer: Weights) -> Array:
        return layer_norm(x, layer, epsilon=config.layer_norm_eps).astype(between)

    def linear(x: Array, layer: Weights, sums: Any = sums) -> Array:
        """x [M, A] to [M, B] of `sums`."""
        return product(x, layer["kernel"], between).astype(sums) + layer["bias"].astype(sums)

    def layer(x: Array, layer: Weights) -> tuple[Array, None]:
        q, k, v = (
            linear(x, part, between).reshape(len(x), config.n_heads, -1).astype(dtype)
            for part in thirds(layer["qkv"])
        )
        mixed = attention(q, k, v, row, longest).reshape(x.shape)
        x = norm(x + linear(mixed, layer["out"]), layer["attention_norm"])
        inner = activation(linear(x, layer["lin1"])).astype(between)
        return norm(x + linear(inner, layer["lin2"]), layer["output_norm"]), None

    x = norm(x, weights["embedding_norm"])
    x, _ = jax.lax.scan(layer, x, weights["layers"], unroll=unroll)
    last = weights["qa_outputs"]
    return product(x, last["kernel"], sums) + last["bias"]


def thirds(qkv: Weights) -> list[Weights]:
    """The layers of queries, keys and values. Three products need no copies where one result is cut
    in three."""
    parts = {name: jnp.split(array, 3, axis=-1) for name, array in qkv.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(3)]


def product(x: Array, kernel: Array, dtype: Any) -> Array:
    """x [M, A] times the kernel [A, B], in the kernel's dtype, to [M, B] of another."""
    return jax.lax.dot(x.astype(kernel.dtype), kernel, preferred_element_type=dtype)


def layer_norm(x: Array, layer: Weights, *, epsilon: float) -> Array:
    """Each token's channels with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * layer["scale"] + layer["bias"]


# Minimax fit of logit(Phi(x)) / x by a polynomial in x^2, |x| up to 5, Phi the normal distribution:
# `python -m pytest tests/test_inference.py -k gelu` holds it to BERT's GELU.
GELU = (
    -2.01149259e-08, 1.42295581e-06, -2.72505926e-05, -5.87744199e-04, 7.40787610e-02,
    1.59467549e00,
)  # fmt: skip


def short_gelu(x: Array) -> Array:
    """BERT's GELU, x Phi(x), to the last bit of bfloat16: its relative error is below 4e-4.

    Phi is the logistic function of a polynomial, which keeps it exact where it is small. That takes
    a third of the instructions of float32's error function, which GPUs wait for.
    """
    square = jnp.minimum(x * x, 25.0)
    power = jnp.polyval(jnp.array(GELU, x.dtype), square)
    # The square of rsqrt instead of a division: one instruction, and 0 for infinity.
    root = jax.lax.rsqrt(1.0 + jnp.exp(-x * power))
    return x * root * root


def search(
    logits: Float[Array, "M 2"], row: Ragged, context: Context, *, rule: Rule, longest: int
) -> tuple[Found, Summary]:
    """The best spans of each window of a row, and what else decoding needs of its logits.

    Args:
      logits: of `forward`.
      row: as given to it.
      context: of its windows.
      rule: by which spans are chosen.
      longest: tokens of the longest window.
    """
    column = jnp.arange(longest)
    inside = column < row.lengths[:, None]

    def by_window(values: Array) -> Array:
        """[M] to [W, longest]; of each window a slice."""
        padded = jnp.pad(values, (0, longest))
        one = functools.partial(jax.lax.dynamic_slice_in_dim, padded, slice_size=longest)
        return jax.vmap(one)(row.starts)

    start, end = (jnp.where(inside, by_window(each), -jnp.inf) for each in logits.T)
    may_end = (column >= context.start[:, None]) & (column < row.lengths[:, None] - 1)
    may_start = may_end & by_window(context.may_start)
    if isinstance(rule, Spans):
        starts, ends = jnp.where(may_start, start, -jnp.inf), jnp.where(may_end, end, -jnp.inf)
        found = rule.find(starts, ends, jnp)
    else:
        found = rule.find(start, end, may_start, may_end, jnp)
    weighed = may_end | (column == 0)
    logs = [
        jax.nn.logsumexp(jnp.where(weighed, each / rule.temperature, -jnp.inf), axis=1)
        for each in (start, end)
    ]
    finite = ((jnp.isfinite(start) & jnp.isfinite(end)) | ~inside).all(1)
    return found, Summary(finite, start[:, 0], end[:, 0], *logs)
