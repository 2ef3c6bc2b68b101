"""Every backend gives the logits of the plain model, whatever the batches."""

import numpy as np
import pytest
from conftest import QUICKSTART

from flaxqa import checkpoint, features
from flaxqa.errors import UsageError
from flaxqa.eval import backend, backends
from flaxqa.eval import questions as dataset
from flaxqa.eval.backends import BACKENDS, Padded
from flaxqa.tokens import Places, Tokens

MODEL = str(QUICKSTART / "checkpoint")
PACKAGES = {"tensorflow": "tensorflow", "openvino": "openvino"}


@pytest.fixture(scope="module")
def windows():
    questions = dataset.read(QUICKSTART / "heldout.json").questions[:10]
    return features.make(questions, checkpoint.load(MODEL).tokenizer)


@pytest.fixture(scope="module")
def wanted(windows, tmp_path_factory):
    return load("jax-model", "float32", tmp_path_factory.mktemp("wanted")).run(windows, "tuned")


def load(name, dtype, folder):
    kind = backends.backend_of(name)
    return kind(kind.prepare(MODEL, dtype, str(folder)), dtype, 2)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own parts
@pytest.mark.parametrize("way", ["shipped", "tuned", "whole"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "torch.compile" else [])
        for name in BACKENDS
    ],
)
def test_every_backend_gives_the_logits_of_the_plain_model(tmp_path, windows, wanted, name, way):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    if name == "torch.compile" and way != "tuned":
        pytest.skip("compiling takes long")
    found = load(name, "float32", tmp_path).run(windows, way)
    for one, theirs in zip(found, wanted, strict=True):
        assert one.start.shape == theirs.start.shape
        assert np.abs(one.start - theirs.start).max() < 1e-4
        assert np.abs(one.end - theirs.end).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "dtype"), [("jax", "bfloat16"), ("torch", "bfloat16"), ("onnxruntime", "int8")]
)
def test_other_dtypes_are_near_and_not_the_same(tmp_path, windows, wanted, name, dtype):
    found = load(name, dtype, tmp_path).run(windows, "tuned")
    apart = max(
        np.abs(one.start - theirs.start).max() for one, theirs in zip(found, wanted, strict=True)
    )
    assert 1e-3 < apart < 2


@pytest.mark.parametrize("way", ["shipped", "tuned"])
def test_padded_batches_have_every_window_once(way):
    lengths = np.random.default_rng(0).integers(20, 385, 99).tolist()
    batches = backend.padded_batches(lengths, way)
    assert sorted(index for rows, _ in batches for index in rows) == list(range(99))
    for rows, length in batches:
        assert max(lengths[index] for index in rows) <= length <= 384
        assert len(rows) * length <= (8 * 384 if way == "shipped" else 2_048)
    if way == "shipped":
        assert batches[0] == (list(range(8)), 384)


def test_logits_of_padded_batches_come_back_to_their_windows():
    class Echo(Padded):
        def __init__(self):
            pass

        def logits(self, inputs):
            ids, mask, types = (inputs[name] for name in backends.INPUTS)
            assert types[:, :3].max() == 0
            assert (types[:, 3:] == mask[:, 3:]).all()
            return ids * mask, -ids * mask

    places = Places(np.zeros((2, 2), np.int32), np.zeros(2, np.int32))
    context = Tokens(np.zeros(2, np.int32), places=places)
    windows = [
        features.Feature(i, np.arange(i, i + n, dtype=np.int32), 3, context, slice(0, 2), False)
        for i, n in enumerate((9, 30, 21))
    ]
    found = Echo().run(windows, "tuned")
    for window, logits in zip(windows, found, strict=True):
        assert np.array_equal(logits.start, window.input_ids)
        assert np.array_equal(logits.end, -window.input_ids)


def test_a_backend_of_ones_own_is_found_by_module_and_class():
    assert backends.backend_of("flaxqa.eval.backends:Torch") is backends.Torch


@pytest.mark.parametrize(
    ("name", "told"),
    [("keras", "'keras' is not one of jax"),
     ("flaxqa.eval.squad:Scores", "nor module:Class of a Backend"),
     ("no.module:X", "cannot be imported"), ("flaxqa.eval.squad:Missing", "cannot be imported")],
)  # fmt: skip
def test_another_name_is_refused(name, told):
    with pytest.raises(UsageError, match=told):
        backends.backend_of(name)


def test_a_backend_streams_if_it_has_a_stream_of_its_own():
    class Plain(backend.Backend):
        def __init__(self, model, dtype, threads):
            pass

        def run(self, windows, way):
            return []

    class Streaming(Plain):
        def stream(self, examples):
            return [], {}

    assert not Plain("", "float32", 1).streams
    assert Streaming("", "float32", 1).streams
    with pytest.raises(TypeError, match="Plain"):
        Plain("", "float32", 1).stream([])
