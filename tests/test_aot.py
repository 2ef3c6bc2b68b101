import json
import sys

import pytest
from conftest import ROOT

from flaxqa.eval import aot

LIMITS = json.loads((ROOT / "benchmarks" / "tpu.json").read_bytes())["programs"]


def of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_limits_are_of_two_shapes_on_every_set_of_chips():
    assert {row["chips"] for row in LIMITS} == set(aot.TOPOLOGIES)
    for chips in aot.TOPOLOGIES:
        for parallel in ("jit", "pmap"):
            rows = of(LIMITS, chips=chips, parallel=parallel, program="logits")
            assert [row["tokens"] for row in rows] == [4_096, 16_384]
            assert {row["attention"] for row in rows} == {"splash"}
            assert len(of(LIMITS, chips=chips, parallel=parallel)) == 4
    (whole,) = of(LIMITS, chips="v5e:2x2", parallel="jit", program="logits", tokens=16_384)
    assert whole["temporary_bytes"] < 300e6


def test_growth_and_new_programs_are_named():
    assert aot.grown(LIMITS, LIMITS) == []
    rows = [dict(row) for row in LIMITS]
    rows[2]["temporary_bytes"] *= 2
    rows[0]["tokens"] = 8_192
    new, more = aot.grown(rows, LIMITS)
    assert "8192" in new
    assert "was not there" in new
    assert "temporary_bytes is" in more


def test_without_the_compiler_it_is_told_what_installs_it(monkeypatch, capsys):
    def missing(topology):
        raise RuntimeError("libtpu.so is missing")

    monkeypatch.setattr(aot, "devices_of", missing)
    monkeypatch.setattr(aot, "base_model", lambda dtype: None)
    monkeypatch.setattr(sys, "argv", ["aot", "v5e:2x2"])
    assert aot.main() == 2
    assert "`make tpu` installs libtpu" in capsys.readouterr().err


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_program_without_splash_attention_compiles_for_tpus(dtype):
    """What runs where splash attention does not, and float32, with its products in full."""
    logits = [
        row for row in aot.compiled(["v5e:2x2"], dtype, "xla")
        if row["program"] == "logits" and row["parallel"] == "jit"
    ]  # fmt: skip
    assert {row["attention"] for row in logits} == {"banded"}
    assert all(row["temporary_bytes"] < 2e9 for row in logits)
