import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from eval import squad
from flaxqa import answers, checkpoint, features, predict
from flaxqa.errors import UsageError
from flaxqa.features import Feature, Tokens
from flaxqa.model import DistilBertConfig, DistilBertForQuestionAnswering
from flaxqa.predict import Predictor

QUESTIONS = 60


@pytest.fixture(scope="module")
def trained():
    from conftest import QUICKSTART

    return checkpoint.load(QUICKSTART / "checkpoint")


@pytest.fixture(scope="module")
def windows(trained):
    from conftest import QUICKSTART

    examples = squad.read(QUICKSTART / "heldout.json").questions[:QUESTIONS]
    return examples, features.make(examples, trained.tokenizer)


@pytest.fixture(scope="module")
def expected(trained, windows):
    """The logits of every window alone and unpadded, straight from the model."""
    return [trained.model(feature.input_ids[None]) for feature in windows[1]]


def texts(windows, logits):
    found = answers.decode_squad(*windows, logits)
    return [[answer.text for answer in one[:1]] for one in found]


@pytest.fixture(scope="module")
def answers_of_one_device(trained, windows):
    return texts(windows, Predictor(trained.model, devices=1).predict(windows[1]))


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_logits_and_answers_do_not_depend_on_devices_or_strategy(
    trained, windows, expected, answers_of_one_device, parallel, devices
):
    predictor = Predictor(trained.model, devices=devices, parallel=parallel, batch_size=8)
    logits = predictor.predict(windows[1])
    for got, wanted in zip(logits, expected, strict=True):
        np.testing.assert_allclose(got.start, wanted.start_logits[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(got.end, wanted.end_logits[0], rtol=0, atol=1e-4)
    assert texts(windows, logits) == answers_of_one_device
    (run,) = list(predictor.compiled.values())[:1]
    (shape,) = predictor.shapes[:1]
    ids = np.ones(shape, np.int32)
    assert len(run(ids, ids)[0].sharding.device_set) == devices


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_do_not_depend_on_the_batch_size(
    trained, windows, answers_of_one_device, batch_size
):
    predictor = Predictor(trained.model, devices=1, batch_size=batch_size)
    assert texts(windows, predictor.predict(windows[1])) == answers_of_one_device
    assert {rows for rows, _ in predictor.shapes} == {batch_size}


def test_the_order_of_the_windows_does_not_matter(trained, windows):
    predictor = Predictor(trained.model, devices=2)
    forward = predictor.predict(windows[1])
    backward = predictor.predict(windows[1][::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_allclose(a.start, b.start, rtol=0, atol=1e-5)


def small_model():
    return DistilBertForQuestionAnswering(DistilBertConfig(**TINY), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("n_devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_a_plan_has_every_window_once_in_shapes_that_fit(n_devices, batch_size):
    predictor = Predictor(small_model(), max_length=50, devices=n_devices, batch_size=batch_size)
    lengths = np.random.default_rng(0).integers(3, 51, 333).tolist()
    plan = predictor.plan(lengths)
    rows = [row for batch in plan for row in batch.rows]
    assert sorted(rows) == list(range(333))
    for batch in plan:
        assert batch.shape[0] % n_devices == 0
        assert len(batch.rows) <= batch.shape[0]
        assert max(lengths[row] for row in batch.rows) <= batch.shape[1] <= 50
    assert all(len(batch.rows) == batch.shape[0] for batch in plan[:-1])


def test_the_last_odd_batch_is_filled_up_and_nothing_is_lost():
    predictor = Predictor(small_model(), max_length=64, devices=4, batch_size=4)
    context = Tokens(*np.zeros((3, 2), np.int32))
    windows = [
        Feature(i, np.full(5 + i, 7, np.int32), 3, context, slice(0, 2), False) for i in range(9)
    ]
    seen = []
    logits = predictor.predict(windows, seen.append)
    assert [len(one.start) for one in logits] == list(range(5, 14))
    assert seen == [4, 4, 1]
    assert predictor.shapes == [(4, 64)]
    assert predictor.computed_tokens == 3 * 4 * 64
    assert predictor.predict([]) == []


def test_shapes_are_compiled_once_and_before_the_first_batch():
    predictor = Predictor(small_model(), max_length=64, devices=1)
    predictor.compile([(2, 16), (2, 64)])
    before = dict(predictor.compiled)
    predictor.compile([(2, 16)])
    assert predictor.compiled == before
    assert predictor.shapes == [(2, 16), (2, 64)]
    with pytest.raises(TypeError):  # another shape is an error, not a silent compilation
        before[(2, 16)](np.ones((3, 16), np.int32), np.ones((3, 16), np.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max_length 65.*64 positions"),
        ({"parallel": "xmap"}, "neither 'jit' nor 'pmap'"),
        ({"devices": 9}, "devices 9, but this process has 8"),
        ({"devices": 0}, "devices 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"matmul_precision": "int4"}, "matmul_precision 'int4'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Predictor(small_model(), **{"max_length": 64, **options})


def test_a_window_longer_than_the_predictor_takes_is_refused():
    predictor = Predictor(small_model(), max_length=32)
    with pytest.raises(ValueError, match="33 tokens, above 32"):
        predictor.plan([33])


def test_compiled_code_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        predict.use_compilation_cache()
        folder = jax.config.jax_compilation_cache_dir
        assert folder.startswith(str(tmp_path / "flaxqa"))
        jax._src.compilation_cache.reset_cache()
        Predictor(small_model(), max_length=64, devices=1).compile([(3, 17)])
        assert list((tmp_path / "flaxqa").rglob("*-cache"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax._src.compilation_cache.reset_cache()


@pytest.mark.parametrize(("parallel", "devices"), [("jit", 1), ("jit", 4), ("pmap", 2)])
def test_bert_gets_the_segments_its_tokenizer_gives(bert_folder, parallel, devices):
    import torch
    import transformers

    loaded = checkpoint.load(bert_folder)
    pairs = [("who is bob ?", "bob lives in berlin ."), ("where ?", "a , b - c d"), ("i", "am")]
    windows = features.make(
        [features.Example("", *pair) for pair in pairs],
        loaded.tokenizer, max_length=32, doc_stride=4,
    )  # fmt: skip
    logits = Predictor(loaded.model, max_length=64, parallel=parallel, devices=devices).predict(
        windows
    )
    reference = transformers.BertForQuestionAnswering.from_pretrained(bert_folder).eval()
    for pair, window, ours in zip(pairs, windows, logits, strict=True):
        encoding = loaded.tokenizer.encode(*pair)
        assert window.input_ids.tolist() == encoding.ids
        assert 0 < sum(encoding.type_ids) < len(encoding.ids)
        with torch.no_grad():
            theirs = reference(
                input_ids=torch.tensor([encoding.ids]),
                token_type_ids=torch.tensor([encoding.type_ids]),
            )
        np.testing.assert_allclose(ours.start, theirs.start_logits[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(ours.end, theirs.end_logits[0].numpy(), atol=1e-4)


def test_few_windows_make_a_small_batch():
    predictor = Predictor(small_model(), max_length=64, devices=2)
    for windows, rows in ((1, 2), (2, 2), (3, 4), (5, 6), (9, 16), (10_000, 128)):
        plan = predictor.plan([60] * windows)
        assert {batch.shape for batch in plan} == {(rows if windows != 5 else 8, 64)}
    assert Predictor(small_model(), max_length=64, devices=2, batch_size=3).rows(64, 99) == 4
