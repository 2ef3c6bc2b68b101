"""What computes logits: flaxqa and other frameworks, each behind the call of `Backend`.

What has no code for an accelerator runs on the CPU and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flaxqa.errors import UsageError
from flaxqa.features import Example, Feature, Windows
from flaxqa.spans import Logits

from . import worker
from .backend import INPUTS, STEPS, Backend, Padded

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from flaxqa.model import EncoderConfig


class Jax(Backend):
    """flaxqa's predictor, which packs windows into rows; both ways are the same for it."""

    dtypes = ("float32", "bfloat16")
    devices = ("cpu", "gpu", "tpu")
    traceable = True
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: str, dtype: str, threads: int):
        from flaxqa import reader

        jax_runs_on(self.device)
        self.reader = reader.load(model, dtype=dtype, **self.options)
        self.predictor = self.reader.predictor

    def stream(self, examples: Sequence[Example]) -> tuple[list[str], dict[str, float]]:
        from flaxqa import answers, features, reader

        spent = reader.Spent()
        texts = []
        chunks = reader.chunks(examples, size_of=features.characters)
        decode = answers.Decoder("squad", top_k=1)
        for found, took in self.reader.answer_chunks(chunks, decode):
            spent.add(took)
            texts += [one[0].text if one else "" for one in found]
        stages = (spent.tokenize_seconds, spent.device_seconds, spent.decode_seconds)
        return texts, dict(zip(("tokenize", "compute", "decode"), stages, strict=True))

    def step(self, windows: Sequence[Feature]) -> dict[str, Any]:
        import jax

        together, predictor = Windows.of(windows), self.predictor
        batch = max(predictor.plan(together.lengths.tolist()), key=lambda one: one.shape.tokens)
        predictor.compile([batch.shape])
        rows = jax.device_put(predictor.inputs(batch, together)[0])
        run = predictor.compiled[batch.shape]
        jax.block_until_ready(run(rows))
        began = time.perf_counter()
        jax.block_until_ready([run(rows) for _ in range(STEPS)])
        seconds = (time.perf_counter() - began) / STEPS
        chosen = [index for row in batch.rows for index in row]
        useful = useful_flops(predictor.config, together.lengths[chosen])
        return {"seconds": seconds, "useful_flops": useful, **batch.shape._asdict()}

    def run(self, windows: Sequence[Feature], way: str) -> Sequence[Logits]:
        return self.predictor.predict(windows)

    def where(self) -> str:
        return str(self.predictor.devices[0].device_kind)

    def device_memory(self) -> int | None:
        return jax_device_memory()

    def about(self) -> dict[str, Any]:
        return {
            **self.predictor.computed_by,
            "devices": len(self.predictor.devices),
            "shapes": len(self.predictor.shapes),
            "compile_seconds": self.predictor.compile_seconds,
        }


def jax_runs_on(device: str) -> None:
    """Makes sure that JAX computes on such a device.

    Raises:
      NotHere: it has none.
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if (there := jax.default_backend()) != device:
        raise worker.NotHere(f"JAX has no {device} here: it would run on the {there}")


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
            raise worker.NotHere(f"torch {torch.__version__} has no GPU here")
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
    command = [sys.executable, "-P", "-c", script, *arguments]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, env=worker.environment()
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["a script failed"])[-1])


def export(model: str, format: str, folder: str) -> str:
    """`flaxqa export` of a checkpoint directory."""
    path = str(Path(folder) / format)
    if Path(path).exists():  # of another worker
        return path
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
        if Path(f"{path}.int8").exists():
            return f"{path}.int8"
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


def backend_of(name: str) -> type[Backend]:
    """The class that a name of BACKENDS, or `module:Class`, stands for.

    Raises:
      UsageError: there is none.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    module, colon, kind = name.partition(":")
    if colon:
        here = os.getcwd()
        if here not in sys.path:
            sys.path.append(here)  # the last place, so that nothing there hides another module
        try:
            found = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"backend {name!r} cannot be imported: {error}") from error
        if isinstance(found, type) and issubclass(found, Backend):
            return found
    raise UsageError(
        f"backend {name!r} is not one of {', '.join(BACKENDS)}, nor module:Class of a Backend"
    )
