"""The published checkpoint and its published numbers; only where the hub can be reached."""

import pytest
from conftest import HUB_MODEL, QUICKSTART

import flaxqa
from flaxqa.config import read_toml
from flaxqa.eval import run
from flaxqa.eval.config import EvalConfig

pytestmark = pytest.mark.hub

# The two examples on the model card with their printed answers.
SQUAD_CONTEXT = """
Extractive Question Answering is the task of extracting an answer from a text given a question. \
An example of a
question answering dataset is the SQuAD dataset, which is entirely based on that task. If you \
would like to fine-tune
a model on a SQuAD task, you may leverage the examples/pytorch/question-answering/run_squad.py \
script.
"""
CEO_CONTEXT = """
Alice is sitting on the bench. Bob is sitting next to her.
"""


@pytest.mark.parametrize(
    ("question", "context", "text", "score", "start", "end"),
    [
        ("What is a good example of a question answering dataset?", SQUAD_CONTEXT,
         "SQuAD dataset", 0.4704, 147, 160),
        ("Who is the CEO?", CEO_CONTEXT, "Bob", 0.4183, 32, 35),
    ],
)  # fmt: skip
def test_the_cards_examples(question, context, text, score, start, end):
    qa = flaxqa.pipeline("question-answering", model=HUB_MODEL)
    answer = qa(question=question, context=context)
    assert (answer["answer"], answer["start"], answer["end"]) == (text, start, end)
    assert context[start:end] == text
    assert answer["score"] == pytest.approx(score, abs=1e-4)
    (native,) = flaxqa.load(HUB_MODEL).answer(question, context)
    assert (native.text, native.start, native.end) == (text, start, end)
    assert native.score == pytest.approx(score, abs=1e-4)  # one window: the same score


def test_the_published_scores(tmp_path):
    config = EvalConfig(
        **{**read_toml(QUICKSTART.parent / "squad_v1.1.toml", EvalConfig), "output": str(tmp_path)}
    )
    metrics = run.evaluate(config)
    assert metrics["total"] == 10_570
    assert metrics["n_windows"] == 10_784
    assert metrics["exact_match"] == pytest.approx(79.1, abs=0.1)
    assert metrics["f1"] == pytest.approx(86.9, abs=0.1)
