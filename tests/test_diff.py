"""Two runs beside each other, groups of one's own, and what the page's script reads."""

import dataclasses
import fractions
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.errors import DataError, GateNotMet, UsageError
from flaxqa.eval import (
    calibration,
    diff,
    evaluated,
    examples,
    explorer,
    groups,
    report,
    runs,
    snippets,
    summaries,
)
from flaxqa.eval.questions import SquadExample

HELDOUT = str(QUICKSTART / "heldout.json")


def evaluate(output, *options):
    checkpoint = str(QUICKSTART / "checkpoint")
    command = ["eval", "--model", checkpoint, "--data", HELDOUT, "--output", str(output), *options]
    assert cli.run(command) == 0
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs: a plain one, one with short answers, one of other questions."""
    folder = tmp_path_factory.mktemp("runs")
    evaluate(folder / "plain", "--limit", "120", "--precision", "0.9")
    evaluate(folder / "short", "--limit", "120", "--max-answer-length", "2")
    evaluate(folder / "few", "--limit", "50")
    return folder


def read(directory):
    return examples.of_run(runs.evaluation(directory))


@pytest.fixture(scope="module")
def both(made):
    return read(made / "plain"), read(made / "short")


def test_the_table_of_questions_comes_back(made):
    one = read(made / "plain")
    table = pq.read_table(made / "plain" / "per_example.parquet").to_pydict()
    data = json.loads((QUICKSTART / "heldout.json").read_text())["data"]
    contexts = {each["id"]: (paragraph["context"], tuple(a["text"] for a in each["answers"]))
                for article in data for paragraph in article["paragraphs"]
                for each in paragraph["qas"]}  # fmt: skip
    assert [(q.context, q.answers) for q in one.questions] == [
        contexts[q.id] for q in one.questions
    ]
    for question, span, said in zip(one.questions, one.spans, one.predictions, strict=True):
        assert question.context[slice(*span)] == said
        assert all(question.context[s : s + len(a)] == a
                   for a, s in zip(question.answers, question.starts, strict=True))  # fmt: skip
    assert one.right.tolist() == table["exact_match"]
    assert [kind is None for kind in one.mistakes] == one.right.tolist()  # none is elsewhere here
    metrics = json.loads((made / "plain" / "metrics.json").read_text())
    assert sum(each["questions"] for each in metrics["mistakes"].values()) == (~one.right).sum()


def test_the_difference_is_that_of_pairs(both):
    found = diff.difference(*both, groups.GROUPINGS)
    before, after = (one.right.astype(float) for one in both)
    scores = found["scores"]["exact_match"]
    assert scores["first"] == pytest.approx(100 * before.mean())
    assert scores["difference"] == pytest.approx(100 * (after - before).mean())
    assert (
        scores["difference_interval"][0] < scores["difference"] < scores["difference_interval"][1]
    )
    ids = np.array(both[0].scores.ids)
    assert found["lost"] == ids[before > after].tolist()
    assert found["won"] == ids[before < after].tolist()
    assert found["mcnemar"]["lost"] == len(found["lost"]) > 5
    for rows in found["groups"].values():
        assert sum(row["questions"] for row in rows) == len(ids)
        weighed = sum(row["questions"] * row["exact_match"]["difference"] for row in rows)
        assert weighed / len(ids) == pytest.approx(scores["difference"])


def test_the_order_of_questions_does_not_count(both):
    first, second = both
    order = np.arange(len(second.questions))[::-1]
    turned = examples.Examples(**{
        **vars(second), "questions": [second.questions[i] for i in order],
        "scores": evaluated.part(second.scores, order)})  # fmt: skip
    assert diff.difference(first, turned) == diff.difference(first, second)


def test_worse_is_what_is_below_zero_altogether():
    ends = {"a": (-2.0, -0.1), "b": (-2.0, 0.1), "c": (0.1, 2.0), "d": (-1.0, 0.0)}
    scores = {name: {"difference_interval": interval} for name, interval in ends.items()}
    assert diff.worse(scores) == ["a"]


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (0, 7), (3, 12), (40, 62), (1, 0)])
def test_mcnemar_is_exact(won, lost):
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    by_hand = min(1.0, float(fractions.Fraction(2 * tail, 2**n)))
    assert diff.mcnemar(won, lost) == pytest.approx(by_hand, abs=1e-12)
    if n:
        from scipy.stats import binomtest

        assert diff.mcnemar(won, lost) == binomtest(lost, n, 0.5).pvalue


def run_diff(made, tmp_path, second, *options):
    output = str(tmp_path / "page.html")
    command = ["diff", str(made / "plain"), str(made / second), "--output", output, *options]
    return cli.run(command)


def test_the_gate_is_closed_for_what_is_worse_alone(made, tmp_path, capsys):
    assert run_diff(made, tmp_path, "plain", "--gate") == 0
    assert run_diff(made, tmp_path, "short") == 0
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert found["worse"] == ["exact_match", "f1"]
    assert "Beyond chance the second run is worse by EM and F1." in told.err
    assert "config.max_answer_length: 30 to 2" in told.err
    with pytest.raises(GateNotMet) as error:
        run_diff(made, tmp_path, "short", "--gate")
    assert error.value.exit_code == 5
    assert "short less plain" in (tmp_path / "page.html").read_text().replace("</bdi>", "").replace(
        "<bdi>", ""
    )
    better = ["diff", str(made / "short"), str(made / "plain"), "-o", str(tmp_path / "p"), "--gate"]
    assert cli.run(better) == 0


def test_other_questions_are_refused_by_name(made, tmp_path):
    with pytest.raises(DataError, match=r"70 of the 120 questions of .*plain are not in the other"):
        run_diff(made, tmp_path, "few")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("field", ["question", "context", "answers"])
def test_changed_questions_are_refused_by_name(both, field):
    first, second = both
    one = second.questions[3]
    changed = {"id": one.id, "question": one.question, "context": one.context,
               "answers": one.answers, field: ("x",) if field == "answers" else "x"}  # fmt: skip
    others = [*second.questions[:3], SquadExample(**changed), *second.questions[4:]]
    with pytest.raises(DataError, match=f"1 questions have another {field}: '{one.id}'"):
        diff.difference(first, examples.Examples(**{**vars(second), "questions": others}))
    with pytest.raises(DataError, match=r"as SQuAD 2\.0"):
        diff.difference(first, examples.Examples(**{**vars(second), "v2": True}))


def test_a_run_without_contexts_is_told_of(made, tmp_path):
    old = shutil.copytree(made / "plain", tmp_path / "old")
    table = pq.read_table(old / "per_example.parquet")
    pq.write_table(table.drop_columns(["context"]), old / "per_example.parquet")
    with pytest.raises(DataError, match="earlier flaxqa and has no contexts; run `flaxqa eval`"):
        run_diff(made, tmp_path, old)
    page = report.page([report.read(old), report.read(made / "plain")])
    assert "earlier flaxqa and has no contexts" in page
    (old / "per_example.parquet").write_bytes(b"nothing")
    assert "cannot be read" in report.page([report.read(old)])


def test_runs_of_other_questions_are_marked(made):
    page = report.page([report.read(made / "plain"), report.read(made / "few")])
    assert "do not compare" in page
    assert "first 50 of 559" in page
    _, rows = evaluated.common([read(made / "plain"), read(made / "few")])
    assert [row[1] for row in rows] == ["50", "50"]
    assert rows[0][2:] == rows[1][2:]
    assert "less plain" not in page


def test_what_all_runs_have_alike_is_said_once(made):
    found = [runs.evaluation(made / name) for name in ("plain", "few")]
    head, rows = evaluated.table(found)
    same, (left, cells) = evaluated.parted(head, rows)
    assert {name for name, _ in same} >= {"model", "data", "dtype"}
    assert left[0] == "run"
    assert {"questions", "EM", "F1"} <= {*left}
    assert len(left) + len(same) == len(head)
    assert all(len(row) == len(left) for row in cells)
    same, (left, _) = evaluated.parted(*evaluated.table(found[:1]))
    assert left == ["run", "EM", "F1"]
    assert dict(same)["questions"] == "first 120 of 559"


# --- groups ---


def test_groups_of_a_file_are_in_every_table(made, tmp_path):
    ids = read(made / "plain").scores.ids
    file = tmp_path / "topics.csv"
    lines = [f"{name},{'even' if place % 2 == 0 else 'odd'},{place % 3}"
             for place, name in enumerate(ids[:100])]  # fmt: skip
    file.write_text("\n".join(["id,parity,rest", *lines]) + "\n")
    output = tmp_path / "page.html"
    command = ["report", str(made / "plain"), "--group-by", str(file), "-o", str(output)]
    assert cli.run(command) == 0
    page = output.read_text()
    for title in ("parity", "rest", "question word"):
        assert f"<bdi>{title}</bdi>" in page
    found = diff.difference(read(made / "plain"), read(made / "short"), groups.read(file))
    assert [(row["group"], row["questions"]) for row in found["groups"]["parity"]] == [
        ("even", 50), ("odd", 50), ("none", 20)]  # fmt: skip
    assert [row["group"] for row in found["groups"]["rest"]] == ["0", "1", "2", "none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must begin with a header"), ("name,topic\n1,x\n", "must begin with a header"),
     ("id\n1\n", "must begin with a header"), ("id,a,a\n1,2,3\n", "must begin with a header"),
     ("id,a\n1,2\n1,3\n", "row 3 has the id '1', which came before"),
     ("id,a\n1,2,3\n", "row 2 has 3 cells, the header 2"),
     ("id,a\n" + "".join(f"{i},{i}\n" for i in range(101)), "101 different values"),
     ('id,a\n1,"x\n', "is not CSV")],
)  # fmt: skip
def test_files_that_give_no_groups_are_refused(tmp_path, text, message):
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        groups.read(tmp_path / "groups.csv")


def test_a_file_that_is_not_there_is_told_of(tmp_path):
    with pytest.raises(UsageError, match=r"none\.csv cannot be read"):
        groups.read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"id,a\n1,\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        groups.read(tmp_path / "latin.csv")


def test_numbers_are_ordered_by_size():
    assert sorted(["10", "9", "b", "a"], key=groups.natural) == ["9", "10", "a", "b"]


# --- what the script reads ---


def test_the_payload_has_every_question_once(both):
    made = explorer.payload(both, groups.GROUPINGS)
    assert [one["i"] for one in made["questions"]] == list(both[0].scores.ids)
    assert made["left_out"] == 0
    for place, one in enumerate(made["questions"]):
        context = made["contexts"][one["c"]]
        assert context == both[0].questions[place].context
        for run, found in zip(both, one["r"], strict=True):
            assert context[slice(*found[1])] == found[0] == run.predictions[place]
            assert found[2] == run.right[place]
            begin, end, score = found[8][0]
            assert (begin, end) == run.spans[place]
            assert score == pytest.approx(run.score[place], abs=1e-4)
        assert {context[slice(*span)] for span in one["s"]} == set(both[0].questions[place].answers)
    assert len(made["contexts"]) == len(set(made["contexts"]))


def test_questions_of_several_runs_are_joined_by_content(made):
    joined = explorer.joined([read(made / "plain"), read(made / "few")])
    assert len(joined) == 120
    assert [one.places for one in joined[49:51]] == [[49, 49], [50, None]]


def test_wrong_questions_come_first_where_not_all_fit(both):
    asked = explorer.joined(both)
    some = explorer.chosen(asked, both, 110)
    assert len(some) == 110
    wrong = {one.id for run in both for one, right in zip(run.questions, run.right, strict=True)
             if not right}  # fmt: skip
    assert {one.question.id for one in some} >= wrong
    order = [one.question.id for one in asked]
    places = [order.index(one.question.id) for one in some]
    assert places == sorted(places)


def test_a_page_has_a_limit(both, monkeypatch):
    whole = len(explorer.as_script(explorer.payload(both, ())))
    monkeypatch.setattr(explorer, "BYTES", whole // 2)
    smaller = explorer.payload(both, ())
    assert len(explorer.as_script(smaller)) <= whole // 2
    monkeypatch.setattr(explorer, "BYTES", whole // 20)
    least = explorer.payload(both, ())
    assert least["left_out"] == 120 - len(least["questions"]) > 0
    assert len(explorer.as_script(least)) <= whole // 20


def test_the_limit_is_of_the_table_too(both, monkeypatch):
    made = explorer.payload(both, ())
    table = sum(len(cell) for row in explorer.rows(made) for cell in row)
    size = len(explorer.as_script(made)) + table
    assert size < explorer.weight(made) < 1.5 * size
    monkeypatch.setattr(explorer, "BYTES", explorer.weight(made))
    assert len(explorer.payload(both, ())["contexts"][0]) == len(made["contexts"][0])
    monkeypatch.setattr(explorer, "BYTES", explorer.weight(made) - 1)
    smaller = explorer.payload(both, ())
    assert explorer.weight(smaller) < explorer.weight(made)
    assert smaller["left_out"] > 0  # as parts of contexts are not shared, whole ones are


def test_examples_of_mistakes_mark_the_places_that_are_meant(both):
    context = "In 15 years the one of ten had one and 1."
    at = context.index("one and")
    question = SquadExample("1", "How many?", context, ("one", "1"), (at, len(context) - 2))
    run = dataclasses.replace(
        both[0], questions=[question], predictions=["the one"], spans=[(12, 19)], mistakes=["x"]
    )
    assert evaluated.example(run, 0)["pieces"] == [
        ("In 15 years ", (False, False)),
        ("the one", (False, True)),
        (" of ten had ", (False, False)),
        ("one", (True, False)),
        (" and ", (False, False)),
        ("1", (True, False)),
        (".", (False, False)),
    ]
    found = summaries.pieces("a" * 500 + "bcd" + "a" * 500, [(500, 502)], [(501, 503)])
    assert found[2:5] == [("b", (True, False)), ("c", (True, True)), ("d", (False, True))]
    assert [found[0][0], found[-1][0]] == ["\u2026 ", " \u2026"]
    assert [len(text) for text, _ in found] == [2, 160, 1, 1, 1, 160, 2]
    assert summaries.pieces("abc", [], []) == [("abc", (False, False))]


def test_runs_of_one_name_have_a_configuration_each(made, tmp_path):
    path = tmp_path / "page.html"
    for folder in ("a", "b"):
        shutil.copytree(made / "few", tmp_path / folder / "run")
    report.write([report.read(tmp_path / folder / "run") for folder in ("a", "b")], path)
    told = path.read_text().split("Configuration, model, data and machine")[1]
    assert '"a/run": {' in told
    assert '"b/run": {' in told


def test_names_that_are_not_utf_8_can_be_shown(made, tmp_path):
    path, folder = tmp_path / "page.html", os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme")
    shutil.copytree(made / "few", folder)
    about = json.loads((made / "few" / "run.json").read_text())
    about["config"]["model"] = "lone \ud800"
    (pathlib.Path(folder) / "run.json").write_text(json.dumps(about))
    report.write([report.read(folder), report.read(made / "few")], path)
    text = path.read_text()
    assert "na\ufffdme" in text
    assert "lone \ufffd" in text
    assert 'class="warn"' not in text


def test_pieces_of_contexts_keep_places_as_javascript_counts_them():
    context = "a\U0001f600b" * 1_000 + "Turin" + "c" * 5_000
    piece = explorer.Piece(context, [(3_000, 3_005)], 100)
    begin, end = piece.place(3_000, 3_005)
    in_javascript = piece.text.encode("utf-16-le")
    assert in_javascript[2 * begin : 2 * end].decode("utf-16-le") == "Turin"
    assert len(piece.text) == 205
    assert piece.place(0, 1) is None
    assert explorer.Piece("x" * 30_000, [(29_000, 29_001)], None).place(29_000, 29_001) is not None
    assert len(explorer.Piece("x" * 30_000, [(0, 30_000)], None).text) <= 8_000
    assert explorer.Piece("abc", [], None).text == "abc"


def test_what_the_script_reads_cannot_end_it():
    text = explorer.as_script({"a": "</script><!-- & \u2028 \ud800"})
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == {"a": "</script><!-- & \u2028 \ud800"}


# --- calibration in runs ---


def test_metrics_tell_of_the_precision_that_was_asked_for(made):
    metrics = json.loads((made / "plain" / "metrics.json").read_text())
    one = read(made / "plain")
    curve = calibration.risk_coverage(one.score, one.right)
    assert metrics["calibration"]["for_precision"] == calibration.for_precision(curve, 0.9)
    assert (
        "for_precision"
        not in json.loads((made / "few" / "metrics.json").read_text())["calibration"]
    )


def test_a_fitted_temperature_changes_scores_and_no_answer(made, tmp_path, capsys):
    evaluate(tmp_path / "warm", "--limit", "120", "--calibrate", HELDOUT)
    kept = json.loads((tmp_path / "warm" / "calibration.json").read_text())
    run = json.loads((tmp_path / "warm" / "run.json").read_text())
    assert run["temperature"] == kept["temperature"] != 1.0
    assert kept["questions"] == 559
    one, other = read(made / "plain"), read(tmp_path / "warm")
    assert one.predictions == other.predictions
    losses = [json.loads((each / "metrics.json").read_text())["calibration"]["log_loss"]
              for each in (made / "plain", tmp_path / "warm")]  # fmt: skip
    assert losses[1] < losses[0]
    # The same by hand.
    given = evaluate(
        tmp_path / "given", "--limit", "120", "--temperature", str(kept["temperature"])
    )
    np.testing.assert_allclose(read(given).score, other.score, rtol=1e-9)
    # Again it is taken from the file.
    kept["temperature"] = 3.0
    (tmp_path / "warm" / "calibration.json").write_text(json.dumps(kept))
    evaluate(tmp_path / "warm", "--limit", "120", "--calibrate", HELDOUT)
    assert json.loads((tmp_path / "warm" / "run.json").read_text())["temperature"] == 3.0
    # Without it, the file goes.
    evaluate(tmp_path / "warm", "--limit", "120")
    assert not (tmp_path / "warm" / "calibration.json").exists()


def test_a_fitted_temperature_is_in_the_card(made, tmp_path, monkeypatch):
    monkeypatch.setattr(snippets, "run", lambda code: ("Bob", None))
    folder, card = shutil.copytree(made / "plain", tmp_path / "run"), tmp_path / "card.md"
    command = ["card", str(folder), "--output", str(card)]
    assert cli.run(command) == 0
    assert "expected calibration error" in card.read_text()
    assert "--temperature" not in card.read_text()
    fit = {"temperature": 1.25, "questions": 1_756, "data": {"name": "/home/ada/half.json"}}
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"calibration": fit}))
    assert cli.run(command) == 0
    text = card.read_text()
    assert "a temperature of 1.2500, fitted to 1,756 questions of half.json" in text
    assert "`flaxqa ask --temperature 1.2500`" in text
    assert "/home/ada" not in text


def test_a_temperature_is_given_or_fitted(tmp_path):
    with pytest.raises(UsageError, match="calibrate fits the temperature"):
        evaluate(tmp_path, "--calibrate", HELDOUT, "--temperature", "2")
