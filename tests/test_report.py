"""The page of results: whole, escaped, and loading nothing."""

import base64
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.errors import DataError, UsageError
from flaxqa.eval import copies, plots, report, squad, summaries

EVIL = '<script>alert("x")</script> & <b>'


def scores(exact, f1, difference=0.0):
    return {
        name: {"value": value, "interval": [value - 1, value + 1], "difference": difference,
               "difference_interval": [difference - 1, difference + 1]}
        for name, value in (("exact_match", exact), ("f1", f1))
    }  # fmt: skip


def backend(name, speed, **change):
    stages = {"tokenize": 0.1, "compute": 0.8, "decode": 0.1}
    offline = {"rounds": [stages], "seconds": 1.0, "questions_per_second": speed, "stages": stages,
               "lowest": speed - 1, "highest": speed + 2, "slower_than_first": 1.0,
               "useful_flops_per_second": 4.2e11, "share_of_products": 0.84,
               "host_share": 0.2, "totals": [1.0]}  # fmt: skip
    latencies = [0.01, 0.02, 0.03]
    return {
        "name": f"{name}/float32", "backend": name, "dtype": "float32", "verdict": "VALID",
        "reasons": [], "device": "cpu", "device_memory_bytes": None, "load_seconds": 1.5,
        "first_call_seconds": 0.2, "peak_memory_bytes": 2**28,
        "parity": {"largest": 2e-5, "mean": 1e-6, "same_answers": 1.0}, "scores": scores(70, 80),
        "offline": {"shipped": offline, "tuned": offline},
        "single": {"queries": 3, "p50": 0.02, "p90": 0.03, "p99": 0.03, "latencies": latencies},
        "server": {"bound": 1.0, "rate": 20.0, "trials": [
            {"rate": 20.0, "queries": 9, "p50": 0.1, "p90": 0.2, "p99": 0.3}]},
        "starts": {}, "step": None,
        "sweep": [{"batch": 8, "length": 128, "tokens_per_second": 1e4},
                  {"batch": 8, "length": 384, "tokens_per_second": 9e3}],
        "audit": {"different": 1.0, "same": 1.0}, **change,
    }  # fmt: skip


@pytest.fixture
def content():
    """A comparison in which every text is one that would break a page."""
    rows = [
        backend("jax", 100.0),
        backend("torch", 50.0),
        backend(EVIL, 10.0, verdict="INVALID", reasons=[f"it says {EVIL}"]),
        {"name": "tensorflow/float32", "backend": "tensorflow", "dtype": "float32",
         "absent": "tensorflow is not installed: pip install tensorflow-cpu"},
    ]  # fmt: skip
    names = [row["name"] for row in rows[:3]]
    one = {"exact_match": 70.0, "f1": 80.0}
    return {
        "measured": "2026-01-01T00:00:00+00:00", "commit": None, "reference": "jax-model/float32",
        "config": {"rounds": 5}, "model": {"name": EVIL}, "data": {"name": EVIL},
        "questions": 1_200, "set_aside": 0, "tokens": 99, "device": "cpu", "device_name": "cpu",
        "machine": {"processor": EVIL, "cpus": 2}, "versions": {"jax": "1", "torch": None},
        "backends": rows, "float32_logit_differences": {f"{names[0]} - {names[1]}": 3e-5},
        "groups": {"question word": [
            {"group": EVIL, "questions": 7, "scores": dict.fromkeys(names, one)}]},
        "disagreements": [{
            "id": "1", "question": EVIL, "context": f"{'long ' * 99}Turin, {EVIL}, and Rome",
            "right": [EVIL], "reference": "Turin",
            "answers": {names[0]: "Turin", names[1]: "Rome", names[2]: EVIL}}],
    }  # fmt: skip


def test_the_table_says_where_each_computes_if_that_differs(content):
    head, rows = summaries.table(content)
    assert "on" not in head
    assert rows[0][head.index("useful TFLOP/s, tuned")] == "0.42 (84%)"
    content["device"], content["device_name"] = "gpu", "an H100"
    content["backends"][0] |= {"device": "an H100", "device_memory_bytes": 2**30}
    head, rows = summaries.table(content)
    places, memory = ([row[head.index(name)] for row in rows] for name in ("on", "device memory"))
    assert places == ["an H100", "cpu", "cpu", "\u2013"]
    assert memory == ["1,024 MiB", "\u2013", "\u2013", ""]
    assert all(len(row) == len(head) for row in rows)
    said = summaries.summary(content)
    assert said[0].endswith("with an H100.")
    assert any("Fastest in float32 on an H100 is jax" in sentence for sentence in said)
    assert any("Fastest in float32 on cpu is torch" in sentence for sentence in said)


@pytest.fixture
def page(content):
    return report.page([report.Run("run", comparison=content)])


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text, self.marked = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "use", "br", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


OWN_SCRIPT = (Path(report.__file__).parent / "explorer.js").read_text(encoding="utf-8")


def scripts_of(page):
    """What a browser would run."""
    return [text for kind, text in re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
            if "application/json" not in kind]  # fmt: skip


def test_a_column_without_a_place_comes_last(content, monkeypatch):
    monkeypatch.setattr(summaries, "COLUMNS", [name for name in summaries.COLUMNS if name != "EM"])
    assert summaries.table(content)[0][-1] == "EM"


def test_a_new_metric_is_in_the_table_by_its_label(content, monkeypatch):
    monkeypatch.setitem(squad.METRICS, "words", squad.Metric("Words", "words", len, float))
    for row in summaries.there(content):
        row["scores"]["words"] = {"value": 12.5}
    head, rows = summaries.table(content)
    assert rows[0][head.index("Words")] == "12.50"


def test_all_text_is_escaped(page):
    read = Reader(page)
    assert scripts_of(page) == [OWN_SCRIPT]
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert EVIL in "".join(read.text)
    assert not read.open


def test_the_page_loads_nothing(page):
    read = Reader(page)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in read.tags}
    for _, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    allowed = hashlib.sha256(OWN_SCRIPT.encode()).digest()
    policy = next(each["content"] for tag, each in read.tags if "http-equiv" in each)
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(allowed).decode()}'"
    )
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_plots_are_there_in_the_colours_of_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # noqa: S314 (our own)
        assert "var(--ink)" in drawing
        assert "#00f0" not in drawing
        assert 'class="plot"' in drawing
    assert page.count("--paper:") == 2  # light and dark


def test_the_summary_says_what_matters(content):
    said = summaries.summary(content)
    assert said[0].startswith("3 of 4 backends were measured on 1,200 questions of ")
    assert "differ by at most 3.0e-05; 100.00%" in said[1]
    assert said[2] == "Fastest in float32 is jax with 100 questions/s, 2.00 times torch."
    assert said[3] == "One question at a time, jax/float32 answers 99 of 100 within 30.0 ms."
    assert said[4] == f"{EVIL}/float32 is INVALID: it says {EVIL}."
    assert said[5].startswith("tensorflow/float32 was not measured: tensorflow is not installed: ")


def test_answers_are_marked_in_their_context(page):
    read = Reader(page)
    assert read.marked == ["Turin", EVIL, "Rome"]
    around = "".join(read.text)
    assert re.search(r"… \w* long long", around)
    assert "Turin: jax/float32" in re.sub(r"\s*\(the reference's\)", "", around)


def test_an_answer_that_is_not_in_the_context_marks_nothing():
    assert summaries.excerpt("a b c", ["x", ""]) == [("a b c", False)]
    assert summaries.excerpt("a b c", ["b"]) == [("a ", False), ("b", True), (" c", False)]
    assert summaries.excerpt("a b c", ["a b", "b c"]) == [("a b c", True)]


def test_markdown_has_a_row_for_each_backend(content):
    content["backends"][2]["name"] = "a|b"
    lines = summaries.markdown(content).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "a\\|b" in rows[4]


@pytest.mark.parametrize(
    ("value", "text"),
    [(12_345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (0.1234, "0.123"), (1.2e-5, "1.2e-05"),
     (0, "0"), (None, "\u2013"), (-3.21, "-3.21")],
)  # fmt: skip
def test_numbers_have_the_digits_that_count(value, text):
    assert plots.number(value) == text


def test_runs_of_eval_come_in_a_table_and_in_plots(tmp_path, content, capsys):
    config = ["eval", "--model", str(QUICKSTART / "checkpoint"), "--limit", "40",
              "--data", str(QUICKSTART / "heldout.json")]  # fmt: skip
    for name in ("first", "second"):
        assert cli.run([*config, "--output", str(tmp_path / name)]) == 0
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "comparison.json").write_text(json.dumps(content))
    page = tmp_path / "page.html"
    names = [str(tmp_path / name) for name in ("first", "second", "third")]
    assert cli.run(["report", *names, "--output", str(page)]) == 0
    text = "".join(Reader(page.read_text()).text)
    assert page.read_text().count("<svg") == 8 + 4
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    low, high = metrics["f1_interval"]
    # In the table, and in what can be copied of it.
    assert text.count(f"{metrics['f1']:.2f} ({low:.2f} to {high:.2f})") == 3 * 2
    assert "do not compare" not in text
    assert "second less first" in text
    assert text.index("folder third") < text.index("second less first")


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none of metrics\.json, .*comparison\.json"):
        report.read(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(DataError, match=r"comparison.json is not JSON"):
        report.read(tmp_path)


def change_of(**parts):
    return lambda content: {**content, **parts}


@pytest.mark.parametrize(
    "change",
    [
        change_of(backends=None), change_of(backends=[{}]), change_of(backends=["jax"]),
        change_of(disagreements=5), change_of(disagreements=[{"answers": []}]),
        change_of(groups=[1]), change_of(machine=None),
        lambda content: {},
    ],
)  # fmt: skip
def test_a_damaged_comparison_is_named(tmp_path, content, change):
    for name, one in {"good": content, "bad": change(content)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps(one))
    runs = [report.read(tmp_path / name) for name in ("good", "bad")]
    with pytest.raises(DataError, match="the results in bad are damaged"):
        report.write(runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [[], "a run", None, 5])
def test_results_that_are_no_object_are_named(tmp_path, content):
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"comparison\.json is no JSON object"):
        report.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\\xff", '{"a": '])
def test_results_that_are_no_json_are_named(tmp_path, text):
    (tmp_path / "comparison.json").write_bytes(text.encode().replace(b"\\xff", b"\xff"))
    with pytest.raises(DataError, match="comparison.json is not JSON"):
        report.read(tmp_path)


def test_texts_without_an_end_and_marks_of_direction_stay_where_they_are(content):
    word, turned = "w" * 1_000_000, "\u202e\u2066 turned"
    one = content["disagreements"][0]
    one |= {"question": turned, "context": word, "right": [word], "reference": word}
    one["answers"] = dict.fromkeys(one["answers"], word)
    made = report.page([report.Run("run", comparison=content)])
    assert len(made) < 300_000
    assert f"<bdi>{turned}</bdi>" in made
    assert "w" * 1_000 + " …</bdi>" in made


def test_a_browser_runs_nothing_of_it(page, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium")
    path = tmp_path / "page.html"
    path.write_text(page.replace("alert(", "document.title=("))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "<title>flaxqa: " in done.stdout
    assert scripts_of(done.stdout) == [OWN_SCRIPT]


# --- the comparison's page ---


def test_the_head_says_what_was_compared_when_and_on_what(content, page):
    content["backends"][2]["backend"] = "openvino"
    content["data"] = {"name": "data/dev-v1.1.json", "questions": 10_570}
    content["model"] = {"name": "/home/ada/models/small"}
    assert summaries.title(content) == (
        "jax, torch, openvino and tensorflow on 1,200 questions of dev-v1.1.json"
    )
    assert dict(summaries.head_of(content)) == {
        "checkpoint": "small", "data": "dev-v1.1.json, 1,200 of 10,570 questions",
        "dtypes": "float32", "machine": f"2 CPUs of {EVIL}", "measured": "2026-01-01 00:00",
    }  # fmt: skip
    made = report.page([report.Run("run", comparison=content)])
    assert "<title>flaxqa: jax, torch, openvino and tensorflow on 1,200" in made
    assert "/home/ada" not in made.partition("Configuration, model and data")[0]


def test_a_title_names_some_of_many_backends(content):
    rows = content["backends"][:1] * 9
    content["backends"] = [{**row, "backend": f"b{index}"} for index, row in enumerate(rows)]
    assert summaries.title(content).startswith("b0, b1, b2, b3, b4, b5 and 3 more on 1,200 ")
    content["backends"] = content["backends"][:7]
    assert summaries.title(content).startswith("b0, b1, b2, b3, b4, b5 and b6 on 1,200 ")


def test_a_price_given_later_replaces_that_of_the_comparison(content):
    assert summaries.price(content, None) is None
    content["config"]["dollars_per_hour"] = 7.2
    assert summaries.price(content, None) == 7.2
    assert summaries.price(content, 3.6) == 3.6
    head, rows = summaries.table(content, 3.6)
    assert rows[0][head.index("questions/$, tuned")] == "100,000"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("80.00 (79.00 to <b>)", '<bdi class="pair"><span>80.00</span> <span>(79.00 to &lt;b&gt;)'
         "</span></bdi>"),
        ("\u22121.25 (a)", '<bdi class="pair"><span>\u22121.25</span> <span>(a)</span></bdi>'),
        ("a/b (c)", "<bdi>a/<wbr>b (c)</bdi>"),
        ("<b>/x", "<bdi>&lt;b&gt;/<wbr>x</bdi>"),
        ("1.5", "<bdi>1.5</bdi>"),
    ],
)  # fmt: skip
def test_cells_break_before_brackets_and_after_slashes(text, html):
    assert summaries.cell(text) == html


def test_every_column_is_in_one_theme(content):
    content["config"]["dollars_per_hour"] = 3.6
    one = content["backends"][0]
    one["offline"]["tuned"] = {**one["offline"]["tuned"], "kwh_per_1000_questions": 0.005}
    one["starts"] = {"full": {"seconds": 1.0}}
    head, rows = summaries.table(content)
    themes = summaries.by_theme(head, rows)
    assert list(themes) == list(summaries.THEMES)
    found = [name for names, _ in themes.values() for name in names[1:]]
    assert sorted(found) == sorted(head[1:])
    for names, cells in themes.values():
        assert names[0] == "backend"
        assert len(names) <= 7
        for row, whole in zip(cells, rows, strict=True):
            assert row == [whole[head.index(name)] for name in names]
    energy, cost = (dict(zip(names, cells[0], strict=True))
                    for names, cells in (themes["Energy"], themes["Cost"]))  # fmt: skip
    assert cost["questions/$, tuned"] == f"{100 * 3600 / 3.6:,.0f}"
    assert energy["Wh/1,000, tuned"] == "5.00"
    # 1,000 questions take 5 Wh, that is 18,000 J.
    assert energy["questions/s per W, tuned"] == plots.number(1_000 / 18_000)


def test_the_price_can_be_told_later(content, tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    page = tmp_path / "page.html"
    command = ["report", str(tmp_path), "--output", str(page)]
    assert cli.run(command) == 0
    assert "questions/$" not in page.read_text()
    assert cli.run([*command, "--dollars-per-hour", "3.6"]) == 0
    assert "questions/$, tuned" in page.read_text()
    assert "100,000" in page.read_text()
    assert "is taken to cost $3.60." in page.read_text()


def test_scores_have_their_intervals(content):
    head, rows = summaries.table(content)
    assert rows[0][head.index("F1")] == "80.00 (79.00 to 81.00)"


@pytest.mark.parametrize("many", [True, False])
def test_groups_take_the_narrower_form(content, many):
    names = [row["name"] for row in summaries.there(content)]
    groups = content["groups"]["question word"]
    if many:
        groups += [{**groups[0], "group": f"{number}"} for number in range(3)]
    head, rows = summaries.groups(content)["question word"]
    assert all(len(row) == len(head) for row in rows)
    if many:
        assert head == ["question word", "questions", *names]
        assert rows[0] == [EVIL, "7", *["70.0 / 80.0"] * 3]
    else:
        assert head == ["question word", EVIL]
        assert rows == [["questions", "7"], *([name, "70.0 / 80.0"] for name in names)]


def test_speed_and_quality_are_one_picture(content):
    rows = summaries.there(content)
    drawn = plots.speed_and_quality(rows)
    text = "".join(ElementTree.fromstring(drawn).itertext())  # noqa: S314 (our own)
    assert "torch/float32" in text
    assert text.count("INVALID") == 1
    name = plots.plain(f"{EVIL}/float32")
    assert f"{name}, INVALID" in text
    assert name.startswith(EVIL[:20])
    assert plots.speed_and_quality(rows[:1]) is None
    rows[0]["scores"]["f1"].pop("interval")  # of an older version
    assert "torch/float32" in plots.speed_and_quality(rows)


def test_the_fastest_way_is_in_the_picture(content, monkeypatch):
    points = []
    monkeypatch.setattr(plots, "scatter", lambda given, **_: points.extend(given) or "")
    rows = summaries.there(content)
    for row in rows:
        row["offline"]["streamed"] = {**row["offline"]["tuned"], "questions_per_second": 70.0}
    plots.speed_and_quality(rows)
    assert [one["speed"] for one in points] == [100, 70, 70]
    assert [one["valid"] for one in points] == [True, True, False]
    assert points[0]["score"] == 80
    assert points[0]["interval"] == [79, 81]


def test_the_first_bars_are_on_top(monkeypatch):
    found = []
    monkeypatch.setattr(plots, "svg", lambda figure, name: found.append(figure) or "")
    plots.bars(["a", "b"], {"x": [1, 2], "y": [3, None]}, name="n", xlabel="l")
    bottom, top = found[0].axes[0].get_ylim()
    assert bottom > 1.4
    assert top < -0.4


@pytest.fixture
def scattered(monkeypatch):
    """The axes of a scatter of speeds, scores, whether they are valid, and intervals."""

    def draw(*values):
        found = []
        monkeypatch.setattr(plots, "svg", lambda figure, name: found.append(figure) or "")
        points = [dict(zip(("speed", "score", "valid", "interval"), one, strict=True))
                  for one in values]  # fmt: skip
        plots.scatter([{**one, "name": str(one["speed"])} for one in points],
                      name="a", xlabel="x", ylabel="y")  # fmt: skip
        return found[0].axes[0]

    return draw


def test_the_edge_has_what_nothing_beats_both_ways(scattered):
    values = [(1, 9, True), (3, 6, True), (2, 5, True), (4, 4, True), (4, 4, True), (9, 9, False),
              (4, 3, True), (0.5, 9, True)]  # fmt: skip
    axes = scattered(*((*one, None) for one in values))
    edge, *points = axes.lines
    assert edge.get_xydata().tolist() == [[4, 4], [4, 4], [6, 3], [9, 1]]
    hollow = [one.get_xydata()[0].tolist() for one in points
              if one.get_markerfacecolor() == "none"]  # fmt: skip
    assert hollow == [[9, 9]]
    assert len(points) == len(values)
    assert not axes.collections  # no intervals
    assert [one.get_text() for one in axes.texts] == [
        "0.5", "1", "2", "3", "4", "4", "4", "9, INVALID"]  # fmt: skip


def test_points_have_intervals_and_the_scale_has_numbers(scattered):
    axes = scattered((2.7, 80, False, (70, 85)), (3.4, 81, False, (79, 90)))
    assert [one.get_segments()[0].tolist() for one in axes.collections] == [
        [[70, 2.7], [85, 2.7]], [[79, 3.4], [90, 3.4]]]  # fmt: skip
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 2.7 < 3.4 < high
    assert [one.get_text() for one in axes.get_yticklabels()] == ["3", "4"]
    wide = scattered((1, 80, True, None), (100, 81, True, None))
    assert [one.get_text() for one in wide.get_yticklabels()] == [
        "1", "2", "5", "10", "20", "50", "100"]  # fmt: skip


def test_names_stand_apart(scattered):
    assert plots.apart([0.1, 0.2, 0.6], 0.1) == pytest.approx([0.1, 0.2, 0.6])
    assert plots.apart([0.1, 0.1, 0.15], 0.1) == pytest.approx([0.1, 0.2, 0.3])
    assert plots.apart([0.9, 0.95, 1.0], 0.2) == pytest.approx([0.6, 0.8, 1.0])
    axes = scattered(*((10 + 0.01 * place, 80, True, None) for place in range(20)))
    places = [one.xyann[1] for one in axes.texts]
    figure = axes.get_figure()
    figure.draw_without_rendering()
    height = figure.get_figheight() * axes.get_position().height
    assert places[0] >= 0
    assert places[-1] <= 1
    assert all(b - a > 0.14 / height for a, b in itertools.pairwise(places))


@pytest.mark.parametrize(("longest", "columns"), [(10, 3), (30, 2), (60, 1), (500, 1)])
def test_a_legend_is_not_wider_than_its_axes(longest, columns):
    _, axes = plots.axes_of(3.0, xlabel="x")
    for name in ("a", "b", "c" * longest):
        axes.plot((0, 1), (0, 1), label=name)
    plots.legend(axes)
    assert axes.get_legend()._ncols == columns


def test_tables_are_copied_as_markdown_and_latex(page):
    head, rows = ["a|b", "c"], [["50% & _x_", f"{EVIL}\n"], ["\u22121", "{\\^~#$}"]]
    assert copies.plain_markdown(head, rows).splitlines()[:3] == [
        "| a\\|b | c |", "|---|---|", f"| 50% & _x_ | {EVIL} |"]  # fmt: skip
    lines = copies.latex(head, rows).splitlines()
    assert lines[0] == "\\begin{tabular}{lr}"
    assert lines[1] == "a\\textbar{}b & c \\\\"
    assert lines[3].startswith("50\\% \\& \\_x\\_ & \\textless{}script\\textgreater{}alert(''x'')")
    assert lines[4] == (
        "$-$1 & \\{\\textbackslash{}\\textasciicircum{}\\textasciitilde{}\\#\\$\\} \\\\"
    )
    assert lines[-1] == "\\end{tabular}"
    # What would be options of the end of the row before.
    assert copies.latex(["a"], [["*b"], ["[c]"]]).splitlines()[3:5] == ["{*}b \\\\", "{[}c{]} \\\\"]
    assert copies.latex(["\u03bc"], [["\u00b5\u2013"]]).splitlines()[1:4:2] == [
        "$\\mu$ \\\\", "$\\mu$-- \\\\"]  # fmt: skip
    assert page.count('<pre class="copy">') == 2 * page.count('<details class="copies">') > 4


@pytest.mark.parametrize("name", ["_hidden", "$x_{$", "n" * 200, "two\nlines", "\u4e2d", "x$1"])
def test_any_name_has_its_place_in_plots(name):
    pictures = [
        plots.bars([name], {name: [1.0], "other": [2.0]}, name="bars", xlabel="x"),
        plots.lines({name: ([1, 2], [1, 2])}, name="lines", xlabel="x", ylabel="y"),
    ]
    wanted = name.replace("\n", " ") if len(name) < 40 else "n" * 20 + "\u2026" + "n" * 20
    for picture, times in zip(pictures, (2, 1), strict=True):
        found = [text.strip() for text in re.findall("<text[^>]*>([^<]*)</text>", picture)]
        assert found.count(wanted) == times
