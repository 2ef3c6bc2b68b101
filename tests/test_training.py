"""Losses, gradients and steps are torch's; noise and devices change no loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_BERT, VOCAB, random_torch_bert, random_torch_model
from flax import nnx

from flaxqa import checkpoint, features, tokens, training
from flaxqa.dropout import Dropout, Rates, drop
from flaxqa.errors import ModelRejected
from flaxqa.model import BertConfig, DistilBertConfig
from flaxqa.training import Batch, Recipe, Rows, Trainer

ROWS, LENGTH = 8, 40
CONFIGS = {
    "distilbert": DistilBertConfig.from_dict({"model_type": "distilbert", **TINY}),
    "bert": BertConfig.from_dict({"model_type": "bert", **TINY_BERT}),
}
TORCH = {"distilbert": random_torch_model, "bert": random_torch_bert}


def model_of(reference, kind, dtype):
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return checkpoint.from_tensors(tensors, CONFIGS[kind], dtype=dtype)[0]


def batch_of(seed=0, *, teacher=True, dtype=np.float64):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, LENGTH + 1, ROWS)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    start = rng.integers(0, lengths)
    return Batch(
        input_ids=rng.integers(1, len(VOCAB), (ROWS, LENGTH), dtype=np.int32) * mask,
        attention_mask=mask,
        token_type_ids=(np.arange(LENGTH) >= 4).astype(np.int32) * mask,
        start=start.astype(np.int32),
        end=rng.integers(start, lengths).astype(np.int32),
        weight=np.ones(ROWS, np.float32),
        row=np.arange(ROWS, dtype=np.int32),
        teacher=rng.normal(0, 3, (2, ROWS, LENGTH)).astype(dtype) if teacher else None,
    )


def torch_loss(model, batch, recipe):
    """The loss as run_squad_w_distillation.py computes it, without padding in the softmax."""
    given = {name: torch.tensor(getattr(batch, name)) for name in ("input_ids", "attention_mask")}
    if model.config.model_type == "bert":
        given["token_type_ids"] = torch.tensor(batch.token_type_ids)
    out = model(**given)
    padding = given["attention_mask"] == 0
    answers = distances = 0
    for index, (logits, at) in enumerate(
        ((out.start_logits, batch.start), (out.end_logits, batch.end))
    ):
        logits = logits.masked_fill(padding, -1e9)
        answers += torch.nn.functional.cross_entropy(logits, torch.tensor(at).long()) / 2
        if batch.teacher is not None:
            taught = torch.tensor(batch.teacher[index]).masked_fill(padding, -1e9)
            distances += (
                torch.nn.KLDivLoss(reduction="batchmean")(
                    torch.log_softmax(logits / recipe.temperature, -1),
                    torch.softmax(taught / recipe.temperature, -1),
                )
                * recipe.temperature**2
                / 2
            )
    share = recipe.distillation if batch.teacher is not None else 0
    return share * distances + (1 - share) * answers


def torch_tensors(model):
    """The parameters that the loss reaches, by name."""
    return {
        name: tensor
        for name, tensor in model.named_parameters()
        if "pooler" not in name  # BERT's, which question answering does not use
    }


def ours_by_name(state, kind):
    """Arrays of a state under torch's names and in its layout."""
    found = {}
    for path, param in nnx.to_flat_state(state):
        array = np.asarray(param[...])
        name = checkpoint.torch_key(path, kind)
        found[name] = array.T if path[-1] == "kernel" else array
    return found


def trainer_of(model, recipe, n_devices=1):
    return Trainer(model, recipe, jax.devices()[:n_devices])


# Measured: 3e-15 at most, for gradients up to 0.7.
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("teacher", [False, True])
def test_loss_and_gradients_are_those_of_torch(kind, teacher):
    reference, batch = TORCH[kind]().double(), batch_of(teacher=teacher)
    recipe = Recipe(steps=10, dtype="float64", temperature=2.0, distillation=0.5)
    expected = torch_loss(reference, batch, recipe)
    expected.backward()
    with jax.enable_x64(True):
        trainer = trainer_of(model_of(reference, kind, "float64"), recipe)
        state = trainer.begin()

        def loss_of(params):
            out = nnx.merge(trainer.graphdef, params).forward(*map(jnp.asarray, batch[:3]))
            answers, distances = training.losses(out, batch, recipe.temperature)
            share = recipe.distillation if teacher else 0.0
            return (share * distances + (1 - share) * answers).mean()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        _, told = trainer.step(state, batch, 0)
        assert abs(float(loss) - expected.item()) < 1e-10
        assert abs(float(told.loss) - expected.item()) < 1e-10
        ours = ours_by_name(grads, kind)
    theirs = torch_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert np.abs(ours[name] - tensor.grad.numpy()).max() < 1e-10, name


# Measured: 4e-10; torch's clipping adds 1e-6 to the norm.
@pytest.mark.parametrize("frozen", [False, True])
def test_ten_steps_of_adamw_are_those_of_torch(frozen):
    reference, kind = random_torch_model().double(), "distilbert"
    recipe = Recipe(
        steps=20, learning_rate=1e-3, warmup=0.1, weight_decay=0.01, dtype="float64",
        freeze_embeddings=frozen,
    )  # fmt: skip
    before = {name: tensor.detach().clone() for name, tensor in torch_tensors(reference).items()}
    with jax.enable_x64(True):
        trainer = trainer_of(model_of(reference, kind, "float64"), recipe)
        state = trainer.begin()
        for number in range(10):
            state, _ = trainer.step(state, batch_of(number), number)
        ours = ours_by_name(state.params, kind)
    tensors = torch_tensors(reference)
    trained = {n: t for n, t in tensors.items() if not (frozen and ".embeddings." in n)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    plain = [t for n, t in trained.items() if "bias" in n or "norm" in n.lower()]
    decayed = [t for n, t in trained.items() if not ("bias" in n or "norm" in n.lower())]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3, eps=1e-8,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / 2 if step < 2 else (20 - step) / 18
    )
    for number in range(10):
        optimizer.zero_grad()
        torch_loss(reference, batch_of(number), recipe).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
    for name, tensor in tensors.items():
        assert np.abs(ours[name] - tensor.detach().numpy()).max() < 1e-6, name
        assert (name in trained) == (not torch.equal(tensor, before[name])), name


def steps_on(n_devices, rates, *, n_steps=5, dtype="float32"):
    recipe = Recipe(steps=10, learning_rate=1e-3, rates=rates, dtype=dtype)
    trainer = trainer_of(model_of(random_torch_model(), "distilbert", "float32"), recipe, n_devices)
    state, told = trainer.begin(), []
    for number in range(n_steps):
        state, values = trainer.step(state, batch_of(number, dtype=np.float32), number)
        told.append(float(values.loss))
    return np.array(told)


RATES = Rates(hidden=0.1, attention=0.2, projection=0.1, head=0.3)


# Measured: 1e-6, for losses of about 4.
@pytest.mark.parametrize(
    "n_devices", [8, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 4))]
)
def test_losses_do_not_depend_on_the_number_of_devices(n_devices):
    assert np.abs(steps_on(n_devices, RATES) - steps_on(1, RATES)).max() < 1e-5


def test_bfloat16_products_follow_float32_and_the_weights_stay_float32():
    exact, rounded = steps_on(1, Rates()), steps_on(1, Rates(), dtype="bfloat16")
    assert 0 < np.abs(exact - rounded).max() < 0.03  # measured: 0.004
    recipe = Recipe(steps=10, dtype="bfloat16")
    trainer = trainer_of(model_of(random_torch_model(), "distilbert", "float32"), recipe)
    state, _ = trainer.step(trainer.begin(), batch_of(dtype=np.float32), 0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("place", ["hidden", "attention", "head"])
def test_each_rate_of_dropout_changes_the_loss(place):
    assert abs(steps_on(1, Rates(**{place: 0.5}), n_steps=1) - steps_on(1, Rates(), n_steps=1)) > 0


def test_dropout_keeps_the_mean_and_drops_its_share():
    dropped = np.asarray(drop(jnp.ones(100_001), jax.random.key(0), 0.3))
    assert np.unique(dropped).tolist() == pytest.approx([0, 1 / 0.7], abs=1e-4)
    assert (dropped == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.01)


def test_a_rows_noise_does_not_depend_on_the_other_rows():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 7, 5))
    whole = Dropout(keys, RATES)(x, "hidden", 3)
    alone = Dropout(keys[2:3], RATES)(x[2:3], "hidden", 3)
    assert (whole[2] == alone[0]).all()
    assert (whole[2] != whole[1]).any()
    assert (whole[2] != Dropout(keys, RATES)(x, "hidden", 4)[2]).any()


def test_each_step_has_noise_of_its_own():
    recipe = Recipe(steps=10, learning_rate=1e-12, rates=RATES)
    trainer = trainer_of(model_of(random_torch_model(), "distilbert", "float32"), recipe)
    state, losses = trainer.begin(), []
    for number in (0, 1, 0):
        state, told = trainer.step(state, batch_of(dtype=np.float32), number)
        losses.append(float(told.loss))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)


def test_the_rates_are_those_of_the_config():
    assert Rates.of({"dropout": 0.3, "qa_dropout": 0}, "distilbert") == Rates(0.3, 0.1, 0.0, 0)
    assert Rates.of({"hidden_dropout_prob": 0.2}, "bert") == Rates(0.2, 0.1, 0.2, 0.0)


@pytest.mark.parametrize("rate", [1, -0.1, "0.1", True, None, float("nan")])
def test_a_rate_that_cannot_be_is_refused_by_name(rate):
    with pytest.raises(ModelRejected, match="qa_dropout is"):
        Rates.of({"qa_dropout": rate}, "distilbert")


def test_padding_and_rows_that_fill_up_change_no_loss():
    recipe = Recipe(steps=10)
    trainer = trainer_of(model_of(random_torch_model(), "distilbert", "float32"), recipe)
    batch = batch_of(dtype=np.float32)
    half = jax.tree.map(lambda array: array, batch)._replace(
        weight=(np.arange(ROWS) < 3).astype(np.float32)
    )
    first = Batch(
        **{name: value[:3] for name, value in batch._asdict().items() if name != "teacher"},
        teacher=batch.teacher[:, :3],
    )
    wide = first._replace(
        **{
            name: np.pad(getattr(first, name), ((0, 0), (0, 9)))
            for name in ("input_ids", "attention_mask", "token_type_ids")
        },
        teacher=np.pad(first.teacher, ((0, 0), (0, 0), (0, 9)), constant_values=99),
    )
    losses = [float(trainer.step(trainer.begin(), each, 0)[1].loss) for each in (half, first, wide)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert losses[0] != float(trainer.step(trainer.begin(), batch, 0)[1].loss)


# --- windows to rows ---

TOKENIZER = tokens.bert_tokenizer({token: at for at, token in enumerate(VOCAB)}, lowercase=True)


def windows_of(*pairs, **options):
    examples = [features.Example("", question, context) for question, context in pairs]
    return features.make(examples, TOKENIZER, **options)


def texts_at(windows, found):
    """The words of the tokens from the first to the last, of each window."""
    return [
        " ".join(TOKENIZER.id_to_token(int(i)) for i in windows[at].input_ids[first : last + 1])
        for at, (first, last) in enumerate(found.tolist())
    ]


def test_an_answer_is_at_the_tokens_that_have_a_character_of_it():
    context = "bob lives in berlin, and i in a city"
    windows = windows_of(*[("who is bob?", context)] * 5)
    spans = [(0, 3), (4, 9), (13, 25), (6, 8), None]
    found = training.positions(windows, spans)
    assert texts_at(windows, found) == ["bob", "lives", "berlin , and", "lives", "[CLS]"]


def test_an_answer_outside_a_window_is_at_cls():
    context = " ".join(["in the city"] * 10) + " bob " + " ".join(["in the city"] * 10)
    windows = windows_of(("who", context), max_length=24, doc_stride=6)
    start = context.index("bob")
    found = training.positions(windows, [(start, start + 3)])
    with_it = [bool((window.input_ids == VOCAB.index("bob")).any()) for window in windows]
    assert 0 < sum(with_it) < len(windows)
    assert texts_at(windows, found) == ["bob" if has else "[CLS]" for has in with_it]


def test_an_answer_that_a_window_cuts_is_at_cls_there():
    context = " ".join(["in the city"] * 20)
    windows = windows_of(("who", context), max_length=24, doc_stride=6)
    part = windows[0].part
    offsets = windows.contexts[0].places.offsets
    across = (int(offsets[part.stop - 1, 0]), int(offsets[part.stop, 1]))
    found = training.positions(windows, [across])
    assert found[0].tolist() == [0, 0]
    assert found[1, 0] > 0


def test_an_answer_without_tokens_is_at_cls():
    windows = windows_of(("who", "bob \u200b in a city"))
    assert training.positions(windows, [(3, 4)]).tolist() == [[0, 0]]


def test_every_window_comes_once_an_epoch_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(20, 384, 1_003)
    first, again, other, second = (
        training.order(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert sorted(np.concatenate(first)) == list(range(1_003))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for changed in (other, second):
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, changed, strict=True))
    assert sorted(map(len, first)) == [3] + [8] * 125
    spread = np.mean([np.ptp(lengths[batch]) for batch in first])
    assert spread < np.ptp(lengths) / 10  # like lengths together


def test_a_batch_has_its_windows_and_nothing_else():
    windows = windows_of(*[("who is bob?", "bob lives in berlin" + " and" * n) for n in range(5)])
    answers = np.arange(10, dtype=np.int32).reshape(5, 2)
    n_tokens = int(windows.lengths.sum())
    teacher = np.arange(2 * n_tokens, dtype=np.float32).reshape(2, n_tokens)
    rows = Rows(windows, answers, 3, 4, 384, teacher)
    (chosen, batch), *_, (last, small) = rows.epoch(0, 0)
    assert rows.steps_per_epoch == 2
    assert batch.input_ids.shape == (4, 64)
    assert small.weight.tolist() == [1.0] * len(last) + [0.0] * (4 - len(last))
    for row, window in enumerate(chosen.tolist()):
        feature, length = windows[window], int(windows.lengths[window])
        assert batch.input_ids[row].tolist() == [*feature.input_ids, *[0] * (64 - length)]
        assert batch.attention_mask[row].sum() == length
        assert batch.token_type_ids[row].nonzero()[0].tolist() == [
            *range(feature.context_start, length)
        ]
        assert [batch.start[row], batch.end[row]] == answers[window].tolist()
        end = int(windows.ends[window])
        assert (batch.teacher[:, row, :length] == teacher[:, end - length : end]).all()
        assert not batch.teacher[:, row, length:].any()


def test_an_epoch_goes_on_from_any_batch():
    windows = windows_of(*[("who is bob?", "bob lives in berlin" + " and" * n) for n in range(9)])
    rows = Rows(windows, np.zeros((9, 2), np.int32), 2, 1, 384)
    whole = [chosen.tolist() for chosen, _ in rows.epoch(3, 1)]
    assert [chosen.tolist() for chosen, _ in rows.epoch(3, 1, begin=2)] == whole[2:]


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    rate = Recipe(steps=10, learning_rate=1.0, warmup=0.2).schedule()
    assert [round(float(rate(step)), 6) for step in (0, 1, 2, 6, 9, 10)] == [
        0.0, 0.5, 1.0, 0.5, 0.125, 0.0]  # fmt: skip
    assert float(dataclasses.replace(Recipe(steps=4, learning_rate=1.0)).schedule()(1)) == 0.75
