"""The logits of a teacher for all windows, computed once and kept for every epoch and every run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from flaxqa import files
from flaxqa.checkpoint import Checkpoint
from flaxqa.errors import ModelRejected, UsageError, all_problems
from flaxqa.features import Windows
from flaxqa.predict import Predictor

ABOUT = "teacher.json"
WINDOWS = 2_048  # of a file: what is lost at most when a run is killed


def check(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises: ModelRejected: the two do not read the same tokens."""
    problems = []
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        problems.append("its vocabulary is another one than the student's")
    rules = (json.loads(one.tokenizer.to_str())["normalizer"] for one in (teacher, student))
    if next(rules) != next(rules):
        problems.append("its tokenizer treats upper case or accents in another way")
    if problems:
        raise ModelRejected(
            all_problems(f"{teacher.name} cannot teach {student.name}: logits are for tokens",
                         problems)
        )  # fmt: skip


def logits(
    predictor: Predictor,
    windows: Windows,
    folder: Path,
    about: Mapping[str, object],
    advance: Callable[[int], None],
) -> np.ndarray:
    """The start and end logits of every token, float32 [2, tokens of all windows].

    What a folder has is read; what it lacks is computed and kept there, a file after the other.

    Args:
      predictor: of the teacher.
      windows: of all examples.
      folder: where they are kept; made if missing.
      about: what decides the logits besides the windows.
      advance: is told how many windows were just done.

    Raises:
      UsageError: the folder has those of another teacher or of other windows.
      TryAgain: it cannot be written.
    """
    folder = files.writable_directory(folder)
    digest = hashlib.sha256(windows.input_ids.tobytes() + windows.lengths.tobytes()).hexdigest()
    wanted = json.dumps({**about, "windows_sha256": digest}, indent=1, sort_keys=True)
    known = folder / ABOUT
    if not known.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} has other files; the teacher's logits need a folder of their own"
        )
    if known.exists() and known.read_text() != wanted:
        raise UsageError(
            f"{folder} has the logits of another teacher, or for other windows; see {known}, and "
            "name another folder"
        )
    files.write_whole(known, wanted.encode())
    parts = []
    for begin in range(0, len(windows), WINDOWS):
        chunk = slice(begin, begin + WINDOWS)
        path = folder / f"logits-{begin // WINDOWS:05d}.npy"
        n_tokens = int(windows.lengths[chunk].sum())
        part = read(path)
        if part is None or part.shape != (2, n_tokens):
            scores = predictor.predict(Windows.of(windows[chunk]), advance)
            inside = np.arange(scores.start.shape[1]) < scores.lengths[:, None]
            part = np.stack([scores.start[inside], scores.end[inside]]).astype(np.float32)
            if not np.isfinite(part).all():
                raise ModelRejected("the teacher's logits are not finite")
            buffer = io.BytesIO()
            np.save(buffer, part)
            files.write_whole(path, buffer.getvalue())
        else:
            advance(len(windows.lengths[chunk]))
        parts.append(part)
    return np.concatenate(parts, axis=1)


def read(path: Path) -> np.ndarray | None:
    """What a file has, None where it is missing or damaged."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found
