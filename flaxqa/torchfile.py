"""PyTorch's files (`pytorch_model.bin`), read without torch and without executing anything.

Pickles are not unpickled: their opcodes are read with `pickletools` and interpreted here, where the
only things that can be built are dicts, lists, tuples and tensors.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

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


def tensors_of(file: BinaryIO) -> dict[str, np.ndarray]:
    """The tensors of a file of either of PyTorch's layouts, by name.

    Raises:
      Exception: of any kind, the file is damaged, or asks for what no state dict needs.
    """
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return zip_tensors(file) if is_zip else legacy_tensors(file)


def zip_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
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


def legacy_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """The layout before PyTorch 1.6: five pickles, then each storage as a count and its bytes."""
    if interpret(file) != LEGACY_MAGIC or interpret(file) != LEGACY_PROTOCOL:
        raise ValueError("it has neither of PyTorch's two layouts")
    if interpret(file).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    machine = Machine()
    views, storages = tensor_views(interpret(file, machine)), machine.storages
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


def tensor_views(content: Any) -> dict[str, View]:
    """The tensors of a state dict, or of the one that training left in it as `state_dict`."""
    if not isinstance(content, dict):
        raise ValueError("it does not hold a dict of tensors")
    inner = content.get("state_dict")
    state_dict: dict[str, Any] = inner if isinstance(inner, dict) else content
    for name, value in state_dict.items():
        if not (type(name) is str and isinstance(value, View)):
            raise ValueError(f"its entry {str(name)[:200]!r} is not a tensor")
    return state_dict


class Machine:
    """Interprets a pickle, as far as it is made of plain data and tensors.

    Knows the opcodes that state dicts consist of, and no other. Its values are neither hashed nor
    printed unless they are strings or integers: a hundred bytes can build a tuple that holds itself
    2^40 times.

    Attributes:
      storages: those that the pickle names, by key.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def above_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("the pickle fills something that is not a dict")
        if not all(type(key) in (str, int) for key in items[::2]):  # an optimizer numbers its own
            raise ValueError("the pickle has a dict whose keys are neither strings nor integers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def put(self, name: str, argument: Any) -> bool:
        """Does what puts plain data onto the stack; False for another opcode."""
        stack = self.stack
        match name:
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
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
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _:
                return False
        return True

    def do(self, name: str, argument: Any) -> None:
        """Does any other opcode than STOP.

        Raises:
          ValueError: it is not one of those that are known, or what it asks for is not.
        """
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self.above_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.above_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GLOBAL":
                stack.append(known_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (type(name) is type(module) is str):
                    raise ValueError("its pickle asks for something that has no name")
                stack.append(known_global(module, name))
            case "BINPERSID":
                storage = storage_of(stack.pop())
                self.storages[storage.key] = storage
                stack.append(storage)
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(call(function, arguments))
            case "BUILD":  # a state dict's `_metadata` attribute
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("the pickle sets attributes of something that is not a dict")
            case _:
                raise ValueError(f"its pickle has the opcode {name}, which no state dict needs")


def interpret(file: BinaryIO, machine: Machine | None = None) -> Any:
    """The value of the next pickle in the file; see `Machine`."""
    machine, begin = machine or Machine(), file.tell()
    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    for opcode, argument, position in operations:
        if (position or 0) - begin > PICKLE_LIMIT:
            raise ValueError("its pickle is longer than any state dict's")
        if opcode.name == "STOP":
            return machine.stack.pop()
        if not machine.put(opcode.name, argument):
            machine.do(opcode.name, argument)
    raise ValueError("its pickle has no end")


def known_global(module: str, name: str) -> Global:
    known = (
        (module, name) == ("collections", "OrderedDict")
        or (module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"))
        or (module == "torch" and name in TORCH_DTYPES)
    )
    if not known and module.startswith(("transformers.models.", "torch.nn.modules", "__main__")):
        raise ValueError(
            f"it holds a whole pickled model, of the class {module}.{name}, and such files can run "
            "any code; nothing was executed. Where you trust it, load it with PyTorch and save "
            "`model.state_dict()`, or `model.save_pretrained(directory)`"
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
