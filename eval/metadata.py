"""The front matter of a model card: what the hub asks of a model, and its scores."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flaxqa.errors import UsageError

from . import sections
from .config import CardOptions
from .runs import Run, Warn, checked
from .squad import METRICS

TASK = "question-answering"
ALIASES = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
OURS = "flaxqa finetune"  # begins the source of emissions that flaxqa wrote


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
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise UsageError(f"{what} {name!r} is no id of the hub: {error}") from error
    return name


def of_training(run: Run) -> dict[str, Any]:
    """What a fine-tuning tells of the model that it wrote."""
    told: dict[str, Any] = {}
    if run.content["model"].get("commit"):
        told["base_model"] = run.content["config"]["model"]
    if run.data.on_hub:
        told["datasets"] = [run.data.id]
    if carbon := run.content.get("carbon"):
        platform = run.content.get("platform") or {}
        hardware = platform.get("device_kind")
        hardware = platform.get("processor") if hardware in (None, "cpu") else hardware
        more = {"training_type": "fine-tuning", "geographical_location": carbon.get("country"),
                "hardware_used": hardware}  # fmt: skip
        grams = float(f"{carbon['g_co2e']:.3g}")
        told["co2_eq_emissions"] = {
            "emissions": grams,  # the unit: https://huggingface.co/docs/hub/model-cards-co2
            "source": f"{OURS}, measured by {sections.measured_by(carbon)}",
            **{key: value for key, value in more.items() if value is not None},
        }
    return told


def wanted(
    there: Mapping[str, Any], runs: Sequence[Run], name: str, options: CardOptions, warn: Warn
) -> dict[str, Any]:
    """The metadata of a card: what people wrote, what options say, and what the runs tell.

    Raises:
      UsageError: an option gives no id of the hub.
    """
    result = dict(there)
    given = {
        "license": options.license,
        "language": list(options.language),
        "base_model": options.base_model and hub_id(options.base_model, "--base-model"),
        "datasets": [hub_id(one, "--dataset") for one in options.dataset],
    }
    result |= {key: value[0] if isinstance(value, list) and key == "language" and len(value) == 1
               else value for key, value in given.items() if value}  # fmt: skip
    # The checkpoint is in transformers' format, and that is what the hub offers to load it with.
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": TASK}
    for run in runs:
        found |= checked(run, of_training) if run.kind == "finetune" else {}
    for key, value in found.items():
        theirs = result.get(key)
        ours = isinstance(theirs, dict) and str(theirs.get("source", "")).startswith(OURS)
        if theirs in (None, [], "") or ours:
            result[key] = value
        elif theirs not in (value, [theirs]) and key == "co2_eq_emissions":
            warn("co2_eq_emissions is not flaxqa's and stays as it is")
    tags = result.get("tags") or []
    result["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "flaxqa"]))
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
        result["model-index"], kept = model_index(there.get("model-index"), name, own)
        for one in kept:
            warn(f"the scores on {one} stay as they are: no run here is of it")
    return result
