"""Training runs: what they write, that they go on to the same weights, and what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, write_config, write_tokenizer

from flaxqa import checkpoint, teacher, training
from flaxqa.errors import DataError, ModelRejected, UsageError
from flaxqa.eval import finetune, preparation, questions
from flaxqa.eval.config import FinetuneConfig
from flaxqa.predict import Predictor
from flaxqa.progress import Silence

PLACES = ["berlin", "bob", "wolfgang"]


def squad(*qas, context="my name is bob and i live in berlin"):
    paragraphs = [
        {"context": context, "qas": [{"id": name, "question": question, "answers": answers}]}
        for name, question, answers in qas
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def right(text, start):
    return [{"text": text, "answer_start": start}]


QAS = [
    (f"{asked}-{number}", question, right(text, start))
    for number in range(10)
    for asked, question, text, start in (
        ("who", f"who is called {number}?", "bob", 11),
        ("where", f"where is the city {number}?", "berlin", 29),
    )
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad(*QAS)))
    return path


@pytest.fixture
def tune(folder, data, tmp_path):
    """Trains with some options; returns what it came to and where."""

    def run(output="out", *, restart=False, progress=None, **options):
        chosen = {"model": str(folder), "data": str(data), "epochs": 2, "batch_size": 4,
                  "learning_rate": 1e-3, "devices": 1, **options}  # fmt: skip
        config = FinetuneConfig(output=str(tmp_path / output), **chosen)
        return finetune.finetune(config, progress, restart=restart), tmp_path / output

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def steps(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


class StopAt(Silence):
    """Ends a run in the middle of its steps."""

    def __init__(self, advances):
        self.left = advances

    def advance(self, answered, windows, padding=None, told=""):
        self.left -= 1
        if self.left == 0:
            raise Stopped


def test_it_writes_a_checkpoint_that_flaxqa_and_transformers_load_alike(tune, data, folder):
    done, output = tune(heldout=str(data))
    assert done["steps"] == done["steps_done"] == 10
    assert not (output / "state").exists()
    ours = checkpoint.load(output)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(output)
    assert type(theirs).__name__ == "DistilBertForQuestionAnswering"
    ids = np.random.default_rng(0).integers(5, len(VOCAB), (2, 12), dtype=np.int32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).start_logits.numpy()
    assert np.abs(np.asarray(ours.model(ids).start_logits) - expected).max() < 1e-4
    assert weights(output) != weights(folder)
    assert ours.tokenizer.get_vocab() == checkpoint.load(folder).tokenizer.get_vocab()


def test_the_loss_falls_and_every_epoch_is_scored(tune, data):
    done, output = tune(heldout=str(data), epochs=4, learning_rate=1e-2)
    told = steps(output)
    assert [line["step"] for line in told] == list(range(1, 21))
    assert [line["epoch"] for line in told] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    assert told[0]["learning_rate"] == pytest.approx(1e-2)
    assert told[-1]["learning_rate"] == pytest.approx(1e-2 / 20)
    first, *_, last = done["epochs"]
    assert last["loss"] < first["loss"] / 2
    assert last["loss"] == pytest.approx(np.mean([line["loss"] for line in told[-5:]]))
    assert last["exact_match"] == 100
    assert [one["epoch"] for one in done["epochs"]] == [1, 2, 3, 4]
    metrics = json.loads((output / "epoch-4" / "eval" / "metrics.json").read_text())
    assert metrics["f1"] == last["f1"]
    assert weights(output / "epoch-4") == weights(output)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tune, data):
    _, whole = tune("whole")
    for advances in (4, 3):
        with pytest.raises(Stopped):
            tune(progress=StopAt(advances), save_every=2)
    done, output = tune(save_every=2)
    assert weights(output) == weights(whole)
    assert [line["step"] for line in steps(output)] == list(range(1, 11))
    assert [line["loss"] for line in steps(output)] == [line["loss"] for line in steps(whole)]
    assert done["epochs"][0]["loss"] == tune("whole")[0]["epochs"][0]["loss"]


def test_a_trial_stops_where_it_is_told_to_and_goes_on_from_there(tune, data):
    _, whole = tune("whole")
    done, output = tune(stop_after=3, heldout=str(data))
    assert (done["steps_done"], done["steps"]) == (3, 10)
    assert checkpoint.load(output).model
    assert [one["step"] for one in done["epochs"]] == [3]
    assert weights(output) != weights(whole)
    done, output = tune()
    assert [one["step"] for one in done["epochs"]] == [3, 5, 10]
    assert weights(output) == weights(whole)


def test_what_was_stopped_before_an_epoch_was_scored_is_scored_afterwards(tune, data, monkeypatch):
    def fail(*arguments):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(finetune.run, "evaluate", fail)
        with pytest.raises(Stopped):
            tune(heldout=str(data), epochs=1)
    done, output = tune(heldout=str(data), epochs=1)
    assert [one["step"] for one in done["epochs"]] == [5]
    assert "f1" in done["epochs"][0]
    assert weights(output) == weights(output / "epoch-1")


def test_a_complete_run_is_left_as_it_is(tune, bert_teacher, monkeypatch):
    done, output = tune(teacher=bert_teacher)
    names = sorted(path.name for path in output.iterdir())
    before = weights(output), (output / "finetune.json").read_bytes()
    monkeypatch.setattr(Predictor, "predict", None)  # nobody may ask the teacher again
    assert tune(teacher=bert_teacher)[0] == done
    assert before == (weights(output), (output / "finetune.json").read_bytes())
    assert sorted(path.name for path in output.iterdir()) == names


def test_other_options_are_refused_by_name_until_it_is_begun_anew(tune):
    _, output = tune(stop_after=2)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"config\.learning_rate.*"):
        tune(learning_rate=2e-3)
    done, _ = tune(learning_rate=2e-3, restart=True)
    assert done["config"]["learning_rate"] == 2e-3
    assert [line["step"] for line in steps(output)] == list(range(1, 11))
    assert (output / "notes.txt").read_text() == "mine"


def test_other_data_are_refused(tune, data):
    tune(stop_after=2)
    data.write_text(json.dumps(squad(*QAS[:-1])))
    with pytest.raises(UsageError, match="data"):
        tune()


def test_other_places_of_the_same_answers_are_refused(tune, data):
    for start in (8, 19):  # "is" and "i", which begin alike
        data.write_text(json.dumps(squad(*QAS, ("i", "who is that?", right("i", start)))))
        if start == 8:
            tune(stop_after=1)
    with pytest.raises(UsageError, match="answers_sha256"):
        tune()


def test_a_checkpoint_that_it_did_not_write_is_never_overwritten(tune, folder):
    before = weights(folder)
    for options in ({}, {"restart": True}):
        with pytest.raises(UsageError, match="has a checkpoint already"):
            tune("checkpoint", **options)
    assert weights(folder) == before


def test_a_damaged_record_of_the_run_is_named(tune):
    _, output = tune(stop_after=1)
    (output / "finetune.json").write_text("{}")
    with pytest.raises(DataError, match=r"finetune\.json is damaged"):
        tune()


def test_the_seed_decides_the_order_and_nothing_else_does(tune):
    outputs = [tune(f"{name}", seed=seed)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert weights(outputs[0]) == weights(outputs[1]) != weights(outputs[2])


def test_dropout_is_at_the_rates_of_the_config_unless_it_is_left_out(tune, folder):
    plain = weights(tune("plain", dropout=False)[1])
    assert weights(tune("dropped")[1]) != plain
    write_config(folder, dropout=0.0, attention_dropout=0.0, qa_dropout=0.0)
    output = tune("none")[1]
    assert weights(output) == plain
    kept = json.loads((output / "config.json").read_text())
    assert (kept["dropout"], kept["qa_dropout"]) == (0.0, 0.0)


def test_frozen_embeddings_stay_as_they_were(tune, folder):
    _, output = tune(freeze_embeddings=True)
    before, after = (checkpoint.load(one).model.encoder for one in (folder, output))
    for name in ("word_embeddings", "position_embeddings"):
        tables = [getattr(one.embeddings, name).embedding[...] for one in (before, after)]
        assert (tables[0] == tables[1]).all()
    kernels = [one.transformer.layer[0].ffn.lin1.kernel[...] for one in (before, after)]
    assert (kernels[0] != kernels[1]).any()


def test_a_loss_that_is_not_finite_ends_the_run_before_such_weights_are_saved(tune):
    with pytest.raises(ModelRejected, match=r"loss of step \d+ is .*--learning-rate"):
        tune("astray", learning_rate=1e30, warmup=0.0, save_every=1)
    _, output = tune("astray", learning_rate=1e30, save_every=1, stop_after=1)
    assert np.isfinite(np.asarray(checkpoint.load(output).model.qa_outputs.kernel[...])).all()


def test_a_lack_of_memory_names_the_batch_size(tune, monkeypatch):
    def step(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(training.Trainer, "step", step)
    with pytest.raises(UsageError, match="4 windows of 64 tokens; .* smaller --batch-size than 4"):
        tune()


def test_the_same_files_under_another_name_go_on(tune, folder, data):
    _, whole = tune("whole")
    tune(stop_after=3)
    moved = data.rename(data.with_name("moved.json"))
    _, output = tune(data=str(moved), model=str(folder.rename(folder.with_name("moved"))))
    assert weights(output) == weights(whole)


def test_energy_is_measured_where_it_is_asked_for(tune):
    options = {"batch_size": 3, "max_length": 16, "doc_stride": 3}  # windows and last batches cut
    done, output = tune(carbon=True, grid=50.0, stop_after=8, **options)
    assert done["windows"]["total"] > done["data"]["questions"] == 20
    assert done["carbon"]["grid_g_per_kwh"] == 50
    assert done["carbon"]["kwh"] > 0
    assert 0 < done["carbon"]["questions"] == done["carbon"]["of_questions"] < 40
    done, _ = tune(carbon=True, grid=50.0, **options)
    assert len(done["measured"]) == 2
    assert done["carbon"]["questions"] == done["carbon"]["of_questions"] == 40
    assert tune("without", **options)[0]["carbon"] is None
    assert weights(output) == weights(output.parent / "without")


# --- base models ---


@pytest.mark.parametrize("inner", [True, False])
def test_a_base_model_gets_a_head_of_the_seed(tune, folder, reference, inner):
    model = reference.distilbert if inner else transformers.DistilBertForMaskedLM(reference.config)
    model.save_pretrained(folder)
    write_config(folder, architectures=[type(model).__name__])
    with pytest.raises(ModelRejected, match="base model"):
        checkpoint.load(folder)
    heads = [
        np.asarray(checkpoint.load(folder, new_head=seed).model.qa_outputs.kernel[...])
        for seed in (0, 0, 1)
    ]
    assert (heads[0] == heads[1]).all()
    assert (heads[0] != heads[2]).any()
    assert heads[0].std() == pytest.approx(0.02, rel=0.3)
    done, output = tune()
    assert "base model" in " ".join(done["model"]["notes"])
    assert checkpoint.load(output).model
    assert json.loads((output / "config.json").read_text())["architectures"] == [
        "DistilBertForQuestionAnswering"
    ]


# --- distillation ---


@pytest.fixture
def bert_teacher(bert_folder):
    return str(bert_folder)


def test_a_teacher_of_another_family_changes_what_is_learnt(tune, bert_teacher):
    done, output = tune(teacher=bert_teacher)
    told = steps(output)
    assert all(line["distillation"] > 0 for line in told)
    for line in told:
        assert line["loss"] == pytest.approx((line["answers"] + line["distillation"]) / 2, rel=1e-5)
    assert done["teacher"]["sha256"]["model.safetensors"]
    assert not (output / "teacher").exists()
    alone = steps(tune("alone")[1])
    assert all(line["distillation"] == 0 for line in alone)
    assert weights(output) != weights(output.parent / "alone")


def test_a_student_that_learns_from_itself_alone_has_nothing_to_learn(tune, folder):
    told = steps(tune(teacher=str(folder), distillation=1.0, dropout=False)[1])
    assert told[0]["loss"] < 1e-6 < told[0]["answers"]


def test_the_teachers_logits_are_computed_once(tune, bert_teacher, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    _, first = tune("first", teacher=bert_teacher, cache_teacher=cache)
    monkeypatch.setattr(Predictor, "predict", None)  # nobody may ask
    _, second = tune("second", teacher=bert_teacher, cache_teacher=cache)
    assert weights(first) == weights(second)


def test_logits_that_a_kill_cut_short_are_computed_again(tune, bert_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "WINDOWS", 7)
    cache = tmp_path / "cache"
    _, first = tune("first", teacher=bert_teacher, cache_teacher=str(cache))
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 3
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-9])
    files[2].unlink()
    np.save(files[0], np.zeros((2, 3), np.float32))  # of other windows
    _, second = tune("second", teacher=bert_teacher, cache_teacher=str(cache))
    assert weights(first) == weights(second)
    assert files[1].read_bytes() == whole


def test_logits_of_another_teacher_are_refused(tune, bert_teacher, folder, tmp_path):
    cache = str(tmp_path / "cache")
    tune("first", teacher=bert_teacher, cache_teacher=cache)
    with pytest.raises(UsageError, match="another teacher"):
        tune("second", teacher=str(folder), cache_teacher=cache)
    with pytest.raises(UsageError, match="has other files"):
        tune("third", teacher=str(folder), cache_teacher=str(folder))


def test_a_teacher_with_other_tokens_is_refused(tune, bert_folder):
    write_tokenizer(bert_folder, VOCAB[::-1])
    with pytest.raises(ModelRejected, match="vocabulary is another one"):
        tune(teacher=str(bert_folder))


def test_a_teacher_that_keeps_upper_case_is_refused(tune, bert_folder):
    path = bert_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(ModelRejected, match="upper case"):
        tune(teacher=str(bert_folder))


# --- questions ---


def test_questions_that_cannot_be_learnt_from_are_set_aside_with_the_reason(tune, data):
    bad = {
        "gone": ("what is it?", right("munich", 3)),
        "twice": ("what is it?", right("i", 30)),
        "blank": ("what is it?", right(" ", 2)),
        "empty": ("  ", right("bob", 11)),
    }
    data.write_text(json.dumps(squad(*QAS, *((name, *rest) for name, rest in bad.items()))))
    done, output = tune(stop_after=1)
    errors = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
    assert {one["id"]: one["reason"].split(",")[-1].strip() for one in errors} == {
        "gone": "and nowhere else",
        "twice": "and more than once else",
        "blank": "the answer is blank",
        "empty": "the question is blank",
    }
    assert (done["data"]["questions"], done["data"]["set_aside"]) == (len(QAS), 4)


def test_an_answer_that_stands_elsewhere_once_is_found(data):
    data.write_text(
        json.dumps(squad(("0", "who?", right("bob", 2)), ("1", "who?", right("i", 19))))
    )
    found, reasons = preparation.usable(questions.read(data).questions)
    assert [one.starts for one in found] == [(11,), (19,)]
    assert not reasons


def test_data_without_a_question_to_learn_from_are_refused(tune, data):
    data.write_text(json.dumps(squad(("0", "who?", right("munich", 3)))))
    with pytest.raises(DataError, match="no question can be learnt from"):
        tune()


def test_questions_without_an_answer_are_learnt_as_such(tune, data):
    content = squad(*QAS)
    for paragraph in content["data"][0]["paragraphs"][:7]:
        paragraph["qas"][0] |= {"is_impossible": True, "answers": []}
    data.write_text(json.dumps({**content, "version": "v2.0"}))
    done, _ = tune(heldout=str(data))
    assert done["windows"]["without_answer"] == 7
    assert done["epochs"][-1]["total"] == len(QAS)


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("temperature", -1.0),
     ("distillation", 1.5), ("warmup", 2.0), ("stop_after", 0), ("max_length", 0), ("seed", -1)],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_name(tune, option, value):
    with pytest.raises(UsageError, match=option):
        tune(**{option: value})


# --- the command ---


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "flaxqa", "finetune", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}, **options,
    )  # fmt: skip


def test_a_command_that_was_killed_twice_goes_on_to_the_same_weights(tune, folder, data, tmp_path):
    _, whole = tune("whole", epochs=20)
    output = tmp_path / "out"
    arguments = ("--model", folder, "--data", data, "--output", output, "--epochs", 20,
                 "--batch-size", 4, "--learning-rate", 1e-3, "--devices", 1, "--save-every", 3,
                 "--heldout", data)  # fmt: skip
    for least in (10, 50):
        process = command(*arguments)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (output / "log.jsonl").exists() and len(steps_so_far(output)) > least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = command(*arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert weights(output) == weights(whole)
    told = json.loads(out)
    assert told["steps_done"] == 100
    assert [one["epoch"] for one in told["epochs"]] == list(range(1, 21))
    assert "EM" in err


def steps_so_far(output):
    return (output / "log.jsonl").read_text().splitlines()


def test_set_aside_questions_give_exit_code_3_and_a_lack_of_data_2(folder, data, tmp_path):
    data.write_text(json.dumps(squad(*QAS, ("gone", "what is it?", right("munich", 3)))))
    process = command("--model", folder, "--data", data, "--output", tmp_path / "out",
                      "--stop-after", 1, "--max-length", 32)  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "1 questions set aside" in err
    assert "after 1 of" in err
    process = command("--model", folder, "--data", tmp_path / "none.json", "--output", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "none.json" in err
