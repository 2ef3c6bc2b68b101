import dataclasses
import itertools
import json
import math
import os

import numpy as np
import pyarrow.parquet
import pytest
from conftest import QUICKSTART, SHARED

from flaxqa import answers, checkpoint, predict, reader
from flaxqa.config import read_toml
from flaxqa.errors import DataError, ModelRejected, TryAgain, UsageError
from flaxqa.eval import questions as dataset
from flaxqa.eval import run, squad
from flaxqa.eval.config import EvalConfig
from flaxqa.spans import Logits

FILES = {
    "predictions.json",
    "nbest_predictions.json",
    "per_example.parquet",
    "metrics.json",
    "run.json",
}


def quickstart(output, **changes):
    values = {
        "model": str(QUICKSTART / "checkpoint"),
        "data": str(QUICKSTART / "heldout.json"),
        "output": str(output),
        "devices": 1,
        "limit": 40,
    }
    return EvalConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "out"
    return run.evaluate(quickstart(output)), output


def read(output, name):
    return json.loads((output / name).read_text())


def test_every_file_is_written_and_nothing_else(done):
    assert {path.name for path in done[1].iterdir()} == FILES


def test_metrics_hold_what_is_promised(done):
    metrics, output = done
    assert json.loads(json.dumps(metrics)) == read(output, "metrics.json")
    assert metrics["total"] == 40
    assert metrics["set_aside"] == 0
    for name in ("exact_match", "f1"):
        low, high = metrics[f"{name}_interval"]
        assert 0 <= low <= metrics[name] <= high <= 100
    for name in ("tokenize", "device", "decode", "score", "compile"):
        assert metrics[f"{name}_seconds"] > 0
    seconds = metrics["seconds"]
    assert seconds >= metrics["device_seconds"] + metrics["decode_seconds"]
    for unit, count in (("questions", 40), ("windows", metrics["n_windows"]),
                        ("tokens", metrics["n_tokens"])):  # fmt: skip
        assert metrics[f"{unit}_per_second"] == pytest.approx(count / seconds)


def test_run_json_holds_what_redoes_the_run(done):
    content = read(done[1], "run.json")
    assert content["config"].pop("log") == []
    assert EvalConfig(**content["config"]) == quickstart(done[1])
    assert set(content["model"]["sha256"]) == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    }  # fmt: skip
    assert len(content["data"]["sha256"]) == 64
    assert content["data"]["questions"] > 400
    assert content["config"]["matmul_precision"] == "float32"
    assert content["platform"]["devices"] == 1
    assert content["shapes"]
    assert content["versions"]["jax"]


def test_predictions_and_nbest_are_pieces_of_their_contexts(done):
    questions = dataset.read(QUICKSTART / "heldout.json").questions[:40]
    predictions, nbest = read(done[1], "predictions.json"), read(done[1], "nbest_predictions.json")
    assert list(predictions) == list(nbest) == [question.id for question in questions]
    for question in questions:
        found = nbest[question.id]
        assert found[0]["text"] == predictions[question.id]
        assert 1 <= len(found) <= 20
        assert sum(one["probability"] for one in found) == pytest.approx(1)
        sums = [one["start_logit"] + one["end_logit"] for one in found]
        assert sums == sorted(sums, reverse=True)
        for one in found:
            assert question.context[one["start"] : one["end"]] == one["text"]


def test_per_example_rows_add_up_to_the_scores(done):
    metrics, output = done
    rows = pyarrow.parquet.read_table(output / "per_example.parquet").to_pylist()
    assert len(rows) == 40
    assert 100 * np.mean([row["f1"] for row in rows]) == pytest.approx(metrics["f1"])
    assert 100 * np.mean([row["exact_match"] for row in rows]) == metrics["exact_match"]
    assert sum(row["n_windows"] for row in rows) == metrics["n_windows"]
    assert rows[0]["prediction"] == read(output, "predictions.json")[rows[0]["id"]]


def test_the_same_run_writes_the_same_bytes(done, tmp_path):
    run.evaluate(quickstart(tmp_path / "again"))
    for name in ("predictions.json", "nbest_predictions.json", "per_example.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (done[1] / name).read_bytes()


@pytest.mark.parametrize("changes", [{"devices": 8}, {"parallel": "pmap", "devices": 2}])
def test_the_answers_do_not_depend_on_how_they_are_computed(done, tmp_path, changes):
    metrics = run.evaluate(quickstart(tmp_path, **changes))
    assert metrics["exact_match"] == done[0]["exact_match"]
    assert read(tmp_path, "predictions.json") == read(done[1], "predictions.json")


# --------------------------------------------------------------------------------------- bad rows


def squad_file(tmp_path, *rows):
    paragraphs = [
        {
            "context": context,
            "qas": [{"id": str(i), "question": question, "answers": [{"text": "Bob"}]}],
        }
        for i, (question, context) in enumerate(rows)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    return str(path)


def test_rows_that_cannot_be_asked_are_set_aside_and_score_zero(tmp_path):
    good = ("Who is the mayor of Berton?", "The mayor of Berton is Bob.")
    data = squad_file(
        tmp_path, good, ("", "a b"), ("Who?", "\ud800 Bob"), ("Who?", " "), good,
        (" ".join(["who"] * 500), "The mayor of Berton is Bob."),
    )  # fmt: skip
    metrics = run.evaluate(quickstart(tmp_path / "out", data=data))
    assert metrics["total"] == 6
    assert metrics["set_aside"] == 3
    assert metrics["questions_cut"] == 1
    errors = [
        json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    ]
    assert [error["id"] for error in errors] == ["1", "2", "3"]
    assert "surrogate" in errors[1]["reason"]
    assert set(read(tmp_path / "out", "predictions.json")) == {"0", "4", "5"}
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "per_example.parquet").to_pylist()
    assert [row["f1"] for row in rows][1:4] == [0, 0, 0]
    assert rows[1]["error"] == "the question is empty"
    assert rows[0]["prediction"] == rows[4]["prediction"]
    # A later run without such rows takes the file of the earlier one away.
    run.evaluate(quickstart(tmp_path / "out", data=squad_file(tmp_path, good)))
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_nothing_that_can_be_asked_is_no_crash(tmp_path):
    metrics = run.evaluate(quickstart(tmp_path / "out", data=squad_file(tmp_path, ("", "x"))))
    assert (metrics["total"], metrics["set_aside"], metrics["f1"]) == (1, 1, 0.0)


def test_a_row_whose_logits_are_not_finite_is_set_aside(tmp_path, monkeypatch):
    whole = predict.Predictor.stream

    def spoilt(self, chunks, progress, rule):
        for scores in whole(self, chunks, progress, rule):
            logits = list(scores)
            logits[3] = Logits(logits[3].start * np.nan, logits[3].end)
            yield logits

    monkeypatch.setattr(predict.Predictor, "stream", spoilt)
    metrics = run.evaluate(quickstart(tmp_path))
    assert metrics["set_aside"] == 1
    assert "not finite" in (tmp_path / "errors.jsonl").read_text()
    assert metrics["total"] == 40


def test_a_context_of_a_megabyte_is_answered(tmp_path):
    # Words of 150 letters, a token each, so that the megabyte is not an hour of computing.
    context = f"It is a {'x' * 150}. " * 3_000 + "The mayor of Berton is Bob Adsen."
    context += f" It is {'y' * 150}." * 3_000
    data = squad_file(tmp_path, ("Who is the mayor of Berton?", context))
    metrics = run.evaluate(quickstart(tmp_path / "out", data=data))
    assert len(context) > 900_000
    assert metrics["n_windows"] > 100
    (found,) = read(tmp_path / "out", "nbest_predictions.json").values()
    assert context[found[0]["start"] : found[0]["end"]] == found[0]["text"]


# ------------------------------------------------------------------------------- stop and go on


class Stopped(Exception):
    pass


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reader, "RECORDS_PER_CHUNK", 7)


def stop_after(monkeypatch, chunks):
    rule, calls = answers.DECODERS["squad"], []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) > chunks:
            raise Stopped
        return rule.decode(*args, **options)

    monkeypatch.setitem(answers.DECODERS, "squad", rule._replace(decode=stopping))
    return calls


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_stopped_run_goes_on_where_it_was(small_chunks, tmp_path, monkeypatch, chunks):
    run.evaluate(quickstart(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_after(patched, chunks)
        with pytest.raises(Stopped):
            run.evaluate(quickstart(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".partial.jsonl"}
    partial = tmp_path / "out" / ".partial.jsonl"
    partial.write_bytes(partial.read_bytes() + b'{"rows": [[[["cut')  # as a crash may leave it
    with monkeypatch.context() as patched:
        calls = stop_after(patched, 99)
        metrics = run.evaluate(quickstart(tmp_path / "out"))
    assert len(calls) == 6 - chunks
    assert metrics["resumed_questions"] == 7 * chunks
    for name in ("predictions.json", "nbest_predictions.json", "per_example.parquet"):
        same = (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert same, name
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("line", ["{}", "[]", '{"rows": [7]}', '{"rows": [], "spent": {"x": 1}}'])
def test_a_kept_line_of_another_shape_is_dropped(small_chunks, tmp_path, monkeypatch, line):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stopped):
            run.evaluate(quickstart(tmp_path))
    with (tmp_path / ".partial.jsonl").open("a") as file:
        file.write(line + "\n")
    assert run.evaluate(quickstart(tmp_path))["resumed_questions"] == 14


def test_two_runs_into_one_directory_do_not_mix(tmp_path):
    with (
        run.Partial(tmp_path / ".partial.jsonl", "key"),
        pytest.raises(TryAgain, match="another run is writing there"),
    ):
        run.evaluate(quickstart(tmp_path))


@pytest.mark.parametrize("change", [{"max_answer_length": 5}, {"limit": 39}, {"dtype": "bfloat16"}])
def test_a_run_of_another_key_begins_anew(small_chunks, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stopped):
            run.evaluate(quickstart(tmp_path))
    assert run.evaluate(quickstart(tmp_path, **change))["resumed_questions"] == 0


def test_a_run_of_another_model_begins_anew(small_chunks, tmp_path, monkeypatch):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "checkpoint", model)
    config = quickstart(tmp_path / "out", model=str(model))
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stopped):
            run.evaluate(config)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert run.evaluate(config)["resumed_questions"] == 0


# ------------------------------------------------------------------------------------- refusals


def no_loading(monkeypatch):
    def loaded(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint, "load", loaded)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_found_before_the_model_loads(tmp_path, monkeypatch):
    no_loading(monkeypatch)
    tmp_path.chmod(0o500)
    with pytest.raises(TryAgain, match="cannot be written"):
        run.evaluate(quickstart(tmp_path / "out"))


@pytest.mark.parametrize(
    "output", ["/proc/flaxqa", "/dev/null", "/dev/null/out", "/tmp/" + "a" * 300]
)
def test_an_output_that_cannot_be_is_found_before_the_model_loads(monkeypatch, output):
    no_loading(monkeypatch)
    with pytest.raises((TryAgain, UsageError), match=output.split("/")[1]):
        run.evaluate(quickstart(output))


@pytest.mark.parametrize("data", ["missing.json", "./nowhere", "/dev"])
def test_data_that_is_missing_is_found_before_the_model_loads(tmp_path, monkeypatch, data):
    no_loading(monkeypatch)
    with pytest.raises(DataError, match="missing|has no files"):
        run.evaluate(quickstart(tmp_path, data=data))


def test_a_full_disk_leaves_no_half_result(tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if "metrics" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(TryAgain, match=r"metrics.json.*bytes.*No space left"):
            run.evaluate(quickstart(tmp_path))
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert run.evaluate(quickstart(tmp_path))["resumed_questions"] == 40


def test_windows_longer_than_the_positions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="max_length 600, but the checkpoint has 512 positions"):
        run.evaluate(quickstart(tmp_path, max_length=600))


def test_a_refused_model_leaves_nothing(tmp_path):
    with pytest.raises(ModelRejected):
        run.evaluate(quickstart(tmp_path, model=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- configs


def test_paths_in_a_toml_file_are_relative_to_it(tmp_path):
    path = tmp_path / "a" / "some.toml"
    path.parent.mkdir()
    path.write_text('model = "../model"\ndata = "rajpurkar/squad"\noutput = "./out"\nlimit = 3\n')
    assert read_toml(path, EvalConfig) == {
        "model": str(tmp_path / "model"),
        "data": "rajpurkar/squad",
        "output": str(tmp_path / "a" / "out"),
        "limit": 3,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limitt = 3", "limitt is no field"),
        ('limit = "3"', "limit is '3', it must be an integer"),
        ("limit = true", "limit is True, it must be an integer"),
        ('dtype = "int8"', "dtype is 'int8', it must be one of 'float32'"),
        ("min_f1 = [1]", "min_f1 is .*, it must be a number"),
        ("model = 7", "model is 7, it must be a string"),
        ("limit =", "is not TOML"),
        ("a = " + "[" * 5_000, "is not TOML"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_by_field(tmp_path, text, message):
    path = tmp_path / "some.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_toml(path, EvalConfig)
    assert "some.toml" in str(caught.value)


def test_numbers_below_one_are_refused():
    with pytest.raises(UsageError, match=r"limit is 0[\s\S]*n_best is -1"):
        EvalConfig(model="m", data="d", output="o", limit=0, n_best=-1)


@pytest.mark.parametrize("name", ["quickstart", "squad_v1.1", "gpu", "tpu"])
def test_the_shipped_configs_are_valid(name):
    assert EvalConfig(**read_toml(QUICKSTART.parent / f"{name}.toml", EvalConfig))


# ------------------------------------------------------------------------------ the real numbers


def held_out(output, dtype):
    """The metrics of the trained checkpoint on the held-out questions."""
    return run.evaluate(
        EvalConfig(
            model=str(SHARED / "checkpoints" / "distilbert-minilm-squad"),
            data=str(SHARED / "squad" / "heldout-v1.1.json"),
            output=str(output),
            dtype=dtype,
            devices=1,
        )
    )


@pytest.mark.shared
def test_the_held_out_set_has_the_reference_answers(tmp_path):
    """Reference: transformers' torch class, float32, windows 384/128, run_qa's rule."""
    metrics = held_out(tmp_path, "float32")
    reference = json.loads((SHARED / "reference" / "heldout_predictions.json").read_text())
    predictions = read(tmp_path, "predictions.json")
    different = [key for key in reference if predictions[key] != reference[key]]
    assert len(different) <= 1, different
    assert metrics["n_windows"] == 3027
    assert metrics["exact_match"] == pytest.approx(60.8906, abs=0.035)  # one answer
    assert metrics["f1"] == pytest.approx(71.9605, abs=0.035)


@pytest.mark.slow
@pytest.mark.shared
def test_bfloat16_scores_the_held_out_set_as_float32_does(tmp_path):
    assert held_out(tmp_path, "bfloat16")["f1"] == pytest.approx(71.9605, abs=0.1)


def test_every_field_of_the_config_is_in_the_help_and_the_run(done):
    names = {field.name for field in dataclasses.fields(EvalConfig)}
    assert set(read(done[1], "run.json")["config"]) == names


# ------------------------------------------------------------------------- SQuAD 2.0, and windows


@pytest.fixture
def v2_file(tmp_path):
    """The first questions of the quickstart, each second one asked of a text without its answer."""
    content = json.loads((QUICKSTART / "heldout.json").read_text())
    content["version"] = "v2.0"
    first, second = (article["paragraphs"][0] for article in content["data"][:2])
    for index, each in enumerate(first["qas"]):
        each["is_impossible"] = False
        other = {**each, "id": f"none-{index}", "answers": [], "is_impossible": True}
        second["qas"].append(other)
    content["data"] = content["data"][:2]
    path = tmp_path / "v2.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_squad_2_writes_null_odds_and_both_kinds_of_scores(tmp_path, v2_file):
    output = tmp_path / "out"
    metrics = run.evaluate(quickstart(output, data=v2_file, limit=None))
    assert {path.name for path in output.iterdir()} == {*FILES, "null_odds.json"}
    odds, predictions = read(output, "null_odds.json"), read(output, "predictions.json")
    nbest = read(output, "nbest_predictions.json")
    assert list(odds) == list(predictions)
    for example_id, value in odds.items():
        expected = "" if value > 0 or not nbest[example_id] else nbest[example_id][0]["text"]
        assert predictions[example_id] == expected
    data, v2 = dataset.read(v2_file)
    assert v2
    expected = squad.score(data, predictions, v2=True).by_answer()
    assert metrics["HasAns_total"] + metrics["NoAns_total"] == metrics["total"] == len(data)
    assert {name: metrics[name] for name in expected if "_" in name} == {
        name: value for name, value in expected.items() if "_" in name
    }
    assert (metrics["exact_match"], metrics["f1"]) == (expected["exact"], expected["f1"])
    assert metrics["best_f1"] >= metrics["f1"]
    assert read(output, "run.json")["data"]["version"] == "v2.0"
    # A later run of v1.1 takes the file of the earlier one away.
    run.evaluate(quickstart(output))
    assert {path.name for path in output.iterdir()} == FILES


@pytest.mark.parametrize(("threshold", "silent"), [(-1e9, True), (1e9, False)])
def test_the_threshold_of_null_odds_can_be_chosen(tmp_path, v2_file, threshold, silent):
    config = quickstart(tmp_path / "out", data=v2_file, null_score_diff_threshold=threshold)
    metrics = run.evaluate(config)
    predictions = read(tmp_path / "out", "predictions.json")
    assert {text == "" for text in predictions.values()} == {silent}
    assert metrics["HasAns_f1"] == 0 if silent else metrics["HasAns_f1"] > 50


def test_best_thresholds_are_those_of_what_the_model_would_say(tmp_path, v2_file):
    metrics = run.evaluate(quickstart(tmp_path / "out", data=v2_file, limit=None))
    again = run.evaluate(
        quickstart(
            tmp_path / "best", data=v2_file, limit=None,
            null_score_diff_threshold=metrics["best_f1_thresh"],
        )
    )  # fmt: skip
    assert again["f1"] == pytest.approx(metrics["best_f1"])


def test_the_rule_of_the_reader_is_a_field(done, tmp_path):
    metrics = run.evaluate(quickstart(tmp_path, decoder="spans", n_best=3))
    assert metrics["f1"] >= done[0]["f1"]
    for found in read(tmp_path, "nbest_predictions.json").values():
        places = sorted((one["start"], one["end"]) for one in found)
        assert len(places) <= 3
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert read(tmp_path, "run.json")["decoder"] == "spans"


def test_the_mlperf_windows_are_a_field(done, tmp_path):
    metrics = run.evaluate(quickstart(tmp_path, windows="mlperf"))
    # Some contexts are longer than a window, and a step of 128 makes more windows of them.
    assert (done[0]["n_windows"], metrics["n_windows"]) == (46, 52)
    assert metrics["f1"] > 70
    assert read(tmp_path, "run.json")["config"]["windows"] == "mlperf"


@pytest.mark.parametrize("field", ["null_score_diff_threshold", "min_f1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path, field, value):
    with pytest.raises(UsageError, match=f"{field} is .*, it must be a finite number"):
        quickstart(tmp_path, **{field: value})


def test_another_threshold_keeps_the_rows_of_a_stopped_run(
    small_chunks, tmp_path, monkeypatch, v2_file
):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            run.evaluate(quickstart(tmp_path / "out", data=v2_file))
    config = quickstart(tmp_path / "out", data=v2_file, null_score_diff_threshold=2.0)
    resumed = run.evaluate(config)
    whole = run.evaluate(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert (resumed["resumed_questions"], whole["resumed_questions"]) == (7, 0)
    for name in ("predictions.json", "null_odds.json", "nbest_predictions.json"):
        same = (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert same, name
