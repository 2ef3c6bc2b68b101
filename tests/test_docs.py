"""The code of README.md and docs/ runs, commands are those that there are, links lead somewhere.

Blocks of a page run in their order, in a folder that has all names of the pages: MODEL and the
hub's ids are the quickstart checkpoint, data are a few of its questions.
"""

import ast
import gzip
import importlib.util
import inspect
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import HUB_MODEL, QUICKSTART, ROOT

from flaxqa import cli

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
QUESTIONS = 6
OPTIONAL = ("tensorflow", "polars")
# Blocks with one of these texts are only compiled, commands with one of the words only parsed.
LEFT_OUT = {
    "import ray": "starts a Ray cluster, as tests/test_engines.py does",
    "flaxqa.compare(": "starts a process for each backend, as tests/test_compare.py does",
    "jax.export.deserialize(": "the export takes long; tests/test_export.py has it",
}
ELSEWHERE = {"--engine", "--shard", "--multihost", "--finalize", "compare", "bench", "report",
             "card", "finetune", "probe", "stablehlo"}  # fmt: skip


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """The fenced blocks of a page: the line of each, its language and its code."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        if found[2] in languages:
            yield text.count("\n", 0, found.start()) + 1, found[2], inspect.cleandoc(found[3])


def prose(page):
    return FENCE.sub("", page.read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    for model in ("MODEL", "DIR", "BERT", HUB_MODEL, "shared/checkpoints/distilbert-minilm-squad"):
        (folder / model).parent.mkdir(parents=True, exist_ok=True)
        (folder / model).symlink_to(QUICKSTART / "checkpoint")
    (folder / "configs").symlink_to(ROOT / "configs")
    article = json.loads((QUICKSTART / "heldout.json").read_bytes())["data"][0]
    paragraph = article["paragraphs"][0]
    asked = paragraph["qas"] = paragraph["qas"][:QUESTIONS]
    impossible = [{**one, "is_impossible": False} for one in asked]
    impossible.append({"id": "none", "question": "Why?", "answers": [], "is_impossible": True})
    of_version = {"1.1": asked, "v2.0": impossible}
    squad = {
        version: {"version": version, "data": [{"paragraphs": [{**paragraph, "qas": questions}]}]}
        for version, questions in of_version.items()
    }
    rows = [{"id": one["id"], "question": one["question"], "context": paragraph["context"]}
            for one in asked]  # fmt: skip
    predictions = {one["id"]: one["answers"][0]["text"] for one in asked}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    written = {
        "train.json": squad["1.1"],
        "dev-v1.1.json": squad["1.1"],
        "dev-v2.0.json": squad["v2.0"],
        "rajpurkar/squad/validation.json": squad["1.1"],
        "shared/squad/dev-v1.1.json": squad["1.1"],
        "shared/squad/heldout-v1.1.json": squad["1.1"],
        "predictions.json": predictions,
        "null_odds.json": dict.fromkeys([*predictions, "none"], -1.0),
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "questions.jsonl").write_text(lines)
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


# --- Python ---


def imported(code):
    """The packages that a block imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def run_python(code, line, page, names):
    program = compile("\n" * line + code, name_of(page), "exec")
    for text, reason in LEFT_OUT.items():
        if text in code:
            pytest.skip(reason)
    for package in set(imported(code)) & set(OPTIONAL):
        pytest.importorskip(package, reason=f"{package} is not installed")
    exec(program, names)  # noqa: S102


# --- commands ---


def commands(code):
    """The commands of a block as words, without comments and variables."""
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(os.path.expandvars(line), comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words


def run_command(words, *, parse_only=False):
    """Runs a command, or sees whether it could run."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "flaxqa":
        run_flaxqa(arguments, parse_only)
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), words
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
            assert extra in known["optional-dependencies"], words
    elif program == "pytest":
        file, tests = ROOT / arguments[0], arguments[2:]
        assert all(test in file.read_text() for test in tests), words
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, words
    elif program in ("srun", "gcloud"):
        (inner,) = (word for word in words if word.startswith("flaxqa "))
        run_command(shlex.split(inner), parse_only=True)
    else:
        pytest.fail(f"what is {words}?")


def run_flaxqa(arguments, parse_only):
    assert arguments[0] in cli.COMMANDS, arguments
    if len(arguments) == 1 or "--help" in arguments:
        return
    try:
        command = cli.parse(arguments)
    except SystemExit:
        pytest.fail(f"flaxqa does not take {arguments}")
    cli.check(command, arguments[0])
    in_store = any(word.startswith("s3://") for word in arguments)  # as test_stores runs it
    if parse_only or in_store or ELSEWHERE & set(arguments):
        return
    if "saved_model" in arguments:
        pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    if arguments[0] == "eval":
        limit = [] if "--limit" in arguments else ["--limit", str(QUESTIONS)]
        arguments = [*arguments, *limit, "--min-f1", "0"]
    assert cli.run(arguments) == 0, arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_shows_runs(page, place, subtests, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("S", "shared")
    names = {"__name__": "docs"}
    for line, language, code in blocks(page, "python", "sh"):
        if language == "python":
            with subtests.test(f"{name_of(page)}:{line}"):
                run_python(code, line, page, names)
            continue
        for words in commands(code):
            with subtests.test(f"{name_of(page)}:{line} {shlex.join(words)}"):
                run_command(words)


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_commands_in_the_text_are_those_that_there_are(page, monkeypatch):
    monkeypatch.setenv("S", "shared")
    for code in re.findall(r"`((?:flaxqa|make|pip|pytest) [^`]+)`", prose(page)):
        if "COMMAND" not in code:
            for words in commands(code):
                run_command(words, parse_only=True)


# --- pages ---


def anchors(page):
    """Those that GitHub and the site give to the headings."""
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_what_the_reference_names_is_there(page):
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
        module, _, own = name.rpartition(".")
        source = Path(importlib.util.find_spec(module).origin)  # not imported, which takes long
        if source.name == "__init__.py":
            assert importlib.util.find_spec(name) is not None, name
        else:
            assert re.search(rf"^(class|def) {own}\b", source.read_text(), re.M), name


def test_the_readme_is_short_and_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert {"make eval", "make test"} <= set(re.findall(r"^make \w+", text, re.M))
