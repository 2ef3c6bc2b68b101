"""Exports give the logits of the model, in the runtimes that they are for."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import QUICKSTART, TINY
from flax import nnx

from flaxqa import cli, export
from flaxqa.checkpoint import BertForQuestionAnswering, DistilBertForQuestionAnswering
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.model import BertConfig, DistilBertConfig

SIZES = ((1, 1), (2, 30), (5, 64))  # rows and tokens
KINDS = {
    DistilBertForQuestionAnswering: DistilBertConfig(**TINY),
    BertForQuestionAnswering: BertConfig(**TINY, activation="relu", layer_norm_eps=1e-3),
}


def model(kind=DistilBertForQuestionAnswering, dtype="float32"):
    """One whose norms and biases are not those of a new model, so that each of them counts."""
    graphdef, state = nnx.split(kind(KINDS[kind], dtype=dtype, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: (x + rng.normal(0, 0.2, x.shape)).astype(x.dtype), state)
    return nnx.merge(graphdef, moved)


def inputs(model, rows, tokens):
    """Padded rows, among them one without a token."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, TINY["vocab_size"], (rows, tokens))
    lengths = np.linspace(tokens, 0, rows, dtype=int)[:, None]
    given = {"input_ids": ids, "attention_mask": (np.arange(tokens) < lengths).astype(np.int64)}
    if model.config.type_vocab_size:
        given["token_type_ids"] = rng.integers(0, 2, ids.shape)
    return given


def assert_the_logits_are_those_of(model, run, tolerance=1e-5):
    for rows, tokens in SIZES:
        given = inputs(model, rows, tokens)
        own = given["attention_mask"] == 1
        for got, wanted in zip(run(given), model(**given).to_tuple(), strict=True):
            assert got.shape == (rows, tokens)
            assert got.dtype == np.float32
            assert np.isfinite(got).all()
            assert np.abs(got - np.asarray(wanted))[own].max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_gives_the_logits_of_the_model(tmp_path, kind):
    import onnxruntime

    made, path = model(kind), tmp_path / "model.onnx"
    done = export.export(made, "onnx", path)
    assert done.difference < 1e-5
    assert done.size == path.stat().st_size
    assert done.checked_with.startswith("onnxruntime ")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(export.inputs_of(made.config))
    assert [one.name for one in session.get_outputs()] == ["start_logits", "end_logits"]
    assert_the_logits_are_those_of(made, lambda given: session.run(None, given))


def test_without_onnx_runtime_the_reference_of_onnx_checks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = export.export(model(), "onnx", tmp_path / "model.onnx")
    assert done.checked_with.startswith("onnx ")
    assert done.difference < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_stablehlo_round_trips_for_every_platform(tmp_path, kind):
    import jax.export

    made, path = model(kind), tmp_path / "model.stablehlo"
    export.export(made, "stablehlo", path)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert [str(size) for size in exported.in_avals[0].shape] == ["batch", "length"]

    def run(given):
        output = exported.call(*(each.astype(np.int32) for each in given.values()))
        return [np.asarray(output[name]) for name in export.OUTPUTS]

    assert_the_logits_are_those_of(made, run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stablehlo_has_the_dtype_of_the_model(tmp_path, dtype):
    path = tmp_path / "model"
    assert export.export(model(dtype=dtype), "stablehlo", path).difference == 0
    import jax.export

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert {"bfloat16": "bf16", "float16": "f16"}[dtype] in exported.mlir_module()


@pytest.mark.parametrize("kind", KINDS)
def test_tensorflow_gives_the_logits_of_the_model(tmp_path, kind):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    made, path = model(kind), tmp_path / "model"
    export.export(made, "saved_model", path)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]

    def run(given):
        output = serve(**{name: tf.constant(x, tf.int32) for name, x in given.items()})
        return [output[name].numpy() for name in export.OUTPUTS]

    assert_the_logits_are_those_of(made, run)


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_what_gives_other_logits_is_not_kept(tmp_path, monkeypatch, format):
    right = export.inference.weights_of

    def wrong(model):
        weights = right(model)
        weights["qa_outputs"]["bias"] = weights["qa_outputs"]["bias"] + 1e-3
        return weights

    made, path = model(), tmp_path / "model"
    if format == "onnx":
        monkeypatch.setattr(export.inference, "weights_of", wrong)
    else:
        other = model()
        other.qa_outputs.bias[...] += 1e-3
        write, run = export.FORMATS[format]
        monkeypatch.setitem(export.FORMATS, format, (lambda _, path: write(other, path), run))
    with pytest.raises(DataError, match="differ by 0.001, more than 0.0001"):
        export.export(made, format, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_an_export_is_replaced_when_asked(tmp_path, format):
    made, path = model(), tmp_path / "model"
    export.export(made, format, path)
    before = path.stat().st_mtime_ns
    with pytest.raises(UsageError, match="model is there; --overwrite replaces it"):
        export.export(made, format, path)
    assert path.stat().st_mtime_ns == before
    export.export(made, format, path, overwrite=True)
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("format", ["onnx", "stablehlo", "saved_model"])
def test_what_is_no_export_of_that_format_is_never_replaced(tmp_path, format):
    made = model()
    (tmp_path / "text").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    made.save_pretrained(tmp_path / "checkpoint")
    for other in {"onnx", "stablehlo"} - {format}:
        export.export(made, other, tmp_path / other)
    (tmp_path / "link").symlink_to(tmp_path / "text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in [*before, tmp_path / "folder", tmp_path / "link", tmp_path]:
        with pytest.raises(UsageError, match=f"is there and no export to {format}"):
            export.export(made, format, path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "model.onnx", tmp_path / "file" / "deeper" / "model.onnx"):
        with pytest.raises(UsageError, match="is not a directory"):
            export.export(model(), "onnx", path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("format", "dtype", "told"),
    [
        ("onnx", "bfloat16", "onnx of a bfloat16 model"),
        ("tflite", "float32", "'tflite' is not one"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, format, dtype, told):
    with pytest.raises(UsageError, match=told):
        export.export(model(dtype=dtype), format, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "package"),
    [("onnx", "onnx"), ("stablehlo", "flatbuffers"), ("saved_model", "tensorflow")],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package} is needed: pip install 'flaxqa\["):
        export.export(model(), format, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_try_again_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.files.os, "write", full)
    with pytest.raises(TryAgain, match=r"cannot be written: No space left"):
        export.export(model(), "onnx", tmp_path / "model.onnx")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_protobuf_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1_000)
    with pytest.raises(UsageError, match="do not fit an ONNX file"):
        export.export(model(), "onnx", tmp_path / "model.onnx")


def test_the_command_writes_a_file_that_runs_without_flaxqa(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    command = ["export", "--model", str(QUICKSTART / "checkpoint"), "--format", "onnx"]
    assert cli.run([*command, "--output", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path)
    assert told["difference"] < 1e-4
    shutil.copy(path, tmp_path / "copy.onnx")
    script = """
import sys, numpy, onnxruntime
ids = numpy.ones((2, 9), numpy.int64)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
start, end = session.run(None, {"input_ids": ids, "attention_mask": ids})
assert start.shape == end.shape == (2, 9)
assert not {"jax", "flaxqa", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, path], check=True)
