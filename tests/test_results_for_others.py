"""What goes to other tools: the schema of metrics.json, trackers, lm-evaluation-harness's files."""

import datetime
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import QUICKSTART, ROOT

from flaxqa import cli
from flaxqa.errors import UsageError
from flaxqa.eval import api, compare, finetune, lm_eval, run, runs, trackers
from flaxqa.eval.config import BenchConfig, CompareConfig, EvalConfig, FinetuneConfig

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
                question["question"] += " Ça va ?"  # in no encoding by accident
                if question["is_impossible"]:
                    question["answers"] = []
    (folder / "v2.json").write_text(json.dumps({**data, "version": "v2.0"}))
    carbon = ("--carbon", "--grid", "50")
    evaluate(folder / "v2", "--precision", "1", *carbon, data=folder / "v2.json")
    return folder


# --- metrics.json ---


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_metrics_have_their_schema(done, name):
    metrics = json.loads((done / name / "metrics.json").read_text())
    jsonschema.validate(metrics, SCHEMA)
    assert next(iter(metrics)) == "schema_version"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(metrics | {"another": 1}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: metrics[key] for key in metrics if key != "f1"}, SCHEMA)
    assert ("no_answer" in metrics["calibration"]) == ("carbon" in metrics) == (name == "v2")


def rows_of(schema, before=""):
    """A row of the documentation for each field: its path, unit or type, and meaning."""
    rows = []
    for name, one in schema.get("properties", {}).items():
        path = before + name
        kind = SCHEMA["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
        types = kind.get("type", "integer")
        unit = kind.get("unit") or (types if isinstance(types, str) else " or ".join(types))
        rows += [f"| `{path}` | {unit} | {one['description']} |", *rows_of(one, path + ".")]
        rows += rows_of(one.get("items", {}), path + "[].")
        if isinstance(kinds := one.get("additionalProperties"), dict):
            rows += rows_of(kinds, path + ".KIND.")
    return rows


def test_the_documentation_has_every_field_as_the_schema_has_it():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows_of(SCHEMA)
    assert f"This is\nversion {run.SCHEMA_VERSION} of its schema" in text
    assert SCHEMA["properties"]["schema_version"]["const"] == run.SCHEMA_VERSION


def test_results_from_before_the_schema_are_still_read(done, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(done / "v1", old)
    metrics = json.loads((old / "metrics.json").read_text())
    del metrics["schema_version"]
    (old / "metrics.json").write_text(json.dumps(metrics))
    assert runs.evaluation(old).content == metrics
    for command in ("report", "card"):
        page = tmp_path / command
        assert cli.run([command, str(old), "--output", str(page)]) == 0
        assert f"{metrics['f1']:.2f}" in page.read_text()


def test_squad_2_has_intervals_of_its_best_thresholds(done):
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


def test_tensorboard_shows_one_run(tmp_path):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    for name in ("events.out.tfevents.1.here.flaxqa", "events.out.tfevents.2.here"):
        (folder / name).write_bytes(b"")
    trackers.log(options("tensorboard"), told(tmp_path))
    assert not (folder / "events.out.tfevents.1.here.flaxqa").exists()
    assert (folder / "events.out.tfevents.2.here").exists()  # of another program
    assert scalars(folder) == {"config/text_summary": (0, 0.0), "f1": (0, 50.0)}


def test_numbers_are_flat_and_no_lists_or_flags():
    content = {"a": 1, "b": {"c": 2.5, "d": [1], "e": {"f": 3}}, "g": True, "h": None, "i": "x"}
    assert trackers.numbers(content) == {"a": 1, "b/c": 2.5, "b/e/f": 3}


class Recorder(types.ModuleType):
    """A package that notes what is called of it."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.summary = self.info = self  # of a run of wandb, of MLflow
        self.run_id, self.dir = "run", "offline-run/files"

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
    entities = types.ModuleType("mlflow.entities")
    entities.Metric = entities.Param = lambda *arguments: arguments
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    without(monkeypatch)
    return made


def without(monkeypatch):
    """Nothing is said by the trackers' own variables, neither before the test nor after it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY",
                 "WANDB_MODE", "WANDB_PROJECT", "WANDB_ERROR_REPORTING"):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


RESULTS = {"config": {"limit": 5}, "metrics": {"f1": 50.0}, "files": ("metrics.json", "none.json")}


def told(tmp_path, **more):
    (tmp_path / "metrics.json").write_text("{}")
    return lambda: trackers.Results(tmp_path, **RESULTS, **more)


def options(*names):
    return EvalConfig(model="m", data="d", output="o", log=names)


def test_trackers_are_told_offline(recorders, tmp_path, capsys):
    curves = [(3, {"train/loss": 1.5})]
    trackers.log(options("mlflow", "wandb", "trackio"), told(tmp_path, curves=curves))
    mlflow, wandb, trackio = recorders.values()
    assert mlflow.of("MlflowClient") == [((f"sqlite:///{tmp_path}/mlflow.db",), {})]
    assert mlflow.of("create_experiment") == [
        (("flaxqa",), {"artifact_location": (tmp_path / "mlartifacts").as_uri()})]  # fmt: skip
    assert mlflow.of("create_run")[0][1] == {"run_name": tmp_path.name}
    params, metrics = (given for _, given in mlflow.of("log_batch"))
    assert params == {"params": [("limit", "5")]}
    assert [(key, value, step) for key, value, _, step in metrics["metrics"]] == [
        ("train/loss", 1.5, 3), ("f1", 50.0, 0)]  # fmt: skip
    assert mlflow.of("log_artifact") == [(("run", str(tmp_path / "metrics.json")), {})]
    assert mlflow.of("set_terminated") == [(("run",), {})]
    ((_, given),) = wandb.of("init")
    assert given["mode"] == "offline"
    assert given["dir"] == str(tmp_path)
    assert given["config"] == {"limit": 5}
    assert wandb.of("log") == [(({"train/loss": 1.5},), {"step": 3})]
    assert wandb.of("update") == [(({"f1": 50.0},), {})]
    assert wandb.of("add_file") == [((str(tmp_path / "metrics.json"),), {})]
    assert given["reinit"] == "create_new"
    assert len(wandb.of("finish")) == len(trackio.of("finish")) == 1
    assert trackio.of("log")[-1] == (({"f1": 50.0},), {"step": None})
    # What they would send to their makers all the same.
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    said = capsys.readouterr().err
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db\n" in said
    assert "wandb sync offline-run\n" in said


def test_their_own_variables_win(recorders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    trackers.log(options("mlflow", "wandb"), told(tmp_path))
    mlflow, wandb = recorders["mlflow"], recorders["wandb"]
    assert mlflow.of("MlflowClient") == [(("http://me:secret@127.0.0.1:1",), {})]
    assert mlflow.of("create_experiment") == [(("ours",), {"artifact_location": None})]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
    ((_, given),) = wandb.of("init")
    assert (given["mode"], given["project"]) == ("disabled", "theirs")
    assert "WANDB_ERROR_REPORTING" not in os.environ
    assert "secret" not in capsys.readouterr().err


def test_mlflow_takes_a_thousand_numbers_at_once(recorders, tmp_path):
    curves = [(step, {"train/loss": 1.0, "train/seconds": 1.0}) for step in range(700)]
    trackers.log(options("mlflow"), told(tmp_path, curves=curves))
    sizes = [len(given.get("metrics", ())) for _, given in recorders["mlflow"].of("log_batch")]
    assert sizes == [0, 1000, 401]


# --- the trackers themselves, where they are installed ---


def twice(folder, name):
    """Two runs are logged by one process; gives where they are and how to look at them."""
    outputs = [folder / "first", folder / "second"]
    for place, output in enumerate(outputs):
        output.mkdir(exist_ok=True)
        (output / "metrics.json").write_text(f'{{"f1": {place}}}')
        curves = [(1, {"train/loss": 3.5}), (2, {"train/loss": 2.5, "epoch/f1": 40.0})]
        trackers.TRACKERS[name].log(trackers.Results(
            output, {"limit": 5, "model": None}, {"f1": float(place), "mistakes/other/share": 0.5},
            curves, ("metrics.json",),
        ))  # fmt: skip
    return outputs


@pytest.mark.filterwarnings("default")
def test_mlflow_itself_reads_what_it_was_told(tmp_path, monkeypatch):
    without(monkeypatch)
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    (tmp_path / "first").mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/first/mlflow.db")
    with mlflow.start_run() as mine:
        os.environ.pop("MLFLOW_TRACKING_URI")  # which MLflow has set
        outputs = twice(tmp_path, "mlflow")
        assert mlflow.active_run().info.run_id == mine.info.run_id
    for place, output in enumerate(outputs):
        client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
        number = client.get_experiment_by_name("flaxqa").experiment_id
        (run,) = client.search_runs([number])
        assert (run.info.run_name, run.info.status) == (output.name, "FINISHED")
        assert run.data.params == {"limit": "5", "model": "None"}
        assert run.data.metrics == {"train/loss": 2.5, "epoch/f1": 40.0, "f1": place,
                                    "mistakes/other/share": 0.5}  # fmt: skip
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(one.step, one.value) for one in history] == [(1, 3.5), (2, 2.5)]
        kept = client.download_artifacts(run.info.run_id, "metrics.json")
        assert json.loads(Path(kept).read_text()) == {"f1": place}
    mlflow.set_tracking_uri(before)


@pytest.mark.filterwarnings("default")
def test_wandb_itself_keeps_runs_offline(tmp_path, monkeypatch):
    without(monkeypatch)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = pytest.importorskip("wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("a folder is called wandb")
    mine = wandb.init(mode="offline", project="mine", dir=str(tmp_path))
    outputs = twice(tmp_path, "wandb")
    assert wandb.run is mine
    mine.finish()
    for output in outputs:
        (log,) = output.glob("wandb/offline-run-*/*.wandb")
        content = log.read_bytes()
        for told in (b"train/loss", b"epoch/f1", b"mistakes/other/share", b"metrics.json"):
            assert told in content
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.filterwarnings("default")
def test_trackio_itself_reads_what_it_was_told(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    script = f"""
import json, pathlib, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import trackio
from test_results_for_others import twice
mine = trackio.init(project="mine", name="mine")
twice(pathlib.Path({str(tmp_path)!r}), "trackio")
trackio.log({{"x": 1}})
trackio.finish()
from trackio.sqlite_storage import SQLiteStorage as kept
found = {{name: kept.get_logs(project, name) for project, name in
         (("mine", "mine"), ("flaxqa", "first"), ("flaxqa", "second"))}}
print(json.dumps([found, kept.get_run_config("flaxqa", "second")]))
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when imported
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, config = json.loads(done.stdout.splitlines()[-1])
    assert [one["x"] for one in found["mine"]] == [1]
    assert [one.get("train/loss") for one in found["first"]] == [3.5, 2.5, None]
    assert found["second"][-1]["f1"] == 1
    assert config["limit"] == 5


def test_a_tracker_that_fails_costs_no_result(recorders, tmp_path, capsys, monkeypatch):
    def fails(*arguments, **given):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(recorders["wandb"], "init", fails, raising=False)
    monkeypatch.setattr(recorders["trackio"], "finish", lambda: print("a word"), raising=False)
    evaluate(tmp_path / "run", "--log", "wandb", "trackio")
    printed, said = capsys.readouterr()
    assert json.loads(printed)["total"] == 40  # metrics alone
    assert "a word" in said
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
    for wrong in ("wandb", ("wandb", "another")):
        with pytest.raises(UsageError, match="log is .*must be any of tensorboard, mlflow, wandb"):
            api.evaluate(CHECKPOINT, HELDOUT, output="never", log=wrong)
    with pytest.raises(UsageError, match="give an output"):
        api.evaluate(CHECKPOINT, HELDOUT, log=("wandb",))


def test_what_is_logged_decides_no_answer(tmp_path, recorders):
    command = ["--log", "trackio"]
    first = evaluate(tmp_path / "run")
    second = evaluate(tmp_path / "other", *command)
    assert first["f1"] == second["f1"]
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    logged = {**content, "config": {**content["config"], "log": ["trackio"]}}
    assert run.run_key(content) == run.run_key(logged)


def test_a_training_tells_its_curves(tmp_path):
    command = ["finetune", "--model", CHECKPOINT, "--data", HELDOUT, "--limit", "24", "--epochs",
               "1", "--output", str(tmp_path / "out"), "--log", "tensorboard"]  # fmt: skip
    assert cli.run(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    found = scalars(tmp_path / "out" / "tensorboard")
    assert found["train/loss"] == (lines[-1]["step"], pytest.approx(lines[-1]["loss"]))
    assert "epoch/loss" in found
    assert "train/step" not in found
    assert "epoch/step" not in found
    assert cli.run(command[:-2]) == 0  # the same run, which is complete


def test_a_comparison_tells_of_each_backend():
    content = {"backends": [{"name": "jax/float32", "scores": {"f1": {"value": 5.0}}},
                            {"name": "torch/float32", "absent": "it is not there"}]}  # fmt: skip
    assert trackers.of_backends(content) == {"jax/float32/scores/f1/value": 5.0}


@pytest.mark.parametrize("kind", [BenchConfig, CompareConfig])
def test_comparisons_tell_when_they_are_written(recorders, tmp_path, monkeypatch, kind):
    config = kind(model="m", data="d", output=str(tmp_path), log=("mlflow", "mlflow"))

    def compared(*arguments):
        (tmp_path / "comparison.json").write_text("{}")
        return {"backends": [{"name": "jax/float32", "p50": 1.5}]}

    monkeypatch.setattr(compare, "compared", compared)
    compare.compare(config)
    mlflow = recorders["mlflow"]
    params, metrics = (given for _, given in mlflow.of("log_batch"))  # once, asked for twice
    assert ("min_seconds", "5.0") in params["params"]
    assert [one[:2] for one in metrics["metrics"]] == [("jax/float32/p50", 1.5)]
    assert mlflow.of("log_artifact") == [(("run", str(tmp_path / "comparison.json")), {})]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compare, "compared", None)
    with pytest.raises(UsageError, match="--log mlflow needs mlflow"):
        compare.compare(config)


def test_a_training_asks_for_trackers_first(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = FinetuneConfig(model="m", data="d", output=str(tmp_path / "out"), log=("wandb",))
    with pytest.raises(UsageError, match="--log wandb needs wandb"):
        finetune.finetune(config)
    assert not (tmp_path / "out").exists()


def test_what_is_large_stays_behind(recorders, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "LARGEST", 1)  # metrics.json has two bytes
    trackers.log(options("mlflow"), told(tmp_path))
    assert not recorders["mlflow"].of("log_artifact")


# --- lm-evaluation-harness ---


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_results_are_written_as_the_harness_does(done, tmp_path):
    command = ["report", str(done / "v1"), str(done / "v2"), "--format", "lm-eval"]
    assert cli.run([*command, "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert not set(folder.name) & set('/\\:*?"<>|')
    names = sorted(path.name for path in folder.iterdir())
    assert [name.rpartition("_")[0] for name in names if name.startswith("samples")] == [
        "samples_flaxqa_squad_v1.1", "samples_flaxqa_squad_v2.0"]  # fmt: skip
    for name, task in (("v1", "flaxqa_squad_v1.1"), ("v2", "flaxqa_squad_v2.0")):
        metrics = json.loads((done / name / "metrics.json").read_text())
        (samples,) = folder.glob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        date = samples.stem.removeprefix(f"samples_{task}_")
        content = json.loads((folder / f"results_{date}.json").read_text())
        scores = content["results"][task]
        own = np.array([one["f1"] for one in lines])
        assert scores["f1,none"] == pytest.approx(metrics["f1"] / 100) == pytest.approx(own.mean())
        assert scores["f1_stderr,none"] == pytest.approx(own.std(ddof=1) / 40**0.5)
        assert scores["exact_match,none"] == pytest.approx(metrics["exact_match"] / 100)
        assert (scores["name"], scores["sample_len"]) == (task, 40)
        assert content["n-samples"][task] == {"original": 559, "effective": 40}
        for field in ("configs", "versions", "n-shot", "higher_is_better"):
            assert list(content[field]) == [task]
        about = json.loads((done / name / "run.json").read_text())
        began = datetime.datetime.fromtimestamp(content["date"], datetime.UTC)
        assert began == datetime.datetime.fromisoformat(about["started"])
        assert date == began.strftime("%Y-%m-%dT%H-%M-%S")
        took = datetime.datetime.fromisoformat(about["finished"]) - began
        assert float(content["total_evaluation_time_seconds"]) == took.total_seconds()
        assert content["config"]["model_args"] == f"pretrained={CHECKPOINT},dtype=float32"
        hashes = ""
        said = json.loads((done / name / "predictions.json").read_text())
        for line in lines:
            assert line["filtered_resps"] == [said[line["doc"]["id"]]] == line["resps"][0]
            assert json.loads(line["target"]) == line["doc"]["answers"]["text"]
            (asked,) = line["arguments"]["gen_args_0"].values()
            assert asked == f"{line['doc']['context']}\n\n{line['doc']['question']}"
            assert line["metrics"] == ["exact_match", "f1"]
            doc = json.dumps(line["doc"], indent=2, ensure_ascii=False)
            own = [sha256(text) for text in (doc, asked, line["target"])]
            assert own == [line[f"{name}_hash"] for name in ("doc", "prompt", "target")]
            hashes += "".join(own)
        assert content["task_hashes"] == {task: sha256(hashes)}


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
