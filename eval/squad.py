"""SQuAD v1.1: its files, and the official exact match and F1 with their quirks, per question.

Source of the metric: evaluate-v1.1.py of Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250.
Its quirks are kept, because published numbers have them: punctuation is deleted and not replaced by
a space ("twenty-one" becomes "twentyone"), only ASCII punctuation is, and an empty prediction for
the answer "the" has an exact match of 1 and an F1 of 0.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa.errors import DataError, TryAgain, all_problems
from flaxqa.features import Example

VERSION = "1.1"
RESAMPLES = 10_000
SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SquadExample(Example):
    """A question with the answers that count as right, at least one."""

    answers: tuple[str, ...]


# -------------------------------------------------------------------------------------- examples


def read(path: str | Path) -> list[SquadExample]:
    """The questions of a SQuAD v1.1 JSON file, in its order.

    Raises:
      DataError: the file cannot be read, is not such a file, or has an id twice; names every place.
    """
    return list(examples(read_json(path), str(path)))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
      DataError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def examples(content: Any, where: str) -> Iterator[SquadExample]:
    """The questions of a parsed SQuAD file; see `read`."""
    problems: list[str] = []
    places: dict[str, str] = {}
    found = []

    def field(parent: Any, key: str, kind: type[list] | type[str], place: str) -> Any:
        if isinstance(parent, dict) and isinstance(parent.get(key), kind):
            return parent[key]
        got = (
            type(parent[key]).__name__ if isinstance(parent, dict) and key in parent else "missing"
        )
        noun = "a list" if kind is list else "a string"
        problems.append(f"{place}{key} must be {noun}, it is {got}")
        return kind()

    for i, article in enumerate(field(content, "data", list, "")):
        at = f"data[{i}]."
        for j, paragraph in enumerate(field(article, "paragraphs", list, at)):
            at = f"data[{i}].paragraphs[{j}]."
            context = field(paragraph, "context", str, at)
            for k, qa in enumerate(field(paragraph, "qas", list, at)):
                at = f"data[{i}].paragraphs[{j}].qas[{k}]."
                example_id = field(qa, "id", str, at)
                question = field(qa, "question", str, at)
                golds = [
                    field(gold, "text", str, f"{at}answers[{n}].")
                    for n, gold in enumerate(field(qa, "answers", list, at))
                ]
                if not golds:
                    problems.append(
                        f"{at}answers is empty: a question without an answer (as in SQuAD 2.0) "
                        "has no v1.1 score"
                    )
                if not is_unicode(example_id):
                    problems.append(f"{at}id {example_id!a} has a lone surrogate")
                if example_id in places:
                    problems.append(f"{at}id {example_id!r} is also that of {places[example_id]}")
                places[example_id] = at.rstrip(".")
                found.append(SquadExample(example_id, question, context, tuple(golds)))
    if not found and not problems:
        problems.append("data holds no question")
    if problems:
        raise DataError(all_problems(f"{where} is not a SQuAD v1.1 file", problems))
    yield from found


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8, which a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_hub(
    name: str, *, split: str = "validation", revision: str | None = None
) -> tuple[list[SquadExample], str | None]:
    """The questions of a hub data set in SQuAD's columns, and the commit they were read at.

    Raises:
      DataError: the data set has other columns or an id twice.
      TryAgain: it is not in the cache and the hub cannot be reached.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise TryAgain(
            f"the data set {name} cannot be loaded ({error}); name a SQuAD JSON file, or try again "
            "online"
        ) from error
    except ValueError as error:
        raise DataError(f"the data set {name}, split {split}: {error}") from error
    if missing := {"id", "question", "context", "answers"} - set(rows.column_names):
        raise DataError(f"the data set {name} has no column {', '.join(sorted(missing))}")
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [{"text": text} for text in row["answers"]["text"]],
                }
            ],
        }
        for row in rows
    ]
    content = {"data": [{"paragraphs": paragraphs}]}
    commits = re.findall(r"@([0-9a-f]{40})/", " ".join(rows.info.download_checksums or ()))
    return list(examples(content, name)), commits[0] if commits else None


def sha256(questions: Iterable[SquadExample]) -> str:
    """A hash of the questions themselves, the same for a file and a hub data set of one content."""
    digest = hashlib.sha256()
    for example in questions:
        row = [example.id, example.question, example.context, *example.answers]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def read_predictions(path: str | Path) -> dict[str, str]:
    """A predictions file in the official form, {id: text}.

    Raises:
      DataError: it cannot be read or has another form; names every entry.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must be a JSON object of id to text")
    problems = [
        f"{example_id!r} is {type(text).__name__}, not a string"
        for example_id, text in content.items()
        if not isinstance(text, str)
    ]
    if problems:
        raise DataError(all_problems(f"{path} is not a predictions file", problems))
    return content


# ---------------------------------------------------------------------------------------- metric


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an, the, single spaces."""
    text = text.lower().translate(NO_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are the same after `normalize_answer`."""
    return normalize_answer(prediction) == normalize_answer(answer)


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, in [0, 1], after `normalize_answer`."""
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = sum((collections.Counter(predicted) & collections.Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(right)
    return 2 * precision * recall / (precision + recall)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Exact match and F1 of every question, each against its best answer.

    Attributes:
      ids: of the questions, in their order.
      exact_matches: bool [questions].
      f1s: float64 [questions], in [0, 1].
      unanswered: the ids without a prediction; their scores are 0 and they count in the total.
    """

    ids: tuple[str, ...]
    exact_matches: np.ndarray
    f1s: np.ndarray
    unanswered: tuple[str, ...]

    @property
    def exact_match(self) -> float:
        """In percent of all questions."""
        return 100.0 * float(self.exact_matches.sum()) / len(self.ids)

    @property
    def f1(self) -> float:
        """The mean over all questions, in percent."""
        # Added in the questions' order, as the official script does: the same last digit.
        return 100.0 * sum(self.f1s.tolist()) / len(self.ids)

    def intervals(
        self, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of `exact_match` and `f1`, in percent.

        Questions are resampled as if independent, although those of one article are not quite. A
        resample only matters by how often each distinct pair of scores is in it, and these counts
        are multinomial: drawing them is the same bootstrap, hundreds of times as fast.
        """
        pairs, counts = np.unique(
            np.stack((self.exact_matches, self.f1s), axis=1), axis=0, return_counts=True
        )
        total = len(self.ids)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(total, counts / total, size=resamples)
        means = 100.0 * (drawn @ pairs) / total
        tail = 50.0 * (1.0 - confidence)
        low, high = np.percentile(means, (tail, 100.0 - tail), axis=0)
        return {
            "exact_match": (float(low[0]), float(high[0])),
            "f1": (float(low[1]), float(high[1])),
        }


def score(questions: Sequence[SquadExample], predictions: Mapping[str, str]) -> Scores:
    """Scores predictions as the official script does; ids that no question has are ignored."""
    exact_matches = np.zeros(len(questions), np.bool_)
    f1s = np.zeros(len(questions))
    unanswered = []
    for index, question in enumerate(questions):
        prediction = predictions.get(question.id)
        if prediction is None:
            unanswered.append(question.id)
            continue
        exact_matches[index] = any(exact_match(prediction, gold) for gold in question.answers)
        f1s[index] = max(f1(prediction, gold) for gold in question.answers)
    ids = tuple(question.id for question in questions)
    return Scores(ids, exact_matches, f1s, tuple(unanswered))
