"""The page of results in a real browser: this machine's Chromium, driven by playwright.

`make browser` sets playwright up and runs them; it downloads no browser.
"""

import json
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.answers import Answer, Answers
from flaxqa.eval import examples, mistakes, questions, report, run, squad, summaries
from flaxqa.eval.questions import Data, SquadExample

pytestmark = pytest.mark.browser
EVIL = '</script><script>document.title="broken"</script><img src=x onerror="document.title=1"><!--'
TURNED = "\u202eturned \u2066 around"


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pages of one run, of two, and of two of other questions, and the runs."""
    folder = tmp_path_factory.mktemp("pages")
    for name, options in (
        ("plain", ()),
        ("short", ("--max-answer-length", "2")),
        ("few", ("--limit", "50")),
    ):
        command = [
            "eval",
            "--model",
            str(QUICKSTART / "checkpoint"),
            "--output",
            str(folder / name),
            "--data",
            str(QUICKSTART / "heldout.json"),
            *options,
        ]
        assert cli.run(command) == 0
    for page, names in (("one", ["plain"]), ("two", ["plain", "short"]), ("few", ["plain", "few"])):
        runs = [str(folder / name) for name in names]
        assert cli.run(["report", *runs, "--output", str(folder / f"{page}.html")]) == 0
    return folder


class Page:
    """An open page, with all that it said and asked for."""

    def __init__(self, context, path, place=""):
        self.page = context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{path.as_uri()}{place}")

    def count(self):
        time.sleep(0.25)  # filters wait for the end of typing
        return int(self.page.inner_text("#count").split(" of ")[0].replace(",", ""))

    def choose(self, name, value):
        self.page.select_option(f"select[name={name}]", value)
        return self.count()

    def beyond(self, width):
        """How many parts of the questions are outside of the page."""
        ends = """[...document.querySelectorAll("#list *")]
            .filter(e => !e.parentNode.closest(".scroll"))
            .map(e => e.getBoundingClientRect().right)"""
        return sum(end > width + 1 for end in self.page.evaluate(ends))

    def open_question(self):
        return self.page.locator("li.open .asked").inner_text()


@pytest.fixture
def opened(browser, made):
    contexts = []

    def make(name, place="", **options):
        contexts.append(
            browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        )
        return Page(contexts[-1], made / f"{name}.html", place)

    yield make
    for context in contexts:
        context.close()


def table(made, name):
    found = pq.read_table(made / name / "per_example.parquet").to_pydict()
    return {key: np.array(value, object) for key, value in found.items()}


def test_it_opens_without_a_word_or_a_request(opened, made):
    shown = opened("two")
    assert shown.count() == 559
    assert shown.said == []
    assert shown.asked == [(made / "two.html").as_uri()]


def test_filters_show_what_the_table_of_questions_has(opened, made):
    shown, one, other = opened("two"), table(made, "plain"), table(made, "short")
    a, b = one["exact_match"].astype(bool), other["exact_match"].astype(bool)
    assert shown.choose("state", "differ") == (a != b).sum() > 0
    assert shown.choose("state", "only-0") == (a & ~b).sum()
    assert shown.choose("state", "all-wrong") == (~a & ~b).sum()
    assert shown.choose("state", "wrong") == (~a | ~b).sum()
    shown.page.select_option("select[name=run]", "1")
    assert shown.choose("state", "wrong") == (~b).sum()
    partly = ~b & (other["f1"].astype(float) > 0)
    assert shown.choose("state", "partly") == partly.sum()
    shown.choose("state", "")
    for index, kind in enumerate(mistakes.KINDS):
        assert shown.choose("kind", str(index)) == (other["mistake"] == kind).sum()
    shown.choose("kind", "")
    assert shown.choose("windows", "2") == (other["n_windows"].astype(int) > 1).sum()
    shown.choose("windows", "")
    tenth = np.minimum(np.floor(np.round(other["score"].astype(float), 4) * 10), 9)
    assert shown.choose("score", "9") == (tenth == 9).sum()
    shown.choose("score", "")
    who = [
        ("who" in q.lower().split()) and not {"what"} & {*q.lower().split()}
        for q in one["question"]
    ]
    assert abs(shown.choose("group-0", "1") - sum(who)) < 20
    shown.page.click("button[type=reset]")
    assert shown.count() == 559


def test_search_finds_words_anywhere(opened, made):
    shown, one = opened("one"), table(made, "plain")
    word = max(one["context"][0].lower().split(), key=len).strip(".,")
    there = [
        word in "\n".join([c, q, *a, p, i]).lower()
        for c, q, a, p, i in zip(
            one["context"],
            one["question"],
            one["answers"],
            one["prediction"],
            one["id"],
            strict=True,
        )
    ]
    shown.page.fill("input[name=search]", word.upper())
    assert shown.count() == sum(there) < 559
    shown.page.fill("input[name=search]", one["id"][7])
    assert shown.count() == 1
    shown.page.fill("input[name=search]", "no such words")
    assert shown.count() == 0
    shown.page.keyboard.press("Escape")
    shown.page.keyboard.press("j")
    assert shown.said == []


def test_orders_are_by_score_and_f1(opened, made):
    shown, one = opened("one"), table(made, "plain")
    for order, places in (
        ("low", np.argsort(one["score"].astype(float), kind="stable")),
        ("f1", np.argsort(one["f1"].astype(float), kind="stable")),
        ("long", np.argsort([-len(c) for c in one["context"]], kind="stable")),
    ):
        shown.choose("sort", order)
        found = shown.page.locator("#list .asked").all_inner_texts()[:5]
        assert found == [one["question"][place] for place in places[:5]]


def test_keys_go_through_the_questions(opened, made):
    shown, one = opened("one"), table(made, "plain")
    shown.page.keyboard.press("j")
    assert shown.open_question() == one["question"][0]
    for _ in range(70):  # past what is drawn at first
        shown.page.keyboard.press("j")
    assert shown.open_question() == one["question"][70]
    assert shown.page.url.endswith("#" + quote(one["id"][70]))
    shown.page.keyboard.press("k")
    assert shown.open_question() == one["question"][69]
    assert shown.page.locator("li.open").count() == 1
    shown.page.keyboard.press("Escape")
    assert shown.page.locator("li.open").count() == 0
    shown.page.keyboard.press("/")
    shown.page.keyboard.type("jjj")
    assert shown.page.input_value("input[name=search]") == "jjj"


def test_links_open_their_question(opened, made):
    one = table(made, "plain")
    shown = opened("one", "#" + quote(one["id"][400]))
    assert shown.open_question() == one["question"][400]
    assert shown.page.locator("li.open").bounding_box()["y"] < 700
    shown.choose("state", "wrong")
    right = int(np.flatnonzero(one["exact_match"].astype(bool))[5])
    shown.page.evaluate("id => { location.hash = id }", quote(one["id"][right]))
    time.sleep(0.3)
    assert shown.open_question() == one["question"][right]
    assert shown.count() == 559  # it was hidden by the filter


def test_links_of_mistakes_and_of_differences_set_filters(opened, made):
    shown = opened("two")
    one, other = table(made, "plain"), table(made, "short")
    lost = (one["exact_match"].astype(bool) & ~other["exact_match"].astype(bool)).sum()
    shown.page.click("text=questions lost")
    assert shown.count() == lost
    kind = next(kind for kind in mistakes.KINDS if (other["mistake"] == kind).any())
    shown.page.locator("a[data-filter]", has_text=mistakes.KINDS[kind]).first.click()
    assert shown.count() == ((one["mistake"] == kind) | (other["mistake"] == kind)).sum()


def test_right_and_predicted_answers_are_marked(opened, made):
    shown, runs = opened("two"), [table(made, name) for name in ("plain", "short")]
    shown.choose("state", "differ")
    for _ in range(5):
        shown.page.keyboard.press("j")
        row = runs[0]["question"].tolist().index(shown.open_question())
        context = shown.page.locator("li.open .context")
        assert context.inner_text().strip() == runs[0]["context"][row].strip()
        assert "".join(context.locator("mark").all_inner_texts()) in runs[0]["answers"][row]
        for number, found in enumerate(runs):
            marked = context.locator(f".run-{number}").all_inner_texts()
            assert "".join(marked) == found["prediction"][row]


def test_runs_of_other_questions_say_so(opened, made):
    shown = opened("few")
    assert "do not compare" in shown.page.inner_text("body")
    assert shown.choose("run", "1") == 50


@pytest.mark.parametrize("name", ["one", "two", "few"])
def test_narrow_and_dark(opened, name):
    shown = opened(name, viewport={"width": 390, "height": 800}, color_scheme="dark")
    shown.page.keyboard.press("j")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    )
    assert shown.beyond(390) == 0


def test_without_javascript_there_are_tables(opened, made):
    shown, one = opened("two", java_script_enabled=False), table(made, "plain")
    rows = shown.page.locator("table.plain tbody tr")
    assert rows.count() == 559
    cells = rows.nth(7).locator("td").all_inner_texts()
    assert cells[0] == one["id"][7]
    assert cells[1] == one["question"][7]
    assert cells[3] == one["prediction"][7]
    assert not shown.page.locator("#filters").is_visible()


def test_no_other_script_runs(opened):
    shown = opened("one")
    shown.page.evaluate("""() => {
      const other = document.createElement("script");
      other.textContent = "document.title = 'broken'";
      document.body.append(other);
    }""")
    assert shown.page.title().startswith("flaxqa: ")
    assert any("Content Security Policy" in text for text in shown.said)


def test_tables_can_be_copied(opened):
    shown = opened("two", permissions=["clipboard-read", "clipboard-write"])
    shown.page.locator("details.copies").first.locator("summary").click()
    shown.page.locator("details.copies").first.locator("button").nth(1).click()
    assert shown.page.evaluate("navigator.clipboard.readText()").startswith("\\begin{tabular}{l")


# --- comparisons ---


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of a recorded comparison, in which all that can be measured now was."""
    recorded = Path(__file__).parent.parent / "benchmarks" / "2026-11-28-epyc-zen4-2cpu.json"
    text = recorded.read_text().replace("openvino/bfloat16", "mine.backends:OpenVino/bfloat16")
    content = json.loads(text)
    assert len(content["backends"]) == 11
    content["device"] = content["device_name"] = "NVIDIA H100 80GB HBM3"
    content["config"]["dollars_per_hour"] = 1.2
    for row in content["backends"]:
        row |= {"device": content["device"], "device_memory_bytes": 2**35}
        tuned = {**row["offline"]["tuned"], "kwh_per_1000_questions": 1.234e-5,
                 "questions_per_second": 4321.0, "lowest": 4210.0, "highest": 4444.0,
                 "host_share": 0.123}  # fmt: skip
        row["offline"] = dict.fromkeys(("shipped", "tuned", "streamed"), tuned)
        row["single"] = {"queries": 2, "p50": 0.0123, "p90": 0.02, "p99": 0.0234,
                         "latencies": [0.01, 0.02], "stages": {}}  # fmt: skip
        trial = {"rate": 20.0, "queries": 9, "p50": 0.1, "p90": 0.2, "p99": 0.3}
        row["server"] = {"bound": 1.0, "rate": 1234.0, "trials": [trial]}
        row["starts"] = {"empty": {"seconds": 12.3}, "full": {"seconds": 3.45}}
        row["step"] = {"useful_flops_per_second": 1.2e14, "share_of_products": 0.45}
    path = tmp_path_factory.mktemp("compared") / "page.html"
    report.write([report.Run("compared", comparison=content)], path)
    return path, len(summaries.table(content)[0])


@pytest.mark.parametrize("width", [1100, 1600])
def test_no_column_of_a_comparison_is_hidden(browser, compared, width):
    path, columns = compared
    assert columns > 30
    context = browser.new_context(viewport={"width": width, "height": 900})
    shown = Page(context, path)
    hidden = shown.page.evaluate("""[...document.querySelectorAll(".scroll")]
      .filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)""")
    assert hidden == []
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.said == []
    assert shown.page.title().startswith("flaxqa: jax, ")
    context.close()


def test_a_comparison_on_a_telephone(browser, compared):
    context = browser.new_context(viewport={"width": 390, "height": 900}, color_scheme="dark")
    shown = Page(context, compared[0])
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
    table = shown.page.locator("h3:has-text('Energy') + .scroll")
    table.evaluate("one => one.scrollLeft = 1000")
    # The backend stays where it is while the rest moves, and leaves most of the width to it.
    first = table.locator("tbody tr").first.locator("td")
    name, last = first.first.bounding_box(), first.last.bounding_box()
    edges = table.bounding_box()
    assert name["x"] == pytest.approx(edges["x"], abs=1)
    assert name["width"] < 0.4 * edges["width"]
    assert last["x"] + last["width"] <= edges["x"] + edges["width"] + 1
    context.close()


# --- hostile data ---


def evaluation(folder, asked, answers):
    """A run of these questions, written as `flaxqa eval` writes one."""
    rows = []
    for question, said in zip(asked, answers, strict=True):
        start = question.context.find(said)
        rows.append(
            Answers([Answer(said, start, start + len(said), 0.5, 1.0, 1.0)] if said else [])
        )
        rows[-1].n_windows, rows[-1].null_odds = 1, -1.0
    data = Data(list(asked), False)
    predictions = run.best_texts(asked, rows, None)
    scores = squad.score(asked, predictions)
    kinds = [mistakes.kind_of(q, mistakes.Prediction(predictions[q.id])) for q in asked]
    metrics = {
        **scores.means,
        "exact_match_interval": [0, 1],
        "f1_interval": [0, 1],
        "total": len(asked),
        "questions_per_second": 1.0,
    }
    about = {
        "config": {"model": EVIL, "limit": None},
        "started": "2026-01-01T00:00:00+00:00",
        "data": {
            "name": EVIL,
            "questions": len(asked),
            "version": "1.1",
            "questions_sha256": questions.sha256(asked),
        },
        "platform": {"dtype": "float32"},
        "model": {},
    }
    folder.mkdir()
    run.write(folder, data, rows, predictions, scores, kinds, metrics, about)
    return folder


def hostile(name, folder):
    """Questions that would break a page."""
    word = "w" * 1_000_000
    texts = [
        EVIL,
        TURNED,
        "\x00\x01\x1b[31m",
        "\ud800 lone",
        "a\u2028b\u2029c",
        "",
        "\U0001f600 x",
        "&lt;b&gt; {{ 7 * 7 }} ${x} `",
        "\r\n\t",
    ]
    if name == "texts":
        asked = [
            SquadExample(
                f"{place} {text}#/?%&'\"",
                f"q {text}",
                f"before {text} Turin {text}",
                ("Turin", text or "x"),
            )
            for place, text in enumerate(texts)
        ]
        return evaluation(folder / EVIL.replace("/", "_"), asked, ["Turin"] * len(asked))
    if name == "word":
        asked = [
            SquadExample("1", word, word, (word,)),
            SquadExample("2", "q", word + " Turin", ("Turin",)),
        ]
        return evaluation(folder / name, asked, [word, "Turin"])
    if name == "alike":
        context = "Ada lives in Turin. " * 200
        asked = [
            SquadExample(str(place), f"Who is {place}?", context, ("Ada",))
            for place in range(10_000)
        ]
        return evaluation(folder / name, asked, ["Turin"] * 10_000)
    many, size = (12_500, 300) if name == "many" else (400, 100_000)
    asked = [
        SquadExample(
            str(place), "Who?", f"{place} Turin " + chr(97 + place % 26) * size, ("Turin",)
        )
        for place in range(many)
    ]
    return evaluation(
        folder / name, asked, ["Turin" if place % 2 else str(place) for place in range(many)]
    )


@pytest.mark.parametrize("name", ["texts", "word", "alike", "many", "long"])
def test_hostile_data_do_not_break_the_page(browser, tmp_path, name):
    directory = hostile(name, tmp_path)
    path = tmp_path / "page.html"
    report.write([report.read(directory)], path)
    assert path.stat().st_size < 25_000_000
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    began = time.perf_counter()
    shown = Page(context, path)
    shown.page.wait_for_selector("#list li")
    assert time.perf_counter() - began < 10
    assert shown.said == []
    assert shown.asked == [path.as_uri()]
    assert shown.page.title().startswith("flaxqa: ")
    one = examples.of_run(report.runs.evaluation(directory))
    for _ in range(3):
        shown.page.keyboard.press("j")
        assert shown.page.locator("li.open .detail").count() == 1
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert shown.beyond(1280) == 0
    if name == "texts":
        for question in one.questions:
            shown.page.goto(path.as_uri() + "#" + quote(question.id, safe=""))
            time.sleep(0.1)
            wanted = re.sub(r"[\x00-\x20\u2028\u2029]+", " ", question.question).strip()
            found = re.sub(r"[\x00-\x20\u2028\u2029]+", " ", shown.open_question()).strip()
            assert found.replace("\ufffd", "") == wanted.replace("\ufffd", "")
    content = json.loads(
        re.search(r'id="questions-data">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    )
    assert len(content["questions"]) + content["left_out"] == len(one.questions)
    assert (content["left_out"] > 0) == (name == "many")
    context.close()
