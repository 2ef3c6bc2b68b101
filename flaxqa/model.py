"""DistilBERT and BERT for extractive question answering, in Flax NNX: one encoder.

Axes: B rows of the batch, T tokens of a row (S where it is the key side), D `dim`, F `hidden_dim`,
N `n_heads`, H = D / N, V `vocab_size`. Attributes carry the names of a DistilBERT checkpoint, so
`checkpoint.py` maps its weights with four leaf names and one transpose. BERT is the same
computation with segment embeddings added; its checkpoints call the same things otherwise.

Numbers: weights and the operands of every matrix product have the dtype of construction; products
accumulate, and norms, softmax, residuals and logits are kept, in float32 (float64 for float64).
A float16 model therefore overflows only where one operand does.

Sources: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; Sanh et al. 2019,
https://arxiv.org/abs/1910.01108; checked against transformers' `BertForQuestionAnswering` and
`DistilBertForQuestionAnswering` in tests/test_model.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from flaxqa.dropout import Dropout, drop
from flaxqa.errors import ModelRejected, all_problems

TokenIds = Int[Array | np.ndarray, "B T"]
TokenMask = Int[Array | np.ndarray, "B T"]  # 1 for a token, 0 for padding
TokenTypes = Int[Array | np.ndarray, "B T"]  # 0 for [CLS] question [SEP], 1 for context [SEP]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T"]
Weights = Float[Array, "B N T S"]

LAYER_NORM_EPS = 1e-12  # BERT's value; Flax defaults to 1e-6 and PyTorch to 1e-5
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # BERT's is the erf form
    "relu": jax.nn.relu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),  # by tanh, as GPT-2's
    "silu": jax.nn.silu,
}
# Other names that transformers has for the same functions. gelu_fast has 0.7978845608 in the place
# of the root of 2 / pi, which is as near as four in a trillion.
SAME_ACTIVATIONS = {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
                    "swish": "silu"}  # fmt: skip
LIMITS = {  # generous, and small enough that building the abstract model stays cheap
    "vocab_size": 5_000_000,
    "max_position_embeddings": 1_000_000,
    "dim": 65_536,
    "n_heads": 1_024,
    "n_layers": 256,
    "hidden_dim": 262_144,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What decides the logits: the fields of both kinds of checkpoint, under DistilBERT's names.

    Attributes:
      type_vocab_size: rows of the segment embeddings, 0 without them.
      layer_norm_eps: what is added to the variance.
    """

    vocab_size: int
    max_position_embeddings: int
    dim: int
    n_heads: int
    n_layers: int
    hidden_dim: int
    activation: str = "gelu"
    pad_token_id: int = 0
    type_vocab_size: int = 0
    layer_norm_eps: float = LAYER_NORM_EPS

    model_type: ClassVar[str]
    # What `config.json` calls each field that it may set.
    NAMES: ClassVar[Mapping[str, str]]
    # Other fields of `config.json` that change the logits, with the values that are computed.
    COMPUTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "pruned_heads": (None, {}),
        "quantization_config": (None, {}),
    }

    def __post_init__(self) -> None:
        problems = []
        called = {field.name: field.name for field in dataclasses.fields(self)} | dict(self.NAMES)
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                problems.append(
                    f"{called[name]} is {value!r}, it must be an integer from 1 to {limit:,}"
                )
        if not problems and self.dim % self.n_heads:
            problems.append(
                f"{called['dim']} {self.dim} is not a multiple of {called['n_heads']} "
                f"{self.n_heads}"
            )
        if not isinstance(self.activation, str) or self.function not in ACTIVATIONS:
            known = ", ".join((*ACTIVATIONS, *SAME_ACTIVATIONS))
            problems.append(
                f"{called['activation']} is {self.activation!r}, only {known} are computed"
            )
        if not problems and not (
            type(self.pad_token_id) is int and 0 <= self.pad_token_id < self.vocab_size
        ):
            problems.append(f"pad_token_id is {self.pad_token_id!r}, not an id of the vocabulary")
        types = (2, 1_024) if "type_vocab_size" in self.NAMES else (0, 0)
        if type(self.type_vocab_size) is not int or not (
            types[0] <= self.type_vocab_size <= types[1]
        ):
            problems.append(
                f"type_vocab_size is {self.type_vocab_size!r}, it must be an integer from "
                f"{types[0]} to {types[1]:,}"
            )
        if type(self.layer_norm_eps) is not float or not 0 < self.layer_norm_eps < 1:
            problems.append(
                f"layer_norm_eps is {self.layer_norm_eps!r}, it must be a number between 0 and 1"
            )
        if problems:
            raise ModelRejected(all_problems("the config cannot be used", problems))

    @property
    def function(self) -> str:
        """The activation under its name in ACTIVATIONS."""
        return SAME_ACTIVATIONS.get(self.activation, self.activation)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The fields above out of a whole `config.json`; its other fields change no logit.

        Raises:
          ModelRejected: a field is missing or out of range, or the model is one that this module
            does not compute (another `model_type`, pruned heads, quantized weights).
        """
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name in cls.NAMES}
        problems = []
        if (model_type := config.get("model_type", cls.model_type)) != cls.model_type:
            problems.append(f"model_type is {model_type!r}, it must be {cls.model_type!r}")
        problems += [
            f"{cls.NAMES[name]} is missing"
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and cls.NAMES[name] not in config
        ]
        problems += [
            f"{name} is {config[name]!r}, such a checkpoint is not computed"
            for name, computed in cls.COMPUTED.items()
            if name in config and config[name] not in computed
        ]
        if problems:
            raise ModelRejected(all_problems("the config cannot be used", problems))
        given = {name: config[cls.NAMES[name]] for name in fields if cls.NAMES[name] in config}
        if given.get("pad_token_id", 0) is None:
            del given["pad_token_id"]
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` has them, `model_type` first."""
        fields = {theirs: getattr(self, ours) for ours, theirs in self.NAMES.items()}
        return {"model_type": self.model_type, **fields}


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The fields of a DistilBERT checkpoint's `config.json` that decide its logits."""

    model_type = "distilbert"
    NAMES = {  # noqa: RUF012 (a class variable, as declared above)
        name: name for name in (*LIMITS, "activation", "pad_token_id")
    }


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The fields of a BERT checkpoint's `config.json` that decide its logits, called as above."""

    type_vocab_size: int = 2

    model_type = "bert"
    NAMES = {  # noqa: RUF012
        **DistilBertConfig.NAMES,
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
        "type_vocab_size": "type_vocab_size",
        "layer_norm_eps": "layer_norm_eps",
    }
    COMPUTED = {  # noqa: RUF012
        **EncoderConfig.COMPUTED,
        "position_embedding_type": ("absolute",),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
    }


CONFIGS: dict[str, type[EncoderConfig]] = {
    kind.model_type: kind for kind in (DistilBertConfig, BertConfig)
}


def type_by_names(config: Mapping[str, Any]) -> str | None:
    """The model type of a `config.json` of 2019, which does not name it, as far as it tells.

    By the class in `architectures`, or else by what only DistilBERT calls its fields. Many families
    have BERT's names, so those alone tell nothing.
    """
    classes = config.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if found := re.match(r"(?:TF|Flax)?(DistilBert|Bert)(?:For|Model)", str(name)):
            return found[1].lower()
        return None
    return "distilbert" if {"dim", "n_heads", "n_layers", "hidden_dim"} <= config.keys() else None


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    """The config that the `model_type` of a whole `config.json` asks for; see `from_dict`."""
    model_type = config["model_type"] if "model_type" in config else type_by_names(config)
    if model_type is None and "model_type" not in config:
        raise ModelRejected(
            "it has no model_type, and neither its architectures nor its fields tell it; add "
            f'"model_type": one of {", ".join(CONFIGS)}, if it is that'
        )
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise ModelRejected(
            f"model_type is {model_type!r}, only {' and '.join(map(repr, CONFIGS))} are computed"
        )
    return CONFIGS[model_type].from_dict(config)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuestionAnsweringOutput:
    """What the model returns: unnormalised scores of every token, and the insides on request.

    As transformers' outputs it can also be indexed, by name or by number.

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

    def __getitem__(self, key: str | int | slice) -> Any:
        """The field of that name, or of that place among those that are there."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in their order."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)


def accumulator(dtype: DTypeLike) -> np.dtype:
    """The dtype in which sums over values of `dtype` are kept: float32, or float64 for float64."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


class Layers:
    """Makes the three kinds of layer with one dtype.

    Casting a built model would still compute in float32: nnx.Embed keeps the dtype it was built
    with, and every later layer promotes to it.
    """

    def __init__(self, dtype: DTypeLike, layer_norm_eps: float, rngs: nnx.Rngs):
        self.dtype, self.sum_dtype, self.rngs = np.dtype(dtype), accumulator(dtype), rngs
        self.layer_norm_eps = layer_norm_eps

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
            epsilon=self.layer_norm_eps,
            dtype=self.sum_dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )


class Embeddings(nnx.Module):
    def __init__(self, config: EncoderConfig, make: Layers):
        self.word_embeddings = make.embed(config.vocab_size, config.dim)
        self.position_embeddings = make.embed(config.max_position_embeddings, config.dim)
        if config.type_vocab_size:
            self.token_type_embeddings = make.embed(config.type_vocab_size, config.dim)
        self.LayerNorm = make.layer_norm(config.dim)

    def __call__(self, input_ids: TokenIds, token_type_ids: TokenTypes | None) -> Hidden:
        input_ids = jnp.asarray(input_ids)
        x = self.word_embeddings(input_ids)
        if hasattr(self, "token_type_embeddings"):
            if token_type_ids is None:
                token_type_ids = jnp.zeros_like(input_ids)
            x = x + self.token_type_embeddings(jnp.asarray(token_type_ids))
        return self.LayerNorm(x + self.position_embeddings(jnp.arange(input_ids.shape[1])))


class Attention(nnx.Module):
    def __init__(self, config: EncoderConfig, make: Layers):
        self.n_heads, self.dtype, self.sum_dtype = config.n_heads, make.dtype, make.sum_dtype
        self.q_lin = make.linear(config.dim, config.dim)
        self.k_lin = make.linear(config.dim, config.dim)
        self.v_lin = make.linear(config.dim, config.dim)
        self.out_lin = make.linear(config.dim, config.dim)

    def __call__(
        self,
        x: Hidden,
        attention_mask: TokenMask,
        keep_weights: bool,
        dropout: Dropout | None = None,
        place: int = 0,
    ) -> tuple[Hidden, Weights | None]:
        heads = (*x.shape[:2], self.n_heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q_lin, self.k_lin, self.v_lin))
        q = q / q.shape[-1] ** 0.5  # before the product: float16 scores have less to hold
        q, k, v = (each.astype(self.dtype) for each in (q, k, v))

        def attend(row: tuple[Array, ...]) -> tuple[Array, Array | None]:
            """One row: q, k, v [T, N, H] and mask [T] to [T, N, H] and the weights [N, T, S]."""
            q, k, v, mask, *keys = row
            scores = self.product("TNH,SNH->NTS", q, k)
            # The lowest finite number and not -inf: a row of padding alone must not become NaN.
            weights = jax.nn.softmax(jnp.where(mask == 1, scores, jnp.finfo(scores.dtype).min))
            for key in keys:
                weights = drop(weights, key, dropout.rates.attention if dropout else 0.0)
            mixed = self.product("NTS,SNH->TNH", weights.astype(self.dtype), v)
            return mixed, weights if keep_weights else None

        # On a CPU the scores of one row stay in its cache, those of a batch do not: row by row is
        # five times as fast. An accelerator takes all rows at once.
        rows: tuple[Array, ...] = (q, k, v, jnp.asarray(attention_mask))
        if dropout is not None:
            rows = (*rows, dropout.at(place))
            # The weights, the largest of all arrays, are computed anew for the gradients.
            attend = jax.checkpoint(attend)
        mixed, weights = jax.lax.platform_dependent(
            rows, cpu=lambda rows: jax.lax.map(attend, rows), default=jax.vmap(attend)
        )
        mixed = self.out_lin(mixed.reshape(x.shape))
        return mixed if dropout is None else dropout(mixed, "projection", place + 1), weights

    def product(self, axes: str, a: Array, b: Array) -> Array:
        return jnp.einsum(axes, a, b, preferred_element_type=self.sum_dtype)


class FeedForward(nnx.Module):
    def __init__(self, config: EncoderConfig, make: Layers):
        self.activation = config.function
        self.lin1 = make.linear(config.dim, config.hidden_dim)
        self.lin2 = make.linear(config.hidden_dim, config.dim)

    def __call__(self, x: Hidden) -> Hidden:
        return self.lin2(ACTIVATIONS[self.activation](self.lin1(x)))


class TransformerBlock(nnx.Module):
    """Post-norm: each sublayer is added to its input and the sum is normalised."""

    def __init__(self, config: EncoderConfig, make: Layers):
        self.attention = Attention(config, make)
        self.sa_layer_norm = make.layer_norm(config.dim)
        self.ffn = FeedForward(config, make)
        self.output_layer_norm = make.layer_norm(config.dim)

    def __call__(
        self,
        x: Hidden,
        attention_mask: TokenMask,
        keep_weights: bool,
        dropout: Dropout | None = None,
        place: int = 0,
    ) -> tuple[Hidden, Weights | None]:
        mixed, weights = self.attention(x, attention_mask, keep_weights, dropout, place)
        x = self.sa_layer_norm(x + mixed)
        new = self.ffn(x) if dropout is None else dropout(self.ffn(x), "hidden", place + 2)
        return self.output_layer_norm(x + new), weights


class Transformer(nnx.Module):
    def __init__(self, config: EncoderConfig, make: Layers):
        self.layer = nnx.List([TransformerBlock(config, make) for _ in range(config.n_layers)])

    def __call__(
        self, x: Hidden, attention_mask: TokenMask, keep_weights: bool, dropout: Dropout | None
    ) -> tuple[tuple[Hidden, ...], tuple[Weights | None, ...]]:
        hidden_states, attentions = [x], []
        for index, block in enumerate(self.layer):
            x, weights = block(x, attention_mask, keep_weights, dropout, 3 * index + 2)
            hidden_states.append(x)
            attentions.append(weights)
        return tuple(hidden_states), tuple(attentions)


class Encoder(nnx.Module):
    def __init__(self, config: EncoderConfig, make: Layers):
        self.embeddings = Embeddings(config, make)
        self.transformer = Transformer(config, make)

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenMask,
        token_type_ids: TokenTypes | None,
        keep_weights: bool,
        dropout: Dropout | None,
    ) -> tuple[tuple[Hidden, ...], tuple[Weights | None, ...]]:
        x = self.embeddings(input_ids, token_type_ids)
        if dropout is not None:
            x = dropout(x, "hidden", 0)
        return self.transformer(x, attention_mask, keep_weights, dropout)


class QuestionAnsweringModel(nnx.Module):
    """An encoder with a linear layer that scores every token as the answer's start and end.

    What `DistilBertForQuestionAnswering` and `BertForQuestionAnswering` of `flaxqa.checkpoint` have
    in common. The encoder is the attribute that its checkpoints call it, `distilbert` or `bert`.
    """

    config_class: ClassVar[type[EncoderConfig]]

    def __init__(
        self, config: EncoderConfig, *, dtype: DTypeLike = "float32", rngs: nnx.Rngs
    ) -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} needs a {self.config_class.__name__}")
        make = Layers(dtype, config.layer_norm_eps, rngs)
        self.config, self.dtype = config, make.dtype
        setattr(self, config.model_type, Encoder(config, make))
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
        To PyTorch's tensors it answers with PyTorch's tensors, without gradients.

        Args:
          input_ids: [B, T] ids of `[CLS] question [SEP] context [SEP]`, padded to T.
          attention_mask: [B, T] 1 for a token, 0 for padding, which never changes a token's logits;
            all ones when left out.
          token_type_ids: [B, T] 0 for `[CLS] question [SEP]` and 1 for `context [SEP]`; all zeros
            when left out, as in transformers. DistilBERT has no segment embeddings and takes no
            notice of them.
          output_hidden_states: whether to return them.
          output_attentions: whether to return them.

        Raises:
          ValueError: the shapes do not fit each other, T is above `max_position_embeddings`, an id
            or a segment is outside its vocabulary, or a mask is neither 0 nor 1.
        """
        shape = np.shape(input_ids)
        if attention_mask is None:
            attention_mask = np.ones(shape, np.int32)
        if token_type_ids is None or not self.config.type_vocab_size:
            token_type_ids = np.zeros(shape, np.int32)
        given = [
            each if isinstance(each, jax.Array) else np.asarray(each)
            for each in (input_ids, attention_mask, token_type_ids)
        ]
        self.check(*given)
        graphdef, state = nnx.split(self)
        output = _jitted_forward(
            graphdef,
            state,
            *(jnp.asarray(each, jnp.int32) for each in given),
            output_hidden_states,
            output_attentions,
        )
        if type(input_ids).__module__.partition(".")[0] == "torch":
            import torch

            return jax.tree.map(lambda array: torch.from_numpy(np.array(array)), output)
        return output

    @property
    def encoder(self) -> Encoder:
        """The encoder, whatever its checkpoints call it."""
        encoder: Encoder = getattr(self, self.config.model_type)
        return encoder

    def forward(
        self,
        input_ids: TokenIds,
        attention_mask: TokenMask,
        token_type_ids: TokenTypes | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout: Dropout | None = None,
    ) -> QuestionAnsweringOutput:
        """The computation of `__call__`, unchecked and not compiled: for jit, grad and pmap."""
        hidden_states, attentions = self.encoder(
            input_ids, attention_mask, token_type_ids, output_attentions, dropout
        )
        last = hidden_states[-1]
        logits = self.qa_outputs(last if dropout is None else dropout(last, "head", 1))
        return QuestionAnsweringOutput(
            logits[..., 0],
            logits[..., 1],
            hidden_states if output_hidden_states else None,
            attentions if output_attentions else None,
        )

    def check(
        self, input_ids: ArrayLike, attention_mask: ArrayLike, token_type_ids: ArrayLike
    ) -> None:
        """Refuses what a device would compute without an error: see `Raises` of `__call__`."""
        given = {
            "input_ids": (input_ids, self.config.vocab_size),
            "attention_mask": (attention_mask, 2),
            "token_type_ids": (token_type_ids, max(self.config.type_vocab_size, 1)),
        }
        shape, longest = np.shape(input_ids), self.config.max_position_embeddings
        if len(shape) != 2 or any(np.shape(values) != shape for values, _ in given.values()):
            # What a tokenizer returns without return_tensors, or not unpacked, ends here.
            shapes = ", ".join(f"{name} {np.shape(values)}" for name, (values, _) in given.items())
            raise ValueError(
                f"all must be [B, T] alike: {shapes}; call model(**tokenizer(question, context, "
                "return_tensors='np'))"
            )
        if shape[1] > longest:  # an index past the table reads NaN, without an error
            raise ValueError(
                f"rows of {shape[1]} tokens, but the checkpoint has {longest} positions"
            )
        for name, (values, end) in given.items():
            if isinstance(values, jax.core.Tracer):
                continue
            array = np.asarray(values)
            whole = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
            if not whole and (name == "input_ids" or (array != np.floor(array)).any()):
                raise ValueError(f"{name} are {array.dtype}, they must be integers")
            if array.size and not 0 <= array.min() <= array.max() < end:
                worst = array.min() if array.min() < 0 else array.max()
                raise ValueError(f"{name} have the value {worst}, they must be from 0 to {end - 1}")


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _jitted_forward(
    graphdef: nnx.GraphDef[QuestionAnsweringModel],
    state: nnx.State,
    input_ids: TokenIds,
    attention_mask: TokenMask,
    token_type_ids: TokenTypes,
    output_hidden_states: bool,
    output_attentions: bool,
) -> QuestionAnsweringOutput:
    return nnx.merge(graphdef, state).forward(
        input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions
    )
