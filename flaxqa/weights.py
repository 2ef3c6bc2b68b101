"""The weight files of a checkpoint: four formats in, one mapping of torch names to arrays out.

A file that stands in the place of another (a pointer of Git LFS, an HTML page) is told of as that.

Nothing in a file is executed. Pickles (`pytorch_model.bin`) are not unpickled but interpreted, in
`flaxqa.torchfile`. HDF5 links, external and virtual data sets, which can read any file of the host,
are refused.

Layouts: safetensors and torch as transformers saves them; `tf_model.h5` as the classes
TFBertForQuestionAnswering and TFDistilBertForQuestionAnswering of transformers 4.57 do, and
`flax_model.msgpack` as FlaxBertForQuestionAnswering and FlaxDistilBertForQuestionAnswering.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from flaxqa import files, torchfile
from flaxqa.errors import ModelRejected, all_problems

Tensors = dict[str, np.ndarray]
Value = TypeVar("Value")

# In order of trust. The first one found is read; a fault in it is an error, never a reason to try
# the next.
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
MSGPACK, HDF5 = "flax_model.msgpack", "tf_model.h5"
JSON_LIMIT = 16 << 20  # bytes; bert-base-uncased's tokenizer.json has 0.7 MB
INDEX = ".index.json"  # of shards: model.safetensors.index.json
SHARDED = SAFETENSORS + INDEX
HEADER_LIMIT = 4 << 20  # bytes of names and places; DistilBERT's are 10 kB
FORMATS = (SAFETENSORS, SHARDED, MSGPACK, HDF5, TORCH, TORCH + INDEX)
# What a training run leaves beside the weights, in files of the same formats.
NO_WEIGHTS = (
    "training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "adapter_model.*",
)  # fmt: skip

# What other frameworks call the arrays that PyTorch calls `weight` and `bias`.
LEAF_NAMES = {
    "kernel": "weight",
    "embedding": "weight",
    "embeddings": "weight",
    "scale": "weight",
    "gamma": "weight",
    "beta": "bias",
    "weight": "weight",
    "bias": "bias",
}

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def find(directory: Path, name: str | None = None) -> list[Path]:
    """The weight files that `read` would read: one, or the index and its shards.

    Args:
      directory: of the checkpoint.
      name: of the file or the index; when left out the first of FORMATS, or else the only other
        file of such a format.

    Raises:
      ModelRejected: there is none, or one lies outside the directory.
    """
    if name is None:
        usual = (each for each in FORMATS if os.path.lexists(directory / each))
        name = next(usual, None) or only_file(directory)
    path = inside(directory, name)
    reader_of(path)
    if not name.endswith(INDEX):
        return [path]
    shards = sorted(set(weight_map(path).values()))
    return [path, *(inside(directory, shard) for shard in shards)]


def is_weights(name: str) -> bool:
    """Whether a file's name ends as one of weights, or as an index of shards."""
    return Path(name.removesuffix(INDEX)).suffix in READERS


def candidates(names: Iterable[str]) -> list[str]:
    """Those that may be weights, and are not what training leaves beside them."""
    return [
        name
        for name in names
        if is_weights(name) and not any(fnmatch.fnmatch(name, one) for one in NO_WEIGHTS)
    ]


def only_file(directory: Path) -> str:
    """The one file of a known format, whatever it is called."""
    names = sorted(path.name for path in directory.iterdir())
    found = candidates(names)
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelRejected(
            f"{directory} has several files that may be its weights ({', '.join(found[:5])}), none "
            "of them under a usual name; say which by --weights FILE"
        )
    reason = f"none of {', '.join(FORMATS)}"
    if (directory / "adapter_config.json").exists():
        base = read_json(directory, "adapter_config.json").get("base_model_name_or_path")
        reason = (
            f"it is an adapter (LoRA) of {base!r} and not a whole model; merge the two with "
            "`merge_and_unload()` of peft and save the result"
        )
    elif onnx := [name for name in names if name.endswith(".onnx") or name == "onnx"]:
        reason = (
            f"only ONNX files ({onnx[0]}), which are programs; take the checkpoint that they were "
            "exported from"
        )
    raise ModelRejected(f"{directory} has no weights: {reason}")


def read(directory: Path, name: str | None = None) -> Tensors:
    """Every tensor of the checkpoint under its PyTorch name and in PyTorch's layout; see `find`.

    Raises:
      ModelRejected: the file is damaged, of another layout or asks for anything but tensors.
    """
    first, *shards = find(directory, name)
    reader = reader_of(first)
    return read_shards(first, shards) if shards else reader(first)


def reader_of(path: Path) -> Callable[[Path], Tensors]:
    """What reads a weight file, or the shards of an index, by the end of its name."""
    if not is_weights(path.name):
        raise ModelRejected(f"{path} is no weight file; those end in {', '.join(READERS)}")
    return READERS[Path(path.name.removesuffix(INDEX)).suffix]


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object out of a file of the directory.

    Raises:
      ModelRejected: it is none, or too large.
    """
    path = inside(directory, name)
    if path.stat().st_size > JSON_LIMIT:
        raise ModelRejected(
            f"{path} has {path.stat().st_size:,} bytes, more than the {JSON_LIMIT:,} that are read"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelRejected(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelRejected(f"{path} is not a JSON object")
    return content


def inside(directory: Path, name: str) -> Path:
    """The path of a regular file of the directory (or of the hub cache behind it), by bare name.

    Raises:
      ModelRejected: `name` is a path, or leads outside, or to something that is not a file.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelRejected(f"{directory}: {name!r} is not a bare file name")
    root, path = directory.resolve(), directory / name
    try:
        target = path.resolve()
        target.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # a link to itself, a name of no system
        raise ModelRejected(f"{directory}: {name[:200]!a} cannot be read: {error}") from error
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub cache keeps files in blobs and links to them
        allowed.append(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise ModelRejected(f"{path} is a link that leads outside its directory")
    if not target.is_file():
        raise ModelRejected(f"{path} is {'not a file' if target.exists() else 'missing'}")
    with path.open("rb") as file:
        start = file.read(256)
    if (reason := files.stands_in(start) if start else "is empty; fetch it again") is not None:
        raise ModelRejected(f"{path} {reason}")
    return path


def torch_name(path: tuple[str, ...]) -> str:
    """('qa_outputs', 'kernel') -> 'qa_outputs.weight'."""
    *module, leaf = path
    return ".".join((*module, LEAF_NAMES.get(leaf, leaf)))


def new_name(name: str) -> str:
    """LayerNorm's `gamma` and `beta` of checkpoints before 2019 under today's names."""
    module, dot, leaf = name.rpartition(".")
    return module + dot + {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)


def unique(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """The pairs as a dict.

    Raises:
      ValueError: two have one name, so that one of them would be lost.
    """
    found: dict[str, Value] = {}
    for name, value in named:
        if name in found:
            raise ValueError(f"two tensors would be called {name[:200]}")
        found[name] = value
    return found


def renamed(tensors: Iterable[tuple[str, np.ndarray]]) -> Tensors:
    return unique((new_name(name), tensor) for name, tensor in tensors)


# ------------------------------------------------------------------------------------ safetensors


def read_safetensors(path: Path) -> Tensors:
    with path.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if HEADER_LIMIT < header < path.stat().st_size:
        raise ModelRejected(f"{path} has a header of {header:,} bytes, more than {HEADER_LIMIT:,}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            layout = (file.metadata() or {}).get("format")
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ModelRejected(f"{path} is not a whole safetensors file: {error}") from error
    if layout in ("tf", "flax"):
        raise ModelRejected(f"{path} is in the layout of {layout!r}, only PyTorch's is read")
    tensors = []
    for name, entry in entries:
        if (dtype := SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise ModelRejected(f"{path}: {name} is stored as {entry['dtype']}, which is not read")
        tensors.append((name, np.frombuffer(entry["data"], dtype).reshape(entry["shape"])))
    try:
        return renamed(tensors)
    except ValueError as error:
        raise ModelRejected(f"{path}: {error}") from error


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, out of an index of shards."""
    if (size := index.stat().st_size) > HEADER_LIMIT:
        raise ModelRejected(f"{index} has {size:,} bytes, more than {HEADER_LIMIT:,}")
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError("a file name is not a string")
        return unique((new_name(name), file) for name, file in names.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelRejected(f"{index} is not an index of weight files: {error}") from error


def read_shards(index: Path, shards: list[Path]) -> Tensors:
    wanted = weight_map(index)
    tensors: Tensors = {}
    problems = []
    for shard in shards:
        for name, tensor in reader_of(shard)(shard).items():
            if wanted.get(name) != shard.name:
                problems.append(
                    f"{name} is in {shard.name}, the index has it in {wanted.get(name)}"
                )
            tensors[name] = tensor
    problems += [f"{name} is not in {wanted[name]}" for name in wanted.keys() - tensors.keys()]
    if problems:
        raise ModelRejected(all_problems(f"{index} does not fit its shards", sorted(problems)))
    return tensors


# ------------------------------------------------------------------------------------------ torch


def read_torch(path: Path) -> Tensors:
    try:
        with path.open("rb") as file:
            return renamed(torchfile.tensors_of(file).items())
    # The parts of a damaged file fail in many ways; each one is the same news to the user.
    except Exception as error:
        raise ModelRejected(f"{path} is not a file of torch tensors: {error}") from error


# ------------------------------------------------------------------------------------------- flax


def read_msgpack(path: Path) -> Tensors:
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        return from_kernels(flatten(tree))
    # msgpack reports damage with many types, OverflowError and TypeError among them.
    except Exception as error:
        raise ModelRejected(f"{path} is not a msgpack file of arrays: {error}") from error


def flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if not isinstance(tree, dict):
        if not (path and isinstance(tree, np.ndarray)):
            raise ValueError(f"{'/'.join(path) or 'the file'} is {type(tree).__name__}, no array")
        yield path, tree
        return
    for name, value in tree.items():
        yield from flatten(value, (*path, str(name)))


def from_kernels(leaves: Iterable[tuple[tuple[str, ...], np.ndarray]]) -> Tensors:
    """Arrays of Flax or Keras under torch names; a kernel [in, out] becomes a weight [out, in]."""
    return unique(
        (torch_name(path), array.T if path[-1] == "kernel" else array) for path, array in leaves
    )


# ------------------------------------------------------------------------------------------- hdf5


def read_hdf5(path: Path) -> Tensors:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            headers: set[int] = set()
            found = dict(datasets(file, headers))
            extents = [(*extent, name) for name, (extent, _) in found.items()]
            refuse_overlaps(extents + [(address, address + 1, "a header") for address in headers])
            return from_kernels((keras_path(name), array) for name, (_, array) in found.items())
    except ModelRejected:
        raise
    except Exception as error:
        raise ModelRejected(f"{path} is not an HDF5 file of weights: {error}") from error


def datasets(
    group: Any, seen: set[int]
) -> Iterator[tuple[str, tuple[tuple[int, int], np.ndarray]]]:
    """Every data set below the group, with where its bytes are; only what lies in this file, once.

    `seen` are the addresses met so far: with hard links, a small file can hold a group 2^40 times.
    """
    import h5py

    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ModelRejected(f"{group.file.filename}: {where} is a link to another place")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            raise ModelRejected(f"{group.file.filename}: {where} is there under another name too")
        seen.add(address)
        if isinstance(item, h5py.Group):
            yield from datasets(item, seen)
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise ModelRejected(f"{group.file.filename}: {where} lies in another file")
            if item.chunks or item.nbytes > item.id.get_storage_size() or item.dtype.kind != "f":
                raise ModelRejected(
                    f"{group.file.filename}: {where} is not a plain array of floats"
                )
            offset = item.id.get_offset()
            if item.nbytes and offset is None:
                raise ModelRejected(f"{group.file.filename}: {where} is stored in its header")
            yield where, ((offset or 0, (offset or 0) + item.nbytes), item[()])
        else:
            raise ModelRejected(f"{group.file.filename}: {where} is neither group nor data set")


def refuse_overlaps(extents: list[tuple[int, int, str]]) -> None:
    """Raises: ValueError: two of (first byte, the one after the last, name) share bytes."""
    there = sorted(one for one in extents if one[0] < one[1])
    for (_, end, name), (begin, _, other) in itertools.pairwise(there):
        if begin < end:
            raise ValueError(f"{name[:200]} and {other[:200]} have bytes in common")


def keras_path(name: str) -> tuple[str, ...]:
    """The module path of a Keras weight.

    '/distilbert/tf_distil_bert_for_question_answering/distilbert/transformer/layer_._0/ffn/lin1/
    kernel:0' -> ('distilbert', 'transformer', 'layer', '0', 'ffn', 'lin1', 'kernel'). The first
    part is the layer's group; the model's own name is there unless the model was never called.
    """
    _, *parts = name.strip("/").removesuffix(":0").replace("_._", "/").split("/")
    if len(parts) > 1 and parts[0] not in ("distilbert", "bert", "qa_outputs"):
        del parts[0]
    return tuple(parts)


# By the end of a file's name.
READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": read_safetensors,
    ".msgpack": read_msgpack,
    ".h5": read_hdf5,
    **dict.fromkeys((".bin", ".pt", ".pth"), read_torch),
}
