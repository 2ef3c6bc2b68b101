import dataclasses
import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flaxqa import inputs as named
from flaxqa import records, sources
from flaxqa import text as texts
from flaxqa.config import DataOptions
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.features import Example
from flaxqa.records import Columns, Plan
from flaxqa.rows import Row, to_json


def record(number, **more):
    return {
        "id": f"q{number}",
        "question": f"Who is {number}?",
        "context": f"He is {number}.",
    } | more


def write_jsonl(path, rows):
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def planned(*paths, size=10, columns=None, **options):
    inputs = named.find([str(path) for path in paths], **{
        name: options.pop(name) for name in ("format", "split") if name in options
    })  # fmt: skip
    return records.plan(inputs, size, columns=columns or Columns(), **options)


def every_row(plan):
    return [pair for shard in range(len(plan.shards)) for pair in records.rows_of(plan, shard)]


def parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_every_format_gives_the_same_records(tmp_path):
    rows = [record(i) for i in range(25)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "a.ndjson", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    write_jsonl(tmp_path / "a.jsonl.gz", rows)
    write_jsonl(tmp_path / "a.jsonl.zst", rows)
    parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    pa_csv = "\n".join(["id,question,context"] + [",".join(row.values()) for row in rows])
    (tmp_path / "a.csv").write_text(pa_csv + "\n")
    (tmp_path / "a.tsv").write_text(pa_csv.replace(",", "\t") + "\n")
    (tmp_path / "array.json").write_text(json.dumps(rows))
    qas = [{"id": row["id"], "question": row["question"]} for row in rows]
    paragraphs = [
        {"context": row["context"], "qas": [qa]} for row, qa in zip(rows, qas, strict=True)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    files = sorted(path for path in tmp_path.iterdir())
    assert len(files) == 10
    for path in files:
        plan = planned(path)
        assert [sum(one.records for one in shard) for shard in plan.shards] == [10, 10, 5]
        found = every_row(plan)
        assert [number for number, _ in found] == list(range(25))
        for (_, row), wanted in zip(found, rows, strict=True):
            assert row.reason is None
            assert dict(row.fields) == wanted
            assert row.file == path.name
        # Any shard alone is the same as in its turn.
        for shard in (2, 0, 1):
            wanted = [row for number, row in found if number // 10 == shard]
            assert [row for _, row in records.rows_of(plan, shard)] == wanted


def test_shards_span_files_and_depend_on_the_input_alone(tmp_path):
    for name, size in (("b", 4), ("a", 13), ("c", 9)):
        write_jsonl(tmp_path / f"{name}.jsonl", [record(f"{name}{i}") for i in range(size)])
    plan = planned(tmp_path, size=10)
    assert [one.name for one in plan.inputs] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [[one.records for one in shard] for shard in plan.shards] == [[10], [3, 4, 3], [6]]
    ids = [row.fields["id"] for _, row in every_row(plan)]
    assert ids == [f"q{name}{i}" for name, n in (("a", 13), ("b", 4), ("c", 9)) for i in range(n)]
    assert planned(tmp_path, size=10) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert planned(tmp_path, size=7).shards != plan.shards


def test_lines_and_bytes_of_a_text_file_are_told(tmp_path):
    lines = [json.dumps(record(i)) for i in range(6)]
    content = (
        f"\n{lines[0]}\n  \n{lines[1]}\r\n\n{lines[2]}\n{lines[3]}\n\n\n{lines[4]}\n{lines[5]}"
    )
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    found = [row for _, row in every_row(planned(path, size=2))]
    assert [row.line for row in found] == [2, 4, 6, 7, 10, 11]
    for row, line in zip(found, lines, strict=True):
        assert content[row.byte_offset :].startswith(line)
        assert row.fields == json.loads(line)
        assert row.raw.decode().strip() == line


BAD_LINES = {
    b'{"question": "a"': "the line is not JSON",
    b"question": "the line is not JSON",
    b'{"question": "\xff"}': "byte 14 of the line, 0xFF, is not UTF-8",
    b"[1, 2]": "the line is an array, not an object",
    b"7": "the line is a number, not an object",
    b'"text"': "the line is a string, not an object",
    b"true": "the line is a truth value, not an object",
    b"null": "the line is null, not an object",
    b"[" * 100_000: "the line is nested too deep",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "the line is nested too deep",
    b'{"id": ' + b"9" * 5_000 + b"}": "the line is not JSON",
    b"{} {}": "the line is not JSON: Extra data",
    b'{"a": 1}\x00': "the line is not JSON",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_cannot_be_read_is_told_of_and_the_others_are_read(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(record(i)).encode() for i in range(4)]
    path.write_bytes(b"\n".join([*good[:2], bad, *good[2:]]))
    found = [row for _, row in every_row(planned(path, size=2))]
    assert [row.fields and row.fields["id"] for row in found] == ["q0", "q1", None, "q2", "q3"]
    assert found[2].reason.startswith(BAD_LINES[bad])
    assert (found[2].line, found[2].byte_offset) == (3, len(good[0]) + len(good[1]) + 2)
    json.dumps(found[2].as_text())


def test_a_line_that_is_too_long_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_LINE", 1_000)
    monkeypatch.setattr(texts, "BLOCK", 300)
    for name, size in (("long", 5_000), ("just", 999), ("even", 1_000)):
        path = tmp_path / f"{name}.jsonl"
        long = json.dumps(record(1, context="x" * 900)).ljust(size - 1)
        path.write_text(f"{json.dumps(record(0))}\n{long}\n{json.dumps(record(2))}\n")
        found = [row for _, row in every_row(planned(path, size=1))]
        assert [row.line for row in found] == [1, 2, 3]
        assert [row.reason is None for row in found] == [True, size <= 1_000, True]
    found = [row for _, row in every_row(planned(tmp_path / "long.jsonl", size=1))]
    assert found[1].reason == "the line has more than 1,000 bytes"
    assert found[2].fields["id"] == "q2"


def test_csv_has_quotes_line_breaks_and_bad_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,question,context\r\n"
        b'1,"Who, me?","two\nlines and ""quotes"""\r\n'
        b"\r\n"
        b"2,too,many,fields\n"
        b"3,few\n"
        b'4,"bad"quote,x\n'
        b"5,\xff,invalid\n"
        b"6,Where?,Here.\n"
    )
    plan = planned(path, size=2)
    found = [row for _, row in every_row(plan)]
    assert found[0].fields == {
        "id": "1",
        "question": "Who, me?",
        "context": 'two\nlines and "quotes"',
    }
    assert found[0].raw == b'1,"Who, me?","two\nlines and ""quotes"""\r\n'
    assert [row.line for row in found] == [2, 5, 6, 7, 8, 9]
    assert found[1].reason == "the row has 4 fields, the header 3"
    assert found[2].reason == "the row has 2 fields, the header 3"
    assert "expected after" in found[3].reason
    assert "byte 2 of the record, 0xFF, is not UTF-8" in found[4].reason
    assert found[5].fields["context"] == "Here."
    content = path.read_bytes()
    assert all(content[row.byte_offset :].startswith(row.raw) for row in found)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_is_cut_is_read_as_far_as_it_goes(tmp_path, suffix):
    rows = [record(i, context=random.Random(i).randbytes(200).hex()) for i in range(500)]
    path = write_jsonl(tmp_path / f"a{suffix}", rows)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 3, 40):
        path.write_bytes(whole[:cut])
        found = [row for _, row in every_row(planned(path, size=100))]
        assert found[-1].reason.startswith("the file cannot be read from here on: Truncated")
        readable = found[:-1]
        assert [row.fields for row in readable] == rows[: len(readable)]
        # What is lost is what follows the cut, and before it a block of the compression.
        assert len(readable) >= 500 * cut / len(whole) - (270 if suffix.endswith("zst") else 20)


def test_concatenated_compressed_files_are_read_to_the_end(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl.gz", [record(0), record(1)]).read_bytes()
    two = write_jsonl(tmp_path / "b.jsonl.gz", [record(2)]).read_bytes()
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(one + two)
    assert [row.fields["id"] for _, row in every_row(planned(path))] == ["q0", "q1", "q2"]


def test_a_damaged_parquet_file_loses_no_record_silently(tmp_path):
    rows = [record(i, context="He is somebody. " * 40 + str(i)) for i in range(300)]
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=100, compression="zstd")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        damaged = bytearray(whole)
        place = int(rng.integers(4, len(whole)))
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged) if rng.random() < 0.8 else whole[:place])
        found = [row for _, row in every_row(planned(path, size=64))]
        bad = [row for row in found if row.reason is not None]
        seen.add(len(found) - len(bad))
        assert len(found) == 300 or (len(found) == len(bad) == 1)
        for row in found:
            assert (row.fields is None) == (row.reason is not None)
    assert {0, 200, 300} & seen  # all kinds of damage were met


def test_squad_data_with_what_is_not_as_it_should_be(tmp_path):
    data = [
        {"title": "T", "paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q"}, 7]}]},
        {"title": "no paragraphs"},
        {"paragraphs": [{"context": "no questions"}, {"qas": [{"id": "2", "question": "q"}]}]},
        "not an article",
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    found = [row for _, row in every_row(planned(path, size=2))]
    assert [row.line for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[0].fields == {"context": "c", "title": "T", "id": "1", "question": "q"}
    reasons = [row.reason for row in found]
    assert reasons[1] == "data[0].paragraphs[0].qas[1] must be an object, it is a number"
    assert reasons[2] == "data[1].paragraphs must be a list, it is missing"
    assert reasons[3] == "data[2].paragraphs[0].qas must be a list, it is missing"
    assert reasons[5] == "data[3].paragraphs must be a list, it is a string"
    asked = records.example_of(found[4], Columns(), max_context_chars=9)
    assert asked == "the column 'context' is null, not a string"


def test_names_that_collide_are_told_apart_as_the_user_wrote_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder / "s").mkdir(parents=True)
        (tmp_path / folder / "s" / "x.jsonl").write_text("{}")
    assert [one.name for one in named.find(["a", "b"])] == ["a/s/x.jsonl", "b/s/x.jsonl"]


@pytest.mark.parametrize("name", ["no/such", "no/such/", "nodir/", "no/such/file", "x.jsonl"])
def test_a_path_that_is_missing_is_never_a_traceback(tmp_path, monkeypatch, name):
    import huggingface_hub

    def unreachable(self, path, revision):
        raise RuntimeError("no network")  # as httpx's errors, which are no OSError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises((UsageError, TryAgain), match="missing|neither a file or folder here nor"):
        records.plan(named.find([name]), 10, columns=records.Columns())


def test_a_column_that_no_record_has_is_refused_when_it_was_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "context": "c", "n": 1}\n')
    inputs = named.find([str(tmp_path / "a.jsonl")])
    assert records.plan(inputs, 10, columns=records.Columns(keep=("n",))).records == 1
    for columns in (records.Columns(keep=("m",)), records.Columns(id="m")):
        with pytest.raises(UsageError, match="none of the first 100 records of a.jsonl has .* 'm'"):
            records.plan(inputs, 10, columns=columns)


def test_a_json_file_of_something_else_is_one_bad_record(tmp_path):
    for name, content, reason in (
        ("a", '{\n"question": "q"\n}', "neither SQuAD data nor an array"),
        ("b", "[1,\n2", "the file is not JSON"),
        ("c", '[\n{"question": "q"}, 3]', "a number, not an object"),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(content)
        found = [row for _, row in every_row(planned(path))]
        assert reason in found[-1].reason


# --- finding ---


def test_folders_and_patterns_stand_for_their_files_in_order(tmp_path):
    for name in (
        "b/2.jsonl",
        "b/10.jsonl",
        "a/x.csv",
        "_skipped/x.jsonl",
        ".hidden.jsonl",
        "z.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("id,question,context\n" if name.endswith("csv") else "{}\n")
    names = [one.name for one in named.find([str(tmp_path)])]
    assert names == ["a/x.csv", "b/10.jsonl", "b/2.jsonl"]
    names = [one.name for one in named.find([str(tmp_path / "b" / "*.jsonl")])]
    assert names == ["10.jsonl", "2.jsonl"]
    names = [one.name for one in named.find([str(tmp_path / "**" / "*.jsonl")])]
    assert names[-2:] == ["b/10.jsonl", "b/2.jsonl"]


def test_what_stands_for_nothing_is_refused_all_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    names = ["a.jsonl", "a.jsonl", "a.txt", "no.jsonl", "*.csv", "empty"]
    with pytest.raises(UsageError) as error:
        named.find([str(tmp_path / name) for name in names])
    for told in ("a.jsonl is named twice", "its name tells no format", "no.jsonl is missing",
                 "*.csv matches no file", "empty has no files of"):  # fmt: skip
        assert told in str(error.value)
    assert (
        named.find([str(tmp_path / "a.txt")], options=DataOptions(input_format="jsonl"))[0].format
        == "jsonl"
    )


def test_a_link_that_leads_out_of_a_folder_is_refused(tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UsageError, match="a link that leads out of"):
        named.find([str(tmp_path / "data")])
    (tmp_path / "data" / "a.jsonl").unlink()
    (tmp_path / "data" / "b.jsonl").write_text("{}\n")
    (tmp_path / "data" / "c.jsonl").symlink_to("b.jsonl")
    with pytest.raises(UsageError, match="named twice"):
        named.find([str(tmp_path / "data")])


def test_a_column_that_is_missing_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "a.csv").write_text("qid,question,passage\n1,q,c\n")
    parquet(tmp_path / "b.parquet", [{"question": "q", "text": "c"}])
    with pytest.raises(UsageError) as error:
        planned(tmp_path)
    assert "a.csv has no column 'context'; it has qid, question, passage" in str(error.value)
    assert "b.parquet has no column 'context'" in str(error.value)
    plan = planned(tmp_path / "a.csv", columns=Columns(id="qid", context="passage"))
    ((_, row),) = every_row(plan)
    asked = records.example_of(row, Columns(id="qid", context="passage"), max_context_chars=9)
    assert asked == Example("1", "q", "c")


def test_input_without_records_or_that_is_gone_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n")
    with pytest.raises(UsageError, match="the input has no record"):
        planned(path)
    inputs = named.find([str(path)])
    path.unlink()
    with pytest.raises(TryAgain, match="cannot be read"):
        records.plan(inputs, 10, columns=Columns())


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [record(i) for i in range(30)])
    plan = planned(path)
    assert plan.is_of(named.find([str(path)]), 10, False)
    write_jsonl(path, [record(i) for i in range(31)])
    with pytest.raises(DataError, match="has changed since the run began"):
        list(records.rows_of(plan, 1))
    assert not plan.is_of(named.find([str(path)]), 10, False)


# --- ids and texts ---


def test_ids_that_came_before_are_found_over_all_input(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [record(i) for i in (0, 1, 2, 1)])
    b = write_jsonl(tmp_path / "b.jsonl", [record(i) for i in (3, 0, 1, 4)])
    parquet(tmp_path / "c.parquet", [record(i) for i in (4, 5)])
    write_jsonl(tmp_path / "d.jsonl.gz", [record(i) for i in (5, 6)])
    plan = planned(tmp_path, size=3, unique_ids=True)
    assert plan.duplicates == (3, 5, 6, 8, 10)
    assert dataclasses.replace(plan, duplicates=(), unique_ids=False) == planned(tmp_path, size=3)
    assert planned(tmp_path, size=3).duplicates == ()
    for path in (a, b):  # bad lines and missing ids are no duplicates
        path.write_text('{"question": "q"}\n{}\nx\nx\n{"id": null}\n{"id": [1]}\n{"id": [1]}\n')
    assert planned(a, b, unique_ids=True).duplicates == ()


def row(**fields):
    return Row("f.jsonl", 7, 0, b"", fields)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"id": "a", "question": "q", "context": "c"}, Example("a", "q", "c")),
        ({"id": 12, "question": "q", "context": "c"}, Example("12", "q", "c")),
        ({"question": "q", "context": "c"}, Example("f.jsonl:7", "q", "c")),
        ({"id": None, "question": "q", "context": "c"}, Example("f.jsonl:7", "q", "c")),
        ({"id": True, "question": "q", "context": "c"},
         "the column 'id' is a truth value, not a string or an integer"),
        ({"id": 1.5, "question": "q", "context": "c"},
         "the column 'id' is a number, not a string or an integer"),
        ({"id": "\ud800", "question": "q", "context": "c"},
         "the column 'id' has a lone surrogate at character 0"),
        ({"question": "q"}, "the record has no column 'context'"),
        ({"question": ["q"], "context": "c"}, "the column 'question' is an array, not a string"),
        ({"question": "q", "context": None}, "the column 'context' is null, not a string"),
        ({"question": "q", "context": "c" * 10}, "the context has 10 characters, more than 9"),
        ({"question": "q", "context": "c", "more": "x\ud800"},
         "the column 'more' has a lone surrogate at character 1"),
    ],
)  # fmt: skip
def test_what_a_record_asks_or_why_it_cannot_be_asked(fields, asked):
    columns = Columns(keep=("more",))
    assert records.example_of(row(**fields), columns, max_context_chars=9) == asked


def test_a_row_goes_into_the_file_of_errors_as_it_was():
    assert Row("f", 1, 0, b"caf\xe9\n", None, "bad").as_text() == "caf\\xe9\n"
    assert Row("f", 1, None, None, {"a": 1, "b": b"\xff"}, "bad").as_text() == {
        "a": 1, "b": "b'\\xff'"
    }  # fmt: skip
    assert Row("f", 1, None, None, None, "bad").as_text() is None


def test_a_streamed_data_set_is_cut_like_a_file(monkeypatch):
    import datasets

    rows = [record(i) for i in range(25)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    monkeypatch.setattr(named, "hub_commit", lambda one: one)
    plan = planned("rajpurkar/squad", split="validation")
    assert plan.inputs[0].format == "hub"
    assert plan.records == 25
    for shard in (0, 1, 2, 1):
        found = [row.fields for _, row in records.rows_of(plan, shard)]
        assert found == rows[10 * shard : 10 * shard + 10]


HEADER = "id,question,context\n"


def csv_rows(path, text):
    path.write_text(HEADER + text)
    return [(row.line, row.fields and row.fields["id"], row.reason) for _, row in every_row(
        planned(path, size=7))]  # fmt: skip


GOOD = [f'{i},who {i}?,"he, {i}"\n' for i in range(30)]


@pytest.mark.parametrize(
    "broken", ['x,"who?,no end\n', 'x,who?,"no end\n', '"x\n', 'x,"a"b,c\n', 'x,"two\nlines,c\n']
)
@pytest.mark.parametrize("at", [0, 7, 30])
def test_a_quote_that_is_not_closed_is_one_bad_line(tmp_path, broken, at):
    found = csv_rows(tmp_path / "a.csv", "".join([*GOOD[:at], broken, *GOOD[at:]]))
    assert [name for _, name, reason in found if reason is None] == [str(i) for i in range(30)]
    bad = [(line, reason) for line, _, reason in found if reason is not None]
    assert len(bad) == broken.count("\n")
    assert bad[0][0] == at + 2


def test_a_quote_that_is_closed_lines_later_is_one_record(tmp_path):
    found = csv_rows(tmp_path / "a.csv", 'x,who?,"one\ntwo\n\nfour"\n' + GOOD[0])
    assert found == [(2, "x", None), (6, "0", None)]


def test_an_open_quote_before_megabytes_costs_no_more_than_reading_them(tmp_path):
    lines = 'x,"open\n' * 3 + "1,who?,he\n" * 300_000
    found = csv_rows(tmp_path / "a.csv", lines)
    assert len(found) == 300_003
    assert [line for line, _, reason in found if reason] == [2, 3, 4]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_twice_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("id,question,context,question\n1,a,b,c\n")
    else:
        arrays = [pa.array([text]) for text in "1abc"]
        names = ["id", "question", "context", "question"]
        pq.write_table(pa.Table.from_arrays(arrays, names=names), path)
    with pytest.raises(UsageError, match="has the column 'question' twice"):
        planned(path)


def strange_columns():
    """Of two rows, the second with what Python's types do not have."""
    late = pa.array([0, 253_402_300_800 * 1_000_000], pa.int64())
    offsets = pa.py_buffer(np.array([0, 2, 4], np.int32))
    bad_text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    return {
        "late": late.view(pa.timestamp("us")),
        "nowhere": late.view(pa.timestamp("us", tz="Mars/Olympus")),
        "long": pa.array([0, 2**62], pa.int64()).view(pa.duration("s")),
        "text": bad_text,
        "nested": pa.StructArray.from_arrays([late.view(pa.timestamp("us"))], names=["at"]),
    }


@pytest.fixture
def strange(tmp_path):
    asked = {name: [f"{name} {i}" for i in range(2)] for name in ("id", "question", "context")}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(asked | strange_columns()), path, store_schema=True)
    return path


def test_columns_that_nobody_asks_for_are_not_read(strange):
    wanted = Columns().wanted()
    rows = records.rows_of(planned(strange), 0, lambda one: sources.source_of(one, wanted))
    assert [row.fields.keys() for _, row in rows] == [set(wanted)] * 2


@pytest.mark.parametrize("name", ["late", "nowhere", "long", "text", "nested"])
def test_a_value_that_python_does_not_have_is_arrows(strange, name):
    columns = Columns(keep=(name,))
    plan = planned(strange, columns=columns)
    read = records.rows_of(plan, 0, lambda one: sources.source_of(one, columns.wanted()))
    first, second = (row for _, row in read)
    assert first.reason is None
    json.dumps(second.as_text())  # it can be told of
    if name == "text":
        assert second.fields is None
        assert "the column 'text' cannot be read" in second.reason
    else:
        assert second.fields[name].type == pq.read_schema(strange).field(name).type


@pytest.mark.parametrize("wrong", [5, None, "text", [1], 1.5])
def test_what_is_no_record_is_set_aside_and_the_rest_is_read(tmp_path, wrong):
    good = record(1)
    (tmp_path / "list.json").write_text(json.dumps([good, wrong, record(2)]))
    qas = [{"id": "1", "question": "who?"}, wrong, {"id": "2", "question": "what?"}]
    data = [
        wrong,
        {"paragraphs": [wrong, {"context": "it", "qas": qas}, {"context": "it", "qas": wrong}]},
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": data}))
    for name, places in {"list.json": [1], "squad.json": [0, 1, 3, 5]}.items():
        rows = [row for _, row in every_row(planned(tmp_path / name))]
        asked = [records.example_of(row, Columns(), max_context_chars=100) for row in rows]
        assert [i for i, one in enumerate(asked) if isinstance(one, str)] == places
        for place in places:
            assert rows[place].fields is None
            json.dumps(rows[place].as_text())


def test_numbers_that_json_does_not_have_are_null():
    told = to_json({"a": [float("nan"), 1.5], "b": (float("inf"), {"c": -float("inf")})},
                           repr)  # fmt: skip
    assert json.loads(told) == {"a": [None, 1.5], "b": [None, {"c": None}]}


def test_rows_that_a_parquet_file_promises_and_has_not_are_told_of(tmp_path, monkeypatch):
    """As damaged metadata do: each is one record that cannot be read."""
    path = parquet(tmp_path / "a.parquet", [record(i) for i in range(6)], row_group_size=3)
    real = pq.ParquetFile.iter_batches

    def fewer(self, *arguments, row_groups, **options):
        for batch in real(self, *arguments, row_groups=row_groups, **options):
            yield batch.slice(0, 2) if row_groups == [1] else batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fewer)
    rows = [row for _, row in every_row(planned(path, size=4, unique_ids=True))]
    assert [row.reason for row in rows] == [None] * 5 + ["the row cannot be read: it is missing"]
