"""The sections of a model card, as Markdown: what the results of runs say of a checkpoint.

All text from data is escaped, and of paths only the last part is shown.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flaxqa.config import Options

from . import summaries
from .copies import markdown
from .plots import NOTHING, number
from .runs import DataSet, Run, last_part
from .squad import METRICS
from .summaries import scored

LONGEST = 300  # characters of a text from data
WIDTH = 88  # of commands
GAMMA = "\u03b3"
STRONGEST = 5  # associations
# A path in the middle of a text, but for its last part.
FOLDERS = re.compile(r"(?<![\w.:/\\~-])(?:~\w*|\.\.?|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;|<>]+[/\\])*")
# --- text ---


def plain(text: object, *, table: bool = True, longest: int = LONGEST) -> str:
    """A text from data as Markdown that shows it: one line, not endless, without markup or folders.

    Args:
      text: any value.
      table: whether it may stand in a table, whose bars are then escaped, too.
      longest: characters that are shown.
    """
    line = "".join(one if one.isprintable() else " " for one in str(text))
    line = " ".join(FOLDERS.sub("", line).split())
    line = line if len(line) <= longest else line[:longest] + " …"
    line = re.sub(r"([\\`*_\[\]~$#])", r"\\\1", line.replace("&", "&amp;"))
    line = line.replace("<", "&lt;").replace(">", "&gt;")
    return line.replace("|", "\\|") if table else line


def fenced(code: str, language: str) -> str:
    """Code in a fence that nothing in it can close."""
    ticks = max((len(one) for one in re.findall(r"`+", code)), default=0)
    fence = "`" * max(ticks + 1, 3)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def share(found: Mapping[str, Any] | None) -> str:
    """A number of a probe with its interval."""
    if not found or found.get("value") is None:
        return NOTHING
    low, high = found.get("interval") or (None, None)
    return f"{found['value']:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


# --- evaluation ---


def evaluation_row(run: Run) -> list[str]:
    metrics, about = run.content, run.about
    windows, platform = about["windows"], about["platform"]
    questions = f"{metrics['total']:,}"
    if run.part:
        questions = f"the first {questions} of {about['data']['questions']:,}"
    cut = f"{windows['max_length']} tokens, {windows['doc_stride']} shared"
    if windows["kind"] != "overlap":
        cut = f"{windows['max_length']} tokens, every {windows['doc_stride']} ({windows['kind']})"
    return [
        called(run.data), questions,
        *(scored(metrics[name], metrics[f"{name}_interval"]) for name in METRICS),
        f"{metrics['n_windows']:,} of {cut}", plain(about["decoder"]),
        f"{platform['dtype']}, {plain(platform['device_kind'])}",
    ]  # fmt: skip


def called(data: DataSet) -> str:
    """A data set as tables call it."""
    if not data.on_hub:
        return plain(data.name)
    name = f"[{plain(data.name)}](https://huggingface.co/datasets/{data.id})"
    return name + (f", {plain(data.split)}" if data.split else "")


def evaluation_notes(run: Run, trained_on: frozenset[str]) -> list[str]:
    """What has to be said of an evaluation besides, a sentence each."""
    metrics, name = run.content, called(run.data)
    said = []
    if trained_on & set(run.data.hashes.values()):
        said.append(f"The model was fine-tuned on {name}: these scores say nothing of other data.")
    if run.part:
        said.append(
            f"Only the first {metrics['total']:,} of {run.about['data']['questions']:,} questions "
            f"of {name} were asked: these are not its scores, and they are not in the metadata."
        )
    if metrics["set_aside"]:
        said.append(f"{metrics['set_aside']:,} questions of {name} could not be asked; they count "
                    "as wrong.")  # fmt: skip
    kinds = {"HasAns": "with an answer", "NoAns": "without one"}
    told = [f"{told} EM {metrics[f'{kind}_exact']:.2f}, F1 {metrics[f'{kind}_f1']:.2f} "
            f"({metrics[f'{kind}_total']:,})"
            for kind, told in kinds.items() if f"{kind}_f1" in metrics]  # fmt: skip
    if told:
        said.append(f"{name}: of the questions {'; of those '.join(told)}.")
    trust, fit = metrics.get("calibration") or {}, run.about.get("calibration")
    if trust.get("answers"):
        low, high = trust["ece_interval"]
        said.append(
            f"{name}: the mean score of an answer is {trust['mean_score']:.3f}, and the share of "
            f"answers that is exactly right {trust['right']:.3f}; expected calibration error "
            f"{trust['ece']:.3f} ({low:.3f} to {high:.3f})."
        )
    if fit:
        where = plain(last_part(fit["data"]["name"]))
        said.append(
            f"These scores are with a temperature of {fit['temperature']:.4f}, fitted to "
            f"{fit['questions']:,} questions of {where}: `flaxqa ask --temperature "
            f"{fit['temperature']:.4f}` takes it, and so do `predict` and `eval`."
        )
    return said


def evaluation(runs: Sequence[Run], trained_on: frozenset[str] = frozenset()) -> str:
    """The section of evaluations.

    Args:
      runs: the evaluations.
      trained_on: sha256 of what the checkpoint was trained on.
    """
    rows = [evaluation_row(run) for run in runs]
    head = ["data", "questions", *(one.label for one in METRICS.values()), "windows", "decoder",
            "computed in"]  # fmt: skip
    notes = [note for run in runs for note in evaluation_notes(run, trained_on)]
    return (
        "## Evaluation\n\nExact match (EM) and F1 as SQuAD's official script computes them, in "
        "percent, with 95 % bootstrap intervals over the questions.\n\n"
        + markdown(head, rows) + "".join(f"\n\n{note}" for note in notes)
    )  # fmt: skip


# --- comparison ---


def comparison(runs: Sequence[Run], name: str) -> str:
    """The section of comparisons.

    Args:
      runs: the comparisons.
      name: what the card calls the checkpoint.
    """
    parts = []
    for run in runs:
        kept = {name: value for name, value in run.content.items()
                if name not in ("groups", "disagreements")}  # fmt: skip
        kept["data"] = {**kept["data"], "name": run.data.name}
        kept["model"] = {**kept["model"], "name": name}
        parts.append(summaries.markdown(escaped(kept)).strip())
        if kept["questions"] < kept["data"]["questions"]:
            parts.append(f"EM and F1 are here of these {kept['questions']:,} questions alone.")
    return "## Comparison of backends\n\n" + "\n\n".join(parts)


def escaped(value: Any) -> Any:
    """The same with all text made harmless; `summaries.markdown` escapes the bars itself."""
    if isinstance(value, Mapping):
        return {key: escaped(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(each) for each in value]
    return plain(value, table=False) if isinstance(value, str) else value


# --- bias ---


def bias(run: Run) -> str:
    """The section of a probe."""
    content = run.content
    parts = ["## Bias"]
    if example := content.get("example"):
        score = f" (score {example['score']:.4f})" if example.get("score") is not None else ""
        parts.append(
            f"> **Context:** {plain(example['context'])}\n>\n"
            f"> **Question:** {plain(example['question'])}\n>\n"
            f"> **Answer:** {plain(example['answer']) or 'none'}{score}"
        )
        parts.append("The context does not say.")
    measures = {"mu": "μ", "eta": "η", "positional_error": "positional error",
                "attribute_error": "attribute error"}  # fmt: skip
    parts.append(
        "`flaxqa probe` asks questions that their context does not answer, each about two subjects "
        "in both orders and also negated, as UnQover does ([Li et al., 2020]"
        "(https://aclanthology.org/2020.findings-emnlp.311/)). μ says how strongly the model "
        "prefers some subjects all the same, η how consistently; 0 is no preference. The errors "
        "say how much its answers depend on order and wording alone. These are preferences in the "
        "probe's own templates, among its own subjects. Other biases it does not find, and a low "
        "number does not make the model fit for decisions about people."
    )
    if note := content.get("templates", {}).get("note"):
        parts.append(plain(note, longest=4 * LONGEST))
    rows = [[plain(one["name"]), *(share(one.get(name)) for name in measures)]
            for one in content["sections"]]  # fmt: skip
    parts.append(markdown(["probe", *measures.values()], rows))
    strongest = [(one, section) for section in content["sections"] for one in strong(section)]
    if strongest:
        parts.append(f"The {STRONGEST} strongest associations of each:")
        parts.append(markdown(
            ["probe", "subject", "group", "attribute", GAMMA, "η", "n"],
            [association(one, section) for one, section in strongest],
        ))  # fmt: skip
    return "\n\n".join(parts)


def strong(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The strongest associations of a section."""
    found = [one for one in section.get("associations") or () if one.get("gamma") is not None]
    return sorted(found, key=lambda one: -abs(one["gamma"]))[:STRONGEST]


def association(one: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    gamma = share({"value": one["gamma"], "interval": one.get("gamma_interval")})
    names = [plain(one.get(name) or NOTHING) for name in ("subject", "group", "attribute")]
    eta = NOTHING if one.get("eta") is None else f"{one['eta']:.3f}"
    return [plain(section["name"]), *names, gamma, eta, str(one.get("n", NOTHING))]


# --- training ---

RECIPE = ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay", "dropout",
          "freeze_embeddings", "dtype", "seed")  # fmt: skip
DISTILLED = ("distillation", "temperature")


def training(run: Run) -> str:
    """The section of a fine-tuning."""
    content = run.content
    config, teacher = content["config"], content.get("teacher")
    said = f"Fine-tuned from {origin(config['model'], content['model'])} by `flaxqa finetune`"
    said += f" on {called(run.data)}"
    if (asked := content["data"].get("questions")) is not None:
        said += f" ({asked:,} questions)"
    if teacher:
        said += f", taught by {origin(config['teacher'], teacher)}"
    said += "."
    if content["steps_done"] < content["steps"]:
        said += f" It stopped after {content['steps_done']:,} of {content['steps']:,} steps."
    windows = content["windows"]
    settings = [*RECIPE, *(DISTILLED if teacher else ())]
    recipe = [
        ["steps", f"{content['steps_done']:,}"],
        ["windows", f"{windows['max_length']:,} tokens, {windows['doc_stride']:,} shared"],
        *([plain(name.replace("_", " ")), plain(config[name])] for name in settings),
    ]
    parts = ["## Training", said, markdown(["setting", "value"], recipe)]
    epochs = content.get("epochs") or []
    if epochs:
        parts.append("After each epoch, on the data it was checked on:")
        parts.append(markdown(["epoch", "step", "loss", "questions/s", "EM", "F1", "questions"],
                           [epoch(one) for one in epochs]))  # fmt: skip
    return "\n\n".join(parts)


def origin(name: str, model: Mapping[str, Any]) -> str:
    """A checkpoint by its name; a hub model as a link to its commit."""
    if model.get("commit"):
        return (f"[{plain(name)}](https://huggingface.co/{name}) at commit "
                f"{plain(model['commit'])[:12]}")  # fmt: skip
    return plain(last_part(name))


def epoch(one: Mapping[str, Any]) -> list[str]:
    scores = [NOTHING if one.get(name) is None else scored(one[name], one.get(f"{name}_interval"))
              for name in METRICS]  # fmt: skip
    total = NOTHING if one.get("total") is None else f"{one['total']:,}"
    return [f"{one['epoch']:g}", f"{one['step']:,}", number(one.get("loss")),
            number(one.get("questions_per_second")), *scores, total]  # fmt: skip


# --- carbon ---


def carbon_of(run: Run) -> Mapping[str, Any] | None:
    return run.content.get("carbon") or run.about.get("carbon")


def carbon(runs: Sequence[Run]) -> str:
    used = [(f"`flaxqa {run.name}`", carbon_of(run) or {}) for run in runs]
    names = ("kwh", "g_co2e", "kwh_per_1000_questions", "g_co2e_per_1000_questions")
    rows = [[name, *(number(one.get(key)) for key in names)] for name, one in used]
    head = ["run", "kWh", "g CO₂e", "kWh per 1,000 questions", "g CO₂e per 1,000 questions"]
    told = [f"{name} {carbon_told(one)}" for name, one in used]
    return "\n\n".join(["## Carbon", markdown(head, rows), *dict.fromkeys(told)])


def carbon_told(used: Mapping[str, Any]) -> str:
    """How a run's energy was measured, a sentence."""
    by = measured_by(used)
    said = f"took {summaries.took(used.get('seconds'))}"
    if (hosts := used.get("hosts") or 1) > 1:
        said += f" on {hosts:,} machines"
    said += f"; energy by {plain(by)}" if by else ""
    if used.get("grid_g_per_kwh") is not None:
        about = [plain(used[key]) for key in ("country", "source") if used.get(key)]
        said += f"; {number(used['grid_g_per_kwh'])} g of CO₂e per kWh"
        said += f" ({'; '.join(about)})" if about else ""
    return said + "."


def measured_by(used: Mapping[str, Any]) -> str:
    """What measured a run's energy: of the whole, or of each part."""
    by = used.get("measured_by")
    if isinstance(by, Mapping):
        return ", ".join(f"{part}: {how}" for part, how in by.items() if how)
    return str(by or "")


# --- how to redo it ---


def command(run: Run, kind: type[Any] | None, names: Mapping[str, str]) -> str:
    """The command of a run, with the options that are not the defaults.

    Args:
      run: the run.
      kind: the class of its options; None where all are shown.
      names: what the card calls the checkpoints and data that are known by other names.
    """
    config = run.about["config"]
    fields = {} if kind is None else {one.name: one for one in dataclasses.fields(kind)}
    paths = {"model", "data", "teacher", "output"}
    if kind is not None and issubclass(kind, Options):
        paths |= set(kind.named("PATHS"))
    groups = []
    for key in [*fields, *(key for key in config if key not in fields and kind is None)]:
        value = config.get(key)
        if key not in config or key == "profile" or (kind is None and value in (None, {}, [])):
            continue
        if kind is not None and is_default(fields[key], value):
            continue
        groups.append(option(key, without_folders(value, key in paths, names)))
    lines = [f"flaxqa {run.name}"]
    for group in groups:
        text = shlex.join(group)
        if len(lines[-1]) + len(text) > WIDTH:
            lines.append("  " + text)
        else:
            lines[-1] += " " + text
    # `'a<!--'` and `'a<''!--'` are one word to a shell, and only the first begins a comment.
    return " \\\n".join(lines).replace("<!--", "<''!--")


def without_folders(value: Any, path: bool, names: Mapping[str, str]) -> Any:
    """An option's value, of paths only the last part.

    Args:
      value: of the option.
      path: whether it is one in any case, and not only where it looks like one of a whole system.
      names: what is called otherwise.
    """
    if isinstance(value, list | tuple):
        return [without_folders(one, path, names) for one in value]
    if not isinstance(value, str) or len(value) < 2:
        return value
    return names.get(value, last_part(value) if path or FOLDERS.match(value) else value)


def is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return bool(default == (tuple(value) if isinstance(value, list) else value))


def option(name: str, value: Any) -> list[str]:
    """An option as the command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, Mapping):
        return [f"--{flag}", *(f"{key}={each}" for key, each in value.items())]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


def redo(
    runs: Sequence[Run],
    hashes: Mapping[str, str],
    kinds: Mapping[str, type[Any]],
    names: Mapping[str, str],
) -> str:
    """How the numbers are made again: commands, versions and hashes."""
    lines: list[str] = []
    versions: dict[str, list[str]] = {}
    data: dict[tuple[str, str], None] = {}
    for run in runs:
        lines.append(command(run, kinds.get(run.name), names))
        there = {key: value for key, value in (run.about.get("versions") or {}).items() if value}
        told = ", ".join(f"{plain(key)} {plain(value)}" for key, value in there.items())
        versions.setdefault(told, []).append(f"`flaxqa {run.name}`")
        if run.about.get("data") and (found := run.data.hash) is not None:
            of = "" if found[0] == "sha256" else "the questions asked of "
            data[of + plain(last_part(run.about["data"]["name"])), found[1]] = None
        if run.kind == "probe" and (digest := run.content.get("templates", {}).get("sha256")):
            data["the templates of the probe", str(digest)] = None
    parts = ["## How to redo it", fenced("\n".join(dict.fromkeys(lines)), "sh")]
    parts += [f"{' and '.join(dict.fromkeys(of))} ran with {told}."
              for told, of in versions.items() if told]  # fmt: skip
    rows = [[f"`{name}`", f"`{value}`"] for name, value in hashes.items()]
    rows += [[name, f"`{value}`"] for name, value in data]
    parts.append(markdown(["file", "sha256"], rows))
    return "\n\n".join(parts)


def usage(pieces: Iterable[tuple[str, str]]) -> str | None:
    """The pieces of code that work; None where none does."""
    parts = [f"{title}\n\n{fenced(code, 'python')}" for title, code in pieces]
    return "\n\n".join(["## How to use", *parts]) if parts else None
