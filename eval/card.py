"""A model card of the Hugging Face Hub out of the results of runs.

The front matter gets the scores as a model-index, and what else the hub asks of a model; the body
gets sections (`sections`). What people wrote in the file stays (`readme`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxqa import files
from flaxqa.errors import DataError, TryAgain, UsageError

from . import metadata, readme, sections, snippets
from .config import CardOptions
from .readme import Readme
from .runs import Kind, Run, Subject, Warn, checked, last_part, one_subject, weights_of, where_it_is

ORDER = ("usage", "evaluation", "comparison", "bias", "training", "carbon", "redo")


def made(
    runs: Sequence[Run],
    old: Readme,
    options: CardOptions,
    kinds: Mapping[str, type[Any]],
    warn: Warn,
) -> bytes:
    """The content of a card.

    Args:
      runs: whose results it tells.
      old: the card so far, or an empty one.
      options: what runs cannot know.
      kinds: the class of the options of each command.
      warn: is told of what is left out or kept, and why.

    Raises:
      UsageError: the runs are of different checkpoints, or the card keeps sections of another.
      DataError: results are damaged, or the card cannot be read back by the hub's library.
    """
    subjects = one_subject(runs)
    subject = subjects[0]
    name = options.model_id or (subject.name if subject.on_hub else last_part(subject.name))
    bodies = bodies_of(runs, subject, name, kinds)
    directory = where_it_is(subjects, warn)
    if directory is not None and (usage := sections.usage(snippets.shown(directory, name, warn))):
        bodies["usage"] = usage
    refuse_stale(old, bodies, subject)
    new = old
    if not old.body.strip():
        new = dataclasses.replace(
            old, body=f"{old.newline}# {sections.plain(name)}{2 * old.newline}"
        )
    new = readme.with_sections(new, bodies, ORDER)
    wanted = metadata.wanted(old.metadata, runs, last_part(name), options, warn)
    new, kept = readme.with_metadata(new, wanted)
    if not kept and old.matter:
        warn(f"the front matter of {old.name} is written anew: comments and quotes in it are lost")
    content = readme.whole(new)
    validate(content, wanted, old.name)
    return content


def bodies_of(
    runs: Sequence[Run], subject: Subject, name: str, kinds: Mapping[str, type[Any]]
) -> dict[str, str]:
    """The sections that these runs give, by name."""
    by_kind: dict[Kind, list[Run]] = {}
    for run in runs:
        by_kind.setdefault(run.kind, []).append(run)
    tuned = by_kind.get("finetune", ())
    hashes = [checked(run, lambda run: run.data.hashes.values()) for run in tuned]
    trained_on = frozenset(value for values in hashes for value in values)
    makers: dict[Kind, tuple[str, Callable[[Sequence[Run]], str]]] = {
        "eval": ("evaluation", lambda runs: sections.evaluation(runs, trained_on)),
        "compare": ("comparison", lambda runs: sections.comparison(runs, name)),
        "probe": ("bias", lambda runs: sections.bias(runs[-1])),
        "finetune": ("training", lambda runs: sections.training(runs[-1])),
    }
    found = {}
    for kind, (section, make) in makers.items():
        for run in by_kind.get(kind, ()):
            checked(run, lambda run, make=make: make([run]))  # type: ignore[misc]
        if kind in by_kind:
            found[section] = make(by_kind[kind])
    if measured := [run for run in runs if sections.carbon_of(run)]:
        for run in measured:
            checked(run, lambda run: sections.carbon([run]))
        found["carbon"] = sections.carbon(measured)
    names = {key: told for run in runs
             for key, told in checked(run, lambda run: known_names(run, name)).items()}  # fmt: skip
    for run in runs:
        checked(run, lambda run: sections.redo([run], {}, kinds, names))
    found["redo"] = sections.redo(runs, subject.sha256, kinds, names)
    return found


def known_names(run: Run, name: str) -> dict[str, str]:
    """What the card calls checkpoints and data that it does not call by the last part of a path."""
    config, names = run.about["config"], {}
    if run.kind != "finetune":
        names[config["model"]] = name
    elif run.content["model"].get("commit"):
        names[config["model"]] = config["model"]
    if (run.content.get("teacher") or {}).get("commit"):
        names[config["teacher"]] = config["teacher"]
    if run.about.get("data") and run.data.on_hub and config["data"] == run.data.id:
        names[config["data"]] = config["data"]
    return names


def refuse_stale(old: Readme, bodies: Mapping[str, str], subject: Subject) -> None:
    """Raises: UsageError: sections that would stay are of another checkpoint."""
    there = old.sections()
    left = [name for name in there if name not in bodies and name in ORDER]
    if left and not all(value in there.get("redo", "") for value in weights_of(subject).values()):
        raise UsageError(
            f"{old.name} has sections of another checkpoint that these runs do not replace: "
            f"{', '.join(left)}. Give such runs, too, or remove these sections with their markers"
        )


def validate(content: bytes, wanted: Mapping[str, Any], name: str) -> None:
    """Raises: DataError: the hub's library reads other metadata out of the card than was meant."""
    import huggingface_hub
    from huggingface_hub.repocard_data import model_index_to_eval_results

    text = content.decode().removeprefix(readme.BOM)
    data = huggingface_hub.ModelCard(text).data
    expected = []
    if index := wanted.get("model-index"):
        expected = model_index_to_eval_results(index)[1]
    plain = {key: value for key, value in wanted.items() if key != "model-index"}
    same = all(getattr(data, key, None) == value for key, value in plain.items())
    if not same or (getattr(data, "eval_results", None) or []) != expected:
        raise DataError(f"{name} would not be read back as it is meant; it is left as it was")


def read_card(path: str | Path | None) -> Readme:
    """The card at a path; an empty one without a path, or where there is none yet.

    Raises:
      DataError: it is no card; see `readme.parse`.
      UsageError, TryAgain: it cannot be read.
    """
    if path is None:
        return Readme("the card")
    try:
        return readme.parse(files.read_named(path), str(path))
    except TryAgain:
        raise
    except FileNotFoundError:
        return Readme(str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
