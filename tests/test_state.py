"""What a batch run may remove, what it believes, and where it may write."""

import builtins
import errno
import io
import itertools
import json
import os
import random
import shutil
import stat
import sys
import threading

import pytest
from conftest import QUICKSTART
from test_batch import MODEL, configured, contents

from flaxqa import batch, files, inputs, parts, reader, records
from flaxqa.errors import DataError, FlaxqaError, TryAgain, UsageError
from flaxqa.eval import questions as dataset

QUESTIONS = 25


@pytest.fixture(scope="module")
def loaded():
    return reader.load(MODEL, devices=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    questions = dataset.read(QUICKSTART / "heldout.json").questions[:QUESTIONS]
    rows = [{"id": one.id, "question": one.question, "context": one.context} for one in questions]
    rows[7]["question"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(source, loaded, tmp_path_factory):
    """A whole run and one of which a part is missing; of both the content in the end."""
    output = tmp_path_factory.mktemp("finished")
    batch.predict(config_of(source, output), reader=loaded)
    return output


def config_of(source, output, **options):
    return configured(source, output, shard_size=5, max_errors=1.0, **options)


def run(source, output, loaded, **options):
    return batch.predict(config_of(source, output), reader=loaded, **options)


# --- what is removed ---


FOREIGN = [
    "part-00000-abc.snappy.parquet", "part-list.csv", "_manifest-of-mine.txt", "._x", "notes.md",
    "_errors/notes.md", ".part-00000-of-00005.parquet.tmp", "part-00007-of-00009.parquet", "sub/x",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_restart_removes_nothing_where_there_is_something_else(
    source, loaded, finished, tmp_path, name
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="Nothing is removed") as told:
        run(source, output, loaded, restart=True)
    assert name.partition("/")[0] in str(told.value)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    # Without it the run goes on beside what is there.
    assert run(source, output, loaded).computed == 0
    assert (output / name).read_text() == "mine"


def test_restart_of_a_folder_of_another_program_removes_nothing(source, loaded, tmp_path):
    for name in ("part-00000-of-00005.parquet", "_SUCCESS", "errors.jsonl"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="_SUCCESS, errors.jsonl, part-00000-of-00005.parquet"):
        run(source, tmp_path, loaded, restart=True)
    assert (tmp_path / "part-00000-of-00005.parquet").read_text() == "mine"
    with pytest.raises(UsageError, match="has part-00000-of-00005.parquet but no _run.json"):
        run(source, tmp_path, loaded)


def test_restart_removes_all_that_the_run_wrote(source, loaded, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / ".part-00001-of-00005.parquet.abcd_123").write_text("half")
    (output / "_errors" / ".part-00001-of-00005.jsonl.abcd_123").write_text("half")
    assert run(source, output, loaded, restart=True).computed == QUESTIONS
    assert contents(output) == contents(finished)


def test_a_link_is_not_what_the_run_wrote(source, loaded, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    part = output / "part-00001-of-00005.parquet"
    kept = tmp_path / "elsewhere.parquet"
    part.rename(kept)
    part.symlink_to(kept)
    with pytest.raises(UsageError, match=part.name):
        run(source, output, loaded, restart=True)
    assert kept.exists()


@pytest.mark.parametrize(
    ("given", "output", "told"),
    [
        ("data", "data", "holds the input"),
        ("data", "data/out", "lies in the input data"),
        ("data", ".", "holds the input"),
        ("data/a.jsonl", "data", "holds the input"),
        ("data/**/*.jsonl", "data/out", "lies in the input"),
        ("data/*.jsonl", "data", "holds the input"),
        ("link", "data/out", "lies in the input link"),
    ],
)
def test_an_output_that_is_input_is_refused(
    source, loaded, tmp_path, monkeypatch, given, output, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(source, tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    for restart in (False, True):
        with pytest.raises(UsageError, match=told):
            run(given, output, loaded, restart=restart)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]


# --- what is believed ---


def damaged(content, rng):
    """A file with a bit, a byte or a piece that is another."""
    content = bytearray(content)
    at = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[at] = rng.randrange(256)
    elif kind == 2:
        del content[at : at + rng.randrange(1, 30)]
    else:  # a number is another
        digits = [place for place, byte in enumerate(content) if 48 <= byte < 58]
        content[rng.choice(digits or [at])] = 48 + rng.randrange(10)
    return bytes(content)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["_run.json", "_plan.json", "_manifest.jsonl", "_SUCCESS"])
def test_a_damaged_state_is_refused_by_name_or_ends_in_the_same_bytes(
    source, loaded, finished, tmp_path, name, seed
):
    reference, rng = contents(finished), random.Random(f"{name} {seed}")
    for index in range(int(os.environ.get("FLAXQA_FLIPS", "8"))):
        output = tmp_path / str(index)
        shutil.copytree(finished, output)
        if rng.random() < 0.5:  # while it goes on
            (output / "part-00003-of-00005.parquet").unlink()
        (output / name).write_bytes(damaged((output / name).read_bytes(), rng))
        problem = None
        try:
            summary = run(source, output, loaded)
        except FlaxqaError as error:
            problem = str(error)
            summary = run(source, output, loaded, restart=True)
        assert problem is None or name in problem
        assert summary.records == summary.answered + summary.set_aside == QUESTIONS
        assert contents(output) == reference


def resealed(path, change):
    """The file with another content and the checksum of that."""
    content = parts.unsealed(path.read_bytes())
    change(content)
    path.write_bytes(parts.sealed(content))


def twice(plan):
    plan["shards"][4][0][1] = plan["shards"][3][0][1]


@pytest.mark.parametrize(
    "change", [twice, lambda plan: plan["duplicates"].append(3), lambda plan: plan["shards"].pop()]
)
def test_another_plan_than_that_of_the_run_is_refused(source, loaded, finished, tmp_path, change):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    resealed(output / "_plan.json", change)
    for act in (lambda: run(source, output, loaded), lambda: batch.finalize(output)):
        with pytest.raises(DataError, match="_plan.json is not the plan of _run.json"):
            act()


def test_counts_come_from_the_parts(source, loaded, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    manifest = output / "_manifest.jsonl"
    lines = [parts.unsealed(line) for line in manifest.read_bytes().splitlines()]
    lines[2]["rows"] += 1
    manifest.write_bytes(b"".join(parts.line_of(parts.Entry(**line)) + b"\n" for line in lines))
    with pytest.raises(DataError, match="part-00002-of-00005.parquet has 5 answers and 0 records"):
        run(source, output, loaded)


def test_state_of_another_version_is_refused_by_name(source, loaded, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    resealed(output / "_plan.json", lambda plan: plan.update(inputs=[{"name": "a"}]))
    with pytest.raises(DataError, match="_plan.json is of another version"):
        run(source, output, loaded)


# --- what is read ---


def test_a_file_that_is_rewritten_while_it_is_read_gives_no_part(
    source, loaded, tmp_path, monkeypatch
):
    """Some bytes change, then come back, with size and time as before."""
    path = tmp_path / "a.jsonl"
    shutil.copy(source, path)
    status, content = path.stat(), path.read_bytes()
    lines = content.splitlines(keepends=True)
    lines[2] = lines[2].replace(b"the", b"THE").replace(b"The", b"THE")
    assert b"".join(lines) != content

    def rewrite(content):
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    real, calls = batch.records.rows_of, []

    def rows_of(plan, shard, sources):
        if not calls:
            calls.append(rewrite(b"".join(lines)))
        yield from real(plan, shard, sources)

    real_state = inputs.state_of
    monkeypatch.setattr(batch.records, "rows_of", rows_of)
    # As on a file system that keeps no time of changes.
    for module in (inputs, records):
        monkeypatch.setattr(module, "state_of", lambda path: real_state(path)[:2])
    output = tmp_path / "out"
    with pytest.raises(DataError, match="a.jsonl has changed since the run began"):
        run(path, output, loaded)
    assert not list(output.glob("part-*"))
    rewrite(content)
    run(path, output, loaded)
    assert len(list(output.glob("part-*"))) == 5


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_bytes_that_changed_with_size_and_time_kept_are_noticed(source, loaded, tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    path, output = tmp_path / name, tmp_path / "out"

    def write(rows):
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, compression="none",
                           use_dictionary=False, write_statistics=False)  # fmt: skip
        elif name == "a.csv":
            import pandas as pd

            pd.DataFrame(rows).to_csv(path, index=False)
        elif name == "a.json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    status = path.stat()
    run(path, output, loaded)
    (output / "part-00003-of-00005.parquet").unlink()
    word = rows[16]["question"].split()[-1]
    rows[16]["question"] = rows[16]["question"].replace(word, word[::-1])
    write(rows)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match=r"data.inputs\[0\].sha256: it was "):
        run(path, output, loaded)


def test_a_file_that_was_only_touched_goes_on(source, loaded, finished, tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    shutil.copy(source, path)
    shutil.copytree(finished, output)
    assert run(path, output, loaded).computed == 0
    os.utime(path)
    path.chmod(0o600)
    assert run(path, output, loaded).computed == 0


# --- where is written ---


def test_a_device_stays_a_device(tmp_path):
    files.write_named("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(TryAgain, match="/dev/full cannot be written: No space left"):
        files.write_named("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_fifo_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    came = []
    other = threading.Thread(target=lambda: came.append((tmp_path / "fifo").read_bytes()))
    other.start()
    files.write_named(tmp_path / "fifo", b"x" * 100_000)
    other.join()
    assert came == [b"x" * 100_000]
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


def test_the_target_of_a_link_is_written(tmp_path):
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for content in (b"new", b"once more"):
        files.write_named(link, content)
        assert target.read_bytes() == content
        assert link.is_symlink()
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(UsageError, match="cannot be .*written"):
        files.write_named(link, b"x")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="it is a folder"):
        files.write_named(tmp_path, b"x")
    with pytest.raises(UsageError, match="cannot be .*written"):
        files.write_named(tmp_path / ("n" * 300), b"x")


CLI = [sys.executable, "-m", "flaxqa.cli"]
HELDOUT = str(QUICKSTART / "heldout.json")
URL = "ftp://bucket/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", HELDOUT, "--model", MODEL, "--output", URL],
        ["predict", URL, "--model", MODEL, "--output", "out"],
        ["predict", HELDOUT, "--model", "ftp://x", "--output", "out"],
        ["predict", "--config", "https://x/y.toml", HELDOUT, "--output", "out"],
        ["eval", "--model", MODEL, "--data", HELDOUT, "--output", URL],
        ["eval", "--model", MODEL, "--data", URL, "--output", "out"],
        ["eval", "--model", MODEL, "--data", HELDOUT, "--output", "out", "--profile", URL],
        ["compare", "--model", MODEL, "--data", HELDOUT, "--output", URL],
        ["bench", "--model", MODEL, "--data", "file://x.json", "--output", "out"],
        ["report", URL],
        ["report", "out", "-o", URL],
        ["score", URL, HELDOUT],
        ["score", HELDOUT, URL],
        ["score", HELDOUT, HELDOUT, "-o", URL],
        ["export", "--model", MODEL, "--format", "onnx", "--output", URL],
        ["export", "--model", URL, "--format", "onnx", "--output", "out"],
        ["ask", "--model", URL, "--question", "who?", "--context", "me"],
        ["ask", "--model", MODEL, "--question", "who?", "--context-file", URL],
        # What a store has no place for.
        ["compare", "--model", MODEL, "--data", HELDOUT, "--output", "gs://bucket/x"],
        ["eval", "--model", MODEL, "--data", HELDOUT, "--output", "out", "--profile", "s3://b"],
        ["export", "--model", MODEL, "--format", "onnx", "--output", "s3://bucket/x"],
        ["report", "out", "-o", "s3://bucket/x.html"],
    ],
)
def test_urls_are_refused_before_anything_is_done(tmp_path, capsys, monkeypatch, arguments):
    from flaxqa import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flaxqa", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is a URL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_urls_are_refused_in_python(source, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (URL, "gs:/bucket/x", "zip::s3://bucket/x"):
        with pytest.raises(UsageError, match="is a URL"):
            run(source, name, loaded)
        with pytest.raises(UsageError, match="is a URL"):
            run(name, "out", loaded)
        with pytest.raises(UsageError, match="is a URL"):
            reader.load(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_fault_at_any_opening_of_a_file_is_told_and_resumed_from(
    source, loaded, finished, tmp_path, monkeypatch, begun
):
    """The k-th file of the run or of its input cannot be opened, for every k."""
    reference, real, faults = contents(finished), io.open, 0
    for k in itertools.count():
        output = tmp_path / str(k)
        if begun:  # it goes on where a part and the end are missing
            shutil.copytree(finished, output)
            (output / "part-00003-of-00005.parquet").unlink()
            (output / "_errors" / "part-00001-of-00005.jsonl").unlink()
        opened = itertools.count()

        def open_or_fail(file, *arguments, opened=opened, output=output, k=k, **options):
            ours = str(file).startswith((str(output), str(source)))
            if ours and next(opened) == k:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            return real(file, *arguments, **options)

        with monkeypatch.context() as patch:
            for module in (io, builtins):
                patch.setattr(module, "open", open_or_fail)
            inputs.sha256_of.cache_clear()
            problem = None
            try:
                run(source, output, loaded)
            except TryAgain as error:
                problem = str(error)
        faults += problem is not None
        assert problem is None or "Input/output error" in problem
        over = next(opened) <= k
        summary = run(source, output, loaded)
        assert summary.answered + summary.set_aside == summary.records == QUESTIONS
        assert contents(output) == reference
        if over:
            break
    assert faults >= 5


def test_missing_folders_of_a_named_file_are_made(tmp_path):
    files.write_named(tmp_path / "a" / "b" / "c.json", b"x")
    assert (tmp_path / "a" / "b" / "c.json").read_bytes() == b"x"
    with pytest.raises(UsageError, match="Not a directory"):
        files.write_named(tmp_path / "a" / "b" / "c.json" / "d", b"x")
