"""`flaxqa.evaluate` and `flaxqa.compare` from Python, and what notebooks show."""

import inspect
import json

import datasets
import pandas as pd
import pytest
from conftest import QUICKSTART

import flaxqa
from flaxqa.errors import DataError, UsageError
from flaxqa.eval import questions
from flaxqa.eval.api import Evaluation

MODEL, DATA = QUICKSTART / "checkpoint", QUICKSTART / "heldout.json"
N = 10


@pytest.fixture(scope="module")
def rows():
    return [
        {"id": one.id, "question": one.question, "context": one.context,
         "answers": {"text": list(one.answers), "answer_start": [0] * len(one.answers)}}
        for one in questions.read(DATA).questions[:N]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    return flaxqa.evaluate(MODEL, DATA, output=output, limit=N, progress=False), output


def test_an_evaluation_holds_what_its_files_do(evaluated):
    found, output = evaluated
    assert found.metrics == json.loads((output / "metrics.json").read_bytes())
    assert found.predictions == json.loads((output / "predictions.json").read_bytes())
    frame = found.to_pandas()
    assert list(frame["id"]) == list(found.predictions)
    assert 100 * frame["f1"].mean() == pytest.approx(found.metrics["f1"])
    assert repr(found).startswith("<Evaluation: EM ")
    assert f"{found.metrics['f1']:.2f}" in found._repr_html_()
    again = Evaluation.read(output)
    assert (again.metrics, again.run) == (found.metrics, found.run)


@pytest.mark.parametrize("kind", ["list", "pandas", "arrow", "dataset"])
def test_rows_are_evaluated_as_the_file_is_and_nothing_is_kept(evaluated, rows, kind, tmp_path):
    made = {
        "list": lambda: rows,
        "pandas": lambda: pd.DataFrame(rows),
        "arrow": lambda: datasets.Dataset.from_list(rows).data.table,
        "dataset": lambda: datasets.Dataset.from_list(rows),
    }
    found = flaxqa.evaluate(MODEL, made[kind](), progress=False)
    assert found.predictions == evaluated[0].predictions
    assert found.metrics["f1"] == evaluated[0].metrics["f1"]
    wanted = evaluated[0].run["data"]["questions_sha256"]
    assert found.run["data"]["questions_sha256"] == wanted


def test_rows_that_cannot_be_scored_are_told_of(rows):
    with pytest.raises(DataError, match="row 1: the record has no column 'answers'"):
        flaxqa.evaluate(MODEL, [rows[0], {**rows[1], "answers": None}], progress=False)
    with pytest.raises(UsageError, match="the frame has no column 'question'; it has id"):
        flaxqa.evaluate(MODEL, pd.DataFrame(rows).drop(columns="question"), progress=False)
    with pytest.raises(UsageError, match="limit is 0, it must be an integer of at least 1"):
        flaxqa.evaluate(MODEL, rows, limit=0, progress=False)


def test_a_comparison_from_python(rows, tmp_path):
    found = flaxqa.compare(
        MODEL, rows, ("jax", "jax/bfloat16"), output=tmp_path, rounds=1, min_seconds=0.1,
        min_queries=N, sweep=False, scenarios=("offline",), progress=False,
    )  # fmt: skip
    assert json.loads((tmp_path / "comparison.json").read_bytes()) == found.content
    assert (tmp_path / "report.html").stat().st_size > 500
    frame = found.to_pandas()
    assert list(frame["name"]) == ["jax/float32", "jax/bfloat16"]
    assert (frame["verdict"] == "VALID").all()
    assert (frame["tuned_questions_per_second"] > 0).all()
    assert (frame["streamed_questions_per_second"] > 0).all()
    assert "<td>jax/bfloat16</td>" in found._repr_html_()
    assert repr(found).startswith("<Comparison: 2 of 2 backends were measured")


def test_signatures_name_the_options():
    of = {
        flaxqa.load: "batch_tokens",
        flaxqa.evaluate: "doc_stride",
        flaxqa.Reader.answers: "overlapping",
        flaxqa.compare: "ways",
    }
    for function, name in of.items():
        assert name in inspect.signature(function).parameters
