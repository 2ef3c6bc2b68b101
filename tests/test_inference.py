import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from flaxqa import inference
from flaxqa.inference import Ragged
from flaxqa.model import (
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
)

WINDOWS = (30, 17, 8, 5, 1)  # the last ends less than 32 tokens before the end of the row
TOKENS, LENGTHS = 64, (8, 16, 32)


def model(kind, dtype):
    """One whose norms and biases are not those of a new model, so that each of them counts."""
    config = BertConfig if kind is BertForQuestionAnswering else DistilBertConfig
    made = kind(config(**TINY), dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(made)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda array: (array + rng.normal(0, 0.2, array.shape)).astype(array.dtype), state
    )
    return nnx.merge(graphdef, moved)


def row():
    rng = np.random.default_rng(1)
    ids = rng.integers(1, TINY["vocab_size"], TOKENS).astype(np.int32)
    types = rng.integers(0, 2, TOKENS).astype(np.int32)
    positions, window = np.zeros((2, TOKENS), np.int32)
    starts, lengths = np.zeros((2, 7), np.int32)
    for index, length in enumerate(WINDOWS):
        start = sum(WINDOWS[:index])
        starts[index], lengths[index] = start, length
        positions[start : start + length] = np.arange(length)
        window[start : start + length] = index
    return Ragged(ids, types, positions, window, starts, lengths)


@pytest.mark.parametrize("kind", [DistilBertForQuestionAnswering, BertForQuestionAnswering])
@pytest.mark.parametrize("attention", ["window_by_window", "all_windows"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.2)]
)
def test_the_logits_are_those_of_the_model(monkeypatch, kind, attention, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        reference, ragged = model(kind, dtype), row()
        monkeypatch.setattr(inference, "window_by_window", getattr(inference, attention))
        forward = functools.partial(inference.forward, config=reference.config, lengths=LENGTHS)
        logits = jax.jit(forward)(inference.weights_of(reference), ragged)
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


def test_what_follows_the_last_window_changes_nothing():
    reference, ragged = model(DistilBertForQuestionAnswering, "float32"), row()
    last = sum(WINDOWS)
    other = dataclasses.replace(
        ragged, input_ids=np.where(np.arange(TOKENS) < last, ragged.input_ids, 1)
    )
    weights = inference.weights_of(reference)
    a, b = (
        inference.forward(weights, each, config=reference.config, lengths=LENGTHS)
        for each in (ragged, other)
    )
    assert np.isfinite(a).all()
    assert np.array_equal(a[:last], b[:last])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_the_whole_computation_lowers_for_accelerators(platform, dtype):
    config = DistilBertConfig(**TINY)
    reference = DistilBertForQuestionAnswering(config, dtype=dtype, rngs=nnx.Rngs(0))
    weights = inference.weights_of(reference)

    def forward(weights, row):
        return inference.forward(weights, row, config=config, lengths=LENGTHS)

    exported = jax.export.export(jax.jit(forward), platforms=[platform])(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights), row()
    )
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    # One layer in a loop, and no loop over windows: that is for CPUs.
    assert text.count("stablehlo.while") == 1
    assert jnp.dtype(exported.out_avals[0].dtype) == jnp.float32
    assert exported.out_avals[0].shape == (TOKENS, 2)
