import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

import flaxqa
from flaxqa import batch, cli, parts, predict, work
from flaxqa.config import PredictConfig
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.eval import questions as dataset

MODEL = str(QUICKSTART / "checkpoint")
QUESTIONS = 130


@pytest.fixture(scope="module")
def rows():
    questions = dataset.read(QUICKSTART / "heldout.json").questions[:QUESTIONS]
    return [
        {"id": one.id, "question": one.question, "context": one.context, "n": number}
        for number, one in enumerate(questions)
    ]


@pytest.fixture(scope="module")
def reader():
    return flaxqa.load(MODEL)


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory):
    """The records in two files."""
    folder = tmp_path_factory.mktemp("records")
    for name, some in (("a", rows[:70]), ("b", rows[70:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def configured(source, output, **options):
    options = {"shard_size": 30, **options}
    return PredictConfig(input=(str(source),), output=str(output), model=MODEL, **options)


def contents(folder):
    """The hash of every part, and of errors.jsonl."""
    names = sorted(path.name for path in folder.iterdir())
    kept = [name for name in names if name.startswith("part-") or name == "errors.jsonl"]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kept}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """A run from beginning to end."""
    output = tmp_path_factory.mktemp("undisturbed")
    summary = batch.predict(configured(source, output))
    assert summary.complete
    return output


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table_of(folder):
    paths = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths])


# --- what comes out ---


def test_every_record_has_the_readers_answer_in_the_order_of_the_input(undisturbed, rows, reader):
    found = table_of(undisturbed).to_pylist()
    wanted = list(reader.answers(rows))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row, one in zip(found, wanted, strict=True):
        assert (row["answer"], row["start"], row["end"]) == (
            one[0].text, one[0].start, one[0].end,
        )  # fmt: skip
        assert row["score"] == pytest.approx(one[0].score, rel=1e-12)
        assert row["no_answer_score"] == pytest.approx(one.no_answer_score, rel=1e-12)
        assert row["n_windows"] == one.n_windows
        assert row["model"] == "checkpoint"
        assert not row["question_cut"]
    names = sorted(path.name for path in undisturbed.iterdir() if not path.name.startswith("."))
    expected = [f"part-{i:05d}-of-00005.parquet" for i in range(5)]
    assert names == sorted(
        [*expected, "_SUCCESS", "_errors", "_manifest.jsonl", "_plan.json", "_run.json"]
    )


def test_what_is_written_down_of_a_run(undisturbed):
    run = json.loads((undisturbed / "_run.json").read_text())
    success = json.loads((undisturbed / "_SUCCESS").read_text())
    entries = lines_of(undisturbed / "_manifest.jsonl")
    assert success == {
        "records": 130, "answered": 130, "set_aside": 0, "parts": 5, "run_key": run["run_key"],
    }  # fmt: skip
    assert [entry["rows"] for entry in entries] == [30, 30, 30, 30, 10]
    for entry in entries:
        content = (undisturbed / entry["part"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert entry["run_key"] == run["run_key"]
        assert entry["computed_by"]["kernels"] in ("native", "xla")
    assert set(table_of(undisturbed)["run_key"].to_pylist()) == {run["run_key"]}
    assert [one["name"] for one in run["data"]["inputs"]] == ["a.jsonl", "b.jsonl"]


def test_jsonl_has_the_same_content(undisturbed, source, tmp_path):
    batch.predict(configured(source, tmp_path, format="jsonl"))
    paths = sorted(tmp_path.glob("part-*.jsonl"))
    assert [path.name for path in paths] == [f"part-{i:05d}-of-00005.jsonl" for i in range(5)]
    found = [row for path in paths for row in lines_of(path)]
    wanted = table_of(undisturbed).to_pylist()
    for row in (*found, *wanted):
        del row["run_key"]  # it has the format
    assert found == wanted


def test_other_columns_and_several_answers(rows, reader, source, tmp_path):
    batch.predict(configured(source, tmp_path / "1", keep=("n", "context"), top_k=3))
    found = table_of(tmp_path / "1").to_pylist()
    wanted = list(reader.answers(rows, top_k=3))
    for row, one, record in zip(found, wanted, rows, strict=True):
        assert row["n"] == str(record["n"])  # of JSON all columns become text
        assert row["context"] == record["context"]
        assert [a["text"] for a in row["answers"]] == [a.text for a in one]
        assert row["answers"][0]["text"] == row["answer"]
    # Those of Parquet keep their types.
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    batch.predict(configured(tmp_path / "rows.parquet", tmp_path / "2", keep=("n",)))
    assert table_of(tmp_path / "2")["n"].to_pylist() == list(range(QUESTIONS))
    batch.predict(configured(source, tmp_path / "3", keep=("n",), format="jsonl"))
    (first, *_) = sorted((tmp_path / "3").glob("part-*"))
    assert lines_of(first)[0]["n"] == 0


def test_answers_can_be_left_out(source, rows, reader, tmp_path):
    batch.predict(configured(source, tmp_path / "1", min_score=0.9))
    found = table_of(tmp_path / "1").to_pylist()
    answered = [*reader.answers(rows)]
    assert [row["answer"] is None for row in found] == [one[0].score < 0.9 for one in answered]
    assert 0 < sum(row["answer"] is None for row in found) < QUESTIONS
    batch.predict(configured(source, tmp_path / "2", no_answer_threshold=1e-9))
    left_out = [answer is None for answer in table_of(tmp_path / "2")["answer"].to_pylist()]
    assert left_out == [one.no_answer_score > 1e-9 for one in answered]
    assert sum(left_out) > 0


def test_columns_can_be_called_anything(rows, undisturbed, tmp_path):
    renamed = [{"qid": r["id"], "q": r["question"], "passage": r["context"]} for r in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = {"id": "qid", "question": "q", "context": "passage"}
    batch.predict(configured(path, tmp_path / "out", columns=columns))
    assert table_of(tmp_path / "out").drop(["run_key"]) == table_of(undisturbed).drop(["run_key"])
    with pytest.raises(UsageError, match="columns: answer cannot be named"):
        batch.predict(configured(path, tmp_path / "x", columns={"answer": "a"}))
    with pytest.raises(UsageError, match="two columns 'score'"):
        batch.predict(configured(path, tmp_path / "x", keep=("score",)))


# --- going on ---


class Stop(BaseException):
    pass


def stopped_after(monkeypatch, shards):
    """Makes runs stop when they have noted so many parts."""
    noted = []
    note = parts.Output.note

    def counting(self, entry):
        if len(noted) == shards:
            raise Stop
        noted.append(entry.shard)
        note(self, entry)

    monkeypatch.setattr(parts.Output, "note", counting)
    return noted


@pytest.mark.parametrize("shards", range(5))
def test_a_run_that_was_stopped_goes_on(monkeypatch, source, undisturbed, tmp_path, shards):
    config = configured(source, tmp_path)
    with monkeypatch.context() as patch:
        stopped_after(patch, shards)
        with pytest.raises(Stop):
            batch.predict(config)
    assert not (tmp_path / "_SUCCESS").exists()
    with monkeypatch.context() as patch:
        noted = stopped_after(patch, 99)
        summary = batch.predict(config)
        assert noted == list(range(shards, 5))
    assert (summary.computed, summary.answered, summary.parts) == (130 - 30 * shards, 130, 5)
    assert contents(tmp_path) == contents(undisturbed)
    again = batch.predict(config)
    assert (again.computed, again.complete, again.answered) == (0, True, 130)


def test_an_error_while_one_shard_is_computed_keeps_those_before(
    monkeypatch, source, undisturbed, tmp_path
):
    """The devices start a shard only when the one before is written and noted."""
    config = configured(source, tmp_path)
    started = []
    take = predict.Predictor.start

    def failing(self, chosen, chunk):
        manifest = tmp_path / "_manifest.jsonl"
        started.append(len(lines_of(manifest)) if manifest.exists() else 0)
        if len(started) == 4:
            raise Stop
        return take(self, chosen, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(predict.Predictor, "start", failing)
        with pytest.raises(Stop):
            batch.predict(config)
    assert started == [0, 1, 2, 3]  # of each shard one batch; so many were noted before it
    batch.predict(config)
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_a_damaged_part_is_computed_again(source, undisturbed, tmp_path, damage):
    config = configured(source, tmp_path)
    batch.predict(config)
    path = tmp_path / "part-00002-of-00005.parquet"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    summary = batch.predict(config)
    assert (summary.computed, summary.complete) == (30, True)
    assert contents(tmp_path) == contents(undisturbed)


def test_a_manifest_that_a_crash_cut_costs_its_last_part(source, undisturbed, tmp_path):
    config = configured(source, tmp_path)
    batch.predict(config)
    manifest = tmp_path / "_manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert batch.predict(config).computed == 10
    assert contents(tmp_path) == contents(undisturbed)
    assert batch.predict(config).computed == 0


CHANGES = {
    "answers.top_k": {"top_k": 2},
    "answers.max_answer_length": {"max_answer_length": 29},
    "answers.min_score": {"min_score": 0.1},
    "data.shard_size": {"shard_size": 31},
    "data.columns.id": {"columns": {"id": "n"}},
    "data.max_context_chars": {"max_context_chars": 10_000},
    "windows.max_length": {"max_length": 380},
    "precision.dtype": {"dtype": "bfloat16"},
    "output.format": {"format": "jsonl"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_run_in_the_same_directory_is_refused(source, undisturbed, field):
    before = contents(undisturbed)
    with pytest.raises(UsageError) as error:
        batch.predict(configured(source, undisturbed, **CHANGES[field]))
    assert "has another run" in str(error.value)
    assert f"\n  {field}: it was " in str(error.value)
    assert contents(undisturbed) == before
    assert batch.predict(configured(source, undisturbed)).complete


def test_other_data_or_another_model_is_refused(source, tmp_path):
    import shutil

    data, model, output = tmp_path / "data", tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, data)
    shutil.copytree(MODEL, model)
    config = dataclasses.replace(configured(data, output), model=str(model))
    batch.predict(config)
    text = (data / "a.jsonl").read_text()
    (data / "a.jsonl").write_text(text.replace("?", "!", 1))
    with pytest.raises(UsageError, match=r"data.inputs\[0\].sha256: it was "):
        batch.predict(config)
    (data / "a.jsonl").write_text(text)  # the same again, at another time
    assert batch.predict(config).computed == 0
    for name in ("model.safetensors", "tokenizer.json"):
        content = (model / name).read_bytes()
        changed = bytearray(content)
        if name == "tokenizer.json":
            changed += b" "
        else:
            changed[-1] ^= 1
        (model / name).write_bytes(changed)
        with pytest.raises(UsageError, match=f"model.sha256.{name}: it was "):
            batch.predict(config)
        (model / name).write_bytes(content)
    restarted = batch.predict(dataclasses.replace(config, top_k=2), restart=True)
    assert restarted.computed == 130
    assert "answers" in table_of(output).column_names


def test_parts_of_somebody_else_are_not_overwritten(source, tmp_path):
    (tmp_path / "part-0.parquet").write_text("mine")
    with pytest.raises(UsageError, match="part-0.parquet but no _run.json"):
        batch.predict(configured(source, tmp_path))
    assert (tmp_path / "part-0.parquet").read_text() == "mine"


def test_a_second_run_into_a_directory_is_refused(source, tmp_path):
    config = configured(source, tmp_path)
    with parts.Output(tmp_path):
        with pytest.raises(TryAgain, match=f"another run is writing there.*{os.getpid()}"):
            batch.predict(config)
        with pytest.raises(TryAgain, match="another run is writing there"):
            batch.predict(config, share=(0, 2))
    with parts.Output(tmp_path, (0, 2)):
        with pytest.raises(TryAgain, match="another run is writing there"):
            batch.predict(config)
        with pytest.raises(TryAgain, match="another run is writing there"):
            batch.predict(config, share=(0, 2))
        assert not batch.predict(config, share=(1, 2)).complete
    assert batch.predict(config).complete


# --- what is set aside ---

GOOD = {"id": "x", "question": "What did the ship carry?", "context": "The ship carried salt."}
BAD = [
    b'{"id": "x", "question": "cut',
    b"not json at all",
    b"[1, 2, 3]",
    b'"a string"',
    b"null",
    b"12",
    b'{"id": "x", "question": "\xff\xfe", "context": "c"}',
    b'{"id": "x", "context": "c"}',
    b'{"id": "x", "question": "q"}',
    b'{"id": "x", "question": 5, "context": "c"}',
    b'{"id": "x", "question": "q", "context": ["c"]}',
    b'{"id": "x", "question": null, "context": "c"}',
    b'{"id": "x", "question": "", "context": "c"}',
    b'{"id": "x", "question": "  ", "context": "c"}',
    b'{"id": "x", "question": "q", "context": "\\n\\t "}',
    b'{"id": "x", "question": "\\ud800", "context": "c"}',
    b'{"id": "x", "question": "q", "context": "a \\udfff b"}',
    b'{"id": ["x"], "question": "q", "context": "c"}',
    b'{"id": 1.5, "question": "q", "context": "c"}',
    b"[" * 50_000,
    b'{"id": "x", "question": "q", "context": "' + b"c" * 20_001 + b'"}',
]


def bad_records(path, lines=1_000, bad=100, seed=0):
    """A file with bad lines among good ones; gives where they are."""
    rng = random.Random(seed)
    places = sorted(rng.sample(range(lines), bad))
    content = []
    for number in range(lines):
        if number in places:
            content.append(BAD[places.index(number) % len(BAD)])
        else:
            content.append(json.dumps({**GOOD, "id": f"q{number}"}).encode())
    path.write_bytes(b"\n".join(content) + b"\n")
    return places, content


def test_bad_records_are_set_aside_with_their_place_and_reason(tmp_path):
    places, lines = bad_records(tmp_path / "a.jsonl")
    config = configured(
        tmp_path / "a.jsonl", tmp_path / "out", shard_size=128, max_context_chars=20_000
    )
    summary = batch.predict(config)
    assert (summary.records, summary.answered, summary.set_aside) == (1_000, 900, 100)
    errors = lines_of(tmp_path / "out" / "errors.jsonl")
    assert [error["line"] for error in errors] == [place + 1 for place in places]
    content = (tmp_path / "a.jsonl").read_bytes()
    for error, place in zip(errors, places, strict=True):
        assert set(error) == {"file", "line", "byte_offset", "reason", "row"}
        assert error["file"] == "a.jsonl"
        assert content[error["byte_offset"] :].startswith(lines[place])
        assert error["row"] == lines[place].decode("utf-8", "backslashreplace") + "\n"
    assert len({error["reason"] for error in errors}) >= 15
    ids = table_of(tmp_path / "out")["id"].to_pylist()
    assert ids == [f"q{i}" for i in range(1_000) if i not in places]


def test_a_run_that_is_plainly_wrong_stops_and_can_go_on(tmp_path):
    bad_records(tmp_path / "a.jsonl", lines=1_000, bad=300)
    config = configured(
        tmp_path / "a.jsonl", tmp_path / "out", shard_size=100, max_context_chars=20_000
    )
    with pytest.raises(DataError, match="more than the 100 that --max-errors 0.01 allows of 1,000"):
        batch.predict(config)
    done = sorted((tmp_path / "out").glob("part-*"))
    assert 0 < len(done) < 10
    assert list((tmp_path / "out" / "_errors").iterdir())
    summary = batch.predict(dataclasses.replace(config, max_errors=0.5))
    assert (summary.answered, summary.set_aside) == (700, 300)
    assert summary.computed == 1_000 - 100 * len(done)


def test_ids_that_came_before_are_set_aside_when_they_must_be_unique(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": f"q{i % 70}"}) + "\n" for i in range(100)))
    batch.predict(configured(path, tmp_path / "1"))
    assert table_of(tmp_path / "1").num_rows == 100
    summary = batch.predict(configured(path, tmp_path / "2", unique_ids=True))
    assert (summary.answered, summary.set_aside) == (70, 30)
    errors = lines_of(tmp_path / "2" / "errors.jsonl")
    assert [error["line"] for error in errors] == list(range(71, 101))
    assert errors[0]["reason"] == "the id 'q0' came before"


def test_logits_that_are_not_finite_set_their_record_aside(monkeypatch, source, tmp_path):
    take = predict.Predictor.take

    def broken(self, one):
        take(self, one)
        if len(one.chunk.windows):
            one.chunk.tables[0][0, 3] = float("nan")

    monkeypatch.setattr(predict.Predictor, "take", broken)
    summary = batch.predict(configured(source, tmp_path))
    assert (summary.answered, summary.set_aside) == (125, 5)  # the first of each shard
    errors = lines_of(tmp_path / "errors.jsonl")
    assert {error["reason"] for error in errors} == {"the model's logits are not finite"}
    assert json.loads(errors[0]["row"])["n"] == 0


def test_what_was_set_aside_survives_damage(tmp_path):
    bad_records(tmp_path / "a.jsonl", lines=300, bad=30)
    config = configured(tmp_path / "a.jsonl", tmp_path / "out", shard_size=100)
    batch.predict(config)
    before = contents(tmp_path / "out")
    fragment = sorted((tmp_path / "out" / "_errors").iterdir())[1]
    fragment.write_bytes(fragment.read_bytes()[:-1])
    (tmp_path / "out" / "errors.jsonl").unlink()
    assert batch.predict(config).computed == 100
    assert contents(tmp_path / "out") == before


# --- faults ---


def test_a_fault_at_any_file_operation_is_resumed_from(monkeypatch, source, undisturbed, tmp_path):
    """The k-th write, fsync or rename fails, for every k."""
    originals = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
    config = configured(source, tmp_path / "out", shard_size=30)
    reference = contents(undisturbed)
    loaded = work.load_reader(config)
    monkeypatch.setattr(batch, "load_reader", lambda config: loaded)
    k, faults = 0, collections.Counter()
    while True:
        output = tmp_path / f"out{k}"
        config = configured(source, output)
        count = 0

        def fail(name, *arguments, k=k):
            nonlocal count
            count += 1
            if count == k + 1:
                faults[name] += 1
                raise OSError(errno.EIO, "made to fail")
            return originals[name](*arguments)

        with monkeypatch.context() as patch:
            for name in originals:
                patch.setattr(os, name, lambda *a, name=name, **kw: fail(name, *a))
            with contextlib.suppress(TryAgain):
                batch.predict(config)
                break  # there were no k operations
        assert not (output / "_SUCCESS").exists() or contents(output) == reference
        for name in contents(output):  # what is there is whole
            assert contents(output)[name] == reference[name]
        batch.predict(config)
        assert contents(output) == reference
        assert not list(output.glob(".part-*"))
        k += 1
    assert k > 30
    assert min(faults[name] for name in originals) >= 7


# --- the command ---


def run_cli(*arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", *map(str, arguments)])
    return error.value.code


def test_the_command_tells_what_it_did(source, tmp_path, capsys):
    options = ("--model", MODEL, "--output", tmp_path / "out", "--shard-size", "30")
    assert run_cli(source, *options) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answered"] == 130
    assert "130 records = 130 answered + 0 set aside" in err
    assert "5 parts in" in err
    bad_records(tmp_path / "bad.jsonl", lines=50, bad=5)
    options = ("--model", MODEL, "--output", tmp_path / "bad", "--columns", "id=id")
    assert run_cli(tmp_path / "bad.jsonl", *options) == 3
    _, err = capsys.readouterr()
    assert "50 records = 45 answered + 5 set aside" in err
    assert "errors.jsonl, with the reasons" in err
    assert run_cli(tmp_path / "no.jsonl", *options) == 2
    assert "no.jsonl is missing" in capsys.readouterr().err


def test_a_dry_run_foretells_and_writes_nothing(source, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_cli(source, "--model", MODEL, "--output", output, "--dry-run") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["records"], told["shards"], told["sampled"], told["set_aside"]) == (130, 1, 64, 0)
    assert 130 <= told["windows"] < 160
    assert told["minutes"] == pytest.approx(130 / told["records_per_second"] / 60)
    assert "130 records in 1 shards, about " in err
    assert not output.exists()


def test_options_that_do_not_go_together_are_refused(source, tmp_path, capsys):
    options = (source, "--model", MODEL, "--output", tmp_path)
    assert run_cli(*options, "--dry-run", "--restart") == 2
    assert "--dry-run and --restart do not go together" in capsys.readouterr().err
    assert run_cli(*options, "--shard", "2") == 2
    assert "it must be i/n" in capsys.readouterr().err
    assert run_cli(*options, "--shard-size", "0") == 2
    assert run_cli(*options, "--max-errors", "2") == 2
    assert run_cli("--finalize", "--output", tmp_path) == 2
    assert "has no run" in capsys.readouterr().err


def test_a_config_file_says_the_same(source, undisturbed, tmp_path):
    config = tmp_path / "predict.toml"
    config.write_text(
        f'input = ["{source}"]\nmodel = "{MODEL}"\noutput = "./out"\nshard_size = 30\n'
        '[columns]\nid = "id"\n'
    )
    assert run_cli("--config", config) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)
    config.write_text('input = "a"\nshards = 3\n')
    assert run_cli("--config", config) == 2


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_kept_values_that_python_does_not_have(tmp_path, rows, format):
    from test_records import strange_columns

    asked = {name: [row[name] for row in rows[:2]] for name in ("id", "question", "context")}
    columns = strange_columns()
    del columns["text"]
    columns["number"] = pa.array([1.5, float("nan")])
    table = pa.table(asked | columns)
    pq.write_table(table, tmp_path / "a.parquet")
    keep = tuple(columns)
    config = configured(tmp_path / "a.parquet", tmp_path / "out", format=format, keep=keep,
                        max_errors=1.0)  # fmt: skip
    summary = batch.predict(config)
    if format == "parquet":  # they go as they came
        found = table_of(tmp_path / "out").select(list(keep))
        assert found.schema.types == [columns[name].type for name in keep]
        assert [column.to_pylist() if name == "number" else column.cast(pa.int64()).to_pylist()
                for name, column in zip(keep, found.columns, strict=True) if name in
                ("late", "long")] == [[0, 253_402_300_800 * 1_000_000], [0, 2**62]]  # fmt: skip
        return
    assert (summary.answered, summary.set_aside) == (0, 2)  # there is no such time zone
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert all("cannot be kept" in json.loads(line)["reason"] for line in lines)
    plain = dataclasses.replace(config, keep=("late", "number"), output=str(tmp_path / "plain"))
    assert batch.predict(plain).answered == 2
    (part,) = (tmp_path / "plain").glob("part-*")
    assert "NaN" not in part.read_text()
    first, second = map(json.loads, part.read_text().splitlines())
    assert first["late"] == "1970-01-01 00:00:00.000000"
    assert second["late"] == "10000-01-01 00:00:00.000000"
    assert second["number"] is None
