import json
import sys

import numpy as np
import pytest

from eval import throughput
from eval.throughput import Job


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A measurement of the tiny checkpoint, through the command line."""
    output = tmp_path_factory.mktemp("throughput") / "report.json"
    options = "--size model --questions 6 --rounds 2 --ways tuned"
    arguments = f"{options} --engines flaxqa flaxqa-pmap torch --output {output}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["throughput", *arguments])
        assert throughput.main() == 0
    return json.loads(output.read_text())


def test_a_report_has_every_round_of_every_engine(measured):
    assert [row["engine"] for row in measured["engines"]] == ["flaxqa", "flaxqa-pmap", "torch"]
    assert measured["products_gflops_per_second"] > 0
    assert measured["useful_flops"] > measured["tokens"] > measured["windows"] >= 6
    assert measured["versions"]["torch"] is not None
    for row in measured["engines"]:
        assert len(row["seconds"]) == 2
        assert row["median_seconds"] == pytest.approx(np.mean(row["seconds"]))
        rate = measured["useful_flops"] / row["median_seconds"] / 1e9
        assert row["useful_gflops_per_second"] == pytest.approx(rate)
        assert row["setup_seconds"] > 0
    mine, _, torch = measured["engines"]
    ratios = np.array(torch["seconds"]) / np.array(mine["seconds"])
    assert torch["flaxqa_is_faster_by"] == pytest.approx(np.median(ratios))
    assert mine["flaxqa_is_faster_by"] == 1.0


def test_every_engine_gives_the_same_answers_in_every_round(measured):
    for row in measured["engines"]:
        assert row["same_answers_every_round"]
        assert row["same_answers_as_flaxqa"] == 1.0


def test_the_table_names_every_engine(measured):
    first, host, _, *rows = throughput.table(measured).splitlines()
    assert "6 questions" in first
    assert "The host's work alone: " in host
    assert len(rows) == 2 + 3
    assert all(row.count("|") == 9 for row in rows)
    measured["engines"].append(
        {"engine": "none", "way": "tuned", "dtype": "float32", "absent": "none is not installed"}
    )
    assert "left out: none is not installed" in throughput.table(measured)
    measured["engines"].pop()


def test_the_hosts_work_is_measured_with_nothing_in_the_devices_place(measured):
    mine = measured["engines"][0]
    assert 0 < measured["host_seconds"] < mine["median_seconds"]
    share = measured["host_seconds"] / mine["median_seconds"]
    assert measured["host_share"] == pytest.approx(share)


def test_the_steps_are_drawn_with_what_each_took_off(tmp_path):
    report = {"questions": 10, "size": "base", "machine": {"processor": "Z80", "cpus": 1}}
    report["engines"] = [
        {"step": name, "median_seconds": seconds, "questions_per_second": 10 / seconds}
        for name, seconds in (("as it is", 8.0), ("better", 5.0), ("best", 2.0))
    ] + [{"step": "missing", "absent": "why"}, {"engine": "torch", "median_seconds": 1.0}]
    path = tmp_path / "steps.svg"
    throughput.waterfall(report, path)
    drawing = path.read_text()
    for text in ("as it is", "better", "5.0 s, 2.0 questions/s, 1.60 x", "2.50 x", "Z80, 1 CPUs"):
        assert text in drawing
    assert "missing" not in drawing
    throughput.waterfall(report, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawing


def test_every_step_runs_and_gives_the_same_answers(monkeypatch):
    arguments = ["--steps", "--size", "model", "--questions", "3", "--rounds", "1"]
    report = throughput.measure(throughput.parser().parse_args(arguments), lambda text: None)
    steps = [row["step"] for row in report["engines"]]
    assert steps == [step for step, *_ in throughput.STEPS]
    assert [row["same_answers_as_flaxqa"] for row in report["engines"]] == [1.0] * len(steps)


def test_an_engine_that_cannot_be_set_up_is_told_of():
    job = Job("torch", "tuned", "float32", "./no-such-model", "configs/quickstart/heldout.json", 3)
    said = []
    with throughput.workers([job], said.append) as (one,):
        assert "no-such-model" in one.absent
    assert said[0] == "setting up torch tuned float32"
    assert said[1].startswith("torch tuned float32 is left out: ")
    assert one.worker.process.poll() is not None


def test_an_engine_that_dies_in_a_round_is_told_of():
    job = Job("flaxqa", "as a user calls it", "float32", "configs/quickstart/checkpoint",
              "configs/quickstart/heldout.json", 3)  # fmt: skip
    with throughput.workers([job], lambda text: None) as (one,):
        one.round()
        assert one.absent is None
        one.worker.process.kill()
        one.worker.process.wait()
        one.round()
        assert one.absent == "the process ended"


def test_an_unknown_engine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput", "--engines", "tensorflow", "--size", "model"])
    assert throughput.main() == 2
    assert "engine 'tensorflow' is not one of ['flaxqa'" in capsys.readouterr().err
