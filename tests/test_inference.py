import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from conftest import TINY
from flax import nnx

from flaxqa import attention, inference, plan
from flaxqa.answers import Table
from flaxqa.checkpoint import BertForQuestionAnswering, DistilBertForQuestionAnswering
from flaxqa.features import Example, Feature
from flaxqa.model import DistilBertConfig
from flaxqa.plan import Context
from flaxqa.spans import Logits, Pairs, Spans
from flaxqa.tokens import Places, Tokens

WINDOWS = (30, 17, 8, 5, 1)  # the last ends less than 32 tokens before the end of the row
TOKENS, LONGEST = 64, 32


def model(kind, dtype):
    """One whose norms and biases are not those of a new model, so that each of them counts."""
    made = kind(kind.config_class(**TINY), dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(made)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda array: (array + rng.normal(0, 0.2, array.shape)).astype(array.dtype), state
    )
    return nnx.merge(graphdef, moved)


def row(windows=8):
    rng = np.random.default_rng(1)
    made = plan.row_of(WINDOWS, tokens=TOKENS, windows=windows)
    return dataclasses.replace(
        made,
        input_ids=rng.integers(1, TINY["vocab_size"], TOKENS).astype(np.int32),
        token_types=rng.integers(0, 2, TOKENS).astype(np.int32),
    )


def forward_of(reference, kind="windows", **options):
    """Its forward, compiled."""
    given = {"config": reference.config, "longest": LONGEST, **options}
    return jax.jit(functools.partial(inference.forward, attention=attention.KINDS[kind], **given))


@pytest.mark.parametrize("model_class", [DistilBertForQuestionAnswering, BertForQuestionAnswering])
@pytest.mark.parametrize("kind", ["windows", "banded"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.2)]
)
def test_the_logits_are_those_of_the_model(model_class, kind, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        reference, ragged = model(model_class, dtype), row()
        logits = forward_of(reference, kind)(inference.weights_of(reference), ragged)
        for start, length in zip(ragged.starts, ragged.lengths, strict=True):
            if length:
                own = slice(start, start + length)
                wanted = reference(
                    ragged.input_ids[None, own], token_type_ids=ragged.token_types[None, own]
                )
                for got, theirs in zip(
                    logits[own].T, (wanted.start_logits, wanted.end_logits), strict=True
                ):
                    assert np.abs(got - theirs[0]).max() < tolerance
                    assert np.abs(theirs).max() > 0.01


@pytest.mark.parametrize("kind", ["windows", "banded"])
def test_what_follows_the_last_window_changes_nothing(kind):
    reference, ragged = model(DistilBertForQuestionAnswering, "float32"), row()
    last = sum(WINDOWS)
    other = dataclasses.replace(
        ragged, input_ids=np.where(np.arange(TOKENS) < last, ragged.input_ids, 1)
    )
    weights, forward = inference.weights_of(reference), forward_of(reference, kind)
    a, b = (np.asarray(forward(weights, each)) for each in (ragged, other))
    assert np.isfinite(a).all()
    assert np.array_equal(a[:last], b[:last])


def test_gelu_is_berts_to_the_last_bit_of_bfloat16():
    """For every bfloat16 from -5; below, where the function is above -2e-6, to 1e-6."""
    every = jnp.arange(2**16, dtype=jnp.uint16).view(jnp.bfloat16)
    x = np.asarray(every[jnp.isfinite(every)], np.float64)
    exact = x * scipy.special.ndtr(x)
    ours = np.asarray(jax.jit(inference.short_gelu)(jnp.asarray(x, jnp.float32)), np.float64)
    large = (x >= -5) & (np.abs(x) > 1e-30)  # what is smaller is flushed to 0
    assert np.abs(ours[large] / exact[large] - 1).max() < 4e-4
    assert np.abs(ours - exact)[~large].max() < 1e-6
    rounded, wanted = (each[large].astype(ml_dtypes.bfloat16) for each in (ours, exact))
    steps = rounded.view(np.int16).astype(int) - wanted.view(np.int16)
    assert np.abs(steps).max() <= 1
    assert (steps == 0).mean() > 0.9


def test_bfloat16_moves_logits_by_less_than_six_thousandths():
    """0.0018 of their size with float32 between the products, 0.0049 with bfloat16 there, too."""
    config = DistilBertConfig(
        vocab_size=999, max_position_embeddings=512, dim=256, n_heads=4, n_layers=4,
        hidden_dim=1_024,
    )  # fmt: skip
    made = DistilBertForQuestionAnswering(config, dtype="bfloat16", rngs=nnx.Rngs(0))
    sizes = [384, 200, 100, 60, 20]
    weights, last = inference.weights_of(made), sum(sizes)
    ids = np.random.default_rng(0).integers(0, 999, 768).astype(np.int32)
    ragged = dataclasses.replace(plan.row_of(sizes, tokens=768, windows=8), input_ids=ids)
    exact = jax.tree.map(lambda array: array.astype(np.float32), weights)
    wanted = np.asarray(forward_of(made, longest=384)(exact, ragged))[:last]
    errors = []
    for short in (False, True):
        forward = forward_of(made, "banded", short=short, longest=384)
        got = np.asarray(forward(weights, ragged))[:last]
        errors.append(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))
    assert errors[0] < errors[1] < 0.006


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_the_whole_computation_lowers_for_accelerators(platform, dtype):
    config = DistilBertConfig(**TINY)
    reference = DistilBertForQuestionAnswering(config, dtype=dtype, rngs=nnx.Rngs(0))
    forward = forward_of(reference, "banded", short=dtype == "bfloat16")
    exported = jax.export.export(forward, platforms=[platform])(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inference.weights_of(reference)
        ),
        row(),
    )
    assert exported.platforms == (platform,)
    # One layer in a loop, and no loop over windows: that is for CPUs.
    assert exported.mlir_module().count("stablehlo.while") == 1
    assert jnp.dtype(exported.out_avals[0].dtype) == jnp.float32
    assert exported.out_avals[0].shape == (TOKENS, 2)


@pytest.mark.parametrize(
    "rule",
    [Spans(1, 7), Spans(1, 100), Spans(3, 5), Pairs(4, 6), Spans(1, 7, 2.5), Pairs(4, 6, 0.5)],
)
@pytest.mark.parametrize("seed", range(4))
def test_devices_find_the_spans_that_the_host_finds(rule, seed):
    """Those of `Table`, which searches the same logits with numpy; ties included."""
    rng = np.random.default_rng(seed)
    sizes = sorted(rng.integers(4, 33, 9).tolist(), reverse=True)
    ragged = plan.row_of(sizes, tokens=320, windows=12)
    logits = rng.normal(size=(320, 2)).astype(np.float32).round(seed % 2)
    examples, windows = [], []
    starts = np.zeros(12, np.int32)
    may_start = np.ones(320, bool)
    for index, size in enumerate(sizes):
        begin = starts[index] = int(rng.integers(2, size - 1))
        counts = rng.random(size - begin - 1) < 0.7 if index % 3 == 0 else None
        at = ragged.starts[index] + begin
        if counts is not None:
            may_start[at : at + len(counts)] = counts
        n = size - begin - 1
        offsets = np.stack((np.arange(n), np.arange(1, n + 1)), 1)
        tokens = Tokens(np.zeros(n, np.int32), places=Places(offsets, np.arange(n)))
        ids = np.zeros(size, np.int32)
        windows.append(Feature(index, ids, int(begin), tokens, slice(0, n), False, counts))
        examples.append(Example(str(index), "q", "x" * n))
    search = jax.jit(functools.partial(inference.search, rule=rule, longest=LONGEST))
    found, summary = jax.tree.map(np.asarray, search(logits, ragged, Context(starts, may_start)))
    own = [slice(start, start + size) for start, size in zip(ragged.starts, sizes, strict=False)]
    table = Table(examples, windows, [Logits(*logits[each].T) for each in own], rule)
    count = len(sizes)
    there = table.found.start + table.found.end > -np.inf
    n = there.shape[1]
    assert there.any()
    assert np.array_equal(found.start[:count, :n] + found.end[:count, :n] > -np.inf, there)
    for ours, theirs in zip(found, table.found, strict=True):
        assert np.array_equal(ours[:count, :n][there], theirs[there])
    assert summary.finite.all()
    assert np.array_equal(summary.null_start[:count], logits[ragged.starts[:count], 0])
    assert np.array_equal(summary.null_end[:count], logits[ragged.starts[:count], 1])
    np.testing.assert_allclose(summary.log_start[:count], table.log_start, rtol=1e-5)
    np.testing.assert_allclose(summary.log_end[:count], table.log_end, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_devices_tell_of_windows_whose_logits_are_not_finite(value):
    ragged = plan.row_of([9, 5, 4], tokens=64, windows=4)
    logits = np.zeros((64, 2), np.float32)
    logits[12, 1] = logits[40, 0] = value  # of the second window, and of none
    context = Context(np.full(4, 2, np.int32), np.ones(64, bool))
    _, summary = inference.search(logits, ragged, context, rule=Spans(1, 3), longest=32)
    assert summary.finite.tolist() == [True, False, True, True]
