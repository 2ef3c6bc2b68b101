"""The code that a card shows, each piece run before it is written, with what it printed.

A piece runs in a process of its own, without the network, on the checkpoint that was measured.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import flaxqa

QUESTION = "Where does Ada live?"
CONTEXT = "My name is Ada. I live in Turin and work in Milan."
SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A piece of code.

    Attributes:
      title: what it shows.
      needs: packages that it imports.
      code: with {model} for the checkpoint's name.
    """

    title: str
    needs: tuple[str, ...]
    code: str


SNIPPETS = (
    Snippet(
        "With flaxqa, on JAX:",
        ("jax",),
        """import flaxqa

question = {question}
context = {context}
reader = flaxqa.load({model})
answer = reader.answer(question, context)[0]
print(answer.text, round(answer.score, 4))
""",
    ),
    Snippet(
        "With transformers, on PyTorch (transformers 5 has no pipeline for question answering):",
        ("torch", "transformers"),
        """import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

name = {model}
question = {question}
context = {context}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForQuestionAnswering.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer(question, context, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))
""",
    ),
)


def filled(snippet: Snippet, model: str) -> str:
    """The code for a checkpoint's name."""
    names = {"model": model, "question": QUESTION, "context": CONTEXT}
    return snippet.code.format(**{key: json.dumps(value) for key, value in names.items()})


def shown(directory: Path, model: str, warn: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """The title and the code of each piece that works, with what it printed below it.

    Args:
      directory: of the checkpoint that it runs on.
      model: what the card calls the checkpoint.
      warn: is told of a piece that is left out, and why.
    """
    for snippet in SNIPPETS:
        name = snippet.needs[-1] if len(snippet.needs) > 1 else "flaxqa"
        missing = [one for one in snippet.needs if importlib.util.find_spec(one) is None]
        if missing:
            warn(f"the code for {name} is left out: {', '.join(missing)} is not installed")
            continue
        printed, problem = run(filled(snippet, str(directory.absolute())))
        if problem is not None:
            warn(f"the code for {name} is left out: {problem}")
            continue
        comments = "".join(f"# {line}\n" for line in printed.strip().splitlines())
        yield snippet.title, filled(snippet, model) + comments


def run(code: str) -> tuple[str, str | None]:
    """What a piece of code prints, and why it cannot be shown, or None."""
    paths = [str(Path(flaxqa.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-c", code],
            capture_output=True, text=True, env=environment, timeout=SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"it had not ended after {SECONDS:g} s"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return "", f"it fails: {said[-1]}"
    if not done.stdout.strip():
        return "", "it finds no answer"
    return done.stdout, None
