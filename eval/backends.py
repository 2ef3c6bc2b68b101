"""What computes logits: flaxqa and other frameworks, each behind the same call.

A backend loads a checkpoint in its constructor and then turns windows into logits; windows and
decoder are flaxqa's for all. Those that take padded batches get them in one of two ways: `shipped`,
as transformers 4.57's pipeline and documentation do it, in the order they come, 8 at a time, padded
to 384; `tuned`, sorted by length and padded to their longest. (`whole` is one batch of them all.)

A backend of your own is a subclass of `Backend` named as `module:Class`.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flaxqa.errors import UsageError
from flaxqa.features import Feature
from flaxqa.spans import Logits

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LENGTH, SHIPPED_BATCH = 384, 8
TUNED_TOKENS = 2_048  # of a batch that is sorted by length
MULTIPLE = 8  # what the length of a tuned batch is rounded up to


class Backend(abc.ABC):
    """Loads a checkpoint; then windows to logits.

    Attributes:
      dtypes: that it computes in, the first by default.
      needs: what installs it.
      length: tokens of the longest window.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    needs: ClassVar[str] = ""
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


class Padded(Backend):
    """One that takes rows of one length."""

    @abc.abstractmethod
    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask and token_type_ids, int64 [B, T], to logits, float32 [B, T]."""

    def run(self, windows: Sequence[Feature], way: str) -> list[Logits]:
        found: dict[int, Logits] = {}
        for rows, length in padded_batches(list(map(len, windows)), way, self.length):
            start, end = self.logits(padded([windows[index] for index in rows], length))
            for row, index in enumerate(rows):
                tokens = len(windows[index])
                found[index] = Logits(start[row, :tokens], end[row, :tokens])
        return [found[index] for index in range(len(windows))]


def padded_batches(
    lengths: Sequence[int], way: str, longest: int = LENGTH
) -> list[tuple[list[int], int]]:
    """The windows of each batch and the length they are padded to."""
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
        length = min(-(-lengths[order[0]] // MULTIPLE) * MULTIPLE, longest)
        size = max(1, TUNED_TOKENS // length)
        batches.append((order[:size], length))
        order = order[size:]
    return batches


def padded(windows: Sequence[Feature], length: int) -> dict[str, np.ndarray]:
    """Windows as the inputs of transformers' models."""
    ids, mask, types = np.zeros((3, len(windows), length), np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window.input_ids
        mask[row, : len(window)] = 1
        types[row, window.context_start : len(window)] = 1
    return dict(zip(INPUTS, (ids, mask, types), strict=True))


class Jax(Backend):
    """flaxqa's predictor, which packs windows into rows; both ways are the same for it."""

    dtypes = ("float32", "bfloat16")
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: str, dtype: str, threads: int):
        from flaxqa import reader

        self.predictor = reader.load(model, dtype=dtype, **self.options).predictor

    def run(self, windows: Sequence[Feature], way: str) -> Sequence[Logits]:
        return self.predictor.predict(windows)


class JaxPmap(Jax):
    """The same with rows split over devices by pmap."""

    options: ClassVar[Mapping[str, Any]] = {"parallel": "pmap"}


class JaxXla(Jax):
    """The same without the native kernels."""

    options: ClassVar[Mapping[str, Any]] = {"kernels": "xla"}


class JaxModel(Padded):
    """flaxqa's model, called as transformers' models are: compiled once for each shape."""

    dtypes = ("float32", "bfloat16")

    def __init__(self, model: str, dtype: str, threads: int):
        from flaxqa import checkpoint, devices

        devices.use_compilation_cache()
        self.model = checkpoint.load(model, dtype=dtype).model

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        output = self.model(*(inputs[name].astype(np.int32) for name in INPUTS))
        return np.asarray(output.start_logits), np.asarray(output.end_logits)


class JaxHfStyle(JaxModel):
    """The model without jit, operation by operation, as transformers 4's Flax classes ran."""

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask, types = (inputs[name].astype(np.int32) for name in INPUTS)
        output = self.model.forward(ids, mask, types)
        return np.asarray(output.start_logits), np.asarray(output.end_logits)


class Torch(Padded):
    """transformers' class with its default attention, sdpa."""

    dtypes = ("float32", "bfloat16")
    needs = "'flaxqa[torch]'"
    attention: ClassVar[str] = "sdpa"

    def __init__(self, model: str, dtype: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(
            model, attn_implementation=self.attention, use_safetensors=True
        )
        self.model = loaded.eval().to(getattr(torch, dtype))
        self.names = inspect.signature(loaded.forward).parameters

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        torch = self.torch
        given = {n: torch.from_numpy(each) for n, each in inputs.items() if n in self.names}
        with self.no_grad():
            output = self.model(**given)
            return output.start_logits.float().numpy(), output.end_logits.float().numpy()

    def no_grad(self) -> Any:
        return self.torch.inference_mode()


class TorchEager(Torch):
    """The same with attention as separate operations."""

    attention = "eager"


class TorchCompile(Torch):
    """The same through torch.compile: frozen weights, and of its settings what is fastest on CPUs.

    With fixed shapes, or without max-autotune, its float32 products are those of MKL, which on AMD
    run at half of the rate; in bfloat16 max-autotune is slower.
    """

    def __init__(self, model: str, dtype: str, threads: int):
        super().__init__(model, dtype, threads)
        import torch._dynamo
        import torch._inductor.config

        torch._inductor.config.freezing = True
        torch._dynamo.config.cache_size_limit = 256
        mode = "max-autotune" if dtype == "float32" else None
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
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.names = [one.name for one in self.session.get_inputs()]

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        start, end = self.session.run(None, {name: inputs[name] for name in self.names})
        return start, end


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
