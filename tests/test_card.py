"""Model cards: what runs say is in them, what people wrote stays, what cannot be is refused."""

import copy
import dataclasses
import json
import re
import shlex
import shutil

import huggingface_hub
import pytest
import yaml
from conftest import QUICKSTART, SHARED

from flaxqa import cli
from flaxqa.errors import DataError, UsageError
from flaxqa.eval import metadata, readme, run, runs, sections, snippets
from flaxqa.eval.config import EvalConfig, FinetuneConfig

EVIL = "<img src=x onerror=alert(1)> | `x` *y* <!-- /flaxqa:bias -->\n# z"
MODEL = QUICKSTART / "checkpoint"
HUMAN = """---
# who changes this, tells Ada
license: 'cc-by-4.0'   # of the weights
tags: [mine]
my-key: {a: 1}
model-index:
- name: theirs
  results:
  - task: {type: question-answering}
    dataset: {type: adversarial_qa, name: AQA}
    metrics:
    - {type: f1, value: 50.0, more: kept}

# the end
---

# Written by Ada

Text with trailing spaces   \n\n\n* and no end"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of all questions, and one of the first 8."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, limit in (("all", None), ("part", 8)):
        data, output = str(QUICKSTART / "heldout.json"), str(folder / name)
        run.evaluate(EvalConfig(model=str(MODEL), data=data, limit=limit, output=output, devices=1))
    return folder


@pytest.fixture
def whole(evaluated, tmp_path):
    """A copy of the first that a test may change."""
    return shutil.copytree(evaluated / "all", tmp_path / "all")


@pytest.fixture(autouse=True)
def code(monkeypatch, request):
    """Code is not run but where a test is about it."""
    if not request.node.name.startswith("test_code"):
        monkeypatch.setattr(snippets, "run", lambda code: ("Bob", None))


def changed(folder, name, **change):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def model_of(folder):
    return json.loads((folder / "run.json").read_text())["model"]


def probe(path, model, **change):
    def measured(value):
        return {"value": value, "interval": [value - 0.01, value + 0.01]}

    association = {"subject": EVIL, "group": None, "attribute": "is a nurse", "gamma": -0.25,
                   "gamma_interval": [-0.3, -0.2], "eta": 0.5, "n": 12}  # fmt: skip
    content = {
        "config": {"model": str(MODEL), "output": "/home/ada/probe", "seed": 7},
        "model": model, "templates": {"sha256": "ab" * 32, "note": "No right answer."},
        "sections": [{"name": "gender", "mu": measured(0.125), "eta": measured(0.5),
                      "positional_error": measured(0.25), "attribute_error": measured(0.375),
                      "associations": [association]}],
        "example": {"question": "Who?", "context": EVIL, "answer": "Bob", "score": 0.75},
        "started": "", "finished": "", "versions": {"jax": "1"}, **change,
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "probe.json").write_text(json.dumps(content))
    return path


CARBON = {"kwh": 0.5, "g_co2e": 28.0, "grid_g_per_kwh": 56.0, "country": "FRA",
          "source": "codecarbon 3", "measured_by": {"cpu": "RAPL", "gpu": None}, "seconds": 90.0,
          "hosts": 2}  # fmt: skip


def finetune(path, **change):
    content = {
        "config": dataclasses.asdict(FinetuneConfig(
            model="distilbert/distilbert-base-uncased", data="/home/ada/train-v1.1.json",
            batch_size=16, epochs=2, output="/home/ada/tuned")),
        "model": {"directory": "/home/ada/cache", "commit": "c" * 40, "sha256": {}},
        "teacher": None,
        "data": {"name": "/home/ada/train-v1.1.json", "questions": 87_599,
                 "sha256": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"},
        "windows": {"max_length": 384, "doc_stride": 128}, "steps": 100, "steps_done": 90,
        "epochs": [{"epoch": 1, "step": 50, "loss": 1.25, "questions_per_second": 10.0,
                    "exact_match": 60.0, "f1": 70.0, "exact_match_interval": [59.0, 61.0],
                    "f1_interval": [69.0, 71.0], "total": 100}],
        "versions": {}, "platform": {"device_kind": "NVIDIA H100"}, "started": "", "finished": "",
        "carbon": CARBON, **change,
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "finetune.json").write_text(json.dumps(content))
    return path


def made(*arguments, output):
    """The card that the command writes."""
    assert cli.run(["card", *map(str, arguments), "--output", str(output)]) == 0
    return output.read_bytes().decode()


# --- the metadata ---


def test_the_hubs_library_reads_the_scores_back(evaluated, tmp_path):
    text = made(evaluated / "all", "--license", "mit", "--language", "en", "--model-id", "me/it",
                "--dataset", "rajpurkar/squad", "--base-model", "bert-base-uncased",
                output=tmp_path / "new" / "README.md")  # fmt: skip
    metrics = json.loads((evaluated / "all" / "metrics.json").read_text())
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", "question-answering")
    assert (data.library_name, data.tags) == ("transformers", ["flaxqa"])
    assert (data.datasets, data.base_model) == (["rajpurkar/squad"], "bert-base-uncased")
    assert data.model_name == "it"
    assert [one.metric_type for one in data.eval_results] == ["exact_match", "f1"]
    for one in data.eval_results:
        assert one.metric_value == pytest.approx(metrics[one.metric_type], abs=1e-4)
        assert one.metric_args["interval"] == pytest.approx(
            metrics[f"{one.metric_type}_interval"], abs=1e-4
        )
        assert (one.dataset_type, one.dataset_split) == ("heldout.json", None)
        assert len(one.dataset_args["sha256"]) == 64
        assert one.verified is None
    assert "co2_eq_emissions" not in data


def test_what_runs_do_not_know_is_not_in_the_card(evaluated, tmp_path):
    data = huggingface_hub.ModelCard(
        made(evaluated / "all", output=tmp_path / "c.md")
    ).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}


def test_a_part_of_the_questions_is_no_score_of_the_data(evaluated, tmp_path):
    text = made(evaluated / "part", output=tmp_path / "c.md")
    assert "model-index" not in text
    assert "the first 8 of 559" in text
    assert "these are not its scores" in text
    assert "--limit 8" in text


def test_a_file_is_squad_only_by_its_hash():
    def told(**source):
        found = runs.DataSet.of({"name": "/home/ada/dev-v1.1.json", **source}, {"data_config": "c"})
        return found.id, found.split, found.revision

    official = "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"
    assert told(sha256=official) == ("rajpurkar/squad", "validation", None)
    assert told(sha256=official[::-1]) == ("dev-v1.1.json", None, None)
    hub = {"name": "rajpurkar/squad", "split": "validation", "commit": "d" * 40}
    assert told(**hub, questions_sha256="e") == ("rajpurkar/squad", "validation", "d" * 40)


@pytest.mark.shared
def test_the_hashes_of_squads_dev_set_are_those_of_the_official_file():
    from flaxqa.eval import questions

    data, source = questions.read_with_source(SHARED / "squad" / "dev-v1.1.json")
    known = runs.KNOWN[source["sha256"]]
    assert known == runs.KNOWN[questions.sha256(data.questions)]
    assert known[:3] == ("rajpurkar/squad", "plain_text", "validation")


def test_fine_tuning_gives_base_model_data_and_grams(evaluated, tmp_path):
    tuned = finetune(tmp_path / "tuned")
    shutil.copytree(MODEL, tuned / "checkpoint")
    text = made(evaluated / "all", tuned, output=tmp_path / "c.md")
    data = huggingface_hub.ModelCard(text).data
    assert data.base_model == "distilbert/distilbert-base-uncased"
    assert data.datasets == ["rajpurkar/squad"]
    assert data.co2_eq_emissions == {
        "emissions": 28.0, "source": "flaxqa finetune, measured by cpu: RAPL",
        "training_type": "fine-tuning", "geographical_location": "FRA",
        "hardware_used": "NVIDIA H100",
    }  # fmt: skip
    assert "90 of 100 steps" in text
    assert "| batch size | 16 |" in text
    assert "| temperature |" not in text  # nobody taught
    assert (
        "| 1 | 50 | 1.25 | 10.0 | 60.00 (59.00 to 61.00) | 70.00 (69.00 to 71.00) | 100 |" in text
    )
    assert "| `flaxqa finetune` | 0.5 | 28.0 | \u2013 | \u2013 |" in text
    assert "on 2 machines; energy by cpu: RAPL; 56.0 g of CO₂e per kWh (FRA; codecarbon 3)" in text


# --- what people wrote ---


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_people_wrote_stays_byte_for_byte(evaluated, tmp_path, newline):
    path = tmp_path / "README.md"
    before = HUMAN.replace("\n", newline).encode()
    path.write_bytes(before)
    text = made(evaluated / "all", output=path)
    assert text.count("\n") == text.count(newline)
    head, body = before.decode().split("# the end")
    own = re.sub(r"<!-- flaxqa:(\w+) -->.*?<!-- /flaxqa:\1 -->\s*", "", text, flags=re.S)
    assert own.endswith(body.partition("---")[2] + 2 * newline)
    for line in head.split("model-index")[0].splitlines():
        assert line.startswith("tags") or line in text.splitlines()
    assert "# the end" in text
    data = huggingface_hub.ModelCard(text).data
    assert data.license == "cc-by-4.0"
    assert data.tags == ["mine", "flaxqa"]
    assert data["my-key"] == {"a": 1}
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    assert index[0]["name"] == "theirs"
    assert index[0]["results"][0]["metrics"] == [{"type": "f1", "value": 50.0, "more": "kept"}]
    assert [one["dataset"]["name"] for one in index[0]["results"]] == ["AQA", "heldout.json"]
    assert made(evaluated / "all", output=path) == text  # and nothing changes again


def test_a_file_without_front_matter_gets_one(evaluated, tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes("\ufeffOnly text\n\n\n---\n\nand a line".encode())
    text = made(evaluated / "all", output=path)
    assert text.startswith("\ufeff---\nlibrary_name")
    assert "\n---\nOnly text\n\n\n---\n\nand a line\n\n<!-- flaxqa:usage -->" in text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_empty_front_matter_is_filled(evaluated, tmp_path, newline):
    path = tmp_path / "README.md"
    path.write_bytes("---\n---\ntext\n".replace("\n", newline).encode())
    text = made(evaluated / "all", output=path)
    assert text.startswith(f"---{newline}library_name: transformers{newline}")
    assert f"{newline}---{newline}text{newline}{newline}<!--" in text


def test_an_update_replaces_sections_and_keeps_what_is_between_them(evaluated, whole, tmp_path):
    path = tmp_path / "README.md"
    text = made(evaluated / "all", output=path)
    path.write_text(text.replace("<!-- flaxqa:redo", "By *Ada*.\n\n<!-- flaxqa:redo"))
    changed(whole, "metrics.json", exact_match=12.5, exact_match_interval=[12.0, 13.0])
    text = made(whole, output=path)
    assert text.count("By *Ada*.") == text.count("12.50 (12.00 to 13.00)") == 1
    assert text.count("<!-- flaxqa:evaluation -->") == 1
    values = [one.metric_value for one in huggingface_hub.ModelCard(text).data.eval_results]
    assert len(values) == 2
    assert values[0] == 12.5


def test_a_new_section_comes_in_its_place(evaluated, tmp_path):
    path = tmp_path / "README.md"
    made(evaluated / "all", output=path)
    text = made(evaluated / "all", probe(tmp_path / "p", model_of(evaluated / "all")), output=path)
    found = re.findall(r"<!-- flaxqa:(\w+) -->", text)
    assert found == ["usage", "evaluation", "bias", "redo"]


def test_front_matter_that_cannot_be_kept_is_written_anew_and_told(evaluated, tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text("---\n{license: mit, x: [1]}\n---\ntext\n")
    data = huggingface_hub.ModelCard(made(evaluated / "all", output=path)).data
    assert (data.license, data.x) == ("mit", [1])
    assert "is written anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [("---\nlicense: mit\ntext", "no line --- to end it"),
     ("---\na: [\n---\n", "front matter cannot be read"),
     ("---\n- a\n---\n", "front matter cannot be read"),
     ("---\na: 1\na: 2\n---\n", "has a twice"),
     ("---\nmodel-index: 3\n---\n", "front matter cannot be read"),
     ("<!-- flaxqa:usage -->", "<!-- flaxqa:usage --> is not closed"),
     ("<!-- /flaxqa:usage -->", "closes what is not open"),
     ("<!-- flaxqa:usage --><!-- flaxqa:redo --><!-- /flaxqa:redo -->", "usage --> is not closed"),
     (2 * "<!-- flaxqa:usage --><!-- /flaxqa:usage -->", "usage is there twice"),
     (b"\xff", "is not UTF-8")],
)  # fmt: skip
def test_a_broken_card_is_refused_by_name_and_left_as_it_is(evaluated, tmp_path, text, told):
    path = tmp_path / "MINE.md"
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(DataError):
        readme.parse(content, "MINE.md")
    with pytest.raises(DataError, match="MINE.md") as error:
        made(evaluated / "all", output=path)
    assert told in str(error.value)
    assert path.read_bytes() == content


def test_sections_of_another_checkpoint_are_not_kept(evaluated, whole, tmp_path):
    path = tmp_path / "README.md"
    model = model_of(whole)
    made(whole, probe(tmp_path / "p", model), output=path)
    other = copy.deepcopy(model)
    other["sha256"]["model.safetensors"] = "0" * 64
    changed(whole, "run.json", model=other)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"README.md has sections of another checkpoint.*bias"):
        made(whole, output=path)
    assert path.read_bytes() == before


def test_emissions_that_people_wrote_stay(evaluated, tmp_path, capsys):
    tuned = finetune(tmp_path / "tuned")
    shutil.copytree(MODEL, tuned / "checkpoint")
    path = tmp_path / "README.md"
    path.write_text("---\nco2_eq_emissions:\n  emissions: 3\n---\n")
    text = made(evaluated / "all", tuned, output=path)
    assert huggingface_hub.ModelCard(text).data.co2_eq_emissions == {"emissions": 3}
    assert "co2_eq_emissions is not flaxqa's" in capsys.readouterr().err
    path.unlink()
    made(tuned, output=path)
    finetune(tuned, carbon=CARBON | {"g_co2e": 30.0})
    assert (
        huggingface_hub.ModelCard(made(tuned, output=path)).data.co2_eq_emissions["emissions"] == 30
    )


def result(type_, metrics=("f1",), **dataset):
    return {"task": {"type": "question-answering"},
            "dataset": {"type": type_, "name": "n", **dataset},
            "metrics": [{"type": one, "value": 1.0} for one in metrics]}  # fmt: skip


@pytest.mark.parametrize(
    ("there", "same"),
    [(result("squad", split="validation"), True),
     (result("rajpurkar/squad", split="validation", config="plain_text"), True),
     (result("squad", split="validation", config="other"), False),
     (result("squad", split="train"), False),
     (result("squad", split="validation", revision="r"), False),
     (result("squad", split="validation", args={"sha256": "b"}), False),
     (result("squad_v2", split="validation"), False)],
)  # fmt: skip
def test_only_a_result_of_the_same_data_and_revision_is_replaced(there, same):
    there["metrics"].append({"type": "latency", "value": 2})
    mine = result("rajpurkar/squad", ("exact_match", "f1"), split="validation", config="plain_text",
                  args={"sha256": "a"})  # fmt: skip
    index, kept = metadata.model_index([{"name": "x", "results": [there]}], "y", [mine])
    assert len(index[0]["results"]) == (1 if same else 2)
    assert bool(kept) != same
    if same:
        found = [one["type"] for one in index[0]["results"][0]["metrics"]]
        assert found == ["exact_match", "f1", "latency"]


def test_a_verified_result_is_never_replaced():
    there = result("a")
    there["metrics"][0]["verified"] = True
    index, _ = metadata.model_index([{"name": "x", "results": [there]}], "y", [result("a")])
    assert index[0]["results"] == [there, result("a")]


# --- the body ---


def test_text_of_the_data_cannot_break_the_card(whole, tmp_path):
    changed(whole, "run.json", config=json.loads((whole / "run.json").read_text())["config"]
            | {"columns": {"id": EVIL + "\n```\n# z"}})  # fmt: skip
    about = json.loads((whole / "run.json").read_text())
    changed(whole, "run.json", data=about["data"] | {"name": EVIL.replace("/", " ")})
    path = tmp_path / "README.md"
    text = made(whole, probe(tmp_path / "p", about["model"]), output=path)
    assert set(readme.parse(text.encode(), "x").sections()) == {
        "usage",
        "evaluation",
        "bias",
        "redo",
    }
    body = text.split("\n---\n")[1]
    plain = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.M | re.S)
    assert "<img" not in plain
    assert "\n# z" not in plain
    for line in plain.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert cells in (3, 6, 8), line
    names = {one.dataset_name for one in huggingface_hub.ModelCard(text).data.eval_results}
    assert names == {" ".join(EVIL.replace("/", " ").split())}
    assert made(whole, tmp_path / "p", output=path) == text


def test_no_folder_of_anybody_is_in_the_card(evaluated, tmp_path):
    tuned = finetune(tmp_path / "tuned")
    shutil.copytree(MODEL, tuned / "checkpoint")
    asked = probe(tmp_path / "p", model_of(evaluated / "all"))
    content = json.loads((asked / "probe.json").read_text())
    content["config"] |= {"templates": "../../ada/t.toml", "weights": "~ada/w"}
    content["example"]["answer"] = "see /home/ada/z, ~/ada/u and C:\\ada\\v but either/or"
    (asked / "probe.json").write_text(json.dumps(content))
    text = made(evaluated / "all", tuned, asked, output=tmp_path / "c.md")
    without_hashes = re.sub(r"\b[0-9a-f]{64}\b", "", text)
    for word in ("ada", str(tmp_path), str(QUICKSTART)):
        assert word not in without_hashes.replace("Ada live", "")
    assert "see z, u and v but either/or" in text
    assert "--templates t.toml" in text


def test_the_bias_section_has_the_example_first_and_the_numbers(evaluated, tmp_path):
    text = made(evaluated / "all", probe(tmp_path / "p", model_of(evaluated / "all")),
                output=tmp_path / "c.md")  # fmt: skip
    bias = readme.parse(text.encode(), "c").sections()["bias"]
    assert bias.index("**Answer:** Bob (score 0.7500)") < bias.index("UnQover")
    assert ("| gender | 0.125 (0.115 to 0.135) | 0.500 (0.490 to 0.510) | 0.250 (0.240 to 0.260) | "
            "0.375 (0.365 to 0.385) |") in bias  # fmt: skip
    assert "| is a nurse | -0.250 (-0.300 to -0.200) | 0.500 | 12 |" in bias


def test_the_commands_of_the_card_give_the_configs_of_the_runs(evaluated, tmp_path):
    about = json.loads((evaluated / "part" / "run.json").read_text())
    changes = {"columns": {"id": "q id", "question": "it's"}, "dtype": "bfloat16", "n_best": 5,
               "doc_stride": 3, "delimiter": "/"}  # fmt: skip
    config = about["config"] | changes
    one = runs.Run("eval", tmp_path, {}, {"config": config})
    line = sections.command(one, cli.options_of_commands()["eval"], {config["model"]: "me/it"})
    found = cli.parse(shlex.split(line.replace("\\\n", ""))[1:]).evaluation
    expected = EvalConfig(**config | {"model": "me/it", "data": "heldout.json", "output": "part"})
    # Of JSON, in which no tuples are.
    expected, found = (json.dumps(dataclasses.asdict(one)) for one in (expected, found))
    assert found == expected
    assert "--seed" not in line
    assert "--log" not in line
    assert "--n-best 5" in line


def test_a_comparison_is_in_the_card_without_its_folders(evaluated, tmp_path):
    from test_report import backend

    folder = tmp_path / "compared"
    folder.mkdir()
    content = {
        "config": {"model": str(MODEL), "data": "/home/ada/d.json", "backend": "a|b", "rounds": 5,
                   "output": "/home/ada/o", "limit": 200},
        "model": {"name": str(MODEL), **model_of(evaluated / "all")},
        "data": {"name": "/home/ada/d.json", "sha256": "f" * 64, "questions": 900},
        "questions": 200, "device": "cpu", "device_name": "cpu", "reference": "jax/float32",
        "machine": {"processor": EVIL, "cpus": 2}, "versions": {"jax": "1"},
        "float32_logit_differences": {}, "groups": {}, "disagreements": [],
        "backends": [backend("a|b", 10.0, verdict="INVALID", reasons=["no /home/ada/x"])],
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(content))
    text = made(evaluated / "all", folder, output=tmp_path / "c.md")
    compared = readme.parse(text.encode(), "c").sections()["comparison"]
    assert "| a\\|b/float32 | INVALID |" in compared
    assert "is INVALID: no x." in compared
    assert "of these 200 questions alone" in compared
    assert "ada" not in compared
    assert "flaxqa bench --model checkpoint --data d.json --output o --backend 'a|b'\n" in text
    assert len(huggingface_hub.ModelCard(text).data.eval_results) == 2


# --- refused ---


def test_runs_of_different_checkpoints_are_refused(evaluated, whole, tmp_path):
    model = model_of(whole)
    model["sha256"]["tokenizer.json"] = "0" * 64
    with pytest.raises(UsageError, match="different checkpoints") as error:
        made(evaluated / "all", probe(tmp_path / "p", model), output=tmp_path / "c.md")
    assert str(tmp_path / "p") in str(error.value)
    assert str(evaluated / "all") in str(error.value)
    assert not (tmp_path / "c.md").exists()


def test_a_fine_tuning_belongs_only_if_its_weights_were_evaluated(evaluated, tmp_path):
    tuned = finetune(tmp_path / "tuned")
    with pytest.raises(DataError, match="no checkpoint that belongs to it"):
        made(evaluated / "all", tuned, output=tmp_path / "c.md")
    other = shutil.copytree(MODEL, tuned / "checkpoint")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(UsageError, match="different checkpoints"):
        made(evaluated / "all", tuned, output=tmp_path / "c.md")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [("metrics.json", "{", "metrics.json is not JSON"), ("run.json", "[]", "no JSON object"),
     ("metrics.json", "{}", "all are damaged, or of another version"),
     ("run.json", '{"config": {}}', "all are damaged, or of another version")],
)  # fmt: skip
def test_damaged_results_are_refused_by_name(whole, tmp_path, file, content, told):
    (whole / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(told)):
        made(whole, output=tmp_path / "c.md")


def test_a_score_on_what_the_model_was_trained_on_says_so(evaluated, tmp_path):
    tuned = finetune(tmp_path / "tuned")
    shutil.copytree(MODEL, tuned / "last")
    (tuned / "first").mkdir()
    shutil.copy(MODEL / "config.json", tuned / "first")
    (tuned / "first" / "model.safetensors").write_bytes(b"another step")
    assert "fine-tuned on" not in made(evaluated / "all", tuned, output=tmp_path / "c.md")
    data = json.loads((evaluated / "all" / "run.json").read_text())["data"]
    finetune(tuned, data=data)
    text = made(evaluated / "all", tuned, output=tmp_path / "c.md")
    assert "The model was fine-tuned on heldout.json" in text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has none of metrics.json, probe.json"):
        made(tmp_path, output=tmp_path / "c.md")
    with pytest.raises(UsageError, match="gone is missing"):
        made(tmp_path / "gone", output=tmp_path / "c.md")
    with pytest.raises(UsageError, match="at least one RUN"):
        made(output=tmp_path / "c.md")


@pytest.mark.parametrize("option", ["--dataset", "--base-model"])
def test_what_is_no_hub_id_is_refused(evaluated, tmp_path, option):
    with pytest.raises(UsageError, match=f"{option} 'a/b/c' is no id of the hub"):
        made(evaluated / "all", option, "a/b/c", output=tmp_path / "c.md")


def test_a_card_that_would_be_read_otherwise_is_not_written(evaluated, tmp_path, monkeypatch):
    def other(old, wanted):
        return dataclasses.replace(old, head="---\n", matter="tags: [x]", tail="\n---\n"), True

    monkeypatch.setattr(readme, "with_metadata", other)
    with pytest.raises(DataError, match="would not be read back"):
        made(evaluated / "all", output=tmp_path / "c.md")
    assert not (tmp_path / "c.md").exists()


# --- the code ---


def test_code_was_run_and_what_it_printed_is_below_it(evaluated, tmp_path):
    text = made(evaluated / "all", output=tmp_path / "c.md")
    usage = readme.parse(text.encode(), "c").sections()["usage"]
    (first, *_) = re.findall(r"```python\n(.*?)```", usage, flags=re.S)
    assert 'flaxqa.load("checkpoint")' in first
    printed, problem = snippets.run(first.replace('"checkpoint"', json.dumps(str(MODEL))))
    assert problem is None
    assert first.endswith(f"\n# {printed}")


def test_code_that_fails_or_lacks_a_package_is_left_out_and_told(tmp_path, monkeypatch):
    told = []
    assert list(snippets.shown(tmp_path, "x", told.append)) == []
    assert [one.split(" is left out: it fails: ")[0] for one in told] == [
        "the code for flaxqa", "the code for transformers"]  # fmt: skip
    told.clear()
    found = snippets.importlib.util.find_spec
    monkeypatch.setattr(snippets.importlib.util, "find_spec",
                        lambda name: None if name in ("torch", "jax") else found(name))  # fmt: skip
    assert list(snippets.shown(tmp_path, "x", told.append)) == []
    assert told[1] == "the code for transformers is left out: torch is not installed"


def test_a_checkpoint_that_is_gone_or_changed_has_no_code(whole, tmp_path, capsys):
    moved = shutil.copytree(MODEL, tmp_path / "moved")
    changed(whole, "run.json", model=model_of(whole) | {"directory": str(moved)})
    assert "flaxqa:usage" in made(whole, output=tmp_path / "a.md")
    (moved / "config.json").write_text("{}")
    assert "flaxqa:usage" not in made(whole, output=tmp_path / "b.md")
    assert "config.json is not what was measured" in capsys.readouterr().err
    shutil.rmtree(moved)
    assert "flaxqa:usage" not in made(whole, output=tmp_path / "c.md")
    assert "is not there" in capsys.readouterr().err


def test_without_an_output_the_card_is_printed(evaluated, capsys):
    assert cli.run(["card", str(evaluated / "all")]) == 0
    assert huggingface_hub.ModelCard(capsys.readouterr().out).data.model_name == "checkpoint"


def test_push_and_output_do_not_go_together(evaluated, tmp_path):
    with pytest.raises(UsageError, match="do not go together"):
        made(evaluated / "all", "--push", "me/it", output=tmp_path / "c.md")
