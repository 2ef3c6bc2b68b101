"""transformers' tokenizers with the two kinds of arrays that transformers 5 took from them."""

from __future__ import annotations

import importlib
from typing import Any

import transformers

MAKERS = {"jax": ("jax.numpy", "asarray"), "tf": ("tensorflow", "constant")}


class ArrayKinds:
    """Gives a tokenizer `return_tensors="jax"` and `return_tensors="tf"` back."""

    def __call__(self, *args: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        """As in transformers; "tf" needs TensorFlow."""
        kind = str(getattr(return_tensors, "value", return_tensors))
        if kind not in MAKERS:
            return super().__call__(*args, return_tensors=return_tensors, **kwargs)  # type: ignore[misc]
        module, maker = MAKERS[kind]
        make = getattr(importlib.import_module(module), maker)
        encoding = super().__call__(*args, return_tensors="np", **kwargs)  # type: ignore[misc]
        for name, array in encoding.items():
            encoding[name] = make(array)
        return encoding


class DistilBertTokenizer(ArrayKinds, transformers.DistilBertTokenizer):
    """DistilBERT's tokenizer, by `from_pretrained` of a directory or hub id."""


class BertTokenizer(ArrayKinds, transformers.BertTokenizer):
    """BERT's tokenizer, by `from_pretrained` of a directory or hub id."""
