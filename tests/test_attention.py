"""Every kind of attention against the plain one, and how the one for a device is chosen."""

import functools
import inspect
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqa import attention, plan
from flaxqa.model import DistilBertConfig

CONFIG = DistilBertConfig(**{**TINY, "dim": 64, "n_heads": 2})
# Of these the packed form of cuDNN was read; tests hold its arguments to the installed one's.
PACKED_KNOWN = ("0.10", "0.11", "0.12")


def qkv_of(tokens, heads, size, seed=0):
    made = np.random.default_rng(seed).normal(size=(3, tokens, heads, size)).astype(np.float32)
    made[0] /= size**0.5
    return made


def plain(qkv, row):
    """Window by window, written out in float64."""
    mixed = np.zeros(qkv.shape[1:])
    q, k, v = qkv.astype(np.float64)
    for start, length in zip(row.starts, row.lengths, strict=True):
        own = slice(start, start + length)
        scores = np.einsum("tnh,snh->nts", q[own], k[own])
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=0))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        mixed[own] = np.einsum("nts,snh->tnh", weights, v[own])
    return mixed


def check(function, sizes, heads=2, size=32, tokens=None, longest=None, slots=None):
    """The largest difference of a kind from the plain form, in float32."""
    total = sum(sizes)
    tokens = tokens or -(-total // 128) * 128
    row = plan.row_of(sizes, tokens=tokens, windows=slots or len(sizes) + 2)
    qkv = qkv_of(tokens, heads, size)
    mixed = function(*jnp.asarray(qkv), jax.tree.map(jnp.asarray, row), longest or max(sizes))
    assert mixed.shape == qkv.shape[1:]
    assert np.isfinite(mixed).all()
    return np.abs(np.asarray(mixed) - plain(qkv, row))[:total].max()


INTERPRETED = functools.partial(attention.splash, interpret=True)
EXACT = {"windows": attention.windows, "banded": attention.banded, "splash": INTERPRETED}
MIXES = {
    "of all lengths": [512, 250, 180, 130, 77, 60, 33, 2, 1, 1],
    "of one-token windows": [1] * 300,
    "of one window that fills the row": [512],
    "of windows that fill it": [384, 384, 256],
    "of one token": [1],
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("mix", MIXES)
def test_attention_stays_inside_the_windows(kind, mix):
    assert check(EXACT[kind], MIXES[mix]) < 1e-5


@pytest.mark.parametrize("kind", EXACT)
def test_a_row_may_hold_no_window(kind):
    row = jax.tree.map(jnp.asarray, plan.row_of([], tokens=128, windows=3))
    assert np.isfinite(EXACT[kind](*jnp.asarray(qkv_of(128, 2, 32)), row, 64)).all()


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([24, 32, 40, 64, 80, 128]),
    st.integers(0, 300),
    st.integers(0, 64),
)
@pytest.mark.parametrize("kind", EXACT)
def test_any_mix_of_windows_heads_and_sizes(kind, sizes, heads, size, padding, beyond):
    sizes = sorted(sizes, reverse=True)
    tokens = sum(sizes) + padding
    longest = min(sizes[0] + beyond, 512)
    assert check(EXACT[kind], sizes, heads, size, tokens, longest) < 1e-5


def packed_by_its_arguments(
    query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type
):
    """What JAX's docstring says cuDNN does with packed windows, and that they fit each other."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    assert mask_type is MaskType.PADDING
    assert scale == 1.0
    assert query.shape == key.shape == value.shape
    (batch, tokens, _, _), (rows, slots) = query.shape, q_seqlen.shape
    assert (batch, rows, q_offsets.shape) == (1, 1, (1, slots + 1))
    assert all(each.dtype == jnp.int32 for each in (q_seqlen, q_offsets))
    assert np.array_equal(q_seqlen, kv_seqlen)
    assert np.array_equal(q_offsets, kv_offsets)
    lengths, offsets = np.asarray(q_seqlen[0]), np.asarray(q_offsets[0])
    used = int((lengths > 0).sum())
    assert (lengths[used:] == -1).all()
    assert (offsets[used + 1 :] == -1).all()
    assert np.array_equal(np.diff(offsets[: used + 1]), lengths[:used])
    assert offsets[used] <= tokens
    row = plan.row_of(lengths[:used].tolist(), tokens=tokens, windows=slots)
    assert np.array_equal(row.starts[:used], offsets[:used])
    return jnp.asarray(plain(np.stack([query[0], key[0], value[0]]), row))[None]


def padded_by_its_arguments(
    query, key, value, *, scale, query_seq_lengths, key_value_seq_lengths, implementation
):
    assert (scale, implementation) == (1.0, "cudnn")
    assert query_seq_lengths.dtype == jnp.int32
    assert np.array_equal(query_seq_lengths, key_value_seq_lengths)
    assert (query_seq_lengths >= 1).all()
    assert (query_seq_lengths <= query.shape[1]).all()
    mixed = []
    for q, k, v, length in zip(query, key, value, query_seq_lengths.tolist(), strict=True):
        row = plan.row_of([length], tokens=len(q), windows=1)
        mixed.append(plain(np.stack([q, k, v]), row))
    return jnp.asarray(np.stack(mixed))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=8),
    st.sampled_from([24, 64, 128]),
    st.integers(0, 200),
    st.integers(0, 3),
)
def test_cudnn_is_given_what_it_asks_for(sizes, size, padding, empty):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    sizes = sorted(sizes, reverse=True)
    options = {"size": size, "tokens": sum(sizes) + padding, "slots": len(sizes) + empty}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "dot_product_attention", packed_by_its_arguments)
        patch.setattr(jax.nn, "dot_product_attention", padded_by_its_arguments)
        assert check(attention.cudnn_packed, sizes, **options) < 1e-5
        assert check(attention.cudnn_padded, sizes, **options) < 1e-5


def test_the_packed_form_of_this_jax_is_known():
    """It is private: another version of JAX needs a look at its arguments and its docstring."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    assert jax.__version__.startswith(PACKED_KNOWN)
    parameters = inspect.signature(fused.dot_product_attention).parameters
    ours = inspect.signature(packed_by_its_arguments).parameters
    assert set(ours) <= set(parameters)
    assert list(parameters)[:3] == ["query", "key", "value"]
    assert fused.MaskType.PADDING.value == 1


@pytest.mark.parametrize("kind", ["cudnn-packed", "cudnn-padded"])
def test_cudnn_lowers_to_its_own_call(kind, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    row = plan.row_of([100, 60], tokens=256, windows=4)
    given = jnp.asarray(qkv_of(256, 2, 64), jnp.bfloat16)
    function = jax.jit(lambda qkv, row: attention.KINDS[kind](*qkv, row, 128))
    lowered = function.trace(given, row).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmax" in lowered.as_text()


def device(platform, capability=None, version="PJRT cuda 13"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(
        platform=platform, compute_capability=capability, client=client, device_kind="a device"
    )


HOPPER, AMPERE, TURING = (device("gpu", each) for each in ("9.0", "8.6", "7.5"))
ROCM = device("gpu", "gfx942", version="PJRT rocm 6")


@pytest.mark.parametrize(
    ("where", "head", "dtype", "kinds"),
    [
        (device("cpu"), 64, "bfloat16", ["windows"]),
        (device("tpu"), 64, "bfloat16", ["splash", "banded"]),
        (device("tpu"), 64, "float32", ["banded"]),
        (HOPPER, 64, "bfloat16", ["cudnn-packed", "cudnn-padded", "banded"]),
        (HOPPER, 64, "float16", ["cudnn-packed", "cudnn-padded", "banded"]),
        (HOPPER, 256, "bfloat16", ["cudnn-packed", "banded"]),
        (HOPPER, 20, "bfloat16", ["banded"]),
        (HOPPER, 64, "float32", ["banded"]),
        (device("gpu", "12.0"), 64, "bfloat16", ["cudnn-packed", "cudnn-padded", "banded"]),
        (AMPERE, 64, "bfloat16", ["cudnn-padded", "banded"]),
        (TURING, 64, "float16", ["banded"]),
        (ROCM, 64, "bfloat16", ["banded"]),
    ],
)
def test_each_device_has_its_kinds(where, head, dtype, kinds):
    assert list(attention.suitable(where, head, dtype)) == kinds


def test_the_first_kind_that_passes_its_trial_is_chosen_and_a_failure_is_told(monkeypatch, caplog):
    tried = []

    def trial(kind, *others):
        tried.append(kind)
        return None if kind == "cudnn-padded" else "RuntimeError: no cuDNN"

    monkeypatch.setattr(attention, "trial", trial)
    with caplog.at_level(logging.WARNING):
        assert attention.choose(HOPPER, CONFIG, "bfloat16", 384) == "cudnn-padded"
    assert tried == ["cudnn-packed", "cudnn-padded"]
    assert caplog.messages == [
        "attention cudnn-packed fails on a device, so cudnn-padded runs instead, slower: "
        "RuntimeError: no cuDNN"
    ]
    assert attention.choose(HOPPER, CONFIG, "bfloat16", 384, plain=True) == "banded"
    monkeypatch.setattr(attention, "trial", lambda *args: "no")
    assert attention.choose(HOPPER, CONFIG, "bfloat16", 384) == "banded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_trial_passes_what_is_right_and_names_what_is_not(monkeypatch, dtype):
    here = jax.devices()[0]
    monkeypatch.setitem(attention.KINDS, "right", INTERPRETED)
    assert attention.trial("right", here, CONFIG, dtype, 384) is None
    assert attention.trial("right", here, CONFIG, dtype, 50) is None

    def wrong(q, k, v, row, longest):
        return attention.banded(q, k, v[::-1], row, longest)

    def broken(q, k, v, row, longest):
        return attention.banded(q, k, v, row, longest) * jnp.nan

    monkeypatch.setitem(attention.KINDS, "wrong", wrong)
    assert "off" in attention.trial("wrong", here, CONFIG, dtype, 384)
    monkeypatch.setitem(attention.KINDS, "wrong", broken)
    assert "nan off" in attention.trial("wrong", here, CONFIG, dtype, 384)
    # cuDNN is not here, and says so.
    problem = attention.trial("cudnn-packed", here, CONFIG, dtype, 384)
    assert "Error: " in problem
    assert "\n" not in problem
