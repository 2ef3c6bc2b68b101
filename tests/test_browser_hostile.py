"""Pages of data that would break a page, in a real browser (`make browser`)."""

import json
import re
import shutil
import time
from urllib.parse import quote

import pytest
from browsing import EVIL, Page, browser, evaluation  # noqa: F401 (a fixture)

from flaxqa.eval import examples, groups, report
from flaxqa.eval.questions import SquadExample

pytestmark = pytest.mark.browser
TURNED = "\u202eturned \u2066 around"


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
    if name == "quotes":
        text = '"' * 1_000
        asked = [
            SquadExample(str(place), f"{text[9:]}{place}", f"Ada {text}", (text,))
            for place in range(9_000)
        ]
        return evaluation(folder / name, asked, [text] * 9_000)
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


@pytest.mark.parametrize("name", ["texts", "word", "alike", "quotes", "many", "long"])
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
    assert (content["left_out"] > 0) == (name in ("many", "quotes"))
    context.close()


@pytest.fixture
def page_of(browser, tmp_path):
    """Opens the page of a run of some questions."""
    contexts = []

    def make(asked, answers, place="", also=(), **options):
        directory = evaluation(tmp_path / "run", asked, answers)
        also = [shutil.copytree(directory, tmp_path / name) for name in also]
        path = tmp_path / "page.html"
        report.write([report.read(each) for each in (directory, *also)], path, **options)
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        return Page(contexts[-1], path, place)

    yield make
    for context in contexts:
        context.close()


IDS = ["a b", "100%", "%41", "a/b?c#d", "\"'<&>", "\U0001f600 \u00e9", "list", "section-trust", " "]


@pytest.mark.parametrize("name", IDS)
def test_any_id_is_a_link(page_of, name):
    asked = [
        SquadExample(name, "this?", "Ada x", ("Ada",)),
        SquadExample("o", "o?", "Ada", ("Ada",)),
    ]
    shown = page_of(asked, ["Ada", "Ada"], "#" + quote(name, safe=""))
    assert shown.open_question() == "this?"
    shown.page.keyboard.press("j")
    assert shown.page.evaluate("location.hash") == "#o"
    shown.page.keyboard.press("k")
    link = shown.page.locator("li.open a").get_attribute("href")
    shown.page.keyboard.press("Escape")
    shown.page.evaluate("link => { location.hash = '#o'; location.hash = link }", link)
    shown.wait_for("this?")
    assert shown.said == []


def test_an_id_with_a_percent_sign_can_be_written_by_hand(page_of):
    asked = [SquadExample("x", "x?", "Ada", ("Ada",)), SquadExample("5%", "5?", "Ada", ("Ada",))]
    assert page_of(asked, ["Ada", "Ada"], "#5%").open_question() == "5?"


def test_marks_are_right_after_characters_of_two_units(page_of):
    wide = "\U0001f600\U0001d538 "
    for_a_part = f"{wide * 8_000}in \U0001f3d9Turin\U0001f600, Ada {wide * 5_000}"
    for context in (f"{wide}Turin {wide}Ada.", for_a_part):
        asked = [SquadExample("1", "Where?", context, ("Turin",))]
        shown = page_of(asked, ["Ada"], "#1", also=["other"])
        assert shown.page.locator(".context mark").all_inner_texts() == ["Turin"]
        for number in range(2):
            assert shown.page.inner_text(f".context .run-{number}") == "Ada"
        shutil.rmtree(shown.path.parent / "run")
        shutil.rmtree(shown.path.parent / "other")


def test_answers_of_long_contexts_are_in_view(page_of):
    context = "word " * 3_000 + "Turin " + "word " * 300
    shown = page_of([SquadExample("1", "Where?", context, ("Turin",))], ["Turin"])
    shown.page.keyboard.press("j")
    whole, mark = (shown.page.locator(f".context{each}").bounding_box() for each in ("", " mark"))
    assert whole["y"] < mark["y"] < whole["y"] + whole["height"] - mark["height"]
    assert "not in the part" not in shown.page.inner_text("li.open")


def test_an_answer_outside_of_what_is_shown_is_told(page_of):
    context = "Turin " + "word " * 30_000 + "Ada"
    shown = page_of([SquadExample("1", "Where?", context, ("Turin",))], ["Ada"], "#1")
    assert shown.page.locator(".context mark").count() == 1
    assert "not in the part of the context that is shown" in shown.page.inner_text("li.open")


def test_a_group_may_have_no_name(page_of, tmp_path):
    asked = [SquadExample(str(place), "q", "Ada", ("Ada",)) for place in range(4)]
    (tmp_path / "groups.csv").write_text(",id\nx,0\ny,1\ny,2\n")
    shown = page_of(asked, ["Ada"] * 4, groupings=groups.read(tmp_path / "groups.csv"))
    assert shown.choose("group-3", "1") == 2
    assert shown.said == []


def test_underlines_of_several_runs_are_whole(page_of):
    asked = [SquadExample("1", "Who?", "Ada lives here with Ada", ("here",))]
    shown = page_of(asked, ["Ada"], "#1", also=["other", "third", "n" * 200])
    box = "e => e.getBoundingClientRect()"
    whole = shown.page.locator(".context").evaluate(box)
    last = shown.page.locator(".context .run .run .run").first.evaluate(box)
    assert whole["bottom"] - last["bottom"] >= 8  # the third is so far below the text
    first = shown.page.locator(".runs tbody tr").last.locator("td").first.bounding_box()
    assert first["width"] < 300
