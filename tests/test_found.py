"""Checkpoints as they lie around: what transformers loads is loaded, what is none is told of."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch
from conftest import (
    QUICKSTART,
    VOCAB,
    random_torch_bert,
    random_torch_model,
    write_config,
    write_tokenizer,
)
from test_model import largest_difference, torch_output
from test_weights import Payload, write_safetensors, write_torch

import flaxqa
from flaxqa import checkpoint, native, weights
from flaxqa.errors import ModelRejected, UsageError

NAMES = {"distilbert": random_torch_model, "bert": random_torch_bert}


def logits(loaded, batch):
    return np.stack(loaded.model(*batch).to_tuple())


def only(folder, write, tensors, name=None):
    """Leaves nothing but these tensors as the folder's weights."""
    (folder / weights.SAFETENSORS).unlink()
    write(folder, tensors)
    if name is not None:
        written = next(one for one in weights.FORMATS if (folder / one).exists())
        (folder / written).rename(folder / name)


# --- names of tensors ---


def without(prefix):
    return lambda name: name.removeprefix(prefix)


def below(prefix):
    return lambda name: prefix + name


WRAPPED = {
    "DataParallel": below("module."),
    "torch.compile": below("_orig_mod."),
    "both": below("module._orig_mod."),
    "a class of one's own": below("model."),
    "encoder alone": without("distilbert."),
    "encoder of a class": lambda name: (
        name if name.startswith("qa_outputs") else "encoder." + name.removeprefix("distilbert.")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_names_below_a_wrapper_are_read_and_told(folder, tensors, batch, wrapper, write, caplog):
    expected = logits(checkpoint.load(folder), batch)
    tensors["distilbert.vocab_projector.bias"] = np.ones(3, np.float32)
    only(folder, write, {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()})
    loaded = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded, batch), expected)
    (note,) = loaded.notes
    assert "left out" in note or "begin with" in note or "lack 'distilbert.'" in note
    assert note in caplog.text
    assert len(loaded.ignored) == 1


def test_bert_below_a_wrapper(bert_folder, batch):
    expected = logits(checkpoint.load(bert_folder), batch)
    tensors = dict(weights.read(bert_folder))
    tensors["bert.pooler.dense.bias"] = np.ones(32, np.float32)
    tensors["cls.predictions.bias"] = np.ones(5, np.float32)
    tensors["bert.embeddings.position_ids"] = np.arange(64)[None]
    only(bert_folder, write_torch, {f"module.{name}": one for name, one in tensors.items()})
    loaded = checkpoint.load(bert_folder)
    np.testing.assert_array_equal(logits(loaded, batch), expected)
    assert sorted(loaded.ignored) == [
        "cls.predictions.bias", "embeddings.position_ids", "pooler.dense.bias",
    ]  # fmt: skip


def test_two_models_in_one_file_are_refused(folder, tensors):
    both = {f"{who}.{name}": one for name, one in tensors.items() for who in ("teacher", "student")}
    only(folder, write_safetensors, both)
    with pytest.raises(ModelRejected, match=r"missing \d+ tensors.*\n.*unexpected \d+ tensors"):
        checkpoint.load(folder)


def test_a_wrapped_file_with_a_hole_is_refused_with_its_pattern(folder, tensors):
    del tensors["distilbert.transformer.layer.0.ffn.lin1.bias"]
    only(folder, write_safetensors, {f"module.{name}": one for name, one in tensors.items()})
    with pytest.raises(ModelRejected) as caught:
        checkpoint.load(folder)
    told = str(caught.value)
    assert "all below module.: module.distilbert.embeddings" in told
    assert len(told.splitlines()) < 6


def test_heads_of_pretraining_are_ignored(folder, tensors):
    for name in ("vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.bias"):
        tensors[name] = np.ones(3, np.float32)
    write_safetensors(folder, tensors)
    assert len(checkpoint.load(folder).ignored) == 3
    tensors["pre_classifier.weight"] = np.ones(3, np.float32)
    write_safetensors(folder, tensors)
    with pytest.raises(ModelRejected, match="unexpected pre_classifier.weight"):
        checkpoint.load(folder)


# --- files ---


def test_torch_shards_are_read(folder, tensors, batch):
    expected = logits(checkpoint.load(folder), batch)
    (folder / weights.SAFETENSORS).unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: torch.tensor(tensors[name]) for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded, batch), expected)
    assert len(loaded.files) == 5
    assert loaded.notes == ()


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_saved_around_the_tensors_is_left_out(folder, tensors, batch, legacy):
    expected = logits(checkpoint.load(folder), batch)
    (folder / weights.SAFETENSORS).unlink()
    inner = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(7)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"epoch": 3, "state_dict": inner, "optimizer": optimizer}
    torch.save(content, folder / weights.TORCH, _use_new_zipfile_serialization=not legacy)
    np.testing.assert_array_equal(logits(checkpoint.load(folder), batch), expected)


@pytest.mark.parametrize("name", ["model_best.safetensors", "x.safetensors"])
def test_weights_of_another_name_are_read_if_they_are_the_only_ones(folder, tensors, name):
    only(folder, write_safetensors, tensors, name)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    torch.save({}, folder / "optimizer.pt")
    loaded = checkpoint.load(folder)
    assert loaded.weights_file == name
    assert "the only file" in loaded.notes[0]
    (folder / "epoch2.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelRejected, match="several files.*--weights"):
        checkpoint.load(folder)
    chosen = checkpoint.load(folder, weights_file=name)
    assert chosen.files[-1] == name
    assert chosen.notes == ()


@pytest.mark.parametrize("name", ["../other.safetensors", "none.safetensors", "config.json"])
def test_a_weights_file_that_cannot_be_is_refused(folder, name):
    with pytest.raises(ModelRejected, match="not a bare file name|missing|no weight file"):
        checkpoint.load(folder, weights_file=name)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 267844284\n"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "pointer of Git LFS.*git lfs pull"),
        (b"\n <!DOCTYPE html>\n<html><body>Sign in", "an HTML page"),
        (b"<HTML>", "an HTML page"),
        (b"", "is empty"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_told(folder, file, content, message):
    (folder / file).write_bytes(content)
    with pytest.raises(ModelRejected, match=f"{file} .*{message}"):
        checkpoint.load(folder)


def test_an_adapter_is_told_with_its_base_model(folder):
    (folder / weights.SAFETENSORS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelRejected, match="adapter.*'some/base'.*merge_and_unload"):
        checkpoint.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelRejected, match="adapter.*'some/base'"):
        checkpoint.load(folder)


def test_a_folder_of_onnx_alone_is_told(folder):
    (folder / weights.SAFETENSORS).rename(folder / "model.onnx")
    with pytest.raises(ModelRejected, match="only ONNX files"):
        checkpoint.load(folder)


def test_a_whole_pickled_model_is_told(folder, reference):
    (folder / weights.SAFETENSORS).unlink()
    torch.save(reference, folder / weights.TORCH)
    with pytest.raises(ModelRejected, match="a whole pickled model.*nothing was executed"):
        checkpoint.load(folder)
    torch.save({"state_dict": Payload(folder / "canary")}, folder / weights.TORCH)
    with pytest.raises(ModelRejected, match="nothing was executed"):
        checkpoint.load(folder)
    assert not (folder / "canary").exists()


# --- configs and sizes ---


@pytest.mark.parametrize("rows", [1, 7, 1_024])
def test_rows_past_the_tokens_change_nothing(folder, tensors, batch, rows):
    expected = logits(checkpoint.load(folder), batch)
    name = "distilbert.embeddings.word_embeddings.weight"
    padding = np.full((rows, 32), 7, np.float32)
    only(folder, write_safetensors, tensors | {name: np.concatenate((tensors[name], padding))})
    write_config(folder, vocab_size=len(VOCAB) + rows)
    np.testing.assert_array_equal(logits(checkpoint.load(folder), batch), expected)


def test_fewer_rows_than_tokens_stay_refused(folder):
    write_tokenizer(folder, [*VOCAB, "zebra"])
    with pytest.raises(ModelRejected, match=f"{len(VOCAB) + 1} tokens"):
        checkpoint.load(folder)


def old_config(folder, **changes):
    """The config without `model_type`, as those of 2019 are."""
    content = json.loads((folder / "config.json").read_text()) | changes
    del content["model_type"]
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("classes", [["DistilBertForQuestionAnswering"], ["DistilBertModel"], None])
def test_a_config_without_a_model_type(folder, batch, classes):
    expected = logits(checkpoint.load(folder), batch)
    old_config(folder, architectures=classes)
    loaded = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded, batch), expected)
    assert "no model_type; read as distilbert" in loaded.notes[0]


def test_a_bert_config_without_a_model_type_needs_its_class(bert_folder):
    old_config(bert_folder)
    assert checkpoint.load(bert_folder).config.model_type == "bert"
    for classes in (["RobertaForQuestionAnswering"], None):
        (bert_folder / "config.json").write_text(
            json.dumps({"model_type": "", **json.loads((bert_folder / "config.json").read_text())})
        )
        old_config(bert_folder, architectures=classes)
        with pytest.raises(ModelRejected, match='no model_type.*; add "model_type"'):
            checkpoint.load(bert_folder)


ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "silu", "swish")


@pytest.mark.parametrize("model_type", NAMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_that_of_torch(batch, name, model_type):
    field = {"distilbert": "activation", "bert": "hidden_act"}[model_type]
    reference = NAMES[model_type](**{field: name}).double()
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    config = checkpoint.read_config({**reference.config.to_dict(), "model_type": model_type})
    expected = torch_output(reference, *batch)
    with jax.enable_x64(True):
        model, _ = checkpoint.from_tensors(tensors, config, dtype="float64")
        out = model(*batch)
        # gelu_fast has ten digits of a constant.
        tolerance = 1e-9 if name == "gelu_fast" else 1e-12
        own = batch[1] == 1
        assert largest_difference(out.start_logits, expected.start_logits, own) < tolerance
        assert largest_difference(out.end_logits, expected.end_logits, own) < tolerance


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_reader_answers_with_each_activation(folder, name):
    write_config(folder, activation=name)
    question, context = "w1 w2", "w3 w4 w5 w6"
    answers = [flaxqa.load(folder, kernels=kernels).answer(question, context)
               for kernels in ("auto", "xla")]  # fmt: skip
    assert answers[0][0].text == answers[1][0].text
    assert answers[0][0].score == pytest.approx(answers[1][0].score, abs=1e-5)


# --- readers in threads and processes ---

CONTEXT = "Ada lives in Turin."


@pytest.fixture(scope="module")
def reader():
    return flaxqa.load(QUICKSTART / "checkpoint", devices=1)


def asked(reader, number):
    return [one.text for one in reader.answer(f"Where does Ada {number} live?", CONTEXT, top_k=2)]


def test_eight_threads_share_a_reader(reader):
    wanted = [asked(reader, number) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: asked(reader, number), range(24))) == wanted


def test_a_pickled_reader_is_the_same_elsewhere(reader):
    short = flaxqa.load(QUICKSTART / "checkpoint", max_length=48, doc_stride=8, dtype="bfloat16")
    again = pickle.loads(pickle.dumps(short))  # noqa: S301 (our own)
    assert (again.max_length, again.doc_stride) == (48, 8)
    assert again.checkpoint.model.dtype == "bfloat16"
    assert again.checkpoint.sha256() == short.checkpoint.sha256()
    assert asked(again, 1) == asked(short, 1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(asked, (reader, 2)) == asked(reader, 2)


def test_a_reader_on_chosen_devices_says_why_it_cannot_be_pickled():
    reader = flaxqa.load(QUICKSTART / "checkpoint", devices=jax.local_devices()[:1])
    with pytest.raises(TypeError, match="give their number"):
        pickle.dumps(reader)


HELD = {}  # what a child has from its parent


def asked_of_parent(number):
    return asked(HELD["reader"], number)


# JAX and Python warn of any fork.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore:This process")
def test_a_reader_works_after_fork(reader):
    HELD["reader"], wanted = reader, asked(reader, 3)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(asked_of_parent, (3,)).get(60) == wanted


MAPPED = """
import datasets, flaxqa

reader = flaxqa.load({model!r})
rows = datasets.Dataset.from_list([{{"question": "Where?", "context": "In Turin."}}] * 40)
found = rows.map(flaxqa.QuestionAnswerer(reader), batched=True, batch_size=10, num_proc=2)
print(len(found), set(found["error"]))
"""


def test_datasets_maps_a_reader_in_several_processes(tmp_path):
    if native.library().problem is not None:
        pytest.skip(f"XLA compiles more than one program: {native.library().problem}")
    code = MAPPED.format(model=str(QUICKSTART / "checkpoint"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["40", "{''}"], done.stderr


def load_again():
    with pytest.raises(UsageError, match="a fork of one in which JAX runs"):
        flaxqa.load(QUICKSTART / "checkpoint")


@pytest.mark.filterwarnings("ignore:os.fork", "ignore:This process")
def test_what_would_wait_for_ever_in_a_fork_is_refused(reader):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply_async(load_again).get(60)
