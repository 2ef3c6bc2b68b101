"""Data frames in and out, and answers in a notebook."""

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from conftest import QUICKSTART

import flaxqa
from flaxqa import frames
from flaxqa.errors import UsageError
from flaxqa.eval.metric import Squad

CONTEXT = "Sailors still speak of the ship Tulflora. The ship Tulflora carried dried fish."
ROWS = [
    {"id": "a", "question": "What did the ship Tulflora carry?", "context": CONTEXT},
    {"id": "b", "question": " ", "context": CONTEXT},
]
MAKERS = {
    "pandas": lambda rows: pd.DataFrame(rows, index=[7, 3]),
    "arrow table": pa.Table.from_pylist,
    "arrow batch": pa.RecordBatch.from_pylist,
    "polars": lambda rows: pytest.importorskip("polars").DataFrame(rows),
}


@pytest.fixture(scope="module")
def reader():
    return flaxqa.load(QUICKSTART / "checkpoint", devices=1)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_frame_is_read_by_rows_and_answered_as_a_frame(reader, kind):
    frame = MAKERS[kind](ROWS)
    first, second = reader.answers(frame)
    assert first.record == ROWS[0]
    assert first[0].text == "dried fish"
    assert second.error == "the question is blank"
    found = flaxqa.QuestionAnswerer(reader)(frame)
    assert type(found) is type(frame)
    rows = list(frames.rows_of(found))
    assert [row["answer"] for row in rows] == ["dried fish", ""]
    assert [row["error"] for row in rows] == ["", "the question is blank"]
    assert rows[0]["context"][rows[0]["start"] : rows[0]["end"]] == "dried fish"
    assert [row["id"] for row in rows] == ["a", "b"]
    if kind == "pandas":
        assert list(found.index) == [7, 3]


def test_a_frame_without_the_columns_is_refused(reader):
    frame = pd.DataFrame([{"q": "x", "context": "y"}])
    with pytest.raises(UsageError, match="has no column 'question'; it has q, context"):
        list(reader.answers(frame))
    with pytest.raises(UsageError, match="has no column 'question'"):
        flaxqa.QuestionAnswerer(reader)(frame)
    answerer = flaxqa.QuestionAnswerer(reader, question="q")
    assert list(answerer(frame).columns)[:2] == ["q", "context"]


def test_a_pyarrow_batch_of_a_dataset_is_mapped(reader):
    mapped = datasets.Dataset.from_list(ROWS).with_format("arrow")
    found = mapped.map(flaxqa.QuestionAnswerer(reader), batched=True)
    assert found.with_format(None)["answer"] == ["dried fish", ""]


def test_the_metric_takes_frames():
    predictions = pd.DataFrame({"id": ["1", "2"], "prediction_text": ["the Bob", "x"]})
    references = [{"id": one, "answers": {"text": ["Bob"], "answer_start": [0]}} for one in "12"]
    plain = Squad().compute(predictions=predictions.to_dict("records"), references=references)
    framed = Squad().compute(predictions=predictions, references=pa.Table.from_pylist(references))
    assert framed == plain == {"exact_match": 50.0, "f1": 50.0}


def test_a_notebook_marks_the_answer_in_its_context(reader):
    found = reader.answer(ROWS[0]["question"], CONTEXT)
    shown = found._repr_html_()
    assert "<b>What did the ship Tulflora carry?</b>" in shown
    assert "carried <mark>dried fish</mark>." in shown
    evil = "<script>alert(1)</script> carried dried fish."
    shown = reader.answer("What did <b>it</b> carry?", evil)._repr_html_()
    assert "<script>" not in shown
    assert "What did &lt;b&gt;it" in shown
    (bad,) = reader.answers([("", CONTEXT)])
    assert "the question is empty" in bad._repr_html_()
    assert "no answer" in reader.answer("Who?", CONTEXT, no_answer_threshold=0.0)._repr_html_()
    several = reader.search("What did the ship carry?", [CONTEXT, "Nothing."], top_k=2)
    assert "context 0" in several._repr_html_()
