"""Every format gives the same tensors; nothing in a file is executed, nothing outside read."""

import io
import json
import os
import pickle
import random
import struct
import zipfile

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import serialization

from flaxqa import torchfile, weights
from flaxqa.errors import ModelRejected


def leaf(name, kernel, norm, embedding):
    *module, last = name.split(".")
    if "LayerNorm" in name or "layer_norm" in name:
        last = norm[last]
    elif "embeddings" in name:
        last = embedding[module[-1]]
    elif last == "weight":
        last = kernel
    return module, last


def write_safetensors(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / weights.SAFETENSORS, {"format": "pt"})


def write_shards(folder, tensors):
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in parts.items():
        safetensors.numpy.save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / weights.SHARDED).write_text(json.dumps(index))


def torch_tensors(tensors):
    return {name: torch.tensor(tensor) for name, tensor in tensors.items()}


def write_torch(folder, tensors, **options):
    torch.save(torch_tensors(tensors), folder / weights.TORCH, **options)


def write_torch_legacy(folder, tensors):
    write_torch(folder, tensors, _use_new_zipfile_serialization=False)


def write_torch_protocol_4(folder, tensors):
    write_torch(folder, tensors, pickle_protocol=4)


EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def write_msgpack(folder, tensors):
    """As FlaxDistilBertForQuestionAnswering of transformers 4.57 lays it out."""
    tree = {}
    embedding = dict.fromkeys(EMBEDDINGS, "embedding")
    for name, tensor in tensors.items():
        module, last = leaf(name, "kernel", {"weight": "scale", "bias": "bias"}, embedding)
        node = tree
        for part in module:
            node = node.setdefault(part, {})
        node[last] = tensor.T if last == "kernel" else tensor
    (folder / weights.MSGPACK).write_bytes(serialization.msgpack_serialize(tree))


def write_hdf5(folder, tensors, model_name="tf_distil_bert_for_question_answering/"):
    """As TFDistilBertForQuestionAnswering of transformers 4.57 lays it out."""
    embedding = {**dict.fromkeys(EMBEDDINGS, "embeddings"), "word_embeddings": "weight"}
    with h5py.File(folder / weights.HDF5, "w") as file:
        file.attrs["layer_names"] = ["distilbert", "qa_outputs", "dropout_19"]
        file.create_group("dropout_19")
        for name, tensor in tensors.items():
            module, last = leaf(name, "kernel", {"weight": "gamma", "bias": "beta"}, embedding)
            path = "/".join(module).replace("layer/", "layer_._")
            array = tensor.T if last == "kernel" else tensor
            file[f"{module[0]}/{model_name}{path}/{last}:0"] = array


def write_hdf5_never_called(folder, tensors):
    """A model that was built but never called leaves its own name out of the paths."""
    write_hdf5(folder, tensors, model_name="")


WRITERS = [
    write_safetensors,
    write_shards,
    write_torch,
    write_torch_legacy,
    write_torch_protocol_4,
    write_msgpack,
    write_hdf5,
    write_hdf5_never_called,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_tensors(tmp_path, tensors, write):
    write(tmp_path, tensors)
    got = weights.read(tmp_path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor)


@pytest.mark.parametrize("write", [write_torch, write_torch_legacy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torch_files_of_other_floats(tmp_path, tensors, write, dtype):
    torch.save(
        {name: tensor.to(dtype) for name, tensor in torch_tensors(tensors).items()},
        tmp_path / weights.TORCH,
        _use_new_zipfile_serialization=write is write_torch,
    )
    got = weights.read(tmp_path)
    for name, tensor in torch_tensors(tensors).items():
        np.testing.assert_array_equal(
            got[name].astype(np.float64), tensor.to(dtype).double().numpy()
        )


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_parameters_of_torch_files(tmp_path, legacy):
    base = torch.arange(24.0).reshape(4, 6)
    torch.save(
        {"t": base.T, "row": base[2], "p": torch.nn.Parameter(base), "scalar": torch.tensor(7.0)},
        tmp_path / weights.TORCH,
        _use_new_zipfile_serialization=not legacy,
    )
    got = weights.read(tmp_path)
    np.testing.assert_array_equal(got["t"], base.numpy().T)
    np.testing.assert_array_equal(got["row"], base.numpy()[2])
    np.testing.assert_array_equal(got["p"], base.numpy())
    assert got["scalar"].shape == ()
    assert got["scalar"] == 7


def test_a_state_dict_with_metadata_is_read(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / weights.TORCH)
    assert weights.read(tmp_path).keys() == {"weight", "bias"}


def test_bfloat16_safetensors_are_read(tmp_path, tensors):
    import safetensors.torch

    stored = {name: tensor.bfloat16() for name, tensor in torch_tensors(tensors).items()}
    safetensors.torch.save_file(stored, tmp_path / weights.SAFETENSORS)
    for name, tensor in weights.read(tmp_path).items():
        np.testing.assert_array_equal(tensor.astype(np.float32), stored[name].float().numpy())


def test_layer_norms_of_2018_have_their_names_of_today(tmp_path):
    old = {"LayerNorm.gamma": np.ones(2, np.float32), "LayerNorm.beta": np.zeros(2, np.float32)}
    write_safetensors(tmp_path, old)
    assert weights.read(tmp_path).keys() == {"LayerNorm.weight", "LayerNorm.bias"}


def test_a_damaged_file_is_an_error_even_if_another_format_is_there(tmp_path, tensors):
    write_torch(tmp_path, tensors)
    (tmp_path / weights.SAFETENSORS).write_bytes(b"cut")
    with pytest.raises(ModelRejected, match="model.safetensors"):
        weights.read(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ModelRejected, match="has no weights: none of model.safetensors"):
        weights.read(tmp_path)


# ---------------------------------------------------------------------------------------- attacks


class Payload:
    """Unpickling it would leave a file, the proof that something was executed."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def as_torch_zip(path, data, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/data/{name}", content)


def storage_pickle(offset=0, shape=(2,), strides=(1,), elements=2, key="0", kind="FloatStorage"):
    """The opcodes of {"w": a view of a storage}, with the numbers a test wants."""

    def push(value):
        if isinstance(value, tuple):
            return b"(" + b"".join(map(push, value)) + b"t"
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value)) + value.encode()
        return b"\x8a\x08" + struct.pack("<q", value)

    storage = (
        b"(" + push("storage") + f"ctorch\n{kind}\n".encode() + push(key) + push("cpu")
        + push(elements) + b"tQ"
    )  # fmt: skip
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + push(offset) + push(shape)
        + push(strides) + b"\x89" + b"}" + b"tR"
    )  # fmt: skip
    return b"\x80\x02}" + push("w") + tensor + b"s."


def test_the_handmade_pickle_is_a_good_one(tmp_path):
    as_torch_zip(tmp_path / weights.TORCH, storage_pickle(), **{"0": struct.pack("<2f", 1, 2)})
    assert weights.read(tmp_path)["w"].tolist() == [1.0, 2.0]


def attacks(canary):
    good = struct.pack("<2f", 1, 2)
    payload = Payload(canary)
    yield "system", lambda path: torch.save({"w": payload}, path)
    yield (
        "legacy system",
        lambda path: torch.save({"w": payload}, path, _use_new_zipfile_serialization=False),
    )
    yield "raw pickle", lambda path: path.write_bytes(pickle.dumps(payload))
    yield "eval", lambda path: as_torch_zip(path, b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.")
    yield (
        "stack global",
        lambda path: as_torch_zip(path, b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R."),
    )
    yield "inst", lambda path: as_torch_zip(path, b"(X\x02\x00\x00\x00lsiposix\nsystem\n.")
    yield "torch attribute", lambda path: as_torch_zip(path, b"ctorch\nload\n.")
    yield "dotted name", lambda path: as_torch_zip(path, b"ctorch\nFloatStorage.__init__\n.")
    yield "memo bomb", lambda path: as_torch_zip(path, b"\x80\x02Nr\xff\xff\xff\x7f.")
    laughs = b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple that holds 1 2^60 times
    yield "laughing global", lambda path: as_torch_zip(path, laughs + b"h\x00\x93.")
    yield "laughing key", lambda path: as_torch_zip(path, b"}" + laughs + b"0h\x00K\x01s.")
    yield "laughing call", lambda path: as_torch_zip(path, laughs + b")R.")
    yield "laughing storage", lambda path: as_torch_zip(path, laughs + b"Q.")
    yield "extension", lambda path: as_torch_zip(path, b"\x80\x02\x82\x01.")
    yield (
        "build on a tensor",
        lambda path: as_torch_zip(path, storage_pickle()[:-2] + b"}b" + b"s.", **{"0": good}),
    )
    yield (
        "past the storage",
        lambda path: as_torch_zip(path, storage_pickle(offset=1), **{"0": good}),
    )
    yield (
        "stride past the storage",
        lambda path: as_torch_zip(path, storage_pickle(strides=(10**9,)), **{"0": good}),
    )
    yield (
        "negative stride",
        lambda path: as_torch_zip(path, storage_pickle(offset=1, strides=(-1,)), **{"0": good}),
    )
    yield (
        "stride 0 bomb",
        lambda path: as_torch_zip(
            path, storage_pickle(shape=(10**15,), strides=(0,)), **{"0": good}
        ),
    )
    yield (
        "storage of another size",
        lambda path: as_torch_zip(path, storage_pickle(elements=10**12), **{"0": good}),
    )
    yield "storage key is a path", lambda path: as_torch_zip(path, storage_pickle(key="../../x"))
    yield (
        "unknown storage",
        lambda path: as_torch_zip(path, storage_pickle(kind="QInt8Storage"), **{"0": good}),
    )
    yield "missing storage", lambda path: as_torch_zip(path, storage_pickle())
    yield "not tensors", lambda path: torch.save({"epoch": 3}, path)
    yield "not a dict", lambda path: torch.save([torch.ones(2)], path)
    yield "empty", lambda path: path.write_bytes(b"")


NAMES = [name for name, _ in attacks("")]


@pytest.mark.parametrize("name", NAMES)
def test_a_torch_file_that_asks_for_more_than_tensors_is_refused(tmp_path, name):
    canary = tmp_path / "canary"
    path = tmp_path / weights.TORCH
    dict(attacks(canary))[name](path)
    with pytest.raises(ModelRejected, match=r"pytorch_model.bin is (not a file of torch|empty)"):
        weights.read(tmp_path)
    assert not canary.exists()


def test_what_a_malicious_pickle_asked_for_is_named(tmp_path):
    torch.save({"w": Payload(tmp_path / "canary")}, tmp_path / weights.TORCH)
    with pytest.raises(ModelRejected, match=r"asks for (posix|nt).system; nothing was executed"):
        weights.read(tmp_path)


def test_a_compressed_torch_archive_is_refused(tmp_path, tensors):
    write_torch(tmp_path, tensors)
    with zipfile.ZipFile(tmp_path / weights.TORCH) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / weights.TORCH, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelRejected, match="compressed"):
        weights.read(tmp_path)


@pytest.mark.parametrize("write", WRITERS[:1] + WRITERS[2:], ids=lambda write: write.__name__)
def test_mutants_of_a_good_file_load_or_are_refused(tmp_path, write):
    """Cut, flipped and shuffled files: the one error, or tensors; never another exception."""
    small = {
        "distilbert.embeddings.LayerNorm.weight": np.ones(3, np.float32),
        "qa_outputs.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "qa_outputs.bias": np.zeros(2, np.float32),
    }
    write(tmp_path, small)
    (path,) = weights.find(tmp_path)
    good = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150 if "hdf5" in write.__name__ else 400):
        mutant = bytearray(good)
        match rng.randrange(3):
            case 0:
                del mutant[rng.randrange(len(mutant)) :]
            case 1:
                for _ in range(rng.randint(1, 4)):
                    mutant[rng.randrange(len(mutant))] = rng.randrange(256)
            case 2:
                at = rng.randrange(len(mutant))
                mutant[at:at] = rng.randbytes(rng.randint(1, 8))
        path.write_bytes(mutant)
        try:
            weights.read(tmp_path)
        except ModelRejected:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("kind", ["external", "virtual", "soft link", "external link", "chunks"])
def test_hdf5_that_reads_elsewhere_is_refused(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.arange(4.0)
    with h5py.File(folder / weights.HDF5, "w") as file:
        group = file.create_group("qa_outputs")
        match kind:
            case "external":
                group.create_dataset("kernel:0", (4,), "f4", external=[(str(secret), 0, 16)])
            case "virtual":
                layout = h5py.VirtualLayout((4,), "f8")
                layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4,))
                group.create_virtual_dataset("kernel:0", layout)
            case "soft link":
                group["kernel:0"] = h5py.SoftLink("/elsewhere")
            case "external link":
                group["kernel:0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
            case "chunks":  # 1.4 kB on disk, 256 GB when read
                group.create_dataset("kernel:0", (2**36,), "f4", chunks=(2**20,))
    with pytest.raises(ModelRejected, match=r"tf_model.h5: /qa_outputs/kernel:0"):
        weights.read(folder)


def test_hdf5_that_holds_its_groups_many_times_is_refused(tmp_path):
    """Twenty kilobytes of hard links are a million paths."""
    with h5py.File(tmp_path / weights.HDF5, "w") as file:
        inner = file.create_group("level0")
        for level in range(1, 40):
            outer = file.create_group(f"level{level}")
            outer["a"] = outer["b"] = inner
            inner = outer
    with pytest.raises(ModelRejected, match="under another name too"):
        weights.read(tmp_path)


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_two_tensors_for_one_place_are_refused(tmp_path, write):
    one, other = np.ones(2, np.float32), np.zeros(2, np.float32)
    write(tmp_path, {"a.LayerNorm.weight": one, "a.LayerNorm.gamma": other})
    with pytest.raises(ModelRejected, match=r"two tensors would be called a\.LayerNorm\.weight"):
        weights.read(tmp_path)


def test_msgpack_that_is_not_a_tree_of_arrays_is_refused(tmp_path):
    for content in (7, np.ones(3), {"a": "text"}, {"a": {"b": None}}):
        (tmp_path / weights.MSGPACK).write_bytes(serialization.msgpack_serialize(content))
        with pytest.raises(ModelRejected, match="flax_model.msgpack"):
            weights.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", "a\\b"]
)
def test_a_shard_that_is_not_a_bare_name_is_refused(tmp_path, name):
    (tmp_path / weights.SHARDED).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelRejected, match="not a bare file name"):
        weights.read(tmp_path)


def test_a_shard_index_that_does_not_fit_its_shards_is_refused(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    index = json.loads((tmp_path / weights.SHARDED).read_text())
    index["weight_map"]["extra.weight"] = index["weight_map"].pop("qa_outputs.bias")
    (tmp_path / weights.SHARDED).write_text(json.dumps(index))
    with pytest.raises(ModelRejected, match=r"extra.weight is not in[\s\S]*qa_outputs.bias is in"):
        weights.read(tmp_path)
    for broken in ([], {}, {"weight_map": 7}, {"weight_map": {"w": 7}}):
        (tmp_path / weights.SHARDED).write_text(json.dumps(broken))
        with pytest.raises(ModelRejected, match="not an index"):
            weights.read(tmp_path)


def test_links_out_of_the_directory_are_refused_and_the_hub_caches_own_are_not(tmp_path, tensors):
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    outside = tmp_path / "outside"
    for folder in (blobs, snapshot, outside):
        folder.mkdir(parents=True)
    write_safetensors(blobs, tensors)
    (snapshot / weights.SAFETENSORS).symlink_to(blobs / weights.SAFETENSORS)
    assert weights.read(snapshot).keys() == tensors.keys()
    (outside / weights.SAFETENSORS).symlink_to(blobs / weights.SAFETENSORS)
    with pytest.raises(ModelRejected, match="leads outside"):
        weights.read(outside)
    (snapshot / weights.SAFETENSORS).unlink()
    (snapshot / weights.SAFETENSORS).symlink_to("/dev/zero")
    with pytest.raises(ModelRejected, match="leads outside"):
        weights.read(snapshot)


def test_a_directory_or_pipe_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / weights.SAFETENSORS).mkdir()
    with pytest.raises(ModelRejected, match="is not a file"):
        weights.read(tmp_path)
    (tmp_path / weights.SAFETENSORS).rmdir()
    os.mkfifo(tmp_path / weights.SAFETENSORS)
    with pytest.raises(ModelRejected, match="is not a file"):
        weights.read(tmp_path)


def test_reading_torch_files_imports_no_torch(tmp_path, tensors):
    import subprocess
    import sys

    write_torch_legacy(tmp_path, tensors)
    code = (
        "import sys; sys.modules['torch'] = None; from flaxqa import weights; from pathlib import "
        f"Path; print(len(weights.read(Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(tensors)


def test_interpreting_ends_where_the_pickle_does():
    file = io.BytesIO(pickle.dumps({"a": (1, 2.5, "x", None, True)}, 2) + b"rest")
    assert torchfile.interpret(file) == {"a": (1, 2.5, "x", None, True)}
    assert file.read() == b"rest"


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 3), (1, 1)), ((4, 3), (3, 3)), ((4, 3), (6, 1)), ((4, 3), (0, 1)), ((6,), (2,)),
     ((2, 3), (3, 2)), ((1, 6), (1, 2))],
)  # fmt: skip
def test_strides_that_share_or_skip_elements_are_refused(shape, strides):
    storage = torchfile.Storage("0", np.dtype(np.float32), 64)
    with pytest.raises(ValueError, match="skips or shares elements"):
        torchfile.View(storage, 0, shape, strides).read(np.zeros(64, np.float32))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 3), (3, 1)), ((4, 3), (1, 4)), ((2, 3, 4), (4, 8, 1)), ((1, 6), (99, 1)), ((), ()),
     ((0, 3), (3, 1)), ((6, 1), (1, 0))],
)  # fmt: skip
def test_dense_strides_in_any_order_are_read(shape, strides):
    torch = pytest.importorskip("torch")
    flat = np.arange(64, dtype=np.float32)
    got = torchfile.View(torchfile.Storage("0", flat.dtype, 64), 5, shape, strides).read(flat)
    wanted = torch.as_strided(torch.from_numpy(flat), shape, strides, 5)
    np.testing.assert_array_equal(got, wanted.numpy())


def moved_data(content, offset, to):
    """An HDF5 file whose data set at an address is said to lie at another."""
    address, other = offset.to_bytes(8, "little"), to.to_bytes(8, "little")
    assert content.count(address) == 1
    return content.replace(address, other)


def test_a_data_set_that_points_into_another_is_refused(tmp_path):
    path = tmp_path / weights.HDF5
    with h5py.File(path, "w") as file:
        for name in ("one", "two"):
            file.create_dataset(f"bert/bert/{name}/kernel:0", data=np.ones((8, 8), np.float32))
        offsets = [file[f"bert/bert/{name}/kernel:0"].id.get_offset() for name in ("one", "two")]
        header = h5py.h5o.get_info(file["bert/bert/one"].id).addr
    content = path.read_bytes()
    assert weights.read_hdf5(path).keys() == {"bert.one.weight", "bert.two.weight"}
    for to in (offsets[0], offsets[0] + 64, header):
        path.write_bytes(moved_data(content, offsets[1], to))
        with pytest.raises(ModelRejected, match="have bytes in common"):
            weights.read_hdf5(path)


def test_names_and_places_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "HEADER_LIMIT", 1_000)
    many = {f"a{number}": np.zeros(1, np.float32) for number in range(100)}
    safetensors.numpy.save_file(many, tmp_path / weights.SAFETENSORS)
    with pytest.raises(ModelRejected, match="has a header of 5,.* bytes, more than 1,000"):
        weights.read(tmp_path)
    (tmp_path / weights.SAFETENSORS).rename(tmp_path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(many, "x.safetensors")}
    (tmp_path / weights.SHARDED).write_text(json.dumps(index))
    with pytest.raises(ModelRejected, match="more than 1,000"):
        weights.read(tmp_path)


@pytest.mark.parametrize("name", ["\ud800.safetensors", "n" * 300, "loop"])
def test_a_shard_of_a_name_that_no_system_has_is_refused(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / weights.SHARDED).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelRejected, match="cannot be read"):
        weights.read(tmp_path)


def test_weights_that_are_a_link_to_themselves_are_refused(tmp_path):
    (tmp_path / weights.SAFETENSORS).symlink_to(weights.SAFETENSORS)
    with pytest.raises(ModelRejected, match="cannot be read"):
        weights.read(tmp_path)
