"""What goes to other tools: the schema of metrics.json, trackers, lm-evaluation-harness's files."""

import importlib.util
import json
import struct
import sys
import types
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import QUICKSTART, ROOT

from flaxqa import cli
from flaxqa.errors import UsageError
from flaxqa.eval import api, lm_eval, trackers
from flaxqa.eval.config import EvalConfig

CHECKPOINT = str(QUICKSTART / "checkpoint")
HELDOUT = str(QUICKSTART / "heldout.json")
SCHEMA = json.loads((ROOT / "eval" / "metrics.schema.json").read_text())


def evaluate(output, *options, data=HELDOUT):
    command = ["eval", "--model", CHECKPOINT, "--data", str(data), "--output", str(output)]
    assert cli.run([*command, "--limit", "40", *options]) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An evaluation of SQuAD v1.1 and one of 2.0."""
    folder = tmp_path_factory.mktemp("runs")
    evaluate(folder / "v1", "--precision", "0.9")
    data = json.loads(Path(HELDOUT).read_text())
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for place, question in enumerate(paragraph["qas"]):
                question["is_impossible"] = place % 3 == 0
                if question["is_impossible"]:
                    question["answers"] = []
    (folder / "v2.json").write_text(json.dumps({**data, "version": "v2.0"}))
    evaluate(folder / "v2", "--precision", "1", data=folder / "v2.json")
    return folder


# --- metrics.json ---


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_metrics_have_their_schema(done, name):
    metrics = json.loads((done / name / "metrics.json").read_text())
    jsonschema.validate(metrics, SCHEMA)
    assert next(iter(metrics)) == "schema_version"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(metrics | {"another": 1}, SCHEMA)
    assert ("no_answer" in metrics["calibration"]) == (name == "v2")


def described(schema, found=()):
    """Every field, and its text."""
    found = dict(found)
    for name, one in schema.get("properties", {}).items():
        found[name] = one["description"]
        for inner in (one, one.get("items"), one.get("additionalProperties")):
            if isinstance(inner, dict):
                found |= described(inner)
    return found


def test_every_field_is_in_the_documentation():
    text = (ROOT / "docs" / "metrics.md").read_text()
    fields = described(SCHEMA)
    assert len(fields) > 60
    for name, meaning in fields.items():
        assert name in text
        assert meaning in text


def test_sqaud_2_has_intervals_of_its_best_thresholds(done):
    metrics = json.loads((done / "v2" / "metrics.json").read_text())
    for name in ("best_exact", "best_f1"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high
        low, high = metrics[f"{name}_thresh_interval"]
        assert low <= metrics[f"{name}_thresh"] <= high


# --- trackers ---


def scalars(folder):
    """{tag: value} of a TensorBoard event file, records and messages read by hand."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in folder.glob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            found |= {one.tag: (event.step, one.simple_value) for one in event.summary.value}
            at += 16 + length
    return found


def test_tensorboard_has_every_number(tmp_path, capsys):
    metrics = evaluate(tmp_path / "run", "--log", "tensorboard")
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["f1"] == (0, pytest.approx(metrics["f1"]))
    assert found["calibration/ece"] == (0, pytest.approx(metrics["calibration"]["ece"]))
    assert "flaxqa: logged; tensorboard --logdir" in capsys.readouterr().err


def test_numbers_are_flat_and_no_lists_or_flags():
    content = {"a": 1, "b": {"c": 2.5, "d": [1], "e": {"f": 3}}, "g": True, "h": None, "i": "x"}
    assert trackers.numbers(content) == {"a": 1, "b/c": 2.5, "b/e/f": 3}


class Recorder(types.ModuleType):
    """A package that notes what is called of it."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.summary = self  # of a run of wandb

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments, **options):
            self.calls.append((name, arguments, options))
            return None if name == "get_experiment_by_name" else self

        return called

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def of(self, name):
        return [(arguments, options) for each, arguments, options in self.calls if each == name]


@pytest.fixture
def recorders(monkeypatch):
    made = {name: Recorder(name) for name in ("mlflow", "wandb", "trackio")}
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return made


RESULTS = {"config": {"limit": 5}, "metrics": {"f1": 50.0}, "files": ("metrics.json", "none.json")}


def told(tmp_path, **more):
    (tmp_path / "metrics.json").write_text("{}")
    return lambda: trackers.Results(tmp_path, **RESULTS, **more)


def options(*names):
    return EvalConfig(model="m", data="d", output="o", log=names)


def test_trackers_are_told_offline(recorders, tmp_path):
    curves = [(3, {"train/loss": 1.5})]
    trackers.log(options("mlflow", "wandb", "trackio"), told(tmp_path, curves=curves))
    mlflow, wandb, trackio = recorders.values()
    assert mlflow.of("set_tracking_uri") == [((f"sqlite:///{tmp_path}/mlflow.db",), {})]
    assert mlflow.of("create_experiment")[0][1] == {
        "artifact_location": (tmp_path / "mlartifacts").as_uri()}  # fmt: skip
    assert mlflow.of("log_params") == [(({"limit": "5"},), {})]
    assert mlflow.of("log_metrics") == [(({"train/loss": 1.5},), {"step": 3}),
                                        (({"f1": 50.0},), {"step": None})]  # fmt: skip
    assert mlflow.of("log_artifact") == [((str(tmp_path / "metrics.json"),), {})]
    ((_, given),) = wandb.of("init")
    assert given["mode"] == "offline"
    assert given["dir"] == str(tmp_path)
    assert given["config"] == {"limit": 5}
    assert wandb.of("log") == [(({"train/loss": 1.5},), {"step": 3})]
    assert wandb.of("update") == [(({"f1": 50.0},), {})]
    assert wandb.of("add_file") == [((str(tmp_path / "metrics.json"),), {})]
    assert len(wandb.of("finish")) == len(trackio.of("finish")) == 1
    assert trackio.of("log")[-1] == (({"f1": 50.0},), {"step": None})


def test_their_own_variables_win(recorders, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trackers.log(options("mlflow", "wandb"), told(tmp_path))
    assert recorders["mlflow"].of("set_tracking_uri") == [(("http://127.0.0.1:1",), {})]
    assert recorders["mlflow"].of("create_experiment")[0][1] == {"artifact_location": None}
    assert recorders["wandb"].of("init")[0][1]["mode"] == "disabled"


def test_a_tracker_that_fails_costs_no_result(recorders, tmp_path, capsys, monkeypatch):
    def fails(*arguments, **given):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(recorders["wandb"], "init", fails, raising=False)
    evaluate(tmp_path / "run", "--log", "wandb", "trackio")
    said = capsys.readouterr().err
    assert "wandb could not log the run, whose results are written: ConnectionError: nobody" in said
    assert (tmp_path / "run" / "run.json").exists()
    assert recorders["trackio"].of("init")


def test_what_is_not_installed_is_told_of_first(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--log mlflow needs mlflow.*'flaxqa\[mlflow\]'"):
        evaluate(tmp_path / "run", "--log", "mlflow")
    assert not (tmp_path / "run").exists()


def test_logs_need_a_directory_here(recorders):
    with pytest.raises(UsageError, match="must be a directory here, not s3://bucket/x"):
        trackers.check(options("wandb"), "s3://bucket/x")
    trackers.check(options(), "s3://bucket/x")
    with pytest.raises(UsageError, match="give an output"):
        api.evaluate(CHECKPOINT, HELDOUT, log=("wandb",))


def test_what_is_logged_decides_no_answer(tmp_path, recorders):
    command = ["--log", "trackio"]
    first = evaluate(tmp_path / "run")
    second = evaluate(tmp_path / "other", *command)
    assert first["f1"] == second["f1"]
    from flaxqa.eval.run import run_key

    content = json.loads((tmp_path / "run" / "run.json").read_text())
    logged = {**content, "config": {**content["config"], "log": ["trackio"]}}
    assert run_key(content) == run_key(logged)


def test_a_training_tells_its_curves(tmp_path):
    command = ["finetune", "--model", CHECKPOINT, "--data", HELDOUT, "--limit", "24", "--epochs",
               "1", "--output", str(tmp_path / "out"), "--log", "tensorboard"]  # fmt: skip
    assert cli.run(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    found = scalars(tmp_path / "out" / "tensorboard")
    assert found["train/loss"] == (lines[-1]["step"], pytest.approx(lines[-1]["loss"]))
    assert "epoch/loss" in found


def test_a_comparison_tells_of_each_backend():
    content = {"backends": [{"name": "jax/float32", "scores": {"f1": {"value": 5.0}}},
                            {"name": "torch/float32", "absent": "it is not there"}]}  # fmt: skip
    assert trackers.of_backends(content) == {"jax/float32/scores/f1/value": 5.0}


# --- lm-evaluation-harness ---


def test_results_are_written_as_the_harness_does(done, tmp_path):
    command = ["report", str(done / "v1"), str(done / "v2"), "--format", "lm-eval"]
    assert cli.run([*command, "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert not set(folder.name) & set('/\\:*?"<>|')
    names = sorted(path.name for path in folder.iterdir())
    assert [name.rpartition("_")[0] for name in names if name.startswith("samples")] == [
        "samples_flaxqa_squad_v1.1", "samples_flaxqa_squad_v2.0"]  # fmt: skip
    for run, task in (("v1", "flaxqa_squad_v1.1"), ("v2", "flaxqa_squad_v2.0")):
        metrics = json.loads((done / run / "metrics.json").read_text())
        (samples,) = folder.glob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        date = samples.stem.removeprefix(f"samples_{task}_")
        content = json.loads((folder / f"results_{date}.json").read_text())
        scores = content["results"][task]
        own = np.array([one["f1"] for one in lines])
        assert scores["f1,none"] == pytest.approx(metrics["f1"] / 100) == pytest.approx(own.mean())
        assert scores["f1_stderr,none"] == pytest.approx(own.std(ddof=1) / 40**0.5)
        assert scores["exact_match,none"] == pytest.approx(metrics["exact_match"] / 100)
        assert content["n-samples"][task] == {"original": 559, "effective": 40}
        for name in ("configs", "versions", "n-shot", "higher_is_better", "group_subtasks"):
            assert list(content[name]) == [task]
        said = json.loads((done / run / "predictions.json").read_text())
        for line in lines:
            assert line["filtered_resps"] == [said[line["doc"]["id"]]] == line["resps"][0]
            assert json.loads(line["target"]) == line["doc"]["answers"]["text"]
            assert line["doc"]["context"] in line["arguments"]["gen_args_0"]["arg_0"]


def test_runs_of_the_same_second_do_not_replace_each_other(done, tmp_path):
    command = ["report", str(done / "v1"), str(done / "v1"), "--format", "lm-eval"]
    assert cli.run([*command, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("results_*.json"))) == 2
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a/b", "a__b"), ("/x/y", "__x__y"), ("..", "model"), ("../..", "..__.."), (".", "model"),
     ('a:b*"c', "a__b__c")],
)  # fmt: skip
def test_a_model_is_a_folder_below_the_one_named(name, folder):
    assert lm_eval.sanitized(name) == folder


def test_the_format_needs_a_folder(done):
    with pytest.raises(UsageError, match="lm-eval needs a folder"):
        cli.run(["report", str(done / "v1"), "--format", "lm-eval"])
