"""Data as people have them: pipes, compressions, encodings, columns inside columns, stand-ins."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from flaxqa import inputs, records
from flaxqa.config import DataOptions
from flaxqa.errors import DataError, UsageError
from flaxqa.eval import questions
from flaxqa.records import Columns

ROWS = [{"id": f"q{i}", "question": f"Who is {i}?", "context": f"He is Zoë {i}."} for i in range(5)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def asked(path, columns=None, size=10, **options):
    """What the records of an input ask, or why they do not."""
    columns = columns or Columns()
    found = inputs.find([str(path)], options=DataOptions(**options))
    plan = records.plan(found, size, columns=columns)
    rows = [row for shard in range(len(plan.shards)) for _, row in records.rows_of(plan, shard)]
    return [records.example_of(row, columns, max_context_chars=None) for row in rows]


def contexts(*arguments, **options):
    return [getattr(one, "context", one) for one in asked(*arguments, **options)]


# --- compressions ---


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_compressions(tmp_path, suffix, compress):
    many = LINES * 2_000
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(many))
    (tmp_path / f"b.json{suffix}").write_bytes(compress(json.dumps(ROWS).encode()))
    found = contexts(tmp_path / f"a.jsonl{suffix}", size=777)
    assert found == [row["context"] for row in ROWS] * 2_000
    assert contexts(tmp_path / f"b.json{suffix}") == [row["context"] for row in ROWS]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_a_damaged_compressed_file_is_read_as_far_as_it_goes(tmp_path, suffix, compress):
    whole = compress(LINES * 2_000)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    *_, last = contexts(tmp_path / f"a.jsonl{suffix}")
    assert "cannot be read from here on" in last
    (tmp_path / f"b.jsonl{suffix}").write_bytes(whole[:20] + b"\0" * 40)
    assert "cannot be read" in contexts(tmp_path / f"b.jsonl{suffix}")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES), "compressed by gzip.*end in .gz"),
        (lzma.compress(LINES), "compressed by xz"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"<!doctype html><p>Sign in", "an HTML page"),
        ("\ufeffid,question".encode("utf-16"), "UTF-16; convert it: iconv"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_what_is_not_what_its_name_says_is_told_of(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        asked(tmp_path / name)
    with pytest.raises(DataError, match=message):
        questions.read(tmp_path / name)


# --- encodings and delimiters ---


def write_csv(path, encoding="utf-8", delimiter=","):
    lines = [delimiter.join(("id", "question", "context")), *(
        delimiter.join(row.values()) for row in ROWS)]  # fmt: skip
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8", "utf-8-sig"])
def test_csv_in_other_encodings(tmp_path, encoding):
    path = write_csv(tmp_path / "a.csv", encoding)
    options = {} if encoding.startswith("utf") else {"encoding": encoding}
    assert contexts(path, **options) == [row["context"] for row in ROWS]


def test_the_wrong_encoding_is_told_of_with_its_byte_and_the_way_out(tmp_path):
    path = write_csv(tmp_path / "a.csv", "cp1252")
    assert contexts(path)[0] == (
        "byte 21 of the record, 0xEB, is not UTF-8; if the file has another encoding, name it: "
        "--encoding cp1252"
    )
    (tmp_path / "a.jsonl").write_bytes('{"question": "?", "context": "Zoë"}'.encode("cp1252"))
    assert "0xEB, is not UTF-8" in contexts(tmp_path / "a.jsonl")[0]
    assert contexts(tmp_path / "a.jsonl", encoding="cp1252") == ["Zoë"]


@pytest.mark.parametrize(("delimiter", "written"), [(";", "';'"), ("\t", "tab"), ("|", "'|'")])
def test_another_delimiter_is_taken_and_guessed_for_the_message(tmp_path, delimiter, written):
    path = write_csv(tmp_path / "a.csv", delimiter=delimiter)
    assert contexts(path, delimiter=written.strip("'")) == [row["context"] for row in ROWS]
    with pytest.raises(UsageError, match=f"--delimiter {written}".replace("|", r"\|")):
        asked(path)
    with pytest.raises(DataError, match="--delimiter"):
        questions.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": ";;"}, "one character, or tab"),
        ({"encoding": "utf-16"}, "iconv"),
        ({"encoding": "klingon"}, "does not know"),
        ({"encoding": "zlib"}, "does not know"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DataOptions(**options)


# --- columns ---


def nested(row):
    return {"meta": {"id": row["id"]}, "in": {"deep": {"question": row["question"]}},
            "in.text": row["context"]}  # fmt: skip


INSIDE = Columns("meta.id", "in.deep.question", "in.text", keep=("meta",))


def test_columns_inside_columns(tmp_path):
    rows = [nested(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.parquet", "a.json"):
        found = asked(tmp_path / name, INSIDE)
        assert [(one.id, one.question, one.context) for one in found] == [
            tuple(row.values()) for row in ROWS
        ]


def test_a_column_that_is_inside_no_record_is_told_of(tmp_path):
    pq.write_table(pa.Table.from_pylist([nested(row) for row in ROWS]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no column 'other.question'; it has meta, in, in.text"):
        asked(tmp_path / "a.parquet", Columns(question="other.question", context="in.text"))
    wrong = Columns(question="in.shallow", context="in.text")
    assert "no column 'in.shallow'" in asked(tmp_path / "a.parquet", wrong)[0]


def test_a_column_that_no_record_has_is_told_of_before_anything_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UsageError, match="none of the first 100 records of a.jsonl.*'q'"):
        asked(tmp_path / "a.jsonl", Columns(question="q"))
    (tmp_path / "many.jsonl").write_bytes(b'{"id": "1", "context": "c"}\n' * 100)
    with pytest.raises(UsageError, match="the column 'question'"):
        asked(tmp_path / "many.jsonl")
    # A few records, or those that cannot be read, are set aside.
    (tmp_path / "few.jsonl").write_bytes(b'{"id": "1", "context": "c"}\n' * 99)
    assert len(asked(tmp_path / "few.jsonl")) == 99
    (tmp_path / "bad.jsonl").write_bytes(b"{\n" * 200)
    assert len(asked(tmp_path / "bad.jsonl", Columns(question="q"))) == 200


# --- pipes ---


def run(arguments, stdin):
    return subprocess.run(
        [sys.executable, "-m", "flaxqa", *map(str, arguments)], input=stdin, capture_output=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES)])
def test_standard_input_is_answered_and_resumed(tmp_path, content):
    command = ["predict", "-", "--output", tmp_path / "out", "--input-format", "jsonl", "--model",
               QUICKSTART / "checkpoint", "--format", "jsonl", "--shard-size", "2"]  # fmt: skip
    done = run(command, content)
    assert done.returncode == 0, done.stderr
    parts = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    assert len(parts) == 3
    (tmp_path / "out" / sorted(parts)[1]).unlink()
    again = run(command, content)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["computed"] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")} == parts
    other = run(command, LINES + LINES)
    assert other.returncode == 2
    assert b"has another run" in other.stderr


def test_a_pipe_needs_a_format_and_a_terminal_is_none(tmp_path):
    command = ["predict", "/dev/stdin", "--output", tmp_path / "out", "--model",
               QUICKSTART / "checkpoint"]  # fmt: skip
    assert b"give --input-format" in run(command, LINES).stderr


def test_a_fifo_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(LINES))
    writer.start()
    assert contexts(tmp_path / "pipe", input_format="jsonl") == [row["context"] for row in ROWS]
    writer.join()


def test_evaluation_reads_a_fifo_and_standard_input(tmp_path):
    content = (QUICKSTART / "heldout.json").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    assert len(questions.read(tmp_path / "pipe").questions) == 559
    writer.join()
    done = run(["eval", "--data", "-", "--model", QUICKSTART / "checkpoint", "--limit", "5",
                "--output", tmp_path / "out"], gzip.compress(content))  # fmt: skip
    assert done.returncode == 0, done.stderr
