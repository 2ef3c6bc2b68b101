"""The weight files of a checkpoint: four formats in, one mapping of torch names to arrays out.

Nothing in a file is executed. Pickles (`pytorch_model.bin`) are not unpickled: their opcodes are
read with `pickletools` and interpreted here, where the only things that can be built are dicts,
tuples and tensors. HDF5 links, external and virtual data sets, which can read any file of the host,
are refused.

Layouts: safetensors and torch as transformers saves them; `tf_model.h5` as the classes
TFBertForQuestionAnswering and TFDistilBertForQuestionAnswering of transformers 4.57 do, and
`flax_model.msgpack` as FlaxBertForQuestionAnswering and FlaxDistilBertForQuestionAnswering.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from flaxqa.errors import ModelRejected, all_problems

Tensors = dict[str, np.ndarray]
Value = TypeVar("Value")

# In order of trust. The first one found is read; a fault in it is an error, never a reason to try
# the next.
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
MSGPACK, HDF5 = "flax_model.msgpack", "tf_model.h5"
SHARDED = SAFETENSORS + ".index.json"
HEADER_LIMIT = 4 << 20  # bytes of names and places; DistilBERT's are 10 kB
FORMATS = (SAFETENSORS, SHARDED, MSGPACK, HDF5, TORCH)

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


def find(directory: Path) -> list[Path]:
    """The weight files that `read` would read: one, or the index and its shards.

    Raises:
      ModelRejected: there is none, or one lies outside the directory.
    """
    for name in FORMATS:
        if (directory / name).exists() or (directory / name).is_symlink():
            path = inside(directory, name)
            if name != SHARDED:
                return [path]
            shards = sorted(set(weight_map(path).values()))
            return [path, *(inside(directory, shard) for shard in shards)]
    raise ModelRejected(f"{directory} has no weights: none of {', '.join(FORMATS)}")


def read(directory: Path) -> Tensors:
    """Every tensor of the checkpoint under its PyTorch name and in PyTorch's layout.

    Raises:
      ModelRejected: the file is damaged, of another layout or asks for anything but tensors.
    """
    first, *shards = find(directory)
    if first.name == SHARDED:
        return read_shards(first, shards)
    readers: dict[str, Callable[[Path], Tensors]] = {
        SAFETENSORS: read_safetensors,
        TORCH: read_torch,
        MSGPACK: read_msgpack,
        HDF5: read_hdf5,
    }
    return readers[first.name](first)


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
    """Tensor name to file name, out of `model.safetensors.index.json`."""
    if (size := index.stat().st_size) > HEADER_LIMIT:
        raise ModelRejected(f"{index} has {size:,} bytes, more than {HEADER_LIMIT:,}")
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError("a file name is not a string")
        return unique((new_name(name), file) for name, file in names.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelRejected(f"{index} is not an index of safetensors files: {error}") from error


def read_shards(index: Path, shards: list[Path]) -> Tensors:
    wanted = weight_map(index)
    tensors: Tensors = {}
    problems = []
    for shard in shards:
        for name, tensor in read_safetensors(shard).items():
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

TORCH_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
PICKLE_LIMIT = 16 << 20  # bytes of opcodes; DistilBERT's are about 20 kB


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that a pickle mentions. It is compared with known names, never imported."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """The flat array behind tensors: `elements` values of `dtype`, found in the file by its key."""

    key: str
    dtype: np.dtype
    elements: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as a view of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, flat: np.ndarray) -> np.ndarray:
        if self.offset + math.prod(self.shape) > len(flat):
            raise ValueError(f"a tensor of shape {self.shape} reaches past its storage")
        expected = 1  # the elements lie one after the other, in whatever order of the axes
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size != 1 and stride != expected and expected:
                raise ValueError(f"a tensor of shape {self.shape} skips or shares elements")
            expected *= size
        steps = tuple(stride * flat.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, steps, writeable=False
        )


def read_torch(path: Path) -> Tensors:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            tensors = read_torch_zip(file) if is_zip else read_torch_legacy(file)
            return renamed(tensors.items())
    # The parts of a damaged file fail in many ways; each one is the same news to the user.
    except Exception as error:
        raise ModelRejected(f"{path} is not a file of torch tensors: {error}") from error


def read_torch_zip(file: BinaryIO) -> Tensors:
    """The layout since PyTorch 1.6: an archive of one pickle and a member per storage."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        size = file.seek(0, io.SEEK_END)
        if sum(member.file_size for member in members.values()) > size:
            raise ValueError("its members are larger than the file")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("a member is compressed")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} members are called data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in members and archive.read(folder + "byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        views = tensor_views(interpret(io.BytesIO(archive.read(pickles[0]))))
        flats: dict[str, np.ndarray] = {}
        for view in views.values():
            storage = view.storage
            if storage.key not in flats:
                data = archive.read(f"{folder}data/{storage.key}")
                flats[storage.key] = flat_array(storage, data)
        return {name: view.read(flats[view.storage.key]) for name, view in views.items()}


def read_torch_legacy(file: BinaryIO) -> Tensors:
    """The layout before PyTorch 1.6: five pickles, then each storage as a count and its bytes."""
    if interpret(file) != LEGACY_MAGIC or interpret(file) != LEGACY_PROTOCOL:
        raise ValueError("it has neither of PyTorch's two layouts")
    if interpret(file).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    views = tensor_views(interpret(file))
    storages = {view.storage.key: view.storage for view in views.values()}
    flats = {}
    for key in interpret(file):
        if type(key) is not str or key not in storages:
            raise ValueError("it has a storage that belongs to no tensor")
        storage = storages[key]
        elements = int.from_bytes(file.read(8), "little")
        if elements != storage.elements:
            raise ValueError(f"storage {key} has {elements} elements, not {storage.elements}")
        flats[key] = flat_array(storage, file.read(elements * storage.dtype.itemsize))
    return {name: view.read(flats[view.storage.key]) for name, view in views.items()}


def flat_array(storage: Storage, data: bytes) -> np.ndarray:
    if len(data) != storage.elements * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(data)} bytes, it is cut or too long")
    return np.frombuffer(data, storage.dtype)


def tensor_views(state_dict: Any) -> dict[str, View]:
    if not isinstance(state_dict, dict):
        raise ValueError("it does not hold a dict of tensors")
    for name, value in state_dict.items():
        if not isinstance(value, View):
            raise ValueError(f"its entry {name[:200]!r} is not a tensor")
    return state_dict


def interpret(file: BinaryIO) -> Any:
    """The value of the next pickle in the file, as far as it is made of plain data and tensors.

    Knows the opcodes that state dicts consist of, and no other. Its values are neither hashed nor
    printed unless they are strings: a hundred bytes can build a tuple that holds itself 2^40 times.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    begin = file.tell()

    def above_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    def set_items(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise ValueError("the pickle fills something that is not a dict")
        if not all(type(key) is str for key in items[::2]):
            raise ValueError("the pickle has a dict whose keys are not strings")
        target.update(zip(items[::2], items[1::2], strict=True))

    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    for opcode, argument, position in operations:
        if (position or 0) - begin > PICKLE_LIMIT:
            raise ValueError("its pickle is longer than any state dict's")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE"
                | "SHORT_BINUNICODE"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = above_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = above_mark()
                set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(known_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (type(name) is type(module) is str):
                    raise ValueError("its pickle asks for something that has no name")
                stack.append(known_global(module, name))
            case "BINPERSID":
                stack.append(storage_of(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(call(function, arguments))
            case "BUILD":  # a state dict's `_metadata` attribute
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("the pickle sets attributes of something that is not a dict")
            case name:
                raise ValueError(f"its pickle has the opcode {name}, which no state dict needs")
    raise ValueError("its pickle has no end")


def known_global(module: str, name: str) -> Global:
    known = (
        (module, name) == ("collections", "OrderedDict")
        or (module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"))
        or (module == "torch" and name in TORCH_DTYPES)
    )
    if not known:
        raise ValueError(f"its pickle asks for {module}.{name}; nothing was executed")
    return Global(module, name)


def call(function: Any, arguments: Any) -> Any:
    """What a REDUCE of one of the known functions gives."""
    match function, arguments:
        case Global(name="OrderedDict"), ():
            return {}
        case Global(name="_rebuild_parameter"), (View() as view, *_):
            return view
        case (
            Global(name="_rebuild_tensor_v2"),
            (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            if len(shape) == len(strides) and all(
                type(number) is int and number >= 0 for number in (offset, *shape, *strides)
            ):
                return View(storage, offset, shape, strides)
    name = function.name if isinstance(function, Global) else "what is no function"
    raise ValueError(f"its pickle makes a call that no state dict needs, of {name}")


def storage_of(persistent_id: Any) -> Storage:
    match persistent_id:
        case ("storage", Global(module="torch", name=name), str(key), str(), int(elements), *rest):
            if name in TORCH_DTYPES and key.isalnum() and elements >= 0 and rest in ([], [None]):
                return Storage(key, TORCH_DTYPES[name], elements)
    raise ValueError("its pickle names a storage in a way that no state dict does")


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
