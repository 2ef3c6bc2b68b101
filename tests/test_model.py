import re

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, TINY_BERT, VOCAB, random_torch_bert, random_torch_model
from flax import nnx

import flaxqa
from flaxqa import checkpoint
from flaxqa.checkpoint import BertForQuestionAnswering, DistilBertForQuestionAnswering
from flaxqa.errors import ModelRejected
from flaxqa.model import BertConfig, DistilBertConfig, read_config


def torch_output(model, input_ids, attention_mask, **requests):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(input_ids),
            attention_mask=torch.tensor(attention_mask),
            **requests,
        )


def flax_model(tensors, dtype="float32", **changes):
    config = DistilBertConfig.from_dict({"model_type": "distilbert", **TINY, **changes})
    return checkpoint.from_tensors(tensors, config, dtype=dtype)[0]


def largest_difference(ours, theirs, where):
    return np.abs(np.asarray(ours, np.float64) - theirs.double().numpy())[where].max()


# Measured: 9e-15, 3e-6, 0.07 and 0.01, for logits up to 4. In float64 a wrong constant stands out
# by many orders: gelu's tanh form gives 1e-3, an epsilon of 1e-6 gives 3e-5.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.3), ("float16", 0.03)],
)
def test_logits_are_those_of_torch(tensors, batch, dtype, tolerance):
    reference = random_torch_model().double()
    with jax.enable_x64(dtype == "float64"):
        out = flax_model(tensors, dtype)(*batch)
        expected = torch_output(reference, *batch)
        tokens = batch[1] == 1
        assert largest_difference(out.start_logits, expected.start_logits, tokens) < tolerance
        assert largest_difference(out.end_logits, expected.end_logits, tokens) < tolerance
        wanted = "float64" if dtype == "float64" else "float32"
        assert {str(out.start_logits.dtype), str(out.end_logits.dtype)} == {wanted}


def test_the_weights_have_the_dtype_of_construction(tensors):
    state = nnx.state(flax_model(tensors, "bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"bfloat16"}


def test_relu_is_computed_where_the_config_says_so(tensors, batch):
    reference = random_torch_model(activation="relu").double()
    with jax.enable_x64(True):
        out = flax_model(tensors, "float64", activation="relu")(*batch)
        expected = torch_output(reference, *batch)
        assert largest_difference(out.start_logits, expected.start_logits, batch[1] == 1) < 1e-12


def test_hidden_states_and_attentions_are_those_of_torch(tensors, batch):
    # torch's sdpa gives no attentions, its eager form does.
    reference = random_torch_model(attn_implementation="eager").double()
    requests = {"output_hidden_states": True, "output_attentions": True}
    with jax.enable_x64(True):
        out = flax_model(tensors, "float64")(*batch, **requests)
        expected = torch_output(reference, *batch, **requests)
        assert len(out.hidden_states) == TINY["n_layers"] + 1
        assert len(out.attentions) == TINY["n_layers"]
        tokens = batch[1] == 1
        for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert largest_difference(ours, theirs, tokens) < 1e-12
        for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
            assert ours.shape == (4, TINY["n_heads"], 40, 40)
            rows = np.asarray(ours).transpose(0, 2, 1, 3)
            assert largest_difference(rows, theirs.permute(0, 2, 1, 3), tokens) < 1e-12
    assert flax_model(tensors)(*batch).hidden_states is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_finite_even_for_rows_of_padding_alone(tensors, batch, dtype):
    input_ids, attention_mask = batch
    out = flax_model(tensors, dtype)(input_ids, np.zeros_like(attention_mask))
    assert np.isfinite(out.start_logits).all()
    assert np.isfinite(out.end_logits).all()


def test_padding_does_not_change_a_tokens_logits(tensors, batch):
    model, (input_ids, attention_mask) = flax_model(tensors), batch
    tokens = attention_mask == 1
    before, after = model(*batch), model(np.where(tokens, input_ids, 7), attention_mask)
    np.testing.assert_array_equal(before.start_logits[tokens], after.start_logits[tokens])
    shorter = model(input_ids[2:, :17], attention_mask[2:, :17])
    np.testing.assert_allclose(before.end_logits[2, :17], shorter.end_logits[0], rtol=0, atol=1e-5)


def test_it_takes_what_a_transformers_tokenizer_returns(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("who lives in berlin?", "my name is bob.", return_tensors="np")
    model = flaxqa.DistilBertForQuestionAnswering.from_pretrained(folder)
    out = model(**inputs)
    expected = torch_output(random_torch_model(), inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(out.start_logits, expected.start_logits, rtol=0, atol=1e-4)


def test_it_can_be_traced_and_differentiated(tensors, batch):
    graphdef, state = nnx.split(flax_model(tensors))

    def loss(state):
        return nnx.merge(graphdef, state)(*batch).start_logits.sum()

    gradients = jax.jit(jax.grad(loss))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["qa_outputs"]["kernel"][...]).max() > 0


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.ones((1, 65), int), None, r"65 tokens.*64 positions"),
        (
            np.array([[1, len(VOCAB)]]),
            None,
            f"the value {len(VOCAB)}.* from 0 to {len(VOCAB) - 1}",
        ),
        (np.array([[1, -1]]), None, "input_ids have the value -1"),
        (np.ones((1, 3), int), np.ones((1, 4), int), r"must be \[B, T\]"),
        (np.ones(3, int), None, r"must be \[B, T\]"),
        (np.ones((1, 3)), None, "must be integers"),
        (np.ones((1, 3), int), np.full((1, 3), 2), "attention_mask have the value 2.* from 0 to 1"),
    ],
)
def test_input_that_a_device_would_compute_without_an_error_is_refused(tensors, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        flax_model(tensors)(ids, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 7}, "dim 32 is not a multiple of n_heads 7"),
        ({"dim": -1}, "dim is -1"),
        ({"dim": "32"}, "dim is '32'"),
        ({"dim": 32.0}, "dim is 32.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_layers": 10**6}, "n_layers is 1000000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_dim": None}, "hidden_dim is None"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"activation": "quick_gelu"}, "activation is 'quick_gelu'"),
        ({"activation": "__import__('os')"}, "activation is"),
        ({"activation": ["gelu"]}, "activation is"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}"),
        ({"pad_token_id": 10**6}, "pad_token_id is 1000000"),
    ],
)
def test_a_config_that_lies_is_refused_by_field(change, message):
    with pytest.raises(ModelRejected, match=re.escape(message)):
        DistilBertConfig.from_dict({"model_type": "distilbert", **TINY, **change})


def test_all_problems_of_a_config_come_in_one_error():
    with pytest.raises(ModelRejected) as caught:
        DistilBertConfig.from_dict({"model_type": "distilbert", "dim": 4, "n_heads": 2})
    for name in ("vocab_size", "max_position_embeddings", "n_layers", "hidden_dim"):
        assert f"{name} is missing" in str(caught.value)


def test_unknown_config_fields_change_nothing():
    given = {"model_type": "distilbert", **TINY, "_attn_implementation_internal": "evil/code"}
    assert DistilBertConfig.from_dict(given) == DistilBertConfig(**TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_saved_transformers_loads_to_the_same_logits(tensors, batch, tmp_path, dtype):
    model = flax_model(tensors, dtype)
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.DistilBertForQuestionAnswering.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    )
    assert loaded.config.dim == TINY["dim"]
    # The saved weights are those of the dtype; both sides compute with them in float32.
    ours = flax_model({name: p.detach().numpy() for name, p in loaded.named_parameters()})(*batch)
    expected = torch_output(loaded.eval(), *batch)
    assert largest_difference(ours.start_logits, expected.start_logits, batch[1] == 1) < 1e-4
    for name, tensor in loaded.state_dict().items():
        wanted = tensors[name].astype(model.dtype).astype(np.float32)
        np.testing.assert_array_equal(tensor.numpy(), wanted)


def test_a_new_model_is_random_and_small():
    config = DistilBertConfig(**TINY)
    a, b = (DistilBertForQuestionAnswering(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert not np.array_equal(a.qa_outputs.kernel[...], b.qa_outputs.kernel[...])


# ------------------------------------------------------------------------------------------- BERT


def flax_bert(reference, dtype="float32"):
    tensors = {name: tensor.numpy().copy() for name, tensor in reference.state_dict().items()}
    config = read_config(reference.config.to_dict())
    return checkpoint.from_tensors(tensors, config, dtype=dtype)[0]


# Measured: 1e-14, 4e-6 and 0.06, for logits up to 5.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.3)]
)
@pytest.mark.parametrize("layer_norm_eps", [1e-12, 1e-3])
def test_bert_logits_are_those_of_torch(batch, dtype, tolerance, layer_norm_eps):
    reference = random_torch_bert(layer_norm_eps=layer_norm_eps)
    types = (np.cumsum(batch[0] == batch[0][:, 5:6], axis=1) > 0).astype(np.int32)
    assert 0 < types.mean() < 1
    with jax.enable_x64(dtype == "float64"):
        model = flax_bert(reference, dtype)
        assert isinstance(model, BertForQuestionAnswering)
        reference = reference.double()
        for given in ({"token_type_ids": types}, {}):
            out = model(*batch, **given)
            requests = {name: torch.tensor(value) for name, value in given.items()}
            expected = torch_output(reference, *batch, **requests)
            tokens = batch[1] == 1
            assert largest_difference(out.start_logits, expected.start_logits, tokens) < tolerance
            assert largest_difference(out.end_logits, expected.end_logits, tokens) < tolerance


def test_segments_of_no_meaning_are_refused(batch):
    model = flax_bert(random_torch_bert())
    with pytest.raises(ValueError, match="token_type_ids have the value 2"):
        model(*batch, np.full_like(batch[0], 2))
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        model(*batch, np.zeros((4, 39), int))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_a_bert_config_that_is_not_computed_is_refused_by_its_own_names(change, message):
    config = {"model_type": "bert", **TINY_BERT, **change}
    with pytest.raises(ModelRejected, match=re.escape(message)):
        read_config(config)


@pytest.mark.parametrize("model_type", ["roberta", "albert", "electra", None, ["bert"]])
def test_a_model_that_is_not_computed_is_refused_by_name(model_type):
    with pytest.raises(ModelRejected, match=re.escape(f"model_type is {model_type!r}, only ")):
        read_config({**TINY, **TINY_BERT, "model_type": model_type})


def test_a_config_goes_back_to_its_own_names():
    config = read_config({"model_type": "bert", **TINY_BERT, "layer_norm_eps": 1e-5})
    assert isinstance(config, BertConfig)
    assert (config.dim, config.type_vocab_size) == (32, 2)
    assert read_config(config.to_dict()) == config
    assert config.to_dict()["intermediate_size"] == 64
    assert DistilBertConfig(**TINY).to_dict() == {
        "model_type": "distilbert", **TINY, "activation": "gelu", "pad_token_id": 0,
    }  # fmt: skip
    with pytest.raises(ModelRejected, match="type_vocab_size is 2"):
        DistilBertConfig(**TINY, type_vocab_size=2)
    with pytest.raises(TypeError, match="BertForQuestionAnswering needs a BertConfig"):
        BertForQuestionAnswering(DistilBertConfig(**TINY), rngs=nnx.Rngs(0))


def test_a_saved_bert_is_loaded_by_transformers_to_the_same_logits(batch, tmp_path):
    model = flax_bert(random_torch_bert(layer_norm_eps=1e-5))
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded).__name__ == "BertForQuestionAnswering"
    types = np.zeros_like(batch[0])
    types[:, 9:] = 1
    expected = torch_output(loaded, *batch, token_type_ids=torch.tensor(types))
    out = model(*batch, types)
    assert largest_difference(out.start_logits, expected.start_logits, batch[1] == 1) < 1e-4


def test_torch_tensors_are_answered_with_torch_tensors(tensors, batch, reference):
    model = flax_model(tensors)
    out = model(*map(torch.tensor, batch), output_hidden_states=True)
    expected = torch_output(reference, *batch)
    assert torch.argmax(out.start_logits[0]) == torch.argmax(expected.start_logits[0])
    assert isinstance(out.hidden_states[0], torch.Tensor)
    assert not out.end_logits.requires_grad
    assert largest_difference(out.end_logits, expected.end_logits, batch[1] == 1) < 1e-4


def test_an_output_can_be_indexed_as_transformers_can(tensors, batch):
    out = flax_model(tensors)(*batch, output_attentions=True)
    assert out[0] is out["start_logits"] is out.start_logits
    assert out[:2] == (out.start_logits, out.end_logits)
    assert out.to_tuple()[2] is out.attentions  # there are no hidden states
    with pytest.raises(KeyError, match="loss"):
        out["loss"]
    with pytest.raises(ValueError, match=r"call model\(\*\*tokenizer"):
        flax_model(tensors)(batch[0][0])
