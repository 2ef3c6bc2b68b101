"""The command as a user runs it: exit codes, stdout and stderr of real processes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICKSTART, ROOT, SHARED

MODEL = str(QUICKSTART / "checkpoint")
HELDOUT = str(QUICKSTART / "heldout.json")
CONTEXT = "The mayor of Berton is Bob Adsen. The mayor of Lolt is Mira Well."
QUESTION = "Who is the mayor of Lolt?"


def flaxqa(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "flaxqa.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        **options,
    )


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom flaxqa import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'transformers', 'datasets', 'evaluate', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for part in ("ask", "eval", "score", "Exit codes", "--config quickstart"):
        assert part in done.stdout


@pytest.mark.parametrize("command", ["ask", "eval", "score", "probe"])
def test_every_command_explains_itself(command):
    done = flaxqa(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 10


def test_version():
    import flaxqa as package

    assert flaxqa("--version").stdout.strip() == package.__version__


@pytest.mark.parametrize(
    "arguments",
    [[], ["asc"], ["ask", "--model", "x"], ["score", "a"], ["eval", "--dtype", "int8"],
     ["eval", "--model", "x"], ["eval", "--config"]],
)  # fmt: skip
def test_wrong_usage_exits_with_2_and_a_word_on_stderr(arguments):
    done = flaxqa(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_ask_prints_json_when_piped():
    done = flaxqa("ask", "--model", MODEL, "--question", QUESTION, "--context", CONTEXT,
                  "--top-k", 3)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["answers"]) == 3
    assert (result["decoder"], result["n_windows"]) == ("spans", 1)
    for answer in result["answers"]:
        assert CONTEXT[answer["start"] : answer["end"]] == answer["text"]
        assert 0 <= answer["score"] <= 1
    assert done.stderr == ""


def test_ask_reads_the_context_from_a_file_or_stdin(tmp_path):
    (tmp_path / "context.txt").write_text(CONTEXT)
    common = ("ask", "--model", MODEL, "--question", QUESTION)
    from_file = flaxqa(*common, "--context-file", tmp_path / "context.txt")
    from_stdin = flaxqa(*common, input=CONTEXT)
    given = flaxqa(*common, "--context", CONTEXT)
    assert from_file.stdout == from_stdin.stdout == given.stdout != ""


def test_ask_is_readable_on_a_terminal():
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "flaxqa.cli", "ask", "--model", MODEL, "--question", QUESTION,
         "--context", CONTEXT],
        stdout=slave, stdin=slave, stderr=subprocess.DEVNULL, cwd=ROOT,
    ) as process:  # fmt: skip
        os.close(slave)
        output = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not chunk:
                break
            output += chunk
        assert process.wait() == 0
    os.close(master)
    text = output.decode()
    assert "score" in text
    assert "characters" in text
    assert "{" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", MODEL, "--context", ""], 2, "the context is empty"),
        (
            ["--model", MODEL, "--context", "x", "--top-k", "0"],
            2,
            "--top-k is 0, it must be an integer of at least 1",
        ),
        (["--model", MODEL, "--context", "x", "--context-file", "y"], 2, "not both"),
        (["--model", MODEL, "--context-file", "/no/file"], 2, "/no/file cannot be read"),
        (["--model", "/no/model", "--context", "x"], 2, "/no/model is missing"),
        (["--model", str(QUICKSTART), "--context", "x"], 4, "config.json is missing"),
        (["--model", MODEL, "--context", "x", "--max-length", "999"], 2, "512 positions"),
    ],
)
def test_what_ask_cannot_do_it_says(arguments, code, message):
    done = flaxqa("ask", "--question", QUESTION, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ask_refuses_a_checkpoint_whose_logits_are_not_finite(tmp_path):
    import shutil

    import safetensors.numpy

    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {
        name: array.astype("float32") for name, array in safetensors.numpy.load_file(path).items()
    }
    tensors["qa_outputs.weight"][:] = 3e38
    safetensors.numpy.save_file(tensors, path)
    done = flaxqa("ask", "--model", tmp_path / "model", "--question", QUESTION, "--context",
                  CONTEXT)  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr


def test_ask_says_when_a_question_was_cut():
    done = flaxqa("ask", "--model", MODEL, "--question", "who " * 400, "--context", CONTEXT)
    assert done.returncode == 0
    assert "cut to its first 189 tokens" in done.stderr


def test_eval_takes_a_config_and_lets_options_win(tmp_path):
    done = flaxqa("eval", "--config", "configs/quickstart.toml", "--output", tmp_path / "out",
                  "--limit", 20, "--min-f1", 0)  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["total"] == 20
    assert "EM " in done.stderr
    assert "questions/s" in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_a_score_below_the_gate_exits_with_5_and_keeps_the_results(tmp_path):
    done = flaxqa("eval", "--config", "configs/quickstart.toml", "--output", tmp_path,
                  "--limit", 20, "--min-f1", 100.1)  # fmt: skip
    assert done.returncode == 5
    assert "below --min-f1 100.1" in done.stderr
    assert (tmp_path / "run.json").exists()


def test_questions_set_aside_exit_with_3(tmp_path):
    content = json.loads((QUICKSTART / "heldout.json").read_text())
    content["data"] = content["data"][:2]
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = " "
    (tmp_path / "data.json").write_text(json.dumps(content))
    done = flaxqa("eval", "--model", MODEL, "--data", tmp_path / "data.json",
                  "--output", tmp_path / "out")  # fmt: skip
    assert done.returncode == 3
    assert "1 questions set aside" in done.stderr


def test_a_bad_config_file_exits_with_2(tmp_path):
    (tmp_path / "bad.toml").write_text("limt = 3")
    done = flaxqa("eval", "--config", tmp_path / "bad.toml")
    assert done.returncode == 2
    assert "limt is no field" in done.stderr


def test_sigterm_exits_with_143_and_the_run_goes_on_afterwards(tmp_path):
    content = json.loads((QUICKSTART / "heldout.json").read_text())
    many = [
        {"paragraphs": [
            {"context": p["context"], "qas": [{**qa, "id": f"{n}-{qa['id']}"} for qa in p["qas"]]}
            for p in article["paragraphs"]
        ]}
        for n in range(8) for article in content["data"]
    ]  # fmt: skip
    (tmp_path / "many.json").write_text(json.dumps({"version": "1.1", "data": many}))
    command = ["eval", "--model", MODEL, "--data", tmp_path / "many.json", "--output",
               tmp_path / "out"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "flaxqa.cli", *map(str, command)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        partial = tmp_path / "out" / ".partial.jsonl"
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.read_bytes().count(b"\n") > 1):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        assert "terminated" in process.stderr.read()
    done = flaxqa(*command)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["total"] == 8 * 559
    assert metrics["resumed_questions"] >= 1024


def test_score_is_a_drop_in_for_the_official_script(tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps({"heldout-0000-0": "nothing"}))
    done = flaxqa("score", QUICKSTART / "heldout.json", tmp_path / "predictions.json")
    assert done.returncode == 0
    assert done.stdout == '{"exact_match": 0.0, "f1": 0.0}\n'
    assert "Unanswered question heldout-0000-1 will receive score 0." in done.stderr
    more = flaxqa(
        "score", "--intervals", QUICKSTART / "heldout.json", tmp_path / "predictions.json"
    )
    assert json.loads(more.stdout)["total"] == 559


@pytest.mark.shared
def test_score_prints_the_official_numbers():
    folder = SHARED / "squad"
    done = flaxqa(
        "score", folder / "dev-v1.1.json", folder / "predictions" / "bert_large_ensemble.json"
    )
    assert done.stdout == '{"exact_match": 86.20624408703878, "f1": 92.19557978351145}\n'


@pytest.mark.parametrize("content", ["[", "[]", '{"a": 1}'])
def test_score_names_the_file_it_cannot_read(tmp_path, content):
    (tmp_path / "predictions.json").write_text(content)
    done = flaxqa("score", QUICKSTART / "heldout.json", tmp_path / "predictions.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "predictions.json" in done.stderr


def test_score_takes_squad_2_as_its_official_script_does(tmp_path):
    def row(example_id, *answers):
        return {"id": example_id, "question": "?", "answers": [{"text": a} for a in answers],
                "is_impossible": not answers}  # fmt: skip

    qas = [row("1", "red fish"), row("2", "blue"), row("3")]
    data = {"version": "v2.0", "data": [{"paragraphs": [{"context": "x", "qas": qas}]}]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "predictions.json").write_text('{"1": "red fish", "2": "fish", "3": "fish"}')
    (tmp_path / "odds.json").write_text('{"1": -2.5, "2": 3, "3": 4.5}')
    files = [tmp_path / "data.json", tmp_path / "predictions.json"]
    plain = flaxqa("score", *files)
    assert plain.returncode == 0, plain.stderr
    third = 100 / 3
    assert json.loads(plain.stdout) == pytest.approx(
        {"exact": third, "f1": third, "total": 3, "HasAns_exact": 50, "HasAns_f1": 50,
         "HasAns_total": 2, "NoAns_exact": 0, "NoAns_f1": 0, "NoAns_total": 1}
    )  # fmt: skip
    odds = ["--na-prob-file", tmp_path / "odds.json"]
    chosen = json.loads(flaxqa("score", *files, *odds, "--na-prob-thresh", 4).stdout)
    assert chosen == pytest.approx(
        {"exact": 2 * third, "f1": 2 * third, "total": 3, "HasAns_exact": 50, "HasAns_f1": 50,
         "HasAns_total": 2, "NoAns_exact": 100, "NoAns_f1": 100, "NoAns_total": 1,
         "best_exact": 2 * third, "best_exact_thresh": -2.5, "best_f1": 2 * third,
         "best_f1_thresh": -2.5}
    )  # fmt: skip
    short = flaxqa("score", *files, "-n", odds[1], "-t", 4, "-o", tmp_path / "out.json")
    assert (short.returncode, short.stdout) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text()) == chosen
    with_intervals = json.loads(flaxqa("score", *files, "--intervals").stdout)
    assert {"exact_interval", "f1_interval"} <= with_intervals.keys()
    no_file = flaxqa("score", *files, "-t", 4)
    assert "--na-prob-thresh needs --na-prob-file" in no_file.stderr
    (tmp_path / "odds.json").write_text('{"1": 0.5}')
    missing = flaxqa("score", *files, *odds)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "has no number for 2 predictions, the first of them '2'" in missing.stderr


def test_predictions_of_other_questions_are_noticed(tmp_path):
    (tmp_path / "predictions.json").write_text('{"x": "y"}')
    done = flaxqa("score", QUICKSTART / "heldout.json", tmp_path / "predictions.json")
    assert json.loads(done.stdout) == {"exact_match": 0.0, "f1": 0.0}
    assert done.stderr.count("Unanswered question") == 20
    assert "and 539 more unanswered questions" in done.stderr
    assert "is for a question of" in done.stderr


def test_an_excerpt_is_whole_words_on_one_line():
    from flaxqa.show import excerpt

    context = "aaa bbb\nccc  ddd eee fff ggg"
    assert excerpt(context, 13, 16, around=9) == ("… ccc ", " eee fff …")
    assert excerpt(context, 13, 16) == ("aaa bbb ccc ", " eee fff ggg")
    assert excerpt("x", 0, 1) == ("", "")


def test_score_of_squad_1_takes_no_numbers(tmp_path):
    (tmp_path / "predictions.json").write_text("{}")
    done = flaxqa("score", QUICKSTART / "heldout.json", tmp_path / "predictions.json",
                  "--na-prob-file", tmp_path / "predictions.json")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "--na-prob-file is for SQuAD 2.0" in done.stderr


def test_ask_can_say_that_there_is_no_answer():
    done = flaxqa("ask", "--model", MODEL, "--question", QUESTION, "--context", CONTEXT,
                  "--no-answer-threshold", 0)  # fmt: skip
    result = json.loads(done.stdout)
    assert result["answers"] == []
    assert 0 < result["no_answer_score"] < 1


@pytest.mark.parametrize("seconds", [0.15, 0.25, 0.35, 0.5, 0.7, 1.0])
def test_sigterm_while_libraries_load_is_no_traceback(seconds):
    command = [sys.executable, "-m", "flaxqa.cli", "ask", "--model", MODEL, "--question", QUESTION]
    process = subprocess.Popen(
        [*command, "--context", CONTEXT * 2_000], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    time.sleep(seconds)
    process.terminate()
    _, told = process.communicate(timeout=20)
    # Before flaxqa's own handler is there the system's ends the process.
    assert (process.returncode, told) in [(143, "flaxqa: terminated\n"), (-signal.SIGTERM, "")]


LONG = "n" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", LONG, "--model", MODEL, "--output", "out"],
        ["predict", HELDOUT, "--model", LONG, "--output", "out"],
        ["predict", HELDOUT, "--model", MODEL, "--output", LONG],
        ["eval", "--model", MODEL, "--data", LONG, "--output", "out"],
        ["eval", "--model", MODEL, "--data", HELDOUT, "--output", LONG],
        ["report", LONG],
        ["score", LONG, LONG],
        ["export", "--model", MODEL, "--format", "onnx", "--output", LONG],
        ["ask", "--model", MODEL, "--question", "who?", "--context-file", LONG],
        ["eval", "--config", LONG],
    ],
)
def test_a_name_that_no_system_has_is_told_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    from flaxqa import cli

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "File name too long" in line
    assert len(line) < 250


@pytest.mark.parametrize("name", ["fifo", "/dev/zero"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "NAME", "--model", MODEL, "--output", "out"],
        ["eval", "--model", MODEL, "--data", "NAME", "--output", "out"],
        ["score", "NAME", HELDOUT],
        ["score", HELDOUT, "NAME"],
        ["ask", "--model", MODEL, "--question", "who?", "--context-file", "NAME"],
    ],
)
def test_what_is_no_file_is_refused_at_once(arguments, name, tmp_path, monkeypatch, capsys):
    from flaxqa import cli

    if name == "fifo" and arguments[0] != "ask" and arguments[:2] != ["score", HELDOUT]:
        pytest.skip("a pipe of questions is read: see test_inputs")
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(SystemExit) as ended:
        cli.main([name if one == "NAME" else one for one in arguments])
    assert ended.value.code == 2
    assert re.search(f"{name} is (no|not a) file", capsys.readouterr().err)


def test_predictions_come_through_a_pipe_of_the_shell():
    command = f"{sys.executable} -m flaxqa.cli score {HELDOUT} <(echo '{{}}')"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '{"exact_match": 0.0, "f1": 0.0}\n'


@pytest.mark.parametrize("value", ["384", 1.5, object, [5]])
def test_a_number_that_is_none_is_refused_by_its_option(value):
    import flaxqa as package
    from flaxqa.errors import UsageError

    for name in ("max_length", "doc_stride", "batch_tokens", "devices"):
        if name == "devices" and isinstance(value, list):
            continue
        with pytest.raises(UsageError, match=name):
            package.load(MODEL, **{name: value})


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "flaxqa", "--version"], capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip
    assert done.stdout == flaxqa("--version").stdout != ""
