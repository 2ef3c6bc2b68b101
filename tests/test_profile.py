"""Traces of steady batches."""

import logging

from eval import run
from eval.config import EvalConfig


def evaluated(tmp_path, batch_tokens):
    config = EvalConfig(
        model="configs/quickstart/checkpoint",
        data="configs/quickstart/heldout.json",
        output=str(tmp_path / "out"),
        profile=str(tmp_path / "profile"),
        devices=1,
        limit=40,
        batch_tokens=batch_tokens,
    )
    run.evaluate(config)
    return sorted(path.name for path in (tmp_path / "profile").rglob("*.trace.json.gz"))


def test_a_run_leaves_one_trace(tmp_path, caplog):
    assert len(evaluated(tmp_path, 384)) == 1
    assert not caplog.records


def test_a_run_too_short_for_a_trace_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flaxqa.profile"):
        assert evaluated(tmp_path, 100_000) == []
    assert "the run had 1 batches: 0 of the 8 to be traced" in caplog.text
