import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from flaxqa import answers, attention, checkpoint, devices, features, predict
from flaxqa.checkpoint import DistilBertForQuestionAnswering
from flaxqa.errors import UsageError
from flaxqa.eval import questions as dataset
from flaxqa.features import Feature, Windows
from flaxqa.model import DistilBertConfig
from flaxqa.plan import Batch, Shape, Sizes
from flaxqa.predict import Predictor
from flaxqa.tokens import Places, Tokens

QUESTIONS = 60


@pytest.fixture(scope="module")
def trained():
    from conftest import QUICKSTART

    return checkpoint.load(QUICKSTART / "checkpoint")


@pytest.fixture(scope="module")
def windows(trained):
    from conftest import QUICKSTART

    examples = dataset.read(QUICKSTART / "heldout.json").questions[:QUESTIONS]
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
    return texts(windows, Predictor(trained.model, devices=1, kernels="xla").predict(windows[1]))


@pytest.mark.parametrize("kernels", ["native", "xla"])
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_logits_and_answers_do_not_depend_on_devices_strategy_or_kernels(
    trained, windows, expected, answers_of_one_device, parallel, devices, kernels
):
    predictor = Predictor(
        trained.model, devices=devices, parallel=parallel, batch_tokens=512, kernels=kernels
    )
    logits = predictor.predict(windows[1])
    for got, wanted in zip(logits, expected, strict=True):
        np.testing.assert_allclose(got.start, wanted.start_logits[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(got.end, wanted.end_logits[0], rtol=0, atol=1e-4)
    assert texts(windows, logits) == answers_of_one_device
    (batch,) = predictor.plan([len(windows[1][0])])
    rows, _ = predictor.inputs(batch, windows[1])
    predictor.compile([batch.shape])
    assert len(predictor.compiled[batch.shape](rows).sharding.device_set) == devices


@pytest.mark.parametrize("batch_tokens", [1, 1_000, 100_000])
def test_answers_do_not_depend_on_the_size_of_a_batch(
    trained, windows, answers_of_one_device, batch_tokens
):
    predictor = Predictor(trained.model, devices=1, batch_tokens=batch_tokens)
    assert texts(windows, predictor.predict(windows[1])) == answers_of_one_device
    assert max(shape.tokens for shape in predictor.shapes) <= max(batch_tokens, 384)


def test_the_order_of_the_windows_does_not_matter(trained, windows):
    predictor = Predictor(trained.model, devices=2)
    forward = predictor.predict(windows[1])
    backward = predictor.predict(windows[1][::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_allclose(a.start, b.start, rtol=0, atol=1e-5)


def small_model():
    return DistilBertForQuestionAnswering(DistilBertConfig(**TINY), rngs=nnx.Rngs(0))


@pytest.fixture
def accelerator(monkeypatch):
    """Makes predictors do on this CPU what they do on an accelerator without fused attention."""
    simulate(monkeypatch, "banded")


def simulate(monkeypatch, kind):
    monkeypatch.setattr(attention, "choose", lambda *args, plain: kind)
    monkeypatch.setattr(predict, "choose_kernels", lambda *args: "xla")
    monkeypatch.setattr(predict, "row_tokens", lambda on_cpu: 16_384)


@pytest.mark.parametrize("n_devices", [1, 2, 8])
@pytest.mark.parametrize("batch_tokens", [None, 1, 130])
@pytest.mark.parametrize("kind", ["native", "xla", "elsewhere"])
def test_a_plan_has_every_window_once_in_shapes_that_fit(request, n_devices, batch_tokens, kind):
    if kind == "elsewhere":
        request.getfixturevalue("accelerator")
    predictor = Predictor(
        small_model(),
        max_length=50,
        devices=n_devices,
        batch_tokens=batch_tokens,
        kernels="native" if kind == "native" else "xla",
    )
    lengths = np.random.default_rng(0).integers(3, 51, 333).tolist()
    plan = predictor.plan(lengths)
    rows = [row for batch in plan for row in batch.rows]
    assert sorted(index for row in rows for index in row) == list(range(333))
    assert all(len(batch.rows) == n_devices for batch in plan)
    for batch in plan:
        for row in batch.rows:
            assert sum(lengths[index] for index in row) <= batch.shape.tokens
            assert len(row) <= batch.shape.windows
            assert [lengths[index] for index in row] == sorted(
                (lengths[index] for index in row), reverse=True
            )
        most = max(batch_tokens or 16_384, 50)
        assert batch.shape.tokens <= (-(-most // 128) * 128 if kind == "elsewhere" else most)
    assert predictor.plan([]) == []


# About the lengths of the windows of SQuAD's dev set.
SQUAD_LENGTHS = np.random.default_rng(0).gamma(7, 25, 8_192).astype(int).clip(20, 384)


@pytest.mark.parametrize("kernels", ["native", "xla"])
@pytest.mark.parametrize("n_devices", [1, 2, 4, 8])
def test_devices_share_the_work_without_a_gap(n_devices, kernels):
    """As many tokens on each, but for a window; padding stays what it is on one device."""
    predictor = Predictor(big_windows_model(), devices=n_devices, kernels=kernels)
    lengths = SQUAD_LENGTHS[: 1_024 * n_devices]
    plan = predictor.plan(lengths.tolist())
    each = [sum(lengths[batch.rows[device]].sum() for batch in plan) for device in range(n_devices)]
    assert max(each) - min(each) <= 2 * 384
    computed = sum(predictor.tokens_of(batch, lengths.tolist()) for batch in plan)
    assert lengths.sum() <= computed < 1.01 * lengths.sum()
    if kernels == "native":
        assert computed == lengths.sum()
        assert len({batch.shape for batch in plan}) == 1


@pytest.mark.parametrize("kernels", ["native", "xla", "elsewhere"])
@pytest.mark.parametrize("n_devices", [1, 2, 4, 8])
def test_a_stream_has_two_shapes(request, n_devices, kernels):
    """Chunks of 1,024 windows, as they come from 20,000 records, and what is left at the end."""
    if kernels == "elsewhere":
        request.getfixturevalue("accelerator")
    kernels = "xla" if kernels == "elsewhere" else kernels
    predictor = Predictor(big_windows_model(), devices=n_devices, kernels=kernels)
    rng, shapes, tokens, computed = np.random.default_rng(1), set(), 0, 0
    for windows in (*[1_045] * 19, 560):
        lengths = rng.choice(SQUAD_LENGTHS, windows).tolist()
        plan = predictor.plan(lengths)
        shapes |= {batch.shape for batch in plan}
        tokens += sum(lengths)
        computed += sum(predictor.tokens_of(batch, lengths) for batch in plan)
    assert len(shapes) <= 2
    assert computed < 1.1 * tokens


@pytest.mark.parametrize(("longest", "slots"), [(384, 128), (60, 512)])
def test_rows_have_slots_for_the_windows_that_come(monkeypatch, longest, slots):
    """Empty slots cost cuDNN time, so there are few of them where windows are long."""
    simulate(monkeypatch, "cudnn-packed")
    predictor = Predictor(big_windows_model(), devices=1)
    lengths = SQUAD_LENGTHS.clip(20, longest).tolist()
    plan = predictor.plan(lengths)
    assert plan[0].shape == (16_384, slots)
    assert sum(batch.shape.tokens for batch in plan) < 1.05 * sum(lengths)


def test_windows_too_many_for_their_rows_get_more_rows():
    sizes = Sizes(devices=2, longest=64, tokens=(128, 512), slot_tokens=(32,))
    plan = sizes.plan([4] * 100)  # of which a row of 512 tokens has slots for 16
    assert sorted(index for batch in plan for row in batch.rows for index in row) == [*range(100)]
    assert all(len(row) <= batch.shape.windows for batch in plan for row in batch.rows)
    assert [batch.shape for batch in plan] == [(512, 16)] * 3 + [(128, 4)]


def big_windows_model():
    return DistilBertForQuestionAnswering(
        DistilBertConfig(**{**TINY, "max_position_embeddings": 384}), rngs=nnx.Rngs(0)
    )


def window(example, tokens):
    places = Places(np.zeros((2, 2), np.int32), np.zeros(2, np.int32))
    context = Tokens(np.zeros(2, np.int32), places=places)
    return Feature(example, np.full(tokens, 7, np.int32), 3, context, slice(0, 2), False)


def test_rows_hold_whole_windows_one_after_the_other():
    predictor = Predictor(small_model(), max_length=64, devices=2, batch_tokens=64, kernels="xla")
    windows = [window(i, tokens) for i, tokens in enumerate([40, 20, 33, 9, 5])]
    first = Batch(Shape(64, 8), [[0, 1], [2, 3, 4]])
    predictor.with_types, predictor.window_by_window = True, False  # so that all is filled in
    inputs, context = predictor.inputs(first, Windows.of(windows))
    assert context.start[:, :3].tolist() == [[3, 3, 0], [3, 3, 3]]
    assert context.may_start.all()
    assert inputs.starts[:, :3].tolist() == [[0, 40, 0], [0, 33, 42]]
    assert inputs.lengths[:, :3].tolist() == [[40, 20, 0], [33, 9, 5]]
    assert inputs.input_ids[0].tolist() == [7] * 60 + [0] * 4
    assert inputs.positions[0].tolist() == [*range(40), *range(20), 0, 0, 0, 0]
    assert inputs.window[1].tolist() == [0] * 33 + [1] * 9 + [2] * 5 + [0] * 17
    assert inputs.token_types[1, 33:42].tolist() == [0, 0, 0] + [1] * 6


def test_every_window_comes_back_with_its_own_tokens():
    predictor = Predictor(small_model(), max_length=64, devices=4, batch_tokens=64, kernels="xla")
    windows = [window(i, 5 + i) for i in range(9)]
    seen = []
    logits = predictor.predict(windows, seen.append)
    assert [len(one.start) for one in logits] == list(range(5, 14))
    assert sum(seen) == 9
    assert predictor.shapes == [(32, 32)]
    assert predictor.computed_tokens == 4 * 32
    assert list(predictor.predict([])) == []


def test_chunks_come_in_their_order_while_the_next_is_under_way():
    predictor = Predictor(small_model(), max_length=64, devices=1, batch_tokens=64)
    chunks = [[window(0, 5 + i + j) for j in range(n)] for i, n in enumerate((30, 0, 1, 40, 0))]
    read = []

    def reading():
        for index, chunk in enumerate(chunks):
            read.append(index)
            yield chunk

    for index, logits in enumerate(predictor.stream(reading())):
        assert [len(one.start) for one in logits] == [len(one) for one in chunks[index]]
        assert len(read) == min(index + 2, 5)
        alone = Predictor(small_model(), max_length=64, devices=1, batch_tokens=64)
        for one, other in zip(logits, alone.predict(chunks[index]), strict=True):
            assert np.array_equal(one.start, other.start)  # a chunk depends on no other
    assert index == 4


def test_shapes_are_compiled_once_and_before_the_first_batch():
    predictor = Predictor(small_model(), max_length=64, devices=1)
    small, large = Shape(32, 4), Shape(64, 4)
    predictor.compile([large, small])
    before = dict(predictor.compiled)
    predictor.compile([small])
    assert predictor.compiled == before
    assert predictor.shapes == [small, large]
    (batch,) = predictor.plan([40])
    with pytest.raises(TypeError):  # another shape is an error, not a silent compilation
        before[small](predictor.inputs(batch, Windows.of([window(0, 40)]))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max_length 65.*64 positions"),
        ({"parallel": "xmap"}, "neither 'jit' nor 'pmap'"),
        ({"devices": 9}, "devices 9, but this process has 8"),
        ({"devices": 0}, "devices 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"matmul_precision": "int4"}, "matmul_precision 'int4'"),
        ({"kernels": "cuda"}, "kernels 'cuda' is not one of"),
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
        devices.use_compilation_cache()
        folder = jax.config.jax_compilation_cache_dir
        assert folder.startswith(str(tmp_path / "flaxqa"))
        jax._src.compilation_cache.reset_cache()
        Predictor(small_model(), max_length=64, devices=1).compile([Shape(17, 3)])
        assert list((tmp_path / "flaxqa").rglob("*-cache"))
        # Of GPUs what XLA found out by trying lies in there, too.
        kept = jax.config.jax_persistent_cache_enable_xla_caches
        assert "xla_gpu_per_fusion_autotune_cache_dir" in kept
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
    predictor = Predictor(small_model(), max_length=64, devices=2, kernels="xla")
    for windows, tokens in ((1, 64), (2, 64), (3, 128), (5, 256), (9, 384), (10_000, 4_096)):
        first = predictor.plan([60] * windows)[0]
        assert first.shape == (tokens, tokens)


def test_native_kernels_have_one_program_for_all_but_the_largest_rows():
    predictor = Predictor(small_model(), max_length=64, devices=2, kernels="native")
    usual = predictor.usual_tokens
    for windows in (1, 2, 5, 60, 10_000):
        plan = predictor.plan([60] * windows)
        assert {batch.shape for batch in plan} == {(usual, usual)}
        # Split over the devices all the same.
        for batch in plan:
            sizes = [len(row) for row in batch.rows]
            assert max(sizes) - min(sizes) <= 1
    small = Predictor(small_model(), max_length=64, devices=1, batch_tokens=100, kernels="native")
    assert small.plan([60] * 9)[0].shape == (100, 100)
    large = Predictor(
        small_model(), max_length=64, devices=1, batch_tokens=10**12, kernels="native"
    )
    assert large.plan([60] * 9)[0].shape.tokens == usual
    assert usual < large.plan([60] * 1_000)[0].shape.tokens <= 1.125 * 60_000


def test_rows_of_small_jobs_are_an_eighth_of_a_power_of_two_apart():
    predictor = Predictor(
        small_model(), max_length=64, devices=1, batch_tokens=16_384, kernels="xla"
    )
    longer = [size for size in predictor.row_tokens if size >= 1_024]
    assert longer == [*range(1_024, 2_048, 128), 2_048, 16_384]
    vast = Predictor(small_model(), max_length=64, devices=1, batch_tokens=10**12)
    assert len(vast.row_tokens) < 500  # and it was not counted up to


def test_accelerators_have_three_sizes_of_rows(accelerator):
    predictor = Predictor(big_windows_model(), devices=1)
    assert predictor.row_tokens == (1_024, 4_096, 16_384)
    odd = Predictor(big_windows_model(), devices=1, batch_tokens=1_000)
    assert odd.row_tokens == (384, 1_024)


def scores_of(predictor, windows, rule):
    (scores,) = predictor.stream([windows], rule=rule)
    return scores


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("decoder", ["squad", "spans"])
def test_answers_of_accelerators_come_from_what_they_found(
    accelerator, trained, windows, devices, parallel, decoder
):
    """Logits stay where they are; whoever asks for them gets them."""
    decode = answers.Decoder(decoder)
    examples, given = windows
    predictor = Predictor(trained.model, devices=devices, parallel=parallel, batch_tokens=2_048)
    scores = scores_of(predictor, given, decode.rule)
    found = decode(examples, given, scores)
    assert "tables" not in vars(scores.chunk)
    reference = Predictor(trained.model, devices=1).predict(given)
    plain = decode(examples, given, reference)
    for ours, theirs in zip(found, plain, strict=True):
        assert [(a.start, a.end) for a in ours[:1]] == [(a.start, a.end) for a in theirs[:1]]
        assert ours[0].score == pytest.approx(theirs[0].score, abs=1e-4)
        assert ours.null_odds == pytest.approx(theirs.null_odds, abs=1e-3)
        assert ours.log_normalizers == pytest.approx(theirs.log_normalizers, abs=1e-4)
    for ours, theirs in zip(scores, reference, strict=True):
        np.testing.assert_allclose(ours.start, theirs.start, rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.end, theirs.end, rtol=0, atol=1e-4)
    again = decode(examples, given, list(scores))
    for ours, theirs in zip(found, again, strict=True):
        assert [(a.start, a.end) for a in ours] == [(a.start, a.end) for a in theirs]


def test_another_rule_than_the_devices_knew_takes_the_logits(accelerator, trained, windows):
    examples, given = windows
    predictor = Predictor(trained.model, devices=1)
    rule = answers.Decoder("squad", n_best=3).rule
    scores = scores_of(predictor, given, rule)
    found = answers.decode_spans(examples, given, scores, top_k=2)
    assert found == answers.decode_spans(examples, given, list(scores), top_k=2)
    assert len(found[0]) == 2


def test_mlperf_windows_are_searched_on_accelerators_as_here(accelerator, trained, windows):
    examples, _ = windows
    given = features.make(
        examples, trained.tokenizer, max_length=90, doc_stride=8, windows="mlperf"
    )
    assert given.counts
    decode = answers.Decoder("squad")
    scores = scores_of(Predictor(trained.model, devices=1, max_length=90), given, decode.rule)
    found, plain = (decode(examples, given, each) for each in (scores, list(scores)))
    assert [[a.text for a in one] for one in found] == [[a.text for a in one] for one in plain]
