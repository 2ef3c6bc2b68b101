"""Extractive question answering with DistilBERT and BERT on JAX and Flax.

- `load(model)` gives a `Reader`: `answer`, `answers`, `answer_questions`, `search`;
  `QuestionAnswerer` is one for other people's pipelines and data frames.
- `evaluate(model, data)` scores a checkpoint, `compare(model, data, backends)` frameworks.
- `pipeline("question-answering", model=...)` is the call of transformers 4.
- `DistilBertForQuestionAnswering`, `BertForQuestionAnswering` are the models, with
  `from_pretrained`; `DistilBertTokenizer`, `BertTokenizer` go with them.
- `errors` are what is raised on purpose: `FlaxqaError` and its kinds, most of them ValueErrors.

The public names are loaded when they are first used, so that `import flaxqa` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxqa.answerer import QuestionAnswerer
    from flaxqa.answers import Answer, Answers
    from flaxqa.checkpoint import BertForQuestionAnswering, DistilBertForQuestionAnswering
    from flaxqa.eval.api import compare, evaluate
    from flaxqa.features import Example
    from flaxqa.model import (
        BertConfig,
        DistilBertConfig,
    )
    from flaxqa.pipelines import pipeline
    from flaxqa.reader import Reader, load
    from flaxqa.tokenizer import BertTokenizer, DistilBertTokenizer

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Answers",
    "BertConfig",
    "BertForQuestionAnswering",
    "BertTokenizer",
    "DistilBertConfig",
    "DistilBertForQuestionAnswering",
    "DistilBertTokenizer",
    "Example",
    "QuestionAnswerer",
    "Reader",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "pipeline",
]

MODULES = {
    "Answer": "flaxqa.answers",
    "Answers": "flaxqa.answers",
    "BertConfig": "flaxqa.model",
    "BertForQuestionAnswering": "flaxqa.checkpoint",
    "BertTokenizer": "flaxqa.tokenizer",
    "DistilBertConfig": "flaxqa.model",
    "DistilBertForQuestionAnswering": "flaxqa.checkpoint",
    "DistilBertTokenizer": "flaxqa.tokenizer",
    "Example": "flaxqa.features",
    "QuestionAnswerer": "flaxqa.answerer",
    "Reader": "flaxqa.reader",
    "compare": "flaxqa.eval.api",
    "evaluate": "flaxqa.eval.api",
    "load": "flaxqa.reader",
    "pipeline": "flaxqa.pipelines",
}


def __dir__() -> list[str]:
    return sorted([*__all__, "errors"])


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("flaxqa.errors")
    if name not in MODULES:
        raise AttributeError(f"module 'flaxqa' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
