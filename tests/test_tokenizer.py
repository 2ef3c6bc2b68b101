import jax
import numpy as np
import pytest
import transformers
from conftest import QUICKSTART

import flaxqa

PAIR = "What did the ship carry?", "It carried dried fish."


@pytest.mark.parametrize("name", ["DistilBertTokenizer", "BertTokenizer"])
def test_a_tokenizer_gives_what_transformers_gives_also_as_jax_arrays(name):
    ours = getattr(flaxqa, name).from_pretrained(QUICKSTART / "checkpoint")
    theirs = getattr(transformers, name).from_pretrained(QUICKSTART / "checkpoint")
    assert isinstance(ours, type(theirs))
    plain = theirs(*PAIR, return_tensors="np")
    for kind in ("np", "jax"):
        got = ours(*PAIR, return_tensors=kind)
        assert got.keys() == plain.keys()
        assert isinstance(got.input_ids, jax.Array) == (kind == "jax")
        for key in plain:
            np.testing.assert_array_equal(got[key], plain[key])
    assert ours(*PAIR).input_ids == theirs(*PAIR).input_ids
    batch = ours([PAIR, PAIR[::-1]], padding=True, return_tensors="jax")
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert ours.decode(ours(*PAIR, return_tensors="jax").input_ids[0]) == theirs.decode(
        plain.input_ids[0]
    )
    with pytest.raises(ValueError, match="not a valid TensorType"):
        ours(*PAIR, return_tensors="cupy")


def test_tensorflow_tensors_need_tensorflow_and_nothing_else():
    tokenizer = flaxqa.DistilBertTokenizer.from_pretrained(QUICKSTART / "checkpoint")
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    model = flaxqa.DistilBertForQuestionAnswering.from_pretrained(QUICKSTART / "checkpoint")
    inputs = tokenizer(*PAIR, return_tensors="tf")
    assert isinstance(inputs.input_ids, tensorflow.Tensor)
    start = int(tensorflow.math.argmax(model(**inputs).start_logits, axis=-1)[0])
    assert start == int(model(**tokenizer(*PAIR, return_tensors="np")).start_logits.argmax())
