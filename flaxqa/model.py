"""DistilBERT for extractive question answering, in Flax NNX.

Axes: B rows of the batch, T tokens of a row (S where it is the key side), D `dim`, F `hidden_dim`,
N `n_heads`, H = D / N, V `vocab_size`. Attributes carry the names of the Hugging Face checkpoint,
so `checkpoint.py` maps weights with four leaf names and one transpose.

Numbers: weights and the operands of every matrix product have the dtype of construction; products
accumulate, and norms, softmax, residuals and logits are kept, in float32 (float64 for float64).
A float16 model therefore overflows only where one operand does.

Source: Sanh et al. 2019, https://arxiv.org/abs/1910.01108; checked against
`transformers.DistilBertForQuestionAnswering` in tests/test_model.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from flaxqa.errors import ModelRejected, all_problems

TokenIds = Int[Array | np.ndarray, "B T"]
TokenMask = Int[Array | np.ndarray, "B T"]  # 1 for a token, 0 for padding
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T"]
Weights = Float[Array, "B N T S"]

LAYER_NORM_EPS = 1e-12  # BERT's value; Flax defaults to 1e-6 and PyTorch to 1e-5
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # BERT's is the erf form
    "relu": jax.nn.relu,
}
LIMITS = {  # generous, and small enough that building the abstract model stays cheap
    "vocab_size": 5_000_000,
    "max_position_embeddings": 1_000_000,
    "dim": 65_536,
    "n_heads": 1_024,
    "n_layers": 256,
    "hidden_dim": 262_144,
}


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
    """The fields of a checkpoint's `config.json` that decide its logits, under the same names."""

    vocab_size: int
    max_position_embeddings: int
    dim: int
    n_heads: int
    n_layers: int
    hidden_dim: int
    activation: str = "gelu"
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                problems.append(f"{name} is {value!r}, it must be an integer from 1 to {limit:,}")
        if not problems and self.dim % self.n_heads:
            problems.append(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            known = " or ".join(map(repr, ACTIVATIONS))
            problems.append(f"activation is {self.activation!r}, only {known} is computed")
        if not problems and not (
            type(self.pad_token_id) is int and 0 <= self.pad_token_id < self.vocab_size
        ):
            problems.append(f"pad_token_id is {self.pad_token_id!r}, not an id of the vocabulary")
        if problems:
            raise ModelRejected(all_problems("the config cannot be used", problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DistilBertConfig:
        """The fields above out of a whole `config.json`; its other fields change no logit.

        Raises:
          ModelRejected: a field is missing or out of range, or the model is one that this module
            does not compute (another `model_type`, pruned heads, quantized weights).
        """
        fields = dataclasses.fields(cls)
        problems = []
        if (model_type := config.get("model_type")) != "distilbert":
            problems.append(f"model_type is {model_type!r}, only 'distilbert' is computed")
        else:
            problems += [
                f"{field.name} is missing"
                for field in fields
                if field.default is dataclasses.MISSING and field.name not in config
            ]
        problems += [
            f"{name} is set, such a checkpoint is not computed"
            for name in ("pruned_heads", "quantization_config")
            if config.get(name)
        ]
        if problems:
            raise ModelRejected(all_problems("the config cannot be used", problems))
        given = {field.name: config[field.name] for field in fields if field.name in config}
        if given.get("pad_token_id", 0) is None:
            del given["pad_token_id"]
        return cls(**given)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuestionAnsweringOutput:
    """What the model returns: unnormalised scores of every token, and the insides on request.

    Attributes:
      start_logits: [B, T], each token as the first of the answer. Those of padding mean nothing.
      end_logits: [B, T], each token as the last of the answer.
      hidden_states: `n_layers` + 1 arrays [B, T, D], the embeddings first, or None.
      attentions: `n_layers` arrays [B, N, T, S] whose rows sum to 1, or None.
    """

    start_logits: Logits
    end_logits: Logits
    hidden_states: tuple[Hidden, ...] | None = None
    attentions: tuple[Weights | None, ...] | None = None


def accumulator(dtype: DTypeLike) -> np.dtype:
    """The dtype in which sums over values of `dtype` are kept: float32, or float64 for float64."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


class Layers:
    """Makes the three kinds of layer with one dtype.

    Casting a built model would still compute in float32: nnx.Embed keeps the dtype it was built
    with, and every later layer promotes to it.
    """

    def __init__(self, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype, self.sum_dtype, self.rngs = np.dtype(dtype), accumulator(dtype), rngs

    def linear(self, d_in: int, d_out: int) -> nnx.Linear:
        return nnx.Linear(
            d_in,
            d_out,
            dtype=self.dtype,
            param_dtype=self.dtype,
            preferred_element_type=self.sum_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=self.rngs,
        )

    def embed(self, rows: int, dim: int) -> nnx.Embed:
        return nnx.Embed(
            rows,
            dim,
            dtype=self.sum_dtype,
            param_dtype=self.dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=self.rngs,
        )

    def layer_norm(self, dim: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            dim,
            epsilon=LAYER_NORM_EPS,
            dtype=self.sum_dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )


class Embeddings(nnx.Module):
    def __init__(self, config: DistilBertConfig, make: Layers):
        self.word_embeddings = make.embed(config.vocab_size, config.dim)
        self.position_embeddings = make.embed(config.max_position_embeddings, config.dim)
        self.LayerNorm = make.layer_norm(config.dim)

    def __call__(self, input_ids: TokenIds) -> Hidden:
        input_ids = jnp.asarray(input_ids)
        positions = jnp.arange(input_ids.shape[1])
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))


class Attention(nnx.Module):
    def __init__(self, config: DistilBertConfig, make: Layers):
        self.n_heads, self.dtype, self.sum_dtype = config.n_heads, make.dtype, make.sum_dtype
        self.q_lin = make.linear(config.dim, config.dim)
        self.k_lin = make.linear(config.dim, config.dim)
        self.v_lin = make.linear(config.dim, config.dim)
        self.out_lin = make.linear(config.dim, config.dim)

    def __call__(
        self, x: Hidden, attention_mask: TokenMask, keep_weights: bool
    ) -> tuple[Hidden, Weights | None]:
        heads = (*x.shape[:2], self.n_heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q_lin, self.k_lin, self.v_lin))
        q = q / q.shape[-1] ** 0.5  # before the product: float16 scores have less to hold
        q, k, v = (each.astype(self.dtype) for each in (q, k, v))

        def attend(row: tuple[Array, Array, Array, Array]) -> tuple[Array, Array | None]:
            """One row: q, k, v [T, N, H] and mask [T] to [T, N, H] and the weights [N, T, S]."""
            q, k, v, mask = row
            scores = self.product("TNH,SNH->NTS", q, k)
            # The lowest finite number and not -inf: a row of padding alone must not become NaN.
            weights = jax.nn.softmax(jnp.where(mask == 1, scores, jnp.finfo(scores.dtype).min))
            mixed = self.product("NTS,SNH->TNH", weights.astype(self.dtype), v)
            return mixed, weights if keep_weights else None

        # On a CPU the scores of one row stay in its cache, those of a batch do not: row by row is
        # five times as fast. An accelerator takes all rows at once.
        mixed, weights = jax.lax.platform_dependent(
            (q, k, v, attention_mask),
            cpu=lambda rows: jax.lax.map(attend, rows),
            default=jax.vmap(attend),
        )
        return self.out_lin(mixed.reshape(x.shape)), weights

    def product(self, axes: str, a: Array, b: Array) -> Array:
        return jnp.einsum(axes, a, b, preferred_element_type=self.sum_dtype)


class FeedForward(nnx.Module):
    def __init__(self, config: DistilBertConfig, make: Layers):
        self.activation = config.activation
        self.lin1 = make.linear(config.dim, config.hidden_dim)
        self.lin2 = make.linear(config.hidden_dim, config.dim)

    def __call__(self, x: Hidden) -> Hidden:
        return self.lin2(ACTIVATIONS[self.activation](self.lin1(x)))


class TransformerBlock(nnx.Module):
    """Post-norm: each sublayer is added to its input and the sum is normalised."""

    def __init__(self, config: DistilBertConfig, make: Layers):
        self.attention = Attention(config, make)
        self.sa_layer_norm = make.layer_norm(config.dim)
        self.ffn = FeedForward(config, make)
        self.output_layer_norm = make.layer_norm(config.dim)

    def __call__(
        self, x: Hidden, attention_mask: TokenMask, keep_weights: bool
    ) -> tuple[Hidden, Weights | None]:
        mixed, weights = self.attention(x, attention_mask, keep_weights)
        x = self.sa_layer_norm(x + mixed)
        return self.output_layer_norm(x + self.ffn(x)), weights


class Transformer(nnx.Module):
    def __init__(self, config: DistilBertConfig, make: Layers):
        self.layer = nnx.List([TransformerBlock(config, make) for _ in range(config.n_layers)])

    def __call__(
        self, x: Hidden, attention_mask: TokenMask, keep_weights: bool
    ) -> tuple[tuple[Hidden, ...], tuple[Weights | None, ...]]:
        hidden_states, attentions = [x], []
        for block in self.layer:
            x, weights = block(x, attention_mask, keep_weights)
            hidden_states.append(x)
            attentions.append(weights)
        return tuple(hidden_states), tuple(attentions)


class DistilBert(nnx.Module):
    def __init__(self, config: DistilBertConfig, make: Layers):
        self.embeddings = Embeddings(config, make)
        self.transformer = Transformer(config, make)

    def __call__(
        self, input_ids: TokenIds, attention_mask: TokenMask, keep_weights: bool
    ) -> tuple[tuple[Hidden, ...], tuple[Weights | None, ...]]:
        return self.transformer(self.embeddings(input_ids), attention_mask, keep_weights)


class DistilBertForQuestionAnswering(nnx.Module):
    """DistilBERT with a linear layer that scores every token as the answer's start and end.

    A new model has random weights; `from_pretrained` gives a trained one.
    """

    def __init__(
        self, config: DistilBertConfig, *, dtype: DTypeLike = "float32", rngs: nnx.Rngs
    ) -> None:
        make = Layers(dtype, rngs)
        self.config, self.dtype = config, make.dtype
        self.distilbert = DistilBert(config, make)
        self.qa_outputs = make.linear(config.dim, 2)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """Scores every token as the first and as the last of the answer; compiled once a shape.

        Takes what a transformers tokenizer returns: `model(**tokenizer(..., return_tensors="np"))`.

        Args:
          input_ids: [B, T] ids of `[CLS] question [SEP] context [SEP]`, padded to T.
          attention_mask: [B, T] 1 for a token, 0 for padding, which never changes a token's logits;
            all ones when left out.
          token_type_ids: accepted because some tokenizers return them, and not used: DistilBERT has
            no segment embeddings.
          output_hidden_states: whether to return them.
          output_attentions: whether to return them.

        Raises:
          ValueError: the shapes do not fit each other, T is above `max_position_embeddings`, an id
            is outside the vocabulary, or a mask is neither 0 nor 1.
        """
        if attention_mask is None:
            attention_mask = np.ones(np.shape(input_ids), np.int32)
        self.check(input_ids, attention_mask)
        graphdef, state = nnx.split(self)
        return _jitted_forward(
            graphdef,
            state,
            jnp.asarray(input_ids, jnp.int32),
            jnp.asarray(attention_mask, jnp.int32),
            output_hidden_states,
            output_attentions,
        )

    def forward(
        self,
        input_ids: TokenIds,
        attention_mask: TokenMask,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """The computation of `__call__`, unchecked and not compiled: for jit, grad and pmap."""
        hidden_states, attentions = self.distilbert(input_ids, attention_mask, output_attentions)
        logits = self.qa_outputs(hidden_states[-1])
        return QuestionAnsweringOutput(
            logits[..., 0],
            logits[..., 1],
            hidden_states if output_hidden_states else None,
            attentions if output_attentions else None,
        )

    def check(self, input_ids: ArrayLike, attention_mask: ArrayLike) -> None:
        """Refuses what a device would compute without an error: see `Raises` of `__call__`."""
        shape, longest = np.shape(input_ids), self.config.max_position_embeddings
        if len(shape) != 2 or np.shape(attention_mask) != shape:
            raise ValueError(
                f"input_ids {shape} and attention_mask {np.shape(attention_mask)} must be [B, T]"
            )
        if shape[1] > longest:  # an index past the table reads NaN, without an error
            raise ValueError(
                f"rows of {shape[1]} tokens, but the checkpoint has {longest} positions"
            )
        if isinstance(input_ids, jax.core.Tracer) or isinstance(attention_mask, jax.core.Tracer):
            return
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids are {ids.dtype}, they must be integers")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"token id {worst}, but the vocabulary has {self.config.vocab_size} entries"
            )
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("attention_mask has values other than 0 and 1")

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, dtype: DTypeLike = "float32"
    ) -> DistilBertForQuestionAnswering:
        """The trained model of a local directory, or of a repository on the Hugging Face Hub.

        Args:
          name: a directory, or a hub id such as
            `distilbert/distilbert-base-uncased-distilled-squad`.
          revision: branch, tag or commit of the hub repository.
          dtype: of the weights and of the products' operands: float32, bfloat16, float16, float64.

        Raises:
          ModelRejected: see `flaxqa.checkpoint.load`.
        """
        from flaxqa import checkpoint

        return checkpoint.load(name, revision=revision, dtype=dtype).model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which transformers' torch class loads."""
        from flaxqa import checkpoint

        checkpoint.save(self, directory)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _jitted_forward(
    graphdef: nnx.GraphDef[DistilBertForQuestionAnswering],
    state: nnx.State,
    input_ids: TokenIds,
    attention_mask: TokenMask,
    output_hidden_states: bool,
    output_attentions: bool,
) -> QuestionAnsweringOutput:
    return nnx.merge(graphdef, state).forward(
        input_ids, attention_mask, output_hidden_states, output_attentions
    )
