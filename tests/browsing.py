"""What tests in a browser need: this machine's Chromium, open pages, runs made without a model."""

import shutil
import time

import numpy as np
import pytest

from flaxqa.answers import Answer, Answers
from flaxqa.eval import calibration, mistakes, questions, run, squad
from flaxqa.eval.questions import Data

EVIL = '</script><script>document.title="broken"</script><img src=x onerror="document.title=1"><!--'


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


class Page:
    """An open page, with all that it said and asked for."""

    def __init__(self, context, path, place=""):
        self.page = context.new_page()
        self.path, self.said, self.asked = path, [], []
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

    def wait_for(self, question):
        """Until this question is open: links are followed a little later than they are clicked."""
        self.page.locator("li.open .asked", has_text=question).wait_for(timeout=10_000)

    def open_question(self):
        return self.page.locator("li.open .asked").inner_text()


def evaluation(folder, asked, answers):
    """A run of these questions, written as `flaxqa eval` writes one; answers are last places."""
    rows = []
    for question, said in zip(asked, answers, strict=True):
        start = question.context.rfind(said)
        rows.append(
            Answers([Answer(said, start, start + len(said), 0.5, 1.0, 1.0)] if said else [])
        )
        rows[-1].n_windows, rows[-1].null_odds = 1, -1.0
    data = Data(list(asked), False)
    predictions = run.best_texts(asked, rows, None)
    scores = squad.score(asked, predictions)
    kinds = [mistakes.kind_of(q, mistakes.Prediction(predictions[q.id])) for q in asked]
    given = np.array([bool(row) for row in rows])
    metrics = {
        **scores.means,
        "calibration": calibration.told(scores, given, np.full(len(rows), 0.5), None),
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
