"""An evaluation in the result format of EleutherAI's lm-evaluation-harness.

Source of the layout: lm_eval/loggers/evaluation_tracker.py, lm_eval/evaluator.py and
lm_eval/result_schema.py of https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.
Metrics are from 0 to 1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flaxqa import files

from . import examples, runs
from .examples import Examples
from .runs import Run

FILTER = "none"
TASK_VERSION = 1.0


def export(found: Sequence[Run], output: str | Path) -> list[Path]:
    """Writes results_DATE.json and samples_TASK_DATE.jsonl of each run, in a folder by its model.

    Raises:
      DataError: a run's files are damaged, or of a flaxqa that did not keep contexts.
      TryAgain: the output cannot be written.
    """
    written: list[Path] = []
    for run in found:
        asked = runs.checked(run, examples.of_run)
        samples = samples_of(run, asked)
        content = results_of(run, asked, samples)
        folder = files.writable_directory(Path(output) / content["model_name_sanitized"])
        # Runs that began in the same second get names of their own.
        began = datetime.fromtimestamp(content["date"], UTC).strftime("%Y-%m-%dT%H-%M-%S")
        dates = (began + (f".{n:06d}" if n else "") for n in range(len(found)))
        date = next(one for one in dates if folder / f"results_{one}.json" not in written)
        task = task_of(asked)
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
        for name, text in (
            (f"samples_{task}_{date}.jsonl", lines),
            (f"results_{date}.json", json.dumps(content, indent=2, ensure_ascii=False)),
        ):
            files.write_whole(folder / name, text.encode())
            written.append(folder / name)
    return written


def task_of(asked: Examples) -> str:
    return f"flaxqa_squad_v{'2.0' if asked.v2 else '1.1'}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sanitized(name: str) -> str:
    """A model's name as that of a folder, as the harness makes it; never one above."""
    safe = re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)
    return "model" if safe.strip(".") == "" else safe


def samples_of(run: Run, asked: Examples) -> list[dict[str, Any]]:
    """A sample a question, as the harness logs them."""
    made = []
    for place, question in enumerate(asked.questions):
        doc = {
            "id": question.id, "context": question.context, "question": question.question,
            "answers": {"text": list(question.answers), "answer_start": list(question.starts)},
        }  # fmt: skip
        prompt = f"{question.context}\n\n{question.question}"
        target, said = json.dumps(list(question.answers)), asked.predictions[place] or ""
        made.append({
            "doc_id": place, "doc": doc, "target": target,
            "arguments": {"gen_args_0": {"arg_0": prompt}},
            "resps": [[said]], "filtered_resps": [said], "filter": FILTER,
            "metrics": list(asked.scores.values),
            "doc_hash": digest(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": digest(prompt), "target_hash": digest(target),
            **{name: float(each[place]) for name, each in asked.scores.values.items()},
        })  # fmt: skip
    return made


def results_of(run: Run, asked: Examples, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The file of results. Its `date` is in UTC, whole seconds."""
    about, task, n = run.about, task_of(asked), len(asked.questions)
    config, started = about["config"], datetime.fromisoformat(about["started"])
    seconds = (datetime.fromisoformat(about["finished"]) - started).total_seconds()
    scores: dict[str, Any] = {"name": task, "alias": task, "sample_len": n}
    for name, values in asked.scores.values.items():
        own = np.asarray(values, float)
        scores[f"{name},{FILTER}"] = float(own.mean())
        # The standard error of the mean, as the harness gives it.
        scores[f"{name}_stderr,{FILTER}"] = float(own.std(ddof=1) / n**0.5) if n > 1 else "N/A"
    name = str(config["model"])
    hashes = "".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples)
    return {
        "results": {task: scores},
        "group_subtasks": {},
        "configs": {task: {
            "task": task, "dataset_path": about["data"]["name"], "output_type": "span",
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True}
                            for one in asked.scores.values],
            "num_fewshot": 0, "metadata": {"version": TASK_VERSION},
        }},
        "versions": {task: TASK_VERSION},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(asked.scores.values, True)},
        "n-samples": {task: {"original": int(about["data"]["questions"]), "effective": n}},
        "config": {
            "model": "flaxqa",
            "model_args": f"pretrained={name},dtype={about['platform']['dtype']}",
            "model_dtype": about["platform"]["dtype"], "model_sha": about["model"]["commit"],
            "batch_size": None, "device": about["platform"]["backend"], "limit": config["limit"],
            "bootstrap_iters": 0,
        },
        "git_hash": None, "date": started.timestamp(),
        "pretty_env_info": "\n".join(f"{k}: {v}" for k, v in about["versions"].items()),
        "task_hashes": {task: digest(hashes)},
        "max_length": about["windows"]["max_length"],
        "model_source": "flaxqa", "model_name": name,
        "model_name_sanitized": sanitized(name),
        "start_time": started.timestamp(), "end_time": started.timestamp() + seconds,
        "total_evaluation_time_seconds": str(seconds),
        **dict.fromkeys(("system_instruction", "system_instruction_sha", "fewshot_as_multiturn",
                         "chat_template", "chat_template_sha")),
    }  # fmt: skip
