"""A checkpoint as a file for other runtimes: ONNX, StableHLO, TensorFlow's SavedModel.

All three take `input_ids` and `attention_mask`, and where the model has segment embeddings
`token_type_ids`, integers [batch, sequence] of any size; they give `start_logits` and `end_logits`,
float32 [batch, sequence], those of `model(**inputs)`. Names and types are those of transformers'
exporters, so that what reads theirs reads these.

`onnx` and `saved_model` are written operation by operation from the weights: one description of the
encoder, `logits_of`, on what each runtime calls an operation. Neither needs torch, and TensorFlow
gets a graph of its own operations, no embedded XLA program. `stablehlo` is `model.forward` as
`jax.export` has it.

Every file is run after it is written, on rows of several lengths, and appears under its name only
if its logits are those of the model.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import files, inference
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.model import EncoderConfig, QuestionAnsweringModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.03}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OPSET = 20  # of ONNX: the first with Gelu
LARGEST = 2**31 - 2**20  # bytes that protobuf can hold, with some room for the graph
SAMPLES = ((1, 5), (3, 64), (2, 17))  # rows and tokens of what an export is run on


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
      path: of the file, or of the directory of a SavedModel.
      size: bytes.
      checked_with: the runtime that ran it.
      difference: the largest between its logits and the model's.
    """

    path: Path
    size: int
    checked_with: str
    difference: float


def export(
    model: QuestionAnsweringModel, format: str, path: str | Path, *, overwrite: bool = False
) -> Export:
    """Writes a model in one of `FORMATS` and runs what it wrote.

    Args:
      model: float32; bfloat16 and float16, too, for "stablehlo".
      format: "onnx" and "stablehlo" give a file, "saved_model" a directory.
      path: where.
      overwrite: whether something may be there, of the same format.

    Raises:
      UsageError: the format or the dtype is not known, its package is not installed, or something
        is there.
      DataError: what was written gives other logits; it is removed.
      TryAgain: the place cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    dtype = str(model.dtype)
    if dtype not in (TOLERANCE if format == "stablehlo" else ("float32",)):
        raise UsageError(f"{format} of a {dtype} model is not written; load it in float32")
    path = files.local(path)
    if path.exists() or path.is_symlink():
        refuse_to_replace(path, format, overwrite)
    write, run = FORMATS[format]
    files.writable_directory(path.parent)
    try:
        with temporary_folder(path) as folder:
            made = folder / path.name
            write(model, made)
            difference, checked_with = check(model, run, made)
            put(made, path)
    except OSError as error:
        if isinstance(error, TryAgain):
            raise
        raise TryAgain(f"{path} cannot be written: {error.strerror or error}") from error
    return Export(path, size_of(path), checked_with, difference)


def refuse_to_replace(path: Path, format: str, overwrite: bool) -> None:
    """Raises: UsageError: what is there must not, or cannot, be replaced."""
    if path.is_symlink() or not IS_OURS[format](path):
        raise UsageError(f"{path} is there and no export to {format}; remove it yourself")
    if not overwrite:
        raise UsageError(f"{path} is there; --overwrite replaces it")


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside the path, on the same file system, which goes with all that is in it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder)


def put(made: Path, path: Path) -> None:
    """Moves what is whole and checked to its place; a directory that is there takes its own."""
    if path.is_dir():
        path.replace(made.with_name(f"{made.name}.old"))
    made.replace(path)
    files.sync_directory(path.parent)


def size_of(path: Path) -> int:
    each = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in each if file.is_file())


# --- running what was written ---

Run = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def check(
    model: QuestionAnsweringModel, load: Callable[[Path], tuple[Run, str]], path: Path
) -> tuple[float, str]:
    """Runs a file on rows of several lengths, padded ones among them.

    Returns:
      The largest difference between its logits and the model's, and what ran it.

    Raises:
      DataError: the difference is larger than rounding makes it.
    """
    run, name = load(path)
    most = 0.0
    for inputs in samples(model.config):
        wanted = model(inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"))
        mask = inputs["attention_mask"] == 1
        for got, theirs in zip(run(inputs), wanted.to_tuple(), strict=True):
            differences = np.abs(np.asarray(got, np.float64) - np.asarray(theirs))[mask]
            most = max(most, float(differences.max()))
    limit = TOLERANCE[str(model.dtype)]
    if not most <= limit:  # also where a logit is not a number
        raise DataError(f"{name} gives logits that differ by {most:.2g}, more than {limit:g}")
    return most, name


def samples(config: EncoderConfig) -> Iterator[dict[str, np.ndarray]]:
    """Rows of random tokens, the later ones of a batch padded, with what the model reads."""
    rng = np.random.default_rng(0)
    for rows, tokens in SAMPLES:
        tokens = min(tokens, config.max_position_embeddings)
        lengths = np.maximum(tokens - tokens // 3 * np.arange(rows), 1)
        mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        ids = np.where(mask, rng.integers(0, config.vocab_size, mask.shape), config.pad_token_id)
        types = (np.arange(tokens) >= tokens // 2).astype(np.int64) * mask
        yield dict(zip(inputs_of(config), (ids, mask, types), strict=False))


def inputs_of(config: EncoderConfig) -> tuple[str, ...]:
    return INPUTS if config.type_vocab_size else INPUTS[:2]


def version(package: Any) -> str:
    return f"{package.__name__} {package.__version__}"


@contextlib.contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Raises: UsageError: a package is not installed; says what installs it."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{package} is needed: pip install 'flaxqa[{extra}]' ({error})") from error


# --- the encoder, operation by operation ---


class Operations(abc.ABC):
    """What an encoder is made of, as a runtime has it, weights included.

    Axes as in `flaxqa.model`; M = B T tokens. A subclass is made with the inputs.
    """

    @abc.abstractmethod
    def embed(self, tables: Mapping[str, Any]) -> Any:
        """The sum of the rows of all tables, [M, D]."""

    @abc.abstractmethod
    def add(self, a: Any, b: Any) -> Any: ...

    @abc.abstractmethod
    def linear(self, x: Any, kernel: Any, bias: Any) -> Any:
        """[M, A] to [M, B]."""

    @abc.abstractmethod
    def norm(self, x: Any, scale: Any, bias: Any, epsilon: float) -> Any: ...

    @abc.abstractmethod
    def activation(self, x: Any, name: str) -> Any: ...

    @abc.abstractmethod
    def split(self, x: Any, parts: int) -> Sequence[Any]:
        """The last axis in equal parts."""

    @abc.abstractmethod
    def attend(self, q: Any, k: Any, v: Any, n_heads: int) -> Any:
        """Scaled queries, keys and values [M, D] to what the tokens of each row mix, [M, D]."""

    @abc.abstractmethod
    def output(self, x: Any, name: str) -> Any:
        """[M, 1] as an output [B, T]."""


def weights_of(model: QuestionAnsweringModel) -> dict[str, Any]:
    """Those of `flaxqa.inference`, the layers in a list."""
    import jax

    weights = inference.weights_of(model)
    layers = [
        jax.tree.map(operator.itemgetter(index), weights["layers"])
        for index in range(model.config.n_layers)
    ]
    return {**weights, "layers": layers}


def logits_of(config: EncoderConfig, weights: Mapping[str, Any], to: Operations) -> list[Any]:
    """The start and end logits, computed as `flaxqa.inference` computes them.

    Args:
      config: of the model.
      weights: those of `weights_of`, as the runtime has them.
      to: the runtime.
    """

    def norm(x: Any, layer: Mapping[str, Any]) -> Any:
        return to.norm(x, **layer, epsilon=config.layer_norm_eps)

    tables = {name: table for name, table in weights.items() if name.endswith("_embeddings")}
    x = norm(to.embed(tables), weights["embedding_norm"])
    for layer in weights["layers"]:
        q, k, v = to.split(to.linear(x, **layer["qkv"]), 3)
        mixed = to.linear(to.attend(q, k, v, config.n_heads), **layer["out"])
        x = norm(to.add(x, mixed), layer["attention_norm"])
        inner = to.activation(to.linear(x, **layer["lin1"]), config.function)
        x = norm(to.add(x, to.linear(inner, **layer["lin2"])), layer["output_norm"])
    both = to.split(to.linear(x, **weights["qa_outputs"]), 2)
    return [to.output(x, name) for x, name in zip(both, OUTPUTS, strict=True)]


# --- ONNX ---


class OnnxOperations(Operations):
    """Nodes and initializers of a graph; a value is its name."""

    def __init__(self, config: EncoderConfig):
        from onnx import TensorProto, helper, numpy_helper

        self.helper, self.numpy_helper = helper, numpy_helper
        self.config = config
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.shape = self.node("Shape", "input_ids")  # [B, T]
        mask = self.node("Cast", "attention_mask", to=TensorProto.BOOL)
        self.mask = self.node("Unsqueeze", mask, self.numbers(1, 2))  # [B, 1, 1, T]

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind.lower()}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, array: np.ndarray) -> str:
        name = f"weight_{len(self.initializers)}"
        self.initializers.append(self.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def numbers(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def embed(self, tables: Mapping[str, str]) -> str:
        x = self.node("Gather", tables["word_embeddings"], "input_ids")
        if "token_type_embeddings" in tables:
            x = self.add(x, self.node("Gather", tables["token_type_embeddings"], "token_type_ids"))
        length = self.node("Shape", "input_ids", start=1)
        places = self.node("Slice", tables["position_embeddings"], self.numbers(0), length)
        x = self.add(x, places)
        return self.node("Reshape", x, self.numbers(-1, self.config.dim))

    def add(self, a: str, b: str) -> str:
        return self.node("Add", a, b)

    def linear(self, x: str, kernel: str, bias: str) -> str:
        return self.node("Gemm", x, kernel, bias)

    def norm(self, x: str, scale: str, bias: str, epsilon: float) -> str:
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def activation(self, x: str, name: str) -> str:
        if name == "silu":
            return self.node("Mul", x, self.node("Sigmoid", x))
        if name == "gelu_new":
            return self.node("Gelu", x, approximate="tanh")
        return self.node({"gelu": "Gelu", "relu": "Relu"}[name], x)

    def split(self, x: str, parts: int) -> list[str]:
        return self.node("Split", x, outputs=parts, axis=-1, num_outputs=parts)

    def attend(self, q: str, k: str, v: str, n_heads: int) -> str:
        heads = self.numbers(n_heads, self.config.dim // n_heads)
        by_head = self.node("Concat", self.shape, heads, axis=0)
        q, k, v = (
            self.node("Transpose", self.node("Reshape", x, by_head), perm=order)
            for x, order in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        # The lowest finite number and not -inf: a row of padding alone must not become NaN.
        lowest = self.weight(np.array(np.finfo(np.float32).min))
        scores = self.node("Where", self.mask, self.node("MatMul", q, k), lowest)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        mixed = self.node("Transpose", mixed, perm=(0, 2, 1, 3))
        return self.node("Reshape", mixed, self.numbers(-1, self.config.dim))

    def output(self, x: str, name: str) -> str:
        self.nodes.append(self.helper.make_node("Reshape", (x, self.shape), [name]))
        return name


def write_onnx(model: QuestionAnsweringModel, path: Path) -> None:
    import jax

    with needs("onnx", "export"):
        import onnx
        from onnx import helper
    import flaxqa

    to = OnnxOperations(model.config)
    logits_of(model.config, jax.tree.map(to.weight, weights_of(model)), to)
    if (size := sum(len(one.raw_data) for one in to.initializers)) > LARGEST:
        raise UsageError(f"weights of {size:,} bytes do not fit an ONNX file; stablehlo takes them")

    def values(names: Sequence[str], kind: int) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, ["batch", "sequence"]) for name in names]

    graph = helper.make_graph(
        to.nodes,
        type(model).__name__,
        values(inputs_of(model.config), onnx.TensorProto.INT64),
        values(OUTPUTS, onnx.TensorProto.FLOAT),
        to.initializers,
    )
    opset = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(
        graph,
        opset_imports=opset,
        ir_version=helper.find_min_ir_version_for(opset),
        producer_name="flaxqa",
        producer_version=flaxqa.__version__,
    )
    onnx.checker.check_model(made, full_check=True)
    files.write_whole(path, made.SerializeToString())


def load_onnx(path: Path) -> tuple[Run, str]:
    """In ONNX Runtime; without it in onnx's own reference, which is slow."""
    try:
        import onnxruntime
    except ImportError:
        import onnx
        import onnx.reference

        reference = onnx.reference.ReferenceEvaluator(str(path))
        return lambda inputs: list(reference.run(list(OUTPUTS), inputs)), version(onnx)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(list(OUTPUTS), inputs), version(onnxruntime)


# --- StableHLO ---


def write_stablehlo(model: QuestionAnsweringModel, path: Path) -> None:
    """`model.forward` for every batch and length, for all of PLATFORMS, the weights inside."""
    with needs("flatbuffers", "export"):
        import flatbuffers  # noqa: F401 (jax.export imports it when it serializes)
    import jax
    import jax.export
    from flax import nnx

    graphdef, state = nnx.split(model)
    names = inputs_of(model.config)

    def forward(*inputs: Any) -> dict[str, Any]:
        output = nnx.merge(graphdef, state).forward(*inputs)
        return {name: output[name] for name in OUTPUTS}

    scope = jax.export.SymbolicScope([f"length <= {model.config.max_position_embeddings}"])
    shape = jax.export.symbolic_shape("batch, length", scope=scope)
    arguments = [jax.ShapeDtypeStruct(shape, np.int32) for _ in names]
    exported = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(*arguments)
    files.write_whole(path, bytes(exported.serialize()))


def load_stablehlo(path: Path) -> tuple[Run, str]:
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(path.read_bytes()))

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        output = exported.call(*(each.astype(np.int32) for each in inputs.values()))
        return [np.asarray(output[name]) for name in OUTPUTS]

    return run, f"{version(jax)} ({jax.default_backend()})"


# --- TensorFlow ---


class TensorFlowOperations(Operations):
    """Operations of TensorFlow on the inputs [B, T]."""

    def __init__(self, config: EncoderConfig, inputs: Sequence[Any]):
        import tensorflow as tf

        self.tf, self.config, self.inputs = tf, config, inputs
        self.shape = tf.shape(inputs[0])

    def embed(self, tables: Mapping[str, Any]) -> Any:
        tf = self.tf
        x = tf.gather(tables["word_embeddings"], self.inputs[0])
        if "token_type_embeddings" in tables:
            x += tf.gather(tables["token_type_embeddings"], self.inputs[2])
        x += tables["position_embeddings"][: self.shape[1]]
        return tf.reshape(x, (-1, self.config.dim))

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def linear(self, x: Any, kernel: Any, bias: Any) -> Any:
        return self.tf.nn.bias_add(self.tf.matmul(x, kernel), bias)

    def norm(self, x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
        mean, variance = self.tf.nn.moments(x, axes=[-1], keepdims=True)
        return (x - mean) * self.tf.math.rsqrt(variance + epsilon) * scale + bias

    def activation(self, x: Any, name: str) -> Any:
        functions = {
            "gelu": self.tf.nn.gelu, "relu": self.tf.nn.relu, "silu": self.tf.nn.silu,
            "gelu_new": functools.partial(self.tf.nn.gelu, approximate=True),
        }  # fmt: skip
        return functions[name](x)

    def split(self, x: Any, parts: int) -> Sequence[Any]:
        return self.tf.split(x, parts, axis=-1)

    def attend(self, q: Any, k: Any, v: Any, n_heads: int) -> Any:
        tf = self.tf
        shape = (self.shape[0], self.shape[1], n_heads, self.config.dim // n_heads)
        q, k, v = (tf.transpose(tf.reshape(x, shape), (0, 2, 1, 3)) for x in (q, k, v))
        mask = tf.cast(self.inputs[1], tf.bool)[:, None, None, :]
        scores = tf.where(mask, tf.matmul(q, k, transpose_b=True), q.dtype.min)
        mixed = tf.transpose(tf.matmul(tf.nn.softmax(scores), v), (0, 2, 1, 3))
        return tf.reshape(mixed, (-1, self.config.dim))

    def output(self, x: Any, name: str) -> Any:
        return self.tf.reshape(x, self.shape)


def write_saved_model(model: QuestionAnsweringModel, path: Path) -> None:
    import jax

    with needs("tensorflow", "tensorflow"):
        import tensorflow as tf

    def variable(array: np.ndarray) -> Any:
        return tf.Variable(array, trainable=False)

    weights = jax.tree.map(variable, weights_of(model))
    names = inputs_of(model.config)
    signature = [tf.TensorSpec((None, None), tf.int32, name=name) for name in names]

    def serve(*inputs: Any) -> dict[str, Any]:
        to = TensorFlowOperations(model.config, inputs)
        return dict(zip(OUTPUTS, logits_of(model.config, weights, to), strict=True))

    module = tf.Module()
    module.weights = jax.tree.leaves(weights)
    module.serve = tf.function(serve, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(path), signatures=module.serve.get_concrete_function())


def load_saved_model(path: Path) -> tuple[Run, str]:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        output = serve(**{name: tf.constant(x, tf.int32) for name, x in inputs.items()})
        return [output[name].numpy() for name in OUTPUTS]

    return run, version(tf)


def is_onnx(path: Path) -> bool:
    """Whether a file begins as one of `write_onnx`, with the name of its producer."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\x12\x06flaxqa" in file.read(32)


def is_stablehlo(path: Path) -> bool:
    """Whether a file is one of `jax.export`."""
    import jax.export

    try:
        jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception:  # whatever a file of another kind makes of it
        return False
    return True


def is_saved_model(path: Path) -> bool:
    return (path / "saved_model.pb").is_file()


IS_OURS: dict[str, Callable[[Path], bool]] = {
    "onnx": is_onnx,
    "stablehlo": is_stablehlo,
    "saved_model": is_saved_model,
}
FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], tuple[Run, str]]]] = {
    "onnx": (write_onnx, load_onnx),
    "stablehlo": (write_stablehlo, load_stablehlo),
    "saved_model": (write_saved_model, load_saved_model),
}
