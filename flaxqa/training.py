"""Training of a question-answering model: losses, the optimizer, and one step on all devices.

The recipe is that of the published distilled checkpoint. Source: run_squad_w_distillation.py in
examples/research_projects/distillation of transformers 4, and Sanh et al. 2019,
https://arxiv.org/abs/1910.01108. One thing differs: padding has no part in the softmax, so that a
loss does not depend on how far rows are padded.

Axes: B rows of a batch, T tokens of a row, W windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from flaxqa import checkpoint, features, predict
from flaxqa.devices import compiler_options
from flaxqa.dropout import Dropout, Rates
from flaxqa.features import Windows
from flaxqa.model import QuestionAnsweringModel, QuestionAnsweringOutput

CLIP = 1.0  # of the gradients' global norm
EPS = 1e-8
PADDED_TO = 64  # rows have a multiple of so many tokens, so that few programs are compiled
POOL = 50  # batches whose windows are sorted by length together
NOWHERE = -1e9  # the logit of padding
Span = tuple[int, int]  # the characters of an answer, the second one past its end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides a step besides the batch.

    Attributes:
      steps: of the whole training, over which the learning rate falls to 0.
      learning_rate: the highest.
      warmup: the share of the steps over which it rises from 0 first.
      weight_decay: AdamW's, of kernels and embeddings; biases and norms have none.
      temperature: of the softmax that is distilled.
      distillation: its share of the loss; the rest is the cross entropy of the answers.
      rates: of dropout.
      freeze_embeddings: whether the embeddings stay as they are.
      dtype: of the operands of products; the weights themselves keep the model's dtype.
      seed: of dropout.
    """

    steps: int
    learning_rate: float = 3e-5
    warmup: float = 0.0
    weight_decay: float = 0.0
    temperature: float = 2.0
    distillation: float = 0.5
    rates: Rates = Rates()  # noqa: RUF009 (it is frozen)
    freeze_embeddings: bool = False
    dtype: str = "float32"
    seed: int = 0

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step, from step 0."""
        rising = round(self.warmup * self.steps)
        falling = optax.linear_schedule(self.learning_rate, 0.0, self.steps - rising)
        if not rising:
            return falling
        start = optax.linear_schedule(0.0, self.learning_rate, rising)
        return optax.join_schedules([start, falling], [rising])

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW after clipping; source: Loshchilov and Hutter 2019, arxiv.org/abs/1711.05101."""

        def by_name(value: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
            def of(params: Any) -> Any:
                return jax.tree_util.tree_map_with_path(
                    lambda path, _: value([getattr(key, "key", None) for key in path]), params
                )

            return of

        decayed = by_name(lambda names: "kernel" in names or "embedding" in names)
        kind = by_name(lambda names: "frozen" if "embeddings" in names else "trained")

        trained = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(self.schedule(), eps=EPS, weight_decay=self.weight_decay, mask=decayed),
        )
        if not self.freeze_embeddings:
            return trained
        return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, kind)


class Batch(NamedTuple):
    """Windows side by side, padded.

    Attributes:
      input_ids: int32 [B, T].
      attention_mask: int32 [B, T], 1 for a token.
      token_type_ids: int32 [B, T], 1 for the context and the `[SEP]` after it.
      start: int32 [B], the first token of the answer, 0 where the window has none.
      end: int32 [B], the last token of the answer.
      weight: float32 [B], 1, or 0 for a row that only fills the batch up.
      row: int32 [B], the number of each row.
      teacher: float32 [2, B, T] logits of the teacher, or None.
    """

    input_ids: Any
    attention_mask: Any
    token_type_ids: Any
    start: Any
    end: Any
    weight: Any
    row: Any
    teacher: Any = None

    @classmethod
    def spec(cls, with_teacher: bool) -> Batch:
        """How the fields are split over devices."""
        rows = P("data")
        teacher = P(None, "data") if with_teacher else None
        return cls(rows, rows, rows, rows, rows, rows, rows, teacher)


class State(NamedTuple):
    """What a step changes: the weights, and what the optimizer keeps of each."""

    params: Any
    optimizer: Any


class Told(NamedTuple):
    """What a step tells: its loss, and what that is made of."""

    loss: Float[Array, ""]
    answers: Float[Array, ""]
    distillation: Float[Array, ""]


def losses(out: QuestionAnsweringOutput, batch: Batch, temperature: float) -> tuple[Array, Array]:
    """The cross entropy of the answers, and the distance from the teacher, [B] each.

    Both are means over start and end. The distance is KL(teacher || student) at the temperature,
    times its square, so that its gradients do not shrink with it (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531); 0 without a teacher.
    """
    inside = jnp.asarray(batch.attention_mask) == 1
    answers, distances = [], []
    for index, (logits, at) in enumerate(
        ((out.start_logits, batch.start), (out.end_logits, batch.end))
    ):
        masked = jnp.where(inside, logits, NOWHERE)
        answers.append(optax.softmax_cross_entropy_with_integer_labels(masked, at))
        if batch.teacher is not None:
            taught = jnp.where(inside, batch.teacher[index], NOWHERE)
            student, teacher = (jax.nn.log_softmax(each / temperature) for each in (masked, taught))
            divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
            distances.append(divergence * temperature**2)
    answer = (answers[0] + answers[1]) / 2
    return answer, sum(distances) / 2 if distances else jnp.zeros_like(answer)


class Trainer:
    """Steps of training over a mesh of devices, each with its share of the rows.

    Attributes:
      devices: that compute.
    """

    def __init__(
        self,
        model: QuestionAnsweringModel,
        recipe: Recipe,
        devices: Sequence[jax.Device],
        *,
        matmul_precision: str = "float32",
    ):
        """Compiles nothing yet.

        Args:
          model: where training begins; its dtype is that of the weights that are kept.
          recipe: see there.
          devices: over which the rows are split.
          matmul_precision: of float32 products.
        """
        self.model, self.recipe, self.devices = model, recipe, devices
        self.matmul_precision = matmul_precision
        self.optimizer = recipe.optimizer()
        self.graphdef = nnx.split(checkpoint.abstract(model.config, recipe.dtype))[0]
        self.mesh = predict.mesh_of(devices)
        self.everywhere = NamedSharding(self.mesh, P())
        self.steps = {with_teacher: self.compiled(with_teacher) for with_teacher in (False, True)}

    def begin(self) -> State:
        """The state before the first step."""
        params = jax.tree.map(jnp.array, nnx.state(self.model))  # copies: a step takes them over
        return jax.device_put(State(params, self.optimizer.init(params)), self.everywhere)

    def compiled(self, with_teacher: bool) -> Any:
        """The jitted step: state, batch and number to the next state and what it tells."""
        recipe = self.recipe

        def loss_of(params: Any, batch: Batch, number: Array) -> tuple[Array, Told]:
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch.row)
            cast = jax.tree.map(lambda array: array.astype(recipe.dtype), params)
            out = nnx.merge(self.graphdef, cast).forward(
                batch.input_ids,
                batch.attention_mask,
                batch.token_type_ids,
                dropout=Dropout(keys, recipe.rates),
            )
            rows = jax.lax.psum(batch.weight.sum(), "data")
            answers, distances = (
                jax.lax.psum((each * batch.weight).sum(), "data") / rows
                for each in losses(out, batch, recipe.temperature)
            )
            share = recipe.distillation if with_teacher else 0.0
            loss = (1 - share) * answers + share * distances
            return loss, Told(loss, answers, distances)

        # Each device its own rows: attention goes from row to row on a CPU.
        sharded = jax.shard_map(
            loss_of,
            mesh=self.mesh,
            in_specs=(P(), Batch.spec(with_teacher), P()),
            out_specs=P(),
        )

        def step(state: State, batch: Batch, number: Array) -> tuple[State, Told]:
            grads, told = jax.grad(sharded, has_aux=True)(state.params, batch, number)
            updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
            return State(optax.apply_updates(state.params, updates), optimizer), told

        options = compiler_options(self.devices[0])
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def step(self, state: State, batch: Batch, number: int) -> tuple[State, Told]:
        """One step; the state that it is given cannot be used afterwards.

        Args:
          state: before it.
          batch: its rows, a multiple of the number of devices.
          number: of the step, from 0.
        """
        with_teacher = batch.teacher is not None
        shardings = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), Batch.spec(with_teacher)
        )
        with jax.default_matmul_precision(self.matmul_precision):
            given = jax.device_put(batch, shardings)
            state, told = self.steps[with_teacher](state, given, np.uint32(number))
        return state, told

    def trained(self, state: State) -> QuestionAnsweringModel:
        """The model with the weights of a state."""
        params = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), state.params)
        return nnx.merge(nnx.split(self.model)[0], params)


def positions(windows: Windows, spans: Sequence[Span | None]) -> np.ndarray:
    """int32 [W, 2], the first and the last token of the answer in each window.

    The tokens that have a character of it, as in run_qa of transformers; both are 0, that is
    `[CLS]`, where the window does not have the whole answer.

    Args:
      windows: of all examples.
      spans: of each example; None without an answer.
    """
    found = np.zeros((len(windows), 2), np.int32)
    for at, example in enumerate(windows.example.tolist()):
        if (span := spans[example]) is None:
            continue
        tokens = features.covering(windows.contexts[at].places.offsets, span)
        if tokens is None:
            continue
        begin, part = int(windows.context_start[at]), int(windows.first[at])
        first, last = (token - part + begin for token in tokens)
        if begin <= first and last < windows.lengths[at] - 1:
            found[at] = first, last
    return found


def order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The windows of each batch of an epoch: every one once, at random, like lengths together.

    Windows are shuffled, sorted by length within pools of POOL batches, and the batches shuffled
    again, as transformers' `group_by_length`. It depends on nothing but the arguments.
    """
    rng = np.random.default_rng((seed, epoch))
    shuffled, batches = rng.permutation(len(lengths)), []
    for at in range(0, len(shuffled), POOL * batch_size):
        pool = shuffled[at : at + POOL * batch_size]
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        batches += [pool[b : b + batch_size] for b in range(0, len(pool), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The windows of all examples with their answers, from which batches are made.

    Attributes:
      windows: of all examples.
      answers: int32 [W, 2], see `positions`.
      batch_size: windows of a batch.
      multiple: what the rows of a batch are filled up to a multiple of: the number of devices.
      longest: tokens of the longest row.
      teacher: float32 [2, tokens of all windows], the teacher's logits, or None.
    """

    windows: Windows
    answers: np.ndarray
    batch_size: int
    multiple: int
    longest: int
    teacher: np.ndarray | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def epoch(self, seed: int, epoch: int, begin: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """The windows of each batch of an epoch and the batch, from one of them on."""
        for chosen in order(self.windows.lengths, self.batch_size, seed, epoch)[begin:]:
            yield chosen, self.batch(chosen)

    def batch(self, chosen: np.ndarray) -> Batch:
        """A batch of these windows."""
        windows, n_rows = self.windows, -(-self.batch_size // self.multiple) * self.multiple
        lengths = np.ones(n_rows, np.int64)
        lengths[: len(chosen)] = windows.lengths[chosen]
        n_tokens = min(-(-int(lengths.max()) // PADDED_TO) * PADDED_TO, self.longest)
        column = np.arange(n_tokens)
        inside = column < lengths[:, None]
        ids, types = np.zeros((2, n_rows, n_tokens), np.int32)
        teacher = np.zeros((2, n_rows, n_tokens), np.float32)
        for row, window in enumerate(chosen.tolist()):
            end, length = int(windows.ends[window]), int(lengths[row])
            ids[row, :length] = windows.input_ids[end - length : end]
            types[row, int(windows.context_start[window]) : length] = 1
            if self.teacher is not None:
                teacher[:, row, :length] = self.teacher[:, end - length : end]
        answers = np.zeros((n_rows, 2), np.int32)
        answers[: len(chosen)] = self.answers[chosen]
        weight = (np.arange(n_rows) < len(chosen)).astype(np.float32)
        return Batch(
            ids, inside.astype(np.int32), types, answers[:, 0], answers[:, 1], weight,
            np.arange(n_rows, dtype=np.int32), None if self.teacher is None else teacher,
        )  # fmt: skip
