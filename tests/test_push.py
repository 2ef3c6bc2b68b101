"""A model card into a repository of the hub: shown, agreed to, and only then pushed."""

import io
import sys
import types

import huggingface_hub
import pytest
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.eval import run, snippets
from flaxqa.eval.config import EvalConfig


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The results of an evaluation."""
    output = tmp_path_factory.mktemp("evaluated") / "few"
    data = str(QUICKSTART / "heldout.json")
    run.evaluate(EvalConfig(model=str(QUICKSTART / "checkpoint"), data=data, limit=8,
                            output=str(output), devices=1))  # fmt: skip
    return output


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """Code is not run; tests/test_card.py does that."""
    monkeypatch.setattr(snippets, "run", lambda code: ("Bob", None))


class Hub:
    """A repository of the hub with one card, in memory."""

    def __init__(self, folder, card="", problem=None):
        self.path, self.problem, self.commits = folder / "hub.md", problem, []
        if card is not None:
            self.path.write_text(card)

    def model_info(self, repo_id):
        if self.problem is not None:
            raise self.problem
        return huggingface_hub.hf_api.ModelInfo(id=repo_id, sha="a" * 40, private=False,
                                                downloads=0, likes=0, tags=[])  # fmt: skip

    def hf_hub_download(self, repo_id, name, *, revision):
        assert (repo_id, name, revision) == ("me/it", "README.md", "a" * 40)
        if not self.path.exists():
            raise huggingface_hub.errors.EntryNotFoundError("none")
        return str(self.path)

    def upload_file(self, **given):
        assert (given["repo_id"], given["parent_commit"]) == ("me/it", "a" * 40)
        self.commits.append(given["path_or_fileobj"])
        return "https://hub/commit"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a hub, a token for it, and a terminal on which an answer is typed."""

    def of(card="", answer=None, token="t", **options):  # noqa: S107
        api = Hub(tmp_path, card, **options)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        error = io.StringIO() if answer is None else Terminal()
        monkeypatch.setattr(sys, "stdin", io.StringIO() if answer is None else Terminal(answer))
        monkeypatch.setattr(sys, "stderr", error)
        return api, error

    return of


def test_push_shows_the_difference_and_asks(evaluated, hub, capsys):
    for answer, pushed in (("n\n", 0), ("\n", 0), ("", 0), ("y\n", 1)):
        api, error = hub("---\nlicense: mit\n---\nBy Ada\n", answer)
        assert cli.run(["card", str(evaluated), "--push", "me/it"]) == 0
        assert "+<!-- flaxqa:evaluation -->" in error.getvalue()
        assert " license: mit" in error.getvalue()
        assert "push this to me/it? [y/N]" in error.getvalue()
        assert len(api.commits) == pushed
    text = api.commits[0].decode()
    assert text.startswith("---\nlicense: mit\n")
    assert "By Ada" in text
    assert 'flaxqa.load("me/it")' in text
    assert capsys.readouterr().out == "https://hub/commit\n"


def test_push_of_what_is_there_already_pushes_nothing(evaluated, hub, tmp_path):
    api, _ = hub(None, "y\n")
    arguments = ["card", str(evaluated), "--push", "me/it"]
    cli.run([*arguments, "--yes"])
    assert len(api.commits) == 1
    again, error = hub(api.commits[0].decode(), "y\n")
    cli.run(arguments)
    assert again.commits == []
    assert "says all of this already" in error.getvalue()


def test_push_without_a_terminal_needs_yes(evaluated, hub):
    api, _ = hub()
    with pytest.raises(UsageError, match="give --yes"):
        cli.run(["card", str(evaluated), "--push", "me/it"])
    assert api.commits == []
    cli.run(["card", str(evaluated), "--push", "me/it", "--yes"])
    assert len(api.commits) == 1


def test_push_without_a_token_is_refused(evaluated, hub):
    hub(token=None)
    with pytest.raises(UsageError, match="needs a token"):
        cli.run(["card", str(evaluated), "--push", "me/it", "--yes"])


def failed(kind, code):
    response = types.SimpleNamespace(status_code=code, headers={}, request=None)
    return kind("told", response=response)


@pytest.mark.parametrize(
    ("kind", "code", "raised", "told"),
    [("RepositoryNotFoundError", 404, UsageError, "the hub has no model me/it"),
     ("HfHubHTTPError", 403, UsageError, "the hub refuses it"),
     ("HfHubHTTPError", 412, TryAgain, "has a new commit"),
     ("HfHubHTTPError", 429, TryAgain, "cannot be reached"),
     ("HfHubHTTPError", 503, TryAgain, "cannot be reached")],
)  # fmt: skip
def test_what_the_hub_says_is_an_error_of_its_kind(evaluated, hub, kind, code, raised, told):
    hub(problem=failed(getattr(huggingface_hub.errors, kind), code))
    with pytest.raises(raised, match=told):
        cli.run(["card", str(evaluated), "--push", "me/it", "--yes"])


def test_a_hub_that_cannot_be_reached_is_to_be_tried_again(evaluated, hub):
    hub(problem=ConnectionError("no route"))
    with pytest.raises(TryAgain, match="no route"):
        cli.run(["card", str(evaluated), "--push", "me/it", "--yes"])


def test_a_broken_card_on_the_hub_is_refused(evaluated, hub):
    api, _ = hub("---\na: [\n---\n")
    with pytest.raises(DataError, match=r"README.md of me/it"):
        cli.run(["card", str(evaluated), "--push", "me/it", "--yes"])
    assert api.commits == []
