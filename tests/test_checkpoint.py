import json
import os
import re
import shutil
import struct

import jax
import numpy as np
import pytest
import torch
from conftest import VOCAB, random_torch_model, write_config, write_tokenizer
from flax import nnx
from test_model import largest_difference, torch_output
from test_weights import (
    Payload,
    write_hdf5,
    write_msgpack,
    write_safetensors,
    write_torch,
    write_torch_legacy,
)

import flaxqa
from flaxqa import checkpoint, features, tokens, weights
from flaxqa.errors import ModelRejected, TryAgain, UsageError
from flaxqa.features import Example
from flaxqa.model import DistilBertConfig

BASE = {
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
    "dim": 768,
    "n_heads": 12,
    "n_layers": 6,
    "hidden_dim": 3072,
}


@pytest.fixture(scope="module")
def base_reference():
    """A random model of the published checkpoint's size, its logits in float64 and a batch."""
    model = random_torch_model(**BASE)
    rng = np.random.default_rng(0)
    mask = (np.arange(48) < np.array([[48], [29]])).astype(np.int32)
    batch = rng.integers(1, BASE["vocab_size"], (2, 48), dtype=np.int32) * mask, mask
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    return tensors, batch, torch_output(model.double(), *batch)


@pytest.mark.parametrize(
    "write", [write_safetensors, write_torch, write_torch_legacy, write_hdf5, write_msgpack]
)
def test_logits_at_the_published_size_through_every_format(tmp_path, base_reference, write):
    tensors, batch, expected = base_reference
    write(tmp_path, tensors)
    config = DistilBertConfig(**BASE)
    read = weights.read(tmp_path)
    # Measured: 6e-14 and 7e-6, for logits up to 4.
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-4)):
        with jax.enable_x64(dtype == "float64"):
            model, _ = checkpoint.from_tensors(read, config, dtype=dtype)
            out = model(*batch)
            for ours, theirs in (
                (out.start_logits, expected.start_logits),
                (out.end_logits, expected.end_logits),
            ):
                assert largest_difference(ours, theirs, batch[1] == 1) < tolerance


def test_a_whole_checkpoint_loads(folder, batch, reference):
    loaded = checkpoint.load(folder)
    out = loaded.model(*batch)
    assert (
        largest_difference(
            out.start_logits, torch_output(reference, *batch).start_logits, batch[1] == 1
        )
        < 1e-4
    )
    assert loaded.files == ("config.json", "tokenizer.json", "model.safetensors")
    assert loaded.commit is None
    assert loaded.ignored == {}
    assert {len(digest) for digest in loaded.sha256().values()} == {64}


def test_position_ids_of_old_checkpoints_are_ignored_with_the_reason(folder, tensors):
    tensors["distilbert.embeddings.position_ids"] = np.arange(64)[None]
    write_safetensors(folder, tensors)
    assert "as a buffer" in checkpoint.load(folder).ignored["distilbert.embeddings.position_ids"]
    tensors["distilbert.embeddings.position_ids"] = np.arange(64)[None, ::-1].copy()
    write_safetensors(folder, tensors)
    with pytest.raises(ModelRejected, match="unexpected distilbert.embeddings.position_ids"):
        checkpoint.load(folder)


# ------------------------------------------------------------------------------ broken checkpoints


def change_tensors(change):
    def apply(folder):
        tensors = dict(weights.read(folder))
        change(tensors)
        write_safetensors(folder, {k: np.ascontiguousarray(v) for k, v in tensors.items()})

    return apply


def set_value(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = value

    return change_tensors(change)


def transpose(name):
    return change_tensors(lambda tensors: tensors.update({name: tensors[name].T}))


def malicious_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"w": Payload(folder / "canary")}, folder / "pytorch_model.bin")


def cut(name, size):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])

    return apply


def base_model(folder):
    change_tensors(lambda t: [t.pop("qa_outputs.weight"), t.pop("qa_outputs.bias")])(folder)


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def swapped_template(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["sep"], content["post_processor"]["cls"] = (
        content["post_processor"]["cls"],
        content["post_processor"]["sep"],
    )
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_unknown(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["[UNKX]"] = vocab.pop("[UNK]")
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def vocab_twice(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join([*VOCAB[:-1], "bob"]) + "\n")


def contradiction(folder):
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')


LAYER = "distilbert.transformer.layer.1"
BROKEN = {
    "tensor missing": (
        change_tensors(lambda t: t.pop("qa_outputs.bias")), "missing qa_outputs.bias"),
    "tensor extra": (
        change_tensors(lambda t: t.update({"classifier.weight": np.zeros(3, np.float32)})),
        "unexpected classifier.weight"),
    "tensor transposed": (
        transpose(f"{LAYER}.ffn.lin1.weight"),
        rf"{LAYER}.ffn.lin1.weight has shape \(32, 64\), the config needs \(64, 32\)"),
    "tensor NaN": (
        set_value(f"{LAYER}.attention.q_lin.bias", np.nan),
        f"{LAYER}.attention.q_lin.bias has 1 values that are not finite"),
    "tensor infinite": (
        set_value("distilbert.embeddings.word_embeddings.weight", np.inf),
        "word_embeddings.weight has 1 values that are not finite"),
    "tensor of integers": (
        change_tensors(lambda t: t.update({"qa_outputs.bias": np.zeros(2, np.int64)})),
        "qa_outputs.bias is stored as int64"),
    "base model": (base_model, "no question-answering head"),
    "config heads": (lambda f: write_config(f, n_heads=7), "config.json.*\n.*n_heads 7"),
    "config layers": (lambda f: write_config(f, n_layers=3), r"missing .*layer\.2\."),
    "config fewer layers": (
        lambda f: write_config(f, n_layers=1),
        rf"unexpected 16 tensors, all below {LAYER}\.: [\s\S]*2 layers, the config asks for 1"),
    "config positions": (
        lambda f: write_config(f, max_position_embeddings=512),
        r"position_embeddings.weight has shape \(64, 32\), the config needs \(512, 32\)"),
    "config vocabulary": (
        lambda f: write_config(f, vocab_size=30522), "vocab_size 30522"),
    "config model type": (
        lambda f: write_config(f, model_type="roberta"), "model_type is 'roberta'"),
    "config activation": (
        lambda f: write_config(f, activation="mish"), "activation is 'mish'"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (cut("config.json", 20), "config.json is not JSON"),
    "config deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "weights truncated": (cut("model.safetensors", 5000), "not a whole safetensors file"),
    "weights huge header": (huge_header, "not a whole safetensors file"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "malicious pickle": (malicious_pickle, "nothing was executed"),
    "vocabulary of another size": (
        lambda f: write_tokenizer(f, [*VOCAB, "zebra"]), f"{len(VOCAB) + 1} tokens"),
    "vocabulary too small": (
        lambda f: write_tokenizer(f, VOCAB[:-1]) or write_config(f, vocab_size=len(VOCAB) + 1_024),
        f"{len(VOCAB) - 1} tokens"),
    "tokenizer missing": (
        lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json nor vocab.txt"),
    "tokenizer truncated": (cut("tokenizer.json", 300), "tokenizer.json is not JSON"),
    "tokenizer empty": (
        lambda f: (f / "tokenizer.json").write_text("{}"), "its model is 'None', not WordPiece"),
    "tokenizer template": (swapped_template, "does not make"),
    "tokenizer without [UNK]": (without_unknown, r"it has no \[UNK\]"),
    "tokenizer vocab twice": (vocab_twice, "1 tokens twice"),
    "tokenizer contradiction": (contradiction, "lowercase True.*do_lower_case"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_before_compilation(folder, name, monkeypatch):
    def compiled(*args, **options):
        raise AssertionError("something was compiled")

    break_it, message = BROKEN[name]
    break_it(folder)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    with pytest.raises(ModelRejected, match=message) as caught:
        checkpoint.load(folder)
    assert caught.value.exit_code == 4
    assert str(folder) in str(caught.value)
    assert not (folder / "canary").exists()


def test_all_problems_of_the_tensors_come_in_one_error(folder):
    def change(tensors):
        tensors.pop("qa_outputs.bias")
        tensors["extra"] = np.zeros(2, np.float32)
        tensors["qa_outputs.weight"] = np.zeros((3, 32), np.float32)
        tensors["distilbert.embeddings.LayerNorm.bias"] = np.full(32, np.nan, np.float32)

    change_tensors(change)(folder)
    with pytest.raises(ModelRejected) as caught:
        checkpoint.load(folder)
    for part in ("missing qa_outputs.bias", "unexpected extra", "qa_outputs.weight has shape",
                 "LayerNorm.bias has 32 values"):  # fmt: skip
        assert part in str(caught.value)


def test_a_config_that_promises_the_sky_allocates_nothing(folder):
    write_config(folder, dim=65_536, hidden_dim=262_144, n_layers=256, n_heads=1024)
    with pytest.raises(ModelRejected, match=r"missing 4,0\d\d tensors, all below distilbert"):
        checkpoint.load(folder)


def test_values_too_large_for_the_dtype_are_refused(folder):
    set_value("qa_outputs.weight", 1e6)(folder)
    assert checkpoint.load(folder, dtype="bfloat16").model.dtype == "bfloat16"
    with pytest.raises(ModelRejected, match="qa_outputs.weight has values that do not fit float16"):
        checkpoint.load(folder, dtype="float16")


# -------------------------------------------------------------------------------------- tokenizers


def test_vocab_txt_alone_makes_the_same_tokens_as_tokenizer_json(folder):
    text = "Who lives in B\u00e9rlin? [SEP] \u6771\u4eac caf\u00e9s"
    whole = checkpoint.load(folder).tokenizer.encode(text)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    loaded = checkpoint.load(folder)
    alone = loaded.tokenizer.encode(text)
    assert (alone.ids, alone.offsets) == (whole.ids, whole.offsets)
    assert "vocab.txt" in loaded.files


def test_a_cased_vocabulary_stays_cased(folder):
    (folder / "tokenizer.json").unlink()
    vocab = [*VOCAB[:-1], "Bob"]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokenizer = checkpoint.load(folder).tokenizer
    assert tokenizer.encode("Bob bob", add_special_tokens=False).tokens == ["Bob", "bob"]


def test_a_loaded_tokenizer_makes_windows(folder):
    loaded = checkpoint.load(folder)
    (window,) = features.make([Example("1", "who?", "bob.")], loaded.tokenizer, max_length=64,
                              doc_stride=16)  # fmt: skip
    assert [VOCAB[i] for i in window.input_ids] == [
        "[CLS]", "who", "?", "[SEP]", "bob", ".", "[SEP]",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------- where it lies


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "a/b/c", "~/nowhere"])
def test_a_directory_that_is_missing_is_no_hub_id(name):
    with pytest.raises(UsageError, match="is missing"):
        checkpoint.load(name)


def test_usage_that_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="a revision belongs to a hub id"):
        checkpoint.load(folder, revision="main")
    with pytest.raises(UsageError, match="dtype 'int8' is not one of"):
        checkpoint.load(folder, dtype="int8")
    with pytest.raises(UsageError, match="float64 needs"):
        checkpoint.load(folder, dtype="float64")
    with pytest.raises(UsageError, match="is not a directory"):
        checkpoint.load(folder / "config.json")
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load("a" * 300)
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load("~nobody-of-this-name/x")
    with pytest.raises(UsageError, match="not a directory"):
        checkpoint.load(folder).model.save_pretrained(folder / "config.json")


@pytest.fixture
def hub_cache(tmp_path, folder, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with one repository, and no network."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny-squad"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "blobs")
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).symlink_to(repository / "blobs" / name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return commit


def test_a_hub_id_is_read_from_the_offline_cache(hub_cache, batch, reference):
    for revision in (None, "main", hub_cache):
        loaded = checkpoint.load("someone/tiny-squad", revision=revision)
        assert loaded.commit == hub_cache
    out = loaded.model(*batch)
    expected = torch_output(reference, *batch).start_logits
    assert largest_difference(out.start_logits, expected, batch[1] == 1) < 1e-4


def test_what_the_offline_cache_does_not_have_is_said(hub_cache):
    with pytest.raises(TryAgain, match="someone/other at main is not in the hub's cache"):
        checkpoint.load("someone/other")
    with pytest.raises(TryAgain, match="at v2 is not in the hub's cache"):
        checkpoint.load("someone/tiny-squad", revision="v2")


@pytest.mark.parametrize("name", ["..", "a b/c", "someone/..", "-x"])
def test_what_is_no_hub_id_is_said(hub_cache, name):
    with pytest.raises((UsageError, ModelRejected)):
        checkpoint.load(name)


def test_saving_leaves_no_half_file(folder, tmp_path, monkeypatch):
    model = checkpoint.load(folder).model

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(TryAgain, match="No space left"):
        model.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_half_filled_offline_cache_is_no_fault_of_the_checkpoint(hub_cache, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--tiny-squad" / "snapshots" / hub_cache
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(TryAgain, match="is not in the hub's cache"):
        checkpoint.load("someone/tiny-squad")


def test_settings_that_could_not_be_asked_for_are_not_guessed(hub_cache, tmp_path):
    """A vocabulary alone does not say whether it is a cased one."""
    repository = tmp_path / "hub" / "models--someone--tiny-squad"
    snapshot = repository / "snapshots" / hub_cache
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "vocab.txt").write_text("\n".join(VOCAB))
    with pytest.raises(TryAgain, match="is not in the hub's cache"):
        checkpoint.load("someone/tiny-squad")
    # The hub's own note that the repository has no such file.
    missing = repository / ".no_exist" / hub_cache
    missing.mkdir(parents=True)
    (missing / "tokenizer_config.json").touch()
    (missing / "tokenizer.json").touch()
    assert checkpoint.load("someone/tiny-squad").files[1] == "vocab.txt"


# -------------------------------------------------------------------------------------------- BERT


def test_a_bert_checkpoint_loads_by_its_model_type(bert_folder, batch):
    import transformers

    loaded = checkpoint.load(bert_folder)
    assert type(loaded.model).__name__ == "BertForQuestionAnswering"
    assert loaded.config.layer_norm_eps == 1e-3
    reference = transformers.BertForQuestionAnswering.from_pretrained(bert_folder).eval()
    expected = torch_output(reference, *batch)
    out = loaded.model(*batch)
    assert largest_difference(out.start_logits, expected.start_logits, batch[1] == 1) < 1e-4
    with pytest.raises(ModelRejected, match="is a checkpoint of BertForQuestionAnswering"):
        flaxqa.DistilBertForQuestionAnswering.from_pretrained(bert_folder)


@pytest.mark.parametrize("write", [write_torch, write_torch_legacy, write_hdf5, write_msgpack])
def test_a_bert_checkpoint_of_every_format_is_the_same(bert_folder, write):
    tensors = dict(weights.read(bert_folder))
    plain = checkpoint.load(bert_folder).model
    (bert_folder / "model.safetensors").unlink()
    write(bert_folder, tensors)
    for a, b in zip(
        jax.tree.leaves(nnx.state(plain)),
        jax.tree.leaves(nnx.state(checkpoint.load(bert_folder).model)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_what_old_bert_checkpoints_have_besides_is_ignored_with_the_reason(bert_folder):
    tensors = dict(weights.read(bert_folder))
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    renamed["bert.pooler.dense.weight"] = np.ones((32, 32), np.float32)
    renamed["bert.pooler.dense.bias"] = np.ones(32, np.float32)
    renamed["bert.embeddings.position_ids"] = np.arange(64)[None]
    write_safetensors(bert_folder, renamed)
    ignored = checkpoint.load(bert_folder).ignored
    assert sorted(ignored) == [
        "bert.embeddings.position_ids", "bert.pooler.dense.bias", "bert.pooler.dense.weight",
    ]  # fmt: skip
    assert "does not use it" in ignored["bert.pooler.dense.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.attention.self.key.bias"),
         "missing bert.encoder.layer.1.attention.self.key.bias"),
        (lambda t: t.pop("bert.embeddings.token_type_embeddings.weight"),
         "missing bert.embeddings.token_type_embeddings.weight"),
        (lambda t: t.update({"cls_predictions.bias": np.ones(3, np.float32)}),
         "unexpected cls_predictions.bias"),
        (lambda t: t.update({"qa_outputs.weight": np.ones((3, 32), np.float32)}),
         r"qa_outputs.weight has shape \(3, 32\)"),
        (lambda t: [t.pop(name) for name in ("qa_outputs.weight", "qa_outputs.bias")],
         "no question-answering head"),
        (lambda t: t["bert.encoder.layer.0.output.dense.bias"].fill(np.nan),
         "bert.encoder.layer.0.output.dense.bias has 32 values that are not finite"),
    ],
)  # fmt: skip
def test_a_broken_bert_checkpoint_is_refused_by_its_own_names(bert_folder, change, message):
    tensors = {name: tensor.copy() for name, tensor in weights.read(bert_folder).items()}
    change(tensors)
    write_safetensors(bert_folder, tensors)
    with pytest.raises(ModelRejected, match=message):
        checkpoint.load(bert_folder)


@pytest.mark.parametrize("layout", ["tf", "flax"])
def test_safetensors_of_another_framework_are_refused_by_name(folder, tensors, layout):
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": layout})
    with pytest.raises(ModelRejected, match=f"in the layout of {layout!r}"):
        checkpoint.load(folder)


def changed(**parts):
    """Another part of tokenizer.json, or a change of its model."""

    def act(content):
        others = {name: part for name, part in parts.items() if name != "model"}
        return content | others | {"model": content["model"] | parts.get("model", {})}

    return act


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": "((a+)+)+!"},
    "behavior": "Isolated",
    "invert": False,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(normalizer=REPLACE), "its normalizer is 'Replace'"),
        (changed(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 3}),
         "its normalizer has 'Replace'"),
        (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence"}]}),
         "its normalizer has 'Sequence'"),
        (changed(normalizer={"type": "BertNormalizer", "lowercase": "yes"}), "'lowercase'"),
        (changed(pre_tokenizer=SPLIT), "its pre_tokenizer is 'Split', not BertPreTokenizer"),
        (changed(pre_tokenizer=BYTES), "its pre_tokenizer is 'ByteLevel'"),
        (changed(pre_tokenizer=None), "its pre_tokenizer is 'None'"),
        (changed(post_processor=BYTES), "its post_processor is 'ByteLevel'"),
        (changed(post_processor=[1]), "its post_processor is no object"),
        (changed(decoder={"type": "Fuse"}), "its decoder is 'Fuse'"),
        (changed(model={"type": "BPE"}), "its model is 'BPE', not WordPiece"),
        (changed(model={"type": ["WordPiece"]}), "its model is"),
        (changed(model={"max_input_chars_per_word": 10**12}), "max_input_chars_per_word"),
        (changed(model={"vocab": ["a"]}), "its model has 'vocab'"),
        (changed(added_tokens=[{"id": 3, "content": "new"}]), "the ids from 0 on, each once"),
        (changed(added_tokens=[{"id": 2, "content": "[SEP]"}]), "an added token and another"),
        (changed(added_tokens=[{"id": 3}]), "an added token has no text"),
    ],
)  # fmt: skip
def test_what_is_not_berts_tokenizer_is_refused_before_the_library_has_it(
    folder, monkeypatch, change, told
):
    import tokenizers

    path = folder / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    monkeypatch.delattr(tokenizers.Tokenizer, "from_str")
    with pytest.raises(ModelRejected, match=re.escape(told)):
        checkpoint.load(folder)


def test_two_tokens_of_one_id_are_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"][VOCAB[-1]] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ModelRejected, match="do not have the ids from 0 on, each once"):
        checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [5, "float8", [], "int32", object])
def test_what_is_no_dtype_is_refused(folder, dtype):
    with pytest.raises(UsageError, match="is not one of float32"):
        checkpoint.load(folder, dtype=dtype)


def test_a_vocabulary_has_a_limit(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    monkeypatch.setattr(tokens, "VOCABULARY_LIMIT", 100)
    with pytest.raises(ModelRejected, match=r"vocab.txt has \d+ bytes, more than 100"):
        checkpoint.load(folder)


def test_files_that_changed_since_they_were_read_have_no_hash(folder):
    loaded = checkpoint.load(folder)
    before = loaded.sha256()
    path = folder / "model.safetensors"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelRejected, match="has changed since it was loaded"):
        loaded.sha256()
    path.unlink()
    with pytest.raises(ModelRejected, match="cannot be read"):
        loaded.sha256()
    assert len(before) == 3
