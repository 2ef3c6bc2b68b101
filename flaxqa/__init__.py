"""Extractive question answering with DistilBERT on JAX and Flax.

The public names are loaded when they are first used, so that `import flaxqa` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxqa.answers import Answer
    from flaxqa.features import Example
    from flaxqa.model import DistilBertConfig, DistilBertForQuestionAnswering

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "DistilBertConfig",
    "DistilBertForQuestionAnswering",
    "Example",
    "__version__",
]

MODULES = {
    "Answer": "flaxqa.answers",
    "Example": "flaxqa.features",
    "DistilBertConfig": "flaxqa.model",
    "DistilBertForQuestionAnswering": "flaxqa.model",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'flaxqa' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
