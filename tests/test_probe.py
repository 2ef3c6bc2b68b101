"""The probe: scores are the model's, what is written redoes the run, the command and its page."""

import copy
import json
import tomllib

import numpy as np
import pytest
import tokenizers
from conftest import QUICKSTART, VOCAB, random_torch_model, write_config, write_tokenizer
from test_underspecified import OWN, SMALL, changed, toml_of

from flaxqa import cli, commands, reader
from flaxqa.errors import DataError, ModelRejected, UsageError
from flaxqa.eval import probe, report, underspecified
from flaxqa.eval.config import ProbeConfig
from flaxqa.progress import Silence
from flaxqa.spans import Scores

MODEL = str(QUICKSTART / "checkpoint")


@pytest.fixture
def small():
    return copy.deepcopy(SMALL)


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "mine.toml"
        path.write_text(toml_of(content))
        return str(path)

    return write


# --- through a model ---


def test_the_score_of_a_subject_is_a_geometric_mean_of_probabilities():
    # Start logits ln 1, ln 2, ln 5 (sum 8), end logits ln 4, ln 1, ln 5 (sum 10), then padding.
    start = np.log([[1, 2, 5, 1e-300]])
    end = np.log([[4, 1, 5, 1e-300]])
    start[0, 3] = end[0, 3] = -np.inf
    columns = np.array([[(1, 2), (0, 0)]])
    # x1 from token 1 to token 2: sqrt(2/8 * 5/10); x2 is token 0: sqrt(1/8 * 4/10).
    found = probe.subject_scores(Scores(start, end, np.array([3])), columns)
    np.testing.assert_allclose(found, [[0.125**0.5, 0.05**0.5]], atol=1e-15)


@pytest.fixture
def run_small(tmp_path, written):
    def run(model, content=SMALL, **options):
        path = content if isinstance(content, str) else written(content)
        config = ProbeConfig(model=str(model), templates=path, output=str(tmp_path / "out"),
                             **options)  # fmt: skip
        return probe.probe(config)

    return run


def scores_of(model, path):
    """The scores of a file's first section."""
    loaded = reader.load(str(model))
    chunks = probe.prepare(underspecified.read(path), loaded)
    return probe.ask(chunks, loaded, Silence())[0]


def test_scores_are_those_of_the_plain_model(folder, reference, small, written):
    import torch

    small["people"]["subjects"] = ["bob", "my city", "wolfgang"]  # one of two tokens
    path = written(small)
    (section,) = underspecified.read(path).sections
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = []
    for case in section.cases:
        for question in case.questions:
            for context in case.contexts:
                row = tokenizer.encode(question, context.text)
                with torch.no_grad():
                    found = reference(torch.tensor([row.ids]))
                start, end = (one.double().softmax(-1)[0] for one in
                              (found.start_logits, found.end_logits))  # fmt: skip
                for span in context.spans:
                    first = row.char_to_token(span[0], 1)
                    last = row.char_to_token(span[1] - 1, 1)
                    expected.append(float(start[first] * end[last]) ** 0.5)
    found = scores_of(folder, path)
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=2e-5)


@pytest.fixture
def blind(tmp_path):
    """A checkpoint that has the same embedding for all subjects."""
    import torch

    path = tmp_path / "blind"
    model = random_torch_model()
    with torch.no_grad():
        rows = model.distilbert.embeddings.word_embeddings.weight
        for name in ("wolfgang", "i"):
            rows[VOCAB.index(name)] = rows[VOCAB.index("bob")]
    model.save_pretrained(path)
    write_config(path)
    write_tokenizer(path)
    return path


def test_a_model_that_is_blind_to_subjects_prefers_none(blind, folder, run_small):
    """Equal up to float32: the two orders may run in different places of a batch."""
    found = run_small(blind)
    assert found["overall"]["mu"]["value"] < 1e-7
    assert all(abs(row["gamma"]) < 1e-7 for row in found["sections"][0]["associations"])
    assert found["overall"]["positional_error"]["value"] > 1e-3  # what it goes by is the place
    assert run_small(folder)["overall"]["mu"]["value"] > 1e-4


def test_two_subjects_that_change_names_change_signs(folder, small, written):
    small["people"]["subjects"] = ["bob", "wolfgang"]
    turned = copy.deepcopy(small)
    turned["people"]["subjects"] = ["wolfgang", "bob"]
    first, second = (underspecified.comparative(scores_of(folder, written(one)))
                     for one in (small, turned))  # fmt: skip
    assert np.abs(first).min() > 0
    np.testing.assert_allclose(first, -second, rtol=1e-3, atol=1e-8)  # float32 of other batches
    scores = scores_of(folder, written(small))
    exact = underspecified.comparative(scores[:, :, ::-1, ::-1])  # the same scores, renamed
    assert (exact == -underspecified.comparative(scores)).all()


def test_a_question_that_needs_two_windows_is_named(folder, small, run_small):
    small["people"]["templates"][1]["context"] = "[x1] is in " + "the city of " * 8 + "[x2]."
    with pytest.raises(DataError) as caught:
        run_small(folder, small, max_length=32, doc_stride=8)
    said = str(caught.value)
    assert (
        "[people] template 2, bob and wolfgang, 'was called b': question and context need" in said
    )
    assert "template 1" not in said
    small["people"]["templates"].pop()
    small["people"]["templates"][0]["question"] = "who " + "the city " * 16 + "[a]?"  # would be cut
    with pytest.raises(DataError, match="need more than one window of 64 tokens"):
        run_small(folder, small)
    assert not (folder.parent / "out" / "probe.json").exists()


@pytest.mark.parametrize(
    "context", ["the [x1], [x2], is", "the, [x1] is, [x2] is", "is, [x1], the [x2]"]
)
def test_a_subject_that_the_tokenizer_joins_with_its_neighbours_is_named(small, context):
    small["people"]["templates"] = [{"context": context, "question": "who [a]?"}]
    (section,) = underspecified.of_toml(small, [])[1]
    loaded = reader.load(MODEL)
    loaded.checkpoint.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(", ", "isolated")
    with pytest.raises(
        DataError, match=r"the tokenizer joins '(bob|wolfgang)' with what is around"
    ):
        probe.prepare(underspecified.Templates("", "", "", (section,)), loaded)


def test_logits_that_are_not_finite_are_refused(tmp_path, written):
    import torch

    path = tmp_path / "broken"
    model = random_torch_model()
    with torch.no_grad():
        model.qa_outputs.bias[0] = 3e38
        model.qa_outputs.weight[0] *= 1e38
    model.save_pretrained(path)
    write_config(path)
    write_tokenizer(path)
    with pytest.raises(ModelRejected, match="not finite"):
        scores_of(path, written(SMALL))


def test_names_that_the_tokenizer_does_not_know_are_told(folder, small, run_small):
    small["people"]["subjects"] = ["Zoë", "Xu", "bob"]
    found = run_small(folder, small)
    assert found["notes"] == ["The tokenizer does not know Zoë, Xu.",
                              "The tokenizer does not tell Zoë and Xu apart."]  # fmt: skip
    assert run_small(folder)["notes"] == []


def test_what_is_written_redoes_the_run(folder, run_small, tmp_path):
    found = run_small(folder, seed=3)
    assert found == json.loads((tmp_path / "out" / "probe.json").read_bytes())
    again = run_small(folder, seed=3)
    for name in ("overall", "sections", "example", "templates", "model"):
        assert found[name] == again[name]
    assert found["config"]["seed"] == 3
    assert len(found["templates"]["sha256"]) == 64
    assert found["model"]["sha256"]["model.safetensors"]
    assert found["example"]["answer"] in found["example"]["context"]
    (section,) = found["sections"]
    assert section["questions"] == found["questions"] == 4 * 2 * 2 * 2
    strongest = [abs(row["gamma"]) for row in section["associations"]]
    assert strongest == sorted(strongest, reverse=True)
    assert len(strongest) == 3 * 2
    assert {row["group"] for row in section["groups"]} == {"b", "w"}
    assert all(row["n"] == 4 for row in section["groups"])  # two pairs in two templates
    by_subject = {row["subject"]: row["n"] for row in section["associations"]}
    assert by_subject == {"bob": 4, "wolfgang": 2, "i": 2}


def test_a_seed_below_nothing_is_refused():
    with pytest.raises(UsageError, match="seed is -1"):
        ProbeConfig(model="m", output="o", seed=-1)


# --- the command and the page ---


@pytest.fixture
def arguments(folder, written, tmp_path):
    return ["probe", "--model", str(folder), "--templates", written(SMALL),
            "--output", str(tmp_path / "out")]  # fmt: skip


def test_the_command_writes_both_files_and_prints_one_line(arguments, tmp_path, capsys):
    assert cli.run(arguments) == 0
    told = capsys.readouterr()
    (line,) = told.out.splitlines()
    content = json.loads((tmp_path / "out" / "probe.json").read_bytes())
    assert json.loads(line)["mu"] == content["overall"]["mu"]
    assert "associations" not in line
    assert f"Who is the CEO? {content['example']['answer']} (score" in told.err
    assert f"{content['overall']['mu']['value']:.4f}" in told.err
    page = (tmp_path / "out" / "probe.html").read_text()
    for text in ("Who is the CEO?", "only a test", "wolfgang", "arXiv 2010.02428"):
        assert text in page
    assert page.index("Who is the CEO?") < page.index("only a test") < page.index("wolfgang")
    assert page.count("<svg") == 6 + 4
    assert cli.run(["report", str(tmp_path / "out"), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == page


def test_options_come_from_a_file_too(arguments, tmp_path, monkeypatch):
    (tmp_path / "probe.toml").write_text(
        f'model = "{arguments[2]}"\ntemplates = "./mine.toml"\noutput = "./other"\n'
    )
    assert cli.run(["probe", "--config", str(tmp_path / "probe.toml")]) == 0
    assert (tmp_path / "other" / "probe.html").is_file()


def test_without_jinja2_the_numbers_are_written_all_the_same(
    arguments, tmp_path, monkeypatch, capsys
):
    find_spec = commands.importlib.util.find_spec
    monkeypatch.setattr(commands.importlib.util, "find_spec",
                        lambda name: None if name == "jinja2" else find_spec(name))  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probe.html").write_text("of before")
    assert cli.run(arguments) == 0
    assert "the page needs jinja2, which this Python does not have" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["probe.json"]


EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "mine.toml").write_text(toml_of(SMALL))
    return probe.probe(ProbeConfig(model=MODEL, templates=str(folder / "mine.toml"),
                                   output=str(folder / "out")))  # fmt: skip


@pytest.fixture
def content(measured):
    return copy.deepcopy(measured)


def test_text_of_templates_is_escaped(content):
    text = json.dumps(content).replace("wolfgang", EVIL.replace('"', '\\"')).replace(
        "only a test", "<b>").replace("people", "<i>")  # fmt: skip
    page = report.page([report.Run(EVIL, probe=json.loads(text))])
    assert page.count("<script") == 1  # the page's own
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page


def drop(*path):
    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


@pytest.mark.parametrize("change", [
    drop("overall"), drop("overall", "mu"), drop("example"), drop("templates"), drop("notes"),
    drop("sections", 0, "associations"), drop("sections", 0, "groups", 0, "gamma"),
    drop("overall", "eta", "interval"), drop("templates", "sections", 0),
    changed("sections", to=5), changed("sections", 0, "associations", to=[1]),
    changed("overall", to=[]), changed("questions", to="many"),
    changed("example", "score", to="high"),
])  # fmt: skip
def test_damage_is_told_by_report(content, change, tmp_path):
    change(content)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "probe.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="the results in damaged are damaged"):
        report.write([report.read(folder)], tmp_path / "page.html")
    (folder / "probe.json").write_text("{")
    with pytest.raises(DataError, match=r"probe.json is not JSON"):
        report.read(folder)


def test_own_templates_run_on_the_quickstart_checkpoint(tmp_path):
    """All of it would take long here: a pair of each section."""
    small = tomllib.loads(OWN.read_text())
    for name, section in small.items():
        if name != "note":
            of = section["subjects"]
            section["subjects"] = ({group: names[:1] for group, names in of.items()}
                                   if isinstance(of, dict) else of[:2])  # fmt: skip
    (tmp_path / "few.toml").write_text(toml_of(small))
    found = probe.probe(ProbeConfig(model=MODEL, templates=str(tmp_path / "few.toml"),
                                    output=str(tmp_path / "out")))  # fmt: skip
    assert [one["name"] for one in found["sections"]] == list(small)[1:]
    assert found["questions"] == 4 * 2 * (8 + 5 + 4)
    assert found["notes"] == []  # its tokenizer can spell every name
