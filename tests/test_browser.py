"""The page of results in a real browser: this machine's Chromium, driven by playwright.

`make browser` sets playwright up and runs them; it downloads no browser.
"""

import json
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import Page, browser  # noqa: F401 (a fixture)
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.eval import examples, groups, mistakes, report, summaries

pytestmark = pytest.mark.browser


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
    without_answers(folder / "v2.json")
    command = ["eval", "--model", str(QUICKSTART / "checkpoint"), "--data", str(folder / "v2.json")]
    assert cli.run([*command, "--output", str(folder / "none")]) == 0
    pages = {"one": ["plain"], "two": ["plain", "short"], "few": ["plain", "few"], "v2": ["none"]}
    for page, names in pages.items():
        runs = [str(folder / name) for name in names]
        assert cli.run(["report", *runs, "--output", str(folder / f"{page}.html")]) == 0
    return folder


def without_answers(path):
    """The held-out questions as SQuAD 2.0, every third without an answer."""
    content = json.loads((QUICKSTART / "heldout.json").read_text())
    every = [qa for one in content["data"] for part in one["paragraphs"] for qa in part["qas"]]
    for place, qa in enumerate(every):
        qa["is_impossible"] = place % 3 == 0
        qa["answers"] = qa["answers"] if place % 3 else []
    path.write_text(json.dumps({**content, "version": "v2.0"}))


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
    asked = examples.of_run(report.runs.evaluation(made / "plain")).questions
    for number, grouping in enumerate(groups.GROUPINGS):
        found = [grouping.of(question) for question in asked]
        for place, label in enumerate(grouping.order):
            if label in found:
                assert shown.choose(f"group-{number}", str(place)) == found.count(label)
        shown.choose(f"group-{number}", "")
    assert shown.choose("state", "differ") < 559
    shown.page.click("button[type=reset]")
    assert shown.count() == 559


def test_questions_without_an_answer_can_be_chosen(opened, made):
    shown, one = opened("v2"), table(made, "none")
    none = np.array([not golds for golds in one["answers"]])
    assert shown.choose("state", "possible") == (~none).sum()
    assert shown.choose("state", "impossible") == none.sum() == 187
    shown.page.keyboard.press("Escape")
    shown.page.keyboard.press("j")
    assert "Right: no answer" in shown.page.inner_text("li.open")
    odds = shown.page.locator("li.open td[data-name='null odds']").inner_text()
    assert odds == f"{one['null_odds'][0]:.2f}"
    assert shown.choose("state", "none") == (one["prediction"] == "").sum()


def test_a_new_order_begins_with_its_first(opened, made):
    one = table(made, "plain")
    shown = opened("one", "#" + quote(one["id"][400]))
    shown.choose("sort", "low")
    first = np.argmin(one["score"].astype(float).round(4))
    assert shown.page.locator("#list .asked").first.inner_text() == one["question"][first]
    assert not shown.page.locator("#earlier").is_visible()
    shown.page.keyboard.press("j")
    assert shown.open_question() == one["question"][first]


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
        ("low", np.argsort(one["score"].astype(float).round(4), kind="stable")),
        ("high", np.argsort(-one["score"].astype(float).round(4), kind="stable")),
        ("question", np.argsort([text.lower() for text in one["question"]], kind="stable")),
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
    assert shown.page.evaluate("location.hash") == "#" + quote(one["id"][70])
    edges = shown.page.locator("li.open").bounding_box()
    assert 0 <= edges["y"] <= 900 - edges["height"]
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
    assert 0 <= shown.page.locator("li.open").bounding_box()["y"] < 100
    shown.choose("state", "wrong")
    right = int(np.flatnonzero(one["exact_match"].astype(bool))[5])
    shown.page.evaluate("id => { location.hash = id }", quote(one["id"][right]))
    shown.wait_for(one["question"][right])
    assert shown.count() == 559  # it was hidden by the filter


def test_a_link_opens_its_question_every_time(opened):
    shown = opened("one")
    examples_of = shown.page.locator("details", has_text=": examples").first
    examples_of.evaluate("e => { e.open = true }")
    link = examples_of.locator("a").first
    for before in (None, "Escape", "j"):
        if before:
            shown.page.keyboard.press(before)
        link.evaluate("e => e.click()")  # the list above may be growing
        shown.wait_for(link.inner_text())
        place = shown.page.locator("li.open").bounding_box()["y"]
        assert 0 <= place < 100


def test_examples_of_mistakes_are_marked_as_questions_are(opened, made):
    shown, one = opened("one"), table(made, "plain")
    shown.page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    marked = shown.page.locator("details p", has=shown.page.locator(".run"))
    assert marked.count() > 1
    for each in marked.all():
        row = one["question"].tolist().index(each.locator("a").inner_text())
        assert "".join(each.locator(".run").all_inner_texts()) == one["prediction"][row]
        if len(one["answers"][row]) == 1:
            assert "".join(each.locator("mark").all_inner_texts()) == one["answers"][row][0]


def test_what_is_below_the_list_stays_where_it_is(opened):
    shown = opened("one")
    drawn = shown.page.locator("#list li").count()
    for _ in range(3):
        shown.page.click("nav >> text=Trust")
        time.sleep(0.2)
        assert abs(shown.page.locator("#section-trust").bounding_box()["y"]) < 2
    assert shown.page.locator("#list li").count() == drawn


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
    shown, few = opened("few"), table(made, "few")
    assert "do not compare" in shown.page.inner_text("body")
    common = shown.page.locator("table", has_text="questions of all").locator("tbody tr")
    for row in common.all():
        cells = row.locator("td").all_inner_texts()
        assert cells[1] == "50"
        assert cells[2].startswith(f"{100 * few['exact_match'].astype(float).mean():.2f} (")
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
    wrong = int(np.flatnonzero(table(made, "short")["exact_match"] == 0)[0])
    verdict = rows.nth(wrong).locator("td").nth(7).inner_text()
    kind = mistakes.KINDS[table(made, "short")["mistake"][wrong]]
    assert verdict == f"F1 {100 * table(made, 'short')['f1'][wrong]:.0f}, {kind}"
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


def test_it_works_inside_of_another_page(browser, made):
    page = browser.new_page()
    said = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_content(
        "<iframe sandbox='allow-scripts' style='width: 900px; height: 600px'></iframe>"
    )
    html = (made / "one.html").read_text()
    page.evaluate("html => { document.querySelector('iframe').srcdoc = html }", html)
    inside = page.frame_locator("iframe")
    for place in range(2):
        inside.locator(".question").nth(place).click()
        assert inside.locator("li.open").count() == 1
    assert said == []
    page.close()


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
