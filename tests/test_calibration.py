"""Calibration beside scikit-learn and values worked by hand."""

import math

import numpy as np
import pytest
import scipy.optimize
import sklearn.calibration
import sklearn.metrics

from flaxqa import answers, features
from flaxqa.answers import Decoder
from flaxqa.eval import calibration, squad
from flaxqa.spans import Logits


@pytest.fixture(params=["smooth", "ties", "few"])
def scored(request):
    rng = np.random.default_rng(5)
    size = 9 if request.param == "few" else 2_000
    scores = rng.beta(2, 1.2, size)
    if request.param == "ties":
        scores = np.round(scores, 1)
    return scores, rng.random(size) < scores**1.5


def test_bins_are_those_of_scikit_learn(scored):
    scores, right = scored
    share, mean = sklearn.calibration.calibration_curve(right, scores, n_bins=calibration.BINS)
    found = calibration.reliability(scores, right)
    if not np.isclose(scores * 10, np.round(scores * 10)).any():  # its borders are on the left
        np.testing.assert_allclose([one.right for one in found], share, atol=1e-9)
        np.testing.assert_allclose([one.score for one in found], mean, atol=1e-9)
    assert sum(one.questions for one in found) == len(scores)
    for one in found:
        assert one.low < one.score <= one.high + 1e-12 or one.low == 0
        assert one.interval[0] <= one.right <= one.interval[1]


def test_the_error_is_worked_by_hand():
    scores = np.array([0.0, 0.05, 0.1, 0.95, 1.0, 0.5])
    right = np.array([False, True, False, True, True, False])
    # The first tenth: mean 0.05, right 1/3; the last: 0.975, 1; the fifth: 0.5, 0.
    by_hand = (3 * abs(0.05 - 1 / 3) + 2 * abs(0.975 - 1) + 1 * 0.5) / 6
    assert calibration.error(scores, right) == pytest.approx(by_hand, abs=1e-9)


def test_the_interval_of_the_error_holds_it_and_narrows(scored):
    scores, right = scored
    low, high = calibration.error_interval(scores, right)
    assert low <= calibration.error(scores, right) <= high
    assert (low, high) == calibration.error_interval(scores, right)
    many = calibration.error_interval(np.tile(scores, 9), np.tile(right, 9))
    assert many[1] - many[0] < high - low


def test_the_log_loss_is_scikit_learns(scored):
    scores, right = scored
    kept = (scores > 0) & (scores < 1)
    mine = calibration.log_loss(np.log(scores[kept]), right[kept])
    assert mine == pytest.approx(sklearn.metrics.log_loss(right[kept], scores[kept]), abs=1e-9)


def test_one_certain_mistake_does_not_cost_everything():
    assert math.isfinite(calibration.log_loss(np.array([0.0, -1.0]), np.array([False, True])))


def test_risk_and_coverage_are_worked_by_hand():
    scores = np.array([0.9, 0.5, 0.7, 0.5, 0.1])
    right = np.array([True, False, False, True, False])
    curve = calibration.risk_coverage(scores, right)
    np.testing.assert_allclose(curve.threshold, [0.9, 0.7, 0.5, 0.1])
    np.testing.assert_allclose(curve.coverage, [0.2, 0.4, 0.8, 1.0])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 2 / 4, 3 / 5], atol=1e-9)
    assert curve.area == pytest.approx(0.2 * 0 + 0.2 * 0.5 + 0.4 * 0.5 + 0.2 * 0.6, abs=1e-9)
    half = calibration.risk_coverage(scores, right, questions=10)
    np.testing.assert_allclose(half.coverage, curve.coverage / 2)
    assert half.area == pytest.approx(curve.area)


def test_coverage_for_a_precision_is_the_largest(scored):
    scores, right = scored
    curve = calibration.risk_coverage(scores, right)
    for wanted in (0.5, 0.8, 0.9):
        found = calibration.for_precision(curve, wanted)
        fine = [t for t in np.unique(scores) if right[scores >= t].mean() >= wanted]
        if not fine:
            assert found is None
            continue
        chosen = scores >= min(fine)
        expected = {"score": min(fine), "coverage": chosen.mean(),
                    "precision": right[chosen].mean(), "wanted": wanted}  # fmt: skip
        assert found == pytest.approx(expected, abs=1e-9)
    # Of 0.9, 0.8, 0.7 the first is wrong: only all three together reach two thirds.
    late = calibration.risk_coverage(np.array([0.9, 0.8, 0.7]), np.array([False, True, True]))
    assert calibration.for_precision(late, 2 / 3)["coverage"] == 1.0
    assert calibration.for_precision(late, 0.9) is None


def test_no_answer_is_ranked_as_scikit_learn_ranks(scored):
    numbers, none = scored
    found = calibration.ranking(numbers, none)
    false, true, _ = sklearn.metrics.roc_curve(none, numbers, drop_intermediate=False)
    np.testing.assert_allclose(found.false_positives, false[1:], atol=1e-9)
    np.testing.assert_allclose(found.recall, true[1:], atol=1e-9)
    precision, _, _ = sklearn.metrics.precision_recall_curve(none, numbers)
    np.testing.assert_allclose(found.precision[: len(precision) - 1],
                               precision[:-1][::-1][: len(found.precision)], atol=1e-9)  # fmt: skip
    assert found.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(none, numbers), abs=1e-9)
    average = sklearn.metrics.average_precision_score(none, numbers)
    assert found.average_precision == pytest.approx(average, abs=1e-9)
    assert calibration.ranking(numbers, np.ones_like(none)) is None
    assert calibration.ranking(numbers, np.zeros_like(none)) is None


def test_the_best_threshold_has_an_interval_around_it():
    rng = np.random.default_rng(1)
    none = rng.random(800) < 0.5
    numbers = rng.normal(np.where(none, 2.0, -2.0))
    gains = np.where(none, -1.0, 0.9)
    ends = calibration.best_threshold(gains, numbers, none)
    order = np.argsort(numbers)
    sums = none.sum() + np.cumsum(gains[order])
    best = 100 * sums.max() / 800
    assert ends["score"][0] < best < ends["score"][1] < best + 4
    assert ends["threshold"][0] <= numbers[order][sums.argmax()] <= ends["threshold"][1]
    # Where nothing is worth an answer, none is given.
    hopeless = calibration.best_threshold(-np.ones(5), np.arange(5.0) + 3, np.ones(5, bool))
    assert hopeless == {"score": (100.0, 100.0), "threshold": (0.0, 0.0)}


# --- temperature ---


def asked(n=60, tokens=12):
    """Windows with random logits, two of each question, and which answers are right."""
    rng = np.random.default_rng(3)
    from conftest import QUICKSTART

    from flaxqa import checkpoint

    tokenizer = checkpoint.load(QUICKSTART / "checkpoint").tokenizer
    examples = [features.Example(str(i), "who?", " ".join(["Ada lives in Turin."] * tokens))
                for i in range(n)]  # fmt: skip
    windows = features.make(examples, tokenizer, max_length=40, doc_stride=5)
    logits = [Logits(*(rng.normal(size=(2, len(one))) * 3).astype(np.float32)) for one in windows]
    right = {str(i): bool(rng.random() < 0.6) for i in range(n)}
    return examples, windows, logits, right


def test_scores_of_a_temperature_are_those_of_divided_logits():
    examples, windows, logits, _ = asked()
    divided = [Logits(one.start / np.float32(2), one.end / np.float32(2)) for one in logits]
    for name in answers.DECODERS:
        plain = Decoder.best(name, 3)(examples, windows, logits)
        warm = Decoder.best(name, 3, temperature=2.0)(examples, windows, logits)
        others = Decoder.best(name, 3)(examples, windows, divided)
        for one, other, third in zip(plain, warm, others, strict=True):
            assert [a.text for a in one] == [a.text for a in other]
            assert [a.start_logit for a in one] == [a.start_logit for a in other]
            assert one.null_odds == other.null_odds
            assert [a.score for a in other] == pytest.approx([a.score for a in third], rel=1e-5)
            assert other[0].score != pytest.approx(one[0].score, rel=1e-3)


def test_the_temperature_that_is_fitted_has_the_lowest_loss():
    examples, windows, logits, right = asked()
    collector = calibration.Collector(Decoder.best("squad", 5))
    found = collector(examples, windows, logits)
    assert [row[0].text for row in found] == [
        row[0].text for row in Decoder.best("squad", 5)(examples, windows, logits)]  # fmt: skip

    def loss(temperature):
        rows = Decoder.best("squad", 5, temperature=temperature)(examples, windows, logits)
        scores = [row[0].score for row in rows]
        return sklearn.metrics.log_loss([right[str(i)] for i in range(len(rows))], scores)

    mine = collector.fit(right)
    other = scipy.optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded",
                                           options={"xatol": 1e-7})  # fmt: skip
    assert mine == pytest.approx(other.x, rel=1e-3)
    assert collector.loss_of(right)(math.log(mine)) == pytest.approx(loss(mine), abs=1e-9)
    assert loss(mine) < min(loss(0.9 * mine), loss(1.1 * mine))


def test_what_metrics_say_is_of_the_answers_that_were_given():
    questions = [squad.SquadExample(str(i), "q", "c", ("a",) if i < 3 else ()) for i in range(4)]
    scores = squad.score(questions, {"0": "a", "1": "b", "2": "", "3": "x"}, v2=True)
    given = np.array([True, True, False, True])
    score = np.array([0.9, 0.4, np.nan, 0.2])
    found = calibration.told(scores, given, score, np.array([-3.0, -1.0, 2.0, 1.0]), 1.0)
    assert found["answers"] == 3
    assert found["right"] == pytest.approx(1 / 3)
    assert found["mean_score"] == pytest.approx(0.5)
    assert found["for_precision"] == {
        "wanted": 1.0,
        "score": 0.9,
        "coverage": 0.25,
        "precision": 1.0,
    }
    assert found["no_answer"] == {"roc_auc": pytest.approx(2 / 3), "average_precision": 0.5}
    nothing = calibration.told(scores, np.zeros(4, bool), score, None)
    assert nothing == {"answers": 0}
