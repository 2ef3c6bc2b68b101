import numpy as np
import pytest
from conftest import QUICKSTART

from flaxqa import checkpoint
from flaxqa.errors import UsageError
from flaxqa.eval.widen import widened


@pytest.mark.parametrize(("width", "heads"), [(128, 4), (256, 4), (768, 12)])
def test_a_wider_checkpoint_has_the_logits_of_the_one_it_was_made_of(tmp_path, width, heads):
    loaded = checkpoint.load(QUICKSTART / "checkpoint")
    wide = checkpoint.load(widened(loaded, width, tmp_path / "wide"))
    assert (wide.config.dim, wide.config.n_heads, wide.config.n_layers) == (width, heads, 4)
    assert wide.config.hidden_dim == 2 * width
    ids = np.random.default_rng(0).integers(5, 1_200, (2, 40))
    ours, theirs = (each.model(ids) for each in (wide, loaded))
    np.testing.assert_allclose(ours.start_logits, theirs.start_logits, rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours.end_logits, theirs.end_logits, rtol=0, atol=2e-4)
    assert np.abs(theirs.start_logits).max() > 3


def test_a_bert_is_widened_alike(bert_folder, tmp_path):
    loaded = checkpoint.load(bert_folder)
    wide = checkpoint.load(widened(loaded, 96, tmp_path / "wide"))
    ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 30))
    types = ids % 2
    np.testing.assert_allclose(
        wide.model(ids, token_type_ids=types).start_logits,
        loaded.model(ids, token_type_ids=types).start_logits,
        rtol=0, atol=2e-4,
    )  # fmt: skip


@pytest.mark.parametrize("width", [64, 200])
def test_a_width_that_is_no_multiple_is_refused(tmp_path, width):
    loaded = checkpoint.load(QUICKSTART / "checkpoint")
    with pytest.raises(UsageError, match="not a multiple of the checkpoint's 128 channels"):
        widened(loaded, width, tmp_path / "wide")
