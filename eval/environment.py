"""What a measurement was made on: the machine, the packages, the commit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flaxqa


def machine() -> dict[str, Any]:
    """The processor and the system."""
    name = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    return {
        "processor": name,
        "cpus": os.cpu_count(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of each package its version, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if "flaxqa" in found:  # also where it was never installed
        found["flaxqa"] = flaxqa.__version__
    return found


def peak_memory() -> int:
    """The most bytes that this process had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def commit() -> str | None:
    """The commit of this checkout, with "+" where files were changed after it; None without one."""

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


OPTIONAL = {  # with what installs each
    "torch": "torch", "onnxruntime": "export", "openvino": "openvino", "tensorflow": "tensorflow",
    "ray": "ray", "jinja2": "compare", "matplotlib": "compare",
}  # fmt: skip
KNOWN = ("flaxqa", "jax", "jaxlib", "flax", "transformers", "datasets", "tokenizers")


def computes(name: str | None, **options: Any) -> dict[str, Any]:
    """What would compute here, and why, for `flaxqa info`.

    Args:
      name: a checkpoint; None for one layer of DistilBERT-base's sizes.
      **options: those of `flaxqa.load`.
    """
    import jax

    from flaxqa import devices, native, predict, reader
    from flaxqa.config import DeviceOptions

    devices.use_compilation_cache()
    if name is None:
        dtype = options["dtype"] if options["dtype"] != "auto" else devices.default_dtype()
        limits = {key: options[key] for key in ("max_length",) if options[key] is not None}
        chosen = {field.name: options[field.name] for field in dataclasses.fields(DeviceOptions)}
        model: Any = one_layer(dtype)
        predictor = predict.Predictor(model, **limits, **chosen)
    else:
        loaded = reader.load(name, **options)
        model, predictor = loaded.checkpoint.model, loaded.predictor
    on_cpu = predictor.devices[0].platform == "cpu"
    problem = native.why_not(model.config, model.dtype) if on_cpu else "it is for CPUs"
    if predictor.kernels == "native":
        why = f"the compiled library, with {predictor.instruction_set}"
    else:
        why = f"not the compiled library: {problem or 'XLA was asked for, or is faster here'}"
    packages = versions((*KNOWN, *OPTIONAL))
    return {
        **{name: packages[name] for name in KNOWN},
        "python": platform.python_version(),
        "processor": machine()["processor"],
        "cpus": os.cpu_count(),
        "devices": ", ".join(f"{one.platform}:{one.id} {one.device_kind}"
                             for one in predictor.devices),
        "model": name or "one layer of DistilBERT-base's sizes",
        "dtype": str(model.dtype),
        "kernels": predictor.kernels,
        "why": why,
        "attention": predictor.attention,
        "batch_tokens": predictor.row_tokens[-1],
        "compilation_cache": jax.config.jax_compilation_cache_dir,  # type: ignore[attr-defined]
        **{name: packages[name] or f"not installed: pip install 'flaxqa[{extra}]'"
           for name, extra in OPTIONAL.items()},
    }  # fmt: skip


def one_layer(dtype: str) -> Any:
    """A random model of DistilBERT-base's sizes with one layer and few words."""
    from flax import nnx

    from flaxqa.checkpoint import DistilBertForQuestionAnswering
    from flaxqa.model import DistilBertConfig

    config = DistilBertConfig(
        vocab_size=100, max_position_embeddings=512, dim=768, n_heads=12, n_layers=1,
        hidden_dim=3_072,
    )  # fmt: skip
    return DistilBertForQuestionAnswering(config, dtype=dtype, rngs=nnx.Rngs(0))
