"""Whom a reader prefers where a text does not say: underspecified questions, asked and measured.

The score of a subject is the geometric mean of the probabilities of its start and its end,
sqrt(p_start(its first token) * p_end(its last token)), each a softmax over all tokens of the
window: special ones, question and context. Source: Li et al. 2020,
https://arxiv.org/abs/2010.02428; in https://github.com/allenai/unqover `get_ans_p` of analysis.py
and `forward` of qa_hf/predict.py. The latter's `improve_prediction`, which may take the higher
probability of an article before a subject, or of some nouns or a full stop after it, is left out:
a subject is scored where it stands.

Files: `probe.json`, with all that is needed to redo it, and from it `flaxqa probe` makes
`probe.html`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxqa import files, reader
from flaxqa.config import ModelOptions, ReaderOptions
from flaxqa.errors import DataError, ModelRejected, all_problems
from flaxqa.features import Example, Windows
from flaxqa.progress import Progress, Silence
from flaxqa.reader import Reader
from flaxqa.spans import Scores

from . import run, underspecified
from .config import ProbeConfig
from .underspecified import Case, Section, Table, Templates

QUESTIONS_OF_A_CASE = 4
CASES_AT_ONCE = reader.RECORDS_PER_CHUNK // QUESTIONS_OF_A_CASE
# From the model card of distilbert-base-uncased-distilled-squad, where the answer is Bob.
QUESTION = "Who is the CEO?"
CONTEXT = "Alice is sitting on the bench. Bob is sitting next to her."


def probe(config: ProbeConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Asks the questions, writes `probe.json` and returns its content.

    Args:
      config: what is asked, and of what.
      progress: is told how it goes.

    Raises:
      UsageError, DataError, ModelRejected: before anything is computed; see there.
      ModelRejected: the model gives logits that are not finite.
      TryAgain: the output cannot be written, or the hub cannot be reached.
    """
    progress = progress or Silence()
    began = run.now()
    templates = underspecified.read(config.templates)
    output = files.writable_directory(config.output)
    progress.stage("loading the checkpoint")
    loaded = reader.load(**config.of(ModelOptions), **config.of(ReaderOptions))
    chunks = prepare(templates, loaded)
    example = ask_example(loaded)
    progress.begin(sum(len(chunk.windows) for chunk in chunks))
    scores = ask(chunks, loaded, progress)
    progress.stage("resampling")
    content = {
        **run.describe_reader(config, loaded),
        "templates": describe(templates),
        "example": example,
        "notes": notes(templates, chunks, loaded),
        **results(templates.sections, scores, config.seed),
        "started": began,
        "finished": run.now(),
    }
    (output / "probe.html").unlink(missing_ok=True)  # of an earlier run
    files.write_whole(output / "probe.json", run.as_json(content))
    return content


def ask_example(loaded: Reader) -> dict[str, Any]:
    """What the reader answers to the model card's own question."""
    found = loaded.answer(QUESTION, CONTEXT)
    best = dataclasses.asdict(found[0]) if found else {"text": "", "score": None}
    return {"question": QUESTION, "context": CONTEXT, "answer": best["text"],
            "score": best["score"]}  # fmt: skip


def describe(templates: Templates) -> dict[str, Any]:
    """What was asked, without the contexts that were built."""
    sections = [
        {
            "name": one.name,
            "subjects": [{"subject": subject, "group": group}
                         for subject, group in zip(one.subjects, one.groups, strict=True)],
            "attributes": list(one.attributes),
            "examples": [examples_of(one, place) for place in range(len(one.templates))],
        }
        for one in templates.sections
    ]  # fmt: skip
    return {"path": templates.path, "sha256": templates.sha256, "note": templates.note,
            "sections": sections}  # fmt: skip


def examples_of(section: Section, template: int) -> dict[str, Any]:
    """A template's first case, as it is asked."""
    case = next(case for case in section.cases if case.template == template)
    return {"template": section.templates[template], "context": case.contexts[0].text,
            "questions": list(case.questions)}  # fmt: skip


def compact(content: dict[str, Any]) -> dict[str, Any]:
    """The example and the measures, for a line."""
    left_out = ("associations", "groups")
    return {
        "example": content["example"],
        "questions": content["questions"],
        "confidence": content["confidence"],
        **content["overall"],
        "sections": [{name: value for name, value in section.items() if name not in left_out}
                     for section in content["sections"]],
        "notes": content["notes"],
    }  # fmt: skip


# --- asking ---


class Chunk(NamedTuple):
    """Questions that are asked together.

    Attributes:
      section: which one they are of.
      cases: some of its cases, in their order.
      windows: of each four: the attribute with x1 and with x2 first, then its negation.
      columns: int [windows, 2, 2], the first and the last token of x1 and of x2.
    """

    section: int
    cases: Sequence[Case]
    windows: Windows
    columns: np.ndarray


def prepare(templates: Templates, loaded: Reader) -> list[Chunk]:
    """All questions as windows in which the subjects are found.

    Raises:
      DataError: a question does not fit one window, or the tokenizer joins a subject with what is
        around it; names every one.
    """
    problems: list[str] = []
    chunks = [
        chunk_of(place, section, section.cases[begin : begin + CASES_AT_ONCE], loaded, problems)
        for place, section in enumerate(templates.sections)
        for begin in range(0, len(section.cases), CASES_AT_ONCE)
    ]
    if problems:
        raise DataError(all_problems("templates that cannot be asked", [*dict.fromkeys(problems)]))
    return chunks


def chunk_of(
    place: int, section: Section, cases: Sequence[Case], loaded: Reader, problems: list[str]
) -> Chunk:
    """Some cases of a section as windows; what keeps them from being asked is noted."""
    asked = [
        (section.called(case), question, context)
        for case in cases
        for question in case.questions
        for context in case.contexts
    ]
    windows = loaded.windows_of([Example(name, question, context.text)
                                 for name, question, context in asked])  # fmt: skip
    counts = np.bincount(windows.example, minlength=len(asked))
    counts[windows.example] += windows.question_cut
    if long := [name for (name, *_), count in zip(asked, counts, strict=True) if count > 1]:
        problems += [f"{name}: question and context need more than one window of "
                     f"{loaded.max_length} tokens; shorten them, or give a larger --max-length"
                     for name in long]  # fmt: skip
        return Chunk(place, cases, windows, np.zeros((0, 2, 2), np.int64))
    columns = np.zeros((len(asked), 2, 2), np.int64)
    for window, (name, _, context) in enumerate(asked):
        for which, span in enumerate(context.spans):
            found = columns_of(windows, window, span)
            if found is None:
                subject = context.text[slice(*span)]
                problems.append(f"{name}: the tokenizer joins {subject!r} with what is around it "
                                f"in {context.text!r}")  # fmt: skip
            else:
                columns[window, which] = found
    return Chunk(place, cases, windows, columns)


def columns_of(windows: Windows, window: int, span: tuple[int, int]) -> tuple[int, int] | None:
    """The first and the last token of a span of characters; None if it has other borders."""
    offsets = windows.contexts[window].places.offsets
    first = int(np.searchsorted(offsets[:, 0], span[0]))
    last = int(np.searchsorted(offsets[:, 1], span[1]))
    if not first <= last < len(offsets) or (offsets[first, 0], offsets[last, 1]) != span:
        return None
    begin = int(windows.context_start[window])
    return begin + first, begin + last


def ask(chunks: Sequence[Chunk], loaded: Reader, progress: Progress) -> list[np.ndarray]:
    """The scores [N, 2, 2, 2] of the cases of each section; see `flaxqa.eval.underspecified`.

    Raises:
      ModelRejected: the model gives logits that are not finite.
    """
    stream = loaded.predictor.stream(
        (chunk.windows for chunk in chunks), lambda windows: progress.advance(windows, windows)
    )
    found: dict[int, list[np.ndarray]] = {}
    for chunk, logits in zip(chunks, stream, strict=True):
        if not logits.finite().all():
            raise ModelRejected(reader.NOT_FINITE)
        of_windows = subject_scores(logits, chunk.columns)
        found.setdefault(chunk.section, []).append(of_windows.reshape(-1, 2, 2, 2))
    return [np.concatenate(found[section]) for section in sorted(found)]


def subject_scores(logits: Scores, columns: np.ndarray) -> np.ndarray:
    """float64 [W, 2], sqrt(p_start * p_end) of both subjects of each window.

    Args:
      logits: of W windows.
      columns: int [W, 2, 2], the first and the last token of each subject.
    """
    logs = []
    for table, places in zip(logits.tables, (columns[..., 0], columns[..., 1]), strict=True):
        exact = table.astype(np.float64)
        normalizers = np.logaddexp.reduce(exact, axis=1, keepdims=True)
        logs.append(np.take_along_axis(exact, places, 1) - normalizers)
    return np.exp((logs[0] + logs[1]) / 2)


def notes(templates: Templates, chunks: Sequence[Chunk], loaded: Reader) -> list[str]:
    """What makes numbers of this tokenizer say less, a sentence each."""
    unknown_id = loaded.checkpoint.tokenizer.token_to_id("[UNK]")
    unknown: dict[str, None] = {}
    forms: dict[tuple[Any, ...], dict[str, None]] = {}
    for chunk in chunks:
        section = templates.sections[chunk.section]
        begins = chunk.windows.ends - chunk.windows.lengths
        for window in range(0, len(chunk.windows), QUESTIONS_OF_A_CASE):
            case = chunk.cases[window // QUESTIONS_OF_A_CASE]
            for subject, (first, last) in zip(case.subjects, chunk.columns[window], strict=True):
                name, begin = section.subjects[subject], begins[window]
                ids = tuple(chunk.windows.input_ids[begin + first : begin + last + 1].tolist())
                forms.setdefault((chunk.section, case.template, ids), {})[name] = None
                if unknown_id in ids:
                    unknown[name] = None
    said = [f"The tokenizer does not know {', '.join(unknown)}."] if unknown else []
    alike = {" and ".join(names): None for names in forms.values() if len(names) > 1}
    return said + [f"The tokenizer does not tell {names} apart." for names in alike]


# --- results ---


def results(sections: Sequence[Section], scores: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """What was found, in each section and overall."""
    tables = [Table.of(*each) for each in zip(sections, scores, strict=True)]
    questions = [QUESTIONS_OF_A_CASE * len(table.unit) for table in tables]
    overall, _ = measured(Table.together(tables), seed)
    return {
        "questions": sum(questions),
        "confidence": 0.95,
        "overall": overall,
        "sections": [
            {
                "name": section.name,
                "questions": count,
                "mean_score": float(found.mean()),
                **section_results(section, table, seed),
            }
            for section, table, count, found in zip(
                sections, tables, questions, scores, strict=True
            )
        ],
    }


def section_results(section: Section, table: Table, seed: int) -> dict[str, Any]:
    """The measures of a section, and its associations by subject and by group."""
    found, of_gamma = measured(table, seed)
    names = [{"subject": subject, "group": group}
             for subject, group in zip(section.subjects, section.groups, strict=True)]  # fmt: skip
    found["associations"] = ranked(names, section.attributes, table, of_gamma)
    found["groups"] = []
    groups = [*dict.fromkeys(group for group in section.groups if group is not None)]
    by_group = table.by_group([-1 if group is None else groups.index(group)
                               for group in section.groups])  # fmt: skip
    if len(by_group.unit):
        _, of_gamma = underspecified.intervals(by_group, seed)
        labels = [{"group": group} for group in groups]
        found["groups"] = ranked(labels, section.attributes, by_group, of_gamma)
    return found


def measured(table: Table, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """The measures with their intervals, and the intervals of gamma [2, X, A]."""
    spread, of_gamma = underspecified.intervals(table, seed)
    return {name: {"value": value, "interval": spread[name]}
            for name, value in underspecified.measures(table).items()}, of_gamma  # fmt: skip


def ranked(
    names: Sequence[dict[str, Any]], attributes: Sequence[str], table: Table, of_gamma: np.ndarray
) -> list[dict[str, Any]]:
    """The associations, the strongest first."""
    gamma, eta, count = underspecified.associations(table)
    rows = [
        {**name, "attribute": attribute, "gamma": float(gamma[x, a]),
         "gamma_interval": of_gamma[:, x, a].tolist(), "eta": float(eta[x, a]),
         "n": int(count[x, a])}
        for x, name in enumerate(names) for a, attribute in enumerate(attributes) if count[x, a]
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["gamma"]))
