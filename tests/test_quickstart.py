"""What ships with the repository: made by its script, learnt, and never seen in training."""

import json
import re
import shutil

import pytest
from conftest import QUICKSTART
from flax import nnx

from flaxqa import answers, checkpoint, features
from flaxqa.checkpoint import DistilBertForQuestionAnswering
from flaxqa.eval import questions as dataset
from flaxqa.eval import quickstart, squad
from flaxqa.predict import Predictor


def contexts(part):
    return sorted(
        {question.context for question in dataset.read(QUICKSTART / f"{part}.json").questions}
    )


def exact_match(model, tokenizer):
    questions = dataset.read(QUICKSTART / "heldout.json").questions
    windows = features.make(questions, tokenizer)
    logits = Predictor(model, devices=1).predict(windows)
    found = answers.decode_squad(questions, windows, logits)
    predictions = {
        question.id: one[0].text for question, one in zip(questions, found, strict=True) if one
    }
    return squad.score(questions, predictions).exact_match


@pytest.fixture(scope="module")
def loaded():
    return checkpoint.load(QUICKSTART / "checkpoint")


def test_it_has_learnt_something(loaded):
    assert exact_match(loaded.model, loaded.tokenizer) >= 75


def test_the_untrained_weights_know_nothing(loaded):
    untrained = DistilBertForQuestionAnswering(loaded.config, rngs=nnx.Rngs(quickstart.SEED))
    assert exact_match(untrained, loaded.tokenizer) < 5


@pytest.mark.parametrize(
    ("part", "paragraphs"),
    [("heldout", quickstart.HELDOUT_PARAGRAPHS), ("train", quickstart.TRAIN_PARAGRAPHS)],
)
def test_the_script_makes_the_files_that_are_here(part, paragraphs):
    assert json.loads((QUICKSTART / f"{part}.json").read_text()) == quickstart.squad_json(
        part, paragraphs
    )


def test_it_is_as_large_as_promised_and_small_enough_to_ship():
    questions = dataset.read(QUICKSTART / "heldout.json").questions
    assert len(contexts("heldout")) >= 60
    assert len(questions) >= 400
    size = sum(path.stat().st_size for path in (QUICKSTART / "checkpoint").iterdir())
    assert size <= 4 << 20


def test_every_answer_stands_where_it_says():
    for part in ("heldout", "train"):
        content = json.loads((QUICKSTART / f"{part}.json").read_text())
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    (answer,) = qa["answers"]
                    assert paragraph["context"][answer["answer_start"] :].startswith(answer["text"])


def names_and_numbers(part):
    """The invented words of the paragraphs (those with a capital inside a sentence) and numbers."""
    found = set()
    for context in contexts(part):
        found |= set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", context))
        found |= set(re.findall(r"\d[\d,]*\d|\d", context))
    return found


def test_no_held_out_name_or_number_is_in_the_training_part():
    ordinary = {"River", "Works", "Bridge", "Mount", "Medal", "The", "On", "In", "Far", "At"}
    ordinary |= {word.capitalize() for word in quickstart.TITLE_ADJECTIVES}
    ordinary |= {word.capitalize() for word in quickstart.TITLE_NOUNS}
    heldout, train = names_and_numbers("heldout") - ordinary, names_and_numbers("train") - ordinary
    assert len(heldout) > 300
    assert not heldout & train


def test_the_vocabulary_is_the_scripts_own(loaded):
    assert quickstart.train_tokenizer().get_vocab() == loaded.tokenizer.get_vocab()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with three held-out paragraphs and the checkpoint; training takes six paragraphs."""
    for name in ("PARAGRAPHS", "STUDENT_PARAGRAPHS"):
        monkeypatch.setattr(quickstart, name, 6)
    quickstart.write_squad(tmp_path / "heldout.json", "heldout", 3)
    shutil.copytree(QUICKSTART / "checkpoint", tmp_path / "checkpoint")
    return tmp_path


def test_a_few_steps_of_training_write_a_checkpoint_of_the_same_form(small, loaded):
    quickstart.train(small, small / "work", devices=1)
    trained = checkpoint.load(small / "checkpoint")
    assert trained.config == loaded.config
    assert trained.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert trained.sha256() != loaded.sha256()
    assert (small / "work" / "run" / "finetune.json").is_file()
    assert max(path.stat().st_size for path in (small / "checkpoint").iterdir()) <= 2 << 20


def test_students_with_and_without_their_teacher_are_compared_by_seed(small, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "SEEDS", range(2))
    monkeypatch.setattr(quickstart, "STUDENT_EPOCHS", 1)
    gains = quickstart.distil(small, small / "work")
    for seed, gain in enumerate(gains):
        alone, distilled = (
            json.loads((small / "work" / f"{name}-{seed}" / "finetune.json").read_text())
            for name in ("alone", "distilled")
        )
        assert alone["teacher"] is None
        assert distilled["teacher"]["sha256"] == checkpoint.load(small / "checkpoint").sha256()
        for run in (alone, distilled):
            assert run["config"]["seed"] == seed
        assert alone["model"]["sha256"] == distilled["model"]["sha256"]
        last = (run["epochs"][-1]["f1"] for run in (distilled, alone))
        assert gain["f1"] == pytest.approx(next(last) - next(last))
    assert (
        alone["model"]["sha256"]
        != json.loads((small / "work" / "alone-0" / "finetune.json").read_text())["model"]["sha256"]
    )
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 * len(gains) + 2
