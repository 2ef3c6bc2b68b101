"""Traces of steady batches."""

import logging

import pytest
from conftest import QUICKSTART

from flaxqa import batch
from flaxqa.config import PredictConfig
from flaxqa.errors import UsageError
from flaxqa.eval import run
from flaxqa.eval.config import EvalConfig

DATA, MODEL = str(QUICKSTART / "heldout.json"), str(QUICKSTART / "checkpoint")


def evaluated(tmp_path, batch_tokens):
    config = EvalConfig(
        model=MODEL,
        data=DATA,
        output=str(tmp_path / "out"),
        profile=str(tmp_path / "profile"),
        devices=1,
        limit=40,
        batch_tokens=batch_tokens,
    )
    run.evaluate(config)
    return traces(tmp_path)


def traces(tmp_path):
    return sorted((tmp_path / "profile").rglob("*.trace.json.gz"))


def prediction(tmp_path, **options):
    return PredictConfig(
        input=(DATA,),
        model=MODEL,
        output=str(tmp_path / "out"),
        profile=str(tmp_path / "profile"),
        **options,
    )


def test_a_run_leaves_one_trace(tmp_path, caplog):
    assert len(evaluated(tmp_path, 384)) == 1
    assert not caplog.records


def test_a_run_too_short_for_a_trace_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flaxqa.profile"):
        assert evaluated(tmp_path, 100_000) == []
    assert "the run had 1 batches: 0 of the 8 to be traced" in caplog.text


def test_a_batch_run_leaves_one_trace_that_decides_no_answer(tmp_path):
    done = batch.predict(prediction(tmp_path, devices=1, batch_tokens=384))
    assert done.complete
    assert len(traces(tmp_path)) == 1
    again = batch.predict(prediction(tmp_path, dtype="float32"))
    assert again.computed == 0


def test_actors_are_not_traced(tmp_path):
    with pytest.raises(UsageError, match="--profile is for the engine local"):
        batch.predict(prediction(tmp_path, engine="ray"))
    assert not (tmp_path / "out").exists()
