"""What computes logits: flaxqa and other frameworks, each behind the same call.

A backend loads a checkpoint in its constructor and then turns windows into logits; windows and
decoder are flaxqa's for all. Those that take padded batches get them in one of two ways: `shipped`,
as transformers 4.57's pipeline and documentation do it, in the order they come, 8 at a time, padded
to 384; `tuned`, sorted by length and padded to their longest. (`whole` is one batch of them all.)

On an accelerator batches are larger, and all are sent before the first result is fetched. What has
no code for it runs on the CPU and says so.

A backend of your own is a subclass of `Backend` named as `module:Class`.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flaxqa.errors import UsageError
from flaxqa.features import Feature
from flaxqa.spans import Logits

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from flaxqa.model import EncoderConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LENGTH, SHIPPED_BATCH = 384, 8
TUNED_TOKENS = 2_048  # of a batch that is sorted by length
TUNED_TOKENS_ELSEWHERE = 65_536  # the fastest for torch on an H100
MULTIPLE = 8  # what the length of a tuned batch is rounded up to


class Backend(abc.ABC):
    """Loads a checkpoint; then windows to logits.

    Attributes:
      dtypes: that it computes in, the first by default.
      devices: kinds of devices that it computes on.
      device: the kind that it is asked to compute on, if it can; set before it is made.
      needs: what installs it.
      traceable: whether jax.profiler sees what it does.
      length: tokens of the longest window.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    device: ClassVar[str] = "cpu"
    needs: ClassVar[str] = ""
    traceable: ClassVar[bool] = False
    length = LENGTH

    @classmethod
    def prepare(cls, model: str, dtype: str, folder: str) -> str:
        """Makes of a checkpoint directory what the constructor takes, in a folder.

        This is not part of the time to load it. As it is, the constructor takes the directory.
        """
        return model

    @abc.abstractmethod
    def __init__(self, model: str, dtype: str, threads: int):
        """Loads what `prepare` gave.

        Raises:
          ImportError: a package is not installed.
        """

    @abc.abstractmethod
    def run(self, windows: Sequence[Feature], way: str) -> Sequence[Logits]:
        """The logits of every window."""

    def where(self) -> str:
        """The name of what computes."""
        return "cpu"

    def device_memory(self) -> int | None:
        """The most bytes of the device's own memory that were in use; None on a CPU."""
        return None

    def about(self) -> dict[str, Any]:
        """What else is worth knowing of how it computes."""
        return {}


class Padded(Backend):
    """One that takes rows of one length.

    Attributes:
      fixed: whether each shape has to be compiled, so that there should be few of them.
    """

    fixed: ClassVar[bool] = False

    @abc.abstractmethod
    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask and token_type_ids, int64 [B, T], to logits, float32 [B, T]."""

    def send(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Begins with a batch; where a device works on its own, `fetch` waits for it."""
        return self.logits(inputs)

    def fetch(self, sent: Any) -> tuple[np.ndarray, np.ndarray]:
        """The logits of what was sent."""
        start, end = sent
        return start, end

    def run(self, windows: Sequence[Feature], way: str) -> list[Logits]:
        found: dict[int, Logits] = {}
        tokens, multiple = TUNED_TOKENS, MULTIPLE
        if self.device != "cpu":
            tokens, multiple = TUNED_TOKENS_ELSEWHERE, 64 if self.fixed else MULTIPLE
        lengths = list(map(len, windows))
        sent = []
        for rows, length in padded_batches(lengths, way, self.length, tokens, multiple):
            there = [windows[index] for index in rows]
            room = len(rows)
            if self.fixed and self.device != "cpu" and way == "tuned":  # few sizes
                room = min(1 << (room - 1).bit_length(), max(1, tokens // length))
            sent.append((rows, self.send(padded(there, length, room))))
        for rows, batch in sent:
            start, end = self.fetch(batch)
            for row, index in enumerate(rows):
                own = slice(lengths[index])
                found[index] = Logits(start[row, own], end[row, own])
        return [found[index] for index in range(len(windows))]


def padded_batches(
    lengths: Sequence[int],
    way: str,
    longest: int = LENGTH,
    tokens: int = TUNED_TOKENS,
    multiple: int = MULTIPLE,
) -> list[tuple[list[int], int]]:
    """The windows of each batch and the length they are padded to.

    Args:
      lengths: tokens of the windows.
      way: "shipped", "tuned" or "whole".
      longest: tokens of the longest window.
      tokens: of a tuned batch, padding included.
      multiple: what the length of a tuned batch is rounded up to.
    """
    if way == "shipped":
        rows = list(range(len(lengths)))
        return [
            (rows[i : i + SHIPPED_BATCH], longest) for i in range(0, len(lengths), SHIPPED_BATCH)
        ]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if way == "whole":
        return [(order, max(lengths))]
    batches = []
    while order:
        length = min(-(-lengths[order[0]] // multiple) * multiple, longest)
        size = max(1, tokens // length)
        batches.append((order[:size], length))
        order = order[size:]
    return batches


def padded(windows: Sequence[Feature], length: int, rows: int) -> dict[str, np.ndarray]:
    """Windows as the inputs of transformers' models, in so many rows."""
    ids, mask, types = np.zeros((3, rows, length), np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window.input_ids
        mask[row, : len(window)] = 1
        types[row, window.context_start : len(window)] = 1
    return dict(zip(INPUTS, (ids, mask, types), strict=True))


class Jax(Backend):
    """flaxqa's predictor, which packs windows into rows; both ways are the same for it."""

    dtypes = ("float32", "bfloat16")
    devices = ("cpu", "gpu", "tpu")
    traceable = True
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: str, dtype: str, threads: int):
        from flaxqa import reader

        jax_runs_on(self.device)
        self.predictor = reader.load(model, dtype=dtype, **self.options).predictor

    def run(self, windows: Sequence[Feature], way: str) -> Sequence[Logits]:
        return self.predictor.predict(windows)

    def where(self) -> str:
        return str(self.predictor.devices[0].device_kind)

    def device_memory(self) -> int | None:
        return jax_device_memory()

    def about(self) -> dict[str, Any]:
        return {
            **self.predictor.computed_by,
            "shapes": len(self.predictor.shapes),
            "compile_seconds": self.predictor.compile_seconds,
        }


def jax_runs_on(device: str) -> None:
    """Makes sure that JAX computes on such a device.

    Raises:
      RuntimeError: it has none.
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if (there := jax.default_backend()) != device:
        raise RuntimeError(f"JAX has no {device} here: it would run on the {there}")


def product_rate(dtype: str) -> float:
    """FLOP/s of one matrix product, as large as suits JAX's device; float32 in full."""
    import jax
    import jax.numpy as jnp

    size = 1_024 if jax.default_backend() == "cpu" else 8_192
    square = jnp.ones((size, size), dtype)
    with jax.default_matmul_precision("float32"):
        product = jax.jit(jnp.matmul).lower(square, square).compile()
    took = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready([product(square, square) for _ in range(5)])
        took.append((time.perf_counter() - began) / 5)
    return 2 * size**3 / statistics.median(took)


def useful_flops(config: EncoderConfig, lengths: ArrayLike) -> int:
    """Multiplications and additions that windows of so many tokens need, none for padding."""
    each = np.asarray(lengths, np.int64)
    token = config.n_layers * 2 * (4 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    return int(token * each.sum() + config.n_layers * 4 * config.dim * (each**2).sum())


def jax_device_memory() -> int | None:
    import jax

    told = jax.local_devices()[0].memory_stats()
    return None if not told else told.get("peak_bytes_in_use")


class JaxPmap(Jax):
    """The same with rows split over devices by pmap."""

    options: ClassVar[Mapping[str, Any]] = {"parallel": "pmap"}


class JaxXla(Jax):
    """The same without the native kernels."""

    options: ClassVar[Mapping[str, Any]] = {"kernels": "xla"}


class JaxModel(Padded):
    """flaxqa's model, called as transformers' models are: compiled once for each shape.

    Its float32 is that on every device, where JAX's own default is less on accelerators.
    """

    dtypes = ("float32", "bfloat16")
    devices = ("cpu", "gpu", "tpu")
    fixed = traceable = True

    def __init__(self, model: str, dtype: str, threads: int):
        import jax

        from flaxqa import checkpoint, devices

        jax_runs_on(self.device)
        jax.config.update("jax_default_matmul_precision", "float32")
        devices.use_compilation_cache()
        self.model = checkpoint.load(model, dtype=dtype).model

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return self.fetch(self.send(inputs))

    def send(self, inputs: Mapping[str, np.ndarray]) -> Any:
        output = self.model(*(inputs[name].astype(np.int32) for name in INPUTS))
        return output.start_logits, output.end_logits

    def fetch(self, sent: Any) -> tuple[np.ndarray, np.ndarray]:
        start, end = map(np.asarray, sent)
        return start, end

    def where(self) -> str:
        import jax

        return str(jax.local_devices()[0].device_kind)

    def device_memory(self) -> int | None:
        return jax_device_memory()


class JaxHfStyle(JaxModel):
    """The model without jit, operation by operation, as transformers 4's Flax classes ran."""

    def send(self, inputs: Mapping[str, np.ndarray]) -> Any:
        ids, mask, types = (inputs[name].astype(np.int32) for name in INPUTS)
        output = self.model.forward(ids, mask, types)
        return output.start_logits, output.end_logits


class Torch(Padded):
    """transformers' class with its default attention, sdpa."""

    dtypes = ("float32", "bfloat16")
    devices = ("cpu", "gpu")
    needs = "'flaxqa[torch]'"
    attention: ClassVar[str] = "sdpa"

    def __init__(self, model: str, dtype: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.at = torch, "cuda" if self.device == "gpu" else "cpu"
        if self.at == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} has no GPU here")
        loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(
            model, attn_implementation=self.attention, use_safetensors=True
        )
        self.model = loaded.eval().to(self.at, getattr(torch, dtype))
        self.names = inspect.signature(loaded.forward).parameters

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return self.fetch(self.send(inputs))

    def send(self, inputs: Mapping[str, np.ndarray]) -> Any:
        given = {n: self.torch.from_numpy(each) for n, each in inputs.items() if n in self.names}
        if self.at == "cuda":
            given = {n: each.pin_memory().cuda(non_blocking=True) for n, each in given.items()}
        with self.no_grad():
            output = self.model(**given)
            return output.start_logits, output.end_logits

    def fetch(self, sent: Any) -> tuple[np.ndarray, np.ndarray]:
        start, end = (each.float().cpu().numpy() for each in sent)
        return start, end

    def where(self) -> str:
        return "cpu" if self.at == "cpu" else str(self.torch.cuda.get_device_name())

    def device_memory(self) -> int | None:
        return None if self.at == "cpu" else int(self.torch.cuda.max_memory_allocated())

    def no_grad(self) -> Any:
        return self.torch.inference_mode()


class TorchEager(Torch):
    """The same with attention as separate operations."""

    attention = "eager"


class TorchCompile(Torch):
    """The same through torch.compile, with the settings that are fastest for it.

    On CPUs frozen weights; with fixed shapes, or without max-autotune, its float32 products are
    those of MKL, which on AMD run at half of the rate; in bfloat16 max-autotune is slower.
    """

    def __init__(self, model: str, dtype: str, threads: int):
        super().__init__(model, dtype, threads)
        import torch._dynamo
        import torch._inductor.config

        torch._inductor.config.freezing = self.at == "cpu"
        torch._dynamo.config.cache_size_limit = 256
        mode = "max-autotune" if dtype == "float32" and self.at == "cpu" else None
        self.model = self.torch.compile(self.model, dynamic=True, mode=mode)

    def no_grad(self) -> Any:
        return self.torch.no_grad()  # freezing does not work in inference mode


def python(script: str, *arguments: str) -> None:
    """Runs a script in a process of its own, so that its memory and time are not a backend's.

    Raises:
      RuntimeError: it failed; has the last line of what it said.
    """
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["a script failed"])[-1])


def export(model: str, format: str, folder: str) -> str:
    """`flaxqa export` of a checkpoint directory."""
    path = str(Path(folder) / format)
    options = ("--model", model, "--format", format, "--output", path)
    python("from flaxqa.cli import main; main()", "export", *options)
    return path


class OnnxRuntime(Padded):
    """flaxqa's ONNX export; int8 through dynamic quantization."""

    dtypes = ("float32", "int8")
    devices = ("cpu", "gpu")  # with onnxruntime-gpu
    needs = "'flaxqa[onnxruntime]'"

    @classmethod
    def prepare(cls, model: str, dtype: str, folder: str) -> str:
        import onnxruntime  # noqa: F401 (or it would be missed only after the export)

        path = export(model, "onnx", folder)
        if dtype != "int8":
            return path
        script = "import sys; from onnxruntime.quantization import quantize_dynamic as quantize; "
        python(script + "quantize(*sys.argv[1:])", path, f"{path}.int8")
        return f"{path}.int8"

    def __init__(self, model: str, dtype: str, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        cuda = "CUDAExecutionProvider"
        # Of dynamic quantization it has no code for CUDA.
        if (
            self.device == "gpu"
            and dtype != "int8"
            and cuda in onnxruntime.get_available_providers()
        ):
            providers.insert(0, cuda)
        self.session = onnxruntime.InferenceSession(model, options, providers=providers)
        self.on_cuda = self.session.get_providers()[0] == cuda
        self.names = [one.name for one in self.session.get_inputs()]

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        start, end = self.session.run(None, {name: inputs[name] for name in self.names})
        return start, end

    def where(self) -> str:
        return "a CUDA device" if self.on_cuda else "cpu"


class OpenVino(Padded):
    """The same file in OpenVINO, all cores on one batch."""

    dtypes = ("float32", "bfloat16")
    needs = "'flaxqa[openvino]'"

    @classmethod
    def prepare(cls, model: str, dtype: str, folder: str) -> str:
        import openvino  # noqa: F401

        return export(model, "onnx", folder)

    def __init__(self, model: str, dtype: str, threads: int):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        self.names = [one.get_any_name() for one in compiled.inputs]
        self.request = compiled.create_infer_request()

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        results = self.request.infer({name: inputs[name] for name in self.names})
        start, end = (results[i].copy() for i in range(2))
        return start, end


class TensorFlow(Padded):
    """flaxqa's SavedModel."""

    needs = "'flaxqa[tensorflow]'"

    @classmethod
    def prepare(cls, model: str, dtype: str, folder: str) -> str:
        if importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        return export(model, "saved_model", folder)

    def __init__(self, model: str, dtype: str, threads: int):
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # a TensorFlow that runs already keeps its number
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.set_visible_devices([], "GPU")  # as `where` says
        self.tf, self.loaded = tf, tf.saved_model.load(model)
        self.serve = self.loaded.signatures["serving_default"]
        self.names = list(self.serve.structured_input_signature[1])

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tf = self.tf
        output = self.serve(**{name: tf.constant(inputs[name], tf.int32) for name in self.names})
        return output["start_logits"].numpy(), output["end_logits"].numpy()


BACKENDS: dict[str, type[Backend]] = {
    "jax": Jax,
    "jax-pmap": JaxPmap,
    "jax-xla": JaxXla,
    "jax-model": JaxModel,
    "jax-hf-style": JaxHfStyle,
    "torch": Torch,
    "torch-eager": TorchEager,
    "torch.compile": TorchCompile,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "tensorflow": TensorFlow,
}


def load(name: str, model: str, dtype: str, threads: int, folder: str) -> Backend:
    """A backend with a checkpoint directory; see `Backend`."""
    kind = backend_of(name)
    return kind(kind.prepare(model, dtype, folder), dtype, threads)


def backend_of(name: str) -> type[Backend]:
    """The class that a name of BACKENDS, or `module:Class`, stands for.

    Raises:
      UsageError: there is none.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    module, colon, kind = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"backend {name!r} cannot be imported: {error}") from error
        if isinstance(found, type) and issubclass(found, Backend):
            return found
    raise UsageError(
        f"backend {name!r} is not one of {', '.join(BACKENDS)}, nor module:Class of a Backend"
    )
