"""Every command in a folder full of files that are called as modules: none of them is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICKSTART

MODEL, DATA = QUICKSTART / "checkpoint", QUICKSTART / "heldout.json"
DECOYS = ("eval", "json", "flaxqa", "numpy", "jax", "torch", "onnx", "jinja2", "configs", "typing")
SUBJECT = ["--model", MODEL, "--data", DATA, "--limit", "6"]
COMMANDS = [
    ["--version"],
    ["info"],
    ["ask", "--model", MODEL, "--question", "What is it?", "--context", "It is salt."],
    ["predict", DATA, "--model", MODEL, "--output", "answers"],
    ["eval", *SUBJECT, "--output", "out"],
    ["score", DATA, "out/predictions.json", "--only-predicted"],
    ["compare", *SUBJECT, "--output", "compared", "--backends", "jax", "onnxruntime", "mine:Mine",
     "--rounds", "1", "--min-seconds", "0.1", "--min-queries", "6", "--no-sweep",
     "--scenarios", "offline"],
    ["report", "out", "compared", "--output", "page.html"],
    ["export", "--model", MODEL, "--format", "stablehlo", "--output", "model.stablehlo"],
]  # fmt: skip
MINE = """
from flaxqa.eval.backends import Jax


class Mine(Jax):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoys")
    for name in DECOYS:
        (path / f"{name}.py").write_text(
            f"open({str(path / 'run')!r}, 'a').write({name!r})\nraise SystemExit(99)\n"
        )
    (path / "mine.py").write_text(MINE)
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_runs_nothing_that_lies_in_its_folder(folder, command):
    script = Path(sys.executable).with_name("flaxqa")
    if not script.exists():
        pytest.skip("flaxqa is not installed as a command here")
    done = subprocess.run(
        [script, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    log = folder / "compared" / "workers.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    assert not (folder / "run").exists(), (folder / "run").read_text()
    if command[0] == "compare":
        rows = json.loads(done.stdout)["backends"]
        assert [row.get("verdict") for row in rows] == ["VALID"] * 3
