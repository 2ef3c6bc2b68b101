"""`make precision` on a few questions."""

import json

from conftest import QUICKSTART

from flaxqa.eval import precision


def test_fewer_bits_are_measured_in_the_step_of_accelerators(tmp_path, capsys):
    assert precision.main(["--limit", "30", "--output", str(tmp_path / "precision.json")]) == 0
    found = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert [row["step"] for row in found] == list(precision.ROWS)
    assert found[0]["same_answers"] == found[0]["questions"] == 30
    errors = [row["logits_error"] for row in found]
    assert errors[0] == 0
    assert all(1e-4 < error < 0.006 for error in errors[1:3])
    assert errors[1] != errors[2]
    assert errors[3] > 0.006
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


def test_a_checkpoint_that_is_not_there_is_refused(capsys):
    assert precision.main(["--model", str(QUICKSTART / "no")]) == 2
    assert "precision: " in capsys.readouterr().err
