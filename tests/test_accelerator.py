"""`make bench-gpu`, on a CPU and a few questions."""

import json

import pytest
from conftest import QUICKSTART

from eval import accelerator


def run(path, **options):
    given = {"limit": 12, "rounds": 2, "dtypes": "float32", "beside": "jax", "output": path}
    return accelerator.main([f"--{name}={value}" for name, value in (given | options).items()])


def test_what_an_accelerator_does_is_recorded(tmp_path, capsys):
    path = tmp_path / "new" / "record.json"
    assert run(path, width=256) == 0
    table = capsys.readouterr().out
    found = json.loads(path.read_text())
    cold, cached, beside = found["parts"].values()
    assert list(found["parts"]) == ["float32, cold", "float32, cached", "float32, beside others"]
    assert "f1" not in cold
    assert cold["compile_seconds"] > cached["compile_seconds"] > 0
    assert len(cold["shapes"]) == 1
    assert cold["shapes"] == cached["shapes"]
    assert cached["questions"] == 12
    assert len(cached["answers_seconds"]) == len(cached["predictor_seconds"]) == 2
    step = cached["step"]
    assert step["share_of_products"] == pytest.approx(
        step["useful_flops_per_second"] / step["product_flops_per_second"]
    )
    assert beside["model"]["config"]["dim"] == 256
    assert beside["backends"][0]["scores"]["f1"]["value"] == pytest.approx(cached["f1"], abs=10)
    assert not beside.keys() & {"disagreements", "groups"}
    assert f"| EM / F1 | {cached['exact_match']:.2f} / {cached['f1']:.2f} |" in table
    assert "| computing, jax, shipped |" in table


def test_what_fails_is_told_and_the_rest_is_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no-such")
    assert run(tmp_path / "record.json") == 2
    assert "reference jax-model/float32 fails" in capsys.readouterr().err
    parts = json.loads((tmp_path / "record.json").read_text())["parts"]
    assert all("no-such" in part["absent"] for part in parts.values())
    assert len(parts) == 2


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert run(tmp_path / "record.json", model=QUICKSTART / "no") == 2
