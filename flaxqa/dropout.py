"""Dropout for training: noise that depends on the seed, the step and the row alone.

A row's noise is the same whatever else is in its batch and on however many devices that is split,
so a run on eight devices follows the one on a single device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxqa.errors import ModelRejected, all_problems

LEVELS = 1 << 16  # what a rate is rounded to: two numbers come out of each 32 random bits
# Of each model type what its config.json calls the rates, with transformers' default of each.
NAMES: dict[str, dict[str, tuple[str, float]]] = {
    "distilbert": {
        "hidden": ("dropout", 0.1),
        "attention": ("attention_dropout", 0.1),
        "head": ("qa_dropout", 0.1),
    },
    "bert": {
        "hidden": ("hidden_dropout_prob", 0.1),
        "projection": ("hidden_dropout_prob", 0.1),
        "attention": ("attention_probs_dropout_prob", 0.1),
    },
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """The share of numbers that is set to zero, by place.

    Attributes:
      hidden: of the embeddings and of what a feed-forward layer gives.
      attention: of the attention's weights.
      projection: of what comes out of the attention; only BERT drops there.
      head: of what the question-answering layer gets; only DistilBERT drops there.
    """

    hidden: float = 0.0
    attention: float = 0.0
    projection: float = 0.0
    head: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any], model_type: str) -> Rates:
        """Those of a whole `config.json`.

        Raises:
          ModelRejected: one is not a number from 0 to below 1.
        """
        found = {place: config.get(*named) for place, named in NAMES[model_type].items()}
        if problems := [
            f"{NAMES[model_type][place][0]} is {rate!r}, it must be a number from 0 to below 1"
            for place, rate in found.items()
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1
        ]:
            raise ModelRejected(all_problems("config.json cannot be trained with", problems))
        return cls(**found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """The noise of one step.

    Attributes:
      keys: [B] random keys, one a row.
      rates: how much is dropped where.
    """

    keys: Array
    rates: Rates = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Array, kind: str, place: int) -> Array:
        """`x` [B, ...] after dropout.

        Args:
          x: what is dropped from.
          kind: which of the rates.
          place: a number of its own for each place in the model.
        """
        rate = getattr(self.rates, kind)
        return jax.vmap(lambda row, key: drop(row, key, rate))(x, self.at(place)) if rate else x

    def at(self, place: int) -> Array:
        """The keys [B] of a place in the model."""
        return jax.vmap(lambda key: jax.random.fold_in(key, place))(self.keys)


def drop(x: Array, key: Array, rate: float) -> Array:
    """`x` with this share of its numbers set to zero and the others scaled up.

    The mean stays what it was. Source: Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html.
    """
    level = round(rate * LEVELS)
    if not level:
        return x
    bits = jax.random.bits(key, (-(-x.size // 2),), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)
    kept = noise[: math.prod(x.shape)].reshape(x.shape) >= level
    return jnp.where(kept, x * (LEVELS / (LEVELS - level)), 0).astype(x.dtype)
