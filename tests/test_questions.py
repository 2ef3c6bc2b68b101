"""Questions with right answers out of every format, and what cannot be scored."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

import flaxqa
from flaxqa import batch
from flaxqa.config import DataOptions, PredictConfig
from flaxqa.errors import DataError
from flaxqa.eval import questions

N = 24
MODEL = str(QUICKSTART / "checkpoint")


@pytest.fixture(scope="module")
def asked():
    return questions.read(QUICKSTART / "heldout.json").questions[:N]


@pytest.fixture(scope="module")
def rows(asked):
    """As `datasets` gives them."""
    return [
        {"id": one.id, "title": "t", "context": one.context, "question": one.question,
         "answers": {"text": list(one.answers),
                     "answer_start": [one.context.find(text) for text in one.answers]}}
        for one in asked
    ]  # fmt: skip


def squad_of(asked):
    paragraphs = [
        {"context": one.context,
         "qas": [{"id": one.id, "question": one.question,
                  "answers": [{"text": text, "answer_start": one.context.find(text)}
                              for text in one.answers]}]}
        for one in asked
    ]  # fmt: skip
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def lines(items):
    return "".join(json.dumps(one) + "\n" for one in items).encode()


def mrqa_of(asked):
    header = {"header": {"dataset": "here", "split": "dev"}}
    return [header, *({"id": "", "context": one.context, "context_tokens": [],
                       "qas": [{"qid": one.id, "question": one.question, "question_tokens": [],
                                "answers": list(one.answers), "detected_answers": []}]}
                      for one in asked)]  # fmt: skip


def save(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder)


def save_dict(folder, rows):
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": whole.select([0]), "validation": whole}).save_to_disk(folder)


def as_csv(path, rows):
    table = [{**row, "answers": json.dumps(row["answers"])} for row in rows]
    datasets.Dataset.from_list(table).to_csv(path)


WRITERS = {
    "squad.json": lambda path, rows, asked: path.write_text(json.dumps(squad_of(asked))),
    "squad.json.gz": lambda path, rows, asked: path.write_bytes(
        gzip.compress(json.dumps(squad_of(asked)).encode())
    ),
    "squad.json.zst": lambda path, rows, asked: path.write_bytes(
        pa.compress(json.dumps(squad_of(asked)).encode(), codec="zstd", asbytes=True)
    ),
    "noname": lambda path, rows, asked: path.write_text(json.dumps(squad_of(asked))),
    "array.json": lambda path, rows, asked: path.write_text(json.dumps(rows, indent=1)),
    "run_qa.json": lambda path, rows, asked: path.write_text(json.dumps({"data": rows})),
    "rows.jsonl": lambda path, rows, asked: path.write_bytes(lines(rows)),
    "rows.jsonl.gz": lambda path, rows, asked: path.write_bytes(gzip.compress(lines(rows))),
    "rows.json": lambda path, rows, asked: path.write_bytes(lines(rows)),
    "rows.parquet": lambda path, rows, asked: pq.write_table(pa.Table.from_pylist(rows), path),
    "rows.feather": lambda path, rows, asked: pyarrow.feather.write_feather(
        pa.Table.from_pylist(rows), path
    ),
    "rows.csv": lambda path, rows, asked: as_csv(path, rows),
    "saved": lambda path, rows, asked: save(path, rows),
    "saved_dict": lambda path, rows, asked: save_dict(path, rows),
    "mrqa.jsonl": lambda path, rows, asked: path.write_bytes(lines(mrqa_of(asked))),
    "mrqa.jsonl.gz": lambda path, rows, asked: path.write_bytes(
        gzip.compress(lines(mrqa_of(asked)))
    ),
}


@pytest.fixture(scope="module")
def loaded():
    return flaxqa.load(MODEL, devices=1)


@pytest.fixture(scope="module")
def wanted(asked, loaded):
    return [found[0].text if found else None for found in loaded.answers(asked)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_questions_and_the_same_answers(
    tmp_path, name, rows, asked, loaded, wanted
):
    path = tmp_path / name
    WRITERS[name](path, rows, asked)
    found = questions.read(path)
    assert found.questions == asked
    assert not found.v2
    if name == "noname":  # whose format nothing tells but that it is to be scored
        return
    split = "validation" if name == "saved_dict" else None
    output = tmp_path / "out"
    config = PredictConfig(input=(str(path),), output=str(output), model=MODEL, split=split)
    done = batch.predict(config, reader=loaded)
    assert (done.answered, done.set_aside) == (N, 0)
    table = pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*"))])
    assert table["answer"].to_pylist() == wanted
    assert table["id"].to_pylist() == [one.id for one in asked]


def test_mrqa_lines_of_many_questions_are_cut_into_shards_anywhere(tmp_path, asked, loaded):
    by_context = {}
    for one in asked:
        by_context.setdefault(one.context, []).append(one)
    content = [{"header": {"dataset": "here"}}]
    for context, some in by_context.items():
        qas = [{"qid": one.id, "question": one.question, "answers": ["x"]} for one in some]
        content.append({"context": context, "qas": qas})
    (tmp_path / "mrqa.jsonl").write_bytes(lines(content))
    output = tmp_path / "out"
    config = PredictConfig(
        input=(str(tmp_path / "mrqa.jsonl"),), output=str(output), model=MODEL, shard_size=7
    )
    assert batch.predict(config, reader=loaded).answered == N
    parts = [pq.read_table(part) for part in sorted(output.glob("part-*"))]
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    assert pa.concat_tables(parts)["id"].to_pylist() == [
        one.id for some in by_context.values() for one in some
    ]


def test_ids_that_are_integers_are_taken_as_their_text(tmp_path, rows):
    numbered = [{**row, "id": number} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_bytes(lines(numbered))
    found = questions.read(tmp_path / "rows.jsonl").questions
    assert [one.id for one in found] == [str(number) for number in range(N)]


def test_rows_without_an_answer_make_the_data_squad_2(tmp_path, rows):
    nothing = {"text": [], "answer_start": []}
    (tmp_path / "rows.jsonl").write_bytes(lines([rows[0], {**rows[1], "answers": nothing}]))
    assert questions.read(tmp_path / "rows.jsonl").v2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_what_has_no_right_answers_is_refused_with_the_way_out(tmp_path, rows, suffix):
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in rows]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(lines(bare))
    elif suffix == "csv":
        datasets.Dataset.from_list(bare).to_csv(path)
    else:
        pq.write_table(pa.Table.from_pylist(bare), path)
    with pytest.raises(DataError, match=r"has no right answers.*`flaxqa predict` answers"):
        questions.read(path)


def test_columns_may_have_other_names(tmp_path, rows, asked):
    names = {"id": "qid", "question": "q", "context": "passage"}
    renamed = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(renamed), tmp_path / "rows.parquet")
    options = DataOptions(columns=names)
    assert questions.read(tmp_path / "rows.parquet", options).questions == asked
    with pytest.raises(DataError, match="has no column 'question', 'context'; it has qid"):
        questions.read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"answers": {"start": []}}, "rows.jsonl:2: answers has no 'text'"),
     ({"answers": 7}, "answers must be a list, it is a number"),
     ({"answers": [7]}, r"answers\[0\].text must be a string, it is a number"),
     ({"answers": "{"}, "answers is text and not JSON"),
     ({"answers": None}, "rows.jsonl:2: the record has no column 'answers'"),
     ({"id": [1]}, "the column 'id' is an array, not a string or an integer"),
     ({"id": None}, "the record has no column 'id'"),
     ({"question": None}, "the column 'question' is null, not a string")],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_is_named(tmp_path, rows, change, told):
    (tmp_path / "rows.jsonl").write_bytes(lines([rows[0], {**rows[1], **change}]))
    with pytest.raises(DataError, match=told):
        questions.read(tmp_path / "rows.jsonl")


def test_a_saved_data_set_names_its_splits_and_its_damage(tmp_path, rows):
    save_dict(tmp_path / "saved", rows)
    with pytest.raises(DataError, match=r"no split 'test'; it has train, validation"):
        questions.read(tmp_path / "saved", DataOptions(split="test"))
    state = tmp_path / "saved" / "train" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    with pytest.raises(DataError, match="names files that are not beside it"):
        questions.read(tmp_path / "saved", DataOptions(split="train"))
    state.write_text("{")
    with pytest.raises(DataError, match=r"state.json is damaged"):
        questions.read(tmp_path / "saved", DataOptions(split="train"))


def test_a_damaged_arrow_file_is_told_of(tmp_path, rows):
    path = tmp_path / "rows.arrow"
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path, compression="uncompressed")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="rows.arrow"):
        questions.read(path)
