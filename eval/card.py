"""A model card of the Hugging Face Hub out of the results of runs.

The front matter gets the scores as a model-index, and what else the hub asks of a model; the body
gets sections (`sections`). What people wrote in the file stays (`readme`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flaxqa import files, weights
from flaxqa.errors import DataError, TryAgain, UsageError, all_problems

from . import readme, sections, snippets
from .config import CardOptions
from .readme import Readme
from .sections import KINDS, Kind, Run
from .squad import METRICS

ORDER = ("usage", "evaluation", "comparison", "bias", "training", "carbon", "redo")
TASK = "question-answering"
ALIASES = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
OURS = "flaxqa finetune"  # begins the source of emissions that flaxqa wrote
BLOCK = 1 << 20
Warn = Callable[[str], None]
Result = TypeVar("Result")


# --- reading ---


def read(directory: str | Path) -> list[Run]:
    """The results in a directory.

    Raises:
      UsageError: it has none.
      DataError: a file is damaged.
    """
    directory = files.local(directory)
    found = []
    for kind, name in KINDS.items():
        if (directory / name).is_file():
            content = read_json(directory / name)
            about = read_json(directory / "run.json") if kind == "eval" else content
            found.append(Run(kind, directory, content, about))
    if found:
        return found
    if not directory.is_dir():
        raise UsageError(f"{directory} is {'no directory' if directory.exists() else 'missing'}")
    raise UsageError(f"{directory} has none of {', '.join(KINDS.values())}")


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no JSON object")
    return content


def checked(run: Run, made: Callable[[Run], Result]) -> Result:
    """What is made of a run.

    Raises:
      DataError: its results are damaged.
    """
    try:
        return made(run)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UsageError | DataError):
            raise
        raise DataError(
            f"the results in {run.directory} are damaged, or of another version: "
            f"{type(error).__name__}: {error}"
        ) from error


# --- which checkpoint ---


@dataclasses.dataclass(frozen=True)
class Subject:
    """The checkpoint of a card.

    Attributes:
      sha256: of every file that was read, by name.
      directory: where it was when it was measured; it may be gone.
      name: what the runs call it.
      on_hub: whether that is a hub id.
    """

    sha256: Mapping[str, str]
    directory: Path
    name: str
    on_hub: bool


def subject_of(run: Run) -> Subject:
    """The checkpoint of a run; of a fine-tuning the one that it wrote."""
    if run.kind == "finetune":
        return written_by(run)
    model = run.about["model"]
    name = str(model.get("name") or run.about["config"]["model"])
    on_hub = bool(model.get("commit"))
    directory = Path(model.get("directory") or name)
    hashes = {str(key): str(value) for key, value in model["sha256"].items()}
    return Subject(hashes, directory, name, on_hub)


def written_by(run: Run) -> Subject:
    """The checkpoint that a fine-tuning wrote, in its directory or in a folder of it.

    Raises:
      DataError: there is none.
    """
    top = Path(run.directory)
    for folder in (top, *sorted(path for path in top.iterdir() if path.is_dir())):
        names = ["config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt"]
        saved = [path.name for path in sorted(folder.iterdir()) if weights.is_weights(path.name)]
        if saved and (folder / "config.json").is_file():
            hashes = {name: sha256(folder / name) for name in (*names, *saved)
                      if (folder / name).is_file()}  # fmt: skip
            return Subject(hashes, folder, str(top.resolve().name), False)
    raise DataError(f"{top} has finetune.json, and no checkpoint that belongs to it")


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def weights_of(subject: Subject) -> dict[str, str]:
    return {key: value for key, value in subject.sha256.items() if weights.is_weights(key)}


def one_subject(runs: Sequence[Run]) -> Subject:
    """The checkpoint that all runs are of.

    Raises:
      UsageError: they are of several; names all runs.
    """
    order = sorted(runs, key=lambda run: list(KINDS).index(run.kind))
    found = [(run, checked(run, subject_of)) for run in order]
    first = found[0][1]
    for run, subject in found:
        # Of what was just written and of what was measured, weights are what both always have.
        exact = run.kind != "finetune" and found[0][0].kind != "finetune"
        same = subject.sha256 == first.sha256 if exact else weights_of(subject) == weights_of(first)
        if not same:
            raise UsageError(all_problems(
                "these runs are of different checkpoints, which one card cannot be about (the "
                "start of the sha256 of the weights behind each)",
                [told(run, subject) for run, subject in found],
            ))  # fmt: skip
    return first


def told(run: Run, subject: Subject) -> str:
    short = ", ".join(value[:12] for value in weights_of(subject).values()) or "no weights"
    width = run.about["config"].get("width")
    wider = f", widened by --width {width}, which makes it another one" if width else ""
    return f"{run.directory}: {sections.last_part(subject.name)}{wider} ({short})"


def where_it_is(subject: Subject, warn: Warn) -> Path | None:
    """The checkpoint's directory if it still has the files that were measured."""
    for name, expected in subject.sha256.items():
        path = subject.directory / name
        if not path.is_file():
            warn(f"the code to use it is left out: {path} is not there to run it on")
            return None
        if sha256(path) != expected:
            warn(f"the code to use it is left out: {path} is not what was measured")
            return None
    return subject.directory


# --- metadata ---


def entries(run: Run) -> dict[str, Any]:
    """An evaluation as a result of a model-index, made by the hub's own library."""
    import huggingface_hub
    from huggingface_hub.repocard_data import eval_results_to_model_index

    data = run.data
    digest = data.hash
    results = [
        huggingface_hub.EvalResult(
            task_type=TASK,
            task_name="Question Answering",
            # The hub takes ids alone here; a file's name is made one.
            dataset_type=re.sub(r"[^\w./-]+" if data.on_hub else r"[^\w.-]+", "-", data.id),
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_revision=data.revision,
            dataset_args=None if digest is None else {digest[0]: digest[1]},
            metric_type=name,
            metric_name={"exact_match": "Exact Match"}.get(name, metric.label),
            metric_value=round(run.content[name], 4),
            metric_args={
                "interval": [round(value, 4) for value in run.content[f"{name}_interval"]],
                "confidence": run.content["confidence"],
                "questions": run.content["total"],
            },
        )
        for name, metric in METRICS.items()
    ]
    return dict(eval_results_to_model_index("", results)[0]["results"][0])


def same_data(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results are of one data set, split and revision."""
    if other["task"]["type"] != mine["task"]["type"]:
        return False
    a, b = mine["dataset"], other["dataset"]
    types = {ALIASES.get(one["type"], one["type"]) for one in (a, b)}
    configs = {one.get("config") for one in (a, b)} - {None}
    args = [one.get("args") or {} for one in (a, b)]
    hashes = [{args[0][key], args[1][key]} for key in args[0] if key in args[1]]
    return (
        len(types) == 1 and len(configs) <= 1 and all(len(one) == 1 for one in hashes)
        and all(a.get(key) == b.get(key) for key in ("split", "revision"))
    )  # fmt: skip


def model_index(
    there: Sequence[Any] | None, name: str, own: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[str]]:
    """The model-index with own results in it, and the data sets of others that stay.

    A result of the same data gets the new metrics; what it has besides, and results that the hub
    verified, stay.
    """
    index = copy.deepcopy(list(there or [])) or [{"name": name, "results": []}]
    results = index[0]["results"]
    kept = [one["dataset"]["name"] for one in results
            if not any(same_data(mine, one) for mine in own)]  # fmt: skip
    for mine in own:
        for place, other in enumerate(results):
            if same_data(mine, other) and not any(one.get("verified") for one in other["metrics"]):
                types = {one["type"] for one in mine["metrics"]}
                more = [one for one in other["metrics"] if one["type"] not in types]
                results[place] = {**other, **mine, "metrics": [*mine["metrics"], *more]}
                break
        else:
            results.append(mine)
    return index, kept


def hub_id(name: str, what: str) -> str:
    """Raises: UsageError: it cannot be the id of a repository."""
    import huggingface_hub

    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError as error:
        raise UsageError(f"{what} {name!r} is no id of the hub: {error}") from error
    return name


def found_metadata(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs tell of a model besides its scores.

    The library is transformers: the checkpoint is in its format, and it is what the hub offers to
    load such files with.
    """
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": TASK}
    for run in runs:
        if run.kind != "finetune":
            continue
        if run.content["model"].get("commit"):
            found["base_model"] = run.content["config"]["model"]
        if run.data.on_hub:
            found["datasets"] = [run.data.id]
        if carbon := run.content.get("carbon"):
            platform = run.content.get("platform") or {}
            hardware = platform.get("device_kind")
            hardware = platform.get("processor") if hardware in (None, "cpu") else hardware
            more = {"training_type": "fine-tuning", "geographical_location": carbon.get("country"),
                    "hardware_used": hardware}  # fmt: skip
            found["co2_eq_emissions"] = {
                "emissions": carbon["g_co2e"],  # grams, as huggingface.co/docs/hub/model-cards-co2
                "source": f"{OURS}, measured by {carbon.get('measured_by')}",
                **{key: value for key, value in more.items() if value is not None},
            }
    return found


def metadata(
    there: Mapping[str, Any], runs: Sequence[Run], name: str, options: CardOptions, warn: Warn
) -> dict[str, Any]:
    """The metadata of a card: what people wrote, what options say, and what the runs tell.

    Raises:
      UsageError: an option gives no id of the hub.
    """
    wanted = dict(there)
    given = {
        "license": options.license,
        "language": list(options.language),
        "base_model": options.base_model and hub_id(options.base_model, "--base-model"),
        "datasets": [hub_id(one, "--dataset") for one in options.dataset],
    }
    wanted |= {key: value[0] if isinstance(value, list) and key == "language" and len(value) == 1
               else value for key, value in given.items() if value}  # fmt: skip
    for key, value in found_metadata(runs).items():
        theirs = wanted.get(key)
        ours = isinstance(theirs, dict) and str(theirs.get("source", "")).startswith(OURS)
        if theirs in (None, [], "") or ours:
            wanted[key] = value
        elif theirs not in (value, [theirs]) and key == "co2_eq_emissions":
            warn("co2_eq_emissions is not flaxqa's and stays as it is")
    tags = wanted.get("tags") or []
    wanted["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "flaxqa"]))
    own: list[dict[str, Any]] = []
    for run in runs:
        if run.kind != "eval" or checked(run, lambda run: run.part):
            continue
        mine = checked(run, entries)
        if any(same_data(mine, one) for one in own):
            warn(f"{run.directory}: the metadata has the scores of the first run on the same data")
        else:
            own.append(mine)
    if own:
        wanted["model-index"], kept = model_index(there.get("model-index"), name, own)
        for one in kept:
            warn(f"the scores on {one} stay as they are: no run here is of it")
    return wanted


# --- the card ---


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
    subject = one_subject(runs)
    usual = subject.name if subject.on_hub else sections.last_part(subject.name)
    name = options.model_id or usual
    bodies = bodies_of(runs, subject, name, kinds, warn)
    refuse_stale(old, bodies, subject)
    new = old
    if not old.body.strip():
        new = dataclasses.replace(old, body=f"# {sections.plain(name)}{2 * old.newline}")
    new = readme.with_sections(new, bodies, ORDER)
    index_name = sections.last_part(name)
    wanted = metadata(old.metadata, runs, index_name, options, warn)
    new, kept = readme.with_metadata(new, wanted)
    if not kept and old.matter:
        warn(f"the front matter of {old.name} is written anew: comments and quotes in it are lost")
    content = readme.whole(new)
    validate(content, wanted, old.name)
    return content


def bodies_of(
    runs: Sequence[Run], subject: Subject, name: str, kinds: Mapping[str, type[Any]], warn: Warn
) -> dict[str, str]:
    """The sections that these runs give, by name."""
    by_kind: dict[Kind, list[Run]] = {}
    for run in runs:
        by_kind.setdefault(run.kind, []).append(run)
    makers: dict[Kind, tuple[str, Callable[[Sequence[Run]], str]]] = {
        "eval": ("evaluation", sections.evaluation),
        "compare": ("comparison", sections.comparison),
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
    names = checked_names(runs, subject, name)
    found["redo"] = sections.redo(runs, subject.sha256, kinds, names)
    directory = where_it_is(subject, warn)
    if directory is not None and (usage := sections.usage(snippets.shown(directory, name, warn))):
        found["usage"] = usage
    return found


def checked_names(runs: Sequence[Run], subject: Subject, name: str) -> dict[str, str]:
    """What the card calls checkpoints and data that are not called by the last part of a path."""
    names = {}
    for run in runs:
        config = run.about["config"]
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
            f"{old.name} has the sections {', '.join(left)} of another checkpoint: give runs of "
            "those kinds, too, or remove these sections with their markers"
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
