"""Attention of ragged rows, the one step that differs by device: one function for each kind.

Each takes the queries, keys and values of a row's tokens and mixes, for every token, the values of
its own window. They agree to rounding; `choose` takes the one for a device, once for a predictor,
after a try on a tiny row. Axes as in `inference.py`: M tokens of a row, W window slots, L tokens of
the longest window, N heads, H channels of a head.

| name | where | padding |
|---|---|---|
| windows | CPUs | little: window after window, so that scores stay in the cache |
| cudnn-packed | NVIDIA Hopper and newer, 16 bits | none: cuDNN reads the row as it is |
| cudnn-padded | NVIDIA Ampere and Ada, 16 bits | each window slot to L, skipped by cuDNN |
| splash | TPUs, 16 bits | none: Pallas' splash attention skips blocks far from the diagonal |
| banded | elsewhere: float32, ROCm, odd heads | each block of tokens sees its neighbours |

All but `windows` have static shapes that depend on nothing but M and W, so rows of one size serve
every mix of lengths.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxqa.model import accumulator

if TYPE_CHECKING:
    from flaxqa.model import EncoderConfig
    from flaxqa.plan import Ragged

Heads = Float[Array, "M N H"]
PerToken = Int[Array, "M"]
Attention = Callable[[Heads, Heads, Heads, "Ragged", int], Heads]

LENGTHS = (*range(32, 385, 32), 448, 512)  # of the loops of `windows`, one for each
BAND = 128  # tokens of a block of `banded`
SPLASH_BLOCK = 512  # tokens
HALVES = ("bfloat16", "float16")
log = logging.getLogger(__name__)


def windows(q: Heads, k: Heads, v: Heads, row: Ragged, longest: int) -> Heads:
    """One loop for the windows of each length; a longer window never comes after a shorter one."""
    tokens = len(q)
    lengths = [*(length for length in LENGTHS if length < min(longest, tokens))]
    lengths.append(min(longest, tokens))

    def one(length: int, index: Array, mixed: Array) -> Array:
        # The last windows are read from further left, so that the slice stays inside the row.
        start = jnp.minimum(row.starts[index], tokens - length)
        first = row.starts[index] - start
        column = jnp.arange(length)
        own = (column >= first) & (column < first + row.lengths[index])
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        new = attend(part(q), part(k), part(v), own).astype(mixed.dtype)
        old = jax.lax.dynamic_slice_in_dim(mixed, start, length)
        new = jnp.where(own[:, None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(mixed, new, start, axis=0)

    mixed, begin = jnp.zeros(q.shape, accumulator(q.dtype)), jnp.int32(0)
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):
        end = (row.lengths > shorter).sum(dtype=np.int32)
        mixed = jax.lax.fori_loop(begin, end, functools.partial(one, length), mixed)
        begin = end
    return mixed


def attend(q: Array, k: Array, v: Array, own: Array) -> Array:
    """Attention of a part: q [T, N, H], k, v [S, N, H], which tokens see which, [S] or [T, S]."""
    sums = accumulator(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=sums)
    scores = product("TNH,SNH->NTS", q, k)
    # The lowest finite number and not -inf: a window without tokens must not become NaN.
    scores = jnp.where(own, scores, jnp.finfo(sums).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = product("NTS,SNH->TNH", weights.astype(q.dtype), v)
    # Normalised after they have weighted the values: M x N x H numbers instead of M x S x N.
    return mixed / weights.sum(-1).T[:, :, None]


def banded(q: Heads, k: Heads, v: Heads, row: Ragged, longest: int) -> Heads:
    """Blocks of tokens, each with as many blocks before and after it as a window can reach."""
    tokens = len(q)
    blocks, reach = -(-tokens // BAND), -(-(longest - 1) // BAND)
    window = segments(row)

    def neighbours(each: Array, fill: int = 0) -> Array:
        """[blocks, (2 reach + 1) BAND, ...]: what each block sees."""
        width = [(reach * BAND, (reach + blocks) * BAND - tokens)] + [(0, 0)] * (each.ndim - 1)
        padded = jnp.pad(each, width, constant_values=fill)
        padded = padded.reshape(-1, BAND, *each.shape[1:])
        return jnp.concatenate([padded[i : i + blocks] for i in range(2 * reach + 1)], axis=1)

    width = [(0, blocks * BAND - tokens), (0, 0), (0, 0)]
    queries = jnp.pad(q, width).reshape(blocks, BAND, *q.shape[1:])
    seen = neighbours(window, -2)
    asking = jnp.pad(window, width[0], constant_values=-1).reshape(blocks, BAND)
    own = asking[:, :, None] == seen[:, None, :]
    mixed = jax.vmap(attend)(queries, neighbours(k), neighbours(v), own)
    return mixed.reshape(-1, *q.shape[1:])[:tokens]


def cudnn_padded(q: Heads, k: Heads, v: Heads, row: Ragged, longest: int) -> Heads:
    """`jax.nn.dot_product_attention` of cuDNN over windows that are padded to the longest."""
    column = jnp.arange(longest)
    place = jnp.minimum(row.starts[:, None] + column, len(q) - 1)
    # A slot without a window is given one token, or cuDNN would divide by nothing.
    lengths = jnp.maximum(row.lengths, 1)
    mixed = jax.nn.dot_product_attention(
        *(each[place] for each in (q, k, v)),
        scale=1.0,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed.reshape(-1, *q.shape[1:])[row.window * longest + row.positions]


def cudnn_packed(q: Heads, k: Heads, v: Heads, row: Ragged, longest: int) -> Heads:
    """cuDNN's attention over windows that lie one after the other, which JAX has not made public.

    Source of the arguments: `dot_product_attention` in jax/_src/cudnn/fused_attention_stablehlo.py;
    jax-ml/jax#25812 brought it, jax-ml/jax#29731 asks for it in `jax.nn`.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    used = row.lengths > 0
    lengths = jnp.where(used, row.lengths, -1)[None]
    # The offset after that of the last window is its end; what follows is -1.
    offsets = jnp.append(jnp.where(used, row.starts, -1), -1)
    offsets = jnp.where(jnp.arange(len(offsets)) == used.sum(), row.lengths.sum(), offsets)[None]
    mixed = dot_product_attention(
        q[None], k[None], v[None],
        q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=1.0, mask_type=MaskType.PADDING,
    )  # fmt: skip
    return mixed[0]


def splash(
    q: Heads, k: Heads, v: Heads, row: Ragged, longest: int, *, interpret: bool = False
) -> Heads:
    """Pallas' splash attention over the whole row, each window a segment.

    The mask is a band as wide as the longest window, so blocks that no window can span are skipped.
    `interpret` runs it anywhere, slowly. Source: jax/experimental/pallas/ops/tpu/splash_attention.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = q.shape[:2]
    block = min(SPLASH_BLOCK, -(-tokens // 128) * 128)
    missing = -tokens % block
    band = masks.LocalMask((tokens + missing,) * 2, (longest, longest), 0)
    attention = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([band] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        interpret=interpret,
    )
    by_head = (jnp.pad(each, ((0, missing), (0, 0), (0, 0))).swapaxes(0, 1) for each in (q, k, v))
    window = jnp.pad(segments(row), (0, missing), constant_values=-1)
    # The kernel's products take 16 bits as they are; a precision from around would be refused.
    with jax.default_matmul_precision("default"):
        mixed = attention(*by_head, segment_ids=kernels.SegmentIds(window, window))
    return mixed.swapaxes(0, 1)[:tokens]


def segments(row: Ragged) -> PerToken:
    """The window of each token, -1 after the last window."""
    return jnp.where(jnp.arange(len(row.window)) < row.lengths.sum(), row.window, -1)


KINDS: dict[str, Attention] = {
    "windows": windows,
    "cudnn-packed": cudnn_packed,
    "cudnn-padded": cudnn_padded,
    "splash": splash,
    "banded": banded,
}


def choose(
    device: jax.Device, config: EncoderConfig, dtype: str, longest: int, *, plain: bool = False
) -> str:
    """The kind for a device: the first that suits it and passes its trial.

    Where one fails its trial, a warning says why, and what runs instead.

    Args:
      device: that will compute.
      config: of the model.
      dtype: of its weights.
      longest: tokens of the longest window.
      plain: whether only what needs nothing but XLA is wanted.
    """
    kinds = list(suitable(device, config.dim // config.n_heads, dtype))
    if plain:
        return kinds[-1]
    for kind, otherwise in itertools.pairwise(kinds):
        if (problem := trial(kind, device, config, dtype, longest)) is None:
            return kind
        log.warning(
            "attention %s fails on %s, so %s runs instead, slower: %s",
            kind, device.device_kind, otherwise, problem,
        )  # fmt: skip
    return kinds[-1]


def suitable(device: jax.Device, head: int, dtype: str) -> Iterator[str]:
    """The kinds that a device can be expected to run, the fastest first; the last runs anywhere."""
    if device.platform == "cpu":
        yield "windows"
        return
    if device.platform == "tpu" and dtype in HALVES:
        yield "splash"
    if device.platform == "gpu" and "cuda" in device.client.platform_version and dtype in HALVES:
        capability = tuple(map(int, device.compute_capability.split(".")))
        if capability >= (9, 0) and head % 8 == 0 and head <= 256:
            yield "cudnn-packed"
        if capability >= (8, 0) and head % 8 == 0 and head <= 128:
            yield "cudnn-padded"
    yield "banded"


def trial(
    kind: str, device: jax.Device, config: EncoderConfig, dtype: str, longest: int
) -> str | None:
    """Why a kind does not compute what it should on a device, or None: a tiny row, really run."""
    from flaxqa.plan import row_of

    sizes = [min(length, longest) for length in (longest, 130, 1, 64)]
    row = row_of(sizes, tokens=-(-sum(sizes) // 256) * 256, windows=8)
    shape = (3, len(row.window), config.n_heads, config.dim // config.n_heads)
    qkv = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    qkv[0] /= shape[-1] ** 0.5
    given = jax.device_put((jnp.asarray(qkv, dtype), row), device)

    def both(qkv: Array, row: Ragged) -> list[Array]:
        q, k, v = qkv
        mixed = (each(q, k, v, row, longest) for each in (KINDS[kind], banded))
        return [each[: sum(sizes)].astype(jnp.float32) for each in mixed]

    try:
        ours, plain = jax.jit(both)(*given)
        apart = float(np.abs(np.asarray(ours) - np.asarray(plain)).max())
    except Exception as error:  # whatever a library, a driver or a compiler says
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # Values of size 1 with the 8 bits of bfloat16 in weights and result; NaN is not below it.
    return None if apart < 0.05 else f"its result is {apart:.3g} off"
