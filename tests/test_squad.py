import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import SHARED

from flaxqa.errors import DataError
from flaxqa.eval import questions as dataset
from flaxqa.eval import squad
from flaxqa.records import Columns
from flaxqa.rows import Input


def qa(example_id="1", question="Who?", answers=("Bob",)):
    return {"id": example_id, "question": question, "answers": [{"text": a} for a in answers]}


def content(*qas, context="I am Bob."):
    return {"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


# Worked out by hand from the official script's four steps.
@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The Bob", "bob", True, 1.0),
        ("twenty-one", "twentyone", True, 1.0),  # punctuation is deleted, not spaced
        ("twenty-one", "twenty one", False, 0.0),
        ("\u201cBob\u201d", "Bob", False, 0.0),  # only ASCII punctuation is punctuation
        ("1990\u20131991", "19901991", False, 0.0),
        ("an apple a day", "apple day", True, 1.0),
        ("theatre", "the atre", False, 0.0),
        ("", "the", True, 0.0),  # the quirk: equal when normalized, and no shared word
        ("", "Bob", False, 0.0),
        ("Bob Bob", "Bob", False, 2 / 3),
        ("red green", "green blue yellow", False, 0.4),
        ("Stra\u00dfe", "STRASSE", False, 0.0),
        ("a\u00a0b", "b", True, 1.0),  # a no-break space is white space
        ("x\u2013a\u2013y", "x\u2013 \u2013y", True, 1.0),  # an article leaves a space
    ],
)
def test_scores_of_one_pair(prediction, answer, exact, f1):
    assert squad.exact_match(prediction, answer) is exact
    assert squad.f1(prediction, answer) == pytest.approx(f1, abs=1e-15)


def test_the_best_answer_counts_for_each_score_and_missing_ones_score_zero():
    questions = dataset.parse(
        content(qa("1", answers=("the", "the cat")), qa("2"), qa("3")), ""
    ).questions
    scores = squad.score(questions, {"1": "", "3": "Bob", "9": "ignored"})
    assert scores.values["exact_match"].tolist() == [True, False, True]
    assert scores.values["f1"].tolist() == [0.0, 0.0, 1.0]
    assert scores.unanswered == ("2",)
    assert scores.exact_match == pytest.approx(200 / 3)
    assert scores.f1 == pytest.approx(100 / 3)


def test_a_new_metric_is_one_entry(monkeypatch):
    def begins(prediction, answer, *, v2=False):
        return answer.startswith(prediction)

    monkeypatch.setitem(squad.METRICS, "begins", squad.Metric("Begins", "begins", begins, bool))
    asked = content(qa("a", answers=("red car", "car")), qa("b", answers=("blue",)))
    scores = squad.score(dataset.parse(asked, "").questions, {"a": "red", "b": "green"})
    assert scores.means == {"exact_match": 0.0, "f1": pytest.approx(100 / 3), "begins": 50.0}
    assert scores.intervals()["begins"] == (0.0, 100.0)
    assert scores.by_answer()["HasAns_begins"] == 50.0


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "exact_match", "f1"),
    [
        ("bert_large_ensemble", 86.20624408703878, 92.19557978351145),
        ("logistic_regression", 40.14191106906339, 50.98153647324461),
    ],
)
def test_published_predictions_have_their_official_scores(name, exact_match, f1):
    questions = dataset.read(SHARED / "squad" / "dev-v1.1.json").questions
    predictions = squad.read_predictions(SHARED / "squad" / "predictions" / f"{name}.json")
    scores = squad.score(questions, predictions)
    assert scores.exact_match == pytest.approx(exact_match, abs=1e-9)
    assert scores.f1 == pytest.approx(f1, abs=1e-9)


def random_scores(n, seed=0):
    rng = np.random.default_rng(seed)
    f1s = rng.choice([0, 0.4, 0.5, 2 / 3, 0.8, 1], n)
    values = {"exact_match": f1s == 1, "f1": f1s}
    return squad.Scores(tuple(map(str, range(n))), values, (), np.ones(n, bool))


def test_intervals_are_those_of_resampling_the_questions():
    scores = random_scores(400)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 400, (20_000, 400))
    expected = np.percentile(100 * scores.values["f1"][rows].mean(axis=1), (2.5, 97.5))
    got = scores.intervals(resamples=20_000)
    np.testing.assert_allclose(got["f1"], expected, atol=0.15)  # 0.05 is their own noise
    expected = np.percentile(100 * scores.values["exact_match"][rows].mean(axis=1), (2.5, 97.5))
    np.testing.assert_allclose(got["exact_match"], expected, atol=0.3)  # steps of 0.25
    assert scores.intervals() == scores.intervals()
    assert scores.intervals(seed=1) != scores.intervals()


def test_intervals_of_certain_scores_are_points():
    values = {"exact_match": np.ones(2, bool), "f1": np.ones(2)}
    certain = squad.Scores(("1", "2"), values, (), np.ones(2, bool))
    assert certain.intervals() == {"exact_match": (100.0, 100.0), "f1": (100.0, 100.0)}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "data holds no question"),
        ({}, "the record has no column 'question'"),
        ({"data": 7}, "data must be a list, it is a number"),
        ({"data": []}, "data holds no question"),
        (content({"id": "1", "answers": []}), r"data\[0\].paragraphs\[0\].qas\[0\].*'question'"),
        (content(qa(answers=())), r"answers is empty.*SQuAD 2.0"),
        (content(qa(7.5)), r"qas\[0\]: .*'id' is a number, not a string or an integer"),
        (content(qa("1"), qa("1")), r"qas\[1\]: its id '1' is also that of data\[0\].*qas\[0\]"),
        (content(qa("\ud800")), "lone surrogate"),
        (content(qa(), context=None), "'context' is null, not a string"),
        (content(7), r"qas\[0\] must be an object, it is a number"),
    ],
)
def test_a_file_that_is_not_squad_is_refused_by_place(tmp_path, broken, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match=message) as caught:
        dataset.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"data": [', "is not JSON"),
        (b"\xff\xfe\x00", "is UTF-16"),
        (b"[" * 100_000, "is not JSON"),
        (None, "is missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, raw, message):
    path = tmp_path / "broken.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        dataset.read(path)
    assert str(path) in str(caught.value)


def test_all_problems_of_a_file_come_in_one_error(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content(*[qa(answers=()) for _ in range(30)])))
    with pytest.raises(DataError) as caught:
        dataset.read(path)
    assert str(caught.value).count("answers is empty") == 11
    assert "and 39 more" in str(caught.value)


@pytest.mark.parametrize("broken", [[], {"1": 7}, {"1": None}])
def test_a_predictions_file_of_another_form_is_refused(tmp_path, broken):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match="predictions.json"):
        squad.read_predictions(path)


def test_the_evaluate_metric_agrees_and_needs_no_network(tmp_path):
    """In a process of its own, as `evaluate` reads its settings when it is imported."""
    code = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = refuse
from flaxqa.eval.metric import Squad, SquadV2
import json
predictions = [{"id": "1", "prediction_text": "the Bob"}, {"id": "2", "prediction_text": "x y"}]
references = [
    {"id": "1", "answers": {"text": ["Bob"], "answer_start": [0]}},
    {"id": "2", "answers": {"text": ["y z", "q"], "answer_start": [0, 3]}},
]
metric = Squad()
print(json.dumps(metric.compute(predictions=predictions, references=references)))
metric.add_batch(predictions=predictions, references=references)
print(json.dumps(metric.compute()))
for row, number in zip(predictions, (0.25, 0.75)):
    row["no_answer_probability"] = number
references[1]["answers"] = {"text": [], "answer_start": []}
arguments = {"predictions": predictions, "references": references}
print(json.dumps(SquadV2().compute(**arguments)))
print(json.dumps(SquadV2().compute(**arguments, no_answer_threshold=0.5)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, in_batches, spoken, silent = map(json.loads, done.stdout.splitlines())
    assert whole == in_batches == {"exact_match": 50.0, "f1": 75.0}
    best = {"best_exact": 100.0, "best_exact_thresh": 0.25, "best_f1": 100.0,
            "best_f1_thresh": 0.25}  # fmt: skip
    kinds = {"total": 2, "HasAns_exact": 100.0, "HasAns_f1": 100.0, "HasAns_total": 1,
             "NoAns_total": 1}  # fmt: skip
    none = {"exact": 50.0, "f1": 50.0, "NoAns_exact": 0.0, "NoAns_f1": 0.0}
    assert spoken == {**best, **kinds, **none}
    every = {"exact": 100.0, "f1": 100.0, "NoAns_exact": 100.0, "NoAns_f1": 100.0}
    assert silent == {**best, **kinds, **every}


@pytest.mark.shared
def test_the_evaluate_metric_gives_the_official_numbers_on_the_dev_set():
    from flaxqa.eval.metric import Squad

    questions = dataset.read(SHARED / "squad" / "dev-v1.1.json").questions
    given = squad.read_predictions(SHARED / "squad" / "predictions" / "logistic_regression.json")
    answered = [question for question in questions if question.id in given]
    references = [
        {"id": q.id, "answers": {"text": list(q.answers), "answer_start": [0] * len(q.answers)}}
        for q in answered
    ]
    rows = [{"id": q.id, "prediction_text": given[q.id]} for q in answered]
    got = Squad().compute(predictions=rows, references=references)
    expected = squad.score(answered, given)
    assert got["f1"] == pytest.approx(expected.f1, abs=1e-9)
    assert got["exact_match"] == pytest.approx(expected.exact_match, abs=1e-9)


def read_hub(folder, split):
    found, source = dataset.Found("here"), {}
    one = Input(str(folder), "here", "hub", split=split)
    dataset.read_into(found, one, Columns(), source)
    return found.data(), source


def test_a_hub_data_set_reads_like_the_file_it_came_from(tmp_path):
    """Through `datasets`, from a local folder in the hub data set's layout."""
    import datasets

    rows = [
        {
            "id": str(i),
            "title": "t",
            "context": "I am Bob.",
            "question": f"Who {i}?",
            "answers": {"text": ["Bob"], "answer_start": [5]},
        }
        for i in range(3)
    ]
    folder = tmp_path / "squad"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "validation-00000.parquet"))
    got, source = read_hub(folder, "validation")
    expected = dataset.parse(content(*[qa(str(i), f"Who {i}?") for i in range(3)]), "")
    assert got == expected
    assert source == {"split": "validation", "commit": None}
    assert dataset.sha256(got.questions) == dataset.sha256(expected.questions)
    assert dataset.sha256(got.questions[:2]) != dataset.sha256(expected.questions)
    with pytest.raises(DataError, match=r"the data set .*squad: .*test"):
        read_hub(folder, "test")


# --------------------------------------------------------------------------------------- SQuAD 2.0


def v2_content(*qas):
    return {**content(*qas), "version": "v2.0"}


def v2_qa(id, *answers):
    return {**qa(id, answers=answers), "is_impossible": not answers}


# Worked by hand: id, right answers, prediction, number, exact, F1.
V2 = [
    ("right", ("red fish",), "the red fish", 0.1, 1, 1.0),
    ("half", ("red fish", "fish soup"), "fish", 0.6, 0, 2 / 3),
    ("wrong", ("red fish",), "blue", 0.4, 0, 0.0),
    ("silent", ("red fish",), "", 0.9, 0, 0.0),
    ("an article", ("the",), "", 0.2, 1, 1.0),  # nothing is left of the only answer
    ("article too", ("the", "red"), "a", 0.3, 0, 0.0),  # nothing is left of one: it does not count
    ("none, silent", (), "", 0.8, 1, 1.0),
    ("none, spoken", (), "red", 0.5, 0, 0.0),
    ("none, an article", (), "the", 0.7, 1, 1.0),
]


@pytest.fixture
def v2():
    data = dataset.parse(v2_content(*(v2_qa(row[0], *row[1]) for row in V2)), "here")
    assert data.v2
    return data.questions, {row[0]: row[2] for row in V2}, {row[0]: row[3] for row in V2}


def test_v2_scores_are_those_worked_by_hand(v2):
    questions, predictions, _ = v2
    scores = squad.score(questions, predictions, v2=True)
    assert scores.values["exact_match"].tolist() == [bool(row[4]) for row in V2]
    np.testing.assert_allclose(scores.values["f1"], [row[5] for row in V2], rtol=1e-15)
    assert scores.has_answer.tolist() == [True] * 6 + [False] * 3
    assert scores.by_answer() == pytest.approx(
        {
            "exact": 400 / 9, "f1": 100 * (4 + 2 / 3) / 9, "total": 9,
            "HasAns_exact": 200 / 6, "HasAns_f1": 100 * (2 + 2 / 3) / 6, "HasAns_total": 6,
            "NoAns_exact": 200 / 3, "NoAns_f1": 200 / 3, "NoAns_total": 3,
        }
    )  # fmt: skip
    assert (scores.exact_match, scores.f1) == (
        scores.by_answer()["exact"],
        scores.by_answer()["f1"],
    )


@pytest.mark.parametrize(
    ("threshold", "exact", "f1"),
    [
        (1.0, [1, 0, 0, 0, 1, 0, 1, 0, 1], [1, 2 / 3, 0, 0, 1, 0, 1, 0, 1]),
        # above 0.55: half, silent and two of none are left unanswered
        (0.55, [1, 0, 0, 0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 1, 0, 1]),
        (0.5, [1, 0, 0, 0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 1, 0, 1]),  # not above 0.5
        (0.45, [1, 0, 0, 0, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 0, 1, 1, 1]),
        (0.15, [1, 0, 0, 0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1, 1, 1]),
        (0.0, [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_v2_questions_above_the_threshold_are_left_unanswered(v2, threshold, exact, f1):
    questions, predictions, na_probs = v2
    scores = squad.score(questions, predictions, v2=True).with_no_answer(na_probs, threshold)
    assert scores.values["exact_match"].tolist() == [bool(value) for value in exact]
    np.testing.assert_allclose(scores.values["f1"], f1)


def test_v2_best_thresholds_are_those_worked_by_hand(v2):
    questions, predictions, na_probs = v2
    scores = squad.score(questions, predictions, v2=True)
    # All silent: 3 right. Answered from the lowest number on: right +1 (4), an article +1 (5),
    # article too and wrong 0, none-spoken -1, half +2/3 in F1 only, then nothing more.
    assert squad.best_thresholds(scores, predictions, na_probs) == {
        "best_exact": 500 / 9,
        "best_exact_thresh": 0.2,
        "best_f1": 500 / 9,
        "best_f1_thresh": 0.2,
    }
    better = {**na_probs, "half": 0.45}
    assert squad.best_thresholds(scores, predictions, better) == {
        "best_exact": 500 / 9,
        "best_exact_thresh": 0.2,
        "best_f1": pytest.approx(100 * (5 + 2 / 3) / 9),
        "best_f1_thresh": 0.45,
    }
    # Where silence is best, the threshold is the official script's 0.
    bad = dict.fromkeys(predictions, "blue")
    scores = squad.score(questions, bad, v2=True)
    assert squad.best_thresholds(scores, bad, na_probs) == {
        "best_exact": 300 / 9, "best_exact_thresh": 0.0, "best_f1": 300 / 9, "best_f1_thresh": 0.0,
    }  # fmt: skip


def test_v2_missing_predictions_score_zero_and_are_named(v2):
    questions, predictions, na_probs = v2
    del predictions["right"], predictions["none, silent"]
    scores = squad.score(questions, predictions, v2=True)
    assert scores.unanswered == ("right", "none, silent")
    assert scores.by_answer()["exact"] == pytest.approx(200 / 9)
    best = squad.best_thresholds(scores, predictions, na_probs)
    assert best["best_exact"] == pytest.approx(300 / 9)
    silent = scores.with_no_answer(na_probs, -1.0).by_answer()
    assert silent["exact"] == pytest.approx(200 / 9)  # the missing one stays at 0


@pytest.mark.parametrize(
    ("data", "v2"),
    [
        (content(qa("1")), False),
        (v2_content(qa("1")), True),
        ({**content(qa("1")), "version": "2.0"}, True),
        (content(v2_qa("1", "x")), True),
        (content(v2_qa("1"), qa("2")), True),
    ],
)
def test_a_file_says_itself_whether_it_is_squad_2(data, v2):
    assert dataset.parse(data, "here").v2 is v2


def test_a_kind_without_questions_has_no_v2_numbers():
    questions = dataset.parse(v2_content(qa("1")), "here").questions
    names = squad.score(questions, {"1": "x"}, v2=True).by_answer()
    assert sorted(names) == ["HasAns_exact", "HasAns_f1", "HasAns_total", "exact", "f1", "total"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [("[]", "id to number"), ('{"1": "x"}', "'1' is str, not a number"),
     ('{"1": true}', "'1' is bool"), ('{"1": NaN}', "'1' is nan, not a finite"),
     ('{"1": -Infinity}', "'1' is -inf, not a finite"), (f'{{"1": 1{"0" * 400}}}', "not a finite")],
)  # fmt: skip
def test_a_file_of_numbers_that_is_none_is_refused(tmp_path, raw, message):
    (tmp_path / "odds.json").write_text(raw)
    with pytest.raises(DataError, match=message):
        squad.read_na_probs(tmp_path / "odds.json")


@pytest.mark.shared
def test_v2_has_answer_scores_are_the_v1_scores():
    """The published predictions in a v2 file: the questions with answers score as in v1.1."""
    path = SHARED / "squad" / "dev-v1.1.json"
    raw = json.loads(path.read_text())
    for article in raw["data"]:
        for paragraph in article["paragraphs"]:
            for each in paragraph["qas"]:
                each["is_impossible"] = False
            first = paragraph["qas"][0]
            paragraph["qas"].append(
                {**first, "id": first["id"] + "-none", "answers": [], "is_impossible": True}
            )
    questions, v2 = dataset.parse({**raw, "version": "v2.0"}, "made")
    assert v2
    for name in ("bert_large_ensemble", "logistic_regression"):
        predictions = squad.read_predictions(SHARED / "squad" / "predictions" / f"{name}.json")
        old = squad.score(dataset.read(path).questions, predictions)
        silent = {q.id: "" for q in questions if not q.answers}
        new = squad.score(questions, {**predictions, **silent}, v2=True).by_answer()
        assert (new["HasAns_exact"], new["HasAns_f1"]) == (old.exact_match, old.f1)
        assert (new["HasAns_total"], new["NoAns_exact"]) == (10_570, 100.0)
