"""The command `flaxqa`. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 an unexpected error; 2 an option, config or data file that cannot be used;
3 done, with questions or records set aside; 4 a checkpoint that was refused; 5 below the score
asked for; 75 a place that cannot be written or reached now; 130 and 143 stopped by SIGINT and
SIGTERM.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from flaxqa import commands, files, stores
from flaxqa.arguments import (
    NAMED,
    Ask,
    Bench,
    Benchmark,
    Card,
    Compare,
    Comparison,
    Diff,
    Eval,
    Evaluation,
    Export,
    Finetune,
    Info,
    Predict,
    Prediction,
    Probe,
    Probing,
    Report,
    Score,
    Tuning,
)
from flaxqa.config import Options, PredictConfig, read_toml
from flaxqa.errors import FlaxqaError, UsageError, all_problems
from flaxqa.eval.config import EvalConfig

HELP = """Extractive question answering with DistilBERT and BERT on JAX, and the harness that
measures it.

  flaxqa ask --model MODEL --question "Who?" --context "I am Bob."
  flaxqa predict records.jsonl --model MODEL --output answers
  flaxqa eval --config quickstart
  flaxqa score dev-v1.1.json predictions.json
  flaxqa report runs/eval
  flaxqa diff runs/main runs/mine --gate
  flaxqa compare --config compare --output runs/compare
  flaxqa finetune --model MODEL --data train.json --output trained
  flaxqa probe --model MODEL --output runs/probe
  flaxqa export --model MODEL --format onnx --output model.onnx

MODEL is a directory or a hub id. `flaxqa COMMAND --help` explains a command, `flaxqa info` tells
what would compute here. --config takes a file, or one of flaxqa's own by its name. Exit codes: 0
done, 2 bad option or data, 3 done but questions or records were set aside, 4 checkpoint refused, 5
below --min-f1 or --gate, 75 try again."""


# Of each command that takes --config: its class, its field with the options, and their class.
CONFIGURED: dict[str, tuple[Any, str, Any]] = {
    "predict": (Predict, "prediction", Prediction),
    "eval": (Eval, "evaluation", Evaluation),
    "compare": (Compare, "comparison", Comparison),
    "bench": (Bench, "bench", Benchmark),
    "finetune": (Finetune, "tuning", Tuning),
    "probe": (Probe, "probing", Probing),
}
# Of each command its class and what it does.
COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "ask": (Ask, commands.ask),
    "predict": (Predict, commands.predict),
    "eval": (Eval, lambda command: commands.evaluate(command.evaluation)),
    "score": (Score, commands.score),
    "compare": (Compare, lambda command: commands.compare(command.comparison)),
    "bench": (Bench, lambda command: commands.compare(command.bench)),
    "finetune": (Finetune, commands.finetune),
    "probe": (Probe, lambda command: commands.probe(command.probing)),
    "report": (Report, commands.write_report),
    "diff": (Diff, commands.diff),
    "card": (Card, lambda command: commands.write_card(command, options_of_commands())),
    "export": (Export, commands.write_export),
    "info": (Info, commands.info),
}


def options_of_commands() -> dict[str, type[Any]]:
    """The class of the options of each command."""
    return {name: CONFIGURED[name][2] if name in CONFIGURED else kind
            for name, (kind, _) in COMMANDS.items()}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for number in ENDED:
        signal.signal(number, end)
    try:
        sys.exit(run(argv))
    except FlaxqaError as error:
        print(f"flaxqa: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        sys.stderr.close()
        sys.exit(1)


ENDED = {signal.SIGINT: "stopped", signal.SIGTERM: "terminated"}
LATER = 0.02  # seconds


def end(signal_number: int, frame: types.FrameType | None) -> None:
    """Ends the process as by an exception, and two seconds later if that one was lost.

    Where an exception would be dropped, or would end a library in the middle of its start, the
    signal comes again a little later. Files are written whole, so an end without clean-up loses
    nothing.
    """
    if not ENDING:
        print(f"flaxqa: {ENDED[signal.Signals(signal_number)]}", file=sys.stderr, flush=True)
        certain = threading.Timer(2.0, os._exit, (128 + signal_number,))
        certain.daemon = True
        certain.start()
        ENDING.append(signal_number)
    if not may_raise(frame):
        again = threading.Timer(LATER, os.kill, (os.getpid(), signal_number))
        again.daemon = True
        again.start()
        return
    for number in ENDED:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signal_number)


ENDING: list[int] = []  # the signal that came


def may_raise(frame: types.FrameType | None) -> bool:
    """Whether an exception from there reaches `main`: not out of an import or the collector."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "_xla_gc_callback":
            return False
        if code is main.__code__:
            return True
        frame = frame.f_back
    return False  # the process is ending already


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if argv[:1] == ["--version"]:
        from flaxqa import __version__

        print(__version__)
        return 0
    command = parse(argv)
    name = next(name for name, (kind, _) in COMMANDS.items() if type(command) is kind)
    refuse_urls(command)
    check(command, name)
    return COMMANDS[name][1](command)


def check(command: Any, name: str) -> None:
    """Raises: UsageError: options that cannot be; says which, as the command line calls them."""
    if isinstance(command, Options):
        problems = [
            re.sub(r"^(\w+)(?= is )", lambda found: "--" + found[0].replace("_", "-"), problem)
            for problem in command.problems()
        ]
        if problems:
            hint = f"`flaxqa {name} --help` explains the options"
            told = problems[0] if len(problems) == 1 else all_problems("options", problems)
            raise UsageError(f"{told}\n{hint}")
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(value := getattr(command, field.name)):
            check(value, name)


def in_stores(command: Any, name: str) -> bool:
    """Whether an option may name what lies in an object store."""
    if name == "output":
        return isinstance(command, PredictConfig | EvalConfig)
    return name in (*NAMED, "model", "teacher", "input")


def refuse_urls(command: Any) -> None:
    """Raises: UsageError: something that is read or written is a URL of no store."""
    paths = (*(command.named("PATHS") if isinstance(command, Options) else ()), *NAMED)
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            refuse_urls(value)
        for one in value if isinstance(value, tuple) else (value,):
            named = isinstance(one, Path) or (isinstance(one, str) and field.name in paths)
            if named and not (in_stores(command, field.name) and stores.is_url(one)):
                files.local(one)


def parse(argv: list[str]) -> Any:
    """The command and its options; the fields of --config FILE are the defaults of the others."""
    defaults: dict[str, dict[str, Any]] = {}
    if (name := argv[0] if argv else "") in CONFIGURED:
        command, field, kind = CONFIGURED[name]
        given = option(argv, "--config")
        values = read_toml(given, kind) if given is not None else {}
        # What finalizes needs only the output.
        optional = {"input": (), "model": ""} if "--finalize" in argv else {}
        required = {
            one.name: optional.get(one.name, tyro.MISSING)
            for one in dataclasses.fields(kind)
            if one.default is one.default_factory is dataclasses.MISSING
        }
        defaults[name] = {"default": command(**{field: kind(**required | values)})}
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(name, {}))]
        for name, (kind, _) in COMMANDS.items()
    ]
    either: Any = functools.reduce(operator.or_, kinds)
    return tyro.cli(
        either,
        prog="flaxqa",
        description=HELP,
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        registry=REGISTRY,
    )


def option(argv: list[str], name: str) -> str | None:
    """The value of an option that is needed before the command line can be parsed."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
    return None


# --- options of any number of NAME=VALUE ---

REGISTRY = tyro.constructors.ConstructorRegistry()
PAIRS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    dict[str, str]: ("COLUMN", str),
    dict[str, float]: ("NUMBER", float),
}


@REGISTRY.primitive_rule
def pairs(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How the fields that are a dict are given."""
    if kind.type not in PAIRS:
        return None
    of, value = PAIRS[kind.type]

    def read(arguments: list[str]) -> dict[str, Any]:
        split = [argument.partition("=") for argument in arguments]
        if wrong := [name for name, equals, _ in split if not equals]:
            raise ValueError(f"{wrong[0]!r} is not NAME={of}")
        return {name: value(text) for name, _, text in split}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"NAME={of}",
        instance_from_str=read,
        is_instance=lambda given: isinstance(given, dict),
        str_from_instance=lambda given: [f"{name}={text}" for name, text in given.items()],
    )


if __name__ == "__main__":
    main()
