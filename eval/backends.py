"""What computes logits: flaxqa and other frameworks, each behind the same call.

A backend loads a checkpoint in its constructor and then turns windows into logits; windows and
decoder are flaxqa's for all. Those that take padded batches get them in one of two ways: `shipped`,
as transformers 4.57's pipeline and documentation do it, in the order they come, 8 at a time, padded
to 384; `tuned`, sorted by length and padded to their longest. (`whole` is one batch of them all.)

A backend of your own is a subclass of `Backend` named as `module:Class`.
"""

from __future__ import annotations

import abc
import importlib
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flaxqa.errors import UsageError
from flaxqa.features import Feature
from flaxqa.predict import Logits

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WAYS = ("shipped", "tuned", "whole")
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

    @abc.abstractmethod
    def __init__(self, model: str, dtype: str, threads: int):
        """Loads a checkpoint directory.

        Raises:
          ImportError: a package is not installed.
        """

    @abc.abstractmethod
    def run(self, windows: Sequence[Feature], way: str) -> list[Logits]:
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

    def run(self, windows: Sequence[Feature], way: str) -> list[Logits]:
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
        from flaxqa import checkpoint, predict

        predict.use_compilation_cache()
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
    needs = "torch"
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


def onnx_file(model: str, folder: Path) -> Path:
    """flaxqa's ONNX export of a checkpoint directory."""
    from flaxqa import checkpoint, export

    return export.export(checkpoint.load(model).model, "onnx", folder / "model.onnx").path


class OnnxRuntime(Padded):
    """flaxqa's ONNX export; int8 through dynamic quantization."""

    dtypes = ("float32", "int8")
    needs = "onnx onnxruntime"

    def __init__(self, model: str, dtype: str, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with tempfile.TemporaryDirectory() as folder:
            path = onnx_file(model, Path(folder))
            if dtype == "int8":
                from onnxruntime.quantization import quantize_dynamic

                quantize_dynamic(path, path.with_suffix(".int8"))
                path = path.with_suffix(".int8")
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        self.names = [one.name for one in self.session.get_inputs()]

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        start, end = self.session.run(None, {name: inputs[name] for name in self.names})
        return start, end


class OpenVino(Padded):
    """The same file in OpenVINO, all cores on one batch."""

    dtypes = ("float32", "bfloat16")
    needs = "onnx openvino"

    def __init__(self, model: str, dtype: str, threads: int):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = onnx_file(model, Path(folder))
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self.names = [one.get_any_name() for one in compiled.inputs]
        self.request = compiled.create_infer_request()

    def logits(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        results = self.request.infer({name: inputs[name] for name in self.names})
        start, end = (results[i].copy() for i in range(2))
        return start, end


class TensorFlow(Padded):
    """flaxqa's SavedModel."""

    needs = "tensorflow-cpu"

    def __init__(self, model: str, dtype: str, threads: int):
        import tensorflow as tf

        from flaxqa import checkpoint, export

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            loaded = checkpoint.load(model).model
            path = export.export(loaded, "saved_model", Path(folder) / "model").path
            self.loaded = tf.saved_model.load(str(path))  # or its variables would go with it
        self.tf, self.serve = tf, self.loaded.signatures["serving_default"]
        self.names = export.inputs_of(loaded.config)

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
